"""A configuration with everything it names loaded (`Setting`), and one request through its cache (`Replay`).

The cache's part of a run, without time: what a cache decides never depends on when things happen, so comparing
policies alone needs nothing above this module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kvsim import registry, threads
from kvsim.cache import kernels
from kvsim.cache.cache import Cache
from kvsim.cache.demand import Use, parse_demand, parse_use
from kvsim.cache.future import Future
from kvsim.cache.outcome import Outcome
from kvsim.cache.quality import Quality, stranded
from kvsim.cache.tiers import Capacity
from kvsim.cache.view import pages
from kvsim.config import RunConfig
from kvsim.errors import ConfigError, PolicyError, TraceError
from kvsim.machine import SHAPES, Hardware, ModelShape, shape_from_config, shape_from_geometry
from kvsim.machine.compute import gemm_seconds
from kvsim.machine.precision import Format, parse_format
from kvsim.trace.access import VECTORS, Access, Request, Trace
from kvsim.units import parse_budget, parse_bytes

CHUNK = 2048  # tokens, at which the rate of recomputation is stated


@dataclass(frozen=True)
class Setting:
    """A resolved configuration, the trace seen as it asks, the machine and the model that are timed, the predicates."""

    config: RunConfig
    trace: Trace
    hardware: Hardware
    shape: ModelShape
    use: Use
    demand: Use | None
    notes: list[str] = field(default_factory=list)
    texts: dict[Path, bytes] = field(default_factory=registry.texts, repr=False)  # files that policies are in, or read

    @property
    def lossy(self) -> bool:
        return self.config.regime == "lossy"

    @property
    def predicate(self) -> Use:
        """When a page counts as used: `use`, or in the offload regime the demand model."""
        return self.use if self.lossy or self.demand is None else self.demand

    def policy(self) -> Any:
        """A fresh policy object. Raises PolicyError where the regime or the trace cannot serve it."""
        policy = self.build(self.config.policy)
        if self.config.granularity:
            policy.granularity = self.config.granularity
        if self.config.regime not in policy.regimes:
            raise PolicyError(f'policy "{self.config.policy}" does not work in the {self.config.regime} regime')
        if policy.needs:
            if missing := sorted(policy.needs - self.trace.provides):
                raise PolicyError(
                    f'policy "{self.config.policy}" needs {", ".join(missing)}, which the trace does not hold',
                    where=self.trace.path,
                    hint="q, k and v: capture with --vectors; spans: with --spans; others are facts of the trace",
                )
            if policy.needs & VECTORS and (policy.granularity != "head" or self.trace.pool != "head"):
                raise PolicyError(
                    f'policy "{self.config.policy}" reads q, k or v, which are those of KV heads',
                    hint="leave --granularity at head",
                )
        return policy

    def build(self, spec: str, kind: str = "policy") -> Any:
        """What a spec string says, of the texts that its files had at first."""
        with registry.reading(self.texts):
            return registry.build(spec, kind)

    def lanes(self, policy: Any) -> tuple[int, int]:
        """Table lanes (layers, heads) at the policy's granularity."""
        layers, heads = self.trace.lanes
        return {"head": (layers, heads), "layer": (layers, 1), "token": (1, 1)}[policy.granularity]

    @property
    def page_bytes(self) -> float:
        """Bytes of one page over all lanes, in the model that is timed."""
        return self.trace.page_size * self.shape.kv_token_bytes * self.shape.layers

    def model_layers(self, lanes: tuple[int, int]) -> np.ndarray:
        """int64 [model layers]: the table's layer that stands for each layer of the timed model."""
        return np.arange(self.shape.layers) * lanes[0] // self.shape.layers

    def lane_bytes(self, lanes: tuple[int, int]) -> np.ndarray:
        """float64 [layers of the table]: bytes of one page in one lane, all the model's layers it stands for."""
        stands_for = np.bincount(self.model_layers(lanes), minlength=lanes[0])
        return stands_for * self.trace.page_size * self.shape.kv_token_bytes / lanes[1]

    def budget(self, request: Request) -> int:
        """Pages per lane of one request. Raises ConfigError when less than one is left."""
        pages, basis = parse_budget(self.config.budget)
        if basis == "fraction":
            pages = round(pages * request.stride, 9)  # 29 % of 100 is 29, not 28.999...
        elif basis == "bytes":
            whole = min(pages / self.page_bytes, self._whole)
            pages = whole + (pages / self.page_bytes - whole) / self.ratio("gpu")
        if pages < 1:
            raise ConfigError(
                f'a budget of "{self.config.budget}" is less than one page of {self.trace.page_size} tokens per lane '
                f"in request {request.id} ({request.stride} pages)",
                hint="raise the budget, or lower --page-size",
            )
        return int(pages)

    @property
    def concurrency(self) -> int:
        """Requests that run together: what was asked for, or all there are."""
        return min(self.config.concurrency, len(self.trace.sources))

    @property
    def rates(self) -> dict[str, float]:
        """What a policy may know of the machine: bytes/s (of unquantised pages) from each tier, tokens/s recomputed."""
        hardware, shape = self.hardware, self.shape
        layer = sum(gemm_seconds(hardware.gpu, g, CHUNK, shape.value_bytes) for g in shape.gemms)
        recompute = CHUNK / (shape.layers * layer)
        host, ssd = hardware.h2d.bandwidth / self.ratio("host"), hardware.ssd.read_bandwidth / self.ratio("ssd")
        return {"host": host, "ssd": ssd, "recompute": recompute}

    @property
    def memory(self) -> dict[str, float]:
        """Bytes for pages in each tier: the GPU's beside the weights, host and SSD as asked or as the hardware has."""
        chosen = {name: getattr(self.config, name) for name in ("host", "ssd")}
        sizes = {n: getattr(self.hardware, n).capacity if c is None else parse_bytes(c) for n, c in chosen.items()}
        return {"gpu": self.hardware.gpu.memory - self.shape.weight_bytes, **sizes}

    def tier(self, name: str) -> int | None:
        """Pages per lane of a lower tier, shared evenly by the requests that run together; None is unlimited."""
        pages = self.memory[name] / self.concurrency / (self.page_bytes * self.ratio(name))
        return int(pages) if pages < 2**31 else None

    # -- precision: what pages take where they are stored --------------------------------------------------------

    @cached_property
    def formats(self) -> dict[str, Format]:
        """How each tier stores pages. Raises ConfigError for one that does not exist or does not fit the model."""
        keys = {tier: f"{tier}_format" for tier in ("gpu", "host", "ssd")}
        formats = {tier: parse_format(getattr(self.config, key), key) for tier, key in keys.items()}
        for tier, form in formats.items():
            form.check(self.shape.head_dim, keys[tier])
        return formats

    def ratio(self, tier: str) -> float:
        """Bytes of a page in this tier over those at full precision; on the GPU, of one that is quantised."""
        return self.formats[tier].ratio(self.shape.kv_bytes)

    @property
    def _whole(self) -> float:
        """Pages per lane, the newest and the first, that a quantised cache on the GPU keeps at full precision."""
        return self.formats["gpu"].kept / self.trace.page_size

    def stored(self, pages: Any, lanes: int = 1) -> Any:
        """How many pages at full precision take the bytes of `pages` on the GPU (numbers or arrays, of `lanes` each).

        What a quantised cache keeps as it is, the newest tokens and the sinks, is taken to be among these pages.
        """
        if self.formats["gpu"].plain:
            return pages
        whole = np.minimum(pages, lanes * self._whole)
        return whole + (pages - whole) * self.ratio("gpu")


