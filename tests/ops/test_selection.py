"""The seam: which modules `select_implementations` changes, on which device, and what stays."""

import pytest
import torch

from DeBERTa import ModelConfig, RTDConfig, RTDModel, TrainConfig
from DeBERTa.errors import ConfigError
from DeBERTa.model.attention import DisentangledSelfAttention
from DeBERTa.model.encoder import Encoder, Layer
from DeBERTa.model.heads import LMHead
from DeBERTa.model.losses import ChunkOperations
from DeBERTa.model.pretraining import MaskedLanguageModel
from DeBERTa.ops import describe_implementations, select_implementations
from DeBERTa.ops.attention import SdpaEncoder, SdpaSelfAttention
from DeBERTa.ops.autocast import AutocastLayer
from DeBERTa.ops.cpu import library
from DeBERTa.ops.cpu.losses import CpuChunkOperations
from DeBERTa.ops.cpu.modules import SUBCLASSES, CpuSelfAttention
from DeBERTa.ops.losses import GPU_CHUNK, CompiledChunkOperations
from DeBERTa.ops.triton.launch import CAPABILITIES
from DeBERTa.training.execution import describe_kernels
from tests.conftest import tiny_model, tiny_rtd

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))


@pytest.mark.parametrize(
    ("device", "wanted", "is_compiled", "attention", "expected"),
    [
        (CPU, "auto", False, "blocked", CpuSelfAttention),
        (CPU, "eager", False, "eager", DisentangledSelfAttention),
        (CPU, "sdpa", False, "sdpa", SdpaSelfAttention),
        (CPU, "auto", True, "eager", DisentangledSelfAttention),
        (CPU, "sdpa", True, "sdpa", SdpaSelfAttention),
        (CUDA, "auto", False, "sdpa", SdpaSelfAttention),
        (CUDA, "eager", False, "eager", DisentangledSelfAttention),
        (CUDA, "auto", True, "sdpa", SdpaSelfAttention),
        (META, "auto", False, "eager", DisentangledSelfAttention),
        (META, "sdpa", False, "sdpa", SdpaSelfAttention),
    ],
)
def test_attention(device, wanted, is_compiled, attention, expected):
    model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model()))
    assert select_implementations(model, device, wanted, "bf16", is_compiled) == attention
    found = {type(m) for m in model.modules() if isinstance(m, DisentangledSelfAttention)}
    assert found == {expected}


@pytest.mark.parametrize(
    ("capability", "heads", "precision", "expected"),
    [
        ((9, 0), 1, "bf16", "triton"),
        ((9, 0), 1, "fp16", "sdpa"),
        ((9, 0), 1, "fp32", "sdpa"),
        ((9, 0), 2, "bf16", "sdpa"),  # heads of 32
        *(((major, minor), 1, "bf16", "sdpa") for major, minor in ((8, 0), (8, 6), (8, 9), (10, 0), (7, 5))),
    ],
)
def test_auto_takes_what_a_gpu_has_shown(monkeypatch, capability, heads, precision, expected):
    """`--attention triton` runs the kernels on the other GPUs that they were compiled for, too."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: capability)
    monkeypatch.setattr("DeBERTa.ops.triton.find_compiler_obstacle", lambda _device: None)
    model = MaskedLanguageModel(
        ModelConfig.from_dict(tiny_model() | {"hidden_size": 64, "num_attention_heads": heads})
    )
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert select_implementations(model, CUDA, "auto", precision, False) == expected
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    if capability in CAPABILITIES:
        assert select_implementations(model, CUDA, "triton", precision, False) == "triton"
    else:
        with pytest.raises(ConfigError, match="--attention triton: its kernels have not been compiled for"):
            select_implementations(model, CUDA, "triton", precision, False)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("device", [CPU, CUDA, META])
def test_other_modules(device, is_compiled):
    """On a CPU each has its subclass, on other devices layers; compiled layers are plain."""
    model = RTDModel(RTDConfig.from_dict(tiny_rtd()))
    names, parameters = list(model.state_dict()), list(model.parameters())
    before = {name: type(module) for name, module in model.named_modules()}
    for _ in range(2):  # the second selection changes nothing
        select_implementations(model, device, "eager", "bf16", is_compiled)
    subclasses: dict = SUBCLASSES if device == CPU else {Layer: AutocastLayer}
    if is_compiled:
        subclasses = {}
    for name, module in model.named_modules():
        plain = before[name]
        changes = plain in subclasses and plain is not DisentangledSelfAttention
        assert type(module) is (subclasses[plain] if changes else plain), name
    operations = CpuChunkOperations
    if device != CPU:
        operations = CompiledChunkOperations if is_compiled else ChunkOperations
    heads = [module for module in model.modules() if isinstance(module, LMHead)]
    assert {type(head.operations) for head in heads} == {operations}
    assert all(head.operations.chunk == GPU_CHUNK for head in heads if device != CPU)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert any(type(module) is not Layer for module in model.modules() if isinstance(module, Layer)) == (
        not is_compiled
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_encoder(attention):
    """Attention by distance has its encoder, which reads an aligned part of the position table."""
    model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model()))
    select_implementations(model, CPU, attention, "fp32", False)
    encoder = model.deberta.encoder
    assert type(encoder) is (SdpaEncoder if attention == "sdpa" else Encoder)
    plain = Encoder.compute_relative_positions(encoder, 5)
    assert len(plain.table) % encoder.table_alignment == 0
    positions = encoder.compute_relative_positions(5)
    assert torch.equal(positions.slots, plain.slots)
    if attention == "sdpa":  # the first window: row - column from 4 down
        rows = positions.key_selector.argmax(1), positions.query_selector.argmax(1)
        assert torch.equal(rows[0][:9], positions.distance_slots)
        assert torch.equal(rows[1][:9], positions.distance_slots.flip(0))


def test_description():
    assert describe_implementations(CUDA, True) == "layers and LM head compiled by torch.compile"
    assert describe_implementations(CUDA, False) == "layers and LM head in eager PyTorch"
    obstacle = library.find_obstacle()
    plain = describe_implementations(CPU, False)
    if obstacle:
        assert plain == f"CPU kernels on PyTorch's operations, slower: {obstacle}"
    else:
        assert plain.startswith("compiled CPU kernels")
    compiled = f"layers compiled by torch.compile, {plain} in the head"
    assert describe_implementations(CPU, True) == compiled
    assert describe_kernels("auto", "eager", TrainConfig(compile=True), CPU) == f"{compiled}, eager attention"
    config = TrainConfig(kernels="off")
    assert describe_kernels("off", "eager", config, CUDA) == "plain PyTorch, TF32 on"
