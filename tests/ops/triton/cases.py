"""The Triton attention against float64: python -m tests.ops.triton.cases CASE...

On a GPU in this process; on a CPU in Triton's interpreter, in a process with TRITON_INTERPRET=1.
"""

import json
import sys
from pathlib import Path

import torch

from DeBERTa import ModelConfig
from DeBERTa.model.attention import map_to_slots
from DeBERTa.ops.distances import expand_table
from DeBERTa.ops.dropout import draw_keep_mask
from DeBERTa.ops.triton.attention import attend, list_tile_distances

ROOT = Path(__file__).parents[3]

CONFIG = ModelConfig.from_json(ROOT / "experiments" / "language_model" / "deberta_base.json")
SEED = 123456789012345


def compare(case: dict, device: str = "cpu") -> dict[str, float]:
    """Return relative errors (norms) of the context and of the gradient of every input, in float64."""
    dtype, p, terms = getattr(torch, case["dtype"]), case["p"], case["terms"]
    B, H, L, D = case["shape"]
    torch.manual_seed(0)
    slots = map_to_slots(torch.arange(L - 1, -L, -1), CONFIG).to(device)
    slots = slots - slots.min()
    rows = int(slots.max()) + 1

    def draw_leaf(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device) * 0.5).to(dtype).requires_grad_()

    qkv = draw_leaf(B, L, 3, H, D)
    tables = {name: draw_leaf(H, rows, D) for name in ("c2p", "p2c") if name in terms}
    mask = torch.ones(B, L, dtype=torch.bool, device=device)
    mask[-1, L - 3 :] = False
    seed = torch.tensor([SEED], device=device)
    last = L - 1
    distances = list_tile_distances(L, D, slots.device).clamp(-last, last)
    expanded = []
    for name, sign in (("c2p", 1), ("p2c", -1)):
        selector = torch.nn.functional.one_hot(slots[last - sign * distances], rows).to(dtype)
        is_used = name in tables
        expanded.append(expand_table(selector, tables[name].transpose(0, 1)) if is_used else None)
    context = attend(qkv, tuple(expanded), mask, (p, seed))
    inputs = [qkv, *tables.values()]
    grad = torch.randn(B, L, H, D, device=device).to(dtype)
    gradients = torch.autograd.grad(context, inputs, grad, retain_graph=True)

    exact = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = (x.transpose(1, 2) for x in exact[0].unbind(2))
    exact_tables = dict(zip(tables, exact[1:], strict=True))
    tokens = torch.arange(L, device=device)
    pairs = slots[L - 1 - tokens[:, None] + tokens].expand(B, H, L, L)
    scores = q @ k.transpose(2, 3)
    if "c2p" in exact_tables:
        scores = scores + (q @ exact_tables["c2p"].transpose(1, 2)).gather(3, pairs)
    if "p2c" in exact_tables:
        by_key = (k @ exact_tables["p2c"].transpose(1, 2)).gather(3, pairs.transpose(2, 3))
        scores = scores + by_key.transpose(2, 3)
    probs = torch.softmax(scores.masked_fill(~mask[:, None, None], float("-inf")), -1)
    if p:
        probs = probs * draw_keep_mask((B, H, L, L), SEED, p).to(device).double() / (1 - p)
    reference = (probs @ v).transpose(1, 2) * mask[:, :, None, None]
    expected = torch.autograd.grad(reference, exact, grad.double())

    def measure_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
        return float(((actual.double() - wanted).norm() / wanted.norm()).detach())

    names = ["qkv", *tables]
    errors = {name: measure_error(a, w) for name, a, w in zip(names, gradients, expected, strict=True)}
    again = torch.autograd.grad(attend(qkv, tuple(expanded), mask, (p, seed)), [qkv], grad)
    errors["differs between calls"] = float(not torch.equal(again[0], gradients[0]))
    return {"context": measure_error(context, reference)} | errors


if __name__ == "__main__":
    for text in sys.argv[1:]:
        print(json.dumps(compare(json.loads(text))), flush=True)
