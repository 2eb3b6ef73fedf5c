"""run(): trace -> cache -> machine -> SimPy -> Result. Start reading here.

A request's replay (`Replay`) is the cache's part and knows no time; the serving loop (`_serve`) asks every running replay for
its next outcome, hands the bytes to the machine, and writes down when things happened. What the cache decides never depends
on time, so a comparison of policies alone can skip the machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsim import registry, results
from kvsim.cache import kernels
from kvsim.cache.cache import Cache, Capacity, Outcome
from kvsim.cache.demand import Use, parse_demand, parse_use
from kvsim.config import RunConfig, run_config
from kvsim.errors import ConfigError, KvsimError, PolicyError, TraceError
from kvsim.results import Recorder, Result
from kvsim.trace.access import Access, Request, Trace
from kvsim.units import parse_budget, parse_bytes

if TYPE_CHECKING:
    from kvsim.machine import Hardware, Machine, ModelShape

Progress = Callable[[int, int], None]

CAVEAT = (
    "open loop: attention was recorded with a full cache, so eviction does not change what is attended later; recall is a proxy for quality"
)


@dataclass(frozen=True)
class Setting:
    """A resolved configuration with what it names, loaded: the trace's view, the model that is timed, the predicates."""

    config: RunConfig
    trace: Trace
    hardware: Hardware
    shape: ModelShape | None
    use: Use
    demand: Use | None
    notes: list[str] = field(default_factory=list)

    @property
    def lossy(self) -> bool:
        return self.config.regime == "lossy"

    @property
    def predicate(self) -> Use:
        return self.use if self.lossy or self.demand is None else self.demand

    def policy(self) -> Any:
        """A fresh policy object, with the granularity the run asks for."""
        policy = registry.build(self.config.policy)
        if self.config.granularity:
            policy.granularity = self.config.granularity
        if self.config.regime not in policy.regimes:
            raise PolicyError(f'policy "{self.config.policy}" does not work in the {self.config.regime} regime')
        if missing := [n for n in sorted(policy.needs) if n not in self.trace.manifest.get("provides", ())]:
            raise PolicyError(
                f'policy "{self.config.policy}" needs {", ".join(missing)}, which the trace does not hold',
                where=self.trace.path, hint="capture again with --vectors or --prompt-rows",
            )  # fmt: skip
        return policy

    def page_bytes(self, layers: int, heads: int) -> float:
        """Bytes of one page in one of `layers` x `heads` table lanes, in the model that is timed."""
        if self.shape is None:
            g = self.trace.geometry
            return self.trace.page_size * g.token_bytes * g.layers * g.kv_heads / (layers * heads)
        return self.trace.page_size * self.shape.kv_token_bytes * self.shape.layers / (layers * heads)

    def budget(self, request: Request, shape: tuple[int, int]) -> int:
        """Pages per lane of one request. Raises ConfigError when nothing is left of it."""
        value, basis = parse_budget(self.config.budget)
        pages = value
        if basis == "fraction":
            pages = round(value * request.stride, 9)
        elif basis == "bytes":
            pages = value / (self.page_bytes(*shape) * shape[0] * shape[1])
        if pages < 1:
            raise ConfigError(
                f'a budget of "{self.config.budget}" is less than one page of {self.trace.page_size} tokens per lane '
                f"in request {request.id} ({request.stride} pages)",
                hint="raise the budget",
            )
        return int(pages)


def prepare(trace: Trace, config: RunConfig) -> Setting:
    """Load what a configuration names. Raises ConfigError, PolicyError, TraceError."""
    from kvsim.machine import Hardware

    config = config.resolved()
    assert config.page_size is not None
    if config.requests is not None:
        trace = trace.only(config.requests)
    if not trace.sources:
        raise TraceError("the trace holds no request", where=trace.path)
    use = parse_use(config.use)
    demand = parse_demand(config.demand, use) if config.regime == "offload" else None
    hardware = Hardware.load(config.hardware).with_overrides(config.constants)
    setting = Setting(config, trace.paged(config.page_size), hardware, _shape(trace, config), use, demand)
    setting.policy()
    if config.model:
        setting.notes.append(f"what-if: the attention of {trace.geometry.name}, pages and compute of {setting.shape.name}")  # type: ignore[union-attr]
    if use != Use():
        setting.notes.append(f"a page is used by the predicate use = {config.use}")
    return setting


