"""Gradient checkpointing and compilation change how a step is computed, not what comes out."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.errors import ConfigError
from DeBERTa.model.pretraining import corrupt
from DeBERTa.training.execution import check_compiler, set_execution
from tests.conftest import TINY
from tests.training.batches import random_batch, train_config

CPU = torch.device("cpu")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL = TINY | {"vocab_size": 208, "num_hidden_layers": 3}


def small_model(task: str, change: dict) -> nn.Module:
    """Three layers, two of them in a generator, for sequences of up to 64 tokens of 208 words."""
    torch.manual_seed(0)
    values = SMALL | change
    if task == "MLM":
        return MaskedLanguageModel(ModelConfig.from_dict(values))
    parts = {"generator": values | {"num_hidden_layers": 2}, "discriminator": values}
    return RTDModel(RTDConfig.from_dict({"embedding_sharing": "gdes"} | parts))


def losses_and_gradients(model: nn.Module, length: int = 32) -> dict[str, torch.Tensor]:
    """Of one part of a batch, as steps.py computes them."""
    batch = random_batch(length=length, vocabulary=200)
    torch.manual_seed(7)
    model.zero_grad()
    if isinstance(model, RTDModel):
        out = model.generator.masked_loss(batch, sample=True)
        # A rounded probability may draw another word, so that the discriminator reads words of ours.
        words = corrupt(batch.input_ids, batch.labels, (torch.arange(len(out.samples)) * 7) % 190 + 4)
        found = model.detection_loss(words, batch.input_mask, batch.labels)
        loss = out.loss.sum() / batch.masked_tokens + 10 * found.loss / batch.real_tokens
        losses = {"generator": out.loss, "discriminator": found.loss, "samples": out.samples}
    else:
        out = model.masked_loss(batch, sample=False)
        loss, losses = out.loss.mean(), {"loss": out.loss}
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) > 40
    return {name: loss.detach() for name, loss in losses.items()} | gradients | {"next draw": torch.rand(1)}


def saved_bytes(function: Callable[[], object]) -> int:
    """What autograd keeps for the backward pass while `function` runs, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result is not None  # the graph lived until here, so that no address was used twice
    return sum(kept.values())


@pytest.mark.parametrize("attention", ["auto", "eager", "sdpa"])
@pytest.mark.parametrize("task", ["MLM", "RTD"])
def test_checkpointing_gives_the_same_bits(task, attention):
    """With dropout: each layer draws the same masks when it is computed again, and what follows draws as before."""
    plain = small_model(task, {})
    again = copy.deepcopy(plain)
    set_execution(plain, train_config(attention=attention), CPU)
    set_execution(again, train_config(attention=attention, gradient_checkpointing=True), CPU)
    expected, actual = losses_and_gradients(plain), losses_and_gradients(again)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


def test_checkpointing_keeps_less():
    """A layer keeps [B, H, L, L] probabilities and [B, L, 4h] activations; computed again, its inputs alone."""
    batch = random_batch(length=64, vocabulary=200)
    kept = []
    for gradient_checkpointing in (False, True):
        model = small_model("MLM", {"num_hidden_layers": 6})
        set_execution(model, train_config(gradient_checkpointing=gradient_checkpointing), CPU)
        parameters = sum(p.nbytes for p in model.parameters())
        kept.append(saved_bytes(lambda model=model: model.masked_loss(batch, sample=False)) - parameters)
    assert 0 < kept[1] < kept[0] / 4


def test_evaluation_is_not_computed_twice(monkeypatch):
    model = small_model("MLM", {})
    set_execution(model, train_config(gradient_checkpointing=True), CPU)
    monkeypatch.setattr("DeBERTa.model.encoder.checkpoint", None)  # calling it would raise
    with torch.no_grad():
        model.masked_loss(random_batch(vocabulary=200), sample=False)


def compiled(model: nn.Module, backend: str, **flags: bool) -> nn.Module:
    """A copy with every layer compiled by `backend`, as one graph each: a break raises."""
    model = copy.deepcopy(model)
    set_execution(model, train_config(**flags), CPU)
    for module in model.modules():
        if type(module).__name__ == "Layer":
            module.compile(backend=backend, fullgraph=True)
    return model


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To 1e-5, gradients of the largest one: those of key biases are sums that cancel."""
    assert actual.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for name, tensor in expected.items() if "." in name)
    for name, tensor in expected.items():
        scale = largest if "." in name else 1.0
        torch.testing.assert_close(
            actual[name], tensor, atol=1e-5 * scale, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("task", "backend", "change", "flags", "other_lengths"),
    [
        ("MLM", "inductor", {}, {}, (40, 48)),
        ("RTD", "aot_eager", {"pos_att_type": "c2p", "share_att_key": False}, {"attention": "sdpa"}, ()),
        ("RTD", "aot_eager", {}, {}, ()),
        ("RTD", "aot_eager", {}, {"gradient_checkpointing": True}, ()),
    ],
)
def test_compiled_layers_compute_the_same(task, backend, change, flags, other_lengths):
    """No break in a layer, one graph for all layers of all models, and one more for other lengths; names as before."""
    torch._dynamo.reset()
    counters.clear()
    plain = small_model(task, NO_DROPOUT | change)
    fast = compiled(plain, backend, **flags)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert_close(losses_and_gradients(fast), losses_and_gradients(plain))
    assert counters["stats"]["unique_graphs"] == 1
    for length in other_lengths:
        assert_close(losses_and_gradients(fast, length), losses_and_gradients(plain, length))
        assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_compiled_dropout_is_drawn_again_by_checkpointing():
    """The compiler's own random numbers are those of PyTorch's generator too."""
    torch._dynamo.reset()
    plain = small_model("MLM", {})
    first = losses_and_gradients(compiled(plain, "inductor"))
    again = losses_and_gradients(compiled(plain, "inductor", gradient_checkpointing=True))
    without = losses_and_gradients(small_model("MLM", NO_DROPOUT))
    assert_close(again, first)
    assert not torch.allclose(first["loss"], without["loss"], rtol=1e-3)


def test_flag_compiles_every_layer_in_place():
    model = small_model("RTD", {})
    names = list(model.state_dict())
    set_execution(model, train_config(compile=True), CPU)
    layers = [module for module in model.modules() if type(module).__name__ == "Layer"]
    assert len(layers) == 5 and all(layer._compiled_call_impl is not None for layer in layers)
    assert list(model.state_dict()) == names


def test_no_compiler_is_said_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with pytest.raises(ConfigError, match=r"--compile needs a C\+\+ compiler on a CPU"):
        check_compiler(CPU)
    monkeypatch.delenv("CXX")
    check_compiler(CPU)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"there is no (g|clang)\+\+"):
        check_compiler(CPU)


def test_flash_that_cannot_run_is_said_once(capsys):
    model = small_model("RTD", {})
    set_execution(model, train_config(attention="flash"), CPU)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "--attention flash is not possible: its kernels run on CUDA GPUs, not on a CPU; --attention sdpa is used"
    ]
    assert {m.backend for name, m in model.named_modules() if name.endswith("attention.self")} == {"sdpa"}
