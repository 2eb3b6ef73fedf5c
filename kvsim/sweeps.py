"""Many runs from one TOML: axes multiply, every point is a folder named by what decides its result.

A point that is there already is not run again, which makes a sweep resumable and its folder shareable. Worker processes
are handed configurations and give back nothing but files.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsim import registry, results
from kvsim.config import parse_settings, read_toml, run_config
from kvsim.errors import ConfigError, KvsimError, ResultError
from kvsim.machine import Hardware
from kvsim.manifest import identify
from kvsim.replay import Setting, opened, prepare, rehearse
from kvsim.report import VERDICTS, bound, judge, metric, times_budget, within
from kvsim.results import Result, check_free, open_result
from kvsim.simulate import run
from kvsim.trace.access import Trace

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[int, int], None]
Point = dict[str, Any]  # flat keys of one run
_SKIP = ("name", "trace", "sweep", "plot")
_REFERENCES = ("belady", "mass-oracle", "optimal")  # that a run's regret is measured from, where the grid has them


@dataclass(frozen=True)
class Plan:
    """A sweep file, expanded. `points`: one flat mapping of keys per run; `axes`: the keys that vary."""

    name: str
    trace: str
    points: list[Point]
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
        Hardware.require_units(run_config(point, where=where).constants, where)
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
) -> tuple[list[Point], list[str]]:
    """All points of a [sweep] table and of each [[sweep.also]], without repeats, and the keys that vary."""
    points: list[Point] = []
    axes: list[str] = []
    also = sweep.get("also", [])
    if not isinstance(also, list) or not all(isinstance(group, Mapping) for group in also):
        raise ConfigError("sweep.also is no table of axes", where=where, hint="write [[sweep.also]], and axes below it")
    groups = [{k: v for k, v in sweep.items() if k != "also"}, *also]
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

    Files of policies are read once, at the start. What is certain to fail is said before the first point is run. Raises
    the first error of a point; what was finished before it stays.
    """
    if jobs < 1:
        raise ConfigError(f"{jobs} jobs", hint="use 1 or more")
    folder, texts = Path(folder), registry.texts()
    with registry.reading(texts):
        ids, todo = _ask(plan, folder)
    done = len(ids) - len(todo)
    report = progress or (lambda done, total: None)
    report(done, len(ids))
    for _ in _execute(plan, todo, texts, jobs):
        done += 1
        report(done, len(ids))
    grid = Grid([open_result(folder / i) for i in ids], plan.axes)
    grid.save(folder / "grid.parquet")
    return grid


def _ask(plan: Plan, folder: Path) -> tuple[list[str], dict[Path, Point]]:
    """The ids of all points; and those that are to be run, by the folders that they go to."""
    asked = {
        results.run_id(identify(setting)): (point, setting) for point, setting in _prepare(_trace(plan.trace), plan)
    }
    todo = {i: found for i, found in asked.items() if not (folder / i / "manifest.json").exists()}
    for i in todo:
        check_free(folder / i, i)
    _rehearse(plan, todo.values())
    return list(asked), {folder / i: point for i, (point, _) in todo.items()}


def _prepare(trace: Trace, plan: Plan) -> Iterator[tuple[Point, Setting]]:
    """Every point with what it names loaded and checked."""
    for point in plan.points:
        with _named(plan, point):
            setting = prepare(trace, run_config(point, plan.where))
        yield point, setting


def _rehearse(plan: Plan, asked: Iterable[tuple[Point, Setting]]) -> None:
    """The first step of points; of those that differ in budget alone, of the one with the least, where most leaves."""
    least: dict[str, tuple[Point, Setting]] = {}
    for point, setting in sorted(asked, key=lambda found: found[1].budget(found[1].trace.requests()[0])):
        least.setdefault(setting.config.model_dump_json(exclude={"budget"}), (point, setting))
    for point, setting in least.values():
        with _named(plan, point):
            rehearse(setting)


