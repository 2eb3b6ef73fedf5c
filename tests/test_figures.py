"""Figures: the right lines in the right place, files that come out the same twice, and errors that say what to do."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import kvsim
from kvsim.errors import ConfigError, ResultError
from kvsim.figures import columns, draw, draw_plan, plot
from kvsim.results import Result
from kvsim.trace.synthetic import synthetic_trace

POLICIES = ["full", "random", "lru", "h2o", "tova", "belady", "mass-oracle"]
MODEL = "llama-3.2-1b"


@pytest.fixture(scope="module")
def trace():
    return synthetic_trace(2, 24, 32, 2, 2, seed=1)


@pytest.fixture(scope="module")
def lossy(trace):
    return kvsim.sweep(trace, policy=POLICIES, budget=["20%", "40%", "60%"], model=MODEL)


@pytest.fixture(scope="module")
def offload(trace):
    keys = {"regime": "offload", "demand": "theta", "page_size": 2, "model": MODEL, "concurrency": 2}
    return kvsim.sweep(trace, policy=["lru", "belady"], budget=["20%", "60%"], **keys)


@pytest.fixture(scope="module")
def one(trace):
    run = kvsim.run(trace, policy="lru", budget="30%", regime="offload", demand="theta", page_size=2, model=MODEL)
    return table([run])


def table(runs):
    return SimpleNamespace(runs=runs, rows=lambda: kvsim.sweeps.Grid(runs, []).rows())


def legend(figure):
    return [t.get_text().strip() for t in figure.axes[0].get_legend().get_texts() if t.get_text().strip()]


def texts(figure):
    return "\n".join(t.get_text() for t in figure.texts)


def line_at(figure, values):
    """The drawn lines that have these y values."""
    return [x for x in figure.axes[0].lines if len(x.get_ydata()) == len(values) and np.allclose(x.get_ydata(), values)]


def test_recall_against_budget_shows_every_policy_the_references_and_the_bound(lossy):
    figure = plot(lossy)
    assert set(legend(figure)) == {
        "step ceiling", "out of reach at this size", "full cache", "belady (oracle)", "mass-oracle",
        "random", "lru", "h2o", "tova",
    }  # fmt: skip
    ax = figure.axes[0]
    assert ax.get_xlabel() == "budget (% of each request's final length)"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["20%", "40%", "60%"]
    rows = {(r["policy"], r["budget"]): r for r in lossy.rows()}
    for policy in ("h2o", "belady"):
        (line,) = line_at(figure, [rows[policy, b]["recall"] for b in ("20%", "40%", "60%")])
        assert list(line.get_xdata()) == [20, 40, 60]
    assert line_at(figure, [rows["h2o", b]["even_ceiling"] for b in ("20%", "40%", "60%")])
    for fact in ("trace synthetic (2 requests)", f"model {MODEL}", "hardware h100-pcie5", "lossy regime", "open loop"):
        assert fact in texts(figure)


def test_policies_are_listed_from_the_highest_line_down(lossy):
    names = [n for n in legend(plot(lossy)) if n in ("random", "lru", "h2o", "tova")]
    ends = {r["policy"]: r["recall"] for r in lossy.rows() if r["budget"] == "60%"}
    assert names == sorted(names, key=lambda n: -ends[n])


def test_lines_are_told_apart_and_keep_their_looks(lossy):
    looks = {}
    for grid in (lossy, table([r for r in lossy.runs if r.manifest["config"]["policy"] in ("h2o", "tova")])):
        figure = plot(grid)
        drawn = [x for x in figure.axes[0].lines if x.get_marker() not in ("", "None")]
        assert len({(x.get_color(), x.get_marker()) for x in drawn}) == len(drawn)
        handles = figure.axes[0].get_legend().get_lines()
        looks[len(drawn)] = {(h.get_color(), h.get_marker()) for h in handles if h.get_marker() != "None"}
    small, big = (looks[k] for k in sorted(looks))
    assert small <= big


def test_times_say_their_unit_and_that_they_are_predicted(lossy):
    figure = plot(lossy, y="tpot_p99_s")
    top = max(r["tpot_p99_s"] for r in lossy.rows())
    unit = "ms" if top >= 1e-3 else "µs"
    assert figure.axes[0].get_ylabel() == f"p99 time per output token ({unit}, predicted)"
    assert texts(figure).startswith("Predicted p99 TPOT by cache budget")
    assert "predicted by the machine model" in texts(figure)
    assert figure.axes[0].get_ylim()[0] == 0


def test_the_offload_regime_is_judged_by_page_hits_and_names_its_demand(offload):
    figure = plot(offload)
    assert "page hit rate" in figure.axes[0].get_ylabel()
    assert "offload regime · demand theta · page size 2 tokens · concurrency 2" in texts(figure)
    assert "full cache" in legend(figure)  # by definition: every page is found
    assert "step ceiling" not in legend(figure)


def test_other_settings_that_vary_make_lines_of_their_own(trace):
    grid = kvsim.sweep(trace, policy=["lru", "h2o"], budget=["30%", "60%"], page_size=[1, 2], model=MODEL)
    names = [n for n in legend(plot(grid)) if "lru" in n or "h2o" in n]
    assert sorted(names) == [f"{p}, page size {s}" for p in ("h2o", "lru") for s in (1, 2)]


def test_runs_that_leave_a_setting_at_its_default_are_drawn_beside_the_others(trace):
    link = {"hardware.link.h2d.bandwidth": "2GB/s"}
    keys = {"policy": "lru", "budget": "30%", "regime": "offload", "demand": "theta", "model": MODEL}
    figure = plot(
        table([kvsim.run(trace, **keys), kvsim.run(trace, **keys, **link)]), x=next(iter(link)), y="tpot_p50_s"
    )
    assert {t.get_text() for t in figure.axes[0].get_xticklabels()} == {"default", "2GB/s"}


def test_policies_against_each_other_are_bars_best_first(trace):
    grid = kvsim.sweep(trace, policy=["lru", "h2o", "belady", "full"], budget="40%", model=MODEL)
    for y, best_first in (("recall", -1), ("recurrence_loss", 1)):
        ax = plot(grid, x="policy", y=y).axes[0]
        values = {row["policy"]: row[y] for row in grid.rows()}
        names = [tick.get_text() for tick in ax.get_yticklabels()]
        assert names == sorted(values, key=lambda name: (best_first * values[name], name))
        assert [bar.get_width() for bar in ax.patches] == pytest.approx([values[name] for name in names])
        colours = {name: bar.get_facecolor() for name, bar in zip(names, ax.patches, strict=True)}
        assert colours["belady"] == colours["full"] != colours["lru"] == colours["h2o"]
        lines = {line.get_label(): line.get_xdata()[0] for line in ax.lines}
        assert lines["full cache"] == values["full"]
        assert y != "recall" or lines["step ceiling (bound)"] == grid.rows()[0]["even_ceiling"]


@pytest.mark.parametrize("count", [3, 30])
def test_a_legend_has_room_for_all_its_lines(trace, count):
    names = [f"h2o(recent={1 + i % 15}, sink={i // 15})" for i in range(count)]
    figure = plot(kvsim.sweep(trace, policy=names, budget=["30%", "40%"], model=MODEL))
    figure.canvas.draw()
    box = figure.axes[0].get_legend().get_window_extent()
    assert box.y0 >= 0 and box.x1 <= figure.bbox.x1 and figure.axes[0].get_position().width > 0.3


def test_numbers_as_hue_and_names_on_x(lossy):
    figure = plot(lossy, x="policy", hue="budget")
    assert legend(figure) == ["60%", "40%", "20%"]
    assert all(x.get_linestyle() == "None" for x in figure.axes[0].lines)
    assert {t.get_text() for t in figure.axes[0].get_xticklabels()} == set(POLICIES)


def test_against_a_measured_column_the_points_are_joined_by_budget(lossy):
    figure = plot(lossy, x="peak_bytes", y="recall")
    rows = [r for r in lossy.rows() if r["policy"] == "lru"]
    assert line_at(figure, [r["recall"] for r in sorted(rows, key=lambda r: float(r["budget"][:-1]))])
    assert "MiB" in figure.axes[0].get_xlabel() or "KiB" in figure.axes[0].get_xlabel()


@pytest.mark.parametrize(
    ("values", "label", "log", "ticks"),
    [
        (["10%", "20%", "50%"], "% of each", False, {10.0: "10%", 20.0: "20%", 50.0: "50%"}),
        (["64", "512"], "pages per lane", True, {64.0: "64", 512.0: "512"}),
        (["1GiB", "2GiB"], "over all lanes", False, {2.0**30: "1 GiB", 2.0**31: "2 GiB"}),
    ],
)
def test_budgets_are_laid_out_in_their_own_unit(values, label, log, ticks):
    axis = columns.axis("budget", values)
    assert label in axis.label and axis.log == log and axis.ticks == pytest.approx(ticks)


def test_budgets_in_different_units_do_not_share_an_axis():
    with pytest.raises(ConfigError, match="budget_bytes"):
        columns.axis("budget", ["20%", "512"])


def test_settings_with_units_become_numbers():
    axis = columns.axis("hardware.link.h2d.bandwidth", ["50GB/s", "6GB/s"])
    assert axis.place("50GB/s") == 50e9 and axis.log and not axis.words
    assert columns.axis("overlap", ["layer", "none"]).words


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
@pytest.mark.parametrize("kind", ["line", "timeline", "lanes"])
def test_files_come_out_the_same_twice(lossy, one, tmp_path, kind, suffix):
    grid = lossy if kind == "line" else one
    first = draw(grid, tmp_path / "a" / f"x.{suffix}", kind=kind)
    second = draw(grid, tmp_path / "b" / f"x.{suffix}", kind=kind)
    assert first.read_bytes() == second.read_bytes() and first.stat().st_size > 3000
    assert [p.name for p in first.parent.iterdir()] == [first.name]


def test_the_timeline_shows_the_steps_asked_for(one):
    from kvsim.figures import timeline

    figure = timeline.draw(one.runs[0], "5:9")
    assert texts(figure).startswith("Predicted timeline, decode steps 5 to 8")
    ax = figure.axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()][1:] == ["host to GPU", "GPU to host"]
    steps = one.runs[0].tables["steps"]
    row = np.flatnonzero(steps["step"] == 5)[0]
    span = (steps["end_s"][row + 3] - steps["start_s"][row]) * (1e3 if "ms" in figure.axes[2].get_xlabel() else 1e6)
    assert ax.get_xlim() == pytest.approx((0, span))


def test_requests_that_step_together_are_one_iteration(offload):
    from kvsim.figures.timeline import _iterations

    run = offload.runs[0]
    every = _iterations(run)
    assert every.number.max() == 32 and (every.number == 0).sum() == 2  # two requests of 32 steps, side by side
    assert every["fetched_host_bytes"].sum() == pytest.approx(run.fetched_host_bytes)
    assert (every["compute_s"] <= every["end_s"] - every["start_s"] + 1e-12).all()


def test_lanes_show_recall_of_each_layer_and_head(one, lossy):
    from kvsim.figures import lanes

    run = next(r for r in lossy.runs if r.manifest["config"]["policy"] == "h2o")
    figure = lanes.draw(run, "recall")
    image = np.asarray(figure.axes[0].images[0].get_array())
    table = run.tables["lanes"]
    assert image.shape == (2, 2)
    for i in range(4):
        share = table["attended"][i] / table["weight"][i]
        assert image[table["kv_head"][i], table["layer"][i]] == pytest.approx(share)
    assert lanes.draw(run, "recurrence_loss") and lanes.draw(one.runs[0], "page_hit_rate")


def test_many_lanes_fit(one):
    n, heads = 80, 8
    lanes = {
        "layer": np.repeat(np.arange(n), heads), "kv_head": np.tile(np.arange(heads), n), "weight": np.ones(n * heads),
        "attended": np.linspace(0.5, 1, n * heads), "hit": np.ones(n * heads), "used_pages": np.ones(n * heads, int),
        "found_pages": np.ones(n * heads, int),
    }  # fmt: skip
    from kvsim.figures.lanes import draw as draw_lanes

    figure = draw_lanes(Result({**one.runs[0].tables, "lanes": lanes}, one.runs[0].manifest), "recall")
    assert figure.get_figwidth() <= 10.5 and len(figure.axes[0].get_xticks()) <= 16


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"y": "recal"}, 'did you mean "recall"'),
        ({"x": "nonsense"}, "the columns are"),
        ({"hue": "colour"}, "hue"),
        ({"y": "policy"}, "not a number"),
        ({"kind": "pie"}, "line, families, timeline, lanes"),
        ({"kind": "lanes"}, "one run"),
        ({"kind": "timeline"}, "one run"),
    ],
)
def test_what_cannot_be_drawn_says_so(lossy, tmp_path, settings, says):
    with pytest.raises(ConfigError, match=says):
        draw(lossy, tmp_path / "x.png", **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", ["5", "a:b", "9:5", "0:3", "99:120"])
def test_a_window_the_run_does_not_have(one, tmp_path, steps):
    with pytest.raises(ConfigError, match="steps"):
        draw(one, tmp_path / "x.png", kind="timeline", steps=steps)


def test_lanes_name_their_columns(one, tmp_path):
    with pytest.raises(ConfigError, match="recurrence_loss"):
        draw(one, tmp_path / "x.png", kind="lanes", y="tpot_p99_s")


def test_nothing_to_draw(lossy, tmp_path):
    with pytest.raises(ResultError, match="no run"):
        plot(table([]))
    rows = [{**r, "ceiling": float("nan")} for r in lossy.rows()]
    with pytest.raises(ResultError, match="ceiling"):
        plot(SimpleNamespace(runs=lossy.runs, rows=lambda: rows), y="ceiling")


def test_places_that_cannot_be_written(lossy, tmp_path):
    with pytest.raises(ConfigError, match=".png, .svg, .pdf"):
        draw(lossy, tmp_path / "x.jpeg2")
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match="cannot write"):
        draw(lossy, tmp_path / "file" / "x.png")


def test_plans_draw_their_plots(lossy, tmp_path):
    plan = SimpleNamespace(plots=[{"file": "a.svg"}, {"file": "b.png", "y": "recurrence_loss"}], where="x.toml")
    assert draw_plan(lossy, plan, tmp_path) == [tmp_path / "a.svg", tmp_path / "b.png"]
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    for wrong in ({"x": "budget"}, {"file": "a.svg", "colour": 1}, "a.svg"):
        with pytest.raises(ConfigError, match="needs file"):
            draw_plan(lossy, SimpleNamespace(plots=[wrong], where="x.toml"), tmp_path)


def test_the_callers_matplotlib_is_left_alone(lossy, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(lossy, tmp_path / "x.svg")
    assert dict(matplotlib.rcParams) == before
    code = "import sys, kvsim.figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_timeline_shows_what_was_fetched_ahead(trace, tmp_path):
    from kvsim.figures import timeline

    (file := tmp_path / "ahead.py").write_text(
        "from kvsim import offload\n\n@offload('ahead')\nclass Ahead:\n    'Everything, at every step.'\n"
        "    def place(self, view, victims):\n        return 1\n"
        "    def prefetch(self, view):\n        return True\n"
    )
    keys = {"policy": "fifo", "budget": "30%", "demand": "theta(0.9)", "page_size": 2, "model": MODEL}
    result = kvsim.run(trace, offload=str(file), **keys)
    assert result.summary["prefetched_host_bytes"] > 0
    figure = timeline.draw(result)
    assert "host to GPU" in [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "ahead from host" in [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    every, links = timeline._iterations(result), result.links.set_index(["link", "direction"])["bytes"]
    for link, direction, _, _, names in timeline._LINKS:  # the bars of a link are all that it carried
        assert timeline._bytes(every, names).sum() == pytest.approx(links[link, direction])
