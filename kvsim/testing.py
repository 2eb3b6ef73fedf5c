"""For tests, ours and a plug-in author's: small traces, a slow reference cache, and `check_policy`.

`check_policy("my_policy.py")` says in words which clause of the policy contract is broken. `ReferenceCache` is the
cache engine written again as a table indexed by key, with a loop over lanes and pages; the two must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvsim import registry
from kvsim.cache.cache import Cache, Capacity
from kvsim.cache.demand import Use
from kvsim.cache.table import COLUMNS, Table
from kvsim.cache.view import pages, share_of, window
from kvsim.errors import KvsimError, PolicyError
from kvsim.trace.access import Access, DenseSource, PromptRows, TokenRow, Trace, dense_trace

# -- small traces ------------------------------------------------------------------------------------------------


def tiny_trace(
    seed: int = 0, layers: int = 2, heads: int = 2, prompt: int = 12, steps: int = 24, windows: Sequence[int] = ()
) -> Trace:
    """A random request whose weights are multiples of 1/1024, so that sums are exact in any order.

    `windows`: tokens each layer can see, for sliding-window layers; 0 sees all.
    """
    rng = np.random.default_rng(seed)
    windows = windows or (0,) * layers
    rows = np.zeros((prompt + steps, layers, heads, prompt + steps), np.float32)
    for t, layer, head in np.ndindex(rows.shape[:3]):
        first = max(0, t + 1 - windows[layer]) if windows[layer] else 0
        chances = rng.dirichlet(np.full(t + 1 - first, 0.3))
        rows[t, layer, head, first : t + 1] = rng.multinomial(1024, chances) / np.float32(1024)
    return dense_trace([_Windowed(rows[:prompt, ..., :prompt], rows[prompt:], windows)])


class _Windowed(DenseSource):
    def __init__(self, prompt_rows, decode_rows, windows):
        super().__init__(prompt_rows, decode_rows)
        self._windows = np.asarray(windows)

    def _first(self, tokens: int) -> np.ndarray:
        return np.where(self._windows > 0, np.maximum(0, tokens - self._windows), 0).astype(np.int32)

    def prompt(self) -> PromptRows:
        p = super().prompt()
        return PromptRows(p.colsum, p.colsq, p.colmax, p.rows, np.stack([self._first(i + 1) for i in range(len(p.rows))]))

    def token_rows(self):
        for t in super().token_rows():
            yield TokenRow(t.step, t.row, self._first(t.kv_hi), t.kv_hi)


# -- the reference -----------------------------------------------------------------------------------------------


class _Columns(SimpleNamespace):
    """What a policy sees of the reference: the names of `View`, one line per key."""

    def __getitem__(self, name):
        return self.private[name]

    @property
    def resident(self):
        return (self.copies & 1).astype(bool)

    @property
    def newest(self):
        return self.keys - 1


class ReferenceCache:
    """The rules of `Cache` in plain loops over a table [layer, KV head, key]; same arguments, no audit."""

    def __init__(
        self, row_lanes, stride, policy, capacity, *, offload=None, use=Use(), demand=None, page_size=1, seed=0
    ):  # fmt: skip
        layers, heads = row_lanes
        self.shape = {"head": (layers, heads), "layer": (layers, 1), "token": (1, 1)}[policy.granularity]
        self.policy, self.offload, self.capacity, self.page_size = policy, offload, capacity, page_size
        self.predicate = use if offload is None or demand is None else demand
        self.by_selection = offload is not None and demand is None
        self.selects = hasattr(policy, "select")
        self.group = layers * heads // (self.shape[0] * self.shape[1])
        shape = (*self.shape, stride)
        self.v = v = _Columns(**{name: np.zeros(shape, getattr(Table(0, 0, {}), name).dtype) for name in COLUMNS})
        v.key[:] = -1
        v.private = {name: np.zeros(shape, dtype) for name, dtype in policy.columns.items()}
        v.shape, v.page_size, v.seed, v.rng = self.shape, page_size, seed, np.random.default_rng(seed)
        v.budget = np.full((*self.shape, 1), min(capacity.gpu, stride) if policy.bounded else stride)

    def access(self, a: Access) -> SimpleNamespace:
        """One step: `missing` (bool by key), `spilled` by tier, `dropped`, and the mass `hit` on the GPU by row lane."""
        v, self.a = self.v, a
        v.now, v.keys, v.prompt = a.step, a.keys, None
        self.out = SimpleNamespace(missing=np.zeros(v.key.shape, bool), spilled=[0, 0, 0], dropped=0)
        self.row, self.peak = (x.reshape(*self.shape, self.group, -1) for x in (a.row, a.peak))
        self.need = self._need(a.peak, a.keys, a.visible)
        self._enter(a)
        v.key[v.key < self._per_lane(a.first)] = -1
        v.copies[v.key < 0] = 0
        seen = v.key >= 0
        if self.selects and (chosen := self.policy.select(v)) is not None:
            seen = seen & chosen
        here = v.resident[:, :, None]
        if self.offload is not None:
            self._fetch(seen)
        visible = seen[:, :, None] if self.offload is None else here
        self.out.hit = np.where(visible, self.row, 0).sum(-1).reshape(-1)
        self._prefill(a) if a.prefill else self._touch(a, seen)
        if hasattr(self.policy, "observe"):
            self.policy.observe(v)
        v.prompt = None
        if hasattr(self.policy, "score") and not (self.offload is None and self.selects):
            self._settle(a)
        return self.out

    def _need(self, peak, keys, visible):
        rows = peak.shape[0] * peak.shape[1]
        limits = self.predicate.limits(peak.reshape(rows, -1), keys, np.repeat(visible, rows // len(visible)))
        return limits.reshape(*self.shape, self.group, 1)

    def _per_lane(self, first):
        return first.reshape(-1, 1, 1) if len(first) == self.shape[0] else first.min()

    def _enter(self, a):
        v = self.v
        for key in range(a.keys - a.fresh, a.keys):
            v.key[..., key], v.copies[..., key] = key, 1
            for column in (v.born, v.arrived, v.last):
                column[..., key] = a.step

    def _fetch(self, seen):
        v = self.v
        needed = seen if self.by_selection else (v.key >= 0) & (self.peak >= self.need).any(2)
        self.out.missing = needed & ~v.resident
        v.copies[self.out.missing] |= 1
        v.arrived[self.out.missing] = v.now

    def _prefill(self, a):
        v, p, n = self.v, a.prompt, a.keys
        uses = sum((r >= self._need(r, n, s).reshape(*a.row.shape[:2], 1)) for r, s in zip(p.peaks, p.visible, strict=True))
        lanes = (*self.shape, self.group, n)
        v.uses[..., :n] = np.asarray(uses).reshape(lanes).max(2)
        v.mass[..., :n] = p.colsum.reshape(lanes).mean(2)
        v.weights[..., :n] = p.rows[-1].reshape(lanes).mean(2)
        v.prompt = p

    def _touch(self, a, seen):
        v, f = self.v, np.float32
        renormalise = self.offload is None and self.policy.rows == "visible"
        for lane in np.ndindex(self.shape):
            keys = np.flatnonzero(seen[lane])
            row, peak, least = self.row[lane][:, keys], self.peak[lane][:, keys], f(0)
            for limit in self.need[lane][:, 0]:
                least += limit / f(self.group)
            if renormalise:
                total = row.sum(1, keepdims=True, dtype=f)
                scale = np.divide(f(1), total, out=np.ones_like(total), where=total > 0)
                row, peak = row * scale, peak * scale
                tokens = max(1, len(keys) * self.page_size - (a.keys * self.page_size - a.tokens))
                least = f(self.predicate.value) if self.predicate.absolute else f(self.predicate.value) / f(tokens)
            v.weights[lane] = 0
            v.weights[lane][keys] = row.sum(0) / f(self.group)
            v.mass[lane] += v.weights[lane]
            used = keys[peak.sum(0) / f(self.group) >= least]
            v.last[lane][used] = a.step
            v.uses[lane][used] += 1

    def _settle(self, a):
        p, v = self.policy, self.v
        due = p.cut_prompt if a.prefill else a.step % p.lag == 0
        if due and hasattr(p, "split"):
            v.budget = np.clip(np.broadcast_to(p.split(v), v.budget.shape), 1, v.key.shape[-1])
        leaving = np.zeros(v.key.shape, bool)
        score = np.broadcast_to(np.asarray(p.score(v), np.float32), v.key.shape)
        for lane in np.ndindex(self.shape):
            budget = v.budget[lane]
            over = int(v.resident[lane].sum() - budget[0])
            head = max(int(window(p.sink, budget, self.page_size)[0]), int(share_of(p.protect_head, budget)[0]))
            tail = max(int(window(p.recent, budget, self.page_size)[0]), int(share_of(p.protect_tail, budget)[0]))
            if over > 0 and (due or (self.offload is not None and over >= p.lag)):
                count = max(over, min(p.batch, int(budget[0]) + 1 - head - tail))
                for key in self._lowest(lane, 1, score[lane], head, a.keys - tail)[:count]:
                    leaving[lane][key] = True
        if self.offload is None:
            self.out.dropped = int(leaving.sum())
            v.key[leaving], v.copies[leaving] = -1, 0
        else:
            self._place(leaving)

    def _lowest(self, lane, bit, score, head=0, tail=2**30):
        """Keys with a copy in the tier, the first to leave first; never a page that is still being filled."""
        v, partial = self.v, self.a.keys - 1 if self.a.tokens % self.page_size else -1
        keys = [k for k in np.flatnonzero(v.copies[lane] & bit) if k != partial]
        return sorted(keys, key=lambda k: (k < head or k >= tail, score[k], k))

    def _place(self, leaving):
        v = self.v
        tier = np.broadcast_to(self.offload.place(v, leaving), v.key.shape)
        for layer, head, key in np.argwhere(leaving):
            here, to = v.copies[layer, head], int(tier[layer, head, key])
            if to > 0 and not here[key] & (1 << to):
                for crossed in range(1, to + 1):
                    self.out.spilled[crossed] += 1
                here[key] |= 1 << to
            here[key] &= ~np.uint8(1)
            if not here[key]:
                self.out.dropped += 1
                v.key[layer, head, key] = -1
        score = np.broadcast_to(np.asarray(self.policy.score(v), np.float32), v.key.shape)
        for bit, capacity in ((2, self.capacity.host), (4, self.capacity.ssd)):
            for lane in np.ndindex(self.shape):
                copies = v.copies[lane]
                over = 0 if capacity is None else int(np.count_nonzero(copies & bit)) - capacity
                if over > 0:
                    elsewhere = (copies & ~np.uint8(bit)) != 0
                    for key in self._lowest(lane, bit, np.where(elsewhere, -np.inf, score[lane]))[:over]:
                        if not elsewhere[key]:
                            copies[key] |= 4
                            self.out.spilled[2] += 1
                        copies[key] &= ~np.uint8(bit)


# -- the contract of a policy --------------------------------------------------------------------------------------


def check_policy(spec: str) -> list[str]:
    """What is wrong with an eviction or offload policy, in words; empty when nothing is.

    `spec` is a spec string. Small traces are replayed in every regime the policy declares: once as they are, once
    again, once with pages moved to other slots and once with a table that grows. A policy that needs queries, keys or values is
    checked for form only.
    """
    try:
        kind, cls = _find(registry.parse_spec(spec).name)
        instance = registry.build(spec, kind)
    except KvsimError as error:
        return [str(error)]
    problems = _form(instance, kind, cls)
    if problems or (kind == "policy" and instance.needs - {"colsum", "colsq", "window_rows"}):
        return problems
    for regime in ("lossy", "offload") if kind == "policy" else ("offload",):
        if kind == "offload" or regime in instance.regimes:
            problems += _behaviour(spec, kind, regime)
    return list(dict.fromkeys(problems))


def _find(name: str) -> tuple[str, type]:
    try:
        return "policy", registry.find(name, "policy")
    except PolicyError:
        try:
            return "offload", registry.find(name, "offload")
        except PolicyError:
            pass
        raise


def _form(instance: Any, kind: str, cls: type) -> list[str]:
    """What can be said without running it."""
    problems = []
    if not cls.__doc__ or cls.__doc__.startswith(f"{cls.__name__}("):  # what dataclass writes when there is none
        problems.append("the class has no docstring: say what it keeps, and where that comes from")
    if kind == "policy":
        for name, good in (("granularity", ("head", "layer", "token")), ("rows", ("visible", "full"))):
            if getattr(instance, name) not in good:
                problems.append(f"{name} is {getattr(instance, name)!r}, expected one of {', '.join(good)}")
        for name in ("batch", "lag"):
            if not isinstance(getattr(instance, name), int) or getattr(instance, name) < 1:
                problems.append(f"{name} is {getattr(instance, name)!r}, expected a whole number from 1")
        problems += [f'column "{n}" is not of a NumPy type but {d!r}' for n, d in instance.columns.items() if not _is_dtype(d)]
    return problems


def _is_dtype(value: Any) -> bool:
    try:
        return value is not None and np.dtype(value).kind in "biuf"
    except TypeError:
        return False


def _behaviour(spec: str, kind: str, regime: str) -> list[str]:
    problems: list[str] = []
    try:
        first = _replay(_Watched, spec, kind, regime, problems)
        if problems:
            return problems
        for cache, said in (
            (_Watched, "two runs with the same seed differ: draw from view.rng or a hash, and read no clock"),
            (_Moved, "pages moved to other slots give other victims: depend on view.key, not on the order of slots"),
            (_Grown, "a table that grew gives other victims: keep per-page state in `columns`, which the engine moves"),
        ):
            try:
                again = _replay(cache, spec, kind, regime, [])
            except KvsimError as error:
                problems.append(f"{said} ({error.what})")
                continue
            if not all(np.array_equal(x, y) for x, y in zip(first, again, strict=True)):
                problems.append(said)
    except KvsimError as error:
        problems.append(str(error))
    return problems


def _replay(cache: type, spec: str, kind: str, regime: str, problems: list[str]) -> list[np.ndarray]:
    """Which keys have a copy in which tier after every step."""
    policy = registry.build(spec if kind == "policy" else "lru")
    offload = None if regime == "lossy" else registry.build("spill" if kind == "policy" else spec, "offload")
    budget = 8 + sum(n for n in (policy.sink, policy.recent) if isinstance(n, int))
    trace = tiny_trace(prompt=12, steps=max(24, budget + 2 * policy.lag))
    request, use, found = trace.requests()[0], Use(), []
    if hasattr(policy, "foresee"):
        policy.foresee(request, use)
    demand = None if callable(getattr(policy, "select", None)) else use
    c = cache(trace.lanes, request.stride, policy, Capacity(budget, ssd=None), offload=offload, use=use, demand=demand)
    c.problems = problems
    for a in request.accesses():
        c.access(a)
        copies = np.zeros((c.lanes, request.stride + 1), np.uint8)  # empty lines write into the last column
        np.put_along_axis(copies, c.table.key.astype(np.intp), c.table.copies, 1)
        found.append(copies[:, :-1])
    return found


class _Watched(Cache):
    """A cache that compares everything before and after each hook, puts it back, and notes what changed."""

    problems: list[str]

    def _call(self, method: str, *arguments: Any, of: Any = None, optional: bool = False) -> Any:
        before = self._state()
        value = super()._call(method, *arguments, of=of, optional=optional)
        changed = []
        for name, (now, was) in {n: (x, before[n][1]) for n, x in self._arrays().items()}.items():
            if not np.array_equal(now, was):
                changed.append(name)
                now.flags.writeable = True
                now[...] = was
        v = self.view
        if (v.now, v.keys, v.page_size, v.seed) != before["scalars"][1] or v._table is not self.table:
            changed.append("the view")
        if changed:
            self._note(f"{method} changed {', '.join(changed)}: what a view shows is read-only; keep your own state in `columns`")
        self._inspect(method, value)
        return value

    def _arrays(self) -> dict[str, np.ndarray]:
        t = self.table
        names = (*COLUMNS, "free", "free_count")
        return {name: getattr(t, name) for name in names} | {"budget": self.budget}

    def _state(self) -> dict[str, tuple]:
        v = self.view
        arrays = {name: (x, x.copy()) for name, x in self._arrays().items()}
        return arrays | {"scalars": (None, (v.now, v.keys, v.page_size, v.seed))}

    def _inspect(self, method: str, value: Any) -> None:
        array = np.asarray(value)
        if method == "score" and array.dtype.kind == "f":
            pages_of = self.view.resident
            if array.ndim <= 3 and np.isnan(np.where(pages_of, array, 0)).any():
                self._note("score returned NaN for a resident page")
        if method == "select" and value is not None:
            if array.dtype != bool:
                self._note(f"select returned {array.dtype}, expected a bool mask (or None for every page)")
            elif not (np.broadcast_to(array, self.view.key.shape) & (self.view.key >= 0)).any(-1).all():
                self._note("select chose no page in some lane: attention must read something")
        if method == "place" and array.dtype.kind not in "iu":
            self._note(f"place returned {array.dtype}, expected whole numbers: 1 host, 2 SSD, -1 none")

    def _note(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)


class _Moved(_Watched):
    """Pages change their slots after every step."""

    def access(self, a: Access):
        out = super().access(a)
        self.table = moved(self.table, np.random.default_rng(a.step))
        self.view.bind(self.table)
        return out


class _Grown(_Watched):
    """The table gets more lines now and then."""

    def access(self, a: Access):
        out = super().access(a)
        if a.step % 3 == 0:
            self._resize(self.table.slots + 5)
        return out


def moved(table: Table, rng: np.random.Generator) -> Table:
    """The same pages in slots drawn at random, lane by lane."""
    new = table.resized(table.slots)
    order = rng.permuted(np.tile(np.arange(table.slots), (table.lanes, 1)), axis=1)
    for name in COLUMNS:
        setattr(new, name, np.take_along_axis(getattr(new, name), order, 1))
    new.private = {name: np.take_along_axis(c, order, 1) for name, c in new.private.items()}
    for lane, count in enumerate(new.free_count):
        new.free[lane, :count] = np.flatnonzero(new.key[lane] < 0)
    return new
