"""Skipped updates: weights and moments keep their bits; a run of skipped updates stops."""

import copy
import json
import math
import shutil
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from DeBERTa.data.dataset import BatchPlan, TrainingBatches
from DeBERTa.data.masking import Masker
from DeBERTa.data.token_store import open_store
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.training.checkpoint import get_checkpoint_path
from DeBERTa.training.distributed import get_rank
from DeBERTa.training.guard import MIN_WINDOW, WINDOW, UpdateGuard
from DeBERTa.training.metrics import Sums
from DeBERTa.training.signals import Signals
from DeBERTa.training.steps import MaskedLMStep, ReplacedTokenStep
from tests.runs import copy_run, read_final_files, run, tiny_flags
from tests.training.batches import random_batch, train_config
from tests.training.ranks import run_ranks
from tests.training.test_steps import CPU, build_mlm, build_rtd

NAN, INF = float("nan"), float("inf")


def copy_state(training, model) -> dict[str, torch.Tensor]:
    """Return copies of all weights and moments, by name."""
    tensors = {f"weight {name}": tensor for name, tensor in model.state_dict().items()}
    for kind, optimizer in training.optimizers.items():
        for number, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"{kind} {number} {name}": value for name, value in moments.items()}
    return copy.deepcopy(tensors)


def list_changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def break_gradient(model, prefix: str, value: float) -> torch.utils.hooks.RemovableHandle:
    weight = dict(model.named_parameters())[f"{prefix}deberta.encoder.layer.0.output.dense.weight"]
    return weight.register_hook(lambda gradient: gradient + value)


def test_a_step_without_targets_has_no_loss():
    """Its loss is no figure, and none that later ones are compared with."""
    guard = UpdateGuard(train_config(), CPU)
    guard.begin_step()
    sums = {"loss": torch.zeros(()), "targets": torch.zeros(())}
    assert guard.allows_update(sums, ("loss",), torch.zeros(()))
    assert guard.losses == {}
    assert guard.windows == {}


@pytest.mark.parametrize(("value", "precision"), [(NAN, "fp32"), (INF, "fp32"), (NAN, "bf16"), (INF, "fp16")])
def test_masked_lm_update_with_a_broken_gradient(value, precision):
    model = build_mlm()
    training = MaskedLMStep(model, train_config(), precision, CPU, total_steps=10)
    training.set_learning_rate(1)
    training.scaler.scale(torch.zeros(1))  # the scaler starts at its first use
    training.scaler.update(16.0) if precision == "fp16" else None
    training(random_batch())
    assert (training.guard.is_skipped, training.guard.skipped_steps) == (False, 0)
    before = copy_state(training, model)
    handle = break_gradient(model, "", value)
    training(random_batch())
    training(random_batch())
    assert list_changed(before, copy_state(training, model)) == set()
    assert (training.guard.is_skipped, training.guard.skipped_steps, training.guard.consecutive_skips) == (
        True,
        2,
        2,
    )
    handle.remove()
    training(random_batch())
    assert "weight lm_predictions.lm_head.bias" in list_changed(before, copy_state(training, model))
    assert (training.guard.skipped_steps, training.guard.consecutive_skips) == (2, 0)


@pytest.mark.parametrize("broken", ["generator", "discriminator"])
@pytest.mark.parametrize(
    ("sharing", "decoupled"), [("es", True), ("gdes", False), ("gdes", True), ("nes", True)]
)
def test_rtd_update_with_a_broken_gradient(sharing, decoupled, broken):
    """Nothing changes, except by a decoupled generator's update before the discriminator's loss is known."""
    model = build_rtd(sharing)
    config = train_config(task_name="RTD", decoupled_training=decoupled)
    training = ReplacedTokenStep(model, config, "fp32", CPU, total_steps=10)
    training.set_learning_rate(1)
    training(random_batch())
    before = copy_state(training, model)
    break_gradient(model, f"{broken}.", NAN)
    training(random_batch())
    names = list_changed(before, copy_state(training, model))
    if training.is_decoupled and broken == "discriminator":
        assert names
        assert not [name for name in names if "discriminator" in name]
    else:
        assert names == set()
    assert training.guard.skipped_steps == 1


@pytest.mark.parametrize("role", ["generator", "discriminator"])
def test_a_loss_that_is_not_a_number(role):
    model = build_rtd()
    training = ReplacedTokenStep(model, train_config(task_name="RTD"), "fp32", CPU, total_steps=10)
    training.set_learning_rate(1)
    training(random_batch())
    weight = dict(model.named_parameters())[f"{role}.deberta.encoder.layer.0.output.dense.weight"]
    with torch.no_grad():
        weight[0, 0] = NAN
    before = copy_state(training, model)
    training(random_batch())
    after = copy_state(training, model)
    unequal = {name for name in list_changed(before, after) if not torch.isnan(after[name]).any()}
    assert not [name for name in unequal if role in name or role == "generator"]
    assert math.isnan(training.guard.losses[f"{role}_loss"])
    assert not training.guard.has_finite_losses()


