"""The loop: what it logs, also after a resume, and weights that are not finite."""

import json
import math
import shutil
from datetime import datetime
from statistics import median

import pytest
import torch

from DeBERTa import MaskedLanguageModel, ModelConfig, TrainConfig
from DeBERTa.data.dataset import BatchPlan, TrainingBatches, derive_step_seed
from DeBERTa.data.masking import Masker
from DeBERTa.data.token_store import open_store
from DeBERTa.errors import NonFiniteError
from DeBERTa.training.checkpoint import get_checkpoint_path
from DeBERTa.training.trainer import check_finite_weights
from tests.commands import find_free_port, read_metrics_log
from tests.conftest import tiny_model
from tests.runs import copy_run, remove_after, run, run_pair, tiny_flags

TOKENS_PER_STEP = 8 * 64  # sequences without padding


def test_without_a_checkpoint_metrics_and_samples_start_over(tmp_path, prepared):
    flags = tiny_flags(tmp_path, prepared, "MLM") | {"num_training_steps": 2}
    assert run(flags)[0] == 0
    run_dir = flags["output_dir"]
    previous = {name: (run_dir / name).read_text() for name in ("metrics.jsonl", "samples.jsonl")}
    shutil.rmtree(run_dir / "checkpoints")
    status, output = run(flags)
    assert status == 0, output
    for name, text in previous.items():
        assert (run_dir / f"{name}-1").read_text() == text
        assert (run_dir / name).read_text().count("\n") == text.count("\n")
        assert f"the previous {name} is now {run_dir / name}-1" in output


def test_metrics_continue_across_a_resume(tmp_path, prepared):
    flags = tiny_flags(tmp_path, prepared) | {"discriminator_learning_rate": 5e-4, "log_interval": 1}
    status, output = run(flags)
    assert status == 0, output
    cut = copy_run(flags["output_dir"], tmp_path / "cut")
    remove_after(cut, 2)
    before = json.loads((get_checkpoint_path(cut, 2) / "state.json").read_text())["elapsed_seconds"]
    status, output = run(flags | {"output_dir": cut})
    assert status == 0, output
    assert "resuming from step 2" in output
    for run_dir in (flags["output_dir"], cut):
        lines = [line for line in read_metrics_log(run_dir) if line["kind"] == "train"]
        assert [line["tokens_seen"] for line in lines] == [
            TOKENS_PER_STEP * step for step in (1, 2, 3, 4, 5, 6)
        ]
        elapsed, times = (
            [line["elapsed_seconds"] for line in lines],
            [datetime.fromisoformat(line["time"]) for line in lines],
        )
        assert elapsed == sorted(elapsed)
        assert elapsed[0] > 0
        assert times == sorted(times)
        for line in lines:
            assert line["discriminator_learning_rate"] == pytest.approx(line["learning_rate"] / 2)
            assert 0.05 < line["peak_memory_gb"] < 100
    assert lines[2]["elapsed_seconds"] > before


def test_only_rank_0_writes_to_the_console(tmp_path, prepared):
    flags = tiny_flags(tmp_path, prepared)
    status, output = run_pair(flags, find_free_port())
    assert status == 0, output
    assert "step 6/6" in output
    assert "saved" in output
    assert (tmp_path / "pair.1").read_text() == ""
    log = (flags["output_dir"] / "logs" / "rank-0001.log").read_text()
    assert "step 6/6" in log
    assert "saved" not in log


