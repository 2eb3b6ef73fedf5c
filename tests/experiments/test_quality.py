"""Quality points: rows that can be taken up again, an open loop that is kvsim's, and words that follow the numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import kvsim  # noqa: E402
from experiments.quality import __main__ as command  # noqa: E402
from experiments.quality import page, points  # noqa: E402
from experiments.quality.rows import read  # noqa: E402
from kvsim.errors import ConfigError, ResultError  # noqa: E402

TINY = ("--chains", "2", "--settings", "problems=1,steps=3")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Rows of two chains at two points, written in two goes; and what the second one said."""
    out = tmp_path_factory.mktemp("quality") / "rows.jsonl"
    for policy in ("h2o", "tova"):
        assert (
            command.main(["run", "--out", str(out), *TINY, "--policy", "full", "--policy", policy, "--budget", "50%"])
            == 0
        )
    return out


def test_points_that_are_there_are_not_measured_again(measured):
    rows = read([measured])
    assert [(row["policy"], row["budget"]) for row in rows] == [("full", "100%"), ("h2o", "50%"), ("tova", "50%")]
    full, h2o, _ = rows
    assert full["closed"]["right"] == [1, 1] and full["closed"]["exact"] == 2 and full["open"]["recall"] == 1
    assert h2o["closed"]["held"] < full["closed"]["held"] and np.mean(h2o["closed"]["loss"]) > 0.01
    assert set(full["closed"]["loss_by_kind"]) == set(points.KINDS)


def test_the_open_loop_is_that_of_kvsim_run():
    bench = points.Bench(points.SHIPPED, "cpu", chains=1, settings="problems=1,steps=3")
    bench.start([("h2o", "50%")], workers=1)
    again = bench.measure("h2o", "50%")  # its open loop in another process
    assert again == bench.measure("h2o", "50%")
    run = kvsim.run(kvsim.open_trace(bench.path), policy="h2o", budget="50%")
    halved = again["open"].pop("halved")
    for name, value in again["open"].items():
        assert value == pytest.approx(run.summary[name], rel=1e-5), name
    assert 0 < halved <= 2 * (1 - run.recall)  # a row that lost more than half lost at least that


def test_rows_are_completed_lane_by_lane(measured, tmp_path):
    """TOVA loses most in one of 12 lanes, where the last word but one of the prompt is gone."""
    out = tmp_path / "rows.jsonl"
    old = [dict(row, open={k: v for k, v in row["open"].items() if k != "halved"}) for row in read([measured])]
    out.write_text("".join(json.dumps(row) + "\n" for row in old), encoding="utf-8")
    assert command.main(["lanes", "--out", str(out), *TINY]) == 0
    full, h2o, tova = read([out])
    assert [row["open"] for row in (full, h2o, tova)] == [row["open"] for row in read([measured])]
    assert "alone" not in full and np.shape(tova["alone"]) == (3, 4) and h2o["alone"] != tova["alone"]
    worst = max((lane for lanes in tova["alone"] for lane in lanes), key=lambda lane: np.mean(lane["loss"]))
    assert worst["lost"][0][0] == "go" and np.mean(worst["loss"]) > np.mean(tova["closed"]["loss"]) / 2
    before = out.read_bytes()
    assert command.main(["lanes", "--out", str(out), *TINY]) == 0 and out.read_bytes() == before


def row(policy, budget, loss, right, **found):
    """A made-up row of as many chains as there are numbers."""
    facts = {
        "device": "made-up", "model": "toy", "weights": "0", "task": "t", "seed": 0, "chains": len(loss), "prompt": 4,
        "tokens": 9, "parameters": 1, "lanes": [1, 1], "torch": "0", "transformers": "0", "date": "never",
    }  # fmt: skip
    closed = {"loss": loss, "loss_by_kind": {"k": 0.0}, "right": right, "problems": 4, "exact": 0, "held": 0.5}
    opened = {"recall": 0.9, "gold_loss": 0.1, "gold_gone": 0, "recurrence_loss": 0.1, "output_error": 0.1, **found}
    return {"key": f"{policy}/{budget}", **facts, "policy": policy, "budget": budget, "closed": closed, "open": opened}


def made_up(lazy, h2o, tova):
    """Four chains whose share of right answers is about as given, at half the cache."""
    spread = np.array([0.0, 0.01, -0.01, 0.0])
    rows = [row("full", "100%", [0.1] * 4, [1.0] * 4)]
    for name, right in (("lazy-eviction", lazy), ("h2o", h2o), ("tova", tova)):
        loss = 1.1 - right + spread
        rows.append(row(name, "50%", loss.tolist(), (right + spread).tolist(), recall=1 - right / 2))
    return page.groups(rows)[0]