@pytest.mark.parametrize("sharing", ["gdes", "nes"])
def test_the_generator_is_updated_as_usual_when_only_the_discriminator_fails(sharing):
    """Decoupled: its weights and moments are those of a normal step, and the step counts as skipped."""
    found = []
    for broken in (False, True):
        model = build_rtd(sharing)
        training = ReplacedTokenStep(model, train_config(task_name="RTD"), "fp32", CPU, total_steps=10)
        training.set_learning_rate(1)
        training(random_batch())
        with torch.no_grad():
            model.discriminator.mask_predictions.classifier.bias += NAN if broken else 0
        before = copy_state(training, model)
        training(random_batch(seed=4))
        assert math.isfinite(training.guard.losses["generator_loss"])
        assert math.isnan(training.guard.losses["discriminator_loss"]) == broken
        assert (training.guard.is_skipped, training.guard.skipped_steps) == (broken, broken)
        found.append((before, copy_state(training, model)))
    (_, usual), (before, after) = found
    generators = {name for name in after if "discriminator" not in name}
    assert len(generators) > 50
    assert not list_changed(*({name: x[name] for name in generators} for x in (usual, after)))
    (bias,) = list_changed(before, after) - generators
    assert bias == "weight discriminator.mask_predictions.classifier.bias"
    assert generators & list_changed(before, after)


def run_rank(directory: Path) -> None:
    """Run one of two ranks: in step 2 rank 1's gradient is not finite, in step 3 its loss is a spike."""
    model = build_mlm()
    training = MaskedLMStep(model, train_config(skip_spikes=True), "fp32", CPU, total_steps=10)
    training.set_learning_rate(1)
    training(random_batch())
    before = copy_state(training, model)
    handle = break_gradient(model, "", NAN) if get_rank() == 1 else None
    training(random_batch(seed=get_rank()))
    found = [training.guard.is_skipped, len(list_changed(before, copy_state(training, model)))]
    if handle:
        handle.remove()
    training.guard.windows["loss"] = deque([1.0] * MIN_WINDOW)
    training(random_batch(seed=get_rank()))
    found += [
        training.guard.is_skipped,
        len(list_changed(before, copy_state(training, model))),
        training.guard.losses,
    ]
    signals = Signals()
    signals.is_save_requested = get_rank() == 1
    found += [signals.exchange_requests(), signals.exchange_requests()]
    signals.stop_signal = 15 * (get_rank() == 0)
    torch.save([*found, signals.exchange_requests()], directory / f"{get_rank()}.pt")


def test_all_ranks_decide_the_same(tmp_path):
    """What happens on one rank is skipped, saved or ended on both."""
    run_ranks(2, tmp_path, run_rank, tmp_path)
    found, other = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2))
    assert found == other
    is_skipped, num_changed, is_spike_skipped, num_changed_by_spike, losses, *requests = found
    assert (is_skipped, num_changed, is_spike_skipped, num_changed_by_spike) == (True, 0, True, 0)
    assert losses["loss"] > 5
    assert requests == [(0, True), (0, False), (15, False)]


def make_sums(loss: float) -> Sums:
    return {"loss": torch.tensor(loss * 4), "targets": torch.tensor(4)}


@pytest.mark.parametrize(("deviations", "is_spike"), [(5.9, False), (6.1, True)])
def test_the_bound_of_spikes(deviations, is_spike):
    guard = UpdateGuard(train_config(), CPU)
    for loss in [2.5, 3.5] * 64 + [3.0 + deviations * 0.5]:  # mean 3, standard deviation 0.5
        guard.begin_step()
        guard.allows_update(make_sums(loss), ("loss",), torch.tensor(1.0))
        guard.end_step()
    assert bool(guard.spikes) == is_spike