def opened(trace: Trace | str | Path) -> Trace:
    """A trace, which may be named by its folder, or "demo"."""
    if isinstance(trace, Trace):
        return trace
    from kvsim.trace import open_trace

    return open_trace(trace)


def prepare(trace: Trace | str | Path, config: RunConfig) -> Setting:
    """Load what a configuration names. Raises ConfigError, PolicyError, TraceError."""
    config, trace = config.resolved(), opened(trace)
    assert config.page_size is not None
    if config.requests is not None:
        trace = trace.only(config.requests)
    if not trace.sources:
        raise TraceError("the trace holds no request", where=trace.path)
    use = parse_use(config.use)
    demand = parse_demand(config.demand, use) if config.regime == "offload" else None
    hardware = Hardware.load(config.hardware).with_overrides(config.constants)
    shape = _shape(trace, config.model)
    setting = Setting(config, trace.paged(config.page_size), hardware, shape, use, demand)
    if config.model:
        setting.notes.append(f"what-if: the attention of {trace.geometry.name}, pages and compute of {shape.name}")
    if use != Use():
        setting.notes.append(f"a page is used by the predicate use = {config.use}")
    if setting.concurrency < config.concurrency:
        setting.notes.append(f"{setting.concurrency} requests run together: the trace holds no more")
    for request in setting.trace.requests():  # what cannot work is said before hours of work
        new_cache(setting, request, setting.policy())
    setting.notes.extend(_precision(setting))
    if setting.lossy and (config.host or config.ssd):
        setting.notes.append("host and ssd have no effect in the lossy regime: evicted pages are gone")
    return setting


