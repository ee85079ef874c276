"""The memory that `--dry_run` reports against the peak of runs with other settings than the quick test's."""

import pytest

from tests.test_dry_run import assert_peak_is_estimated, make_preset_flags


@pytest.mark.parametrize(
    ("model", "others"),
    [
        ("rtd_tiny.json", {"train_batch_size": 384, "accumulative_update": 2}),
        ("rtd_tiny.json", {"precision": "bf16", "decoupled_training": "False"}),
        ("rtd_tiny.json", {"gradient_checkpointing": "True", "workers": 2}),
        ("deberta_tiny.json", {"kernels": "off", "train_batch_size": 192}),
        ("bert_tiny.json", {"train_batch_size": 384}),
        ("rtd_base.json", {"train_batch_size": 4, "eval_batch_size": 4, "vocab_size": 8000}),
    ],
)
def test_peak_memory(tmp_path, prepared, model, others):
    assert_peak_is_estimated(make_preset_flags(tmp_path, prepared, model, **others))
