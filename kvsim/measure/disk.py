"""Pages in a file: read and written by a pool of threads, past the system's cache where the file system allows it."""

from __future__ import annotations

import os
import queue
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from kvsim.errors import ConfigError
from kvsim.measure.streams import ALIGNMENT


class PageFile:
    """One region per layer in a file without a name, which ends with the process.

    `direct`: reads go past the page cache (O_DIRECT); where they do not, they may measure memory instead of a disk.
    Raises ConfigError when the file cannot be written.
    """

    def __init__(self, regions: Sequence[np.ndarray], folder: str | os.PathLike | None = None):
        self._stride = -(-len(regions[0]) // ALIGNMENT) * ALIGNMENT
        folder = Path(folder or tempfile.gettempdir())
        try:
            self._cached, name = tempfile.mkstemp(prefix="kvsim-pages-", dir=folder)
            try:
                self._fill(regions)
                self._direct = self._open_direct(name)
            finally:
                os.unlink(name)
        except OSError as error:
            what = f"cannot write the pages of the SSD tier: {error.strerror or error}"
            raise ConfigError(what, where=str(folder), hint="name a folder with more space") from None

    @property
    def direct(self) -> bool:
        return self._direct is not None

    def span(self, layer: int, start: int, stop: int) -> tuple[int, int, int]:
        """(offset, length, skip) of the aligned piece of the file around bytes start ... stop of a layer's region."""
        first, last = layer * self._stride + start, layer * self._stride + stop
        offset = first // ALIGNMENT * ALIGNMENT
        return offset, -(-last // ALIGNMENT) * ALIGNMENT - offset, first - offset

    def read(self, offset: int, into: memoryview) -> None:
        """Fill an aligned piece of memory from an aligned offset."""
        file, done = self._cached if self._direct is None else self._direct, 0
        while done < len(into):
            got = os.preadv(file, [into[done:]], offset + done)
            if got <= 0:
                raise OSError(f"the file of pages ends at {offset + done}")
            done += got

    def write(self, layer: int, start: int, data: memoryview) -> None:
        """Write bytes of a layer's region; past the cache if they are aligned and reads are, too."""
        offset = layer * self._stride + start
        aligned = offset % ALIGNMENT == 0 and len(data) % ALIGNMENT == 0
        file = self._direct if aligned and self._direct is not None else self._cached
        done = 0
        while done < len(data):
            done += os.pwritev(file, [data[done:]], offset + done)

    def close(self) -> None:
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)

    def _fill(self, regions: Sequence[np.ndarray]) -> None:
        os.ftruncate(self._cached, self._stride * len(regions))
        for layer, region in enumerate(regions):
            data, done = region.data, 0
            while done < len(data):
                done += os.pwrite(self._cached, data[done:], layer * self._stride + done)
        os.fsync(self._cached)
        with suppress(AttributeError):  # else the first reads may find the pages in the system's cache
            os.posix_fadvise(self._cached, 0, 0, os.POSIX_FADV_DONTNEED)

    def _open_direct(self, name: str) -> int | None:
        """A descriptor for direct reads and writes, if a read through it works."""
        if not hasattr(os, "O_DIRECT"):
            return None
        try:
            file = os.open(name, os.O_RDWR | os.O_DIRECT)
        except OSError:
            return None
        probe = np.empty(2 * ALIGNMENT, np.uint8)
        skip = -probe.ctypes.data % ALIGNMENT
        try:
            os.preadv(file, [probe.data[skip : skip + ALIGNMENT]], 0)
        except OSError:
            os.close(file)
            return None
        return file


class Workers:
    """Threads that do jobs in the order they come, several at a time."""

    def __init__(self, threads: int):
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def put(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def synchronize(self) -> None:
        """Wait for all jobs. Raises what the first that failed raised."""
        self._jobs.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001  raised again in synchronize
                self._error = self._error or error
            finally:
                self._jobs.task_done()