def _shape(trace: Trace, config: RunConfig) -> ModelShape:
    from kvsim.machine import SHAPES, shape_from_config, shape_from_geometry

    if config.model is None:
        return shape_from_geometry(trace.geometry)
    if config.model in SHAPES:
        return SHAPES[config.model]
    path = Path(config.model)
    path = path / "config.json" if path.is_dir() else path
    try:
        return replace(shape_from_config(json.loads(path.read_text(encoding="utf-8"))), name=path.parent.name or path.stem)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f'cannot read model "{config.model}": {error}', hint=f"give a config.json, or one of {', '.join(SHAPES)}"
        ) from None


class Replay:
    """One request through its cache, step by step. Pages only; no time."""

    def __init__(self, setting: Setting, request: Request, *, ceiling: bool = False, audit: bool = False):
        self.request, self.setting, self._wants_ceiling = request, setting, ceiling
        policy = setting.policy()
        g = setting.trace.lanes
        shape = {"head": g, "layer": (g[0], 1), "token": (1, 1)}[policy.granularity]
        self.budget = setting.budget(request, shape)
        if callable(getattr(policy, "foresee", None)):
            pool = {"head": setting.trace.pool, "layer": "layer", "token": "token"}[policy.granularity]
            policy.foresee(replace(request, pool=pool), setting.predicate)
        c, n = setting.config, setting.config.concurrency
        self.cache = Cache(
            g, request.stride, policy, Capacity(self.budget, self._tier("host", n, shape), self._tier("ssd", n, shape)),
            offload=None if setting.lossy else registry.build(str(c.offload), "offload"),
            use=setting.use, demand=setting.demand, page_size=request.page_size, seed=c.seed, audit=audit,
        )  # fmt: skip
        self.ceiling = np.full(self.cache.rows, np.nan)
        self._accesses = request.accesses()

    def _tier(self, name: str, sharers: int, shape: tuple[int, int]) -> int | None:
        """Pages per lane of a lower tier, shared evenly by the requests that run together."""
        chosen = getattr(self.setting.config, name)
        size = parse_bytes(chosen) if chosen is not None else getattr(self.setting.hardware, name).capacity
        pages = size / sharers / (self.setting.page_bytes(*shape) * shape[0] * shape[1])
        return int(pages) if pages < 2**31 else None

    def __iter__(self) -> Iterator[tuple[Access, Outcome]]:
        """Prefill first; the arrays of an Access are overwritten by the next one."""
        for access in self._accesses:
            outcome = self.cache.access(access)
            if self._wants_ceiling and not access.prefill:
                self._ceiling(access)
            yield access, outcome
        self.cache.audit(access)

    def _ceiling(self, a: Access) -> None:
        """Sum of the budget + 1 largest weights of each full row: nothing that holds `budget` pages can attend to more."""
        group = self.cache.rows // self.cache.lanes
        count = np.repeat(self.cache.budget, group) + 1
        kernels.largest_sum(a.row.reshape(self.cache.rows, -1), a.keys, count, self.ceiling)


@dataclass
class _Running:
    """A request in the serving loop."""

    replay: Replay
    steps: Iterator[tuple[Access, Outcome]]
    admitted: float = 0.0
    first_token: float = 0.0
    peak: int = 0


