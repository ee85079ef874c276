"""Check what this machine has for training: `python -m DeBERTa.doctor`.

A line per check: "ok" and what there is, or "look" with what to do.
"""

import contextlib
import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit

from DeBERTa.config import TrainConfig
from DeBERTa.data.corpus import WIKITEXT_103
from DeBERTa.data.files import get_cache_dir, open_partial
from DeBERTa.errors import StorageError

PACKAGES = ("torch", "numpy", "sentencepiece", "safetensors", "tqdm")
CONNECT_SECONDS = 5
LITTLE_DISK, LITTLE_SHARED = 10.0, 0.5  # GB; a checkpoint of a base model takes 4 GB
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
Check = tuple[str, str, str]  # name, what there is, what to do if it is not ok


def main() -> int:
    """Print a line per check, and return 1 unless all are ok."""
    failures = 0
    for name, text, advice in chain(check_packages(), check_machine(), check_network()):
        failures += bool(advice)
        sys.stdout.write(f"{'look' if advice else 'ok'}\t{name}: {text}{'; ' if advice else ''}{advice}\n")
    return int(failures > 0)


def check_packages() -> Iterator[Check]:
    """Check versions, and with them device, precision and kernels."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    found = [f"{name} {version(name)}" for name in PACKAGES if name not in missing]
    advice = f"install {', '.join(missing)}: pip install -r requirements.txt" if missing else ""
    yield "versions", ", ".join([f"Python {platform.python_version()}", *found]), advice
    if missing:
        return
    import torch

    from DeBERTa.training.banner import get_device_name
    from DeBERTa.training.precision import resolve_precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_unused = device.type == "cpu" and NVIDIA_DRIVER.exists()
    advice = "PyTorch cannot use the NVIDIA driver that is here: install the build for its CUDA version"
    precision = resolve_precision(TrainConfig(), device)
    yield "device", f"{get_device_name(device)}, {precision}", advice if is_unused else ""
    if importlib.util.find_spec("DeBERTa.ops") is None:
        return
    from DeBERTa.ops import describe_implementations, triton  # optional

    obstacle = triton.find_obstacle(device, 64) if device.type == "cuda" else None
    kernels = describe_implementations(device) + (", sdpa instead of triton attention" if obstacle else "")
    yield "kernels", kernels, obstacle or ("install g++" if "slower" in kernels else "")


def check_machine() -> Iterator[Check]:
    """Check shared memory, cache and disk."""
    shared = shutil.disk_usage("/dev/shm").free / 1e9
    advice = "data workers need more: docker run --shm-size 1g, or train with --workers 0"
    yield "shared memory", f"{shared:.2f} GB", advice if shared < LITTLE_SHARED else ""
    cache = get_cache_dir()
    advice = "it cannot be written: name another directory in DEBERTA_CACHE"
    with contextlib.suppress(StorageError), open_partial(cache / "doctor"):
        advice = ""
    yield "cache", str(cache), advice
    free = shutil.disk_usage(".").free / 1e9
    advice = "make room, or give --output_dir on another disk: a checkpoint of a base model takes 4 GB"
    yield "disk", f"{free:.1f} GB free here", advice if free < LITTLE_DISK else ""


def check_network() -> Iterator[Check]:
    """Check the hosts of texts and of published models."""
    for url in (WIKITEXT_103.urls[0], os.environ.get("HF_ENDPOINT") or "https://huggingface.co"):
        host, advice = str(urlsplit(url).hostname), ""
        try:
            socket.create_connection((host, 443), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            mirror = "mirrors go into DEBERTA_WIKITEXT_URL and HF_ENDPOINT"
            advice = f"it cannot be reached ({error}): the tiny presets do without; {mirror}"
        yield "network", host, advice


if __name__ == "__main__":
    sys.exit(main())
