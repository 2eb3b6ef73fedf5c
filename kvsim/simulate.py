"""run(): trace -> cache -> machine -> SimPy -> Result. Start reading here.

The serving loop (`_serve`) asks every running replay for its next outcome, hands the bytes to the machine, and
writes down when things happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsim import results
from kvsim.cache.outcome import Outcome
from kvsim.config import RunConfig, run_config
from kvsim.errors import KvsimError
from kvsim.machine.precision import PLAIN, recode_seconds
from kvsim.machine.work import Record
from kvsim.manifest import Crowd, identify, manifest
from kvsim.moves import Moves, plan_writer
from kvsim.plan import PlanWriter
from kvsim.replay import Replay, Setting, prepare
from kvsim.results import Recorder, Result
from kvsim.trace.access import Access, Trace

if TYPE_CHECKING:
    from kvsim.machine import Machine, Work
    from kvsim.machine.memory import Memory
    from kvsim.machine.stream import Stream

Progress = Callable[[int, int], None]
LOADING, COMPILING = 10_000, 300_000  # layers times steps from which compiled code pays: loading it, and making it
_SUMS = ("weight", "attended", "hit", "used_pages", "found_pages")


def run(
    trace: Trace,
    config: RunConfig | None = None,
    *,
    ceiling: bool = True,
    progress: Progress | None = None,
    export_plan: Path | None = None,
    **settings: Any,
) -> Result:
    """Replay a trace against a policy on a machine.

    `config`, or its keys as keywords: `run(trace, policy="h2o(recent=64)", budget="20%")`. `ceiling`: in the lossy
    regime, compute the step ceiling and what `kvsim.cache.quality` measures too. `progress(done, total)` is told about
    decode steps. `export_plan`: also write the movement plan (offload regime, one request, decisions by layer) to this
    file. Raises ConfigError, PolicyError, TraceError.
    """
    import simpy

    from kvsim.machine.memory import Memory

    setting = prepare(trace, config or run_config(settings))
    identity = identify(setting)
    env = simpy.Environment()
    machine = _machine(env, setting)
    with plan_writer(export_plan, setting) if export_plan else nullcontext() as plan:
        books = _Books(setting, plan)
        memory = Memory(env, setting.memory)
        env.process(_serve(machine, memory, setting, books, ceiling, progress or (lambda done, total: None)))
        try:
            env.run()
        except KvsimError as copied:  # SimPy raises a copy; the original has all three lines
            raise (copied.__cause__ if isinstance(copied.__cause__, KvsimError) else copied) from None
    machine.finish()
    tables = books.tables(machine, machine.now)
    crowd = Crowd(books.peak, books.most, books.waited)
    made = manifest(setting, identity, tables, crowd, events=machine.events, state_bytes=books.state_bytes)
    return Result(tables, made, {"policy_s": books.policy_s})


def _machine(env: Any, setting: Setting) -> Machine | Stream:
    """The clock of this run, which is the only process on it: compiled where that is the sooner done.

    Both give the same floats, as tests assert; SimPy is the reference.
    """
    from kvsim.machine import Machine

    work = setting.shape.layers * sum(r.output_tokens for r in setting.trace.requests())
    if work > LOADING:
        from kvsim.machine.stream import Stream, compiled

        if compiled() or work > COMPILING:
            return Stream(setting.hardware, setting.shape, setting.config.overlap)
    return Machine(env, setting.hardware, setting.shape, overlap=setting.config.overlap, alone=True)


@dataclass
class _Running:
    """A request in the serving loop, with what is added up over its decode steps."""

    replay: Replay
    steps: Iterator[tuple[Access, Outcome]]
    admitted: float
    moves: Moves | None = None
    first_token: float = 0.0
    last_token: float = 0.0
    decoded: int = 0
    held: float = 0.0  # bytes on the GPU in its latest step
    kept: float = 0.0  # and after it
    left: float = 0.0  # pages per lane after it
    peak: float = 0.0
    reserved: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_SUMS, 0.0))


def _serve(
    machine: Machine | Stream, memory: Memory, setting: Setting, books: _Books, ceiling: bool, progress: Progress
):
    """Iteration-level batching: admit while there is room, prefill alone, then one decode step of all that runs."""
    requests = setting.trace.requests()
    total, done = sum(r.output_tokens for r in requests), 0
    watched: dict[str, Any] = {"ceiling": ceiling, "quality": ceiling, "record": books.plan is not None}
    waiting = (Replay(setting, request, **watched) for request in requests)
    head = next(waiting, None)
    running: list[_Running] = []
    while head or running:
        while head and len(running) < setting.config.concurrency:
            if running and not memory.fits(head.reserves()):
                books.waited = True
                break
            yield from memory.reserve(need := head.reserves())
            new = _Running(head, iter(head), machine.now, Moves(books.plan, head) if books.plan else None)
            head = next(waiting, None)
            yield from _iterate(machine, setting, books, [new])
            books.together([new], running)
            new.first_token = new.last_token = machine.now
            new.reserved = new.replay.reserves(new.left)  # the prompt has been cut to what the cache may hold
            yield from memory.release(need, new.reserved)
            running.append(new)
        finished = yield from _iterate(machine, setting, books, running)
        books.together([r for r in running if r not in finished], [])
        done += len(running) - len(finished)
        progress(done, total)
        for r in finished:
            books.retire(r)
            running.remove(r)
            yield from memory.release(r.reserved)


def _iterate(machine: Machine | Stream, setting: Setting, books: _Books, running: list[_Running]):
    """One step of every running request, on the machine together; returns those that had none left."""
    finished, stepped = [], []
    for r in running:
        step = next(r.steps, None)
        if step is None:
            finished.append(r)
        else:
            stepped.append((r, *step))
    if stepped:
        asked = machine.iterate(_work(setting, stepped))
        record = asked if isinstance(asked, Record) else (yield from asked)
        for r, a, o in stepped:
            books.step(r, a, o, record)
            if r.moves:
                r.moves.add(a, o)
    return finished


def _work(setting: Setting, stepped: list[tuple[_Running, Access, Outcome]]) -> Work:
    """What one iteration asks of the machine: the trace's pages as bytes and copies of the timed model's layers."""
    from kvsim.machine import Work

    shape, prefill = setting.shape, stepped[0][1].prefill
    work = Work.idle(
        shape.layers,
        queries=sum(a.tokens for _, a, _ in stepped) if prefill else len(stepped),
        sequences=len(stepped),
        prefill=prefill,
        known="start" if setting.demand is not None and setting.demand.kind == "all" else "layer",
        awaits=False,
    )
    for r, a, o in stepped:
        heads = r.replay.lanes[1]
        of = setting.model_layers(r.replay.lanes)
        page = setting.trace.page_size * shape.kv_token_bytes / heads  # one table lane's page in one of those layers
        apart = r.replay.cache.policy.granularity == "head"  # each head's page is a copy of its own
        copies = max(1.0, shape.kv_heads / heads) if apart else 1.0
        runs = o.fetched_runs if setting.hardware.host.merge else o.fetched
        work.awaits |= o.awaits[of]
        work.kv_read += a.tokens * shape.kv_token_bytes if prefill else page * setting.stored(o.read, heads)[of]
        ahead = o.prefetched_runs if setting.hardware.host.merge else o.prefetched
        moves = {"fetch": (o.fetched, runs), "spill": (o.spilled, o.spilled), "prefetch": (o.prefetched, ahead)}
        for tier, name in () if setting.lossy else ((1, "host"), (2, "ssd")):  # nothing moves where pages are gone
            for move, (moved, parts) in moves.items():
                getattr(work, f"{move}_{name}")[:] += page * setting.ratio(name) * moved[tier][of]
                getattr(work, f"{move}_{name}_copies")[:] += copies * parts[tier][of]
        work.rebuild += setting.trace.page_size * o.rebuilt[of] / heads  # a token's GEMMs serve all its heads
        work.recode_s += _recoding(setting, o, page)[of] + _encoding(setting, a.tokens if prefill else 1)
    work.policy_s = _policy_seconds(setting, [r.replay for r, a, _ in stepped if r.replay.decides(a)])
    return work


def _recoding(setting: Setting, o: Outcome, page: float) -> np.ndarray:
    """Seconds by layer of the table: pages that cross between the GPU and a tier of another format."""
    gpu, value_bytes = setting.hardware.gpu, setting.shape.kv_bytes
    forms, seconds = setting.formats, np.zeros(len(o.read))
    for tier, name in ((1, "host"), (2, "ssd")):
        moved = o.fetched[tier] + o.prefetched[tier] + (o.spilled[1] if name == "host" else 0)
        seconds += recode_seconds(forms[name], forms["gpu"], page * moved, value_bytes, gpu.kv_bandwidth)
    return seconds


def _encoding(setting: Setting, tokens: int) -> float:
    """Seconds in each layer that new tokens take to be stored in the GPU's format."""
    shape, bandwidth = setting.shape, setting.hardware.gpu.kv_bandwidth
    return recode_seconds(PLAIN, setting.formats["gpu"], tokens * shape.kv_token_bytes, shape.kv_bytes, bandwidth)


