"""Grids: what is compared with what."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvsim import sweeps
from kvsim.curves import curve
from kvsim.errors import ConfigError, PolicyError, ResultError
from kvsim.report import compare, summary_rows
from kvsim.results import MORE
from kvsim.simulate import run
from kvsim.sweeps import read_sweep, run_sweep, sweep
from kvsim.testing import tiny_trace
from kvsim.trace.access import dense_trace
from kvsim.trace.export import save
from kvsim.trace.synthetic import synthetic_trace

from .conftest import SIZES
from .policies.test_history import FewRows


@pytest.fixture(scope="module")
def grid():
    policies = ["full", "fifo", "belady", "mass-oracle"]
    return sweep(tiny_trace(), policy=policies, budget=["20%", "40%"], model="llama-3.1-8b")


def test_regret_is_measured_within_a_budget(grid):
    rows = {(row["policy"], row["budget"]): row for row in grid.rows()}
    for (policy, budget), row in rows.items():
        for name in ("belady", "mass-oracle"):
            expected = rows[name, budget]["recall"] - row["recall"]
            assert row[f"regret_{name.replace('-', '_')}"] == pytest.approx(expected), (policy, budget)
        assert row["regret_ceiling"] == pytest.approx(row["even_ceiling"] - row["recall"])
        assert row["regret_ceiling"] > -1e-6 or policy == "full"
    assert rows["belady", "20%"]["regret_belady"] == 0 < rows["fifo", "20%"]["regret_belady"]


def test_regret_to_a_reference_that_is_not_there_is_unknown(grid):
    assert all(np.isnan(row["regret_optimal"]) for row in grid.rows())


def test_regret_where_pages_come_back_is_that_of_hits():
    grid = sweep(
        tiny_trace(), policy=["lru", "belady"], budget="8", regime="offload", demand="theta", page_size=1,
        model="llama-3.1-8b",
    )  # fmt: skip
    lru, belady = grid.rows()
    assert (
        lru["regret_belady"] == pytest.approx(belady["page_hit_rate"] - lru["page_hit_rate"])
        and lru["regret_belady"] > 0
    )
    assert np.isnan(lru["regret_ceiling"])


def test_who_takes_more_than_the_budget_is_not_judged():
    """SnapKV keeps what is generated beside its budget; an allocator moves the budget between layers, which is fair."""
    policies = ["fifo", "snapkv(window=4)", "pyramid(inner='fifo')", "lazy-eviction(window=4)"]
    grid = sweep(tiny_trace(prompt=10, steps=24), policy=policies, budget="8", model="llama-3.1-8b")
    rows = {row["policy"]: row for row in grid.rows()}
    over = {policy for policy, row in rows.items() if row["over_budget"] > MORE}
    assert over == {"snapkv(window=4)"}
    assert len({row["even_ceiling"] for row in rows.values()}) == 1
    best, left = grid.verdicts()
    assert "best online policy" in best and "snapkv" not in best and "snapkv(window=4) (" in left
    notes = {r.manifest["config"]["policy"]: " ".join(r.manifest["notes"]) for r in grid.runs}
    assert [p for p in policies if "times the budget" in notes[p]] == ["snapkv(window=4)"]


def test_a_lag_buys_no_verdict(tmp_path):
    """On average it holds half its lag more, declared or not: by hand, of a prompt of 8 and pages 9 to 32."""
    (path := tmp_path / "late.py").write_text(OWN.format("pass").replace("late: int = 0", "lag: int = 1"))
    late, never = f"{path}(lag=8)", f"{path}(lag=1000)"
    trace = tiny_trace(prompt=8, steps=24)
    grid = sweep(trace, policy=["lru", late, f"{path}(lag=2)", never, "full"], budget="8", model="llama-3.1-8b")
    rows = {row["policy"]: row for row in grid.rows()}
    held = {policy: row["times_budget"] for policy, row in rows.items()}
    assert held["lru"] == 1 and held[never] == held["full"] == pytest.approx(np.arange(9, 33).mean() / 9)
    assert held[late] == pytest.approx(np.arange(9, 17).mean() / 9) and held[f"{path}(lag=2)"] == pytest.approx(9.5 / 9)
    assert [p for p in rows if rows[p]["within_budget"]] == ["lru", f"{path}(lag=2)"]
    assert rows[never]["over_budget"] < 1 < rows[never]["recall"] + 0.001  # and yet
    best, left = grid.verdicts()
    assert "best online policy lru" in best or "best online policy " + f"{path}(lag=2)" in best
    assert f"{never} (1.000 with 2.28 times it), {late} (0." in left and "1.39 times it)" in left
    cells = {line[0]: line[1] for line in grid.table_lines()}
    assert cells[never].endswith("| 2.28x") and cells[late].endswith("| 1.39x") and cells["full"].count("|") == 1
    lagged = next(r for r in grid.runs if r.manifest["config"]["policy"] == never)
    assert compare(trace, lagged).verdict == "over"
    assert ("budget taken", "2.28x") in [row[:2] for row in summary_rows(lagged)]


def test_a_trace_may_be_named(few):
    trace, how = sweeps._trace(str(few)), {"policy": "lru", "budget": "50%"}
    one = run(trace, **how)
    assert [r.id for r in (run(few, **how), run(str(few), **how))] == [one.id] * 2
    assert sweep(str(few), policy=["lru"], budget="50%").runs[0].id == one.id
    assert curve(str(few), policy="lru", budgets=["50%"]).points[0]["recall"] == pytest.approx(one.recall)
    assert compare(str(few), one).policy == one.recall


def test_the_bound_is_that_of_the_budget_whoever_is_in_the_grid():
    """A split lowers its own ceiling, a lag raises it; neither is the bound of the others."""
    trace = tiny_trace(prompt=24, steps=24)
    alone, beside = (
        sweep(trace, policy=policies, budget="8", model="llama-3.1-8b")
        for policies in (["fifo", "lru"], ["fifo", "lru", "pyramid(inner='fifo')", "lazy-eviction(window=4)"])
    )
    assert [r for r in beside.table_lines() if "bound" in r[0]] == [r for r in alone.table_lines() if "bound" in r[0]]


# -- before the first point ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Two requests of which the second prompt is long, and the last two rows of both are stored."""
    sources = [synthetic_trace(seed=n, prompt=n, steps=12).sources[0] for n in (8, 30)]
    stored = [FewRows(s._prompt, s._decode, id=n) for n, s in enumerate(sources)]
    path = tmp_path_factory.mktemp("few") / "few.kvtrace"
    trace = dense_trace(stored)
    save(replace(trace, geometry=replace(trace.geometry, **SIZES)), path)
    return path


