"""Runs of several ranks over gloo, for tests of what they compute together."""

import faulthandler
import os
import signal
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.data.batch import Batch
from DeBERTa.training.distributed import get_rank, get_world_size
from DeBERTa.training.execution import set_execution
from DeBERTa.training.parallel import all_gather_full
from DeBERTa.training.steps import MaskedLMStep, ReplacedTokenStep, TrainingStep
from tests.conftest import tiny_model, tiny_rtd
from tests.training.batches import random_batch, train_config

CASES: dict[str, dict[str, Any]] = {
    "mlm": {"task_name": "MLM"},
    "mlm-in-2": {"task_name": "MLM", "accumulative_update": 2},
    "gdes": {"sharing": "gdes"},
    "gdes-in-2": {"sharing": "gdes", "accumulative_update": 2},
    "gdes-joint": {"sharing": "gdes", "decoupled_training": False},
    "es": {"sharing": "es"},
    "es-in-2": {"sharing": "es", "accumulative_update": 2},
    "nes": {"sharing": "nes"},
    "nes-joint-in-2": {"sharing": "nes", "decoupled_training": False, "accumulative_update": 2},
}
ROWS = 7  # of a global batch; two and three ranks get unequal numbers of rows


def run_ranks(size: int, folder: Path, function: Callable, *arguments: object) -> None:
    """Run `function(*arguments)` on `size` ranks of one group; the function must be importable.

    When a rank fails, the error holds the traceback of every rank: of its failure, or of where it stopped.
    """
    store = folder / f"store-{function.__name__}-{size}"
    store.unlink(missing_ok=True)
    traces = [store.with_name(f"{store.name}-trace-{rank}") for rank in range(size)]
    try:
        multiprocessing.spawn(_enter, (size, str(store), traces, function, arguments), nprocs=size)
    except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
        reports = [
            f"rank {rank}:\n{trace.read_text()}" for rank, trace in enumerate(traces) if trace.exists()
        ]
        raise RuntimeError(
            "\n".join([f"rank {error.error_index} of {size} failed first", *reports])
        ) from error


def _enter(
    rank: int, size: int, store: str, traces: list[Path], function: Callable, arguments: tuple
) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    with traces[rank].open("w") as trace:
        faulthandler.enable(trace)
        faulthandler.register(signal.SIGTERM, trace, chain=True)  # `spawn` sends it when another rank failed
        try:
            files = dist.FileStore(store, size)
            dist.init_process_group("gloo", store=files, rank=rank, world_size=size, timeout=limit)
            function(*arguments)
            dist.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=trace)
            raise
        os._exit(0)  # as `exit_process` does


def make_step(case: str, vocab_size: int = 0, **values: Any) -> tuple[torch.nn.Module, "RecordedStep"]:
    """Return a tiny model without dropout, and its training step.

    Weights are large, so that the gradients of the tables differ clearly.
    """
    settings: dict[str, Any] = (
        {"task_name": "RTD", "workers": 0, "learning_rate": 1e-2, "epsilon": 1e-3} | CASES[case] | values
    )
    sharing = settings.pop("sharing", None)
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    if vocab_size:
        changes["vocab_size"] = vocab_size
    torch.manual_seed(7)
    config = train_config(**settings)
    device = torch.device("cpu")
    if sharing is None:
        model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model() | changes))
        set_execution(model, config, device)
        return model, RecordedMaskedLMStep(model, config, "fp32", device, 10)
    sections = tiny_rtd(sharing)
    for name in ("generator", "discriminator"):
        sections[name] = sections[name] | changes
    rtd_model = RTDModel(RTDConfig.from_dict(sections))
    set_execution(rtd_model, config, device)
    return rtd_model, RecordedReplacedTokenStep(rtd_model, config, "fp32", device, 10)


class RecordedStep(TrainingStep):
    """A step that keeps the gradients of its last updates, before clipping, under the optimizer's name."""

    def update(self, name: str, *arguments: Any) -> bool:
        """Copy the full gradients, then update."""
        parameters = [p for group in self.optimizers[name].param_groups for p in group["params"]]
        gradients = [None if p.grad is None else all_gather_full(p.grad).clone() for p in parameters]
        self.gradients = {**vars(self).get("gradients", {}), name: gradients}  # the one before stays as it is
        return super().update(name, *arguments)


class RecordedMaskedLMStep(RecordedStep, MaskedLMStep):
    """The MLM step."""


class RecordedReplacedTokenStep(RecordedStep, ReplacedTokenStep):
    """The RTD step."""


def select_rows(seed: int) -> Batch:
    """Return this rank's rows of a global batch of `ROWS`."""
    batch = random_batch(ROWS, seed=seed)
    rows = slice(ROWS * get_rank() // get_world_size(), ROWS * (get_rank() + 1) // get_world_size())
    return Batch.from_tensors(*(tensor[rows] for tensor in batch[:4]))
