"""How the kernels are built, and what happens where they cannot be; their callers have their own tests."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from DeBERTa.model.losses import compute_vocabulary_loss
from DeBERTa.ops.cpu import library
from DeBERTa.ops.cpu.attention import BlockedAttention
from DeBERTa.ops.cpu.dropout import add_dropout
from DeBERTa.ops.cpu.linear import FeedForward, apply_linear
from DeBERTa.ops.cpu.losses import CpuChunkOperations
from DeBERTa.ops.dropout import draw_keep_mask, draw_seed
from tests.conftest import set_threads

DROPOUT = """
import sys, torch
from DeBERTa.ops.cpu import library
from DeBERTa.ops.cpu.dropout import add_dropout
torch.manual_seed(0)
torch.save(add_dropout(None, torch.ones(1000), 0.1), sys.argv[1])
print(library.find_obstacle())
"""


def run(folder: Path, **environment: str) -> tuple[str, torch.Tensor]:
    """Return why a new process has no kernels, and dropout of ones there."""
    folder.mkdir(exist_ok=True)
    env = os.environ | {"DEBERTA_CACHE": str(folder / "cache")} | environment
    command = [sys.executable, "-c", DROPOUT, str(folder / "out.pt")]
    process = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return process.stdout.strip(), torch.load(folder / "out.pt", weights_only=True)


@pytest.fixture
def expected() -> torch.Tensor:
    torch.manual_seed(0)
    return draw_keep_mask((1000,), draw_seed(), 0.1) / 0.9


@pytest.mark.usefixtures("kernels")
def test_compiled_once(tmp_path, expected):
    folder = tmp_path / "with space"
    obstacle, out = run(folder)
    assert obstacle == "None"
    assert torch.equal(out, expected)
    (stored,) = (folder / "cache" / "kernels").iterdir()
    written = stored.stat().st_mtime_ns
    assert run(folder)[0] == "None"
    assert list((folder / "cache" / "kernels").iterdir()) == [stored]
    assert stored.stat().st_mtime_ns == written


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("size", [0, 20_000])
def test_damaged_libraries_are_not_loaded(tmp_path, size, expected):
    """Loading a truncated file would end the process by SIGBUS."""
    run(tmp_path)
    (stored,) = (tmp_path / "cache" / "kernels").iterdir()
    content = stored.read_bytes()
    stored.write_bytes(content[:size])
    obstacle, out = run(tmp_path)
    assert obstacle == "None"
    assert torch.equal(out, expected)
    assert any(path.stat().st_size == len(content) for path in stored.parent.iterdir())


@pytest.mark.usefixtures("kernels")
def test_several_processes_compile_at_once(tmp_path, expected):
    with ThreadPoolExecutor() as pool:
        results = list(
            pool.map(lambda number: run(tmp_path / str(number), DEBERTA_CACHE=str(tmp_path / "c")), range(3))
        )
    assert all(obstacle == "None" and torch.equal(out, expected) for obstacle, out in results)
    assert all(path.suffix == ".so" for path in (tmp_path / "c" / "kernels").iterdir())


@pytest.mark.usefixtures("kernels")
def test_flags_of_the_compiler_are_a_compiler_of_their_own(tmp_path):
    compiler = os.environ.get("CXX", "g++")
    for flags in ("", " -O1", ""):
        assert run(tmp_path, CXX=compiler + flags)[0] == "None"
    assert len(list((tmp_path / "cache" / "kernels").iterdir())) == 2


def write_script(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (None, "there is no C++ compiler /nowhere/g++ 'x"),  # whose quote is not closed, too
        ("[ $1 = --version ]", "cannot compile the kernels: status 1"),
        ("[ $1 = --version ] || { echo 'In f:\nf: error: no' >&2; exit 1; }", "the kernels: f: error: no"),
        ("[ $1 = --version ] || { for last; do :; done; echo rubbish > $last; }", "cannot be used"),
    ],
)
def test_without_a_compiler(tmp_path, compiler, reason, expected):
    """A reason in one line, the same masks, and nothing left behind."""
    chosen = "/nowhere/g++ 'x" if compiler is None else write_script(tmp_path, compiler)
    obstacle, out = run(tmp_path / "run", CXX=chosen)
    assert reason in obstacle
    assert "\n" not in obstacle
    assert torch.equal(out, expected)
    assert not list((tmp_path / "run").glob("cache/kernels/*"))


@pytest.mark.usefixtures("kernels")
def test_cache_that_cannot_be_written_to(tmp_path, expected):
    """Compiled for this process alone."""
    (tmp_path / "file").touch()
    obstacle, out = run(tmp_path, DEBERTA_CACHE=str(tmp_path / "file"))
    assert obstacle == "None"
    assert torch.equal(out, expected)


def test_sources_are_packaged():
    """setup.py takes those of one folder, and all of them are compiled."""
    files = {*library.SOURCES, *library.HEADERS}
    assert files == set((Path(library.__file__).parent / "csrc").iterdir())
    assert {path.suffix for path in files} == {".cpp", ".h"}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_is_there(dtype):
    x = torch.empty(1, dtype=dtype)
    assert library.has_tiles() == ("amx_bf16" in Path("/proc/cpuinfo").read_text())
    fused = dtype == torch.bfloat16 and library.has_tiles()
    for name, arguments in library.SIGNATURES.items():
        types = [x, x if name == "apply_dropout" else x.float()][: 1 + (1 in arguments)]
        assert (library.find_kernel(name, *types) is not None) == (fused or name not in library.TILE_KERNELS)
    assert library.find_kernel("compute_gelu_gradients", x.double()) is None
    assert library.find_kernel("compute_gelu_gradients", x.to("meta")) is None
    with FakeTensorMode() as fake:
        assert library.find_kernel("compute_gelu_gradients", fake.from_tensor(x)) is None


REFUSED = """
import ctypes, torch
class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
room = ctypes.create_string_buffer(8192)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(room), 0, 8192)), None) == 0
from DeBERTa.ops.cpu import library
from DeBERTa.ops.cpu.attention import BlockedAttention
from DeBERTa.ops.cpu.linear import apply_affine
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 2, 64, 32, dtype=torch.bfloat16)
context = BlockedAttention.apply(q, k, v, None, None, torch.ones(1, 64, dtype=torch.bool), 0.0)
right = torch.softmax(q.double() @ k.double().transpose(2, 3), -1) @ v.double()
y = apply_affine(q, torch.eye(32), torch.zeros(32))
good = float((context.transpose(1, 2) - right).norm() / right.norm()) < 0.01 and torch.equal(y, q)
print(library.find_obstacle(), library.has_tiles(), good)
"""


@pytest.mark.usefixtures("kernels")
def test_where_the_system_refuses_tiles():
    """Linux does so where a signal stack is too small for them: the other kernels are used."""
    process = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["None", "False", "True"]


@pytest.mark.usefixtures("kernels")
def test_tensors_that_a_kernel_cannot_read_are_refused():
    x = torch.zeros(4, 4)
    for wrong in (x.double(), x[:, :2], x.long()):
        with pytest.raises(
            TypeError,
            match=r"argument 1 of kernel compute_gelu_gradients: not a contiguous torch\.float32 tensor",
        ):
            library.find_kernel("compute_gelu_gradients", x)(wrong, x, 8)


def attend() -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(1)
    inputs = [torch.randn(2, 2, 70, 8) for _ in range(3)] + [torch.randn(2, 139, 8) for _ in range(2)]
    inputs = [x.requires_grad_() for x in inputs]
    return BlockedAttention.apply(*inputs, torch.ones(2, 70, dtype=torch.bool), 0.1), inputs


def run_feed_forward() -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(2)
    inputs = [
        torch.randn(shape, requires_grad=True) for shape in ((90, 16), (64, 16), (64,), (16, 64), (16,))
    ]
    return FeedForward.apply(*inputs, torch.nn.functional.gelu), inputs


def run_feed_forward_in_bfloat16() -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(2)
    inputs = [
        torch.randn(shape, requires_grad=True) for shape in ((90, 64), (288, 64), (288,), (64, 288), (64,))
    ]
    with torch.autocast("cpu", torch.bfloat16):
        return FeedForward.apply(*inputs, torch.nn.functional.gelu), inputs


def multiply_in_bfloat16() -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(5)
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((90, 64), (288, 64), (288,))]
    with torch.autocast("cpu", torch.bfloat16):
        return apply_linear(*inputs), inputs


def compute_loss() -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(3)
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((30, 16), (3000, 16), (3000,))]
    loss = compute_vocabulary_loss(*inputs, torch.arange(30), operations=CpuChunkOperations(1024)).loss
    return loss, inputs


def compute_loss_in_bfloat16() -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(3)
    x, table = (
        torch.randn(97, 64, dtype=torch.bfloat16, requires_grad=True),
        torch.randn(5000, 64, requires_grad=True),
    )
    bias = torch.randn(5000, requires_grad=True)
    inputs = [x, table, bias]
    loss = compute_vocabulary_loss(*inputs, torch.arange(97), operations=CpuChunkOperations(96)).loss
    return loss, inputs


def drop() -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(4)
    x, residual = torch.randn(3, 9000, requires_grad=True), torch.randn(9000, requires_grad=True)
    return add_dropout(residual, x, 0.2), [x, residual]


FUNCTIONS = [attend, run_feed_forward, run_feed_forward_in_bfloat16, multiply_in_bfloat16]
FUNCTIONS += [compute_loss, compute_loss_in_bfloat16, drop]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_same_bits_with_any_number_of_threads(function):
    results = []
    for number in (1, 3):
        with set_threads(number):
            out, inputs = function()
            weights = torch.linspace(-1, 1, out.numel()).view_as(out)
            results.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_second_derivatives_are_refused(function):
    """They would be wrong: the first ones are written by kernels that autograd does not see."""
    out, inputs = function()
    (first, *_) = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()