@contextmanager
def _named(plan: Plan, point: Point) -> Iterator[None]:
    """An error names the point it is of."""
    try:
        yield
    except KvsimError as error:
        axes = ", ".join(f"{axis} = {point[axis]!r}" for axis in plan.axes if axis in point)
        where = ", ".join(dict.fromkeys(place for place in (plan.where or plan.name, axes, error.where) if place))
        raise type(error)(error.what, where=where, hint=error.hint) from None


def _execute(plan: Plan, todo: Mapping[Path, Point], texts: dict[Path, bytes], jobs: int) -> Iterator[None]:
    """Run the points, each into its folder; one step per point that is done."""
    if jobs == 1 or len(todo) < 2:
        trace = _trace(plan.trace)
        for folder, point in todo.items():
            with _named(plan, point):
                _point(trace, point, folder, texts)
            yield
        return
    others, start = active_children(), get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(todo)), mp_context=start, initializer=_worker) as pool:
        futures = {pool.submit(_point, plan.trace, p, folder, texts): p for folder, p in todo.items()}
        try:
            for future in as_completed(futures):
                with _named(plan, futures[future]):
                    future.result()
                yield
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                if process not in others:
                    process.terminate()  # a point may take minutes; what it had begun to write has no name yet
            raise


def _worker() -> None:
    """A worker leaves interrupts to the process that started it, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _point(trace: Trace | str, point: Point, folder: Path, texts: dict[Path, bytes]) -> None:
    """`folder` is called as the run is to be; a hardware file, say, may be another one by now."""
    with registry.reading(texts):
        result = run(_trace(trace) if isinstance(trace, str) else trace, run_config(point))
    if result.id != folder.name:
        raise ConfigError("a file that this point names was edited since the sweep began", hint="run the sweep again")
    result.save(folder)


def _trace(name: str) -> Trace:
    from kvsim.trace import open_trace

    return open_trace(name)


def sweep(trace: Trace | str | Path, **keys: Any) -> Grid:
    """Sweep in this process, nothing written: every key given as a list is an axis.

    `kvsim.sweep(trace, policy=["full", "lru"], budget=["10%", "20%"])`
    """
    trace, axes = opened(trace), {k: v for k, v in keys.items() if isinstance(v, list)}
    plan = Plan("sweep", trace.name, *expand({k: v for k, v in keys.items() if k not in axes}, axes))
    runs = []
    with registry.reading(registry.texts()):
        _rehearse(plan, _prepare(trace, plan))
        for point in plan.points:
            with _named(plan, point):
                runs.append(run(trace, run_config(point)))
    return Grid(runs, plan.axes)


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
                "times_budget": times_budget(r),
                "within_budget": within(r),
                **r.summary,
            }
            for r in self.runs
        ]
        rows = [{**flat_config(r), **e} for r, e in zip(self.runs, extra, strict=True)]
        self._regret(rows)
        return rows

    def _regret(self, rows: list[dict[str, Any]]) -> None:
        """What each reference in the grid reaches above a run, all else equal; below zero where it is beaten."""
        key = self.metric
        references = {(self._alike(row), row["policy"]): row[key] for row in rows if row["policy"] in _REFERENCES}
        for row in rows:
            for name in _REFERENCES:
                best = references.get((self._alike(row), name), float("nan"))
                row[f"regret_{name.replace('-', '_')}"] = best - row[key]
            row["regret_ceiling"] = row["even_ceiling"] - row[key] if key == "recall" else float("nan")

    def _alike(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(f"{a}={row.get(a)}" for a in ("budget", *self.axes) if a != "policy")

    def to_pandas(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(self.rows())

    def save(self, path: Path) -> None:
        rows = self.rows()
        keys = list(dict.fromkeys(k for row in rows for k in row))
        columns = {k: _column([row.get(k) for row in rows]) for k in keys}
        with results.file_beside(path) as partial:
            results.write_table(partial, columns)

    # -- the table a person reads: runs down, budgets across ----------------------------------------------------

    @property
    def metric(self) -> str:
        """What the table and the verdicts judge; runs of both regimes are judged by recall."""
        found = {metric(run) for run in self.runs}
        return found.pop() if len(found) == 1 else "recall"

    def _groups(self) -> dict[str, list[dict[str, Any]]]:
        """Rows that may be compared with each other: alike in every axis but policy and budget."""
        others = [a for a in self.axes if a not in ("policy", "budget")]
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows():
            groups.setdefault(", ".join(f"{a}={row.get(a)}" for a in others), []).append(row)
        return groups

    def _budgets(self) -> list[str]:
        return list(dict.fromkeys(str(row["budget"]) for row in self.rows()))

    def table_head(self) -> list[str]:
        return ["", *self._budgets()]

    @property
    def table_title(self) -> str:
        return f"{self.metric.replace('_', ' ')} | TPOT p99 (predicted) | times the budget, where more, by budget"

    def table_lines(self) -> list[list[str]]:
        from kvsim.units import format_seconds

        lines = []
        for group, rows in self._groups().items():
            cells = {(row["policy"], str(row["budget"])): row for row in rows}
            for policy in dict.fromkeys(row["policy"] for row in rows):
                found = [cells.get((policy, b)) for b in self._budgets()]
                text = [
                    f"{c[self.metric]:.3f} | {format_seconds(c['tpot_p99_s'])}{_more(c)}" if c else "" for c in found
                ]
                lines.append([f"{policy}, {group}" if group else policy, *text])
            if self.metric == "recall":
                bounds = [bound([r for r in rows if str(r["budget"]) == b], self.metric) for b in self._budgets()]
                label = f"step ceiling (bound), {group}" if group else "step ceiling (bound)"
                lines.append([label, *("" if np.isnan(x) else f"{x:.3f} |" for x in bounds)])
        return lines

    def verdicts(self) -> list[str]:
        """Per group and budget: the best policy that keeps to it and does not know the future, what it loses, and whose
        loss it is; where pages come back, who is quicker; then those that take more than the budget, and how much."""
        from kvsim.units import format_seconds

        lines = []
        for group, rows in self._groups().items():
            for budget in self._budgets():
                same = [r for r in rows if str(r["budget"]) == budget]
                online = [r for r in same if not r["oracle"] and r["policy"] != "full"]
                most = bound(same, self.metric)
                fair = [r for r in online if r["within_budget"]]
                if not fair or np.isnan(most):
                    continue
                best = max(fair, key=lambda r: r[self.metric])
                value = best[self.metric]
                lines.append(
                    f"at {budget}{', ' + group if group else ''}: best online policy {best['policy']}, "
                    f"{self.metric.replace('_', ' ')} {value:.3f} of a possible {most:.3f} "
                    f"(full cache 1, regret {most - value:.3f}); verdict: {VERDICTS[judge(value, most)]}"
                )
                quick = min(fair, key=lambda r: r["tpot_p99_s"])
                if self.metric == "page_hit_rate" and quick["tpot_p99_s"] < best["tpot_p99_s"]:  # misses are not time
                    times = (f"{format_seconds(r['tpot_p99_s'])} ({r['policy']})" for r in (quick, best))
                    lines.append(f"at {budget}: shortest p99 TPOT {' against '.join(times)}")
                left = sorted((r for r in online if not r["within_budget"]), key=lambda r: -r[self.metric])
                if left:
                    named = (
                        f"{r['policy']} ({r[self.metric]:.3f} with {r['times_budget']:.2f} times it)" for r in left
                    )
                    lines.append(f"at {budget}: not judged, holding or reading more on average: {', '.join(named)}")
        return lines or [
            "no verdict: nothing in this sweep is a bound; where pages come back, add belady to the policies"
        ]


def _more(row: Mapping[str, Any]) -> str:
    """What a cell says of a run that takes more than its budget."""
    over = row["times_budget"] > results.MORE and row["policy"] != "full"
    return f" | {row['times_budget']:.2f}x" if over else ""


def _column(values: list[Any]) -> np.ndarray:
    """Numbers as numbers; anything else, and any mixture, as text."""
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return np.array(values)
    if all(isinstance(v, bool) for v in values):
        return np.array(values)
    return np.array([None if v is None else str(v) for v in values], object)
