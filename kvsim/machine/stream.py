"""The pipeline of one stream, compiled: the machine's queues without SimPy, for a run that shares them with nobody.

The recurrence e[l] = max(e[l-1], fetched[l], launched[l]) + c[l] holds only where no server changes another's speed. A
copy slows the stream, the two directions slow each other, and a demand cuts a prefetch. So this is the next-event loop
of `pipeline` and `links`: six servers, one thread, one process. It keeps their order of events and of additions, and
thus gives the same floats; `pipeline` is the reference, and where the rules are explained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from kvsim.errors import ConfigError
from kvsim.machine.compute import ModelShape, head_seconds, work_seconds
from kvsim.machine.hardware import Hardware
from kvsim.machine.links import DEMAND, PIECE, PREFETCH, WRITE_BACK
from kvsim.machine.pipeline import OVERLAPS
from kvsim.machine.work import MOVES, Record, Work

# The kernels allocate nothing: without counted references their calls take half the time, without wrappers of their own
# for Python the inner ones compile in two thirds.
_ENTRY: Any = {"cache": True, "nogil": True, "_nrt": False}
_INNER: Any = {"_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_entry, _inner = njit(**_ENTRY), njit(**_INNER)
_INF = np.inf
_SERVERS = STREAM, H2D, D2H, READ, WRITE, GATHER = range(6)
_RIVALS = {STREAM: (H2D, D2H), H2D: (D2H,), D2H: (H2D,), READ: (WRITE,), WRITE: (READ,)}  # they slow it while busy
_NOTHING, _COMPUTED, _ARRIVED, _LANDED = range(4)  # what the end of a job means
_MINE, _TIMER = -1, -2  # who has an event, beside the servers
_JOBS = 12  # at most what a layer queues in a step: 4 on h2d, 4 reads, and 1 on each of the others

_COPIES = tuple(move + "_copies" for move in MOVES)


def _table(numbers: str, counts: str) -> np.dtype:
    return np.dtype([(name, "f8") for name in numbers.split()] + [(name, "i8") for name in counts.split()])


# Indices of jobs are -1 for none; times of events are inf for none, and equal ones go by the number of their ticket.
_SERVER = _table(
    "rate latency per_copy submit blocking iops depth slowed alarm stop since speed busy busy_since bytes waited",
    "current first last rival other_rival slows slows_too ticket transfers copies",
)
_JOB = _table("left seconds fixed piece queued copy_bytes copies", "priority then layer next")
_LAYER = _table(" ".join((*MOVES, *_COPIES, "listed launched")), "awaits parts in_flight")
_STATE = _table(
    "now latest thread mine timer layer_submit gather_rate",
    "tickets my_ticket timer_ticket unused live gate issued computed copies_submitted kernels_submitted "
    "staged whole_step lumped layers known_at_start depth",
)


class _Sim(NamedTuple):
    """Everything the kernels read and change."""

    state: np.ndarray  # one row
    servers: np.ndarray
    jobs: np.ndarray
    layers: np.ndarray  # of the model; only the first is used where layers are lumped


@dataclass(frozen=True, slots=True)
class Counts:
    """What one direction of a link has done until `now`."""

    bytes: float
    transfers: int
    copies: int
    busy_s: float
    waited_s: float
    now: float

    def utilisation(self, now: float | None = None) -> float:
        """Share of the time since 0 in which it was busy."""
        now = self.now if now is None else now
        return self.busy_s / now if now else 0.0


class Stream:
    """A `Machine` for one process whose iterations follow each other, with a clock of its own instead of SimPy's.

    Takes every work, hardware and overlap that `Machine` takes, SSD included, and gives the records and counters of
    `Machine(..., alone=True)`. Two processes on one machine, or anything else in simulated time, need `Machine`.
    """

    def __init__(self, hardware: Hardware, shape: ModelShape, overlap: str = "layer", kv_multiplier: float = 1.0):
        if overlap not in OVERLAPS:
            raise ConfigError(f'unknown overlap "{overlap}"', hint=f"use one of {', '.join(OVERLAPS)}")
        self.hardware, self.shape = hardware, shape
        self.overlap, self.kv_multiplier = overlap, kv_multiplier
        tables = _state(hardware, overlap), _servers(hardware), np.zeros(0, _JOB), np.zeros(shape.layers, _LAYER)
        self._sim = _Sim(*tables)

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return float(self._sim.state["now"][0])

    @property
    def events(self) -> int:
        """Events so far: as many as `Machine` would have taken from SimPy."""
        return int(self._sim.state["tickets"][0])

    @property
    def links(self) -> dict[str, Counts]:
        """Per link and direction: bytes, transfers, copies, busy_s, waited_s, utilisation(now)."""
        names = {"link.h2d": H2D, "link.d2h": D2H, "ssd.read": READ, "ssd.write": WRITE}
        return {name: self._counts(self._sim.servers[server]) for name, server in names.items()}

    def iterate(self, work: Work) -> Record:
        """Run one iteration, beginning now. Raises ValueError where an infinite constant keeps it from ending."""
        assert len(work.kv_read) == self.shape.layers, "work and model differ in their number of layers"
        assert work.known in ("start", "layer"), work.known
        seconds = work_seconds(self.hardware.gpu, self.shape, work, self.kv_multiplier)
        head = float(head_seconds(self.hardware.gpu, self.shape, work.sequences))
        ends, start = np.empty(len(seconds)), self.now
        self._ask(work)
        self._make_room(_JOBS * len(seconds))
        compute, stall, submit = _iterate(self._sim, seconds, float(seconds.sum()), head, ends)
        return Record(start, self.now, compute, stall, submit, 0.0, ends)

    def finish(self) -> None:
        """Let all transfers end. The clock stops where SimPy's would: at the last timeout, be it overtaken."""
        _run(self._sim)
        self._sim.state["now"] = self._sim.state["latest"]

    def _ask(self, work: Work) -> None:
        """Write down what an iteration moves. With "step" and "none", and if nothing moves, layers are lumped."""
        nbytes = np.array([getattr(work, move) for move in MOVES])
        copies = np.array([getattr(work, name) for name in _COPIES])
        copies, awaits = np.where(nbytes > 0, np.maximum(copies, 1.0), 0.0), work.awaits
        lumped = self.overlap != "layer" or not (nbytes.any() or self._moving())
        if lumped:
            nbytes, copies = nbytes.sum(1, keepdims=True), copies.sum(1, keepdims=True)
            awaits = np.array([awaits.any()])
        state, rows = self._sim.state[0], self._sim.layers[: nbytes.shape[1]]
        for names, values in ((MOVES, nbytes), (_COPIES, copies)):
            for name, value in zip(names, values, strict=True):
                rows[name] = value
        rows["awaits"] = awaits
        state["lumped"], state["layers"] = lumped, len(rows)
        state["known_at_start"] = lumped or work.known == "start"
        state["depth"] = 1 if lumped else int(self.hardware.gpu.staging_layers)

    def _moving(self) -> bool:
        """Do transfers of iterations before go on?"""
        return bool((self._sim.servers["current"][H2D : WRITE + 1] >= 0).any() or self._sim.layers["in_flight"].any())

    def _make_room(self, more: int) -> None:
        """See to it that `more` jobs fit beside those that are queued."""
        state, jobs = self._sim.state, self._sim.jobs
        if len(jobs) - state["live"][0] >= more:
            return
        new = np.zeros(len(jobs) + max(more, len(jobs)), _JOB)
        new["next"] = np.arange(1, len(new) + 1)
        new[: len(jobs)] = jobs
        new["next"][-1], state["unused"] = state["unused"][0], len(jobs)
        self._sim = self._sim._replace(jobs=new)

    def _counts(self, server: Any) -> Counts:
        busy = server["busy"] + (self.now - server["busy_since"] if server["current"] >= 0 else 0.0)
        sums = float(server["bytes"]), int(server["transfers"]), int(server["copies"])
        return Counts(*sums, float(busy), float(server["waited"]), self.now)


