"""Many runs from one TOML: axes multiply, every point is a folder named by what decides its result.

A point that is there already is not run again, which makes a sweep resumable and its folder shareable. Worker processes
are handed configurations and give back nothing but files.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsim import results
from kvsim.config import parse_settings, read_toml, run_config
from kvsim.errors import ConfigError, ResultError
from kvsim.replay import prepare
from kvsim.report import VERDICTS, judge
from kvsim.results import Result, open_result
from kvsim.simulate import identify, run
from kvsim.trace.access import Trace

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[int, int], None]
_SKIP = ("name", "trace", "sweep", "plot")


@dataclass(frozen=True)
class Plan:
    """A sweep file, expanded. `points`: one flat mapping of keys per run; `axes`: the keys that vary."""

    name: str
    trace: str
    points: list[dict[str, Any]]
    axes: list[str]
    plots: list[dict[str, Any]] = field(default_factory=list)
    where: str | None = None


def read_sweep(path: str | Path, settings: list[str] | None = None) -> Plan:
    """Read a sweep file; `settings` are KEY=VALUE lines that win over it. Raises ConfigError."""
    table = read_toml(path)
    for key, value in parse_settings(settings or []).items():
        _assign(table, key, value)
    where = str(path)
    if not isinstance(table.get("sweep"), dict):
        raise ConfigError("no [sweep] table", where=where, hint='write [sweep] and an axis: policy = ["h2o", "lru"]')
    if not isinstance(table.get("trace"), str):
        raise ConfigError(
            "no trace is named", where=where, hint='write trace = "traces/reasoner.kvtrace", or trace = "demo"'
        )
    base = {k: v for k, v in table.items() if k not in _SKIP}
    plots = table.get("plot", [])
    points, axes = expand(base, table["sweep"], where)
    for point in points:
        run_config(point, where=where)
    return Plan(
        str(table.get("name", Path(path).stem)),
        table["trace"],
        points,
        axes,
        plots if isinstance(plots, list) else [plots],
        where,
    )


def expand(
    base: Mapping[str, Any], sweep: Mapping[str, Any], where: str | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """All points of a [sweep] table and of each [[sweep.also]], without repeats, and the keys that vary."""
    points: list[dict[str, Any]] = []
    axes: list[str] = []
    groups = [{k: v for k, v in sweep.items() if k != "also"}, *sweep.get("also", [])]
    for group in groups:
        flat = dict(_flatten(group))
        for key, values in flat.items():
            if not isinstance(values, list) or not values:
                raise ConfigError(f"sweep.{key} is not a list of values", where=where, hint=f"write {key} = [...]")
            if key not in axes:
                axes.append(key)
        for values in itertools.product(*flat.values()):
            point = {**base, **dict(zip(flat, values, strict=True))}
            if point not in points:
                points.append(point)
    return points, axes


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _assign(table: dict[str, Any], key: str, value: Any) -> None:
    head, dot, rest = key.partition(".")
    if dot and head == "sweep":
        table.setdefault("sweep", {})[rest] = value
    else:
        table[key] = value


def run_sweep(plan: Plan, folder: str | Path, *, jobs: int = 1, progress: Progress | None = None) -> Grid:
    """Run the points that `folder` does not hold yet, each into its own sub-folder; then read them all.

    Raises the first error of a point; what was finished before it stays.
    """
    if jobs < 1:
        raise ConfigError(f"{jobs} jobs", hint="use 1 or more")
    folder = Path(folder)
    trace = _trace(plan.trace)
    ids = [results.run_id(identify(prepare(trace, run_config(p, plan.where)))) for p in plan.points]
    todo = {i: p for i, p in zip(ids, plan.points, strict=True) if not (folder / i / "manifest.json").exists()}
    done = len(set(ids)) - len(todo)
    report = progress or (lambda done, total: None)
    report(done, len(set(ids)))
    for _ in _execute(plan, folder, todo, jobs):
        done += 1
        report(done, len(set(ids)))
    grid = Grid([open_result(folder / i) for i in dict.fromkeys(ids)], plan.axes)
    grid.save(folder / "grid.parquet")
    return grid


def _execute(plan: Plan, folder: Path, todo: Mapping[str, dict[str, Any]], jobs: int) -> Iterator[str]:
    if jobs == 1 or len(todo) < 2:
        trace = _trace(plan.trace)
        for name, point in todo.items():
            run(trace, run_config(point)).save(folder / name)
            yield name
        return
    with ProcessPoolExecutor(min(jobs, len(todo)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_point, plan.trace, point, folder / name) for name, point in todo.items()]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _point(trace: str, point: dict[str, Any], folder: Path) -> str:
    run(_trace(trace), run_config(point)).save(folder)
    return folder.name


def _trace(name: str) -> Trace:
    from kvsim.trace import open_trace

    return open_trace(name)


def sweep(trace: Trace, **keys: Any) -> Grid:
    """Sweep in this process, nothing written: every key given as a list is an axis.

    `kvsim.sweep(trace, policy=["full", "lru"], budget=["10%", "20%"])`
    """
    axes = {k: v for k, v in keys.items() if isinstance(v, list)}
    points, names = expand({k: v for k, v in keys.items() if k not in axes}, axes)
    return Grid([run(trace, run_config(p)) for p in points], names)


def open_results(folder: str | Path) -> Grid:
    """All results below a folder, as a Grid; its axes are the configuration keys in which they differ."""
    folder = Path(folder)
    found = sorted(p.parent for p in folder.glob("**/manifest.json"))
    if not found:
        raise ResultError(
            "no result here", where=str(folder), hint="give a folder that `kvsim run` or `kvsim sweep` wrote"
        )
    opened = [open_result(p) for p in found]
    configs = [flat_config(r) for r in opened]
    axes = [k for k in dict.fromkeys(k for c in configs for k in c) if len({str(c.get(k)) for c in configs}) > 1]
    return Grid(opened, axes)


def flat_config(result: Result) -> dict[str, Any]:
    """Configuration keys of a run, with hardware constants under their dotted keys."""
    config = dict(result.manifest["config"])
    constants = config.pop("constants", {})
    return {**config, **{f"hardware.{k}": v for k, v in constants.items()}}


class Grid:
    """Results as a table: one row per run, configuration keys and summary numbers as columns."""

    def __init__(self, runs: list[Result], axes: list[str]):
        self.runs, self.axes = runs, axes

    def __len__(self) -> int:
        return len(self.runs)

    def rows(self) -> list[dict[str, Any]]:
        """One flat mapping per run."""
        extra = [
            {
                "id": r.id,
                "oracle": r.manifest["policy"]["oracle"],
                "budget_bytes": r.manifest["budget_bytes"],
                **r.summary,
            }
            for r in self.runs
        ]
        return [{**flat_config(r), **e} for r, e in zip(self.runs, extra, strict=True)]

    def to_pandas(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(self.rows())

    def save(self, path: Path) -> None:
        rows = self.rows()
        keys = list(dict.fromkeys(k for row in rows for k in row))
        columns = {k: _column([row.get(k) for row in rows]) for k in keys}
        with results.file_beside(path) as partial:
            results.write_table(partial, columns)

    # -- the table a person reads: policies down, budgets across ------------------------------------------------

    def _pivot(self) -> tuple[list[str], list[str], dict[tuple[str, str], dict[str, Any]]]:
        """Row labels, budgets and the run in each cell; a row is every axis but the budget."""
        others = [a for a in self.axes if a != "budget"] or ["policy"]
        cells = {}
        for row in self.rows():
            cells[", ".join(str(row.get(a)) for a in others), str(row["budget"])] = row
        return list(dict.fromkeys(r for r, _ in cells)), list(dict.fromkeys(b for _, b in cells)), cells

    @property
    def metric(self) -> str:
        """What the table and the verdicts judge: recall, or the page hit rate where pages come back."""
        return "recall" if self.runs[0].manifest["config"]["regime"] == "lossy" else "page_hit_rate"

    def table_head(self) -> list[str]:
        return ["", *self._pivot()[1]]

    @property
    def table_title(self) -> str:
        return f"{self.metric.replace('_', ' ')} | TPOT p99 (predicted), by budget"

    def table_lines(self) -> list[list[str]]:
        from kvsim.units import format_seconds

        rows, budgets, cells = self._pivot()
        lines = []
        for r in rows:
            found = [cells.get((r, b)) for b in budgets]
            lines.append(
                [r, *(f"{c[self.metric]:.3f} | {format_seconds(c['tpot_p99_s'])}" if c else "" for c in found)]
            )
        if self.metric == "recall":
            bounds = [self._bound(b) for b in budgets]
            lines.append(["step ceiling (bound)", *("" if np.isnan(x) else f"{x:.3f} |" for x in bounds)])
        return lines

    def _bound(self, budget: str) -> float:
        """The best any cache of this size could do: the step ceiling, or Belady where pages come back."""
        rows = [r for r in self.rows() if str(r["budget"]) == budget]
        if self.metric == "recall":
            return min((r["ceiling"] for r in rows), default=float("nan"))
        return max((r[self.metric] for r in rows if r["policy"] == "belady"), default=float("nan"))

    def verdicts(self) -> list[str]:
        """Per budget: the best policy that does not know the future, what it loses, and whose loss that is."""
        lines = []
        for budget in self._pivot()[1]:
            rows = [r for r in self.rows() if str(r["budget"]) == budget and not r["oracle"] and r["policy"] != "full"]
            if not rows:
                continue
            best = max(rows, key=lambda r: r[self.metric])
            value, bound = best[self.metric], self._bound(budget)
            lines.append(
                f"at {budget}: best online policy {best['policy']}, "
                f"{self.metric.replace('_', ' ')} {value:.3f} of a possible {bound:.3f} "
                f"(full cache 1, regret {bound - value:.3f}); verdict: {VERDICTS[judge(value, bound)]}"
            )
        return lines


def _column(values: list[Any]) -> np.ndarray:
    """Numbers as numbers; anything else, and any mixture, as text."""
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return np.array(values)
    if all(isinstance(v, bool) for v in values):
        return np.array(values)
    return np.array([None if v is None else str(v) for v in values], object)
