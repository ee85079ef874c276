"""Model directories: content, atomic replacement, what cannot be exported; published files."""

import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from DeBERTa import MaskedLanguageModel, ModelConfig, ReplacedTokenDetectionModel, RTDConfig, RTDModel
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.errors import ConfigError, VocabularyError
from DeBERTa.hub.export import list_models, replace_directory, write_model, write_published
from DeBERTa.hub.published import load_masked_lm
from DeBERTa.hub.tokenizer_json import build_tokenizer_json
from tests.conftest import tiny_model, tiny_rtd
from tests.hub.exported import VOCABULARY
from tests.kill_at_call.sitecustomize import kill_at_call
from tests.runs import CONTEXT

FILES = {
    "README.md", "config.json", "model.safetensors", "modeling_replaced_tokens.py", "spm.model",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def build_rtd(sharing: str = "gdes") -> RTDModel:
    """Return an RTD model with tables and residuals away from their initial values."""
    torch.manual_seed(3)
    model = RTDModel(RTDConfig.from_dict(tiny_rtd(sharing)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def write_discriminator(directory: Path, seed: int = 1) -> None:
    model = build_rtd()
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.discriminator.mask_predictions.dense.weight)
    write_model(list_models(model)[1], directory, Tokenizer(VOCABULARY), None)


def read_all(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("sharing", ["gdes", "es", "nes"])
def test_this_package_reads_a_directory(tmp_path, sharing):
    """Weights have the published names and full tables; the config is that of the model, resolved."""
    model, tokenizer = build_rtd(sharing), Tokenizer(VOCABULARY)
    generator, discriminator = list_models(model)
    for exported in (generator, discriminator):
        write_model(exported, tmp_path / exported.name, tokenizer, None)
    config = ModelConfig.from_json(tmp_path / "generator" / "config.json")
    assert (config.head_size, config.embedding_size, config.max_relative_positions) == (16, 32, 64)
    masked_lm = MaskedLanguageModel(config)
    masked_lm.load_state_dict(load_file(tmp_path / "generator" / "model.safetensors"), strict=True)
    detector = ReplacedTokenDetectionModel(ModelConfig.from_json(tmp_path / "discriminator" / "config.json"))
    weights = load_file(tmp_path / "discriminator" / "model.safetensors")
    detector.load_state_dict(weights, strict=True)
    for name, tensor in model.merge_discriminator().items():
        assert torch.equal(weights[name], tensor), name
    assert set(read_all(tmp_path / "discriminator")) == FILES
    assert (tmp_path / "generator" / "spm.model").read_bytes() == VOCABULARY.read_bytes()


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_discriminator(tmp_path / "model")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o640}


def _write_and_die(directory: str, number: int, log: str) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
    kill_at_call(number)
    write_discriminator(Path(directory), seed=2)


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "replaced"])
def test_killed_at_every_call_that_changes_a_file(tmp_path, is_there):
    """The directory is missing, the one before or the new one, never something else; then it is written."""
    write_discriminator(tmp_path / "before", seed=1)
    write_discriminator(tmp_path / "expected", seed=2)
    before, expected = read_all(tmp_path / "before"), read_all(tmp_path / "expected")
    assert before != expected
    directory, log, places = tmp_path / "out" / "model", tmp_path / "log", []
    for number in itertools.count(1):
        shutil.rmtree(directory.parent, ignore_errors=True)
        directory.parent.mkdir()
        if is_there:
            shutil.copytree(tmp_path / "before", directory)
        process = CONTEXT.Process(target=_write_and_die, args=(str(directory), number, str(log)))
        process.start()
        process.join()
        if directory.exists():
            assert read_all(directory) in (before, expected), log.read_text()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        places.append(log.read_text().splitlines()[-1].split()[2])
        write_discriminator(directory, seed=2)
        assert read_all(directory) == expected, places[-1]
        assert [path.name for path in directory.parent.iterdir()] == ["model"], places[-1]
    assert read_all(directory) == expected
    assert set(places) >= {"write", "fsync", "rename"} | ({"unlink", "rmdir"} if is_there else set())
    assert len(places) >= 15