def compiled() -> bool:
    """Is the pipeline in numba's cache on disk, so that a first call need not compile (ten seconds)?"""
    return any(Path(_iterate.stats.cache_path).glob("stream._iterate-*.nbi"))


def _state(hardware: Hardware, overlap: str) -> np.ndarray:
    """The state before the first iteration."""
    state, host = np.zeros(1, _STATE), hardware.host
    state["mine"] = state["timer"] = _INF
    state["unused"] = state["gate"] = -1
    state["layer_submit"] = hardware.cpu.layer_submit
    state["gather_rate"] = min(host.copy_threads * host.thread_bandwidth, host.bandwidth / 2.0)
    state["staged"], state["whole_step"] = host.copies == "staged", overlap == "step"
    return state


def _servers(hardware: Hardware) -> np.ndarray:
    """The servers, idle, with their constants."""
    servers, ssd = np.zeros(len(_SERVERS), _SERVER), hardware.ssd
    servers["current"] = servers["first"] = servers["last"] = -1
    servers["alarm"], servers["speed"] = _INF, 1.0
    pageable = hardware.host.copies == "pageable"
    for server, link in ((H2D, hardware.h2d), (D2H, hardware.d2h)):
        rate = link.pageable_bandwidth if pageable else link.bandwidth
        servers["rate"][server], servers["blocking"][server] = rate, 1.0 / rate if pageable else 0.0
        for name in ("latency", "per_copy", "submit"):
            servers[name][server] = getattr(link, name)
    servers["rate"][[READ, WRITE]] = ssd.read_bandwidth, ssd.write_bandwidth
    servers["latency"][[READ, WRITE]] = ssd.read_latency, ssd.write_latency
    servers["iops"][[READ, WRITE]] = ssd.read_iops, ssd.write_iops
    servers["depth"][[READ, WRITE]] = ssd.queue_depth
    stream = 1.0 / (1.0 + hardware.gpu.copy_slowdown)
    servers["slowed"] = stream, hardware.h2d.duplex, hardware.d2h.duplex, ssd.mixed, ssd.mixed, 1.0
    for name in ("rival", "other_rival", "slows", "slows_too"):
        servers[name] = -1
    for server, rivals in _RIVALS.items():
        if servers["slowed"][server] < 1.0:
            for rival, name in zip(rivals, ("rival", "other_rival"), strict=False):
                servers[name][server] = rival
                servers["slows" if servers["slows"][rival] < 0 else "slows_too"][rival] = server
    return servers


