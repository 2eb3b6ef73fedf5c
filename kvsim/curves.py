"""curve(): what a policy keeps at every budget, from one replay where the caches of all sizes are nested.

Where they are not, every point is a replay of its own; a curve says which it was, and why.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvsim import replay
from kvsim.cache.stack import Stacks, not_nested
from kvsim.config import RunConfig, run_config
from kvsim.errors import ConfigError
from kvsim.registry import parse_spec
from kvsim.replay import Replay, Setting, new_cache, prepare
from kvsim.results import Result, file_beside, ratio, write_json, write_table
from kvsim.trace.access import Access, Request, Trace

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[int, int], None]
ONE_PASS, EACH = "one pass", "one run per budget"
PERCENT = tuple(f"{n}%" for n in range(1, 101))
GRID = ("5%", *(f"{n}%" for n in range(10, 101, 10)))  # where a point costs a run
KINDS = (".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Curve:
    """What one policy keeps, by budget.

    `points`: per budget, in the order asked for, `budget` (as written), `pages` (per lane, mean over requests),
    `page_hit_rate`, and `recall` in the lossy regime or `mass_hit_rate` where evicted pages come back; over all decode
    steps of all requests, as in the summary of a run. `method`: "one pass" or "one run per budget"; `reason`: why.
    `full_rows`: the policy saw full rows. `at(budget)`: the point at any other budget, for nothing after one pass, else
    by a run.
    """

    config: RunConfig
    trace: dict[str, Any]
    oracle: bool
    full_rows: bool
    method: str
    reason: str
    points: Sequence[dict[str, Any]]
    at: Callable[[str], dict[str, Any]] = field(repr=False)

    @property
    def policy(self) -> str:
        return self.config.policy

    @property
    def metric(self) -> str:
        """What the curve is drawn of: recall, or the page hit rate where pages come back."""
        return "recall" if self.config.regime == "lossy" else "page_hit_rate"

    @property
    def budgets(self) -> list[str]:
        return [p["budget"] for p in self.points]

    @property
    def values(self) -> np.ndarray:
        """float64 [budgets]: the metric."""
        return np.array([p[self.metric] for p in self.points])

    @property
    def runs(self) -> list[Result]:
        """What a figure says of the curve; no tables."""
        config = {**self.config.model_dump(exclude={"budget"}), "rows": "full" if self.full_rows else None}
        named = {"trace": self.trace, "model": {}, "hardware": {"name": None}}
        return [Result({}, {"config": config, **named, "summary": dict(self.points[0])})]

    def rows(self) -> list[dict[str, Any]]:
        """One flat mapping per budget."""
        how = {"policy": self.policy, "regime": self.config.regime, "oracle": self.oracle}
        return [{**how, **point} for point in self.points]

    def to_pandas(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(self.rows())


class Curves(list[Curve]):
    """Curves of one trace and regime, to be drawn together (`kvsim.plot`) and saved."""

    @property
    def runs(self) -> list[Result]:
        return [run for curve in self for run in curve.runs]

    def rows(self) -> list[dict[str, Any]]:
        return [row for curve in self for row in curve.rows()]

    def save(self, path: Path) -> Path:
        """Into a .json, .csv or .parquet file, whole or not at all. Raises ConfigError, ResultError."""
        check_name(path)
        rows = [
            {**row, "rows": "full" if curve.full_rows else "visible", "method": curve.method}
            for curve in self
            for row in curve.rows()
        ]
        with file_beside(path) as partial:
            if path.suffix == ".json":
                write_json(partial, [self._described(curve) for curve in self])
            elif path.suffix == ".csv":
                with partial.open("w", encoding="utf-8", newline="") as file:
                    table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                    table.writeheader()
                    table.writerows(rows)
            else:
                write_table(partial, {key: _column([row[key] for row in rows]) for key in rows[0]})
        return path

    @staticmethod
    def _described(curve: Curve) -> dict[str, Any]:
        told = {name: getattr(curve, name) for name in ("oracle", "full_rows", "method", "reason", "points")}
        return {"trace": curve.trace, "config": json.loads(curve.config.model_dump_json(exclude={"budget"})), **told}


def check_name(path: Path) -> None:
    """Raises ConfigError for a kind of file we do not write."""
    if path.suffix not in KINDS:
        raise ConfigError(f'cannot write a curve to "{path.name}"', hint=f"end the name in {', '.join(KINDS)}")


def _column(values: list[Any]) -> np.ndarray:
    column = np.array(values)
    kinds = {"U": object, "b": np.uint8}
    return column.astype(kinds.get(column.dtype.kind, column.dtype))


@dataclass(frozen=True)
class _Setting(Setting):
    """A setting whose policies see the rows that were asked for."""

    rows: str | None = None

    @classmethod
    def of(cls, setting: Setting, rows: str | None) -> _Setting:
        return cls(**{f.name: getattr(setting, f.name) for f in fields(setting)}, rows=rows)

    def policy(self) -> Any:
        policy = super().policy()
        policy.rows = self.rows or policy.rows
        return policy


class _Sums(NamedTuple):
    """Of one request's decode steps: attention mass on the GPU, and all of it; used pages on the GPU, and all."""

    mass: float
    weight: float
    found: int
    used: int


