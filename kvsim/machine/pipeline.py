"""One iteration of the serving loop on the machine: per layer, wait for the submit thread and the pages, compute.

Layer l's fetch starts when its list is known and submitted, when layer l - depth has left its staging buffer, and
when the link is free; its compute starts after layer l - 1, its submission and its fetch. Nothing else is
assumed: stalls, contention and late prefetches come out of the queues.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial

import numpy as np
import simpy

from kvsim.errors import ConfigError
from kvsim.machine.compute import ModelShape, head_seconds, work_seconds
from kvsim.machine.hardware import Hardware
from kvsim.machine.links import DEMAND, PREFETCH, WRITE_BACK, Clock, Engine, Line, Server, SsdEngine, gather_seconds
from kvsim.machine.work import MOVES, Record, Work

OVERLAPS = ("layer", "step", "none")


class Machine:
    """A GPU, its host link and an SSD, shared by every process that iterates on it.

    `overlap`: "layer" pipelines fetch and compute layer by layer; "step" fetches all pages of a step in one go
    while it computes; "none" fetches, then computes. `kv_multiplier`: how often the attention implementation
    moves the KV bytes it reads. `alone`: only one process iterates on it; steps that move nothing then take one event
    instead of two per layer, and end at the same times.
    """

    def __init__(
        self,
        env: simpy.Environment,
        hardware: Hardware,
        shape: ModelShape,
        overlap: str = "layer",
        kv_multiplier: float = 1.0,
        alone: bool = False,
    ):
        if overlap not in OVERLAPS:
            raise ConfigError(f'unknown overlap "{overlap}"', hint=f"use one of {', '.join(OVERLAPS)}")
        self.env, self.hardware, self.shape = env, hardware, shape
        self.overlap, self.kv_multiplier, self.alone = overlap, kv_multiplier, alone
        self.clock = clock = Clock(env)
        pageable = hardware.host.copies == "pageable"
        self.cpu, self.stream, self.gather = Line(clock), Server(clock, "gpu.stream"), Server(clock, "host.copy")
        self.h2d = Engine(clock, "link.h2d", hardware.h2d, pageable)
        self.d2h = Engine(clock, "link.d2h", hardware.d2h, pageable)
        self.read, self.write = (
            SsdEngine(clock, "ssd.read", hardware.ssd),
            SsdEngine(clock, "ssd.write", hardware.ssd, True),
        )
        self.in_flight: dict[int, int] = {}  # layer -> prefetches of iterations before that have not arrived
        self.step: _Step | None = None  # the latest iteration, which waits for them
        self.stream.slows((self.h2d, self.d2h), 1.0 / (1.0 + hardware.gpu.copy_slowdown))
        self.h2d.slows((self.d2h,), hardware.h2d.duplex)
        self.d2h.slows((self.h2d,), hardware.d2h.duplex)
        self.read.slows((self.write,), hardware.ssd.mixed)
        self.write.slows((self.read,), hardware.ssd.mixed)

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self.env.now

    @property
    def links(self) -> dict[str, Server]:
        """Per link and direction: bytes, transfers, copies, busy_s, waited_s, utilisation(now)."""
        return {server.name: server for server in (self.h2d, self.d2h, self.read, self.write)}

    @property
    def events(self) -> int:
        """SimPy events this machine has caused so far."""
        return self.clock.events

    def finish(self) -> None:
        """Nothing: SimPy has let all transfers end. The compiled clock has to be told."""

    def landed(self, layer: int) -> None:
        """A prefetch has arrived."""
        self.in_flight[layer] -= 1
        if not self.in_flight[layer]:
            del self.in_flight[layer]
        if self.step is not None:
            self.step.open()

    def compute_seconds(self, work: Work) -> np.ndarray:
        """Undisturbed seconds of each layer, float64 [layers], the policy's share included; without the head."""
        return work_seconds(self.hardware.gpu, self.shape, work, self.kv_multiplier)

    def iterate(self, work: Work) -> Generator[simpy.Event, None, Record]:
        """Run one iteration: `record = yield from machine.iterate(work)` inside a SimPy process."""
        assert len(work.kv_read) == self.shape.layers, "work and model differ in their number of layers"
        assert work.known in ("start", "layer"), work.known
        return (yield from _Step(self, work).run())


def _moved(work: Work, move: str, lumped: bool) -> tuple[list[float], list[float]]:
    """Bytes and copies of one kind of move, per layer or in one lump; what moves at all is at least one copy."""
    nbytes, copies = getattr(work, move), getattr(work, move + "_copies")
    copies = np.where(nbytes > 0, np.maximum(copies, 1.0), 0.0)
    if lumped:
        return [float(nbytes.sum())], [float(copies.sum())]
    return nbytes.tolist(), copies.tolist()


