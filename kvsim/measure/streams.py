"""Streams and events on CUDA and on a CPU, with the same meaning: work in order per stream, waits between them, stamps.

On a CPU a stream is a worker thread, "device memory" is RAM beside the host's, and the link between them is memcpy:
what is measured there is that machine, not a model of a GPU.
"""

from __future__ import annotations

import gc
import os
import platform
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from kvsim.errors import ConfigError
from kvsim.measure import require

if TYPE_CHECKING:
    import torch

Job = Callable[[], object]
ALIGNMENT = 4096  # of host buffers: what direct reads from a disk ask for


class Event(Protocol):
    """A point in a stream. `wait` and `seconds_since` refer to the latest `record`."""

    def record(self, stream: Any) -> None: ...

    def synchronize(self) -> None:
        """Block the calling thread until the stream has come here."""

    def seconds_since(self, earlier: Any) -> float:
        """Seconds between two events that have happened."""


class Stream(Protocol):
    """Does its jobs in the order they were given. A job is a call that starts device work or does the CPU's."""

    def submit(self, job: Job) -> None: ...

    def wait(self, event: Any) -> None:
        """Hold what is submitted from now on until the event, as recorded by now, has happened."""

    def synchronize(self) -> None: ...


class Device:
    """Three streams (`compute`, `copy` to the device, `write_back` from it, at low priority) on one device.

    `place`: the torch device. A context manager: threads end with it, and on a CPU one thread computes meanwhile.
    """

    kind: str
    name: str
    place: torch.device
    compute: Stream
    copy: Stream
    write_back: Stream

    def event(self) -> Event:
        raise NotImplementedError

    def compiled(self, parts: Sequence[Job]) -> list[Job]:
        """The parts in the form in which the device runs them fastest; they are run a few times on the way."""
        raise NotImplementedError

    def host_bytes(self, size: int) -> torch.Tensor:
        """uint8 [size] in host memory, as fast for copies as there is, aligned for direct reads."""
        torch = require("torch")
        pinned = self.kind == "cuda"
        raw = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        if raw.data_ptr() % ALIGNMENT == 0:  # pinned memory is; asking for more may double what is taken
            return raw
        raw = torch.empty(size + ALIGNMENT, dtype=torch.uint8, pin_memory=pinned)
        skip = -raw.data_ptr() % ALIGNMENT
        return raw[skip : skip + size]

    def synchronize(self) -> None:
        """Wait for all streams. Raises what a job raised."""
        for stream in (self.compute, self.copy, self.write_back):
            stream.synchronize()

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_device(kind: str | None = None) -> Device:
    """The device to measure on: "cuda", "cpu", or None for CUDA where there is one.

    Raises ConfigError without torch, or for CUDA where there is none.
    """
    torch = require("torch")
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cuda", "cpu"):
        raise ConfigError(f'unknown device "{kind}"', hint='use "cuda" or "cpu"')
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here", hint="measure on the CPU with --device cpu")
    return CudaDevice() if kind == "cuda" else CpuDevice()


# -- CPU ---------------------------------------------------------------------------------------------------------


class _Mark:
    """One recording of an event."""

    def __init__(self) -> None:
        self.happened, self.at = threading.Event(), 0.0

    def set(self) -> None:
        self.at = time.perf_counter()
        self.happened.set()


class CpuEvent:
    def __init__(self) -> None:
        self.mark = _Mark()
        self.mark.set()  # as with CUDA, an event that was never recorded holds nobody up

    def record(self, stream: CpuStream) -> None:
        self.mark = _Mark()
        stream.put(self.mark.set)

    def synchronize(self) -> None:
        self.mark.happened.wait()

    def seconds_since(self, earlier: CpuEvent) -> float:
        return self.mark.at - earlier.mark.at


