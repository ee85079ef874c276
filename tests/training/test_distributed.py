"""N processes compute what one does on the same global batch: gradients, losses, weights, evaluation, checkpoints."""

import functools
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from DeBERTa.data.dataset import BatchPlan, EvaluationBatches
from DeBERTa.data.masking import Masker
from DeBERTa.data.token_store import open_store
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import PeerLostError
from DeBERTa.training import optimizer as optimizers
from DeBERTa.training.distributed import all_reduce_sums, get_rank, is_rank_zero, translate_peer_errors
from DeBERTa.training.evaluation import evaluate_splits
from DeBERTa.training.metrics import mean_losses
from DeBERTa.training.parallel import all_gather_full, load_full_weights
from tests.training.batches import random_batch
from tests.training.ranks import CASES, make_step, my_rows, run_ranks

MODES = {"ddp": {}, "zero2": {"sharding": "zero2"}, "fsdp": {"sharding": "fsdp"}}
SIZES = (2, 3)
GROUPS = ((2, "ddp"), (2, "zero2"), (2, "fsdp"), (3, "ddp"), (3, "fsdp"))  # processes, and what each holds
STEPS = 4
SAVED = ("mlm", "gdes", "es")


EXECUTIONS = {"checkpointing": {"gradient_checkpointing": True}, "compiled": {"compile": True}}


def train(
    case: str, mode: str, first: int, last: int, state: dict | None = None, execution: str = ""
) -> dict:
    """Steps `first` to `last` - 1; what is known afterwards, whole, in every process."""
    model, training = make_step(case, **MODES[mode], **EXECUTIONS.get(execution, {}))
    if first:
        load_full_weights(model, state["weights"] if state else None)
        training.load_state_dict(state["training"] if state else None)
    losses = []
    for step in range(first, last):
        training.set_learning_rate(step + 1)
        sums = training(my_rows(seed=step))
        norms = {name: value for name, value in sums.items() if name.endswith("norm")}
        sums = all_reduce_sums({name: value for name, value in sums.items() if name not in norms})
        losses.append(mean_losses(sums | norms))
        if step == first:
            gradients = training.gradients
    weights = {name: all_gather_full(tensor).clone() for name, tensor in model.state_dict().items()}
    moments = [
        state["exp_avg"] for optimizer in training.optimizers.values() for state in optimizer.state.values()
    ]
    held = sum((moment.to_local() if isinstance(moment, DTensor) else moment).numel() for moment in moments)
    state = training.state_dict()
    return {"losses": losses, "gradients": gradients, "weights": weights, "training": state, "held": held}


