"""Measured rows: written, read back, gone on with, and refused where they are none."""

from __future__ import annotations

import json

import pytest

from kvsim.errors import ConfigError
from kvsim.measure.rows import RowLog, device_of, drifts, quantiles, read_rows

GOOD = {"key": "cpu-x/calibrate/copy/1", "phase": "calibrate", "kind": "copy", "params": {"bytes": 1}, "t": 0.1}
GOOD |= {"ms": [1.0, 2.0]}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def sentinel(at: str, ms: float, run: int = 1, of: str = "gemm", phase: str = "offload") -> dict:
    params = {"phase": phase, "run": run, "at": at, "of": of}
    key = f"cpu-x/sentinel/{phase}/{run}/{at}/{of}"
    return {**GOOD, "key": key, "phase": "sentinel", "kind": "sentinel", "params": params, "ms": [ms, ms, 9 * ms]}


def test_rows_round_trip(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    with RowLog(path) as log:
        log.add("cpu-x/info/1", "info", "info", {"device": "cpu X"})
        log.add("cpu-x/calibrate/chunks/1", "calibrate", "chunks", {"n": 4}, [1.23456789, 2], submit_ms=(0.5,))
        assert len(read_rows([path])) == 2, "a row is in the file as soon as it is added"
    info, chunks = read_rows([path])
    assert info["params"] == {"device": "cpu X"} and "ms" not in info
    assert chunks["ms"] == [1.23457, 2.0] and chunks["submit_ms"] == [0.5] and chunks["t"] >= 0


def test_what_is_there_is_not_measured_again(tmp_path):
    earlier = write(tmp_path / "a.jsonl", GOOD)
    own = write(tmp_path / "b.jsonl", {**GOOD, "key": "cpu-x/calibrate/copy/2"})
    with RowLog(own, resume=[earlier, own]) as log:
        assert not log.wants("cpu-x/calibrate/copy/1") and not log.wants("cpu-x/calibrate/copy/2")
        assert log.measure("cpu-x/calibrate/copy/1", "calibrate", "copy", {}, pytest.fail) is None
        assert log.measure("cpu-x/calibrate/copy/3", "calibrate", "copy", {}, lambda: {"ms": [1]})
        assert not log.wants("cpu-x/calibrate/copy/3")
    assert [r["key"][-1] for r in read_rows([earlier, own])] == ["1", "2", "3"]


def test_an_error_is_a_row_and_is_tried_again(tmp_path):
    path = tmp_path / "rows.jsonl"

    def out_of_memory():
        raise RuntimeError("out of memory")

    with RowLog(path) as log:
        row = log.measure("cpu-x/calibrate/gemm/1", "calibrate", "gemm", {}, out_of_memory)
        assert row["error"] == "RuntimeError: out of memory" and "ms" not in row
        with pytest.raises(KeyboardInterrupt):
            log.measure(
                "cpu-x/calibrate/gemm/2", "calibrate", "gemm", {}, lambda: (_ for _ in ()).throw(KeyboardInterrupt)
            )
    with RowLog(path) as log:
        assert log.measure("cpu-x/calibrate/gemm/1", "calibrate", "gemm", {}, lambda: {"ms": [3]})
    assert [r.get("ms") for r in read_rows([path])] == [[3.0]]


def test_nothing_is_begun_that_will_not_end_in_time(tmp_path):
    with RowLog(tmp_path / "rows.jsonl", deadline=1000.0) as log:
        assert log.wants("cpu-x/a/b", 10.0) and not log.wants("cpu-x/a/b", 1001.0)
        assert log.measure("cpu-x/a/b", "calibrate", "b", {}, pytest.fail, need_s=1001.0) is None
        assert log.skipped == 2


def test_a_line_cut_off_while_written_is_dropped(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD)
    path.write_text(path.read_text() + '{"key": "cpu-x/calibrate/co')
    assert len(read_rows([path])) == 1
    with RowLog(path) as log:
        log.add("cpu-x/calibrate/copy/2", "calibrate", "copy", {}, [1])
    assert [r["key"] for r in read_rows([path])] == ["cpu-x/calibrate/copy/1", "cpu-x/calibrate/copy/2"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "not a JSON line"),
        ([], "not an object"),
        ({**GOOD, "gpu": 1}, 'unknown key "gpu"'),
        ({k: v for k, v in GOOD.items() if k != "t"}, '"t" is missing'),
        ({k: v for k, v in GOOD.items() if k != "ms"}, 'either "ms" or "error"'),
        ({**GOOD, "error": "x"}, 'either "ms" or "error"'),
        ({**GOOD, "key": "copy"}, "<device>/<phase>"),
        ({**GOOD, "phase": "guess"}, "unknown phase"),
        ({**GOOD, "params": []}, '"params" is not an object'),
        ({**GOOD, "ms": []}, '"ms" is empty'),
        ({**GOOD, "ms": [-1]}, "negative or not finite"),
        ({**GOOD, "ms": [float("nan")]}, "negative or not finite"),
        ({**GOOD, "ms": "1"}, "not a list of numbers"),
        ({**GOOD, "submit_ms": [None]}, '"submit_ms" is not a list'),
    ],
)
def test_what_is_no_row_is_refused_with_its_place(tmp_path, row, says):
    path = write(tmp_path / "rows.jsonl", GOOD, row)
    with pytest.raises(ConfigError, match=says) as caught:
        read_rows([path])
    assert f"{path}:2" in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot read rows"):
        read_rows([tmp_path / "nowhere.jsonl"])
    with pytest.raises(ConfigError, match="cannot write"):
        RowLog(write(tmp_path / "file", GOOD) / "rows.jsonl")
    with pytest.raises(ConfigError, match='unknown key "x"'), RowLog(tmp_path / "rows.jsonl") as log:
        log.add("cpu-x/a/b", "calibrate", "b", {}, [1], x=1)


def test_one_key_has_one_measurement(tmp_path):
    a, same = write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "b.jsonl", GOOD)
    assert len(read_rows([a, same])) == 1
    with pytest.raises(ConfigError, match="measured twice"):
        read_rows([a, write(tmp_path / "c.jsonl", {**GOOD, "ms": [5.0]})])


def test_one_device():
    assert device_of([GOOD, GOOD]) == "cpu-x"
    with pytest.raises(ConfigError, match="several devices: cpu-x, gpu-y"):
        device_of([GOOD, {**GOOD, "key": "gpu-y/calibrate/copy/1"}])
    with pytest.raises(ConfigError, match="no measured rows"):
        device_of([])


def test_quantiles():
    assert quantiles([5, 1, 3]) == {"p10": pytest.approx(1.4), "p50": 3.0, "p90": pytest.approx(4.6), "n": 3}


def test_drift_is_the_worst_of_a_phase():
    rows = [sentinel("start", 10.0), sentinel("end", 10.2), sentinel("start", 8.0, run=2), sentinel("end", 7.6, run=2)]
    rows += [sentinel("start", 1.0, phase="ssd"), sentinel("start", 1.0, of="copy"), sentinel("end", 1.0, of="copy")]
    assert drifts(rows) == {"offload": pytest.approx(0.05)}
