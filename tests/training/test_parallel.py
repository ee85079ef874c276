"""What DDP reduces, in buckets that are the same after a resume, and what FSDP gathers in bfloat16."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.data.batch import Batch
from DeBERTa.training import parallel
from DeBERTa.training.distributed import get_rank, is_rank_zero
from DeBERTa.training.optimizer import build_optimizer
from DeBERTa.training.parallel import (
    Objective,
    all_gather_full,
    gather_to_rank_zero,
    load_full_optimizer_state,
    load_full_weights,
    order_by_gradient,
    replicate,
    shard,
)
from tests.conftest import tiny_model, tiny_rtd
from tests.training.batches import random_batch, train_config
from tests.training.ranks import make_step, run_ranks, select_rows

RESUMED = ("gdes-in-2", "es")
UNMASKED = ("mlm-in-2", "gdes", "es")
STEPS = 4

WITHOUT_GRADIENT = [
    ("mlm", {}, set()),
    ("mlm", {"position_biased_input": True, "type_vocab_size": 2, "embedding_size": 16}, set()),
    (
        "mlm",
        {"pos_att_type": ""},
        {"encoder.rel_embeddings.weight", *(f"encoder.LayerNorm.{x}" for x in ("weight", "bias"))},
    ),
    ("gdes", {}, {"discriminator.deberta.embeddings.position_embeddings._weight"}),
    ("nes", {}, {"discriminator.deberta.embeddings.position_embeddings.weight"}),
    ("gdes", {"position_biased_input": True}, set()),
    ("es", {"conv_kernel_size": 3, "num_hidden_layers": 2}, set()),
]


@pytest.mark.parametrize(("case", "change", "expected"), WITHOUT_GRADIENT)
def test_parameters_without_gradient(case, change, expected):
    """Those that the meta device finds are those of a backward pass on a batch."""
    model: MaskedLanguageModel | RTDModel
    if case == "mlm":
        model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model() | change))
        loss = model.compute_masked_loss(random_batch(), is_sampled=False).loss.sum()
    else:
        values = tiny_rtd(case)
        parts = {name: values[name] | change for name in ("generator", "discriminator")}
        model = RTDModel(RTDConfig.from_dict(values | parts))
        generated, detected = model(random_batch())
        loss = generated.masked.loss.sum() + detected.loss
    ordered = order_by_gradient(model)
    assert len(set(ordered)) == len(ordered)
    without = {name for name, p in model.named_parameters() if p not in set(ordered)}
    assert {name.removeprefix("deberta.") for name in without} == expected
    loss.backward()
    assert without == {name for name, p in model.named_parameters() if p.grad is None}
    assert all(p.grad is None or p.grad.device.type == "cpu" for p in model.parameters())


def test_order_of_gradients():
    """Heads come first; the word table and the relative positions, which all layers share, come last."""
    model = RTDModel(RTDConfig.from_dict(tiny_rtd("gdes")))
    names = {p: name for name, p in model.named_parameters()}
    ordered = [names[p] for p in order_by_gradient(model)]
    for model_name, head in (("discriminator", "mask_predictions"), ("generator", "lm_predictions")):
        own = [name.removeprefix(f"{model_name}.") for name in ordered if name.startswith(model_name)]
        assert own[0].startswith(head)
        table = own.index("deberta.encoder.rel_embeddings.weight")
        assert not any(".layer." in name for name in own[table:])


def train(case: str, first: int, last: int, state: dict | None = None) -> dict:
    """Take steps `first` to `last` - 1 with DDP; return weights and training state."""
    model, training = make_step(case)
    if first:
        load_full_weights(model, state["weights"] if state else None)
        training.load_state_dict(state["training"] if state else None)
    for step in range(first, last):
        training.set_learning_rate(step + 1)
        training(select_rows(seed=step))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"weights": weights, "training": training.state_dict()}


def resume_all(folder: Path) -> None:
    for case in RESUMED:
        full, half = train(case, 0, STEPS), train(case, 0, STEPS // 2)
        resumed = train(case, STEPS // 2, STEPS, half if is_rank_zero() else None)
        if is_rank_zero():
            torch.save((full, resumed), folder / f"{case}.pt")


def test_three_ranks_resume_with_the_same_bits(tmp_path):
    """Sums of three depend on their order, and so on the buckets."""
    run_ranks(3, tmp_path, resume_all, tmp_path)
    for case in RESUMED:
        full, resumed = torch.load(tmp_path / f"{case}.pt", weights_only=True)
        for name, weight in full["weights"].items():
            assert torch.equal(resumed["weights"][name], weight), name
        for name, optimizer in full["training"]["optimizers"].items():
            later = resumed["training"]["optimizers"][name]["state"]
            assert later.keys() == optimizer["state"].keys()
            for index, moments in optimizer["state"].items():
                assert torch.equal(later[index]["exp_avg"], moments["exp_avg"])


def train_without_masked(folder: Path) -> None:
    """Rank 1 has no masked token in the first of two steps."""
    for case in UNMASKED:
        model, training = make_step(case)
        for step in (1, 2):
            training.set_learning_rate(step)
            batch = random_batch(2, seed=step)
            if get_rank() == 1 and step == 1:
                batch = Batch.from_tensors(*batch[:2], torch.zeros_like(batch.labels), batch.uniforms)
            training(batch)
        if is_rank_zero():
            assert all(bool(weight.isfinite().all()) for weight in model.state_dict().values()), case
            (folder / case).touch()


def test_rank_without_masked_tokens(tmp_path):
    """All parameters have a gradient, which is zero: no rank waits for another."""
    run_ranks(2, tmp_path, train_without_masked, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= set(UNMASKED)


class FloatNorm(TorchFunctionMode):
    """Run LayerNorm in float32, as autocast on CUDA does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.layer_norm:
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        return func(*args, **kwargs)


