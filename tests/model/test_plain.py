"""DeBERTa/model is plain PyTorch: what it imports, that it compares no device, and where it runs."""

import ast
import re
import sys
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.model.encoder import Layer
from tests.conftest import ROOT, tiny_model, tiny_rtd
from tests.training.batches import random_batch

FILES = sorted((ROOT / "DeBERTa" / "model").glob("*.py"))
ALLOWED = ("torch", "DeBERTa.config", "DeBERTa.model", "DeBERTa.data.batch")
KINDS = "cpu|cuda|meta|mps|xpu"
# Attributes, imports and strings: `x.is_cuda`, `getattr(x, "is_cuda")`, `torch.cuda`, `"cuda" in ...`.
DEVICE_QUESTIONS = re.compile(rf"({KINDS})|is_({KINDS}|compiling|dynamo_compiling)")
FORBIDDEN = r"is_compiling|ctypes|DeBERTa\.ops|kernels"


def list_imports(tree: ast.AST) -> Iterator[str]:
    """Yield the full names that are imported anywhere in `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from DeBERTa import model` imports DeBERTa.model.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def find_device_comparisons(tree: ast.AST) -> list[int]:
    """Return the lines that ask for a device, or compare, match, index or take apart the name of one."""
    lines = []
    for node in ast.walk(tree):
        texts = (getattr(node, field, None) for field in ("attr", "value", "name", "module"))
        names = [text.rpartition(".")[2] for text in texts if isinstance(text, str)]
        if any(map(DEVICE_QUESTIONS.fullmatch, names)):
            lines.append(node.lineno)
        if isinstance(node, ast.Compare | ast.Match | ast.Subscript) or is_string_method(node):
            lines.extend(part.lineno for part in ast.walk(node) if names_device(part))
    return lines


def is_string_method(node: ast.AST) -> bool:
    """Return whether this is a method that strings have and tensors do not."""
    return (
        isinstance(node, ast.Attribute) and hasattr(str, node.attr) and not hasattr(torch.Tensor, node.attr)
    )


def names_device(node: ast.AST) -> bool:
    """Return whether this is a device, or the type of a device or tensor."""
    if isinstance(node, ast.Attribute):
        return "device" in node.attr or node.attr == "type"
    return isinstance(node, ast.Name) and "device" in node.id


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_imports(file):
    for name in list_imports(ast.parse(file.read_text())):
        is_allowed = any(name == package or name.startswith(f"{package}.") for package in ALLOWED)
        assert is_allowed or name.split(".")[0] in sys.stdlib_module_names, f"{file.name} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_device_is_compared(file):
    text = file.read_text()
    assert find_device_comparisons(ast.parse(text)) == []
    assert re.findall(FORBIDDEN, text) == []


@pytest.mark.parametrize(
    "code",
    [
        "if x.device.type == 'cpu': pass",
        "if 'cuda' in str(device): pass",
        "y = a if x.is_cuda else b",
        "match x.device.type:\n case 'cpu': pass",
        "f = table[x.device.type]",
        "torch.compiler.is_compiling()",
        "torch.compiler.is_dynamo_compiling()",
        "if x.device.type.startswith('cu'): pass",
        "if str(x.device).endswith('0'): pass",
        "y = a if getattr(x, 'is_cuda') else b",
        "y = a if x.is_mps else b",
        "y = a if x.is_xpu else b",
        "torch.cuda.is_available()",
        "torch.mps.synchronize()",
        "torch.backends.mps.is_available()",
        "from torch.cuda import is_available",
        "if 'cuda' in x.type(): pass",
        "if x.type() == 'torch.FloatTensor': pass",
    ],
)
def test_device_comparisons_are_found(code):
    assert find_device_comparisons(ast.parse(code))


def test_device_arguments_are_not_comparisons():
    code = "device = x.device.type\nif torch.is_autocast_enabled(device): y = torch.zeros(3, device=x.device)"
    assert find_device_comparisons(ast.parse(code)) == []


ABSOLUTE = {"position_biased_input": True, "relative_attention": False, "norm_rel_ebd": "none"}
VARIANTS = [{}, {"conv_kernel_size": 3}, ABSOLUTE]


@pytest.mark.parametrize("change", VARIANTS)
def test_masked_language_model_on_meta(change):
    model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model() | change)).to("meta")
    masked = model.compute_masked_loss(random_batch().to("meta"), is_sampled=False)
    assert masked.loss.is_meta
    masked.loss.sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("sharing", ["gdes", "es", "nes"])
def test_replaced_token_detection_on_meta(sharing):
    model = RTDModel(RTDConfig.from_dict(tiny_rtd(sharing))).to("meta")
    generated, detected = model(random_batch().to("meta"))
    assert generated.corrupted_ids.shape == (4, 32)
    (generated.masked.loss.sum() + detected.loss).backward()
    missing = {name for name, p in model.named_parameters() if p.grad is None}
    # Absolute positions enter the generator's decoder only.
    assert all("discriminator.deberta.embeddings.position_embeddings" in name for name in missing)


def test_layers_are_one_graph():
    """Layers compile without a graph break, and all layers of one shape share a graph."""
    torch.compiler.reset()
    counters.clear()
    model = RTDModel(RTDConfig.from_dict(tiny_rtd())).eval()
    plain = model(random_batch())
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    for layer in layers:
        layer.compile(backend="aot_eager", fullgraph=True)
        layer.decode = torch.compile(layer.decode, backend="aot_eager", fullgraph=True)
    generated, detected = model(random_batch())
    (generated.masked.loss.sum() + detected.loss).backward()
    assert counters["stats"]["unique_graphs"] == 2  # `forward`, and the decoder's `decode`
    assert not counters["graph_break"]
    torch.testing.assert_close(generated.masked.loss, plain[0].masked.loss)
    torch.testing.assert_close(detected.loss, plain[1].loss)
