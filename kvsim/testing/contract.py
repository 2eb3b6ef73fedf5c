"""The contract of a policy, clause by clause, checked on small traces."""

from __future__ import annotations

import pickle
import re
import sys
from contextlib import suppress
from typing import Any

import numpy as np

from kvsim import registry
from kvsim.cache.cache import Cache
from kvsim.cache.demand import Use
from kvsim.cache.fused import fuse
from kvsim.cache.future import Future
from kvsim.cache.table import COLUMNS, Table
from kvsim.cache.tiers import Capacity
from kvsim.cache.view import single
from kvsim.errors import KvsimError, PolicyError
from kvsim.testing.nested import compare_sizes
from kvsim.testing.traces import tiny_trace
from kvsim.trace.access import VECTORS, Access, Trace

LAG, LONGEST = 64, 512  # steps between decisions, and protected tokens, up to which hooks are run as they are
_HOOKS = ("observe", "select", "split", "score")
_STATE = (dict, list, set, bytearray, np.ndarray, np.random.Generator, int, float)
_NOISE = 2.0**-44  # of a float64 score: what differs by less differs by how it was added up


def check_policy(spec: str) -> list[str]:
    """What is wrong with an eviction or offload policy, in words; empty when nothing is.

    `spec` is a spec string. Small traces are replayed in every regime the policy declares: once as they are, once
    again, once with pages moved to other slots, once with a table that grows, and once compiled where its text can be.
    They have all that a trace can have, and made-up facts; who needs another one, or protects more than they are long,
    is told that its hooks were not run. A lag beyond `LAG` is cut to that, so that something is decided.
    """
    try:
        kind, cls = _find(registry.parse_spec(spec).name)
        instance = registry.build(spec, kind)
    except KvsimError as error:
        return [str(error)]
    problems = _form(instance, kind, cls)
    if problems:
        return problems
    for regime in ("lossy", "offload") if kind == "policy" else ("offload",):
        if kind == "offload" or regime in instance.regimes:
            problems += _behaviour(spec, kind, regime)
    if kind == "policy" and instance.budget_free and not problems:
        problems += _nested(spec, instance.regimes)
    once: dict[str, str] = {}
    for text in problems:  # both regimes may break a clause, at other steps and in other shapes
        once.setdefault(re.sub(r"\d+", "0", text), text)
    return list(once.values())


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
        unrun = f"{', '.join(h for h in _HOOKS if callable(getattr(instance, h, None)))}: not run"
        known = _trace(8, 8).provides
        problems += [
            f'needs "{name}", which is no data of a trace and no fact of those made up here '
            f"({', '.join(sorted(known))}); {unrun}"
            for name in sorted(instance.needs - known)
        ]
        if (held := _held(instance)) > LONGEST:
            problems.append(f"sink and recent protect {held} tokens, here are {LONGEST} at most; {unrun}")
    return problems


def _held(policy: Any) -> int:
    """Tokens that it protects, not counting shares of the budget."""
    return sum(n for n in (policy.sink, policy.recent) if isinstance(n, int))


