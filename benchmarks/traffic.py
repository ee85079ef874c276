"""Device operations and memory traffic of one micro-batch of RTD.

    python -m benchmarks.traffic

Forward and backward pass of generator and discriminator in bfloat16 autocast, without the optimizer. Each
operation moves the bytes of its inputs and outputs; views move none, and lookups of rows move these rows.
They are counted on the meta device: nothing is computed, so that a laptop counts the large sizes of a GPU.
`saved` is what the forward passes save for the backward passes, without parameters.

The Triton kernels are counted by formula (`list_kernel_traffic`): each reads its inputs and writes its
outputs once. Tiles that a kernel reads again come from the cache.
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from benchmarks.training_step import make_batch
from DeBERTa import RTDConfig, RTDModel
from DeBERTa.ops import select_implementations
from DeBERTa.ops.attention import SdpaEncoder, SdpaSelfAttention
from DeBERTa.ops.autocast import AutocastModule
from DeBERTa.ops.triton.launch import HOPPER, SEQUENCES, get_launch_table
from DeBERTa.ops.triton.modules import TritonEncoder, TritonSelfAttention

CONFIGS = Path(__file__).resolve().parent.parent / "experiments" / "language_model"
CASES = {"base 32x512": ("rtd_base.json", 32), "xsmall 64x512": ("rtd_xsmall_continue.json", 64)}
ATTENTION = ("triton", "sdpa", "eager")
META = torch.device("meta")

# Of CUDA's autocast: https://docs.pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior
LOWER_PRECISION = {
    *(F.linear, F.conv1d, torch.conv1d, F.scaled_dot_product_attention),
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm),
    *(torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.Tensor.bmm),
}
FULL_PRECISION = {F.layer_norm, torch.layer_norm, torch.softmax, torch.Tensor.softmax, F.softmax}
WITHOUT_TRAFFIC = {"empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "detach"}
# They read or update as many rows as their output or source has.
LOOKUPS = {"embedding": 0, "index_select": 0, "gather": 0, "index": 0}
UPDATES = {"index_add_": 3, "scatter_add_": 3, "index_put_": 2, "scatter_": 2}
WRITES = {"copy_", "fill_", "zero_"}  # do not read what they write to
CREATES = {"new_zeros", "zeros_like", "ones_like", "full_like", "rand_like"}  # read no values


class Traffic(NamedTuple):
    """Device operations, bytes they move, and bytes saved for the backward pass."""

    operations: int
    moved: int
    saved: int


class _Autocast(TorchFunctionMode):
    """Cast inputs as CUDA's autocast does, which the meta device lacks."""

    def __init__(self) -> None:
        self.cache: dict[torch.Tensor, torch.Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in LOWER_PRECISION:
            args, kwargs = self._cast(args, kwargs, torch.bfloat16)
        elif func is torch.softmax and kwargs.get("dtype") == torch.float32:  # one operation on a GPU
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return torch.ops.aten._softmax(  # noqa: SLF001
                args[0], dim, args[0].dtype != torch.float32
            )
        elif func in FULL_PRECISION and "dtype" not in kwargs:
            args, kwargs = self._cast(args, kwargs, torch.float32)
        if func is F.dropout:  # as on a GPU; others compute it in three operations
            p = kwargs["p"] if kwargs["training"] else 0
            return torch.native_dropout(args[0], p, True)[0] if p else args[0]
        if func is F.scaled_dot_product_attention:  # on a GPU with a bias
            q, k, v = args
            mask, p, scale = (kwargs[name] for name in ("attn_mask", "dropout_p", "scale"))
            efficient = torch.ops.aten._scaled_dot_product_efficient_attention  # noqa: SLF001
            return efficient(q, k, v, mask.expand(*q.shape[:3], k.size(2)), True, p, False, scale=scale)[0]
        return func(*args, **kwargs)

    def _cast(self, args: tuple, kwargs: dict, dtype: torch.dtype) -> tuple[tuple, dict]:
        def cast(x: object) -> object:
            if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype == dtype:
                return x
            if not (x.is_leaf and x.requires_grad):
                return x.to(dtype)
            if x not in self.cache:
                self.cache[x] = x.to(dtype)
            return self.cache[x]

        return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


class TrafficCounter(TorchDispatchMode):
    """Count operations on the meta device and the bytes they move."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs, outputs = (list(_on_device(tree_flatten(x)[0])) for x in ((args, kwargs), result))
        is_in_place = name.endswith("_") or "out" in kwargs
        storages = {id(x.untyped_storage()) for x in inputs}
        is_view = any(id(x.untyped_storage()) in storages for x in outputs) and not is_in_place
        if is_view or name in WITHOUT_TRAFFIC or not outputs:
            return result
        read = [x for x in inputs if not any(x is y for y in outputs)]
        written = outputs if is_in_place and "out" not in kwargs else []
        if name in LOOKUPS:
            moved = 2 * _count_bytes(outputs) + _count_bytes(x for x in read if not x.is_floating_point())
        elif name in UPDATES:
            moved = UPDATES[name] * _count_bytes(x for x in read if x.is_floating_point())
            moved += _count_bytes(x for x in read if not x.is_floating_point())
        else:
            moved = _count_bytes(outputs) + (0 if name in CREATES else _count_bytes(read))
            moved += 0 if name in WRITES else _count_bytes(written)
        self.add({name: moved})
        return result

    def add(self, moved: dict[str, int]) -> None:
        """Count operations by name and bytes."""
        self.calls.update(moved.keys())
        self.bytes.update(moved)


def _on_device(values: Iterable[object]) -> Iterable[torch.Tensor]:
    return (x for x in values if isinstance(x, torch.Tensor) and x.is_meta)


def _count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Add up bytes; a dimension that is expanded counts once."""
    return sum(
        x.element_size() * math.prod(n for n, s in zip(x.shape, x.stride(), strict=True) if s)
        for x in tensors
    )


class _SavedBytes:
    """Bytes of the storages that a forward pass saves, each counted once."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = {id(p.untyped_storage()): p.untyped_storage() for p in model.parameters()}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """Record a saved tensor."""
        storage = x.untyped_storage()
        if x.is_meta and id(storage) not in self.parameters:
            self.storages[id(storage)] = storage
        return x

    def count(self) -> int:
        """Return the sum so far."""
        return sum(storage.nbytes() for storage in self.storages.values())


def count_passes(
    model: torch.nn.Module, counter: TrafficCounter, *losses: Callable[[], torch.Tensor]
) -> Traffic:
    """Count forward and backward passes of `losses`, one after the other."""
    saved = 0
    with counter:
        for loss in losses:
            saved_bytes = _SavedBytes(model)
            with torch.autograd.graph.saved_tensors_hooks(saved_bytes.pack, lambda x: x), _Autocast():
                value = loss()
            saved += saved_bytes.count()
            value.backward()
    return Traffic(counter.calls.total(), counter.bytes.total(), saved)


class _MetaAutocast(AutocastModule):
    def get_matmul_dtype(self, x: torch.Tensor) -> torch.dtype:  # noqa: ARG002  the method's signature
        return torch.bfloat16


def list_kernel_traffic(shape: tuple[int, ...], is_backward: bool) -> dict[str, int]:
    """Return the bytes that each Triton kernel of one layer moves.

    They are those in bfloat16 with dropout and both terms.
    shape: B, L, H, D. Scores have full tiles of N rows, W in all.
    """
    B, L, H, D = shape
    tile = get_launch_table(HOPPER, D).tile
    W = math.ceil(L / tile) * tile
    rows, table, scores = 2 * B * L * H * D, 2 * H * 2 * W * D, 2 * B * H * W * W
    statistics, input_mask, keep_mask = 4 * B * H * L, B * L, B * H * L * W // 8
    inputs = 3 * rows + 2 * table + input_mask + keep_mask
    if not is_backward:
        return {"mask": keep_mask, "forward": inputs + rows + statistics}
    sums = 2 * table * math.ceil(B / SEQUENCES)
    gradients = {
        "delta": 2 * rows + statistics,
        "key_gradient": inputs + rows + 2 * statistics + 2 * rows + scores,
        "query_gradient": rows + table + scores + rows,
    }
    for name in ("key_table", "query_table"):
        gradients[f"{name}_gradient"] = rows + scores + sums
        gradients[f"{name}_sum"] = sums + 2 * table
        gradients[f"{name}_cast"] = 2 * table + table
    return gradients


class _CountedKernels(torch.autograd.Function):
    """Shapes of the Triton attention, whose kernels are counted by formula."""

    @staticmethod
    def forward(ctx, counter, qkv, key_table, query_table, input_mask):
        B, L, _, H, D = qkv.shape
        ctx.counter, ctx.shape = counter, (B, L, H, D)
        out, statistics = qkv.new_empty(B, L, H, D), qkv.new_empty(B, H, L, dtype=torch.float32)
        tile = get_launch_table(HOPPER, D).tile
        words = math.ceil(L / tile) * tile // 32
        keep_mask = torch.empty(B * H * L, words, dtype=torch.int32, device=META)
        ctx.save_for_backward(qkv, key_table, query_table, input_mask, out, statistics, keep_mask)
        counter.add(list_kernel_traffic(ctx.shape, is_backward=False))
        return out

    @staticmethod
    def backward(ctx, grad):  # noqa: ARG004  autograd's signature
        ctx.counter.add(list_kernel_traffic(ctx.shape, is_backward=True))
        return None, *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None


class _CountedAttention(TritonSelfAttention):
    counter: TrafficCounter

    def run_kernels(self, qkv, tables, input_mask, p):  # noqa: ARG002  the method's signature
        return _CountedKernels.apply(self.counter, qkv, *tables, input_mask).flatten(2)


def count_micro_batch(
    config_name: str, sequences: int, attention: str, length: int = 512
) -> tuple[Traffic, TrafficCounter]:
    """Count one micro-batch of an RTD config with `attention`."""
    counter = TrafficCounter()
    with META:
        model = RTDModel(RTDConfig.from_json(CONFIGS / config_name))
    is_triton = attention == "triton"
    select_implementations(model, META, "sdpa" if is_triton else attention, "bf16", is_compiled=False)
    for module in model.modules():
        bases: tuple[type, ...] = (type(module),)
        if is_triton and isinstance(module, SdpaEncoder):
            bases = (TritonEncoder,)
        if is_triton and isinstance(module, SdpaSelfAttention):
            module.__class__ = type("Meta", (_CountedAttention,), {"counter": counter})
        elif isinstance(module, AutocastModule):
            module.__class__ = type("Meta", (_MetaAutocast, *bases), {})
    # Under autocast on a GPU the head casts the output of its LayerNorm.
    model.generator.lm_predictions.lm_head.LayerNorm.register_forward_hook(lambda *x: x[2].bfloat16())
    vocabulary = model.config.generator.vocab_size
    batch = make_batch(sequences, length, 0, vocabulary).to(META)
    generated = []

    def generate() -> torch.Tensor:
        generated.append(model.generator.generate(batch))
        return generated[0].masked.loss.sum()

    def detect() -> torch.Tensor:
        return model.compute_detection_loss(generated[0].corrupted_ids, batch.input_mask, batch.labels).loss

    return count_passes(model, counter, generate, detect), counter


def main() -> None:
    """Print a table of both cases, and the operations that move most."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attention", nargs="+", default=list(ATTENTION), choices=ATTENTION)
    parser.add_argument("--rows", type=int, default=12, help="operations listed per case")
    arguments = parser.parse_args()
    for case, (config_name, sequences) in CASES.items():
        for attention in arguments.attention:
            traffic, counter = count_micro_batch(config_name, sequences, attention)
            print(
                f"{case}, {attention}: {traffic.operations} operations, {traffic.moved / 1e9:.1f} GB moved, "
                f"{traffic.saved / 1e9:.2f} GB saved"
            )
            for name, moved in counter.bytes.most_common(arguments.rows):
                print(f"    {name:<45}{counter.calls[name]:>6}{moved / 1e9:>9.1f} GB")


if __name__ == "__main__":
    main()
