"""Files of the Hugging Face hub, fetched with `huggingface_hub`.

That package is the extra `hub`. It caches (`HF_HOME`), resumes interrupted downloads, and reads `HF_ENDPOINT`
and `HF_HUB_OFFLINE`. A model is named as `hf:OWNER/NAME`, or `hf:OWNER/NAME@REVISION` with a branch, tag or
commit.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from DeBERTa.errors import DownloadError
from DeBERTa.files import hash_file

HUB = "hf:"
# Commits of the published models: what is fetched today is fetched tomorrow.
REVISIONS = {
    "microsoft/deberta-v3-xsmall": "14809e4f1fe1895fcba8b258271a940c6ca45ec4",
    "microsoft/deberta-v3-small": "a36c739020e01763fe789b4b85e2df55d6180012",
    "microsoft/deberta-v3-base": "8ccc9b6f36199bec6961081d44eb72fb3f7353f3",
    "microsoft/deberta-v3-large": "64a8c8eab3e352a784c658aef62be1662607476f",
}


def fetch_from_hub(reference: str, names: Sequence[str], hint: str) -> Path:
    """Return the first of the files `names` of a model on the hub, fetched if needed.

    Raises `DownloadError`, which ends with `hint`, if it has none of them, if the hub or its cache cannot
    tell, or if the file is damaged.
    """
    repository, _, revision = reference.removeprefix(HUB).partition("@")
    revision = revision or REVISIONS.get(repository, "main")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise DownloadError(
            f"cannot fetch {names[0]} of {reference}: the package huggingface_hub is missing; "
            f"pip install huggingface_hub, or {hint}"
        ) from None
    failures, is_offline = [], False  # offline, the cache may still have the next one
    for name in names:
        file = f"{name} of {reference}"
        try:
            path = Path(
                huggingface_hub.hf_hub_download(
                    repository, name, revision=revision, local_files_only=is_offline
                )
            )
            stored = path.resolve()  # large files are stored under their SHA-256
            if not re.fullmatch(r"[0-9a-f]{64}", stored.name) or hash_file(stored) == stored.name:
                return path
            failures.append(f"{file} is damaged: the SHA-256 differs; remove {stored} to fetch it again")
        except errors.LocalEntryNotFoundError as error:  # not reached, and not in the cache
            failures.append(_describe(file, error.__cause__ or error, hint))
            is_offline = True  # the package tried for half a minute
        except errors.EntryNotFoundError:
            continue
        # Not OSError alone: the HTTP client, and so its errors, differ between versions of the package.
        except Exception as error:
            failures.append(_describe(file, error, hint))
    raise DownloadError(failures[0] if failures else f"{reference} has no {' and no '.join(names)}; {hint}")


def _describe(file: str, error: BaseException, hint: str) -> str:
    """Return the message for an error of the hub's package."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        reason, advice = "it is not in the cache", "unset HF_HUB_OFFLINE once"
    elif isinstance(error, errors.RevisionNotFoundError):
        reason, advice = "the model has no such revision", "check what follows the @"
    elif isinstance(error, errors.GatedRepoError | errors.RepositoryNotFoundError):
        reason, advice = "no such model, or not for you", "check the name, and HF_TOKEN if it is private"
    elif isinstance(error, errors.HFValidationError):
        reason, advice = "not the name of a model", "name it as hf:OWNER/NAME or hf:OWNER/NAME@REVISION"
    else:
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        advice = f"check the connection to {constants.ENDPOINT} (HF_ENDPOINT)"
    return f"cannot fetch {file}: {reason.rstrip('.')}; {advice}, or {hint}"
