"""The export command on a real run."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from DeBERTa import RTDConfig
from DeBERTa.export import main
from DeBERTa.hub.published import load_rtd
from DeBERTa.model.pretraining import RTDModel
from DeBERTa.training.checkpoint import get_checkpoint_path, write_manifest
from tests.conftest import read_equal_metrics
from tests.runs import copy_run, run, tiny_flags


@pytest.fixture(scope="module")
def finished(tmp_path_factory, prepared):
    """Return the directory of a run with checkpoints at 2, 4 and 6."""
    flags = tiny_flags(tmp_path_factory.mktemp("run"), prepared)
    status, output = run(flags)
    assert status == 0, output
    return flags["output_dir"]


def fails(capsys, *arguments: object) -> tuple[int, str]:
    """Return exit status and the one error."""
    status = main([*map(str, arguments)])
    (line,) = capsys.readouterr().err.splitlines()
    return status, line.partition("error: ")[2]


def test_newest_checkpoint_is_the_final_model(finished, tmp_path):
    assert main([str(finished), "--output", str(tmp_path / "out")]) == 0
    for name in ("generator", "discriminator"):
        ours = load_file(tmp_path / "out" / name / "model.safetensors")
        final = load_file(finished / name / "model.safetensors")
        assert ours.keys() == final.keys()
        assert all(torch.equal(ours[key], final[key]) for key in ours)
        assert (tmp_path / "out" / name / "spm.model").read_bytes() == (
            finished / name / "spm.model"
        ).read_bytes()


def test_another_step(finished, tmp_path):
    """Its weights, and its results in the card."""
    run_dir = copy_run(finished, tmp_path / "run")
    assert main([str(run_dir), "--step", "4"]) == 0
    directory = run_dir / "export" / "step-00000004" / "generator"
    weights = load_file(directory / "model.safetensors")
    saved = load_file(get_checkpoint_path(run_dir, 4) / "model.safetensors")
    assert all(torch.equal(weights[name], saved[f"generator.{name}"]) for name in weights)
    card = (directory / "README.md").read_text()
    (line,) = [line for line in read_equal_metrics(run_dir) if (line["step"], line["kind"]) == (4, "valid")]
    assert "## Validation at step 4\n" in card
    assert f"| generator_loss | {line['generator_loss']:.6g} |" in card
    assert "| learning_rate | 0.001 |" in card
    assert (directory / "curves.svg").read_text().count("<polyline") == 2


def test_published_format_out_and_in_again(finished, tmp_path):
    """The models start with the same bits."""
    output = tmp_path / "published"
    assert main([str(finished), "--published-format", "--output", str(output)]) == 0
    model = RTDModel(RTDConfig.from_json(output / "model_config.json"))
    load_rtd(model, output / "pytorch_model.generator.bin", output / "pytorch_model.bin")
    for name, state in (
        ("generator", model.generator.state_dict()),
        ("discriminator", model.merge_discriminator()),
    ):
        final = load_file(finished / name / "model.safetensors")
        assert state.keys() == final.keys()
        for key, tensor in state.items():
            assert torch.equal(tensor, final[key]), key


def test_errors(finished, tmp_path, capsys):
    """One sentence each."""
    run_dir = copy_run(finished, tmp_path / "run")
    assert fails(capsys, run_dir, "--step", "3") == (
        1,
        f"--step 3: {run_dir} has no such checkpoint; it has 2, 4, 6",
    )
    status, error = fails(capsys, tmp_path)
    assert status == 1
    assert "no checkpoints; give the directory of a run" in error
    assert fails(capsys, run_dir, "--stpe", "3")[0] == 2
    (run_dir / "export").touch()
    status, error = fails(capsys, run_dir)
    assert status == 1
    assert "give another --output" in error
    weights = get_checkpoint_path(run_dir, 6) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    status, error = fails(capsys, run_dir, "--step", 6, "--output", tmp_path / "out")
    assert status == 1
    assert "model.safetensors has" in error


def test_vocabulary_of_the_run(finished, tmp_path, capsys):
    """The recorded path, or the copy of a final model; never another vocabulary."""
    run_dir = copy_run(finished, tmp_path / "run")
    path = get_checkpoint_path(run_dir, 6) / "config.json"
    settings = json.loads(path.read_text())
    settings["train"]["vocab_path"] = "/missing/spm.model"
    path.write_text(json.dumps(settings))
    write_manifest(path.parent, 6)
    assert main([str(run_dir), "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    for name in ("generator", "discriminator"):
        shutil.rmtree(run_dir / name)
    status, error = fails(capsys, run_dir, "--output", tmp_path / "out")
    assert status == 1
    assert error.startswith(f"the vocabulary of {run_dir} is missing: /missing/spm.model")