# --- one iteration: `pipeline._Step` -------------------------------------------------------------------------


@_entry
def _iterate(sim, seconds, total, head, ends):
    """Run one iteration; fills `ends` with the end of each layer. Returns seconds of compute, stall and submit.

    `total`: sum of `seconds`, as NumPy adds.
    """
    state = sim.state[0]
    compute = stall = submit = 0.0
    _start(sim)
    _advance(sim)
    for layer in range(state.layers):
        late = sim.layers[layer].launched - state.now
        if late > 0:
            _ask(state, late)
            _wait(sim)
            submit += late
        if not state.whole_step:
            stall += _pages(sim, layer)
        started = state.now
        if state.lumped:
            _submitted(sim, seconds, started, ends)
            span = ends[-1] - started
            compute += _compute(sim, span)
            stretch = (state.now - started) / span if span else 1.0
            for i in range(len(ends)):
                ends[i] = started + (ends[i] - started) * stretch
            waited = span - total
            submit, compute = submit + waited, compute - waited
        else:
            compute += _compute(sim, seconds[layer])
            ends[layer] = state.now
        state.computed = layer + 1
        _spill(sim, layer)
        if not state.lumped:
            _prefetch(sim, layer)
        _advance(sim)
    if state.whole_step:
        stall += _pages(sim, 0)
    if state.lumped:
        _prefetch(sim, 0)
    if head:
        compute += _compute(sim, head)
    return compute, stall, submit


@_inner
def _start(sim):
    state = sim.state[0]
    state.timer, state.gate = _INF, -1
    state.issued = state.computed = state.copies_submitted = state.kernels_submitted = 0
    for layer in range(state.layers):
        sim.layers[layer].parts, sim.layers[layer].listed = 0, 0.0


@_inner
def _submitted(sim, seconds, start, ends):
    """End of each layer where only the submit thread holds it up: e[l] = max(e[l-1], launched[l]) + c[l]."""
    through, most, first, each = 0.0, -_INF, sim.layers[0].launched, sim.state[0].layer_submit
    for i in range(len(seconds)):
        through += seconds[i]
        most = max(most, max(first + each * i, start) - through + seconds[i])
        ends[i] = most + through


@_inner
def _compute(sim, seconds):
    """The stream computes; returns how long it took."""
    state = sim.state[0]
    asked = state.now
    _put(sim, STREAM, _job(sim, seconds, DEMAND, _COMPUTED, 0))
    _wait(sim)
    return state.now - asked


@_inner
def _fetches(row):
    return row.fetch_host + row.fetch_ssd > 0


@_inner
def _ready(sim, layer):
    """Are all pages of the layer on the GPU, late prefetches among them where the layer reads those?"""
    row = sim.layers[layer]
    if _fetches(row) and (sim.state[0].issued <= layer or row.parts):
        return False
    return not (row.awaits and row.in_flight)


