"""The Triton kernels without a GPU: compiled for every compute capability."""

import importlib.util
import itertools
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("the kernels are not tested: the package triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from DeBERTa.ops.triton import kernels
from DeBERTa.ops.triton.launch import CAPABILITIES, HEAD_SIZES, HOPPER, SEQUENCES, get_launch_table

LONGEST_STACK = 128  # bytes per thread: spilled registers
SHARED_MEMORY = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227}  # KB per program, CUDA programming guide

POINTERS = {
    "seed": "*i64",
    "mask": "*i32",
    "keep_mask": "*i32",
    "input_mask": "*i8",
    "lse": "*fp32",
    "delta": "*fp32",
}
POINTERS |= {"grad_table": "*fp32"}
SCALARS = {"scale": "fp32"}


def compile_kernel(
    name: str, field: str, capability: tuple[int, int], dtype: str, head_size: int, **constants: object
):
    """Compile one kernel for a compute capability that need not be here."""
    function = getattr(kernels, name)
    launches = get_launch_table(capability, head_size)
    launch = getattr(launches, field)
    constants = {"L": 512, "D": head_size, "WORDS": 16, "SEQUENCES": SEQUENCES} | constants
    constants["N"] = launches.tile
    signature, attributes = {}, {}
    for number, argument in enumerate(function.arg_names):
        stem = argument.removesuffix("_ptr")
        if argument in constants:
            signature[argument] = "constexpr"
        else:
            is_pointer = stem != argument
            signature[argument] = (
                POINTERS.get(stem, f"*{dtype}") if is_pointer else SCALARS.get(argument, "i32")
            )
            if is_pointer or argument.startswith("stride"):
                attributes[(number,)] = [["tt.divisibility", 16]]
    used = {key: value for key, value in constants.items() if key in function.arg_names}
    source = ASTSource(function, signature=signature, constexprs=used, attrs=attributes)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    return triton.compile(source, target=target, options=launch._asdict())


def read_stack(cubin: bytes) -> int:
    """Bytes of stack per thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


TERMS = {"HAS_DROPOUT": True, "HAS_C2P": True, "HAS_P2C": True}
KERNELS = [
    ("forward_kernel", "forward", TERMS),
    ("key_gradient_kernel", "key_gradient", TERMS),
    ("query_gradient_kernel", "query_gradient", {"HAS_C2P": True}),
    ("table_gradient_kernel", "table_gradient", {"IS_QUERY_TABLE": False}),
    ("table_gradient_kernel", "table_gradient", {"IS_QUERY_TABLE": True}),
]


TARGETS = list(itertools.product(CAPABILITIES, ["bf16"], HEAD_SIZES))
TARGETS += [(HOPPER, "fp16", 64), ((8, 6), "fp16", 64), ((8, 0), "fp16", 128)]  # the last spills most


@pytest.mark.parametrize(("capability", "dtype", "head_size"), TARGETS)
@pytest.mark.parametrize(("name", "field", "constants"), KERNELS)
def test_compiles_for_every_capability(capability, dtype, head_size, name, field, constants):
    """With all terms and dropout: fits in shared memory, and spills next to nothing."""
    compiled = compile_kernel(name, field, capability, dtype, head_size, **constants)
    assert compiled.metadata.shared <= SHARED_MEMORY[capability] * 1024
    assert read_stack(compiled.asm["cubin"]) <= LONGEST_STACK


@pytest.mark.parametrize(("name", "field", "constants"), KERNELS)
def test_compiles_in_float32(name, field, constants):
    """For short runs and golden figures; speed does not matter, so spills do not either."""
    compiled = compile_kernel(name, field, HOPPER, "fp32", 64, **constants)
    assert compiled.metadata.shared <= SHARED_MEMORY[HOPPER] * 1024