def _trace(prompt: int, steps: int) -> Trace:
    """A small trace with facts of every kind that a built-in policy asks for."""
    trace = tiny_trace(prompt=prompt, steps=steps)
    n = prompt + steps
    trace.sources[0].facts |= {  # type: ignore[operator]
        "tokens": np.arange(n, dtype=np.int32) % 7,
        "span": np.minimum(np.arange(n) // max(1, prompt // 2), 2).astype(np.int32),
        "kind": np.arange(n) % 4,
        "chunk": np.arange(n) // 4,
        "gate": (np.arange(n) * 5 % 11 / 10).astype(np.float32),
        "need": [np.array([i % prompt]) for i in range(steps)],
    }
    return trace


def _behaviour(spec: str, kind: str, regime: str) -> list[str]:
    problems: list[str] = []
    cls = type(registry.build(spec, kind))
    try:
        before = _globals(cls)
        first = _replay(_Watched, spec, kind, regime, problems)
        if changed := [n for n, x in _globals(cls).items() if before.get(n) != x]:
            problems.append(f"{', '.join(changed)} changed in a run, which the next one sees: keep state in `columns`")
        if problems:
            return problems
        variants: list[tuple[type[Cache], str]] = [
            (_Watched, "two runs with the same seed differ: draw from view.rng or a hash, and read no clock"),
            (_Moved, "pages moved to other slots give other victims: depend on view.key, not on the order of slots"),
            (_Grown, "a table that grew gives other victims: keep per-page state in `columns`, which the engine moves"),
        ]
        if kind == "policy" and fuse(registry.build(spec), np.inf):
            variants.append(
                (_Compiled, "compiled, it gives other victims, which is a fault of kvsim: please report it")
            )
        for cache, said in variants:
            try:
                again = _replay(cache, spec, kind, regime, [])
            except KvsimError as error:
                problems.append(f"{said} ({error.what})")
                continue
            if not all(np.array_equal(x, y) for x, y in zip(first, again, strict=True)):
                problems.append(said)
    except KvsimError as error:
        if not problems:  # else what was noted led to it
            problems.append(str(error))
    return problems


def _globals(cls: type) -> dict[str, bytes]:
    """What may be state in the class and in the file that it is in, to compare."""
    names = vars(sys.modules[cls.__module__]) | {f"{cls.__name__}.{n}": x for n, x in vars(cls).items()}
    found = {}
    for name, value in names.items():
        if isinstance(value, _STATE) and "__" not in name:
            with suppress(Exception):  # what cannot be pickled, a table of functions, say
                found[name] = pickle.dumps(value)
    return found


def _nested(spec: str, regimes: tuple[str, ...]) -> list[str]:
    """Is it true that its scores are the same at every budget?"""

    def policy() -> Any:
        p = registry.build(spec)
        p.rows, p.recent = "full", p.recent if isinstance(p.recent, int) else 2
        return p

    trace = tiny_trace(steps=32)
    demands = {"lossy": None, "offload": Use()}
    found = [compare_sizes(trace, policy, demand=demands[regime])[0] for regime in regimes]
    return [f"budget_free is not true: {text}" for text in found if text]


def _replay(cache: type, spec: str, kind: str, regime: str, problems: list[str]) -> list[np.ndarray]:
    """Which keys have a copy in which tier after every step."""
    policy = registry.build(spec if kind == "policy" else "lru")
    offload = None if regime == "lossy" else registry.build("spill" if kind == "policy" else spec, "offload")
    budget, policy.lag = 8 + _held(policy), min(policy.lag, LAG)
    trace = _trace(12, max(24, budget + 2 * policy.lag))
    request, use, found = trace.requests()[0], Use(), []
    if hasattr(policy, "foresee"):
        policy.foresee(Future(request, use))
    demand = None if callable(getattr(policy, "select", None)) else use
    c = cache(
        trace.lanes, request.stride, policy, Capacity(budget, ssd=None), offload=offload, use=use, demand=demand,
        facts=request.facts,
    )  # fmt: skip
    c.problems = problems
    for a in request.accesses(vectors=bool(policy.needs & VECTORS)):
        c.access(a)
        copies = np.zeros((c.lanes, request.stride + 1), np.uint8)  # empty lines write into the last column
        np.put_along_axis(copies, c.table.key.astype(np.intp), c.table.copies, 1)
        found.append(copies[:, :-1])
    return found


class _Watched(Cache):
    """A cache that compares everything before and after each hook, puts it back, and notes what changed."""

    problems: list[str]

    def call(self, method: str, *arguments: Any, of: Any = None, optional: bool = False) -> Any:
        before = self._state()
        value = super().call(method, *arguments, of=of, optional=optional)
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
            self._note(f"{method} changed {', '.join(changed)}: a view is read-only; keep your own state in `columns`")
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
        try:
            array = np.broadcast_to(array, self.view.key.shape)
        except ValueError:
            return  # the engine says so
        if method == "score" and array.dtype.kind in "biuf":
            self._inspect_scores(array)
        if method == "select" and value is not None:
            if array.dtype != bool:
                self._note(f"select returned {array.dtype}, expected a bool mask (or None for every page)")
            elif not (array & (self.view.key >= 0)).any(-1).all():
                self._note("select chose no page in some lane: attention must read something")
        if method == "place" and array.dtype.kind in "bf":
            self._note(f"place returned {array.dtype}, expected whole numbers: 1 host, 2 SSD, -1 none")

    def _inspect_scores(self, score: np.ndarray) -> None:
        """Are they numbers, and after rounding to float32 as different as before?"""
        here = self.view.resident
        if np.isnan(score[here]).any():
            self._note("score returned NaN for a resident page")
        if score.dtype.kind in "bf" and score.dtype.itemsize <= 4:
            return
        rounded = single(score)
        if (lost := here & np.isnan(rounded) & ~np.isnan(score)).any():
            self._note(f"score returned {score[lost][0]:g}: scores are float32, which holds up to 3.4e38")
        exact = score.dtype.kind in "iu"
        for lane in np.ndindex(here.shape[:2]):
            given = np.sort(score[lane][here[lane]])
            one, two = given[:-1], given[1:]
            with np.errstate(all="ignore"):  # of infinite ones
                apart = (one != two) if exact else two - one > _NOISE * np.maximum(abs(one), abs(two))
            if (alike := apart & (single(one) == single(two))).any():
                pair = f"{one[alike][0].item()!r} and {two[alike][0].item()!r}"
                self._note(f"score returned {pair}: scores are float32, in which they are the same")
                return

    def _note(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)


class _Compiled(Cache):
    """A cache that runs what of the policy's text can be compiled."""

    fusing = True


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
            self.resize(self.table.slots + 5)
        return out


def moved(table: Table, rng: np.random.Generator) -> Table:
    """The same pages in slots drawn at random, lane by lane."""
    new = table.resized(table.slots)
    order = rng.permuted(np.tile(np.arange(table.slots), (table.lanes, 1)), axis=1)
    for name in COLUMNS:
        getattr(new, name)[:] = np.take_along_axis(getattr(new, name), order, 1)
    new.private = {name: c[np.arange(table.lanes)[:, None], order] for name, c in new.private.items()}
    for lane, count in enumerate(new.free_count):
        new.free[lane, :count] = np.flatnonzero(new.key[lane] < 0)
    return new