@pytest.mark.parametrize(
    "right, words",
    [
        ((0.98, 0.5, 0.4), "Yes, here it does"),
        ((0.98, 0.97, 0.4), "`h2o` cannot be said to lose it"),
        ((0.30, 0.5, 0.97), "No, not here: at 50 % `lazy-eviction` loses accuracy, as `h2o` does."),
        ((0.945, 0.5, 0.4), "Not decided"),
    ],
)
def test_the_verdict_follows_the_numbers(right, words):
    assert words in page.claim_text(made_up(*right))


def test_comparisons_follow_the_numbers():
    said = page.claim_text(made_up(0.3, 0.5, 0.3))
    assert "20.0 points fewer right answers than `h2o`; its gold loss is larger (0.800 against 0.600 nats)" in said
    assert "not told apart from `tova` by its answers (+0.0 points); its gold loss is not told apart" in said
    assert "at no measured budget `h2o`, `lazy-eviction`, `tova`" in said


def test_what_misleads_is_found():
    """Recall ranks the three exactly the wrong way round, and all three pairs are told apart."""
    g = made_up(0.9, 0.5, 0.2)
    assert len(page.told_apart(g)) == 3
    said = page.misleading_text(g)
    assert "3 (100 %) | at 50 %, `tova` before `lazy-eviction` (0.1 against 0.45)" in said
    assert "| gold-source loss | 0 (0 %) | none |" in said  # which is the same for all
    assert "-1.00 (-1.00 to -1.00)" in page.correlations_text(g)


def test_the_lane_that_brings_the_loss_is_named():
    g = made_up(0.9, 0.5, 0.2)
    assert "Not measured on this device" in page.lanes_text(g)
    tova = g.point("tova", 50)
    small, large = (
        {"loss": [x] * 4, "loss_by_kind": {"near": x, "far": 2 * x}, "lost": [["go", 0.5]]} for x in (0.01, 0.8)
    )
    tova.row["alone"] = [[small, large], [small, small]]
    said = page.lanes_text(g)
    assert "At 1 of 1 points one lane alone" in said and "two worst lanes of 4" in said
    assert "| 50 % | `tova` | 0.900 | 0, 1 | 0.800 | far | `go` 50.0 % |" in said
    tova.row["alone"] = [[small] * 2] * 2
    said = page.lanes_text(g)
    assert "At 0 of 1 points one lane alone brings at least half of the loss of all of them." in said
    assert "At 1 points not even the losses of all lanes alone" in said


def test_spearman_by_hand():
    assert page.spearman([1, 2, 3, 4], [10, 20, 20, 40]) == pytest.approx(4.5 / np.sqrt(5 * 4.5))
    assert page.ranks([3, 1, 3]).tolist() == [2.5, 1, 2.5]
    assert np.isnan(page.spearman([1, 1], [1, 2]))


def test_rows_of_the_campaign_are_read_too(tmp_path):
    inner = row("h2o", "50%", [1.0], [0.5])
    lines = [
        {"key": "gpu/closed-loop/h2o", "phase": "closed-loop", "kind": "quality", "params": inner, "ms": [1.0], "t": 0},
        {"key": "gpu/info/0", "phase": "info", "kind": "info", "params": {}, "t": 0},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"cut', encoding="utf-8")
    assert read([path]) == [inner]
    path.write_text('{"key": "x"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match='"device" is missing'):
        read([path])
    with pytest.raises(ResultError, match="without a full cache"):
        page.groups([inner])


def test_the_page_is_that_of_the_committed_rows():
    found = page.groups(read(page.committed()))
    assert (page.DOCS / "quality.md").read_text(encoding="utf-8") == page.text(found)
    assert all((page.DOCS / "figures" / g.figure).exists() for g in found)


def test_a_page_is_written_from_rows(measured, tmp_path):
    written = page.write([measured], tmp_path)
    assert written == tmp_path / "quality.md" and "reasoner on " in written.read_text(encoding="utf-8")
    assert [p.suffix for p in (tmp_path / "figures").iterdir()] == [".png"]


def test_errors_are_said_and_leave_2(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("nonsense\n", encoding="utf-8")
    assert command.main(["run", "--out", str(tmp_path / "rows.jsonl"), *TINY]) == 2
    assert command.main(["report", str(tmp_path / "none.jsonl")]) == 2
    assert "not a JSON line" in capsys.readouterr().err
