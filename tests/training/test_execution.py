"""Gradient checkpointing and compilation change how a step is computed, not what comes out."""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.errors import ConfigError
from DeBERTa.model.encoder import Layer
from DeBERTa.training import execution
from DeBERTa.training.execution import (
    check_compiler,
    describe_kernels,
    resolve_compile,
    select_kernels,
    set_execution,
)
from DeBERTa.training.steps import MaskedLMStep
from tests.conftest import PATHS, TINY, set_tf32
from tests.training.batches import random_batch, train_config

CPU = torch.device("cpu")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL = TINY | {"vocab_size": 208, "num_hidden_layers": 3}


def build_small_model(task: str, change: dict) -> nn.Module:
    """Return a model of three layers, two in a generator, for up to 64 of 208 tokens."""
    torch.manual_seed(0)
    values = SMALL | change
    if task == "MLM":
        return MaskedLanguageModel(ModelConfig.from_dict(values))
    parts = {"generator": values | {"num_hidden_layers": 2}, "discriminator": values}
    return RTDModel(RTDConfig.from_dict({"embedding_sharing": "gdes"} | parts))


def compute_losses_and_gradients(model: nn.Module, length: int = 32) -> dict[str, torch.Tensor]:
    """Return those of one micro-batch, as steps.py computes them."""
    batch = random_batch(length=length, vocabulary=200)
    torch.manual_seed(7)
    model.zero_grad()
    if isinstance(model, RTDModel):
        (out, _) = model.generator.generate(batch)
        # Rounding may change a sample: the discriminator reads given tokens.
        given = torch.arange(len(out.samples)) * 7 % 190 + 4
        ids = batch.input_ids.masked_scatter(batch.labels > 0, given)
        detected = model.compute_detection_loss(ids, batch.input_mask, batch.labels)
        loss = out.loss.sum() / batch.masked_tokens + 10 * detected.loss / batch.real_tokens
        losses = {"generator": out.loss, "discriminator": detected.loss, "samples": out.samples}
    else:
        out = model.compute_masked_loss(batch, is_sampled=False)
        loss, losses = out.loss.mean(), {"loss": out.loss}
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) > 40
    return {name: loss.detach() for name, loss in losses.items()} | gradients | {"next draw": torch.rand(1)}


def count_saved_bytes(function: Callable[[], object]) -> int:
    """Return what autograd saves for the backward pass while `function` runs, each storage once."""
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result is not None  # the graph lived until here, so that no address was used twice
    return sum(saved.values())


@pytest.mark.parametrize("task", ["MLM", "RTD"])
def test_checkpointing_gives_the_same_bits(task, path):
    """With dropout: a recomputed layer draws the same masks, and what follows draws as before."""
    plain = build_small_model(task, {})
    again = copy.deepcopy(plain)
    set_execution(plain, train_config(**PATHS[path]), CPU)
    set_execution(again, train_config(**PATHS[path], gradient_checkpointing=True), CPU)
    expected, actual = compute_losses_and_gradients(plain), compute_losses_and_gradients(again)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


def test_checkpointing_keeps_less(path):
    """A layer keeps [B, H, L, L] probabilities; with checkpoints its inputs alone."""
    batch = random_batch(length=64, vocabulary=200)
    saved = []
    for gradient_checkpointing in (False, True):
        model = build_small_model("MLM", {"num_hidden_layers": 6})
        config = train_config(**PATHS[path], gradient_checkpointing=gradient_checkpointing)
        set_execution(model, config, CPU)
        parameters = sum(p.nbytes for p in model.parameters())
        saved.append(
            count_saved_bytes(lambda model=model: model.compute_masked_loss(batch, is_sampled=False))
            - parameters
        )
    assert 0 < saved[1] < saved[0] / 4


def test_evaluation_stores_no_checkpoints(monkeypatch):
    model = build_small_model("MLM", {})
    set_execution(model, train_config(gradient_checkpointing=True), CPU)
    monkeypatch.setattr("DeBERTa.model.encoder.checkpoint", None)  # calling it would raise
    with torch.no_grad():
        model.compute_masked_loss(random_batch(vocabulary=200), is_sampled=False)


def require_compiler() -> None:
    """Skip a test where `torch.compile` has no C++ compiler."""
    try:
        check_compiler(CPU)
    except ConfigError as error:
        pytest.skip(str(error))