class CpuStream:
    """A thread that does jobs in order. After one has failed the rest are skipped until `synchronize` says so."""

    def __init__(self, name: str, niceness: int = 0):
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(niceness,), name=name, daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        """A job that is done whatever happened before: a stamp, a wait."""
        self._jobs.put(job)

    def submit(self, job: Job) -> None:
        self._jobs.put(lambda: self._error or job())

    def wait(self, event: CpuEvent) -> None:
        self._jobs.put(event.mark.happened.wait)

    def synchronize(self) -> None:
        done = threading.Event()
        self._jobs.put(done.set)
        done.wait()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _work(self, niceness: int) -> None:
        require("torch").set_num_threads(1)  # OpenMP keeps the number per thread
        if niceness:
            with suppress(OSError, AttributeError):  # Linux gives every thread its own niceness
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001  raised again in synchronize
                self._error = error


class CpuDevice(Device):
    kind = "cpu"

    def __init__(self) -> None:
        torch = require("torch")
        self.place, self.name = torch.device("cpu"), f"cpu {_processor()}"
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # compute and copies have a core each
        self.streams = [CpuStream("compute"), CpuStream("copy"), CpuStream("write-back", niceness=10)]
        self.compute, self.copy, self.write_back = self.streams

    def event(self) -> CpuEvent:
        return CpuEvent()

    def compiled(self, parts: Sequence[Job]) -> list[Job]:
        return list(parts)

    def close(self) -> None:
        for stream in self.streams:
            stream.close()
        require("torch").set_num_threads(self._threads)


def _processor() -> str:
    """The processor's name, as the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# -- CUDA --------------------------------------------------------------------------------------------------------


class CudaEvent:
    def __init__(self) -> None:
        self.event = require("torch").cuda.Event(enable_timing=True)

    def record(self, stream: CudaStream) -> None:
        self.event.record(stream.stream)

    def synchronize(self) -> None:
        self.event.synchronize()

    def seconds_since(self, earlier: CudaEvent) -> float:
        return earlier.event.elapsed_time(self.event) * 1e-3


class CudaStream:
    def __init__(self, priority: int = 0):
        cuda = require("torch").cuda
        self.stream, self._on = cuda.Stream(priority=priority), cuda.stream

    def submit(self, job: Job) -> None:
        with self._on(self.stream):
            job()

    def wait(self, event: CudaEvent) -> None:
        self.stream.wait_event(event.event)

    def synchronize(self) -> None:
        self.stream.synchronize()


class CudaDevice(Device):
    """The current CUDA device. A part becomes one CUDA graph, replayed on the compute stream.

    Meanwhile no attention runs in cuDNN, which torch prefers on Hopper from 2.11 on: it makes a plan for every length
    of a context, so that each decode step of a growing one would measure the planning.
    """

    kind = "cuda"

    def __init__(self) -> None:
        torch = require("torch")
        self.place = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.place)
        self.compute, self.copy, self.write_back = CudaStream(), CudaStream(priority=-1), CudaStream()
        self._cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)

    def close(self) -> None:
        require("torch").backends.cuda.enable_cudnn_sdp(self._cudnn)

    def event(self) -> CudaEvent:
        return CudaEvent()

    def compiled(self, parts: Sequence[Job]) -> list[Job]:
        """One graph per part. They share a memory pool, so only buffers made before may carry values between them."""
        cuda = require("torch").cuda
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):  # libraries choose and allocate on first use, which a capture forbids
            for _ in range(3):
                for part in parts:
                    part()
        cuda.synchronize()
        pool = cuda.graph_pool_handle()
        graphs = [cuda.CUDAGraph() for _ in parts]
        gc.collect()
        gc.freeze()  # every capture collects garbage, which takes long where much is alive
        try:
            for graph, part in zip(graphs, parts, strict=True):
                with cuda.graph(graph, pool=pool, stream=side):
                    part()
                graph.part = part  # a graph knows addresses alone: what lies there must live as long as it
        finally:
            gc.unfreeze()
        cuda.synchronize()
        return [graph.replay for graph in graphs]

    def synchronize(self) -> None:
        require("torch").cuda.synchronize(self.place)