class _Books:
    """The tables of a run while it goes on."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.steps, self.requests = Recorder(results.STEPS), Recorder(results.REQUESTS)
        layers, heads = setting.trace.lanes
        self.lanes = {name: np.zeros(layers * heads) for name in ("weight", "attended", "hit", "used_pages", "found_pages")}

    def step(self, run: _Running, a: Access, o: Outcome, when: Any) -> None:
        shares = run.replay.cache
        page = self.setting.page_bytes(*shares.shape)
        if not a.prefill:
            for name, value in zip(self.lanes, (o.total, o.attended, o.hit, o.used, o.found), strict=True):
                self.lanes[name] += value
        self.steps.add(
            request=run.replay.request.id, step=a.step, start_s=when.start_s, end_s=when.end_s, compute_s=when.compute_s,
            stall_s=when.stall_s, weight=_sum(o.total), attended=_sum(o.attended), hit=_sum(o.hit), ceiling=run.replay.ceiling.sum(),
            used_pages=o.used.sum(), found_pages=o.found.sum(), resident_pages=o.resident.sum(), read_bytes=page * o.read.sum(),
            fetched_host_bytes=page * o.fetched[1].sum(), fetched_ssd_bytes=page * o.fetched[2].sum(),
            spilled_host_bytes=page * o.spilled[1].sum(), spilled_ssd_bytes=page * o.spilled[2].sum(), dropped_pages=o.dropped,
        )  # fmt: skip
        run.peak = max(run.peak, int(o.resident.sum()))

    def retire(self, run: _Running, now: float) -> None:
        request, cache = run.replay.request, run.replay.cache
        own = [i for i, r in enumerate(self.steps.columns["request"]) if r == request.id and self.steps.columns["step"][i] > 0]
        total = {n: sum(self.steps.columns[n][i] for i in own) for n in ("weight", "attended", "used_pages", "found_pages")}
        self.requests.add(
            request=request.id, prompt_tokens=request.prompt_tokens, output_tokens=request.output_tokens, admitted_s=run.admitted,
            first_token_s=run.first_token, finish_s=now, ttft_s=run.first_token - run.admitted,
            tpot_s=(now - run.first_token) / max(1, len(own)), recall=results._ratio(total["attended"], total["weight"]),
            hit_rate=results._ratio(total["found_pages"], total["used_pages"]), budget_pages=run.replay.budget,
            request_pages=request.stride, peak_pages=run.peak, peak_bytes=run.peak * self.setting.page_bytes(*cache.shape),
        )  # fmt: skip

    def tables(self, links: Sequence[dict[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
        lanes = Recorder(results.LANES)
        heads = self.setting.trace.lanes[1]
        for i in range(len(self.lanes["weight"])):
            lanes.add(layer=i // heads, kv_head=i % heads, **{n: v[i] for n, v in self.lanes.items()})
        table = Recorder(results.LINKS)
        for link in links:
            table.add(**link)
        return {"steps": self.steps.arrays(), "requests": self.requests.arrays(), "lanes": lanes.arrays(), "links": table.arrays()}


def _sum(x: np.ndarray) -> float:
    return float(x.sum(dtype=np.float64))


def run(trace: Trace, config: RunConfig | None = None, *, ceiling: bool = True, progress: Progress | None = None, **settings: Any) -> Result:
    """Replay a trace against a policy on a machine.

    `config`, or its keys as keywords: `run(trace, policy="h2o(recent=64)", budget="20%")`. `ceiling`: also compute the step ceiling.
    `progress(done, total)` is called as decode steps finish. Raises ConfigError, PolicyError, TraceError.
    """
    import simpy

    from kvsim.machine import Machine

    setting = prepare(trace, config or run_config(settings))
    env = simpy.Environment()
    shape, c = setting.shape, setting.config
    assert shape is not None
    machine = Machine(env, setting.hardware, shape, overlap=c.overlap, alone=True)
    books = _Books(setting)
    env.process(_serve(env, machine, setting, books, ceiling, progress or (lambda done, total: None)))
    try:
        env.run()
    except KvsimError as copied:  # SimPy raises a copy; the original has all three lines
        raise (copied.__cause__ if isinstance(copied.__cause__, KvsimError) else copied) from None
    tables = books.tables(_links(machine, env.now))
    return Result(tables, _manifest(setting, tables, machine))


def _links(machine: Machine, now: float) -> list[dict[str, Any]]:
    """One row per link and direction, as in `results.LINKS`."""
    return [
        {
            "link": "ssd" if name.startswith("ssd") else "pcie",
            "direction": name.rpartition(".")[2],
            "bytes": server.bytes,
            "transfers": server.transfers,
            "busy_s": server.busy_s,
            "waited_s": server.waited_s,
            "utilisation": server.utilisation(now),
        }
        for name, server in machine.links.items()
    ]


def _serve(env: Any, machine: Machine, setting: Setting, books: _Books, ceiling: bool, progress: Progress):
    """Iteration-level batching: admit while there is room (prefill alone), then one decode step of everything that runs."""
    waiting = list(reversed(setting.trace.requests()))
    total, done = sum(r.output_tokens for r in waiting), 0
    running: list[_Running] = []
    while waiting or running:
        while waiting and len(running) < setting.config.concurrency:
            replay = Replay(setting, waiting.pop(), ceiling=ceiling)
            new = _Running(replay, iter(replay), env.now)
            yield from _iterate(machine, setting, books, [new])
            new.first_token = env.now
            running.append(new)
        finished = yield from _iterate(machine, setting, books, running)
        done += len(running) - len(finished)
        progress(done, total)
        for r in finished:
            books.retire(r, env.now)
            running.remove(r)


def _iterate(machine: Machine, setting: Setting, books: _Books, running: list[_Running]):
    """One step of every running request, on the machine together; returns those that had none left."""
    finished, stepped = [], []
    for r in running:
        step = next(r.steps, None)
        if step is None:
            finished.append(r)
        else:
            stepped.append((r, *step))
    if stepped:
        work = _work(setting, stepped)
        when = yield from machine.iterate(work)
        for r, a, o in stepped:
            books.step(r, a, o, when)
    return finished


def _work(setting: Setting, stepped: list[tuple[_Running, Access, Outcome]]) -> Any:
    """What one iteration asks of the machine: the trace's pages as bytes and copies of the timed model's layers."""
    from kvsim.machine import Work

    shape, size = setting.shape, setting.trace.page_size
    assert shape is not None
    prefill = stepped[0][1].prefill
    work = Work.idle(
        shape.layers, queries=sum(a.tokens for _, a, _ in stepped) if prefill else len(stepped), sequences=len(stepped), prefill=prefill,
        known="start" if setting.demand is not None and setting.demand.kind == "all" else "layer",
    )  # fmt: skip
    for r, a, o in stepped:
        layers, heads = r.replay.cache.shape
        of = np.arange(shape.layers) * layers // shape.layers  # table layer that stands for each model layer
        page = size * shape.kv_token_bytes / heads  # one table lane's page in one model layer
        copies = max(1.0, shape.kv_heads / heads) if heads > 1 else 1.0  # a page of one head is a copy of its own
        runs = o.fetched_runs if setting.hardware.host.merge else o.fetched
        work.kv_read += a.tokens * shape.kv_token_bytes if prefill else page * o.read[of]
        work.fetch_host += page * o.fetched[1][of]
        work.fetch_host_copies += copies * runs[1][of]
        work.fetch_ssd += page * o.fetched[2][of]
        work.fetch_ssd_copies += copies * runs[2][of]
        work.spill_host += page * o.spilled[1][of]
        work.spill_host_copies += copies * o.spilled[1][of]
        work.spill_ssd += page * o.spilled[2][of]
        work.spill_ssd_copies += copies * o.spilled[2][of]
        work.policy_s += _policy_seconds(setting, r.replay.cache)
    return work


def _policy_seconds(setting: Setting, cache: Cache) -> float:
    """Modelled cost of a decision on the GPU: one small kernel per layer, and one pass over the policy's state of every page.

    A fixed model (design decision 21): 8 bytes per page and lane for key and score, 4 for each private column.
    """
    if not (cache.evicts or cache.selects) or not cache.policy.bounded:
        return 0.0
    shape, gpu = setting.shape, setting.hardware.gpu
    assert shape is not None
    lanes = shape.layers * (shape.kv_heads if cache.shape[1] > 1 else 1)
    state = lanes * int(cache.budget.max()) * (8 + 4 * len(cache.policy.columns))
    return shape.layers * gpu.kernel_time + state / gpu.weight_bandwidth


def _manifest(setting: Setting, tables: dict[str, dict[str, np.ndarray]], machine: Machine) -> dict[str, Any]:
    """How the result was made. Everything here is a function of configuration, trace and code: no clock, no paths."""
    config, policy = setting.config, setting.policy()
    summary = results.summarise(tables)
    notes = list(setting.notes)
    full = int((tables["requests"]["budget_pages"] >= tables["requests"]["request_pages"]).sum())
    if full and policy.bounded:
        notes.append(f"{full} of {len(tables['requests']['request'])} requests fit into the budget whole: there the cache is the full cache")
    over = int(policy.lag) - 1 if setting.lossy else 0
    if over > 0:
        notes.append(f"{config.policy} decides every {policy.lag} steps and may hold {over} pages per lane over the budget; see peak_bytes")
    identity = identify(setting)
    return {
        "schema": results.SCHEMA,
        "id": results.run_id(identity),
        **identity,
        "hardware": {
            "name": setting.hardware.name,
            "constants": {k: [c.value, c.evidence, c.source] for k, c in setting.hardware.constants.items()},
        },
        "model": vars(setting.shape) if setting.shape else {},
        "policy": {
            "name": policy.spec_name,
            "parameters": {f.name: getattr(policy, f.name) for f in fields(policy)},
            "oracle": callable(getattr(policy, "foresee", None)),
            "evidence": policy.evidence,
            "granularity": policy.granularity,
            "rows": policy.rows,
        },
        "budget_basis": {"fraction": "of each request's final length", "pages": "per lane", "bytes": "over all lanes"}[
            parse_budget(config.budget)[1]
        ],
        "budget_bytes": float(np.mean(tables["requests"]["budget_pages"])) * setting.page_bytes(1, 1),
        "evidence": "latency: predicted by the machine model from the constants above; " + CAVEAT,
        "notes": notes,
        "events": int(machine.events),
        "summary": summary,
    }


def identify(setting: Setting) -> dict[str, Any]:
    """What decides a result: configuration, trace content, and the source of policies that are not ours."""
    from kvsim import __version__

    policy = setting.policy()
    return {
        "config": setting.config.model_dump(),
        "trace": {"fingerprint": setting.trace.fingerprint, "name": setting.trace.name, "requests": len(setting.trace.sources)},
        "source": registry.source_hash(policy),
        "kvsim": __version__,
    }