def compile_copy(model: nn.Module, backend: str, **flags: bool | str) -> nn.Module:
    """Return a copy with every layer compiled by `backend`, as one graph each: a break raises."""
    require_compiler()
    model = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layer, "compile", partialmethod(nn.Module.compile, backend=backend, fullgraph=True))
        set_execution(model, train_config(compile=True, **flags), CPU)
    return model


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare to 1e-5, gradients relative to the largest one: those of key biases are sums that cancel."""
    assert actual.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for name, tensor in expected.items() if "." in name)
    for name, tensor in expected.items():
        scale = largest if "." in name else 1.0
        torch.testing.assert_close(
            actual[name], tensor, atol=1e-5 * scale, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("task", "backend", "change", "flags"),
    [
        ("MLM", "inductor", {}, {}),
        ("RTD", "aot_eager", {"pos_att_type": "c2p", "share_att_key": False}, {"attention": "sdpa"}),
        ("RTD", "aot_eager", {}, {}),
        ("RTD", "aot_eager", {}, {"gradient_checkpointing": True}),
        ("RTD", "aot_eager", {}, {"kernels": "off"}),
    ],
)
def test_compiled_layers_compute_the_same(task, backend, change, flags):
    """No graph break, and one graph for all layers; names stay."""
    torch.compiler.reset()
    counters.clear()
    plain = build_small_model(task, NO_DROPOUT | change)
    fast = compile_copy(plain, backend, **flags)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert_close(compute_losses_and_gradients(fast), compute_losses_and_gradients(plain))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("backend", "flags", "graphs"),
    [
        ("inductor", {}, (1, 2, 2, 2, 2, 2)),
        # Blocks of 64 rows where the length is a multiple of 64.
        ("aot_eager", {"attention": "sdpa"}, (1, 2, 3, 4, 5, 5)),
        ("aot_eager", {"attention": "sdpa", "gradient_checkpointing": True}, (1, 2, 3, 4, 5, 5)),
    ],
)
def test_compiled_layers_at_other_lengths(backend, flags, graphs):
    """One more graph for all of them; with sdpa one per length."""
    torch.compiler.reset()
    counters.clear()
    plain = build_small_model("MLM", NO_DROPOUT | {"max_position_embeddings": 128})
    fast = compile_copy(plain, backend, **flags)
    for length, number in zip((32, 40, 64, 48, 128, 64), graphs, strict=True):
        assert_close(compute_losses_and_gradients(fast, length), compute_losses_and_gradients(plain, length))
        assert counters["stats"]["unique_graphs"] == number
    assert not counters["graph_break"]


def test_evaluation_is_not_compiled():
    """Its graphs would be for a few batches; before the first step it would make that of training dynamic."""
    torch.compiler.reset()
    counters.clear()
    plain = build_small_model("MLM", NO_DROPOUT)
    fast = compile_copy(plain, "aot_eager")
    step = MaskedLMStep(fast, train_config(), "fp32", CPU, total_steps=10)
    batch = random_batch(rows=3, vocabulary=200)
    expected = plain.eval().compute_masked_loss(batch, is_sampled=False)
    torch.testing.assert_close(step.evaluate(batch)[0].masked.loss, expected.loss)
    assert counters["stats"]["unique_graphs"] == 0
    for length, graphs in ((32, 1), (40, 2), (48, 2)):  # static; another length makes it dynamic
        compute_losses_and_gradients(fast, length)
        assert counters["stats"]["unique_graphs"] == graphs


def test_layers_of_many_kinds_are_all_compiled():
    """The compiler counts the graphs of all layers together, and by default has no more than 8."""
    torch.compiler.reset()
    counters.clear()
    for width in range(16, 26):
        model = build_small_model("MLM", NO_DROPOUT | {"hidden_size": width, "num_attention_heads": 1})
        compute_losses_and_gradients(compile_copy(model, "aot_eager"))
    assert counters["stats"]["unique_graphs"] == 10


def test_compiled_dropout_is_drawn_again_by_checkpointing():
    """The compiler's own random numbers are those of PyTorch's generator too."""
    torch.compiler.reset()
    plain = build_small_model("MLM", {})
    first = compute_losses_and_gradients(compile_copy(plain, "inductor"))
    again = compute_losses_and_gradients(compile_copy(plain, "inductor", gradient_checkpointing=True))
    without = compute_losses_and_gradients(build_small_model("MLM", NO_DROPOUT))
    assert_close(again, first)
    assert not torch.allclose(first["loss"], without["loss"], rtol=1e-3)


@pytest.mark.parametrize(
    ("device", "flags", "obstacle", "expected"),
    [
        ("cuda", {}, None, True),
        ("cuda", {}, "no C compiler", False),
        ("cuda", {"kernels": "off"}, None, False),
        ("cuda", {"compile": False}, None, False),
        ("cuda", {"compile": True, "kernels": "off"}, None, True),
        ("cpu", {}, None, False),
        ("cpu", {"compile": True}, None, True),
    ],
)
def test_compiled_by_default(device, flags, obstacle, expected, monkeypatch):
    """On GPUs where triton is installed, with what it needs."""
    monkeypatch.setattr(execution, "find_compiler_obstacle", lambda _device: obstacle)
    assert resolve_compile(train_config(**flags), torch.device(device)) == expected


def test_a_gpu_without_a_compiler(monkeypatch, caplog):
    """By default nothing is compiled, with a warning; a flag that asks for it is one error."""
    pytest.importorskip("DeBERTa.ops.triton", reason="the package DeBERTa/ops is missing")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (9, 0))
    for module in ("training.execution", "ops.triton"):
        monkeypatch.setattr(f"DeBERTa.{module}.find_compiler_obstacle", lambda _device: "no gcc; install it")
    model = build_small_model("MLM", {"hidden_size": 64, "num_attention_heads": 1})
    cuda = torch.device("cuda")
    with protect_settings(monkeypatch):
        assert set_execution(model, train_config(), cuda) == {"kernels": "auto", "attention": "sdpa"}
        assert "layers are not compiled, and Triton attention is not used: no gcc; install it" in caplog.text
        with pytest.raises(ConfigError, match=r"^--compile: no gcc; install it, or omit --compile$"):
            set_execution(model, train_config(compile=True), cuda)
        with pytest.raises(ConfigError, match=r"^--attention triton: no gcc; install it, or use"):
            set_execution(model, train_config(attention="triton"), cuda)


def test_flag_compiles_every_layer_in_place():
    require_compiler()
    model = build_small_model("RTD", {})
    names = list(model.state_dict())
    set_execution(model, train_config(compile=True), CPU)
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    assert len(layers) == 5
    torch.compiler.reset()
    counters.clear()
    compute_losses_and_gradients(model)
    assert counters["stats"]["unique_graphs"] == 1
    assert list(model.state_dict()) == names


def test_missing_compiler_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with pytest.raises(ConfigError, match=r"--compile: there is no C\+\+ compiler .*/c\+\+; install it, or"):
        check_compiler(CPU)


@contextlib.contextmanager
def protect_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the settings of the process that `set_execution` changes for a GPU."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "TRITON_CACHE_DIR", "USER"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    is_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        with set_tf32(True):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(is_cudnn)


@pytest.mark.parametrize("value", [False, True])
def test_settings_of_a_gpu(value, monkeypatch):
    """`--tf32` and `--deterministic` are settings of the process."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (9, 0))
    config = train_config(tf32=value, deterministic=value, compile=False)
    with protect_settings(monkeypatch), set_tf32(not value):
        set_execution(build_small_model("MLM", {}), config, torch.device("cuda"))
        assert torch.are_deterministic_algorithms_enabled() == value
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == value
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if value else None)
        assert os.environ["USER"]