def curve(
    trace: Trace | str | Path,
    config: RunConfig | None = None,
    *,
    budgets: str | Iterable[str | int] | None = None,
    rows: str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Curve:
    """What a policy keeps at every budget: recall in the lossy regime, hit rates where evicted pages come back.

    `config`, or its keys as keywords, as for `run`, without a budget. `budgets`: a list of budgets as a run takes them;
    "all" is every number of pages per lane; by default it is every whole percent of each request's final length. Where
    a point costs a run, the latter two are a grid of eleven percentages. `rows = "full"`: the policy sees full rows in
    the lossy regime too, where most see rows renormalised over what is left; that is a variant of the policy, and its
    caches are nested where the published one's are not. `progress(done, total)` is told about decode steps. Raises
    ConfigError, PolicyError, TraceError.
    """
    if "budget" in settings:
        raise ConfigError("a curve runs over budgets", hint='leave budget out, or give budgets=["10%", "20%"]')
    setting = _prepared(trace, config or run_config(settings), rows)
    tell = _Counter(setting, progress)
    listed = None if budgets is None or isinstance(budgets, str) else [str(b) for b in budgets]
    passes, reason = _one_pass(setting, tell)
    chosen = _grid(setting, budgets, bool(passes)) if listed is None else listed

    def found(at: _Setting, request: Request, number: int) -> _Sums:
        mass, pages, least = passes[number]
        budget = min(at.budget(request), request.stride)
        if budget < least:
            new_cache(at, request, at.policy())  # refuses it
        return _Sums(mass[budget], mass[-1], pages[budget], pages[-1])

    def replayed(at: _Setting, request: Request, number: int) -> _Sums:
        return _replayed(at, request, tell)

    def at(budget: str) -> dict[str, Any]:
        return _point(setting, str(budget), found if passes else replayed)

    tell.start(1 if passes else len(chosen))
    points, below = _points(chosen, at, strict=listed is not None)
    tell.end()
    source = {
        "name": setting.trace.name,
        "requests": len(setting.trace.sources),
        "fingerprint": setting.trace.fingerprint,
    }
    policy = setting.policy()
    oracle, full = callable(getattr(policy, "foresee", None)), policy.rows == "full"
    return Curve(setting.config, source, oracle, full, ONE_PASS if passes else EACH, reason + below, points, at)


def rehearse(trace: Trace | str | Path, config: RunConfig, rows: str | None = None) -> None:
    """Raises at once what `curve` would find after a while: settings, or a prompt, that cannot serve the policy."""
    replay.rehearse(_prepared(trace, config, rows))


def _prepared(trace: Trace | str | Path, config: RunConfig, rows: str | None) -> _Setting:
    if rows not in (None, "visible", "full"):
        raise ConfigError(f'rows = "{rows}"', hint='use "visible" or "full"')
    return _Setting.of(prepare(trace, config.model_copy(update={"budget": "100%"})), rows)


def _grid(setting: Setting, asked: Any, one_pass: bool) -> list[str]:
    """The budgets of a curve for which none were listed."""
    if asked not in (None, "all"):
        raise ConfigError(f'budgets = "{asked}"', hint='give a list such as ["10%", "20%"], or "all"')
    percent = PERCENT if one_pass else GRID
    if asked is None:
        return list(percent)
    most = max(request.stride for request in setting.trace.requests())
    every = range(1, most + 1) if one_pass else sorted({-(-most * int(p[:-1]) // 100) for p in percent})
    return [str(pages) for pages in every]


def _points(
    budgets: Sequence[str], at: Callable[[str], dict[str, Any]], strict: bool
) -> tuple[list[dict[str, Any]], str]:
    """The points that can be had, and words on the others: of budgets that nobody listed, those below what is
    protected are left out. Raises ConfigError where none is left."""
    if not budgets:
        raise ConfigError("no budget was given", hint='give some, such as ["10%", "20%"]')
    points, out, why = [], [], None
    for budget in budgets:
        try:
            points.append(at(budget))
        except ConfigError as error:
            if strict:
                raise
            out.append(budget)
            why = error
    if why is None:
        return points, ""
    if not points:
        raise why
    some = out[0] if len(out) == 1 else f"{out[0]} to {out[-1]}"
    return points, f"; without {some}: {why.what}"


def _point(setting: _Setting, budget: str, measure: Callable[[_Setting, Request, int], _Sums]) -> dict[str, Any]:
    at = _with_budget(setting, budget)
    requests = at.trace.requests()
    sums = [measure(at, request, number) for number, request in enumerate(requests)]
    mass, weight, pages, used = (sum(column) for column in zip(*sums, strict=True))
    held = [min(at.budget(request), request.stride) for request in requests]
    return {
        "budget": budget,
        "pages": sum(held) / len(held),
        "recall" if setting.lossy else "mass_hit_rate": min(ratio(mass, weight), 1.0),  # sums in another order
        "page_hit_rate": ratio(pages, used),
    }


class _Pass(NamedTuple):
    """What one request's caches had on the GPU: by budget [stride + 1] the mass and the used pages; and how many pages
    are protected."""

    mass: np.ndarray
    found: np.ndarray
    least: int


def _one_pass(setting: _Setting, tell: _Counter) -> tuple[list[_Pass], str]:
    """By request, what the caches of every budget had; nothing where they are not nested. And why."""
    policy = setting.policy()
    offload = None if setting.lossy else parse_spec(str(setting.config.offload)).name
    why_not = not_nested(policy)
    if offload not in (None, "spill"):
        why_not = why_not or f'the offload policy "{offload}" may decide by what is on the GPU'
    passes = []
    for request in setting.trace.requests() if why_not is None else ():
        replay = Replay(setting, request, kind=Stacks)
        stacks = replay.cache
        assert isinstance(stacks, Stacks)
        for a, _ in replay:
            if why_not := stacks.depends:
                return [], why_not
            tell(a)
        head, tail = stacks.protected()
        passes.append(_Pass(np.cumsum(stacks.mass), np.cumsum(stacks.found), int((head + tail).max())))
    why = "who leaves is the same at every budget" if policy.bounded else "it keeps everything at every budget"
    return passes, why_not or why


def _with_budget(setting: _Setting, budget: str) -> _Setting:
    return replace(setting, config=setting.config.model_copy(update={"budget": budget}))


def _replayed(setting: _Setting, request: Request, tell: _Counter) -> _Sums:
    """One request at one budget."""
    mass = weight = 0.0
    found = used = 0
    for a, o in Replay(setting, request):
        if not a.prefill:
            mass, weight = mass + float(o.hit.sum(dtype=np.float64)), weight + float(o.total.sum(dtype=np.float64))
            found, used = found + int(o.found.sum()), used + int(o.used.sum())
        tell(a)
    return _Sums(mass, weight, found, used)


class _Counter:
    """Tells `progress` about decode steps; `start` says how many rounds over the trace there are."""

    def __init__(self, setting: Setting, progress: Progress | None):
        self._steps, self._progress = sum(r.output_tokens for r in setting.trace.requests()), progress
        self.start(1)

    def start(self, rounds: int) -> None:
        self._done, self._total = 0, rounds * self._steps

    def end(self) -> None:
        """Nothing more is told: of points that are asked for later."""
        self._progress = None

    def __call__(self, a: Access) -> None:
        self._done += not a.prefill
        if self._progress:
            self._progress(self._done, self._total)
