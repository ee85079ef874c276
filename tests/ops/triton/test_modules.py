"""Layers with the Triton attention: compiled around the kernels, and what the kernels cannot take."""

import importlib.util
from collections.abc import Callable
from functools import partialmethod

import pytest
import torch
from torch import nn

if importlib.util.find_spec("triton") is None:
    pytest.skip("the kernels are not tested: the package triton is not installed", allow_module_level=True)

from DeBERTa import MaskedLanguageModel, ModelConfig
from DeBERTa.errors import ConfigError
from DeBERTa.ops.attention import SdpaEncoder, SdpaSelfAttention
from DeBERTa.ops.triton.attention import attend
from DeBERTa.ops.triton.modules import TritonEncoder, TritonSelfAttention
from DeBERTa.training.execution import set_execution
from tests.conftest import tiny_model
from tests.training.batches import random_batch, train_config


def test_compiled_layers_are_two_graphs(monkeypatch):
    """One before the kernels and one after them: each call of a graph costs checks, forward and backward."""
    graphs, calls = [], []

    def count_calls(graph: torch.fx.GraphModule, _inputs: list) -> Callable:
        graphs.append(graph)
        return lambda *inputs: calls.append(graph) or graph.forward(*inputs)

    # The context of uniform attention: kernels need a GPU.
    monkeypatch.setattr(
        "DeBERTa.ops.triton.modules.attend",
        lambda qkv, *_: qkv[:, :, 2].mean(1, keepdim=True).expand(-1, qkv.size(1), -1, -1),
    )
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=count_calls))
    values = tiny_model() | {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 3}
    model = MaskedLanguageModel(ModelConfig.from_dict(values))
    monkeypatch.setattr("DeBERTa.training.execution.find_compiler_obstacle", lambda _device: None)
    torch.compiler.reset()
    set_execution(model, train_config(compile=True, attention="sdpa"), torch.device("cpu"))
    kinds = {SdpaSelfAttention: TritonSelfAttention, SdpaEncoder: TritonEncoder}
    for module in model.modules():
        module.__class__ = kinds.get(type(module), type(module))
    model.compute_masked_loss(random_batch(length=32), is_sampled=False).loss.mean().backward()
    assert len(graphs) == 2
    assert len(calls) == 2 * 2  # the third layer is the mask decoder's, which is not compiled


def test_more_sequences_than_the_grid_has():
    qkv, mask = torch.zeros(1, 1, 3, 2, 32).expand(32768, 1, 3, 2, 32), torch.ones(32768, 1, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"32768 sequences in a micro-batch are more than .* with 2 heads;"):
        attend(qkv, (None, None), mask, (0.0, torch.zeros(1)))