def test_triton_needs_a_gpu():
    pytest.importorskip("DeBERTa.ops", reason="the package DeBERTa/ops is missing")
    with pytest.raises(ConfigError, match="--attention triton: its kernels need a CUDA GPU, not a CPU"):
        select_kernels(build_small_model("MLM", {}), train_config(attention="triton"), CPU)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"kernels": "off"}, {"kernels": "off", "attention": "eager"}),
        ({"kernels": "off", "attention": "eager"}, {"kernels": "off", "attention": "eager"}),
        ({}, {"kernels": "auto", "attention": "blocked"}),
        ({"attention": "sdpa"}, {"kernels": "auto", "attention": "sdpa"}),
        ({"attention": "eager"}, {"kernels": "auto", "attention": "eager"}),
        ({"compile": True}, {"kernels": "auto", "attention": "eager"}),
    ],
)
def test_what_the_flags_mean_here(flags, expected):
    if expected["kernels"] == "auto":
        pytest.importorskip("DeBERTa.ops", reason="the package DeBERTa/ops is missing")
    model = build_small_model("MLM", {})
    names = list(model.state_dict())
    assert select_kernels(model, train_config(**flags), CPU) == expected
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("device", "tf32", "end"), [("cuda", True, ", TF32 on"), ("cuda", False, ", TF32 off"), ("cpu", True, "")]
)
def test_description_names_tf32_on_a_gpu(device, tf32, end):
    config = train_config(kernels="off", compile=False, tf32=tf32)
    assert describe_kernels("off", "eager", config, torch.device(device)) == f"plain PyTorch{end}"