@_inner
def _pages(sim, layer):
    """Wait until the pages of a layer are on the GPU; returns how long."""
    state = sim.state[0]
    asked = state.now
    if not _ready(sim, layer):
        state.gate = layer
        _wait(sim)
    return state.now - asked


@_inner
def _open(sim):
    """Let the stream go on if what it waits for has come."""
    state = sim.state[0]
    if state.gate >= 0 and _ready(sim, state.gate):
        state.gate = -1
        _ask(state, 0.0)


@_inner
def _reserve(state, seconds):
    """Time at which the submit thread has done `seconds` of work, queued now."""
    state.thread = max(state.thread, state.now) + seconds
    return state.thread


@_inner
def _advance(sim):
    """Give the submit thread what is known by now, and start the fetches that nothing holds back."""
    state = sim.state[0]
    ahead = state.depth if state.known_at_start else 1
    while state.kernels_submitted < state.layers:
        while state.copies_submitted < min(state.layers, state.kernels_submitted + ahead):
            layer = state.copies_submitted
            if _fetches(sim.layers[layer]) and not state.known_at_start and state.computed < layer:
                _issue(sim)
                return
            _submit_copies(sim, layer)
            state.copies_submitted += 1
        _submit_kernels(sim, state.kernels_submitted)
        state.kernels_submitted += 1
    _issue(sim)


@_inner
def _submit_copies(sim, layer):
    state, row, h2d = sim.state[0], sim.layers[layer], sim.servers[H2D]
    if _fetches(row):
        copies = min(1.0, row.fetch_host_copies) if state.staged else row.fetch_host_copies
        row.listed = _reserve(state, (row.fetch_ssd_copies + copies) * h2d.submit)
        if h2d.blocking:
            _reserve(state, (row.fetch_host + row.fetch_ssd) * h2d.blocking)


@_inner
def _submit_kernels(sim, layer):
    state, row, h2d, d2h = sim.state[0], sim.layers[layer], sim.servers[H2D], sim.servers[D2H]
    row.launched = _reserve(state, state.layer_submit)
    rest = (len(sim.layers) - 1) * state.layer_submit if state.lumped else 0.0
    spills = row.spill_host_copies * d2h.submit + row.spill_host * d2h.blocking
    ahead = (row.prefetch_host_copies + row.prefetch_ssd_copies) * h2d.submit
    _reserve(state, rest + spills + ahead)


@_inner
def _issue(sim):
    """Start, in order, the fetches that are submitted and have a staging buffer."""
    state = sim.state[0]
    while state.issued < min(state.copies_submitted, state.computed + state.depth):
        late = sim.layers[state.issued].listed - state.now
        if late > 0:
            if state.timer == _INF:
                state.timer, state.timer_ticket = _after(state, late)
            return
        _fetch(sim, state.issued)
        state.issued += 1


@_inner
def _fetch(sim, layer):
    state, row = sim.state[0], sim.layers[layer]
    priority = PREFETCH if state.known_at_start else DEMAND
    if row.fetch_host:
        row.parts += 1
        if state.staged:
            job = _job(sim, row.fetch_host / state.gather_rate, priority, _ARRIVED, layer)
            _then_copy(sim, job, row.fetch_host, 1.0)
            _put(sim, GATHER, job)
        else:
            _copy(sim, H2D, row.fetch_host, row.fetch_host_copies, priority, _ARRIVED, layer)
    if row.fetch_ssd:
        row.parts += _through_host(sim, row.fetch_ssd, row.fetch_ssd_copies, priority, _ARRIVED, layer)


@_inner
def _spill(sim, layer):
    """Write back behind everything urgent; nobody waits."""
    row, write = sim.layers[layer], sim.servers[WRITE]
    if row.spill_host:
        _copy(sim, D2H, row.spill_host, row.spill_host_copies, WRITE_BACK, _NOTHING, layer)
    if row.spill_ssd:
        _count(write, row.spill_ssd, row.spill_ssd_copies)
        job = _job(sim, _block_seconds(write, row.spill_ssd, row.spill_ssd_copies), WRITE_BACK, _NOTHING, layer)
        _cuttable(sim, job, write.latency, write.rate)
        _put(sim, WRITE, job)


