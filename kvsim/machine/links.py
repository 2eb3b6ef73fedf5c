"""Everything that is busy with one thing at a time: links, the SSD, the GPU's stream, the submit thread.

A SimPy resource costs three events per use (request, timeout, release), and cutting every transfer into pieces
multiplies them. A `Server` costs one: it stops a transfer only when somebody more urgent arrives, at the end of
the piece under way, and re-computes its speed only when a neighbour's activity changes it. The result is that
of pieces, each taken from the most urgent transfer there is; a test compares the two.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import simpy

from kvsim.machine.hardware import Host, Link, Ssd

DEMAND, PREFETCH, WRITE_BACK = 0, 1, 2
PIECE = 2 * 1024 * 1024  # bytes an urgent request waits for at most


class Clock:
    """The simulation's time, and a count of the SimPy events this machine has caused."""

    def __init__(self, env: simpy.Environment):
        self.env, self.events = env, 0

    @property
    def now(self) -> float:
        return self.env.now

    def after(self, seconds: float, call: Callable[[simpy.Event], None], value: object = None) -> simpy.Event:
        self.events += 1
        timeout = self.env.timeout(seconds, value)
        timeout.callbacks.append(call)
        return timeout

    def sleep(self, seconds: float) -> simpy.Event:
        self.events += 1
        return self.env.timeout(seconds)

    def event(self) -> simpy.Event:
        self.events += 1
        return self.env.event()