@pytest.mark.parametrize("skip_spikes", [False, True])
def test_spikes(skip_spikes):
    """A loss above mean + 6 sigma of the last 128, once there are 32; the rule by hand on 400 losses."""
    guard = UpdateGuard(train_config(skip_spikes=skip_spikes), CPU)
    generator = np.random.default_rng(0)
    losses = (3 + 0.1 * generator.standard_normal(400)).astype(np.float32).tolist()
    for step, loss in {5: 9.0, 50: 4.5, 51: NAN, 52: 4.4, 300: 3.3, 399: 5.0}.items():
        losses[step] = loss
    found, window_losses = [], []
    for step, loss in enumerate(losses):
        guard.begin_step()
        allowed = guard.allows_update(make_sums(loss), ("loss",), torch.tensor(1.0))
        guard.end_step()
        window = np.array(window_losses[-WINDOW:])
        by_hand = len(window_losses) >= MIN_WINDOW and loss > window.mean() + 6 * window.std()
        assert bool(guard.spikes) == by_hand
        assert allowed == (math.isfinite(loss) and not (by_hand and skip_spikes))
        if math.isfinite(loss):
            window_losses.append(loss)
        found += [step] if by_hand else []
    assert found == [399]  # 9.0 at step 5 widens the window until it is forgotten
    assert guard.skipped_steps == 1 + (len(found) if skip_spikes else 0)
    other = UpdateGuard(train_config(), CPU)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.state_dict() == guard.state_dict()


def test_a_lasting_change_of_level_is_no_spike_for_long():
    guard = UpdateGuard(train_config(skip_spikes=True), CPU)
    skipped = 0
    for step in range(300):
        guard.begin_step()
        loss = (3.0 if step < 200 else 6.0) + step % 2 * 0.01
        skipped += not guard.allows_update(make_sums(loss), ("loss",), torch.tensor(1.0))
    assert 0 < skipped <= 5


@pytest.mark.parametrize(("task", "precision"), [("RTD", "fp32"), ("MLM", "fp16"), ("RTD", "fp16")])
def test_a_diverged_run_stops(tmp_path, prepared, task, precision):
    """It names step, losses, and the lines of the batch; float16 does not lower its scale forever."""
    flags = tiny_flags(tmp_path, prepared, task) | {
        "precision": precision,
        "learning_rate": 1e20,
        "warmup": 0,
    }
    flags |= {"num_training_steps": 1000, "dump_interval": 1000, "log_interval": 1, "max_skipped_steps": 4}
    status, output = run(flags)
    assert status == 1, output
    message = output.strip().splitlines()[-1]
    assert message.startswith("error: step ")
    assert "Traceback" not in output
    for text in (
        "4 steps in a row",
        "--max_skipped_steps",
        "is nan",
        "train.txt",
        "--learning_rate",
        "--tag",
    ):
        assert text in message, message
    lines = [json.loads(line) for line in (flags["output_dir"] / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines][-3:] == [1, 2, 3]
    assert "3 steps skipped" in output


def write_data(directory: Path, tokenizer: Tokenizer, odd_line: int | None) -> None:
    """Write 800 equal lines, except for one."""
    directory.mkdir(exist_ok=True)
    usual = " ".join(tokenizer.pieces[10:26])
    odd = " ".join(tokenizer.pieces[1500:1516])
    lines = [odd if number == odd_line else usual for number in range(800)]
    (directory / "train.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_a_spike_in_a_run(tmp_path, tokenizer):
    """The step with the odd line is logged and skipped, also after a resume shortly before it."""
    write_data(tmp_path / "usual", tokenizer, None)
    store = open_store(tmp_path / "usual" / "train.txt", tokenizer, 62, has_progress=False)
    batches = TrainingBatches(store, tokenizer, Masker(tokenizer, 1, False), BatchPlan(42, 4, 64))
    write_data(tmp_path / "data", tokenizer, int(batches.select_lines(179)[2]))
    shutil.copy(tokenizer.path, tmp_path / "data" / "spm.model")
    flags = tiny_flags(tmp_path, tmp_path / "data", "MLM") | {
        "skip_spikes": True,
        "learning_rate": 1e-2,
        "keep_last": 9,
    }
    flags |= {"num_training_steps": 181, "dump_interval": 175, "log_interval": 90, "train_batch_size": 4}
    status, output = run(flags)
    assert status == 0, output
    lines = [json.loads(line) for line in (flags["output_dir"] / "metrics.jsonl").read_text().splitlines()]
    (spike,) = [line for line in lines if line["kind"] == "spike"]
    assert (spike["step"], spike["skipped"]) == (180, True)
    assert spike["loss"] > spike["mean"] + 6 * spike["sigma"]
    assert [line["skipped_steps"] for line in lines if line["kind"] == "train"] == [0, 0, 0, 1, 1]
    assert "step 180: update skipped: a loss spike" in output
    cut = copy_run(flags["output_dir"], tmp_path / "cut")
    shutil.rmtree(get_checkpoint_path(cut, 181))
    status, output = run(flags | {"output_dir": cut})
    assert status == 0
    assert "resuming from step 175" in output
    assert read_final_files(cut) == read_final_files(flags["output_dir"])
