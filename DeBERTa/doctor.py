"""Check what this machine has for training: `python -m DeBERTa.doctor`.

A line per check: "ok" and what there is, or "look" with what to do.
"""

import argparse
import contextlib
import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from DeBERTa.errors import StorageError
from DeBERTa.packages import PACKAGES, find_missing

# Modules that need other packages are imported after the check of those.
CONNECT_SECONDS = 5
LITTLE_DISK = 10.0  # GB; a checkpoint of a base model takes 4 GB
SHARED_MEMORY = Path("/dev/shm")
LOCKS_MB, NCCL_MB = 1, 500  # needed there: locks of data workers, a page each; buffers of several GPUs
PORTS = {"https": 443, "http": 80}
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
Check = tuple[str, str, str]  # name, what there is, what to do if it is not ok


def main() -> int:
    """Print a line per check, and return 1 unless all are ok.

    Without a cache directory, it ends with the error of the other commands.
    """
    argparse.ArgumentParser(prog="python -m DeBERTa.doctor", description=__doc__).parse_args()
    if write_checks(check_packages()):
        return 1
    from DeBERTa.command import run_command

    return run_command(lambda: write_checks(chain(check_device(), check_machine(), check_network())))


def write_checks(checks: Iterable[Check]) -> int:
    """Print a line per check, and return 1 unless all are ok."""
    status = 0
    for name, text, advice in checks:
        status |= bool(advice)
        sys.stdout.write(f"{'look' if advice else 'ok'}\t{name}: {text}{'; ' if advice else ''}{advice}\n")
    return status


def check_packages() -> Iterator[Check]:
    """Check that the packages are installed."""
    missing = find_missing()
    found = [f"{name} {version(name)}" for name in PACKAGES if name not in missing]
    advice = f"install {', '.join(missing)}: pip install -r requirements.txt" if missing else ""
    yield "versions", ", ".join([f"Python {platform.python_version()}", *found]), advice


def check_device() -> Iterator[Check]:
    """Check device, precision and kernels."""
    import torch

    from DeBERTa.config import TrainConfig
    from DeBERTa.training.banner import get_device_name
    from DeBERTa.training.execution import resolve_compile, resolve_precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_unused = device.type == "cpu" and NVIDIA_DRIVER.exists()
    advice = "PyTorch cannot use the NVIDIA driver that is here: install the build for its CUDA version"
    config = TrainConfig()
    precision = resolve_precision(config, device)
    count = f"{count_gpus()} x " if device.type == "cuda" else ""
    yield "device", f"{count}{get_device_name(device)}, {precision}", advice if is_unused else ""
    if importlib.util.find_spec("DeBERTa.ops") is None:
        return
    from DeBERTa.ops import describe_implementations, triton  # optional

    obstacle = triton.find_obstacle(device, 64, precision) if device.type == "cuda" else None
    kernels = describe_implementations(device, resolve_compile(config, device))
    kernels += ", sdpa instead of triton attention" if obstacle else ""
    advice = "set CXX to a C++ compiler, or unset it" if os.environ.get("CXX") else "install g++"
    yield "kernels", kernels, obstacle or (advice if "slower" in kernels else "")


def check_machine() -> Iterator[Check]:
    """Check shared memory, cache and disk."""
    from DeBERTa.files import get_cache_dir, open_partial

    shared, needed = 0.0, LOCKS_MB
    advice = "data workers need 1 MB for locks: docker run --shm-size 1g, or train with --workers 0"
    if count_gpus() > 1:
        needed, advice = NCCL_MB, "several GPUs (NCCL) need more: docker run --shm-size 1g"
    with contextlib.suppress(OSError):  # there is none
        shared = shutil.disk_usage(SHARED_MEMORY).free / 1e6
    yield "shared memory", f"{shared:,.1f} MB", advice if shared < needed else ""
    cache = get_cache_dir()
    advice = "it cannot be written: name another directory in DEBERTA_CACHE"
    with contextlib.suppress(StorageError), open_partial(cache / "doctor"):
        advice = ""
    yield "cache", str(cache), advice
    free = shutil.disk_usage(".").free / 1e9
    advice = "make room, or give --output_dir on another disk: a checkpoint of a base model takes 4 GB"
    yield "disk", f"{free:.1f} GB free here", advice if free < LITTLE_DISK else ""


def count_gpus() -> int:
    """Return the number of GPUs that PyTorch can use."""
    import torch

    return torch.cuda.device_count()


def check_network() -> Iterator[Check]:
    """Check the hosts of texts and of published models."""
    from DeBERTa.data.corpus import WIKITEXT_103

    for url in (WIKITEXT_103.urls[0], os.environ.get("HF_ENDPOINT") or "https://huggingface.co"):
        parts, advice = urlsplit(url), ""
        if parts.scheme not in PORTS or not parts.hostname:
            yield "network", url, "it is not a URL: write https:// before the host in HF_ENDPOINT"
            continue
        peer, found = parts, parts.hostname
        proxy = getproxies().get(parts.scheme)
        if proxy and not proxy_bypass(parts.hostname):
            peer = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            found += f" by the proxy {peer.hostname}"
        try:
            port = peer.port or PORTS.get(peer.scheme, PORTS["http"])
            socket.create_connection((peer.hostname, port), timeout=CONNECT_SECONDS).close()
        except (OSError, ValueError) as error:  # ValueError: a port that is no number
            advice = f"it cannot be reached ({error}): the tiny presets do without; mirrors go into "
            advice += "DEBERTA_WIKITEXT_URL and HF_ENDPOINT"
        yield "network", found, advice


if __name__ == "__main__":
    sys.exit(main())