def rehearse(setting: Setting) -> None:
    """Raises at once what a run finds in its first steps: a prompt that cannot serve the policy, or breaks it.

    Asked is the longest prompt. An oracle only needs the trace.
    """
    if not callable(getattr(setting.policy(), "foresee", None)):
        next(iter(Replay(setting, max(setting.trace.requests(), key=lambda request: request.prompt_tokens))))


def _precision(setting: Setting) -> list[str]:
    """What a reader has to know of quantised tiers."""
    low = [tier for tier, form in setting.formats.items() if not form.plain]
    notes = []
    if low:
        notes.append(
            f"quantised on {', '.join(low)}: bytes and (derived) recoding time only; the error of the values is in no "
            "score, `kvsim trace quantise` measures it"
        )
    if setting.lossy and {"host", "ssd"} & set(low):
        notes.append("host_format and ssd_format have no effect in the lossy regime: evicted pages are gone")
    elif setting.formats["host"] != setting.formats["ssd"]:
        notes.append("a page that goes on from host to SSD is encoded anew by the CPU, whose time is not counted")
    return notes


def _shape(trace: Trace, model: str | None) -> ModelShape:
    """The model that is timed: the trace's own, a known name, or a config.json."""
    if model is None:
        return shape_from_geometry(trace.geometry)
    if model in SHAPES:
        return SHAPES[model]
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    hint = f"give a folder with a config.json, such a file, or one of {', '.join(SHAPES)}"
    if not path.is_file():
        raise ConfigError(f'no model "{model}"', hint=hint)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the model: {error}", where=str(path), hint=hint) from None
    return replace(shape_from_config(config), name=path.parent.name or path.stem)


def new_cache(
    setting: Setting, request: Request, policy: Any, *, audit: bool = False, record: bool = False,
    kind: Callable[..., Cache] = Cache,
) -> Cache:  # fmt: skip
    """An empty cache for one request. Raises ConfigError for a budget or tiers that cannot work."""
    return kind(
        setting.trace.lanes,
        request.stride,
        policy,
        Capacity(setting.budget(request), setting.tier("host"), setting.tier("ssd")),
        offload=None if setting.lossy else setting.build(str(setting.config.offload), "offload"),
        use=setting.use,
        demand=setting.demand,
        page_size=request.page_size,
        seed=setting.config.seed,
        rates=setting.rates,
        facts=request.facts,
        audit=audit,
        record=record,
    )


