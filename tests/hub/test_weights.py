"""Weight files: damage of every kind is one sentence, and never other values."""

import pickle
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from DeBERTa.errors import ConfigError
from DeBERTa.hub.weights import check_finite, read_weights

STATE = {
    "deberta.embeddings.word_embeddings.weight": torch.arange(600.0).reshape(60, 10),
    "deberta.encoder.layer.0.output.dense.bias": torch.ones(10, dtype=torch.float16),
    "step": torch.tensor(3),
}


def write(path, form: str):
    if form == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=form == "zip")
    return path.read_bytes()


def damage(content: bytes, draw: random.Random) -> bytes:
    """Flip, overwrite, remove, insert or repeat bytes, or cut the file."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        start = draw.randrange(len(data))
        end = min(start + draw.choice((1, 1, 4, 30)), len(data))
        kind = draw.randrange(6)
        if kind == 0:
            data[start] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[start:end] = draw.randbytes(end - start)
        elif kind == 2:
            del data[start:end]
        elif kind == 3:
            data[start:start] = draw.randbytes(end - start)
        elif kind == 4:
            data[start:start] = data[start:end]
        else:
            del data[start:]
            data += b"\0"
    return bytes(data)


@pytest.mark.parametrize(
    ("form", "suffix"), [("zip", "bin"), ("legacy", "bin"), ("safetensors", "safetensors")]
)
def test_any_damage_is_one_sentence(tmp_path, form, suffix):
    path = tmp_path / f"weights.{suffix}"
    content, draw = write(path, form), random.Random(13)
    messages = []
    for _ in range(300):
        path.write_bytes(damage(content, draw))
        try:
            state = read_weights(path)
        except ConfigError as error:
            messages.append(str(error))
        else:
            if form == "zip":  # the one with checksums
                assert all(torch.equal(state[name], STATE[name]) for name in state if name in STATE)
    assert len(messages) > 100
    assert all(str(path) in message and "\n" not in message for message in messages)


@pytest.mark.parametrize("offset", [0, 40, 200, 600, 1200])
def test_a_flipped_bit_in_the_values_of_an_archive(tmp_path, offset):
    content = bytearray(write(tmp_path / "weights.bin", "zip"))
    values = STATE["deberta.embeddings.word_embeddings.weight"].numpy().tobytes()
    content[content.index(values) + offset] ^= 1
    (tmp_path / "weights.bin").write_bytes(content)
    with pytest.raises(ConfigError, match="checksum of 'weights/data/0'"):
        read_weights(tmp_path / "weights.bin")


def test_archives_of_others(tmp_path):
    path = tmp_path / "weights.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no weights")
    with pytest.raises(ConfigError, match=r"weights\.bin: it is a zip archive without weights"):
        read_weights(path)
    write(path, "zip")
    content = bytearray(path.read_bytes())
    for start in [match for match in range(len(content)) if content[match : match + 4] == b"PK\x01\x02"]:
        content[start + 8] |= 1  # the flag of encryption, in the directory of the archive
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="it is encrypted; give it unencrypted"):
        read_weights(path)


def test_entries_that_are_not_tensors_are_omitted(tmp_path):
    torch.save(STATE | {"config": {"hidden_size": 10}, "epoch": 3}, tmp_path / "weights.bin")
    assert read_weights(tmp_path / "weights.bin").keys() == STATE.keys()
    wrapped = {"model": STATE, "step": 3}
    for content in ({"config": {}}, [torch.zeros(1)], {3: torch.zeros(1)}, torch.zeros(1), wrapped):
        torch.save(content, tmp_path / "weights.bin")
        keys = "model, step" if content is wrapped else ""
        with pytest.raises(ConfigError, match=f"not a state dict of tensors.*{keys}; save that alone"):
            read_weights(tmp_path / "weights.bin")


def test_tensors_without_values(tmp_path):
    torch.save(STATE | {"bias": torch.zeros(3, device="meta")}, tmp_path / "weights.bin")
    with pytest.raises(ConfigError, match=r"weights\.bin: bias has no values; give"):
        read_weights(tmp_path / "weights.bin")


def test_pickled_code_is_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"weight": Trap()}, tmp_path / "zip.bin")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"weight": Trap()}))
    for name in ("zip.bin", "plain.bin"):
        with pytest.raises(ConfigError, match=name):
            read_weights(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "damaged"),
        (b"not weights", "damaged"),
        (b"PK\x03\x04 damaged", "damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
        (b"\n<!doctype html><html></html>", "a web page"),
    ],
)
@pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
def test_other_files(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}.*{named}"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_formats_by_content(tmp_path, form):
    write(tmp_path / "weights.bin", form)
    state = read_weights(tmp_path / "weights.bin")
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)


def test_a_missing_file_and_a_directory(tmp_path):
    for path in (tmp_path, tmp_path / "no.bin"):
        with pytest.raises(ConfigError, match="no weights file"):
            read_weights(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_counted(dtype, value):
    tensor = torch.full((3, 4), 6e4).to(dtype)
    check_finite(tensor, "bias", "x.bin")
    check_finite(torch.zeros(0), "bias", "x.bin")
    tensor[1, 2] = tensor[2, 0] = value
    with pytest.raises(ConfigError, match=r"x\.bin.* 2 of 12 values of bias are NaN or infinite"):
        check_finite(tensor, "bias", "x.bin")
