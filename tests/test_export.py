"""The export command on a real run."""

import importlib.util
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
from tests.conftest import ROOT, read_equal_metrics
from tests.hub.exported import read_sentences
from tests.runs import copy_run, run, tiny_flags


@pytest.fixture(scope="module")
def finished(tmp_path_factory, prepared):
    """Return the directory of a run with checkpoints at 2, 4 and 6."""
    flags = tiny_flags(tmp_path_factory.mktemp("run"), prepared)
    status, output = run(flags)
    assert status == 0, output
    return flags["output_dir"]


def assert_fails(capsys, *arguments: object) -> tuple[int, str]:
    """Return exit status and the one error."""
    status = main([*map(str, arguments)])
    (line,) = capsys.readouterr().err.splitlines()
    return status, line.partition("error: ")[2]


def test_newest_checkpoint_is_the_final_model(finished, tmp_path):
    """The end of a run writes the same directories, byte for byte."""
    assert main([str(finished), "--output", str(tmp_path / "out")]) == 0
    for name in ("generator", "discriminator"):
        final = {path.name: path.read_bytes() for path in (finished / name).iterdir()}
        assert "tokenizer.json" in final
        assert {path.name: path.read_bytes() for path in (tmp_path / "out" / name).iterdir()} == final


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
    assert f"| generator_loss | {line['generator_loss']:.5g} |" in card
    assert "| learning_rate | 0.001 |" in card
    assert (directory / "curves.svg").read_text().count("<polyline") == 4


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
    saved = load_file(get_checkpoint_path(finished, 6) / "model.safetensors")
    residual = "discriminator.deberta.embeddings.word_embeddings._weight"
    assert torch.equal(model.state_dict()[residual], saved[residual])


def test_both_formats_in_the_run_directory(finished, tmp_path):
    """By default they do not get in each other's way; both can be written again."""
    run_dir = copy_run(finished, tmp_path / "run")
    for _ in range(2):
        assert main([str(run_dir)]) == 0
        assert main([str(run_dir), "--published-format"]) == 0
    names = {path.name for path in (run_dir / "export" / "step-00000006").iterdir()}
    assert names == {"generator", "discriminator", "published"}


@pytest.mark.parametrize(
    ("flags", "file"), [([], "generator"), (["--published-format"], "pytorch_model.bin")]
)
def test_an_output_that_is_a_link_stays_one(finished, tmp_path, flags, file):
    """What it points to is replaced."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    for _ in range(2):
        assert main([str(finished), "--output", str(tmp_path / "out"), *flags]) == 0
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / file).exists()
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "out"}


def test_files_of_others_in_the_current_directory(finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").touch()
    monkeypatch.chdir(tmp_path)
    status, error = assert_fails(capsys, finished, "--published-format", "--output", ".")
    assert status == 1
    assert "other files are there (thesis.txt)" in error
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is not None, reason="onnxscript is installed")
def test_missing_onnx_leaves_nothing(finished, tmp_path, capsys):
    status, error = assert_fails(capsys, finished, "--onnx", "--output", tmp_path / "out")
    assert status == 1
    assert error.startswith("--onnx needs the package onnx")
    assert not (tmp_path / "out").exists()


def test_errors(finished, tmp_path, capsys):
    """One sentence each."""
    run_dir = copy_run(finished, tmp_path / "run")
    assert assert_fails(capsys, run_dir, "--step", "3") == (
        1,
        f"--step 3: {run_dir} has no such checkpoint; it has 2, 4, 6",
    )
    status, error = assert_fails(capsys, tmp_path)
    assert status == 1
    assert "no checkpoints; give the directory of a run" in error
    assert assert_fails(capsys, run_dir, "--stpe", "3")[0] == 2
    assert assert_fails(capsys, run_dir, "--onnx", "--published-format")[0] == 2
    (run_dir / "export").touch()
    status, error = assert_fails(capsys, run_dir)
    assert status == 1
    assert error.endswith("Not a directory; remove what is in the way, or give another --output")
    weights = get_checkpoint_path(run_dir, 6) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    status, error = assert_fails(capsys, run_dir, "--step", 6, "--output", tmp_path / "out")
    assert status == 1
    assert "model.safetensors has" in error
    assert (
        main([str(run_dir), "--output", str(tmp_path / "out")]) == 0
    )  # the newest valid one, which is named
    assert "were written; taking step 4" in capsys.readouterr().err


@pytest.mark.parametrize("is_there", [False, True], ids=["missing", "another-file"])
def test_vocabulary_of_the_run(finished, tmp_path, capsys, is_there):
    """The recorded path, or the copy of a final model; never another vocabulary."""
    recorded = tmp_path / "spm.model"
    if is_there:
        recorded.write_text("notes\n")
    run_dir = copy_run(finished, tmp_path / "run")
    path = get_checkpoint_path(run_dir, 6) / "config.json"
    settings = json.loads(path.read_text())
    settings["train"]["vocab_path"] = str(recorded)
    path.write_text(json.dumps(settings))
    write_manifest(path.parent, 6)
    assert main([str(run_dir), "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    for name in ("generator", "discriminator"):
        shutil.rmtree(run_dir / name)
    status, error = assert_fails(capsys, run_dir, "--output", tmp_path / "out")
    assert status == 1
    assert error.startswith(f"the vocabulary of {run_dir} is missing: {recorded}")


def test_classifier_of_the_readme(finished):
    """Its ten lines, on a run's final model: sentences with one of two words."""
    (block,) = [
        part.partition("```")[0]
        for part in (ROOT / "README.md").read_text().split("```python\n")
        if "AutoModelForSequenceClassification" in part.partition("```")[0]
    ]
    assert len([line for line in block.splitlines() if line]) == 10
    sentences = [
        (s, "has" in s.split())
        for s in read_sentences(20_000)
        if len({"has", "should"} & set(s.split())) == 1
    ]
    ones = [s for s, is_one in sentences if is_one and len(s) < 150][:160]
    zeros = [s for s, is_one in sentences if not is_one and len(s) < 150][:160]
    texts = [text for pair in zip(ones, zeros, strict=True) for text in pair]
    labels = torch.tensor([1, 0] * len(ones))
    batches = [(texts[i : i + 16], labels[i : i + 16]) for i in range(0, 288, 16)] * 3
    torch.manual_seed(0)
    names = {"batches": batches}
    folder = str(finished / "discriminator")
    exec(block.replace('"output/deberta-v3-tiny/discriminator"', repr(folder)), names)
    assert names["folder"] == folder
    inputs = names["tokenizer"](texts[288:], padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        predicted = names["model"].eval()(**inputs).logits.argmax(-1)
    accuracy = (predicted == labels[288:]).float().mean().item()
    assert accuracy > 0.8