def train_all(folder: Path, size: int) -> None:
    for case in CASES:
        for mode in (mode for processes, mode in GROUPS if processes == size):
            result = train(case, mode, 0, STEPS)
            if is_rank_zero():
                torch.save(result, folder / f"{case}-{mode}-{size}.pt")
            if size == 2 and case in SAVED:
                half = train(case, mode, 0, STEPS // 2)
                if is_rank_zero():
                    torch.save(half, folder / f"{case}-{mode}-half.pt")
    if size == 2:
        reductions_all(folder)
        collectives_all(folder)
        norms_all(folder)


def operations(recorded: profile) -> list[str]:
    """Names of all that ran."""
    return [
        event.name() for event in recorded.profiler.kineto_results.events()
    ]  # recorded.events() takes seconds


def reductions(case: str, mode: str, parts: int) -> int:
    """Sums over the processes in the second step, of whatever, with that many parts a step."""
    _, training = make_step(case, **MODES[mode], accumulative_update=parts)
    training.set_learning_rate(1)
    batch = random_batch(8, seed=get_rank())
    training(batch)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        training(batch)
    names = operations(recorded)
    return names.count("c10d::allreduce_") + names.count("c10d::_reduce_scatter_base_")


def reductions_all(folder: Path) -> None:
    """With one part and with four; under GDES also with four that each exchange their gradients."""
    found = {}
    for case in SAVED:
        for mode in MODES:
            found[case, mode] = [reductions(case, mode, 1), reductions(case, mode, 4)]
    if is_rank_zero():
        torch.save(found, folder / "reductions.pt")


def collectives_all(folder: Path) -> None:
    """Kinds of collectives in two steps and in putting gradients, weights and moments together."""
    found = {}
    for mode in MODES:
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            train("gdes", mode, 0, 2)
        found[mode] = {name for name in operations(recorded) if name.startswith("c10d::")}
    if is_rank_zero():
        torch.save(found, folder / "collectives.pt")


def norms_all(folder: Path) -> None:
    """Losses and norms of the first step when norms of all tables go over their rows, but where a kernel makes them."""
    with mock.patch.object(optimizers, "LARGE", 0):
        found = {mode: train("gdes", mode, 0, 1)["losses"][0] for mode in MODES}
    if is_rank_zero():
        torch.save(found, folder / "norms.pt")


def go_on_all(folder: Path, size: int) -> None:
    for case in SAVED:
        for saved, opened in (("ddp", "fsdp"), ("zero2", "ddp"), ("fsdp", "zero2")):
            path = folder / f"{case}-{saved}-half.pt"
            state = torch.load(path, weights_only=True) if is_rank_zero() else None
            result = train(case, opened, STEPS // 2, STEPS, state)
            if is_rank_zero():
                torch.save(result, folder / f"{case}-{saved}-opened-{size}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Results of one process and of several, for every case and mode."""
    folder = tmp_path_factory.mktemp("ranks")
    for case in CASES:
        torch.save(train(case, "ddp", 0, STEPS), folder / f"{case}-1.pt")
    for size in SIZES:
        run_ranks(size, folder, train_all, folder, size)
    go_on_all(folder, 1)
    run_ranks(2, folder, go_on_all, folder, 2)
    return folder


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("size", "mode"), GROUPS)
def test_processes_have_the_gradients_of_one(trained, case, mode, size):
    one, many = read(trained / f"{case}-1.pt"), read(trained / f"{case}-{mode}-{size}.pt")
    assert one["gradients"].keys() == many["gradients"].keys()
    compared = 0
    for name in one["gradients"]:
        alone, together = one["gradients"][name], many["gradients"][name]
        for ours, theirs in zip(alone, together, strict=True):
            if ours is None or not ours.any():
                assert theirs is None or not theirs.any()
                continue
            # Sums over other partitions of the rows: float32 rounding, relative to the tensor.
            assert torch.linalg.vector_norm(theirs - ours) <= 2e-6 * torch.linalg.vector_norm(ours)
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("size", "mode"), GROUPS)
def test_processes_go_where_one_goes(trained, case, mode, size):
    """Losses of four steps, gradient norms and weights."""
    one, many = read(trained / f"{case}-1.pt"), read(trained / f"{case}-{mode}-{size}.pt")
    for alone, together in zip(one["losses"], many["losses"], strict=True):
        assert together == pytest.approx(alone, rel=1e-5)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(many["weights"][name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("size", "mode"), GROUPS)
def test_moments_are_cut_up(trained, case, mode, size):
    """The first process holds all of them with DDP, else its share: rows are cut, so that a little more is possible."""
    whole_ones, held = (read(trained / f"{case}{name}.pt")["held"] for name in ("-1", f"-{mode}-{size}"))
    assert held == whole_ones if mode == "ddp" else whole_ones / size <= held < 1.1 * whole_ones / size


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_exchanged_once_a_step(trained, case, mode):
    """Four parts need as many sums over the processes as one; where each part exchanges, more are counted."""
    one, four, *each = read(trained / "reductions.pt")[case, mode]
    assert 0 < one == four
    assert all(four < more for more in each)


@pytest.mark.parametrize("mode", MODES)
def test_no_collective_is_a_coalesced_one(trained, mode):
    """After those gloo corrupts memory at times: see `parallel._put_together`."""
    found = read(trained / "collectives.pt")[mode]
    assert "c10d::allreduce_" in found
    assert not [name for name in found if "coalesced" in name]


@pytest.mark.parametrize("mode", MODES)
def test_norms_over_rows_of_what_is_cut_up(trained, mode):
    assert read(trained / "norms.pt")[mode] == pytest.approx(
        read(trained / "gdes-1.pt")["losses"][0], rel=1e-5
    )


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("saved", MODES)
@pytest.mark.parametrize("size", (1, 2))
def test_state_of_two_processes_opens_in_any_number_and_mode(trained, case, saved, size):
    one, opened = read(trained / f"{case}-1.pt"), read(trained / f"{case}-{saved}-opened-{size}.pt")
    for alone, later in zip(one["losses"][STEPS // 2 :], opened["losses"], strict=True):
        assert later == pytest.approx(alone, rel=1e-5)


def execute_all(folder: Path, size: int) -> None:
    # All that surrounds compiled layers, without the minutes that their code takes to be made.
    nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    for case in SAVED:
        for mode in MODES:
            for execution in EXECUTIONS:
                result = train(case, mode, 0, 2, execution=execution)
                if is_rank_zero():
                    torch.save(result, folder / f"{case}-{mode}-{execution}.pt")


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("executed")
    run_ranks(2, folder, execute_all, folder, 2)
    return folder


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_checkpointed_and_compiled_layers_in_processes(trained, executed, case, mode, execution):
    """Gradients and losses are those of one process that does neither."""
    one, many = read(trained / f"{case}-1.pt"), read(executed / f"{case}-{mode}-{execution}.pt")
    for name, alone in one["gradients"].items():
        for ours, theirs in zip(alone, many["gradients"][name], strict=True):
            if ours is not None and ours.any():
                assert torch.linalg.vector_norm(theirs - ours) <= 1e-5 * torch.linalg.vector_norm(ours)
    for alone, together in zip(one["losses"][:2], many["losses"], strict=True):
        assert together == pytest.approx(alone, rel=1e-5)


def evaluate_all(prepared: Path, folder: Path, size: int) -> None:
    tokenizer = Tokenizer(prepared / "spm.model")
    for case in ("mlm", "gdes", "es"):
        masker = Masker(tokenizer, 1, case != "mlm")
        store = open_store(prepared / "valid.txt", tokenizer, 62)
        for mode in MODES:
            model, training = make_step(case, **MODES[mode])
            for rows in (16, 3):  # 40 lines: 3 batches, and 14 with a short last one
                splits = {"valid": EvaluationBatches(store, tokenizer, masker, BatchPlan(3, rows, 64))}
                device = torch.device("cpu")
                found = evaluate_splits(model, training.outputs, splits, training.config, "fp32", device)[
                    "valid"
                ]
                if is_rank_zero():
                    np.save(folder / f"{case}-{mode}-{rows}-{size}.npy", found, allow_pickle=True)


def test_evaluation_is_the_same_for_any_number_of_processes(prepared, tmp_path):
    evaluate_all(prepared, tmp_path, 1)
    for size in (*SIZES, 4):  # more processes than batches
        run_ranks(size, tmp_path, evaluate_all, prepared, tmp_path, size)
    files = sorted(tmp_path.glob("*-1.npy"))
    assert len(files) == 18
    for path in files:
        one = np.load(path, allow_pickle=True).item()
        for size in (*SIZES, 4):
            many = np.load(
                path.with_name(path.name.replace("-1.npy", f"-{size}.npy")), allow_pickle=True
            ).item()
            assert many == pytest.approx(one, rel=1e-6)
            if "discriminator_auc" in one:
                assert many["discriminator_auc"] == pytest.approx(one["discriminator_auc"], abs=1e-9)


def wait_for_a_silent_peer() -> None:
    group = dist.new_group(timeout=timedelta(seconds=3))
    dist.all_reduce(torch.ones(8), group=group)  # connects them
    if get_rank() == 1:
        time.sleep(8)  # longer than the other one waits
        return
    first = dist.all_reduce(torch.ones(8), group=group, async_op=True)
    time.sleep(0.1)
    second = dist.all_reduce(torch.ones(8), group=group, async_op=True)
    for work in (second, first):
        with (
            pytest.raises(PeerLostError, match=r"no answer .* within --dist_timeout 3 s"),
            translate_peer_errors(3),
        ):
            work.wait()


def test_every_collective_in_flight_tells_of_a_silent_peer(tmp_path):
    """The one that times out, and those that gloo ends with it, whose message does not name gloo."""
    run_ranks(2, tmp_path, wait_for_a_silent_peer)