@_inner
def _prefetch(sim, layer):
    """Send for what a later iteration will want."""
    row = sim.layers[layer]
    if row.prefetch_host:
        row.in_flight += 1
        _copy(sim, H2D, row.prefetch_host, row.prefetch_host_copies, PREFETCH, _LANDED, layer)
    if row.prefetch_ssd:
        row.in_flight += _through_host(sim, row.prefetch_ssd, row.prefetch_ssd_copies, PREFETCH, _LANDED, layer)


@_inner
def _count(server, nbytes, copies):
    server.bytes += nbytes
    server.transfers += 1
    server.copies += int(copies)


@_inner
def _copy(sim, engine, nbytes, copies, priority, then, layer):
    """`links.Engine.move`."""
    server = sim.servers[engine]
    _count(server, nbytes, copies)
    fixed = server.latency + copies * server.per_copy
    job = _job(sim, fixed + nbytes / server.rate, priority, then, layer)
    _cuttable(sim, job, fixed, server.rate)
    _put(sim, engine, job)


@_inner
def _block_seconds(ssd, nbytes, blocks):
    """`links.SsdEngine.seconds`."""
    block, depth = nbytes / blocks, min(blocks, ssd.depth)
    slowest = max(block / ssd.rate, 1.0 / ssd.iops, (ssd.latency + block / ssd.rate) / depth)
    steady = nbytes / (block / slowest) if slowest else 0.0
    return max(ssd.latency + nbytes / ssd.rate, steady)


@_inner
def _through_host(sim, nbytes, blocks, priority, then, layer):
    """`pipeline._Step._through_host`, with `links.SsdEngine.move`: how many jobs end in `then`."""
    read, link = sim.servers[READ], sim.servers[H2D]
    _count(read, nbytes, blocks)
    seconds = _block_seconds(read, nbytes, blocks)
    reading = seconds - (read.latency + nbytes / blocks / read.rate)
    lead = max(0.0, min(reading, (1 - 1 / blocks) * (blocks * link.per_copy + nbytes / link.rate)))
    job = _job(sim, seconds - lead, priority, then, layer)
    _cuttable(sim, job, min(read.latency, seconds - lead) if lead else read.latency, read.rate)
    _then_copy(sim, job, nbytes, blocks)
    _put(sim, READ, job)
    if not lead:
        return 1
    job = _job(sim, lead, priority, then, layer)
    _cuttable(sim, job, 0.0, read.rate)
    _put(sim, READ, job)
    return 2


# --- jobs and servers: `links.Server` ------------------------------------------------------------------------


@_inner
def _job(sim, seconds, priority, then, layer):
    """A new job in one piece."""
    state, index = sim.state[0], sim.state[0].unused
    job = sim.jobs[index]
    state.unused, state.live = job.next, state.live + 1
    job.left = job.seconds = seconds
    job.fixed = job.piece = job.copy_bytes = job.copies = 0.0
    job.queued, job.priority, job.then, job.layer, job.next = state.now, priority, then, layer, -1
    return index


@_inner
def _cuttable(sim, index, fixed, rate):
    """The job may be cut after its fixed part, at the end of a piece."""
    sim.jobs[index].fixed, sim.jobs[index].piece = fixed, PIECE / rate


@_inner
def _then_copy(sim, index, nbytes, copies):
    """A copy to the GPU follows the job, and what the job's end means is meant of the copy's."""
    sim.jobs[index].copy_bytes, sim.jobs[index].copies = nbytes, copies