class Replay:
    """One request through its cache, step by step; pages only, no time.

    `ceiling`: in the lossy regime, also compute per step the most any cache of this budget could attend to.
    `quality`: there too, watch what `kvsim.cache.quality` measures, and count tokens gone in vain (`stranded`).
    `audit`: recount the table after every step, not only at the end. `record`: list every page that moves. `kind`: what
    is replayed, a cache of one budget or those of all (`kvsim.cache.stack`).
    """

    def __init__(
        self, setting: Setting, request: Request, *, ceiling: bool = False, quality: bool = False,
        audit: bool = False, record: bool = False, kind: Callable[..., Cache] = Cache,
    ):  # fmt: skip
        self.request, self.setting, self._wants_ceiling = request, setting, ceiling and setting.lossy
        policy = setting.policy()
        self.lanes = setting.lanes(policy)
        self.budget = setting.budget(request)
        if callable(getattr(policy, "foresee", None)):
            pool = setting.trace.pool if policy.granularity == "head" else policy.granularity
            policy.foresee(Future(replace(request, pool=pool), setting.predicate))
        self.cache = new_cache(setting, request, policy, audit=audit, record=record, kind=kind)
        self.ceiling, self.even_ceiling = (np.full(self.cache.rows, np.nan) for _ in range(2))
        self.quality = Quality(self.cache, request.source.facts) if quality and setting.lossy else None
        self.stranded = float("nan")  # not counted
        self._vectors = bool(policy.needs & VECTORS) or (
            self.quality is not None and setting.trace.pool == "head" and request.source.provides >= VECTORS
        )

    def reserves(self, left: float | None = None) -> dict[str, float]:
        """Bytes by tier that this request may hold at most: from the start, or once `left` pages per lane are left of
        its prompt.

        On the GPU the larger of prompt and budget with what a lag lets through, and in the offload regime the staging
        buffers of fetched pages; below it every page of the request, the host first.
        """
        c, s = self.cache, self.setting
        stride = self.request.stride
        budget = min(self.budget, stride) if c.policy.bounded else stride  # a split may have moved the cache's own
        if c.lossy and c.selects:
            budget = stride  # a read set saves bandwidth, not memory
        prompt = pages(self.request.prompt_tokens, self.request.page_size) if left is None else left
        late = pages(self.request.output_tokens, self.request.page_size) if c.policy.once else c.policy.lag
        held = min(stride, max(prompt, budget) + (late if c.lossy else 1))
        held = s.stored(held) * s.page_bytes
        if c.lossy:
            return {"gpu": held}
        layer = s.page_bytes * s.ratio("gpu") / s.shape.layers
        staged = min(int(s.hardware.gpu.staging_layers), s.shape.layers) * (stride - budget) * layer
        below = {name: stride if (most := s.tier(name)) is None else min(stride, most) for name in ("host", "ssd")}
        below["ssd"] = min(below["ssd"], stride - below["host"])
        return {"gpu": held + staged, **{name: n * s.page_bytes * s.ratio(name) for name, n in below.items()}}

    def decides(self, a: Access) -> bool:
        """Does the policy have to choose in this step?"""
        c = self.cache
        if not (c.evicts or c.selects) or a.keys <= int(c.budget.min()):
            return False
        if a.prefill:
            return c.evicts and (c.policy.cut_prompt or not c.lossy)
        clock = a.tokens if c.policy.clock == "token" else a.step
        return not c.lossy or (not c.policy.once and clock % c.policy.lag == 0)

    def __iter__(self) -> Iterator[tuple[Access, Outcome]]:
        """Prefill first; the arrays of an Access are overwritten by the next one."""
        for access in self.request.accesses(vectors=self._vectors):
            outcome = self.cache.access(access)
            if self.quality and self.request.page_size == 1:
                self.stranded = stranded(self.cache.table.key, access.tokens)
            if self._wants_ceiling and not access.prefill:
                self._ceiling(access, outcome)
            yield access, outcome
        self.cache.audit(access)

    def _ceiling(self, a: Access, o: Outcome) -> None:
        """Per row lane, the sum of the budget + 1 largest weights: no cache of `budget` pages attends to more.

        `even_ceiling` is that of the run's budget, the same in every lane. `ceiling` is the policy's own: of the budget
        that it split up, and where it holds more for some steps, or reads more, of as many as that.
        """
        held = np.count_nonzero(self.cache.seen >= 0, axis=1) if self.cache.selects else o.held
        rows, even = self.cache.rows, np.full(self.cache.lanes, min(self.budget, self.request.stride) + 1)
        own = np.maximum(self.cache.budget + 1, held)
        self._largest(a, rows, even, self.even_ceiling)
        if np.array_equal(np.minimum(own, a.keys), np.minimum(even, a.keys)):
            self.ceiling[:] = self.even_ceiling
        else:
            self._largest(a, rows, own, self.ceiling)

    def _largest(self, a: Access, rows: int, most: np.ndarray, out: np.ndarray) -> None:
        """The sum of the `most` [lanes] largest weights of each row lane."""
        count = np.repeat(most, rows // len(most))
        threads.each(kernels.largest_sum, rows, a.keys, a.row.reshape(rows, -1), a.keys, count, out)
