"""N ranks compute what one does on the same global batch: gradients, weights, evaluation, checkpoints."""

import ast
import functools
import gc
import re
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
from DeBERTa.errors import LaunchError, PeerLostError
from DeBERTa.model.encoder import Layer
from DeBERTa.training import optimizer as optimizers
from DeBERTa.training.distributed import (
    all_reduce_sums,
    broadcast_value,
    gather_values,
    gather_vectors,
    get_rank,
    is_rank_zero,
    join_process_group,
    translate_nccl_errors,
    translate_peer_errors,
)
from DeBERTa.training.evaluation import evaluate_splits
from DeBERTa.training.metrics import average_losses
from DeBERTa.training.parallel import all_gather_full, gather_to_rank_zero, load_full_weights
from tests.conftest import ROOT, TINY
from tests.training.batches import random_batch
from tests.training.ranks import CASES, make_step, run_ranks, select_rows

MODES = {"ddp": {}, "zero2": {"sharding": "zero2"}, "fsdp": {"sharding": "fsdp"}}
SIZES = (2, 3)
GROUPS = ((2, "ddp"), (2, "zero2"), (2, "fsdp"), (3, "ddp"), (3, "fsdp"))  # number of ranks, and mode
STEPS = 4
SAVED = ("mlm", "gdes", "es")
LARGE_VOCABULARY = 300_000  # rows of 128 bytes: freed memory of over 32 MB goes back to the system at once

EXECUTIONS = {"checkpointing": {"gradient_checkpointing": True}, "compiled": {"compile": True}}


def train(
    case: str, mode: str, first: int, last: int, state: dict | None = None, execution: str = ""
) -> dict:
    """Take steps `first` to `last` - 1; return full gradients, weights and training state, and more."""
    model, training = make_step(case, **MODES[mode], **EXECUTIONS.get(execution, {}))
    if first:
        load_full_weights(model, state["weights"] if state else None)
        training.load_state_dict(state["training"] if state else None)
    losses = []
    for step in range(first, last):
        training.set_learning_rate(step + 1)
        sums = training(select_rows(seed=step))
        norms = {name: value for name, value in sums.items() if name.endswith("norm")}
        sums = all_reduce_sums({name: value for name, value in sums.items() if name not in norms})
        losses.append(average_losses(sums | norms))
        if step == first:
            gradients = training.gradients
    weights = {name: all_gather_full(tensor).clone() for name, tensor in model.state_dict().items()}
    moments = [
        state["exp_avg"] for optimizer in training.optimizers.values() for state in optimizer.state.values()
    ]
    elements = sum(get_local(moment).numel() for moment in moments)
    state = training.state_dict()
    return {
        "losses": losses,
        "gradients": gradients,
        "weights": weights,
        "training": state,
        "moment_elements": elements,
    }


def get_local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
        count_reductions_all(folder)
        list_collectives_all(folder)
        write_norms_all(folder)
        list_shards_all(folder)


def list_operations(recorded: profile) -> list[str]:
    """Return the names of all operations that ran."""
    return [
        event.name() for event in recorded.profiler.kineto_results.events()
    ]  # recorded.events() takes seconds


def count_reductions(case: str, mode: str, micro_batches: int, steps: int = 1) -> int:
    """Count all-reduces and reduce-scatters after the first step."""
    _, training = make_step(case, **MODES[mode], accumulative_update=micro_batches)
    training.set_learning_rate(1)
    batch = random_batch(8, seed=get_rank())
    training(batch)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            training(batch)
    names = list_operations(recorded)
    return names.count("c10d::allreduce_") + names.count("c10d::_reduce_scatter_base_")


def count_reductions_all(folder: Path) -> None:
    """One step of one micro-batch, one step of four, and four steps of one."""
    found = {}
    for case in SAVED:
        for mode in MODES:
            arguments = ((1,), (4,), (1, 4))
            found[case, mode] = [count_reductions(case, mode, *more) for more in arguments]
    if is_rank_zero():
        torch.save(found, folder / "reductions.pt")


def list_collectives_all(folder: Path) -> None:
    """Kinds of collectives in two steps, and in gathering gradients, weights and training state."""
    found = {}
    for mode in MODES:
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            train("gdes", mode, 0, 2)
        found[mode] = {name for name in list_operations(recorded) if name.startswith("c10d::")}
    if is_rank_zero():
        torch.save(found, folder / "collectives.pt")


def find_sharded(model: nn.Module) -> set[bool]:
    """Return whether the parameters of layers are shards: two values if only some are."""
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    return {isinstance(p, DTensor) for layer in layers for p in layer.parameters()}


