"""Ways to time work on a device: alone, without its submission, its submission alone, or while copies run beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from kvsim.measure import machine_info, require
from kvsim.measure.streams import CpuEvent, Device, Job, Stream

GPU_ROTATION = 400e6  # bytes; several times any GPU's last cache
SUBMITTED = 900  # entries a CUDA stream takes before submitting blocks
FASTEST_LINK = 64e9  # bytes per second, for how many copies fill a time
Valid = Callable[[], bool]


class Bench:
    """A device and how long a point may be timed on it, in `seconds`.

    `rotate`: bytes of buffers that work cycles through, so that no cache holds what the next repetition reads;
    by default twice the largest cache, on a GPU at least 400 MB.
    """

    def __init__(self, device: Device, seconds: float = 0.25, rotate: float = 0.0):
        self.torch = require("torch")
        self.device, self.seconds = device, seconds
        self.cuda = device.kind == "cuda"
        self.slug = machine_info.slug(device.name)
        self.dtype = self.torch.bfloat16 if self.cuda else self.torch.float32
        self.value_bytes = self.dtype.itemsize
        beyond = 2.0 * machine_info.cache_bytes(device.kind)
        self.rotate = int(rotate or (max(GPU_ROTATION, beyond) if self.cuda else beyond))

    # --- buffers -----------------------------------------------------------------------------------------

    def normal(self, *size: int) -> Any:
        """Values from a normal distribution, never zeros: power and clocks depend on the data."""
        return self._made(self.torch.randn(*size, device=self.device.place, dtype=self.dtype))

    def rotated(self, *size: int) -> list[Any]:
        """So many buffers of normal values that none is in a cache when its turn comes again."""
        one = self.normal(*size)
        return [one, *(self.normal(*size) for _ in range(-(-self.rotate // one.nbytes) - 1))]

    def on_device(self, nbytes: int) -> Any:
        return self._made(self.torch.ones(nbytes, dtype=self.torch.uint8, device=self.device.place))

    def _made(self, buffer: Any) -> Any:
        """Wait until it is filled: the streams that use it do not wait for the one that made it."""
        if self.cuda:
            self.torch.cuda.synchronize()
        return buffer

    def on_host(self, nbytes: int, pinned: bool = True) -> Any:
        """Host memory, its pages touched. A CPU pins nothing: ordinary memory either way."""
        if pinned:
            return self.device.host_bytes(nbytes).fill_(1)
        return self.torch.ones(nbytes, dtype=self.torch.uint8)

    def release(self) -> None:
        """Give back what freed buffers still hold."""
        if self.cuda:
            self.torch.cuda.empty_cache()

    # --- time --------------------------------------------------------------------------------------------

    def one_launch(self, work: Job) -> Job:
        """The same work in the form the device runs fastest: one graph, where there are graphs."""
        return self.device.compiled([work])[0]

    def timed(
        self, work: Job, *, warm: int = 2, reps: int = 50, on: Stream | None = None, valid: Valid | None = None
    ) -> list[float]:
        """Device milliseconds of each repetition of `work`; at least three, until the seconds of a point are over.

        `valid` is asked after each repetition: the first that is not ends the timing and does not count.
        """
        stream = on or self.device.compute
        for _ in range(warm):
            stream.submit(work)
        stream.synchronize()
        return self._repeat(partial(self._once, work, stream), reps, valid)

    def _once(self, work: Job, stream: Stream) -> float:
        begin, end = self.device.event(), self.device.event()
        begin.record(stream)
        stream.submit(work)
        end.record(stream)
        end.synchronize()
        return 1e3 * end.seconds_since(begin)

    def held(self, submit: Callable[[], object], seconds: float, stream: Stream) -> tuple[float, float]:
        """(device, host) milliseconds of what `submit` gives to the stream, which is held back until all is there."""
        begin, end = self.device.event(), self.device.event()
        stream.submit(partial(self._hold, seconds))
        begin.record(stream)
        began = time.perf_counter()
        submit()
        submitted = time.perf_counter() - began
        end.record(stream)
        end.synchronize()
        return 1e3 * end.seconds_since(begin), 1e3 * submitted

    def _hold(self, seconds: float) -> None:
        if self.cuda:
            self.torch.cuda._sleep(int(seconds * 2e9))  # cycles, of clocks up to about 2 GHz
        else:
            time.sleep(seconds)

    def wall(self, work: Job, *, warm: int = 2, reps: int = 50) -> list[float]:
        """Milliseconds from submitting `work` until the host knows that it is done."""
        stream, end = self.device.compute, self.device.event()

        def once() -> float:
            began = time.perf_counter()
            stream.submit(work)
            end.record(stream)
            end.synchronize()
            return 1e3 * (time.perf_counter() - began)

        for _ in range(warm):
            once()
        return self._repeat(once, reps)

    def _repeat(self, once: Callable[[], float], reps: int, valid: Valid | None = None) -> list[float]:
        found: list[float] = []
        began = time.perf_counter()
        while len(found) < reps and (len(found) < 3 or time.perf_counter() - began < self.seconds):
            took = once()
            if valid is not None and not valid():
                break
            found.append(took)
        return found

    # --- copies ------------------------------------------------------------------------------------------

    def moved(self, pairs: Sequence[tuple[Any, Any]], stream: Stream) -> tuple[float, float]:
        """(device, submit) milliseconds of (destination, source) copies back to back."""
        return self.held(lambda: stream.submit(partial(copy_all, pairs)), 300e-6 + 20e-6 * len(pairs), stream)

    @contextmanager
    def copying(self, to: Any, source: Any, stream: Stream) -> Iterator[Valid]:
        """While the block runs, `source` is copied again and again; yields a call that says whether it still is.

        To a GPU all copies are given at once, enough for a timing; a CPU's thread goes on until the block ends.
        """
        over, done = threading.Event(), self.device.event()

        def on_and_on() -> None:
            while not over.is_set():
                to.copy_(source)

        enough = int(2 * self.seconds * FASTEST_LINK / source.nbytes) + 64
        try:
            stream.submit(partial(copy_all, [(to, source)] * min(SUBMITTED, enough)) if self.cuda else on_and_on)
            done.record(stream)
            yield lambda: not _happened(done)
        finally:
            over.set()
            stream.synchronize()


def copy_all(pairs: Sequence[tuple[Any, Any]]) -> None:
    """Start the copy of each (destination, source)."""
    for to, source in pairs:
        to.copy_(source, non_blocking=True)


def _happened(event: Any) -> bool:
    return event.mark.happened.is_set() if isinstance(event, CpuEvent) else event.event.query()
