"""The run directory: what may change on resume, what is moved, and disks that are too small."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from DeBERTa import MaskedLanguageModel, ModelConfig, ReplacedTokenDetectionModel, RTDConfig, RTDModel
from DeBERTa.errors import ConfigError, StorageError
from DeBERTa.training.run_dir import (
    check_disk_space,
    check_same_run,
    flatten,
    open_run_dir,
    remove_unfinished,
    save_models,
)
from tests.conftest import GOLDEN, tiny_model, tiny_rtd

VOCABULARY = GOLDEN / "prepare" / "spm.model"


def settings(**train: object) -> dict:
    return {"train": train, "model": {"generator": {"hidden_size": 8}}, "data": {"train_sha256": "a"}}


def test_other_settings_are_refused_by_name(tmp_path):
    check_same_run(settings(seed=1, workers=2), settings(seed=1, workers=0), tmp_path)
    with pytest.raises(ConfigError, match=r"seed \(1 there, 2 here\)"):
        check_same_run(settings(seed=1), settings(seed=2), tmp_path)
    other = settings(seed=1) | {"model": {"generator": {"hidden_size": 16}}}
    with pytest.raises(ConfigError, match=r"generator.hidden_size \(8 there, 16 here\)"):
        check_same_run(settings(seed=1), other, tmp_path)


def test_nested_settings_get_dotted_names():
    assert flatten({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == {"a": 1, "b.c": 2, "b.d.e": 3}


def test_fresh_moves_the_previous_files(tmp_path):
    run_dir = tmp_path / "run"
    assert open_run_dir(run_dir, settings(), {}, fresh=False) == 0
    (run_dir / "metrics.jsonl").write_text("old\n")
    (run_dir / "logs").mkdir()
    assert open_run_dir(run_dir, settings(), {}, fresh=True) == 0
    assert sorted(path.name for path in run_dir.iterdir()) == [
        ".lock", "config.json", "environment.json", "logs"
    ]  # fmt: skip
    assert (tmp_path / "run.old-1" / "metrics.jsonl").read_text() == "old\n"


def test_a_directory_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write the run directory .*; give another --output_dir"):
        open_run_dir(tmp_path / "file" / "run", settings(), {}, fresh=False)


def test_unfinished_checkpoints_are_removed(tmp_path):
    unfinished = tmp_path / "checkpoints" / "step-00000002.tmp"
    unfinished.mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000001").mkdir()
    remove_unfinished(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_disk_that_is_too_small(tmp_path):
    check_disk_space(tmp_path, nn.Linear(2, 2), remaining=1, keep_last=1)
    large = nn.Linear(1 << 25, 1 << 25, device="meta")  # 4 PiB
    with pytest.raises(StorageError, match=r"the disk of .* MB free.*give another --output_dir"):
        check_disk_space(tmp_path, large, remaining=1, keep_last=1)


def test_final_models_load_elsewhere(tmp_path):
    torch.manual_seed(0)
    masked_lm = MaskedLanguageModel(ModelConfig.from_dict(tiny_model()))
    assert save_models(tmp_path, masked_lm, VOCABULARY) == [tmp_path / "model"]
    loaded = MaskedLanguageModel(ModelConfig.from_json(tmp_path / "model" / "config.json"))
    loaded.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"), strict=True)

    rtd = RTDModel(RTDConfig.from_dict(tiny_rtd()))
    assert [path.name for path in save_models(tmp_path, rtd, VOCABULARY)] == ["generator", "discriminator"]
    config = ModelConfig.from_json(tmp_path / "discriminator" / "config.json")
    discriminator = ReplacedTokenDetectionModel(config)
    discriminator.load_state_dict(load_file(tmp_path / "discriminator" / "model.safetensors"), strict=True)
    assert (tmp_path / "generator" / "spm.model").read_bytes() == VOCABULARY.read_bytes()


def test_a_final_model_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "model").touch()
    with pytest.raises(StorageError, match="cannot write the final model"):
        save_models(tmp_path, MaskedLanguageModel(ModelConfig.from_dict(tiny_model())), VOCABULARY)