def test_every_rank_draws_dropout_masks_of_its_own(tmp_path, prepared, tokenizer):
    """The loss of the first step is that of both halves of the batch, each with its rank's seed."""
    flags = tiny_flags(tmp_path, prepared, "MLM") | {"num_training_steps": 1, "kernels": "off"}
    status, output = run_pair(flags, find_free_port())
    assert status == 0, output
    logged = read_metrics_log(flags["output_dir"])[0]["loss"]
    store = open_store(prepared / "train.txt", tokenizer, max_tokens=62)
    masker = Masker(tokenizer, TrainConfig().max_ngram, is_always_masked=False)
    torch.manual_seed(42)
    model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model()))
    halves = [TrainingBatches(store, tokenizer, masker, BatchPlan(42, 8, 64, rank, 2))[0] for rank in (0, 1)]

    @torch.no_grad()
    def compute_loss(*seeds: int) -> float:
        losses = []
        for seed, batch in zip(seeds, halves, strict=True):
            torch.manual_seed(seed)
            losses.append(model.compute_masked_loss(batch, is_sampled=False).loss)
        return float(torch.cat(losses).double().mean())

    seeds = [derive_step_seed(42, 1, rank) for rank in (0, 1)]
    assert logged == pytest.approx(compute_loss(*seeds), rel=2e-6)
    assert logged != pytest.approx(compute_loss(seeds[0], seeds[0]), rel=2e-6)


def test_evaluation_does_not_count_as_training_time(tmp_path, prepared):
    """Throughput after an evaluation of 2,000 lines is that of other steps of 8 lines."""
    data = shutil.copytree(prepared, tmp_path / "data", ignore=shutil.ignore_patterns("*.ids*"))
    (data / "valid.txt").write_text((data / "valid.txt").read_text() * 50)
    flags = tiny_flags(tmp_path, data, "MLM") | {"num_training_steps": 40, "dump_interval": 10}
    status, output = run(flags | {"log_interval": 1})
    assert status == 0, output
    lines = {line["step"]: line for line in read_metrics_log(flags["output_dir"]) if line["kind"] == "train"}
    rates = [lines[step]["tokens_per_second"] for step in sorted(lines)]
    after = [lines[step]["tokens_per_second"] for step in (11, 21, 31)]
    seconds = [lines[step]["elapsed_seconds"] - lines[step - 1]["elapsed_seconds"] for step in (11, 21, 31)]
    assert max(after) > median(rates) / 4
    # What counting it would give.
    assert 4 * TOKENS_PER_STEP / median(rates) < min(seconds)


def test_at_level_warning_a_run_is_silent(tmp_path, prepared):
    flags = tiny_flags(tmp_path, prepared, "MLM") | {
        "num_training_steps": 1,
        "warmup": 1,
        "log_level": "warning",
    }
    assert run(flags) == (0, "")


@pytest.mark.parametrize("task", ["MLM", "RTD"])
def test_a_validation_set_without_masked_tokens(tmp_path, prepared, task):
    """Two lines of one token, under seed 42: no figure is reported, and no checkpoint is the best."""
    data = shutil.copytree(prepared, tmp_path / "data", ignore=shutil.ignore_patterns("test*", "*.ids*"))
    words = (prepared / "train.txt").read_text(encoding="utf-8").split()[:2]
    (data / "valid.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    flags = tiny_flags(tmp_path, data, task) | {"do_eval": True}
    status, output = run(flags)
    assert status == 0, output
    assert "warning: valid: " in output
    assert "loss is undefined: no token was masked" in output
    prefix = "generator_" if task == "RTD" else ""
    recorded = [line for line in read_metrics_log(flags["output_dir"]) if line["kind"] == "valid"]
    recorded.append(json.loads((flags["output_dir"] / "evaluation.json").read_text())["valid"])
    assert len(recorded) == 4
    for line in recorded:
        assert [line[f"{prefix}{name}"] for name in ("loss", "accuracy", "perplexity")] == [None] * 3
    assert not (flags["output_dir"] / "checkpoints" / "best.json").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value):
    model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model()))
    check_finite_weights(model, 3, tmp_path)
    name = "deberta.encoder.layer.1.output.dense.weight"
    with torch.no_grad():
        dict(model.named_parameters())[name][3, 4] = value
    with pytest.raises(NonFiniteError, match=f"step 3: the norm of {name} is {value}: training has diverged"):
        check_finite_weights(model, 3, tmp_path)