class _Step:
    """The state of one iteration. With "step" and "none" all layers are lumped into one."""

    def __init__(self, machine: Machine, work: Work):
        self.machine, self.clock = machine, machine.clock
        hardware = machine.hardware
        self.staged = hardware.host.copies == "staged"
        self.seconds = machine.compute_seconds(work)
        still = machine.alone and not any(getattr(work, move).any() for move in MOVES)
        still = still and not any(link.busy for link in machine.links.values()) and not machine.in_flight
        self.lumped = machine.overlap != "layer" or still
        self.layers = 1 if self.lumped else len(self.seconds)
        moves = (_moved(work, move, self.lumped) for move in MOVES)
        (self.host, self.host_n), (self.ssd, self.ssd_n), (self.out, self.out_n), (self.store, self.store_n) = (
            next(moves) for _ in range(4)
        )
        self.next_host, self.next_ssd = moves
        self.awaits = [bool(work.awaits.any())] if self.lumped else work.awaits.tolist()
        machine.step = self
        self.fetches = [a + b > 0 for a, b in zip(self.host, self.ssd, strict=True)]
        self.known_at_start = self.lumped or work.known == "start"
        self.priority = PREFETCH if self.known_at_start else DEMAND
        self.depth = 1 if self.lumped else int(hardware.gpu.staging_layers)
        self.head = head_seconds(hardware.gpu, machine.shape, work.sequences)
        self.listed: list[float] = [0.0] * self.layers  # when the copies of a layer are submitted
        self.launched: list[float] = [0.0] * self.layers  # when its kernels are
        self.copies_submitted = self.kernels_submitted = 0  # layers the submit thread has been given
        self.issued = self.computed = 0  # layers whose fetch has started, and whose compute has ended
        self.parts = [0] * self.layers  # transfers a layer still waits for
        self.timer = False
        self.gate: simpy.Event | None = None  # the stream waits for the pages of `gate_layer`
        self.gate_layer = -1

    def run(self) -> Generator[simpy.Event, None, Record]:
        clock, record = self.clock, Record(self.clock.now)
        ends = np.empty(len(self.seconds))
        self._advance()
        for layer in range(self.layers):
            if (late := self.launched[layer] - clock.now) > 0:
                yield clock.sleep(late)
                record.submit_s += late
            if self.machine.overlap != "step":
                yield from self._pages(layer, record)
            started, span = clock.now, self._span(layer)
            yield from self._compute(span, record)
            if self.lumped:
                ends[:] = self._ends(started, clock.now)
                waited = span - float(self.seconds.sum())  # within the job, for the submit thread
                record.submit_s, record.compute_s = record.submit_s + waited, record.compute_s - waited
            else:
                ends[layer] = clock.now
            self.computed = layer + 1
            self._spill(layer)
            if not self.lumped:
                self._prefetch(layer)
            self._advance()
        if self.machine.overlap == "step":
            yield from self._pages(0, record)
        if self.lumped:
            self._prefetch(0)
        if self.head:
            yield from self._compute(self.head, record)
        record.end_s, record.layer_end_s = clock.now, ends
        return record

    def _compute(self, seconds: float, record: Record) -> Generator[simpy.Event, None, None]:
        asked = self.clock.now
        job = self.machine.stream.put(seconds)
        yield job.done(self.clock)
        record.queued_s += job.started - asked
        record.compute_s += self.clock.now - job.started

    def _ready(self, layer: int) -> bool:
        """Are all pages of the layer on the GPU, late prefetches among them where the layer reads those?"""
        fetching = self.fetches[layer] and (self.issued <= layer or self.parts[layer])
        return not fetching and not (self.awaits[layer] and self.machine.in_flight.get(layer))

    def _pages(self, layer: int, record: Record) -> Generator[simpy.Event, None, None]:
        """Wait until the pages of a layer are on the GPU."""
        asked = self.clock.now
        if not self._ready(layer):
            self.gate, self.gate_layer = self.clock.event(), layer
            yield self.gate
            self.gate = None
        record.stall_s += self.clock.now - asked

    # --- the submit thread -------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Give the submit thread what is known by now, and start the fetches that nothing holds back."""
        ahead = self.depth if self.known_at_start else 1
        while self.kernels_submitted < self.layers:
            while self.copies_submitted < min(self.layers, self.kernels_submitted + ahead):
                layer = self.copies_submitted
                if self.fetches[layer] and not self.known_at_start and self.computed < layer:
                    self._issue()
                    return  # the thread waits for the layer before, which decides what to fetch
                self._submit_copies(layer)
                self.copies_submitted += 1
            self._submit_kernels(self.kernels_submitted)
            self.kernels_submitted += 1
        self._issue()

    def _submit_copies(self, layer: int) -> None:
        if self.fetches[layer]:
            machine = self.machine
            copies = self.ssd_n[layer] + (min(1.0, self.host_n[layer]) if self.staged else self.host_n[layer])
            self.listed[layer] = machine.cpu.reserve(copies * machine.h2d.link.submit)
            if machine.h2d.blocking:  # pageable: the thread copies while the engine runs
                machine.cpu.reserve((self.host[layer] + self.ssd[layer]) * machine.h2d.blocking)

    def _submit_kernels(self, layer: int) -> None:
        """The layer's kernels, then the write-backs that follow it on the stream."""
        machine, each = self.machine, self.machine.hardware.cpu.layer_submit
        self.launched[layer] = machine.cpu.reserve(each)
        rest = (len(self.seconds) - 1) * each if self.lumped else 0.0
        spills = self.out_n[layer] * machine.d2h.link.submit + self.out[layer] * machine.d2h.blocking
        ahead = (self.next_host[1][layer] + self.next_ssd[1][layer]) * machine.h2d.link.submit
        machine.cpu.reserve(rest + spills + ahead)

    # --- moving pages ------------------------------------------------------------------------------------

    def _issue(self) -> None:
        """Start, in order, the fetches that are submitted and have a staging buffer."""
        while self.issued < min(self.copies_submitted, self.computed + self.depth):
            if (late := self.listed[self.issued] - self.clock.now) > 0:
                if not self.timer:
                    self.timer = True
                    self.clock.after(late, self._due)
                return
            self._fetch(self.issued)
            self.issued += 1

    def _due(self, _: simpy.Event) -> None:
        self.timer = False
        self._issue()

    def _fetch(self, layer: int) -> None:
        m, nbytes, arrived = self.machine, self.host[layer], partial(self._arrived, layer)
        if nbytes:
            self.parts[layer] += 1
            if self.staged:
                move = partial(m.h2d.move, nbytes, 1, self.priority, arrived)
                m.gather.put(gather_seconds(m.hardware.host, nbytes), self.priority, move)
            else:
                m.h2d.move(nbytes, self.host_n[layer], self.priority, arrived)
        if nbytes := self.ssd[layer]:
            self.parts[layer] += self._through_host(nbytes, self.ssd_n[layer], self.priority, arrived)

    def _through_host(self, nbytes: float, blocks: float, priority: int, arrived: Callable[[], object]) -> int:
        """Read from the SSD and copy on; how many times `arrived` will be called.

        Blocks are copied while later ones are read: the copy starts so that it ends with the last block, or behind the
        first one where copying is what takes longer.
        """
        m = self.machine
        copy = partial(m.h2d.move, nbytes, blocks, priority, arrived)
        reading = m.read.seconds(nbytes, blocks) - m.read.first(nbytes, blocks)
        lead = min(reading, (1 - 1 / blocks) * (blocks * m.h2d.link.per_copy + nbytes / m.h2d.rate))
        if lead > 0:
            m.read.move(nbytes, blocks, priority, arrived, lead=lead, head=copy)
            return 2
        m.read.move(nbytes, blocks, priority, copy)
        return 1

    def _arrived(self, layer: int) -> None:
        self.parts[layer] -= 1
        self.open()

    def open(self) -> None:
        """Let the stream go on if what it waits for has come."""
        if self.gate is not None and not self.gate.triggered and self._ready(self.gate_layer):
            self.gate.succeed()

    def _spill(self, layer: int) -> None:
        """Write back behind everything urgent; nobody waits."""
        m = self.machine
        if self.out[layer]:
            m.d2h.move(self.out[layer], self.out_n[layer], WRITE_BACK)
        if self.store[layer]:
            m.write.move(self.store[layer], self.store_n[layer], WRITE_BACK)

    def _prefetch(self, layer: int) -> None:
        """Send for what a later iteration will want."""
        m = self.machine
        (host, host_n), (ssd, ssd_n) = self.next_host, self.next_ssd
        if host[layer] or ssd[layer]:
            landed = partial(m.landed, layer)
            waits = m.in_flight.get(layer, 0)
            if host[layer]:
                m.h2d.move(host[layer], host_n[layer], PREFETCH, landed)
                waits += 1
            if ssd[layer]:
                waits += self._through_host(ssd[layer], ssd_n[layer], PREFETCH, landed)
            m.in_flight[layer] = waits

    # --- lumped steps ------------------------------------------------------------------------------------

    def _span(self, layer: int) -> float:
        """Seconds from now to the end of the layer; of all layers, with their submission, where they are lumped."""
        if not self.lumped:
            return float(self.seconds[layer])
        return float(self._recurrence(self.clock.now)[-1] - self.clock.now)

    def _recurrence(self, start: float) -> np.ndarray:
        """End of each layer when nothing but the submit thread holds it up: e[l] = max(e[l-1], launched[l]) + c[l]."""
        launched = self.launched[0] + self.machine.hardware.cpu.layer_submit * np.arange(len(self.seconds))
        through = np.cumsum(self.seconds)
        return np.maximum.accumulate(np.maximum(launched, start) - through + self.seconds) + through

    def _ends(self, started: float, ended: float) -> np.ndarray:
        """Ends of lumped layers, stretched to when their job really ended."""
        ends = self._recurrence(started)
        span = ends[-1] - started
        return started + (ends - started) * ((ended - started) / span if span else 1.0)
