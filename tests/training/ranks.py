"""Several processes over gloo, for tests of what they compute together."""

import faulthandler
import os
import signal
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

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

CASES = {
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
ROWS = 7  # cut unevenly by two and three processes


def run_ranks(size: int, folder: Path, function: Callable, *arguments: object) -> None:
    """Run `function(*arguments)` in `size` processes of one group; it must be importable.

    When one fails, the error tells where each of them was: where it failed, or where it was when it was ended.
    """
    store = folder / f"store-{function.__name__}-{size}"
    store.unlink(missing_ok=True)
    places = [store.with_name(f"{store.name}-place-{number}") for number in range(size)]
    try:
        multiprocessing.spawn(_enter, (size, str(store), places, function, arguments), nprocs=size)
    except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
        told = [
            f"process {number}:\n{place.read_text()}" for number, place in enumerate(places) if place.exists()
        ]
        raise RuntimeError(
            "\n".join([f"process {error.error_index} of {size} failed first", *told])
        ) from error


def _enter(
    number: int, size: int, store: str, places: list[Path], function: Callable, arguments: tuple
) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    with places[number].open("w") as place:
        faulthandler.enable(place)
        faulthandler.register(
            signal.SIGTERM, place, chain=True
        )  # which `spawn` sends when another one failed
        try:
            files = dist.FileStore(store, size)
            dist.init_process_group("gloo", store=files, rank=number, world_size=size, timeout=limit)
            function(*arguments)
            dist.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=place)
            raise
        os._exit(0)  # as `end_process` does


def make_step(case: str, **values: object) -> tuple[torch.nn.Module, TrainingStep]:
    """A tiny model without dropout, with tables large enough to tell their gradients apart, and its step."""
    settings = (
        {"task_name": "RTD", "workers": 0, "learning_rate": 1e-2, "epsilon": 1e-3} | CASES[case] | values
    )
    sharing = settings.pop("sharing", None)
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    torch.manual_seed(7)
    config = train_config(**settings)
    device = torch.device("cpu")
    if sharing is None:
        model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model() | plain))
        set_execution(model, config, device)
        return model, recorded(MaskedLMStep)(model, config, "fp32", device, 10)
    values = tiny_rtd(sharing)
    for part in ("generator", "discriminator"):
        values[part] = values[part] | plain
    model = RTDModel(RTDConfig.from_dict(values))
    set_execution(model, config, device)
    return model, recorded(ReplacedTokenStep)(model, config, "fp32", device, 10)


def recorded(kind: type[TrainingStep]) -> type[TrainingStep]:
    """The step, which also keeps the gradients of each update, clipped, in `gradients`."""

    class Recorded(kind):
        def update(self, name: str, *arguments: object) -> bool:
            parameters = [p for group in self.optimizers[name].param_groups for p in group["params"]]
            self.gradients = {**vars(self).get("gradients", {})}
            self.gradients[name] = [
                None if p.grad is None else all_gather_full(p.grad).clone() for p in parameters
            ]
            return super().update(name, *arguments)

    return Recorded


def my_rows(seed: int) -> Batch:
    """This process's part of a global batch of `ROWS` rows."""
    batch = random_batch(ROWS, seed=seed)
    mine = slice(ROWS * get_rank() // get_world_size(), ROWS * (get_rank() + 1) // get_world_size())
    return Batch.from_tensors(*(tensor[mine] for tensor in batch[:4]))
