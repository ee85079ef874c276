"""Reading and writing of weight files: `.bin` and `.safetensors`.

A `.bin` file is a pickle, usually in a zip archive. Code in a file is not executed. Tensors are mapped from
the file, so that memory is used as they are read.
"""

import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from DeBERTa.errors import ConfigError
from DeBERTa.files import name_file

StateDict = dict[str, torch.Tensor]


def read_weights(path: str | Path) -> StateDict:
    """Read the tensors of a `.bin` or `.safetensors` file.

    Other entries of the state dict, such as `config`, are omitted. Raises `ConfigError` if the file is
    missing, damaged, or not of this format.
    """
    path = Path(path)
    if not path.is_file():
        reason = "it is not a regular file" if path.exists() else "it does not exist"
        raise ConfigError(f"no weights file {path}: {reason}; check the path")
    try:
        state = load_file(path) if _is_safetensors(path) else _load_pickle(path)
    except ConfigError:
        raise
    # Every byte of a damaged file may be wrong: decoding it raises whatever the pickle of that moment does.
    except Exception:
        raise ConfigError(
            f"cannot read the weights in {path}: it is {_guess_content(path)}; fetch it again"
        ) from None
    tensors = {}
    if isinstance(state, dict) and all(isinstance(name, str) for name in state):
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        keys = f", but has {', '.join(map(str, list(state)[:3]))}" if isinstance(state, dict) else ""
        raise ConfigError(
            f"cannot read the weights in {path}: it is not a state dict of tensors{keys}; save that alone"
        )
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ConfigError(f"cannot read the weights in {path}: {empty[0]} has no values; give all")
    return tensors


def _is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors do.

    That is a length in 8 bytes, and a JSON object.
    """
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _load_pickle(path: Path) -> object:
    """Load a `.bin` file of either format.

    Raises `ConfigError` for an archive that is not intact.
    """
    is_archive = zipfile.is_zipfile(path)
    if is_archive:
        _check_archive(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about details of the pickle
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)


def _check_archive(path: Path) -> None:
    """Raise `ConfigError` unless the checksums of all entries match.

    torch.load does not compare them.
    """
    problem = None
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.flag_bits & 1 for entry in archive.infolist()):
                problem = "encrypted; give it unencrypted"
            elif not any(name.endswith("data.pkl") for name in archive.namelist()):
                problem = "a zip archive without weights; give the file that torch.save wrote"
            elif name := archive.testzip():
                problem = f"damaged (checksum of {name!r}); fetch it again"
    except Exception:  # see read_weights
        problem = "a damaged zip archive; fetch it again"
    if problem:
        raise ConfigError(f"cannot read the weights in {path}: it is {problem}")


def _guess_content(path: Path) -> str:
    """Return a description of a file that does not hold weights."""
    with path.open("rb") as file:
        beginning = file.read(64).lstrip()
    if beginning.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    return "a web page" if beginning.startswith(b"<") else "damaged or of another format"


def check_finite(tensor: torch.Tensor, name: str, path: str | Path) -> None:
    """Raise `ConfigError` if a tensor read from `path` is not finite in float32."""
    # Only the norm is converted: a copy of a word table would need as much memory as the table.
    if tensor.numel() and not torch.linalg.vector_norm(tensor, ord=torch.inf).float().isfinite():
        count = tensor.numel() - int(torch.isfinite(tensor.float()).sum())
        raise ConfigError(
            f"{path} cannot be used: {count} of {tensor.numel()} values of {name} are NaN or "
            "infinite; give weights from before training diverged"
        )


def write_tensors(tensors: StateDict, path: Path) -> None:
    """Write a safetensors file that transformers accepts.

    Its mode follows the umask, as that of any new file. Raises `OSError` with the name of the file.
    """
    with name_file(path):
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)  # save_file replaces the file by one that only its owner can read
