"""A block device under load: a file of its own, read and written at random by as many threads as requests in flight.

Threads of Python reach about 2e5 requests per second in all; a device that serves more is not seen to.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from kvsim.errors import ConfigError

FILL = 4 << 20  # bytes per write while the file is filled
KEPT = 64  # latencies kept per row, evenly over their order
DIRECT = getattr(os, "O_DIRECT", 0)


def check_disk(folder: Path, nbytes: int) -> None:
    """Raise ConfigError unless a file of `nbytes` fits into `folder`."""
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError("not a folder to write into", where=str(folder), hint="give --ssd a folder on the device")
    if (free := shutil.disk_usage(folder).free) < 1.1 * nbytes:
        what = f"{free / 1e9:.1f} GB are free, the test file needs {1.1 * nbytes / 1e9:.1f} GB"
        raise ConfigError(what, where=str(folder), hint="choose another --ssd folder, or make room")


def allows_direct(folder: Path) -> bool:
    """Does the file system do I/O that passes the page cache by? Found out by doing some."""
    block, (file, name) = mmap.mmap(-1, mmap.PAGESIZE), tempfile.mkstemp(dir=folder)
    os.close(file)
    try:
        file = os.open(name, os.O_RDWR | DIRECT)
    except OSError:
        return False
    finally:
        os.unlink(name)
    try:
        return bool(DIRECT) and os.pwritev(file, [block], 0) == os.preadv(file, [block], 0) == mmap.PAGESIZE
    except OSError:
        return False
    finally:
        os.close(file)


class BlockFile:
    """A file of random bytes that has no name from the start: however the process ends, it is gone.

    Opened and filled when first used. `direct`: I/O passes the page cache by; else the cache is dropped before reads.
    """

    def __init__(self, folder: Path, nbytes: int, direct: bool):
        self.folder, self.nbytes, self.direct = folder, nbytes - nbytes % FILL, direct
        self._file = -1

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def fill(self) -> dict[str, Any]:
        """Write the file from end to end; the sample of a row."""
        self.close()
        descriptor, name = tempfile.mkstemp(dir=self.folder)
        try:
            os.close(descriptor)
            self._file = os.open(name, os.O_RDWR | (DIRECT if self.direct else 0))
        finally:
            os.unlink(name)
        block, took = mmap.mmap(-1, FILL), []
        block.write(np.random.default_rng(0).bytes(FILL))
        began = time.perf_counter()
        for offset in range(0, self.nbytes, FILL):
            start = time.perf_counter()
            os.pwritev(self._file, [block], offset)
            took.append(time.perf_counter() - start)
        os.fsync(self._file)
        return _sample(took, self.nbytes / (time.perf_counter() - began))

    def load(self, jobs: Sequence[tuple[str, int, int]], seconds: float) -> list[dict[str, Any]]:
        """Run (rw, block, depth) jobs beside one another for a while; the sample of each."""
        if self._file < 0:
            self.fill()
        if not self.direct:
            os.fsync(self._file)
            with suppress(OSError, AttributeError):  # else reads may find the file in the cache
                os.posix_fadvise(self._file, 0, self.nbytes, os.POSIX_FADV_DONTNEED)
        latencies: list[list[float]] = [[] for _ in jobs]
        began = time.perf_counter()
        stop = began + seconds
        threads = [
            threading.Thread(target=self._work, args=(rw, block, 1000 * i + n, stop, latencies[i]), daemon=True)
            for i, (rw, block, depth) in enumerate(jobs)
            for n in range(depth)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not self.direct:
            os.fsync(self._file)
        took = time.perf_counter() - began
        return [_sample(found, len(found) * block / took) for found, (_, block, _) in zip(latencies, jobs, strict=True)]

    def _work(self, rw: str, block: int, seed: int, stop: float, latencies: list[float]) -> None:
        """One request after the other, at random places, until time is up."""
        buffer = mmap.mmap(-1, block)
        move: Callable[[int, list, int], int] = os.preadv if rw == "read" else os.pwritev
        if rw == "write":
            buffer.write(np.random.default_rng(seed).bytes(block))
        places = np.random.default_rng(seed).integers(0, self.nbytes // block, 1 << 16) * block
        for place in places.tolist():
            began = time.perf_counter()
            move(self._file, [buffer], place)
            done = time.perf_counter()
            latencies.append(done - began)
            if done > stop:
                return


def _sample(seconds: list[float], rate: float) -> dict[str, Any]:
    """Latencies in milliseconds, thinned but for their order statistics, with rate and median."""
    ordered = np.sort(seconds)
    kept = ordered[np.linspace(0, len(ordered) - 1, min(KEPT, len(ordered))).round().astype(int)]
    return {
        "ms": (kept * 1e3).tolist(),
        "gb_per_s": float(f"{rate / 1e9:.6g}"),
        "p50_us": float(f"{np.median(ordered) * 1e6:.6g}"),
    }