class Job:
    """Work for a server: `seconds` at full speed, the first `fixed` of them not divisible, then pieces."""

    __slots__ = ("left", "seconds", "fixed", "piece", "then", "queued", "started", "finished", "_done")

    def __init__(self, seconds: float, fixed: float, piece: float, then: Callable[[], object] | None, now: float):
        self.left = self.seconds = seconds
        self.fixed, self.piece, self.then = fixed, piece, then
        self.queued, self.started, self.finished = now, -1.0, False
        self._done: simpy.Event | None = None

    def done(self, clock: Clock) -> simpy.Event:
        """The event of its end; made only when somebody waits."""
        if self._done is None:
            self._done = clock.event()
        return self._done

    def next_cut(self) -> float:
        """Seconds left at the end of the piece that is under way; 0 where it is the last one."""
        moved = self.seconds - self.left - self.fixed
        pieces = max(1.0, -(-moved // self.piece)) if self.piece else 0.0
        return max(0.0, self.seconds - self.fixed - pieces * self.piece) if self.piece else 0.0


class Server:
    """One job at a time, the most urgent first, equals in order of arrival.

    Counts `bytes`, `transfers`, `copies`, `busy_s` and `waited_s` (from request to start, and while cut off).
    """

    def __init__(self, clock: Clock, name: str):
        self.clock, self.name = clock, name
        self.bytes = self.waited_s = 0.0
        self.transfers = self.copies = 0
        self._current: Job | None = None
        self._urgency = 0
        self._waiting: list[tuple[int, int, Job]] = []
        self._arrivals = 0
        self._order = 0  # arrival number of the current job
        self._alarm = 0  # number of the timeout that counts; earlier ones are stale
        self._stop = 0.0  # seconds left at which the current job pauses
        self._since = 0.0  # when `left` of the current job was last brought up to date
        self._busy, self._busy_since = 0.0, 0.0
        self._speed = 1.0
        self._rivals: tuple[Server, ...] = ()
        self._slowed = 1.0
        self._watchers: list[Server] = []

    def slows(self, rivals: tuple[Server, ...], speed: float) -> None:
        """Run at `speed` (at most 1) while any of `rivals` is busy."""
        if speed < 1.0:
            self._rivals, self._slowed = rivals, speed
            for rival in rivals:
                rival._watchers.append(self)

    @property
    def busy(self) -> bool:
        return self._current is not None

    @property
    def busy_s(self) -> float:
        return self._busy + (self.clock.now - self._busy_since if self._current else 0.0)

    def utilisation(self, now: float | None = None) -> float:
        """Share of the time since 0 in which it was busy."""
        now = self.clock.now if now is None else now
        return self.busy_s / now if now else 0.0

    def put(
        self,
        seconds: float,
        priority: int = DEMAND,
        then: Callable[[], object] | None = None,
        *,
        fixed: float = 0.0,
        piece: float = 0.0,
    ) -> Job:
        """Queue a job; `then` is called at its end. `piece`: seconds between the points where it may be cut."""
        job = Job(seconds, fixed, piece, then, self.clock.now)
        self._arrivals += 1
        if self._current is None:
            self._switch((priority, self._arrivals, job))
            return job
        heapq.heappush(self._waiting, (priority, self._arrivals, job))
        if priority < self._urgency and self._current.piece and not self._stop:
            self._settle()
            self._stop = self._current.next_cut()
            if self._stop:
                self._arm()
        return job

    def _switch(self, entry: tuple[int, int, Job] | None) -> None:
        """Serve `entry` now, or fall idle; neighbours whose speed depends on that are told."""
        now, was = self.clock.now, self._current is not None
        changed = was != (entry is not None)
        if changed:
            for watcher in self._watchers:
                watcher._settle()
        self._current = entry[2] if entry else None
        if entry:
            self._urgency, self._order, job = entry
            self.waited_s += now - job.queued
            if job.started < 0:
                job.started = now
            self._since, self._stop, self._speed = now, 0.0, self._pace()
            self._arm()
        if changed:
            if entry:
                self._busy_since = now
            else:
                self._busy += now - self._busy_since
            for watcher in self._watchers:
                watcher._repace()

    def _pace(self) -> float:
        return self._slowed if any(r._current is not None for r in self._rivals) else 1.0

    def _settle(self) -> None:
        """Bring what is left of the current job up to date."""
        if self._current is not None:
            now = self.clock.now
            self._current.left = max(self._stop, self._current.left - (now - self._since) * self._speed)
            self._since = now

    def _repace(self) -> None:
        if self._current is not None and (pace := self._pace()) != self._speed:
            self._speed = pace
            self._arm()

    def _arm(self) -> None:
        assert self._current is not None
        self._alarm += 1
        self.clock.after((self._current.left - self._stop) / self._speed, self._wake, self._alarm)

    def _wake(self, timeout: simpy.Event) -> None:
        """The current job reached its end, or the piece at which it gives way."""
        if timeout.value != self._alarm:
            return
        job = self._current
        assert job is not None
        job.left = self._stop
        if job.left:
            job.queued = self.clock.now
            heapq.heappush(self._waiting, (self._urgency, self._order, job))
        else:
            job.finished = True
        self._switch(heapq.heappop(self._waiting) if self._waiting else None)
        if job.finished:
            if job.then is not None:
                job.then()
            if job._done is not None:
                job._done.succeed()


class Engine(Server):
    """One direction of a host link."""

    def __init__(self, clock: Clock, name: str, link: Link, pageable: bool = False):
        super().__init__(clock, name)
        self.link = link
        self.rate = link.pageable_bandwidth if pageable else link.bandwidth
        self.blocking = 1.0 / self.rate if pageable else 0.0  # seconds the submit thread copies, per byte

    def seconds(self, nbytes: float, copies: float) -> float:
        """Undisturbed time of `copies` copies of `nbytes` in all."""
        return self.link.latency + copies * self.link.per_copy + nbytes / self.rate

    def move(self, nbytes: float, copies: float, priority: int, then: Callable[[], object] | None = None) -> Job:
        self.bytes += nbytes
        self.transfers += 1
        self.copies += int(copies)
        fixed = self.link.latency + copies * self.link.per_copy
        return self.put(fixed + nbytes / self.rate, priority, then, fixed=fixed, piece=PIECE / self.rate)


def ssd_rate(block: float, depth: float, bandwidth: float, iops: float, latency: float) -> float:
    """Bytes per second of blocks of `block` bytes with `depth` requests in flight.

    min(bandwidth, iops * block, depth * block / (latency + block / bandwidth)), as block over the slowest stage.
    """
    slowest = max(block / bandwidth, 1.0 / iops, (latency + block / bandwidth) / depth)
    return block / slowest if slowest else float("inf")


class SsdEngine(Server):
    """Reads or writes of a block device: `queue_depth` slots in front of one bandwidth."""

    def __init__(self, clock: Clock, name: str, ssd: Ssd, write: bool = False):
        super().__init__(clock, name)
        self.bandwidth = ssd.write_bandwidth if write else ssd.read_bandwidth
        self.iops = ssd.write_iops if write else ssd.read_iops
        self.latency = ssd.write_latency if write else ssd.read_latency
        self.queue_depth = ssd.queue_depth

    def first(self, nbytes: float, requests: float) -> float:
        """Seconds until the first block is there."""
        return self.latency + nbytes / requests / self.bandwidth

    def seconds(self, nbytes: float, requests: float) -> float:
        """Undisturbed time: the steady rate, but never less than one latency and all bytes."""
        rate = ssd_rate(nbytes / requests, min(requests, self.queue_depth), self.bandwidth, self.iops, self.latency)
        return max(self.latency + nbytes / self.bandwidth, nbytes / rate)

    def move(
        self,
        nbytes: float,
        requests: float,
        priority: int,
        then: Callable[[], object] | None = None,
        *,
        lead: float = 0.0,
        head: Callable[[], object] | None = None,
    ) -> None:
        """Read or write; `head` is called `lead` seconds of service before the end, `then` at the end."""
        self.bytes += nbytes
        self.transfers += 1
        self.copies += int(requests)
        seconds, piece = self.seconds(nbytes, requests), PIECE / self.bandwidth
        if lead:
            self.put(seconds - lead, priority, head, fixed=min(self.latency, seconds - lead), piece=piece)
            self.put(lead, priority, then, piece=piece)
        else:
            self.put(seconds, priority, then, fixed=self.latency, piece=piece)


class Line:
    """A first-come server whose users say on arrival how long they need: their end is known at once, no events.

    That is what the submit thread is: it runs ahead of the GPU and nobody overtakes on it.
    """

    def __init__(self, clock: Clock):
        self.clock, self.free, self.busy_s = clock, 0.0, 0.0

    def reserve(self, seconds: float) -> float:
        """Time at which `seconds` of work, queued now, are done."""
        self.free = max(self.free, self.clock.now) + seconds
        self.busy_s += seconds
        return self.free


def gather_seconds(host: Host, nbytes: float) -> float:
    """Copying scattered pages into pinned memory: threads in parallel, each byte read and written once."""
    return nbytes / min(host.copy_threads * host.thread_bandwidth, host.bandwidth / 2.0)
