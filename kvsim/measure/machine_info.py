"""What machine this is: the facts that go beside every measurement, and the sizes that measuring depends on."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvsim
from kvsim.measure import require

if TYPE_CHECKING:
    from kvsim.measure.streams import Device

CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"


def slug(name: str) -> str:
    """A device's name as keys hold it: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def processor() -> str:
    """The processor's name as the system gives it."""
    named = (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def memory_bytes() -> int:
    """Bytes of host memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_bytes(device: str) -> int:
    """Bytes of the largest cache in front of the device's memory; 64 MiB where the system does not say."""
    if device != "cpu":
        torch = require("torch")
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20
    sizes = [_lines(path)[0] for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=64 << 20)


def device_memory(device: str) -> int:
    """Bytes of device memory; of a CPU, all of its memory."""
    if device == "cpu":
        return memory_bytes()
    torch = require("torch")
    return int(torch.cuda.get_device_properties(device).total_memory)


def multiprocessors(device: str) -> int:
    """Units that take blocks of work in rounds; one for a CPU, where one thread computes."""
    if device == "cpu":
        return 1
    torch = require("torch")
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def info(device: Device, disk: str | Path | None = None) -> dict[str, Any]:
    """Parameters of an info row: device, driver, versions, commit, processor, memory, disk, clocks, date.

    No host or user name. `disk`: a folder whose file system is described.
    """
    cuda = device.kind == "cuda"
    return {
        "device": device.name,
        "device_memory": device_memory(device.kind),
        "sms": multiprocessors(device.kind),
        "driver": _nvidia("driver_version") if cuda else None,
        "clocks": _nvidia("clocks.max.sm,clocks.max.mem,power.limit,pcie.link.gen.max,pcie.link.width.max")
        if cuda
        else None,
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "kvsim": kvsim.__version__,
        "commit": _output("git", "-C", str(Path(kvsim.__file__).parent), "rev-parse", "HEAD"),
        "cpu": processor(),
        "cores": cores(),
        "load": round(os.getloadavg()[0], 2),
        "memory": memory_bytes(),
        "disk": _disk(Path(disk)) if disk is not None else None,
        "date": datetime.date.today().isoformat(),
    }


@contextmanager
def clocks_logged(path: str | Path) -> Iterator[None]:
    """While the block runs, nvidia-smi appends the GPU's clocks, temperature and power to `path` twice a second."""
    query = ["nvidia-smi", f"--query-gpu=timestamp,{CLOCKS}", "--format=csv,noheader,nounits", "-lms", "500"]
    with Path(path).open("a", encoding="utf-8") as out:
        try:
            logger = subprocess.Popen(query, stdout=out, stderr=subprocess.DEVNULL)
        except OSError:  # no such tool: measure all the same
            logger = None
        try:
            yield
        finally:
            if logger is not None:
                logger.terminate()
                logger.wait()


def _disk(folder: Path) -> dict[str, Any]:
    """File system kind and size under a folder."""
    mounts = [line.split()[1:3] for line in _lines("/proc/mounts")]
    at = str(folder.resolve())
    inside = [(len(point), kind) for point, kind in mounts if (at + "/").startswith(point.rstrip("/") + "/")]
    space = os.statvfs(folder)
    kind = max(inside)[1] if inside else "unknown"
    return {"file_system": kind, "bytes": space.f_frsize * space.f_blocks, "free": space.f_frsize * space.f_bavail}


def _nvidia(query: str) -> str | None:
    return _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return [""]