@pytest.fixture
def ran(monkeypatch):
    """Policy and budget of what was run, in order."""
    ran, run = [], sweeps.run
    monkeypatch.setattr(
        sweeps, "run", lambda trace, config: ran.append((config.policy, config.budget)) or run(trace, config)
    )
    return ran


def plan(folder, trace, text, **files):
    for name, body in files.items():
        (folder / f"{name}.py").write_text(body)
    (folder / "s.toml").write_text(f'trace = "{trace}"\n{text}')
    return read_sweep(folder / "s.toml")


OWN = """
from kvsim.registry import policy

@policy("own")
class Own:
    "One of mine."
    late: int = 0

    def score(self, view):
        {}
        return view.last
"""


@pytest.mark.parametrize(
    ("axes", "error", "what", "where"),
    [
        (
            'policy = ["lru", "corm(window=16, recent=1)"]',
            PolicyError,
            "stores 2",
            "policy = 'corm(window=16, recent=1)'",
        ),
        ('policy = ["lru", "quest"]', PolicyError, "needs k, q, which the trace does not hold", "policy = 'quest'"),
        ('policy = ["lru", "OWN"]', PolicyError, "failed in score at step 0", "own.py'"),
        ('budget = ["50%", "1%"]', ConfigError, "less than one page", "budget = '1%'"),
        ('budget = ["50%", "2"]\npolicy = ["streaming-llm"]', ConfigError, "below the 5", "budget = '2'"),
        ('budget = ["50%", "60%"]\nhost = ["1GiB", "-1GiB"]', ConfigError, "is below zero", "host = '-1GiB'"),
    ],
)
def test_what_is_certain_to_fail_is_said_before_the_first_point(few, tmp_path, ran, axes, error, what, where):
    """The trace stores too few rows of its second prompt, says the policy when it sees that prompt."""
    axes = axes.replace("OWN", f"{tmp_path}/own.py")
    asked = plan(tmp_path, few, f"[sweep]\n{axes}\n", own=OWN.format("1 / 0"))
    with pytest.raises(error) as caught:
        run_sweep(asked, tmp_path / "out")
    assert what in caught.value.what and where in caught.value.where and "s.toml" in caught.value.where
    values = {key: [p[key] for p in asked.points] for key in asked.axes}
    with pytest.raises(error, match=caught.value.what.split(":")[0].replace("(", ".").replace(")", ".")):
        sweep(sweeps._trace(str(few)), **{key: list(dict.fromkeys(found)) for key, found in values.items()})
    assert ran == [] and not (tmp_path / "out").exists()