class GatheredBytes(TorchDispatchMode):
    """Add up what all-gathers return, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.total: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.c10d._allgather_base_.default:
            self.total[args[0].dtype] += args[0].nbytes
        return operation(*args, **(kwargs or {}))


def train_in_bfloat16(mode: str, dtype: torch.dtype | None, first: int, last: int, state: tuple = ()) -> dict:
    """Take steps with autocast on a plain MLM model; return losses, state and bytes gathered per step."""
    torch.manual_seed(7)
    model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model() | {"num_hidden_layers": 4}))
    config, device = train_config(sharding=mode), torch.device("cpu")
    if mode == "none":
        objective = replicate(Objective(model), order_by_gradient(model))
    else:
        objective = shard(Objective(model), config, device, dtype)
    optimizer = build_optimizer([(model, 1e-3)], config)
    if first:
        load_full_weights(model, state[0] if state else None)
        load_full_optimizer_state(optimizer, state[1] if state else None)
    losses = []
    for step in range(first, last):
        torch.manual_seed(step)
        with GatheredBytes() as gathered:
            with FloatNorm(), torch.autocast("cpu", torch.bfloat16):
                masked = objective(model.compute_masked_loss, select_rows(seed=step % 2), is_sampled=False)
            masked.loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(masked.loss.detach().mean())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.float32}
    weights = {name: all_gather_full(tensor).clone() for name, tensor in model.state_dict().items()}
    return {
        "losses": torch.stack(losses),
        "weights": weights,
        "optimizer": gather_to_rank_zero(optimizer.state_dict()),
        "gathered": dict(gathered.total),
    }


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        ("cuda", "bf16", torch.bfloat16),
        ("cuda", "fp16", None),
        ("cuda", "fp32", None),
        ("cpu", "bf16", None),
    ],
)
def test_dtype_of_gathers(monkeypatch, device, precision, expected):
    """FSDP all-gathers the layers in bfloat16 on a GPU in bfloat16, and nowhere else."""
    dtypes = []
    monkeypatch.setattr(parallel, "is_distributed", lambda: True)
    monkeypatch.setattr(parallel, "shard", lambda *inputs: dtypes.append(inputs[3]))
    model, config = MaskedLanguageModel(ModelConfig.from_dict(tiny_model())), train_config(sharding="fsdp")
    parallel.wrap_parallel(model, {"model": model}, config, torch.device(device), precision)
    assert dtypes == [expected]


def gather_in_bfloat16(folder: Path) -> None:
    found = {"ddp": train_in_bfloat16("none", None, 0, 8)}
    for mode in ("zero2", "fsdp"):
        found[f"{mode} float32"] = train_in_bfloat16(mode, None, 0, 8)
        found[mode] = train_in_bfloat16(mode, torch.bfloat16, 0, 8)
        half = train_in_bfloat16(mode, torch.bfloat16, 0, 4)
        state = (half["weights"], half["optimizer"]) if is_rank_zero() else ()
        found[f"{mode} resumed"] = train_in_bfloat16(mode, torch.bfloat16, 4, 8, state)
    if is_rank_zero():
        torch.save(found, folder / "found.pt")


def test_gathers_in_bfloat16(tmp_path):
    """Layers take half the bytes, losses agree with DDP's, and a resumed run has the same bits."""
    run_ranks(2, tmp_path, gather_in_bfloat16, tmp_path)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for mode, gathers in (("zero2", 1), ("fsdp", 2)):
        low, full = found[mode], found[f"{mode} float32"]
        layers = sum(w.nbytes for name, w in low["weights"].items() if ".layer." in name)
        gathered = low["gathered"][torch.bfloat16]
        assert full["gathered"][torch.float32] - low["gathered"][torch.float32] == 2 * gathered
        assert gathered == gathers * layers / 2
        # Weights of LayerNorm and scaled weights of queries are rounded: 2e-4 in eight steps.
        torch.testing.assert_close(low["losses"], found["ddp"]["losses"], rtol=1e-3, atol=0)
        torch.testing.assert_close(full["losses"], found["ddp"]["losses"], rtol=1e-5, atol=0)
        for name, weight in low["weights"].items():
            assert torch.equal(found[f"{mode} resumed"]["weights"][name], weight), name