def list_shards_all(folder: Path) -> None:
    """Write whether layers are sharded after the forward and the backward pass, and gradients."""
    found = {}
    for mode in MODES:
        model, training = make_step("mlm", **MODES[mode])
        masked = training.wrapped["model"](model.compute_masked_loss, select_rows(seed=0), is_sampled=False)
        loss = masked.loss.sum()
        after_forward = find_sharded(model)
        loss.backward()
        gradients = {isinstance(p.grad, DTensor) for p in model.parameters() if p.grad is not None}
        found[mode] = [after_forward, find_sharded(model), gradients]
    if is_rank_zero():
        torch.save(found, folder / "shards.pt")


def write_norms_all(folder: Path) -> None:
    """Write losses and norms of the first step; norms of tables are over their rows."""
    with mock.patch.object(optimizers, "LARGE", 0):
        found = {mode: train("gdes", mode, 0, 1)["losses"][0] for mode in MODES}
    if is_rank_zero():
        torch.save(found, folder / "norms.pt")


def resume_all(folder: Path, size: int) -> None:
    """Take the second half of the steps of two ranks in another mode."""
    for case in SAVED:
        for saved, resumed in (("ddp", "fsdp"), ("zero2", "ddp"), ("fsdp", "zero2")):
            path = folder / f"{case}-{saved}-half.pt"
            state = torch.load(path, weights_only=True) if is_rank_zero() else None
            result = train(case, resumed, STEPS // 2, STEPS, state)
            if is_rank_zero():
                torch.save(result, folder / f"{case}-{saved}-resumed-{size}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Results of one rank and of several, for every case and mode."""
    folder = tmp_path_factory.mktemp("ranks")
    for case in CASES:
        torch.save(train(case, "ddp", 0, STEPS), folder / f"{case}-1.pt")
    for size in SIZES:
        run_ranks(size, folder, train_all, folder, size)
    resume_all(folder, 1)
    run_ranks(2, folder, resume_all, folder, 2)
    return folder


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("size", "mode"), GROUPS)
def test_ranks_have_the_gradients_of_one(trained, case, mode, size):
    one, many = read(trained / f"{case}-1.pt"), read(trained / f"{case}-{mode}-{size}.pt")
    assert one["gradients"].keys() == many["gradients"].keys()
    compared = 0
    for name in one["gradients"]:
        for alone, together in zip(one["gradients"][name], many["gradients"][name], strict=True):
            if alone is None or not alone.any():
                assert together is None or not together.any()
                continue
            # Sums over other splits of the rows: float32 rounding, relative to the tensor. The largest is
            # 2.1e-6, of a key bias: large terms of its gradient cancel.
            assert torch.linalg.vector_norm(together - alone) <= 4e-6 * torch.linalg.vector_norm(alone)
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("size", "mode"), GROUPS)
def test_ranks_train_as_one_does(trained, case, mode, size):
    """Losses of four steps, gradient norms and weights."""
    one, many = read(trained / f"{case}-1.pt"), read(trained / f"{case}-{mode}-{size}.pt")
    for alone, together in zip(one["losses"], many["losses"], strict=True):
        assert together == pytest.approx(alone, rel=1e-5)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(many["weights"][name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("size", "mode"), GROUPS)
def test_moments_are_sharded(trained, case, mode, size):
    """With DDP rank 0 holds all of them, else its share: a little more, because rows are not split."""
    full, held = (read(trained / f"{case}{name}.pt")["moment_elements"] for name in ("-1", f"-{mode}-{size}"))
    assert held == full if mode == "ddp" else full / size <= held < 1.1 * full / size


def test_each_mode_shards_what_it_says(trained):
    """Parameters of layers between forward and backward pass, the same after it, and gradients."""
    assert read(trained / "shards.pt") == {
        "ddp": [{False}, {False}, {False}],
        "zero2": [{False}, {True}, {True}],
        "fsdp": [{True}, {True}, {True}],
    }


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_reduced_once_per_step(trained, case, mode):
    """Four micro-batches need as many reductions as one; four steps need more."""
    one, four, steps = read(trained / "reductions.pt")[case, mode]
    assert 0 < one == four < steps


@pytest.mark.parametrize("mode", MODES)
def test_no_collective_is_coalesced(trained, mode):
    """A coalesced all-gather makes gloo corrupt memory: see `parallel.all_gather_full`."""
    found = read(trained / "collectives.pt")[mode]
    assert "c10d::allreduce_" in found
    assert mode == "ddp" or found >= {"c10d::gather_", "c10d::_allgather_base_"}
    assert not [name for name in found if "coalesced" in name]


@pytest.mark.parametrize("mode", MODES)
def test_norms_over_rows_of_shards(trained, mode):
    assert read(trained / "norms.pt")[mode] == pytest.approx(
        read(trained / "gdes-1.pt")["losses"][0], rel=1e-5
    )


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("saved", MODES)
@pytest.mark.parametrize("size", [1, 2])
def test_two_ranks_resume_with_any_number_and_mode(trained, case, saved, size):
    one, resumed = read(trained / f"{case}-1.pt"), read(trained / f"{case}-{saved}-resumed-{size}.pt")
    for alone, later in zip(one["losses"][STEPS // 2 :], resumed["losses"], strict=True):
        assert later == pytest.approx(alone, rel=1e-5)


def read_memory(name: str) -> int:
    """Return a figure of this process in bytes: `VmRSS`, or `VmHWM`, the largest VmRSS so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def measure_memory_all(folder: Path) -> None:
    """Write for each rank the bytes by which memory grew to gather the state, and to load it."""
    for mode in ("ddp", "fsdp"):
        model, training = make_step("nes", vocab_size=LARGE_VOCABULARY, **MODES[mode])
        training.set_learning_rate(1)
        training(select_rows(seed=0))
        del training.gradients
        gc.collect()
        reset_peak = Path("/proc/self/clear_refs")
        reset_peak.write_text("5")
        before = read_memory("VmRSS")
        weights, state = gather_to_rank_zero(model.state_dict()), training.state_dict()
        gathered = read_memory("VmHWM") - before
        model, training = make_step("nes", vocab_size=LARGE_VOCABULARY, **MODES[mode])
        gc.collect()
        reset_peak.write_text("5")
        load_full_weights(model, weights if is_rank_zero() else None)
        training.load_state_dict(state if is_rank_zero() else None)
        loaded = read_memory("VmHWM") - read_memory("VmRSS")
        growth = gather_values((gathered, loaded))
        if is_rank_zero():
            torch.save(growth, folder / f"memory-{mode}.pt")


def test_full_state_is_on_rank_zero_alone(tmp_path):
    """Other ranks need no memory to save and, besides their own state, none to resume."""
    run_ranks(3, tmp_path, measure_memory_all, tmp_path)
    table = LARGE_VOCABULARY * TINY["hidden_size"] * 4
    for mode in ("ddp", "fsdp"):
        (gathered, _), *others = read(tmp_path / f"memory-{mode}.pt")
        assert gathered > 6 * table  # generator and discriminator: weights and two moments
        for growth in others:
            assert max(growth) < table, (mode, growth)


def execute_all(folder: Path) -> None:
    # Everything around compiled layers, without the minutes that compiling takes.
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
    run_ranks(2, folder, execute_all, folder)
    return folder


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_checkpointed_and_compiled_layers_on_ranks(trained, executed, case, mode, execution):
    """Gradients and losses are those of one rank that does neither."""
    one, many = read(trained / f"{case}-1.pt"), read(executed / f"{case}-{mode}-{execution}.pt")
    for name, alone in one["gradients"].items():
        for expected, found in zip(alone, many["gradients"][name], strict=True):
            if expected is not None and expected.any():
                assert torch.linalg.vector_norm(found - expected) <= 1e-5 * torch.linalg.vector_norm(expected)
    for alone, together in zip(one["losses"][:2], many["losses"], strict=True):
        assert together == pytest.approx(alone, rel=1e-5)


def evaluate_all(prepared: Path, folder: Path, size: int) -> None:
    tokenizer = Tokenizer(prepared / "spm.model")
    for case in ("mlm", "gdes", "es"):
        masker = Masker(tokenizer, 1, case != "mlm")
        store = open_store(prepared / "valid.txt", tokenizer, 62)
        for mode in MODES:
            _, training = make_step(case, **MODES[mode])
            for rows in (16, 3):  # 40 lines: 3 batches, and 14 with a short last one
                splits = {"valid": EvaluationBatches(store, tokenizer, masker, BatchPlan(3, rows, 64))}
                found = evaluate_splits(training, splits)["valid"]
                if is_rank_zero():
                    np.save(folder / f"{case}-{mode}-{rows}-{size}.npy", found, allow_pickle=True)


def test_evaluation_is_the_same_for_any_number_of_ranks(prepared, tmp_path):
    evaluate_all(prepared, tmp_path, 1)
    for size in (*SIZES, 4):  # more ranks than batches
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


def exchange_values() -> None:
    rank = get_rank()
    value = {"rank": rank, "text": "\x1b ü", "numbers": [0.1, float("inf"), 10**15], "none": None}
    assert gather_values(value) == [value | {"rank": 0}, value | {"rank": 1}]
    assert broadcast_value(value) == value | {"rank": 0}
    assert torch.as_tensor(broadcast_value(torch.tensor([[0.5]]))).tolist() == [[0.5]]
    vectors = gather_vectors(torch.arange(3 * rank, dtype=torch.float32))
    assert [vector.tolist() for vector in vectors] == [[], [0.0, 1.0, 2.0]]
    with pytest.raises(TypeError):
        gather_values(object())


def test_values_of_ranks(tmp_path):
    run_ranks(2, tmp_path, exchange_values)


def test_nothing_from_the_network_is_unpickled():
    """Collectives of objects unpickle what other machines send, which may be code."""
    for path in (ROOT / "DeBERTa").rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = {
            getattr(node, field)
            for node in ast.walk(tree)
            for kind, field in ((ast.Attribute, "attr"), (ast.Name, "id"), (ast.alias, "name"))
            if isinstance(node, kind)
        }
        unpickling = "(gather|broadcast|scatter|send|recv)_object|pickle|marshal|shelve"
        assert not [name for name in names if re.search(unpickling, name) and name != "_load_pickle"], path


NCCL = "NCCL error in: NCCLUtils.cpp:93, {}, NCCL version 2.28.9\n{}: what it means.\nLast error:\n{}\n"
SYSTEM, SYSTEM_NAME = "unhandled system error (run with NCCL_DEBUG=INFO for details)", "ncclSystemError"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (
            (SYSTEM, SYSTEM_NAME, "Error while creating shared memory segment: No space left on device (28)"),
            "NCCL cannot start: Error while creating shared memory segment: No space left on device (28); "
            "a container needs a larger /dev/shm (docker run --shm-size 1g)",
        ),
        (
            ("invalid usage", "ncclInvalidUsage", "Duplicate GPU detected : rank 1 and rank 0 on 1b000"),
            "NCCL cannot start: Duplicate GPU detected : rank 1 and rank 0 on 1b000; start one rank per GPU",
        ),
        (
            ("unhandled cuda error", "ncclUnhandledCudaError", "Cuda failure 2 'out of memory'"),
            "NCCL cannot start: Cuda failure 2 'out of memory'; other processes use this GPU (nvidia-smi)",
        ),
        (
            ("internal error", "ncclInternalError", "no device found"),
            "NCCL cannot start: no device found; NCCL_DEBUG=INFO in the environment shows more",
        ),
        (
            (
                "unhandled cuda error",
                "ncclUnhandledCudaError",
                "Cuda failure 217 'no peer access'",
            ),
            "NCCL cannot start: Cuda failure 217 'no peer access'; "
            "NCCL_DEBUG=INFO in the environment shows more",
        ),
        (
            ("internal error", "ncclInternalError", ""),
            "NCCL cannot start: ncclInternalError: what it means.; "
            "NCCL_DEBUG=INFO in the environment shows more",
        ),
        (("remote process exited", "ncclRemoteError", "socketProgress: closed by remote peer"), None),
        ((SYSTEM, SYSTEM_NAME, "Call to connect to node1 returned Connection refused"), None),
    ],
)
def test_nccl_that_cannot_start(texts, expected):
    """It is the rank's own error, which a restart does not remove; errors about other ranks stay."""
    kind = LaunchError if expected else PeerLostError
    with pytest.raises(kind) as error, translate_peer_errors(600), translate_nccl_errors():
        raise dist.DistBackendError(NCCL.format(*texts))
    assert error.value.is_retryable == error.value.is_consequence == (expected is None)
    assert expected is None or str(error.value) == expected


def test_a_rank_without_a_gpu(monkeypatch):
    """As torchrun starts it with more ranks than GPUs."""
    for name, value in {"TORCHELASTIC_RUN_ID": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(LaunchError, match="local rank 1 has no GPU: it sees 1; start at most as many"),
        join_process_group(600),
    ):
        pass


def wait_for_a_silent_peer() -> None:
    group = dist.new_group(timeout=timedelta(seconds=3))
    dist.all_reduce(torch.ones(8), group=group)  # connects them
    if get_rank() == 1:
        time.sleep(8)  # longer than the other rank waits
        return
    first = dist.all_reduce(torch.ones(8), group=group, async_op=True)
    time.sleep(0.1)
    second = dist.all_reduce(torch.ones(8), group=group, async_op=True)
    for work in (second, first):
        with (
            pytest.raises(PeerLostError, match=r"no message .* within --dist_timeout 3 s"),
            translate_peer_errors(3),
        ):
            work.wait()


def test_every_pending_collective_reports_a_silent_peer(tmp_path):
    """The one that times out, and those that gloo ends with it, whose message does not name gloo."""
    run_ranks(2, tmp_path, wait_for_a_silent_peer)