def test_files_of_others_are_not_removed(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").touch()
    with pytest.raises(OSError, match=r"thesis\.txt"):
        write_discriminator(tmp_path / "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "thesis.txt"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write_discriminator(tmp_path / "file")


def test_siblings_of_others_are_not_removed(tmp_path):
    names = [f"model.{suffix}" for suffix in ("old", "tmp", "part", "bak")]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").touch()
    for _ in range(2):
        write_discriminator(tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"model", *names}
    assert all((tmp_path / name / "thesis.txt").exists() for name in names)


def test_previous_model_after_a_kill_between_the_renames(tmp_path):
    """It is restored, also where the next export fails."""
    write_discriminator(tmp_path / "model")
    before = read_all(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / ".model.old-export")
    with pytest.raises(ZeroDivisionError), replace_directory(tmp_path / "model"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert read_all(tmp_path / "model") == before


def test_a_parent_directory_that_was_moved_is_not_created_again(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_discriminator(tmp_path / "run" / "model")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"attention_head_size": 64}, "attention_head_size 64 makes 2 heads 128 wide"),
        (
            {"max_relative_positions": 20},
            "position_buckets with max_relative_positions 20 below",
        ),
    ],
)
def test_models_that_transformers_lacks(tmp_path, changed, problem):
    (exported,) = list_models(MaskedLanguageModel(ModelConfig.from_dict(tiny_model() | changed)))
    with pytest.raises(ConfigError, match=f"cannot export .*{problem}"):
        write_model(exported, tmp_path / "model", Tokenizer(VOCABULARY), None)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("options", [{"split_by_whitespace": False}, {"treat_whitespace_as_suffix": True}])
def test_pieces_with_spaces_that_transformers_splits(tmp_path, options):
    """Its pre-tokenizer begins a word at each space."""
    words = ["the", "people", "of", "the", "United", "States", "and", "the", "Senate"]
    sentences = [" ".join(random.Random(seed).choices(words, k=20)) for seed in range(200)]
    model, special = io.BytesIO(), {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    pieces = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=60, hard_vocab_limit=False,
        unk_piece="[UNK]", minloglevel=2, **special, **pieces, **options,
    )  # fmt: skip
    (tmp_path / "spm.model").write_bytes(model.getvalue())
    with pytest.raises(VocabularyError, match=r"piece \d+ has a space after other characters"):
        build_tokenizer_json(Tokenizer(tmp_path / "spm.model"))


@pytest.mark.parametrize("sharing", ["gdes", "es", "nes"])
def test_published_format(tmp_path, sharing):
    """The names of the published code: the sum `weight` and the residual `_weight`."""
    model = build_rtd(sharing)
    write_published(model, tmp_path / "out", VOCABULARY)
    generator = torch.load(tmp_path / "out" / "pytorch_model.generator.bin", weights_only=True)
    discriminator = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert generator.keys() == model.generator.state_dict().keys()
    expected = model.merge_discriminator() | model.discriminator.state_dict()
    assert discriminator.keys() == expected.keys()
    word = "deberta.embeddings.word_embeddings"
    assert f"{word}.weight" in discriminator
    assert (f"{word}._weight" in discriminator) == (sharing == "gdes")
    for name, tensor in expected.items():
        assert torch.equal(discriminator[name], tensor), name
    config = RTDConfig.from_json(tmp_path / "out" / "model_config.json")
    assert config == model.config
    assert json.loads((tmp_path / "out" / "model_config.json").read_text())["embedding_sharing"] == sharing


def test_published_format_of_a_masked_language_model(tmp_path):
    """Bit for bit, out and in again."""
    model, out = MaskedLanguageModel(ModelConfig.from_dict(tiny_model())), tmp_path / "out"
    write_published(model, out, VOCABULARY)
    assert {path.name for path in out.iterdir()} == {"pytorch_model.bin", "model_config.json", "spm.model"}
    assert (out / "spm.model").read_bytes() == VOCABULARY.read_bytes()
    written = torch.load(out / "pytorch_model.bin", weights_only=True)
    again = MaskedLanguageModel(ModelConfig.from_json(out / "model_config.json"))
    load_masked_lm(again, out / "pytorch_model.bin")
    assert written.keys() == again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(written[name], tensor), name
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_full_disk_names_the_file_that_is_written(tmp_path):
    vocabulary = tmp_path / "spm.model"
    vocabulary.write_bytes(bytes(6_000_000))
    model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model()))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write_published(model, tmp_path / "out", vocabulary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename == str(tmp_path / ".out.tmp-export" / "spm.model")


def test_vocabularies_that_the_format_cannot_express(tmp_path):
    """Appended to a SentencePiece model, fields override it: here, BPE in place of unigram."""
    path = tmp_path / "spm.model"
    for appended, reason in ((b"\x12\x02\x18\x02", "bpe"), (b"\x1a\x02\x18\x00", "spaces")):
        path.write_bytes(VOCABULARY.read_bytes() + appended)
        (exported,) = list_models(MaskedLanguageModel(ModelConfig.from_dict(tiny_model())))
        with pytest.raises(VocabularyError, match=reason):
            write_model(exported, tmp_path / "model", Tokenizer(path), None)