@_inner
def _next_cut(job):
    moved = job.seconds - job.left - job.fixed
    pieces = max(1.0, -(-moved // job.piece))
    return max(0.0, job.seconds - job.fixed - pieces * job.piece)


@_inner
def _put(sim, who, index):
    server, job = sim.servers[who], sim.jobs[index]
    if server.current < 0:
        _switch(sim, who, index)
        return
    _queue(sim, server, index, False)
    current = sim.jobs[server.current]
    if job.priority < current.priority and current.piece and not server.stop:
        _settle(sim, who)
        server.stop = _next_cut(current)
        if server.stop:
            _arm(sim, who)


@_inner
def _queue(sim, server, index, cut):
    """Queue a job behind those as urgent as itself; before them if it was `cut` off."""
    jobs = sim.jobs
    priority, before, after = jobs[index].priority, -1, server.first
    if after >= 0 and not cut and priority >= jobs[server.last].priority:
        before, after = server.last, -1
    while after >= 0 and (jobs[after].priority < priority or (jobs[after].priority == priority and not cut)):
        before, after = after, jobs[after].next
    jobs[index].next = after
    if after < 0:
        server.last = index
    if before < 0:
        server.first = index
    else:
        jobs[before].next = index


@_inner
def _switch(sim, who, index):
    """Serve a job now, or fall idle (-1); neighbours whose speed depends on that are told."""
    server, now = sim.servers[who], sim.state[0].now
    changed = (server.current >= 0) != (index >= 0)
    if changed:
        _settle(sim, server.slows)
        _settle(sim, server.slows_too)
    server.current = index
    if index >= 0:
        server.waited += now - sim.jobs[index].queued
        server.since, server.stop, server.speed = now, 0.0, _pace(sim.servers, who)
        _arm(sim, who)
    else:
        server.alarm = _INF
    if changed:
        if index >= 0:
            server.busy_since = now
        else:
            server.busy += now - server.busy_since
        _repace(sim, server.slows)
        _repace(sim, server.slows_too)


@_inner
def _is_busy(servers, who):
    return who >= 0 and servers[who].current >= 0


@_inner
def _pace(servers, who):
    server = servers[who]
    return server.slowed if _is_busy(servers, server.rival) or _is_busy(servers, server.other_rival) else 1.0


@_inner
def _settle(sim, who):
    """Bring what is left of the current job up to date."""
    if _is_busy(sim.servers, who):
        server, now = sim.servers[who], sim.state[0].now
        job = sim.jobs[server.current]
        job.left = max(server.stop, job.left - (now - server.since) * server.speed)
        server.since = now


@_inner
def _repace(sim, who):
    if _is_busy(sim.servers, who):
        server, pace = sim.servers[who], _pace(sim.servers, who)
        if pace != server.speed:
            server.speed = pace
            _arm(sim, who)


@_inner
def _arm(sim, who):
    server = sim.servers[who]
    left = sim.jobs[server.current].left
    server.alarm, server.ticket = _after(sim.state[0], (left - server.stop) / server.speed)


@_inner
def _wake(sim, who):
    """The current job reached its end, or the piece at which it gives way."""
    server, index, state = sim.servers[who], sim.servers[who].current, sim.state[0]
    job = sim.jobs[index]
    job.left = server.stop
    cut = job.left > 0
    if cut:
        job.queued = state.now
        _queue(sim, server, index, True)
    first = server.first
    if first >= 0:
        server.first = sim.jobs[first].next
        if server.first < 0:
            server.last = -1
    _switch(sim, who, first)
    if not cut:
        then, layer, nbytes, copies, priority = job.then, job.layer, job.copy_bytes, job.copies, job.priority
        job.next, state.unused, state.live = state.unused, index, state.live - 1
        if nbytes:
            _copy(sim, H2D, nbytes, copies, priority, then, layer)
        else:
            _end(sim, then, layer)


@_inner
def _end(sim, then, layer):
    if then == _COMPUTED:
        _ask(sim.state[0], 0.0)
    elif then == _ARRIVED:
        sim.layers[layer].parts -= 1
        _open(sim)
    elif then == _LANDED:
        sim.layers[layer].in_flight -= 1
        _open(sim)


# --- events --------------------------------------------------------------------------------------------------


@_inner
def _after(state, seconds):
    """Time and number of an event."""
    state.tickets += 1
    time = state.now + seconds
    state.latest = max(state.latest, time)
    return time, state.tickets


@_inner
def _ask(state, seconds):
    """The process goes on then."""
    state.mine, state.my_ticket = _after(state, seconds)


@_inner
def _wait(sim):
    """Until the process goes on."""
    if not _run(sim):
        raise ValueError("the iteration never ends")


@_entry
def _run(sim):
    """Let events happen until the process goes on; False if nothing is left that could wake it."""
    state, servers = sim.state[0], sim.servers
    while True:
        time, ticket, who = state.mine, state.my_ticket, _MINE
        if state.timer < time or (state.timer == time and state.timer_ticket < ticket):
            time, ticket, who = state.timer, state.timer_ticket, _TIMER
        for i in range(len(servers)):
            if servers[i].alarm < time or (servers[i].alarm == time and servers[i].ticket < ticket):
                time, ticket, who = servers[i].alarm, servers[i].ticket, i
        if time == _INF:
            return False
        state.now = time
        if who == _MINE:
            state.mine = _INF
            return True
        if who == _TIMER:
            state.timer = _INF
            _issue(sim)
        else:
            _wake(sim, who)
