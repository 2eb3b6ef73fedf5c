"""The probes on the CPU at toy sizes: which rows they give, and what they leave behind. No number is judged."""

from __future__ import annotations

import os
import shutil
import threading
from dataclasses import replace

import pytest

from kvsim.errors import ConfigError
from kvsim.measure import machine_info, probe_ssd
from kvsim.measure.probe_ssd import BlockFile, allows_direct
from kvsim.measure.probes import KIB, Grid, Link, add_info, calibrate_rows, phase, points
from kvsim.measure.rows import RowLog, drifts, read_rows

torch = pytest.importorskip("torch")

from kvsim.measure.probe_bench import Bench  # noqa: E402
from kvsim.measure.streams import open_device  # noqa: E402

GRID = Grid.of("cpu", quick=True)


@pytest.fixture(scope="module")
def bench():
    with open_device("cpu") as device:
        yield Bench(device, seconds=0.002, rotate=1e6)


@pytest.fixture(scope="module")
def rows(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    with RowLog(folder / "rows.jsonl") as log:
        add_info(log, bench, folder)
        calibrate_rows(log, bench, GRID, folder)
    assert os.listdir(folder) == ["rows.jsonl"], "the SSD's test file is gone"
    return read_rows([folder / "rows.jsonl"])


def test_every_kind_is_measured_without_an_error(rows, bench):
    assert [r for r in rows if "error" in r] == []
    kinds = {r["kind"] for r in rows if r["phase"] == "calibrate"}
    assert kinds == {
        "memory", "gemm", "attention", "prefill", "small", "copy", "chunks", "duplex", "contention", "host_copy",
        "launch", "ssd",
    }  # fmt: skip
    assert all(r["key"].startswith(f"{bench.slug}/{r['phase']}/") for r in rows)


def test_rows_say_what_was_measured(rows):
    by_kind = {r["kind"]: r for r in rows if r["phase"] == "calibrate"}
    assert by_kind["gemm"]["params"].keys() == {"out", "inp", "rows", "value_bytes"}
    assert by_kind["attention"]["params"]["value_bytes"] == 4
    assert {"heads", "kv_heads", "head_dim", "sequences", "queries"} < by_kind["prefill"]["params"].keys()
    assert len(by_kind["chunks"]["submit_ms"]) == len(by_kind["chunks"]["ms"])
    assert by_kind["duplex"]["alone_ms"] and by_kind["contention"]["alone_ms"]
    assert by_kind["ssd"]["gb_per_s"] > 0 and by_kind["ssd"]["p50_us"] > 0
    assert {r["params"]["rw"] for r in rows if r["kind"] == "ssd"} == {
        "fill", "read", "write", "read-beside-write", "write-beside-read",
    }  # fmt: skip
    assert set(drifts(rows)) == {"calibrate"}


def test_info_names_the_machine_but_no_host(rows):
    (info,) = (r["params"] for r in rows if r["phase"] == "info")
    assert {
        "device",
        "driver",
        "torch",
        "transformers",
        "python",
        "kvsim",
        "commit",
        "cpu",
        "memory",
        "disk",
        "date",
    } < set(info)
    assert info["disk"]["free"] > 0 and info["memory"] > 1e8
    assert os.uname().nodename not in str(info)


def test_a_second_run_measures_only_sentinels(bench, tmp_path):
    small = replace(GRID, contexts=(256,), rows=(1,), copies=(4 * KIB,), counts=(4,), prompts=(128,))
    with RowLog(tmp_path / "rows.jsonl") as log:
        calibrate_rows(log, bench, small)
        first = len(log.rows)
    with RowLog(tmp_path / "rows.jsonl") as log:
        calibrate_rows(log, bench, small)
        assert [r["phase"] for r in log.rows[first:]] == ["sentinel"] * 4
        assert {r["params"]["run"] for r in log.rows[first:]} == {2}


def test_the_deadline_leaves_points_out(bench, tmp_path):
    with RowLog(tmp_path / "rows.jsonl", deadline=0.0) as log:
        calibrate_rows(log, bench, GRID)
        assert {r["phase"] for r in log.rows} == {"sentinel"} and log.skipped > 20


def test_an_interrupted_phase_has_no_end(bench, tmp_path):
    with RowLog(tmp_path / "rows.jsonl") as log:
        with pytest.raises(KeyboardInterrupt), phase(log, bench, "offload", warm_s=0.0):
            raise KeyboardInterrupt
        assert {r["params"]["at"] for r in log.rows} == {"start"}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_keys_are_unique_and_nothing_is_made_to_list_them(kind, tmp_path, monkeypatch):
    with open_device("cpu") as device:
        lister = Bench(device)
        lister.cuda = kind == "cuda"
        monkeypatch.setattr(lister, "normal", pytest.fail)
        monkeypatch.setattr(lister, "on_host", pytest.fail)
        grid = replace(Grid.of(kind), file=0)
        found = list(points(lister, grid, tmp_path))
    keys, kinds = [p.key("x") for p in found], [p.kind for p in found]
    assert len(keys) == len(set(keys)) > 100
    if kind == "cuda":
        assert kinds.count("gemm") == 183 and 100 <= kinds.count("attention") <= 160
    assert os.listdir(tmp_path) == []


# --- timing and copies ---------------------------------------------------------------------------------------


def test_timing_ends_when_asked_to(bench):
    calls, patient = [], Bench(bench.device, seconds=600.0, rotate=1e6)
    assert len(patient.timed(lambda: calls.append(1), warm=2, reps=5)) == 5 and len(calls) == 7
    assert len(Bench(bench.device, seconds=0.0, rotate=1e6).timed(lambda: None, reps=5)) == 3
    answers = iter([True, True, False])
    assert len(bench.timed(lambda: None, valid=lambda: next(answers))) == 2
    assert all(ms >= 5 for ms in bench.wall(lambda: threading.Event().wait(0.005), reps=3))


def test_rotated_buffers_are_together_larger_than_the_cache(bench):
    buffers = bench.rotated(100, 100)
    assert sum(b.nbytes for b in buffers) >= bench.rotate > sum(b.nbytes for b in buffers[1:])
    assert len(bench.rotated(1000, 1000)) == 1
    assert not torch.equal(buffers[0], buffers[1])


def test_copies_arrive(bench):
    link = Link(bench, 64 * KIB)
    link.host[True].copy_(torch.arange(64 * KIB, dtype=torch.int64).to(torch.uint8))
    pairs = link.pairs("h2d-pinned", KIB, [1, 5])
    device, submit = bench.moved(pairs, link.stream("h2d-pinned"))
    assert device > 0 and submit >= 0
    for slot in (1, 5):
        here = slice(slot * KIB, (slot + 1) * KIB)
        assert torch.equal(link.device[here], link.host[True][here])
    assert (link.device[2 * KIB : 5 * KIB] == 1).all(), "only the slots asked for"
    assert link.stream("d2h-pinned") is bench.device.write_back


def test_copying_goes_on_beside_and_ends(bench):
    link = Link(bench, 1 << 20)
    with bench.copying(*link.pair("h2d-pinned", 0, 1 << 20), link.stream("h2d-pinned")) as still:
        assert still()
    assert not still()


def test_copying_lasts_however_long_the_block_takes(bench):
    """A starved machine may come to its first repetition after thousands of copies."""
    thousands = threading.Event()

    class Counted:
        copies = 0

        def copy_(self, source):
            self.copies += 1
            if self.copies == 5000:
                thousands.set()

    with bench.copying(Counted(), torch.ones(1), bench.device.copy) as still:
        assert thousands.wait(60), "it ended by itself"
        assert still()


def test_copying_that_fails_says_so_and_ends(bench):
    copying = bench.copying(torch.ones(2), torch.ones(3), bench.device.copy)
    with pytest.raises(RuntimeError, match="must match"), copying as still:
        while still():
            pass
    with bench.copying(torch.ones(1), torch.ones(1), bench.device.copy) as still:
        assert still(), "the stream is as before"


# --- the SSD --------------------------------------------------------------------------------------------------


def test_the_file_has_no_name_and_keeps_its_size(tmp_path):
    file = BlockFile(tmp_path, 9 << 20, allows_direct(tmp_path))
    assert file.nbytes == 8 << 20 and os.listdir(tmp_path) == []
    sample = file.fill()
    assert os.listdir(tmp_path) == [] and os.fstat(file._file).st_size == 8 << 20
    assert len(sample["ms"]) == 2 and sample["gb_per_s"] > 0
    read, write = file.load([("read", 4096, 2), ("write", 4096, 1)], 0.01)
    assert read["p50_us"] > 0 and write["p50_us"] > 0
    file.close()


def test_without_direct_io_the_rows_say_so(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("kvsim.measure.probes.allows_direct", lambda folder: False)
    found = [p for p in points(bench, GRID, tmp_path) if p.kind == "ssd"]
    assert {p.params["direct"] for p in found} == {False}
    file = BlockFile(tmp_path, 4 << 20, direct=False)
    assert file.load([("read", 4096, 1)], 0.01)[0]["gb_per_s"] > 0
    file.close()


def test_a_disk_without_room_is_refused_before_anything_is_measured(bench, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with RowLog(tmp_path / "rows.jsonl") as log, pytest.raises(ConfigError, match="0.0 GB are free"):
        calibrate_rows(log, bench, GRID, tmp_path)
    assert log.rows == []
    with pytest.raises(ConfigError, match="not a folder"):
        probe_ssd.check_disk(tmp_path / "nowhere", 1)


# --- the machine ------------------------------------------------------------------------------------------------


def test_slugs():
    assert machine_info.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert machine_info.slug("cpu AMD EPYC 9(R) ") == "cpu-amd-epyc-9-r"


def test_sizes_of_the_machine():
    assert machine_info.cache_bytes("cpu") >= 1 << 20 and machine_info.cores() >= 1
    assert machine_info.device_memory("cpu") == machine_info.memory_bytes() > 1e8