def test_a_policy_is_asked_once_at_the_least_budget_and_not_where_it_is_done(few, tmp_path, monkeypatch):
    asked, rehearse = [], sweeps.rehearse
    monkeypatch.setattr(sweeps, "rehearse", lambda s: asked.append((s.config.policy, s.config.budget)) or rehearse(s))
    text = '[sweep]\npolicy = ["lru", "h2o", "belady"]\nbudget = ["50%", "6", "30%"]\n'
    run_sweep(plan(tmp_path, few, text), tmp_path / "out")
    assert sorted(asked) == [("belady", "6"), ("h2o", "6"), ("lru", "6")]
    asked.clear()
    run_sweep(plan(tmp_path, few, text), tmp_path / "out")
    assert asked == []
    run_sweep(plan(tmp_path, few, text.replace('"6"', '"7", "8"')), tmp_path / "out")
    assert sorted(asked) == [("belady", "7"), ("h2o", "7"), ("lru", "7")]


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_fails_late_names_its_point_and_what_was_finished_stays(few, tmp_path, jobs):
    late = OWN.format("assert not self.late or view.now < self.late, 'too late'")
    asked = plan(tmp_path, few, f"[sweep]\npolicy = ['lru', '{tmp_path}/own.py(late=5)']\n", own=late)
    with pytest.raises(PolicyError, match="too late") as caught:
        run_sweep(asked, tmp_path / "out", jobs=jobs)
    assert "own.py(late=5)" in caught.value.where and "s.toml" in caught.value.where
    assert jobs > 1 or len(list((tmp_path / "out").glob("*/manifest.json"))) == 1


def test_a_folder_that_cannot_be_written_is_said_before_the_first_point(few, tmp_path, ran):
    asked = plan(tmp_path, few, '[sweep]\npolicy = ["lru", "h2o"]\n')
    (tmp_path / "out").write_text("years of work")
    with pytest.raises(ResultError, match="cannot write below"):
        run_sweep(asked, tmp_path / "out")
    assert ran == []


# -- files that are edited meanwhile -------------------------------------------------------------------------------


def test_a_sweep_is_of_the_text_that_it_began_with(few, tmp_path):
    """In both ways of running it; the next one sees what was edited."""
    calm, edited = OWN.format("pass"), OWN.format("return view.key % 2")
    for jobs in (1, 2):
        asked = plan(
            tmp_path, few, f"[sweep]\npolicy = ['{tmp_path}/own.py']\nbudget = ['30%', '40%', '50%']\n", own=calm
        )
        before = run_sweep(asked, tmp_path / f"calm{jobs}")
        touched = run_sweep(
            asked, tmp_path / f"touched{jobs}", jobs=jobs,
            progress=lambda done, total: (tmp_path / "own.py").write_text(edited),
        )  # fmt: skip
        assert [r.id for r in touched.runs] == [r.id for r in before.runs]
        assert [r.recall for r in touched.runs] == [r.recall for r in before.runs]
        after = run_sweep(asked, tmp_path / f"touched{jobs}")
        assert not {r.id for r in after.runs} & {r.id for r in before.runs}
        assert [r.recall for r in after.runs] != [r.recall for r in before.runs]


def test_a_point_whose_files_are_other_ones_by_now_is_not_kept(few, tmp_path):
    """A hardware file is read by each point."""
    from kvsim.machine import Hardware

    text = Hardware.load("h100-pcie5").to_toml()
    (file := tmp_path / "my.toml").write_text(text)
    asked = plan(tmp_path, few, f'hardware = "{file}"\n[sweep]\npolicy = ["lru", "h2o"]\n')
    other = Hardware.load("h100-pcie5").with_overrides({"link.h2d.bandwidth": "1GB/s"}).to_toml()
    with pytest.raises(ConfigError, match="was edited"):
        run_sweep(asked, tmp_path / "out", progress=lambda done, total: file.write_text(other))
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize("also", ["also = 3", 'also = ["lru"]'])
def test_what_is_swept_also_is_a_table(tmp_path, also):
    (file := tmp_path / "s.toml").write_text(f'trace = "demo"\n[sweep]\npolicy = ["lru"]\n{also}\n')
    with pytest.raises(ConfigError, match="sweep.also is no table of axes"):
        read_sweep(file)
