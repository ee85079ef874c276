"""`python -m DeBERTa.train` (in forked processes): what a run leaves behind, resuming, errors in one line."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from DeBERTa import MaskedLanguageModel, ModelConfig, ReplacedTokenDetectionModel
from DeBERTa.data.dataset import BatchPlan, TrainingBatches
from DeBERTa.data.masking import Masker
from DeBERTa.data.token_store import open_store
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.flags import parse_flags
from DeBERTa.train import count_steps, get_full_model
from DeBERTa.training.checkpoint import write_manifest
from tests.conftest import ROOT, read_equal_metrics, strip_times, tiny_model, tiny_rtd
from tests.runs import ForkedRun, build_arguments, read_final_files, run, tiny_flags
from tests.training.batches import train_config


def train(values: dict, *more, **environment) -> tuple[int, str]:
    """Run with the flags of `values` and `more`; return exit status and output."""
    with tempfile.TemporaryDirectory() as folder:
        return ForkedRun(values, *map(str, more), log=Path(folder) / "log", **environment).finish()


def assert_trained(values: dict, *more, **environment) -> str:
    """Run as `train` does, to a good end; return the output."""
    status, output = train(values, *more, **environment)
    assert status == 0, output
    return output


@pytest.fixture
def flags(prepared, tmp_path):
    """Return flags of a quick run as a dict; `command` makes them a list."""
    (tmp_path / "rtd.json").write_text(json.dumps(tiny_rtd()))
    (tmp_path / "mlm.json").write_text(json.dumps(tiny_model()))
    return {
        "task_name": "RTD",
        "model_config": tmp_path / "rtd.json",
        "data_dir": prepared,
        "vocab_path": prepared / "spm.model",
        "output_dir": tmp_path / "run",
        "do_train": True,
        "max_seq_length": 64,
        "num_training_steps": 6,
        "dump_interval": 3,
        "log_interval": 2,
        "warmup": 2,
        "train_batch_size": 8,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "workers": 0,
    }


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_refused(result: tuple[int, str], *named: str) -> None:
    """One sentence, exit status 1, or 2 for flags, no traceback."""
    status, output = result
    assert status in (1, 2), output
    message = output.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert "Traceback" not in output
    for name in named:
        assert str(name) in message, message


def test_a_directory_of_parts_trains_as_one_text(tmp_path, prepared):
    """It gives the bytes of the run on one file."""
    lines = (prepared / "train.txt").read_text().splitlines(keepends=True)
    parts = tmp_path / "data" / "train.txt"
    parts.mkdir(parents=True)
    for number, part in enumerate((lines[:250], lines[250:])):
        (parts / f"{number:05}-of-00002.txt").write_text("".join(part))
    shutil.copy(prepared / "valid.txt", tmp_path / "data")
    flags = tiny_flags(tmp_path, prepared, "MLM") | {"num_training_steps": 2}
    for name, data in (("one", prepared), ("two", tmp_path / "data")):
        status, output = run(flags | {"data_dir": data, "output_dir": tmp_path / name})
        assert status == 0, output
    assert read_final_files(tmp_path / "two") == read_final_files(tmp_path / "one")


def test_rtd_run_leaves_models_metrics_and_settings(flags):
    output = assert_trained(flags, "--do_eval")
    assert "peak learning rate is not reached" not in output
    for word in (
        "replaced token detection, GDES",
        "precision fp32",
        "8 sequences of 64",
        "512 tokens per step",
        "to go",
    ):
        assert word in output
    run = flags["output_dir"]
    lines = read_metrics(run)
    assert [(line["step"], line["kind"]) for line in lines] == [
        (1, "train"), (2, "train"), (3, "train"), (3, "valid"), (4, "train"), (6, "train"), (6, "valid")
    ]  # fmt: skip
    for line in lines:
        assert line["generator_loss"] > 0
        assert line["discriminator_loss"] > 0
        assert "discriminator_accuracy" in line
    assert {"discriminator_auc", "discriminator_precision", "discriminator_recall"} <= lines[-1].keys()
    settings = json.loads((run / "config.json").read_text())["train"]
    assert (settings["num_training_steps"], settings["warmup"], settings["precision"]) == (6, 2, "fp32")
    environment = json.loads((run / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert f"precision fp32, {environment['kernels']}\n" in output  # of the banner
    assert "kernels" in environment["kernels"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "best.json", "step-00000003", "step-00000006"
    ]  # fmt: skip
    assert json.loads((run / "evaluation.json").read_text()).keys() == {"valid", "test"}

    generator = MaskedLanguageModel(ModelConfig.from_json(run / "generator" / "config.json"))
    generator.load_state_dict(load_file(run / "generator" / "model.safetensors"), strict=True)
    discriminator = ReplacedTokenDetectionModel(ModelConfig.from_json(run / "discriminator" / "config.json"))
    discriminator.load_state_dict(load_file(run / "discriminator" / "model.safetensors"), strict=True)
    saved = load_file(run / "checkpoints" / "step-00000006" / "model.safetensors")
    residual = saved["discriminator.deberta.embeddings.word_embeddings._weight"]
    assert torch.count_nonzero(residual)
    torch.testing.assert_close(
        discriminator.deberta.embeddings.word_embeddings.weight,
        saved["generator.deberta.embeddings.word_embeddings.weight"] + residual,
    )


def test_mlm_run_and_evaluation_of_its_checkpoint(flags):
    flags |= {"task_name": "MLM", "model_config": flags["model_config"].with_name("mlm.json"), "max_ngram": 3}
    assert_trained(flags, "--do_eval", "--accumulative_update", 2)
    run = flags["output_dir"]
    trained = json.loads((run / "evaluation.json").read_text())
    del flags["do_train"]
    (run / "evaluation.json").unlink()
    assert_trained(flags, "--do_eval")
    assert json.loads((run / "evaluation.json").read_text()) == trained
    assert read_metrics(run)[-1]["loss"] == trained["valid"]["loss"]


def test_spans_of_several_words(flags, tmp_path):
    """`--max_ngram` changes what is masked."""
    losses = set()
    for max_ngram in (1, 3):
        given = {"task_name": "MLM", "model_config": tmp_path / "mlm.json", "num_training_steps": 1}
        given |= {"output_dir": tmp_path / str(max_ngram), "max_ngram": max_ngram}
        assert_trained(flags | given)
        losses.add(read_metrics(given["output_dir"])[0]["loss"])
    assert len(losses) == 2


@pytest.mark.parametrize("task", ["MLM", "RTD"])
def test_same_command_resumes_from_the_last_checkpoint(flags, task, tmp_path):
    """A run that lost everything after step 3 ends with the weights of one that did not, bit for bit."""
    flags |= {"task_name": task, "model_config": tmp_path / f"{task.lower()}.json"}
    assert_trained(flags)
    full = flags["output_dir"]
    cut = tmp_path / "cut"
    shutil.copytree(full, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    output = assert_trained(flags | {"output_dir": cut})
    assert "resuming from step 3" in output
    name = Path("checkpoints") / "step-00000006" / "model.safetensors"
    assert (cut / name).read_bytes() == (full / name).read_bytes()
    assert read_equal_metrics(cut) == read_equal_metrics(full)


def test_an_evaluation_cut_off_is_made_up_for(flags):
    """Stopped after the last checkpoint but before its evaluation: the same command only evaluates."""
    assert_trained(flags)
    metrics = flags["output_dir"] / "metrics.jsonl"
    complete = read_equal_metrics(metrics.parent)
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    assert_trained(flags)
    assert read_equal_metrics(metrics.parent) == complete
    text = metrics.read_text()
    assert_trained(flags)
    assert metrics.read_text() == text


def test_logged_losses_are_of_the_interval_and_unscaled(flags, tmp_path):
    """A line is the mean of the steps since the line before, weighted by targets; lambda is not in it."""
    every, third = flags | {"log_interval": 1}, flags | {"log_interval": 5, "output_dir": tmp_path / "third"}
    for values in (every, third):
        assert_trained(values | {"dump_interval": 6})
    steps = {line["step"]: line for line in read_metrics(every["output_dir"]) if line["kind"] == "train"}
    interval = next(line for line in read_metrics(third["output_dir"]) if line["step"] == 5)
    for name in ("generator_loss", "discriminator_loss"):
        mean = sum(steps[step][name] for step in (2, 3, 4, 5)) / 4
        assert interval[name] == pytest.approx(
            mean, rel=2e-3
        )  # the number of masks differs a little from step to step
    assert steps[1]["discriminator_loss"] == pytest.approx(
        0.693, abs=0.05
    )  # ln 2 at the start, not lambda times it


def test_another_run_in_the_same_directory_is_refused(flags):
    assert_trained(flags)
    before = (flags["output_dir"] / "config.json").read_bytes()
    assert_refused(train(flags | {"learning_rate": 2e-3, "seed": 1}), "learning_rate", "seed", "--tag")
    assert (flags["output_dir"] / "config.json").read_bytes() == before
    assert_trained(flags | {"workers": 1, "log_interval": 1})


def test_a_run_is_repeated_from_its_settings(flags, tmp_path):
    """`--config` needs no other flag, not even the model config it was started with; flags override it."""
    assert_trained(flags | {"fp16": "False", "precision": "auto"})
    run = flags["output_dir"]
    flags["model_config"].unlink()
    again = ["--config", run / "config.json", "--output_dir", tmp_path / "again"]
    assert_trained({}, *again)
    weights = Path("discriminator") / "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (run / weights).read_bytes()
    assert read_equal_metrics(tmp_path / "again") == read_equal_metrics(run)
    assert_trained({}, "--config", tmp_path / "again" / "config.json")  # the finished run, as it was
    values = parse_flags(["--config", str(run / "config.json"), "--tag", "another"])
    assert values.run_dir == Path("output/another")
    assert_refused(train({}, *again, "--learning_rate", 1e-4), "learning_rate (0.001 there, 0.0001 here)")
    assert_refused(train({}, "--config", run / "generator" / "config.json"), "not the config.json of a run")
    settings = json.loads((run / "config.json").read_text())
    settings["train"]["fsdp"] = True
    (tmp_path / "old.json").write_text(json.dumps(settings))
    assert_refused(train({}, "--config", tmp_path / "old.json"), "old.json", "unknown key 'fsdp'")


def test_runs_with_and_without_kernels_are_not_mixed(flags):
    """They draw different dropout masks. Without kernels, attention is eager, and recorded as such."""
    assert_trained(flags | {"kernels": "off"}, "--num_training_steps", 3)
    settings = json.loads((flags["output_dir"] / "config.json").read_text())["train"]
    assert (settings["kernels"], settings["attention"]) == ("off", "eager")
    result = train(flags | {"attention": "eager"}, "--num_training_steps", 3)
    assert_refused(result, "kernels (off there, auto here)")


def test_fp16_says_what_it_trains_in(flags):
    """On this device that is bfloat16 or float32, unless it is an older GPU."""
    del flags["precision"]
    output = assert_trained(flags, "--fp16", "True", "--num_training_steps", 1)
    precision = json.loads((flags["output_dir"] / "config.json").read_text())["train"]["precision"]
    name = {"bf16": "bfloat16", "fp32": "float32"}.get(precision)
    assert (f"--fp16 True trains in {name}" in output) == (name is not None)


def test_the_advice_for_a_missing_validation_split_works(flags, tmp_path):
    """The command of the message, run as it stands, with a text."""
    flags["data_dir"] = shutil.copytree(flags["data_dir"], tmp_path / "data")
    for name in ("valid", "test"):
        for path in flags["data_dir"].glob(f"{name}.txt*"):
            path.unlink()
    result = train(flags, "--do_eval")
    assert_refused(result, "neither valid.txt nor test.txt", "prepare_data.py")
    advice = result[1].strip().rpartition(": python ")[2].replace(" TEXT ", f" {tmp_path / 'text'} ")
    (tmp_path / "text").write_text("We the people of the United States. " * 40)
    subprocess.run([sys.executable, *advice.split()], cwd=ROOT, check=True)
    assert_trained(flags, "--do_eval", "--num_training_steps", 1)


def test_a_warm_up_longer_than_the_run(flags):
    output = assert_trained(flags | {"num_training_steps": 1})
    assert "not reached: the warm-up is 2 steps, the run 1; lower --warmup" in output


def test_unknown_config_key(flags):
    flags["model_config"].write_text(json.dumps(tiny_rtd() | {"generator": tiny_model() | {"hiden_size": 3}}))
    assert_refused(train(flags), "'hiden_size'", flags["model_config"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data_dir": "no/such/folder"}, ("no/such/folder", "prepare_data.py")),
        ({"vocab_path": "no.model"}, ("no.model",)),
        ({"max_seq_length": 32}, ("train.txt", "62", "--max_seq_length 32")),
        ({"max_seq_length": 65}, ("--max_seq_length 65", "max_position_embeddings 64")),
        ({"init_generator": "no.bin", "init_discriminator": "no.bin"}, ("no.bin",)),
        ({"init_generator": "no.bin"}, ("--init_discriminator",)),
        ({"task_name": "MLM"}, ("rtd.json", "give --task_name RTD")),
        ({"output_dir": "/proc/no-run"}, ("/proc/no-run", "--output_dir")),
        ({"learning_rate": "nan"}, ("--learning_rate must be above 0.0 and at most 1e+30",)),
        ({"adam_beta1": 1.5}, ("--adam_beta1",)),
        ({"rtd_lambda": -1}, ("--rtd_lambda",)),
        ({"num_training_steps": 10**20}, ("--num_training_steps must be", "at most 2147483647")),
        (
            {"num_training_steps": 0, "num_train_epochs": 1e9},
            ("--num_train_epochs is too large: --num_training_steps must be", "at most 2147483647"),
        ),
    ],
)
def test_refusals(flags, change, named):
    assert_refused(train(flags | change), *named)


def test_empty_data_folder(flags, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(
        train(flags | {"data_dir": tmp_path / "empty"}),
        tmp_path / "empty",
        "prepare_data.py",
    )
    (tmp_path / "empty" / "train.txt").touch()
    assert_refused(train(flags | {"data_dir": tmp_path / "empty"}), "train.txt")


def test_checkpoint_with_other_shapes(flags, tmp_path):
    config = ModelConfig.from_dict(tiny_model() | {"intermediate_size": 48, "num_hidden_layers": 1})
    torch.save(MaskedLanguageModel(config).state_dict(), tmp_path / "generator.bin")
    torch.save(ReplacedTokenDetectionModel(config).state_dict(), tmp_path / "discriminator.bin")
    weights = {
        "init_generator": tmp_path / "generator.bin",
        "init_discriminator": tmp_path / "discriminator.bin",
    }
    result = train(flags | weights)
    assert_refused(result, tmp_path / "generator.bin", "intermediate.dense.weight", "[48, 32]", "[64, 32]")


def test_not_a_number_stops_the_run_and_keeps_the_checkpoints(flags):
    """Weights that blow up between two lines of the log never replace a good checkpoint."""
    flags |= {
        "learning_rate": 1e30,
        "num_training_steps": 40,
        "warmup": 0,
        "log_interval": 100,
        "dump_interval": 4,
    }
    result = train(flags)
    assert_refused(result, "step", "diverged", "--learning_rate", "--tag")
    assert not list((flags["output_dir"]).glob("checkpoints/*"))
    # A run with one good checkpoint, from which it diverges.
    flags |= {
        "learning_rate": 1e-3,
        "output_dir": flags["output_dir"].with_name("second"),
        "num_training_steps": 8,
    }
    assert_trained(flags)
    shutil.rmtree(flags["output_dir"] / "checkpoints" / "step-00000008")
    good = flags["output_dir"] / "checkpoints" / "step-00000004" / "optimizer.pt"
    state = torch.load(good, weights_only=True)
    for moments in state["training"]["optimizers"]["generator"]["state"].values():
        moments["exp_avg"].fill_(float("nan"))
    torch.save(state, good)
    write_manifest(good.parent, 4)
    before = {path: path.read_bytes() for path in good.parent.iterdir()}
    assert_refused(train(flags), "step 8", "diverged")
    assert [path.name for path in (flags["output_dir"] / "checkpoints").glob("step-*")] == ["step-00000004"]
    assert {path: path.read_bytes() for path in good.parent.iterdir()} == before


def test_evaluation_of_a_checkpoint_of_another_model(flags):
    assert_trained(flags)
    values = tiny_rtd()
    values["discriminator"]["intermediate_size"] = 48
    flags["model_config"].write_text(json.dumps(values))
    del flags["do_train"]
    assert_refused(train(flags, "--do_eval"), "step-00000006", "[64, 32]", "[48, 32]")


def test_published_spellings_still_work(flags):
    """`--max_seq_len`, `--dump`, `--fp16 True` and a bare `--do_train`, as published scripts write them."""
    for name in ("max_seq_length", "dump_interval", "do_train", "precision"):
        del flags[name]
    published = ["--do_train", "--max_seq_len", 64, "--dump", 3, "--fp16", "False", "--vocab_type", "spm"]
    output = assert_trained(flags, *published)
    assert "precision fp32" in output


def test_layers_computed_again_train_the_same_model(flags, tmp_path):
    """Bit for bit, with dropout."""
    values = flags | {"num_training_steps": 2}
    states = []
    for again in (False, True):
        run = tmp_path / f"again-{again}"
        assert_trained(values | {"gradient_checkpointing": again, "output_dir": run}, CUDA_VISIBLE_DEVICES="")
        states.append(load_file(run / "discriminator" / "model.safetensors"))
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_compile_without_a_compiler(flags, tmp_path):
    result = train(flags, "--compile", CXX=str(tmp_path / "no-compiler"), CUDA_VISIBLE_DEVICES="")
    assert_refused(result, "--compile", "C++ compiler", tmp_path / "no-compiler", "CXX")
    assert not flags["output_dir"].exists()


def test_token_ids_that_change_end_the_run_in_one_sentence(flags, prepared, tmp_path):
    """Found by a data worker, and built again by the same command."""
    data = shutil.copytree(prepared, tmp_path / "data")
    flags |= {"data_dir": data, "vocab_path": data / "spm.model", "workers": 1, "task_name": "MLM"}
    flags["model_config"] = tmp_path / "mlm.json"
    open_store(data / "train.txt", Tokenizer(data / "spm.model"), 62)
    store = data / "train.txt.ids"
    content = bytearray(store.read_bytes())
    content[4 * 100 : 4 * 104] = content[4 * 17_000 : 4 * 17_004] = bytes(16)
    store.write_bytes(content)
    code = (
        "import sys; from DeBERTa import train; from DeBERTa.data import token_store;"
        "token_store.VERIFIED_AT_OPEN = 0; train.run_command()"
    )
    command_line = [sys.executable, "-c", code, *map(str, build_arguments(flags))]
    result = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert_refused(
        (result.returncode, strip_times(result.stderr)),
        f"error: {store} is damaged: its token ids were changed; the same command",
    )
    assert not store.exists()
    result = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("task", ["MLM", "RTD"])
def test_evaluation_by_another_config_or_vocabulary(flags, task, tmp_path):
    """What no shape of a weight shows is compared with the checkpoint, as for --init_*."""
    config = tmp_path / f"{task.lower()}.json"
    flags |= {"task_name": task, "model_config": config}
    assert_trained(flags)
    evaluate = flags | {"do_train": False, "do_eval": True}
    values = json.loads(config.read_text())
    changed = values if task == "MLM" else values["discriminator"]
    changed |= {"hidden_act": "relu", "layer_norm_eps": 0.5, "num_attention_heads": 4}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(values))
    refused = train(evaluate | {"model_config": other})
    assert_refused(
        refused, "hidden_act (gelu there, relu here)", "layer_norm_eps", "num_attention_heads (2 there"
    )
    data = shutil.copytree(flags["data_dir"], tmp_path / "data")
    vocabulary = data / "spm.model"
    vocabulary.write_bytes(vocabulary.read_bytes() + bytes([0x12, 0x00]))  # an empty message of settings
    for store in data.glob("*.ids"):
        store.unlink()
    refused = train(evaluate | {"vocab_path": vocabulary, "data_dir": data})
    assert_refused(refused, "was trained with another vocabulary than", vocabulary)
    assert_trained(evaluate)


@pytest.mark.parametrize("sharding", ["none", "zero2", "fsdp"])
def test_a_model_of_one_process_is_full(sharding):
    """It is not built a second time."""
    model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model()))
    assert get_full_model(train_config(sharding=sharding), model) is model


@pytest.mark.parametrize(
    ("lines", "batch_size", "epochs", "steps"),
    [(100, 10, 1.1, 11), (100, 5, 2.2, 44), (100, 10, 1.11, 12), (101, 10, 1.0, 11), (100, 10, 3.0, 30)],
)
def test_steps_of_decimal_epochs(tmp_path, tokenizer, lines, batch_size, epochs, steps):
    (tmp_path / "train.txt").write_text("▁the ▁of\n" * lines, encoding="utf-8")
    store = open_store(tmp_path / "train.txt", tokenizer, max_tokens=62)
    batches = TrainingBatches(store, tokenizer, Masker(tokenizer, 1, True), BatchPlan(1, batch_size, 64))
    required = {"model_config": "m.json", "data_dir": "data", "vocab_path": "spm.model", "output_dir": "run"}
    config = train_config(
        num_training_steps=0, num_train_epochs=epochs, train_batch_size=batch_size, **required
    )
    assert count_steps(config, batches) == steps