def _policy_seconds(setting: Setting, deciding: list[Replay]) -> float:
    """Modelled cost of choosing: one small kernel per layer for the batch, and a pass over the policy's state.

    A fixed model: 8 bytes per page and lane for key and score, 4 for each private column.
    """
    shape, gpu = setting.shape, setting.hardware.gpu
    state = 0.0
    for replay in deciding:
        policy = replay.cache.policy
        lanes = shape.layers * (shape.kv_heads if policy.granularity == "head" else 1)
        state += lanes * int(replay.cache.budget.max()) * (8 + 4 * len(policy.columns))
    return shape.layers * gpu.kernel_time + state / gpu.weight_bandwidth if deciding else 0.0


def _lost(replay: Replay) -> dict[str, float]:
    """What `Quality` found in the latest step; zeros and NaN where nobody watched."""
    q = replay.quality
    names = ("gold_needed", "gold_lost", "gold_gone")
    return {
        **{name: getattr(q, name) if q else 0 for name in names},
        "output_error": q.output_error if q else float("nan"),
        "stranded_tokens": replay.stranded,
    }


class _Books:
    """The tables of a run while it goes on."""

    def __init__(self, setting: Setting, plan: PlanWriter | None = None):
        self.setting, self.plan = setting, plan
        self.steps, self.requests = Recorder(results.STEPS), Recorder(results.REQUESTS)
        layers, heads = setting.trace.lanes
        self.lanes = {name: np.zeros(layers * heads) for name in _SUMS}
        self.peak = 0.0  # bytes on the GPU, over all requests that run
        self.most = 0  # requests that ran together
        self.waited = False  # did a request wait for memory that others held?
        self.policy_s = 0.0  # wall time spent in the policies
        self.state_bytes = 0  # that the policy keeps per page

    def together(self, stepped: list[_Running], others: list[_Running]) -> None:
        """What the GPU held during an iteration: pages of those that took a step, and what the others keep."""
        self.peak = max(self.peak, sum(r.held for r in stepped) + sum(r.kept for r in others))
        self.most = max(self.most, len(stepped) + len(others))

    def step(self, r: _Running, a: Access, o: Outcome, when: Record) -> None:
        lane, heads = self.setting.lane_bytes(r.replay.lanes), r.replay.lanes[1]
        found = dict(zip(_SUMS, (o.total, o.attended, o.hit, o.used, o.found), strict=True))
        sums = {name: float(value.sum(dtype=np.float64)) for name, value in found.items()}
        if not a.prefill:
            r.decoded += 1
            for name in _SUMS:
                self.lanes[name] += found[name]
                r.sums[name] += sums[name]
        resident, stored = o.resident.reshape(-1, heads).sum(1), self.setting.stored
        host, ssd = (self.setting.ratio(name) for name in ("host", "ssd"))
        r.last_token = when.end_s
        r.held, r.kept, r.left = self._held(r, o, lane), float(lane @ stored(resident, heads)), float(o.resident.mean())
        r.peak = max(r.peak, r.held)
        self.steps.add(
            request=r.replay.request.id,
            step=a.step,
            start_s=when.start_s,
            end_s=when.end_s,
            compute_s=when.compute_s,
            stall_s=when.stall_s,
            submit_s=when.submit_s,
            ceiling=r.replay.ceiling.sum(),
            even_ceiling=r.replay.even_ceiling.sum(),
            resident_pages=resident.sum(),
            resident_bytes=r.kept,
            held_bytes=r.held,
            read_bytes=lane @ stored(o.read, heads),
            fetched_host_bytes=lane @ o.fetched[1] * host,
            fetched_ssd_bytes=lane @ o.fetched[2] * ssd,
            prefetched_host_bytes=lane @ o.prefetched[1] * host,
            prefetched_ssd_bytes=lane @ o.prefetched[2] * ssd,
            rebuilt_pages=o.rebuilt.sum(),
            spilled_host_bytes=lane @ o.spilled[1] * host,
            spilled_ssd_bytes=lane @ o.spilled[2] * ssd,
            dropped_pages=o.dropped,
            **_lost(r.replay),
            **sums,
        )

    def _held(self, r: _Running, o: Outcome, lane: np.ndarray) -> float:
        """Bytes on the GPU while attention ran. Fetched pages pass through the staging buffers of a few layers."""
        fetched = o.fetched.sum(0)
        kept = o.held.reshape(-1, r.replay.lanes[1]).sum(1) - fetched  # rebuilt pages are made in place
        of = self.setting.model_layers(r.replay.lanes)
        staged = (lane * fetched / np.bincount(of, minlength=len(lane)))[of]  # per layer of the timed model
        staged = staged * self.setting.ratio("gpu")
        depth = int(self.setting.hardware.gpu.staging_layers)
        kept = self.setting.stored(kept, r.replay.lanes[1])
        return float(lane @ kept + np.sort(staged)[-depth:].sum())

    def retire(self, r: _Running) -> None:
        request, sums = r.replay.request, r.sums
        self.requests.add(
            request=request.id,
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
            admitted_s=r.admitted,
            first_token_s=r.first_token,
            finish_s=r.last_token,
            ttft_s=r.first_token - r.admitted,
            tpot_s=(r.last_token - r.first_token) / max(1, r.decoded),
            recall=results.ratio(sums["attended"], sums["weight"]),
            page_hit_rate=results.ratio(sums["found_pages"], sums["used_pages"]),
            budget_pages=r.replay.budget,
            request_pages=request.stride,
            peak_bytes=r.peak,
        )
        self.policy_s += r.replay.cache.policy_seconds
        cache = r.replay.cache
        self.state_bytes = max(self.state_bytes, cache.view.state_bytes + cache.policy.state_bytes)

    def tables(self, machine: Machine | Stream, now: float) -> dict[str, dict[str, np.ndarray]]:
        lanes, links = Recorder(results.LANES), Recorder(results.LINKS)
        heads = self.setting.trace.lanes[1]
        for i in range(len(self.lanes["weight"])):
            lanes.add(layer=i // heads, kv_head=i % heads, **{name: sums[i] for name, sums in self.lanes.items()})
        for name, server in machine.links.items():
            links.add(
                link="ssd" if name.startswith("ssd") else "pcie",
                direction=name.rpartition(".")[2],
                bytes=server.bytes,
                transfers=server.transfers,
                busy_s=server.busy_s,
                waited_s=server.waited_s,
                utilisation=server.utilisation(now),
            )
        recorders = {"steps": self.steps, "requests": self.requests, "lanes": lanes, "links": links}
        return {name: recorder.arrays() for name, recorder in recorders.items()}
