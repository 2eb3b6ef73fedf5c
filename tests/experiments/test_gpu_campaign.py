"""The measuring campaign, with toy shapes on the CPU: every branch, taking up again, failures, deadlines, the split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from experiments import gpu_campaign as campaign  # noqa: E402
from kvsim.measure import hf, probes  # noqa: E402
from kvsim.measure.bare import SHAPES  # noqa: E402
from kvsim.measure.probe_bench import Bench  # noqa: E402
from kvsim.measure.prompts import read_prompts  # noqa: E402
from kvsim.measure.rows import RowLog, device_of, read_rows  # noqa: E402
from kvsim.plan import PlanInfo, PlanWriter  # noqa: E402
from kvsim.validate import read_split  # noqa: E402

ONE = "llama-3.2-1b"
EIGHT = "llama-3.1-8b"


def run(out, *more, phase="resident", models=ONE, resume=()):
    """Exit code and rows of a dry run."""
    args = ["--dry", "--phase", phase, "--models", models, "--out", str(out), "--disk", str(out.parent)]
    code = campaign.main([*args, "--plans", str(out.parent / "plans"), "--resume", *map(str, resume), *more])
    return code, read_rows([out / "results.jsonl"])


def point(row):
    """A row's key without its device."""
    return row["key"].partition("/")[2]


def a_plan(path):
    """Four steps in which each of two layers loads one page of two."""
    info = PlanInfo("f" * 64, "toy", 16, 1024, 2, 2, 16, 32, 4, "lru", "50%")
    with PlanWriter(path, info) as plan:
        for step in range(4):
            plan.add(step, [0, 1], [step % 2, 1 - step % 2], 1, "load")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Rows and files of a dry run through all phases."""
    folder = tmp_path_factory.mktemp("campaign")
    a_plan(folder / "plans" / "lru.parquet")
    code, rows = run(folder / "out", phase=",".join(campaign.PHASES), models=f"{ONE},{EIGHT}")
    assert code == 0
    return folder / "out", rows


def test_a_dry_run_goes_through_every_phase(whole):
    _, rows = whole
    measured = Counter(row["phase"] for row in rows if "ms" in row)
    assert set(measured) == {*campaign.PHASES, "sentinel"}
    assert measured["resident"] == 2 * (2 * 2 + 1 + 2)
    assert measured["capture-cost"] == 2 * 4 + 1 and measured["train"] == 1
    assert measured["text"] == 1
    assert measured["offload"] == 2 * (2 * 3 + 1) + 12 and measured["ssd"] == 4
    assert device_of(rows).startswith("dry-cpu")


def test_what_does_not_work_here_is_left_out_and_said(whole):
    """The offloaded cache needs CUDA: its smoke test fails, its points are rows that name it, all else is measured."""
    _, rows = whole
    errors = {point(row): row["error"] for row in rows if "error" in row and row["phase"] != "calibrate"}
    (smoke,) = (key for key in errors if key.startswith("info/"))
    assert smoke.endswith("/hf-offloaded") and "needs a CUDA device" in errors.pop(smoke)
    assert len(errors) == 2 * 3 and all(key.startswith("offload/hf-offloaded/") for key in errors)
    assert all(e.startswith("not measured: hf-offloaded does not work here") for e in errors.values())


def test_executor_rows_moved_what_their_keys_say(whole):
    _, rows = whole
    rows = {point(row): row["params"] for row in rows if row["phase"] in ("offload", "ssd") and "ms" in row}
    half = rows[f"offload/executor/{EIGHT}/1x64/r50"]
    assert (half["resident"], half["tier"], half["fetched_pages"], half["depth"]) == (0.5, "host", [2.0, 2.0], 2)
    assert rows[f"offload/executor/{EIGHT}/1x64/r100"]["tier"] is None
    assert rows[f"offload/executor/{EIGHT}/2x64/r0"]["checked_pages"] == 2 * 8
    assert rows[f"ssd/executor/{ONE}/1x64/r50"]["tier"] == "ssd"
    demand = rows[f"offload/ablation/{EIGHT}/1x64/page-uniform-layer1"]
    assert (demand["method"], demand["known"], demand["clustered"]) == ("page", "layer", False)
    plan = rows[f"offload/plan/{EIGHT}/1x64/lru"]
    assert (plan["policy"], plan["fetched_pages"], plan["mapped"]["repeated"]) == ("lru", [2.0, 2.0], 2.0)


def test_each_phase_lies_between_two_sentinels(whole):
    _, rows = whole
    ends = Counter((row["params"]["phase"], row["params"]["at"]) for row in rows if row["phase"] == "sentinel")
    phases = set(campaign.PHASES) - {"info"}
    assert ends == {(phase, at): 2 for phase in phases for at in ("start", "end")}


def test_the_files_it_leaves_are_few_and_whole(whole):
    out, _ = whole
    assert {f.name for f in out.iterdir()} == {
        "results.jsonl", f"{ONE}.kvtrace.tar", "reasoner.tar", "reasoner-gpu.kvtrace.tar", "train_log.json",
        "text.tar", "text-gpu.kvtrace.tar", "text_log.json",
    }  # fmt: skip
    with tarfile.open(out / "reasoner.tar") as tar:
        assert {"reasoner/config.json", "reasoner/model.safetensors", "reasoner/tokenizer.json"} <= set(tar.getnames())
        assert "reasoner/checkpoint.pt" not in tar.getnames()
    with tarfile.open(out / "reasoner-gpu.kvtrace.tar") as tar:
        assert "reasoner-gpu.kvtrace/manifest.json" in tar.getnames()
    with tarfile.open(out / "text.tar") as tar:
        assert {"text/model.safetensors", "text/tokenizer.json", "text/prompts.jsonl"} <= set(tar.getnames())
    with tarfile.open(out / "text-gpu.kvtrace.tar") as tar:
        assert {"text-gpu.kvtrace/attn-0.parquet", "text-gpu.kvtrace/attn-1.parquet"} <= set(tar.getnames())
    for log in ("train_log.json", "text_log.json"):
        assert json.loads((out / log).read_text())["steps"] > 0


@pytest.mark.parametrize(("deadline", "minutes"), [(400.0, 3.5), (9999.0, 8.5)])
def test_a_training_takes_the_time_that_is_left_but_what_follows_it(tmp_path, deadline, minutes):
    """100 s are gone, 90 s are wanted afterwards, and no more than 510 s are taken."""
    asked = []

    def main(argv):
        asked.extend(argv)
        raise InterruptedError

    log, args = SimpleNamespace(deadline=deadline, elapsed=100.0), SimpleNamespace(dry=False)
    c = SimpleNamespace(device=SimpleNamespace(kind="cpu"), out=tmp_path, log=log, args=args)
    with pytest.raises(InterruptedError):
        campaign._learn(c, main, tmp_path / "text", ("--seed", "1"), "log.json", 90.0)
    assert float(asked[asked.index("--minutes") + 1]) == pytest.approx(minutes) and asked[-2:] == ["--seed", "1"]


def test_a_sample_that_is_too_large_is_captured_with_fewer_requests(whole, tmp_path):
    out, _ = whole
    with tarfile.open(out / "text.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    prompts = read_prompts(tmp_path / "text" / "prompts.jsonl")
    with tarfile.open(out / "text-gpu.kvtrace.tar") as tar:
        size = sum(member.size for member in tar.getmembers())
    c = SimpleNamespace(device=SimpleNamespace(kind="cpu"), out=tmp_path)
    assert campaign._sample(c, tmp_path / "text", prompts, "PSF-2.0", 1.0, size * 3 // 4) == len(prompts) - 1 == 1
    with tarfile.open(tmp_path / "text-gpu.kvtrace.tar") as tar:
        assert [name for name in tar.getnames() if "attn" in name] == ["text-gpu.kvtrace/attn-0.parquet"]


def test_what_is_too_much_for_one_file_is_packed_into_several(tmp_path):
    folder, out, most = tmp_path / "some", tmp_path / "out", 40_000
    folder.mkdir()
    out.mkdir()
    for i, size in enumerate((9_000, 9_000, 9_000, 1, 8_000, 20_000)):
        (folder / f"{i}.bin").write_bytes(bytes([i]) * size)
    campaign._pack(folder, out, most)
    tars = sorted(out.iterdir())
    assert [tar.name for tar in tars] == ["some.2.tar", "some.3.tar", "some.tar"]
    assert all(tar.stat().st_size <= most for tar in tars)
    for tar in tars:
        with tarfile.open(tar) as packed:
            packed.extractall(tmp_path / "there", filter="data")
    there = {f.name: f.read_bytes() for f in (tmp_path / "there" / "some").iterdir()}
    assert there == {f.name: f.read_bytes() for f in folder.iterdir()}


def test_resuming_measures_sentinels_alone(whole, tmp_path):
    out, before = whole
    code, rows = run(tmp_path / "out", phase="resident,ssd", models=f"{ONE},{EIGHT}", resume=[out])
    assert code == 0 and {row["phase"] for row in rows} == {"sentinel"} and len(rows) == 8
    assert not {row["key"] for row in rows} & {row["key"] for row in before}
    assert len(read_rows([out / "results.jsonl", tmp_path / "out" / "results.jsonl"])) == len(before) + 8


def test_a_point_that_fails_is_recorded_and_passed_over(tmp_path, monkeypatch):
    decode = hf.run_decode

    def broken(model, shape, sequences, context, **more):
        if (sequences, context) == (1, 48):
            raise RuntimeError("out of\nmemory")
        return decode(model, shape, sequences, context, **more)

    monkeypatch.setattr(campaign.hf, "run_decode", broken)
    code, rows = run(tmp_path / "out")
    errors = [row for row in rows if "error" in row]
    assert code == 0 and [point(row) for row in errors] == [f"resident/hf-decode/{ONE}/1x48"]
    assert errors[0]["error"] == "RuntimeError: out of memory" and errors[0]["phase"] == "resident"
    assert sum("ms" in row and row["phase"] == "resident" for row in rows) == 6
    monkeypatch.undo()
    _, rows = run(tmp_path / "out")  # what failed is tried again, and nothing else
    again = [row for row in rows if point(row) == f"resident/hf-decode/{ONE}/1x48"]
    assert len(again) == 1 and again[0]["ms"]


def test_what_failed_before_is_tried_last(whole, tmp_path, monkeypatch):
    """But what was only left out, for a feature that did not work, was not tried."""
    device, failed = device_of(whole[1]), f"resident/executor/{ONE}/1x64/layer"
    left_out = f"resident/executor/{ONE}/1x64/step"
    with RowLog(tmp_path / "errors.jsonl") as log:
        log.add(f"{device}/{failed}", "resident", "error", {}, None, error="RuntimeError: of some kind")
        log.add(f"{device}/{left_out}", "resident", "error", {}, None, error=f"{campaign.NOT_TRIED}: no graphs")
    seen = []
    monkeypatch.setattr(campaign.Campaign, "attempt", lambda c, phase, point: seen.append(point.key))
    run(tmp_path / "out", resume=[tmp_path / "errors.jsonl"])
    assert len(seen) == 7 and seen[0] == left_out and seen[-1] == failed


def test_a_phase_that_fails_does_not_end_the_campaign(tmp_path, monkeypatch):
    monkeypatch.setitem(campaign.PHASES, "offload", lambda c: 1 / 0)
    code, rows = run(tmp_path / "out", phase="offload,ssd")
    (error,) = (row for row in rows if "error" in row)
    assert code == 0 and error["phase"] == "error" and "division by zero" in error["error"]
    assert sum(row["phase"] == "ssd" for row in rows) == 2


def test_a_lost_device_ends_the_campaign_with_its_own_code(tmp_path, monkeypatch, capsys):
    lost = []

    def break_it(*args, **more):
        lost.append(True)
        raise RuntimeError("an illegal memory access was encountered")

    normal = Bench.normal
    monkeypatch.setattr(campaign.hf, "run_decode", break_it)
    monkeypatch.setattr(Bench, "normal", lambda bench, *size: break_it() if lost else normal(bench, *size))
    monkeypatch.setattr(Bench, "release", lambda bench: break_it() if lost else None)
    code, rows = run(tmp_path / "out", phase="resident,ssd")
    assert code == campaign.DEVICE_LOST and "illegal memory access" in capsys.readouterr().err
    assert "ssd" not in {row["phase"] for row in rows}
    assert [point(row) for row in rows if "error" in row] == [f"resident/hf-decode/{ONE}/1x48"]


def test_a_point_that_hangs_ends_the_process_as_a_lost_device_does(tmp_path, monkeypatch):
    ended, codes = threading.Event(), []

    def hang(*args, **more):
        assert ended.wait(60)
        raise RuntimeError("here the process is gone")

    monkeypatch.setattr(campaign.hf, "run_decode", hang)
    monkeypatch.setattr(campaign, "HANGS_S", 2.0)
    monkeypatch.setattr(campaign, "HANGS", 0.0)
    monkeypatch.setattr(campaign.faulthandler, "dump_traceback", lambda: None)
    monkeypatch.setattr(campaign.os, "_exit", lambda code: (codes.append(code), ended.set()))
    run(tmp_path / "out")
    written = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    errors = [row["error"] for row in written if point(row) == f"resident/hf-decode/{ONE}/1x48"]
    assert errors[0].startswith("TimeoutError: it hangs") and set(codes) == {campaign.DEVICE_LOST}


def test_nothing_is_begun_behind_the_deadline(tmp_path, capsys):
    code, rows = run(tmp_path / "out", "--deadline", "0")
    assert code == 0 and not rows and "no time is left" in capsys.readouterr().out


def test_no_point_is_begun_that_would_end_behind_the_deadline(tmp_path, monkeypatch, capsys):
    """The time to make its model counts: here 101.5 s for an executor, 504 s for a transformers model."""
    monkeypatch.setattr(campaign, "executor_seconds", lambda *a: 1.0)
    monkeypatch.setattr(campaign, "weight_bytes", lambda shape: 5e12)
    code, rows = run(tmp_path / "out", "--deadline", "400")
    done = [point(row) for row in rows if row["phase"] == "resident"]
    assert code == 0 and len(done) == 4 and all(key.startswith("resident/executor/") for key in done)
    assert "7 points, 4 measured, 3 without time" in capsys.readouterr().out


def test_a_disk_without_room_costs_the_disk_alone(tmp_path, monkeypatch):
    def full(folder, nbytes):
        raise campaign.ConfigError("the test file needs more")

    monkeypatch.setattr(campaign, "check_disk", full)
    _, rows = run(tmp_path / "out", phase="calibrate")
    assert [row["error"] for row in rows if "error" in row] == ["ConfigError: the test file needs more"]
    kinds = {row["kind"] for row in rows if row["phase"] == "calibrate" and "ms" in row}
    assert "gemm" in kinds and "ssd" not in kinds


def test_it_runs_where_kvsims_other_packages_are_not(tmp_path):
    """As on a GPU machine: not installed, and without what only the simulator and the command line need."""
    script = (
        "import sys\n"
        "for name in ('pydantic', 'simpy', 'tomli_w'): sys.modules[name] = None\n"
        "from experiments.gpu_campaign import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    args = [
        "--dry",
        "--phase",
        "info,offload,closed-loop",
        "--models",
        ONE,
        "--out",
        "out",
        "--disk",
        ".",
        "--plans",
        "none",
        "--resume",
    ]
    root = campaign.HERE.parent
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, *args], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_rows([tmp_path / "out" / "results.jsonl"])
    assert sum(row["phase"] == "offload" and "ms" in row for row in rows) == 6
    assert sum(row["phase"] == "closed-loop" and "ms" in row for row in rows) == 3
    failed = [point(row) for row in rows if row["phase"] == "info" and "error" in row]
    assert failed == ([] if torch.cuda.is_available() else ["info/1/hf-offloaded"])


@pytest.mark.parametrize(
    ("argument", "said"),
    [(["--phase", "ofload"], 'unknown phase "ofload"'), (["--models", "gpt-2"], 'unknown model "gpt-2"')],
)
def test_wrong_arguments_end_in_a_sentence(argument, said, capsys):
    assert campaign.main(argument) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert campaign.main(["--out", str(tmp_path), "--phase", "resident"]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.glob("*.jsonl"))


# -- the real grid -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Keys of all points on a GPU, by phase; nothing is measured."""
    folder = tmp_path_factory.mktemp("plans")
    a_plan(folder / "lru.parquet")
    args = campaign.arguments(["--list", "--plans", str(folder), "--disk", str(folder)])
    with campaign.ExitStack() as stack:
        c = campaign.Campaign(args)
        c.open(stack)
        found = {phase: [f"nvidia-h100/{p.key}" for p in points(c)] for phase, points in campaign.PHASES.items()}
        small = campaign.replace(c.grid, file=1 << 20)
        found["calibrate"] = [p.key("nvidia-h100") for p in probes.points(c.bench, small, folder)]
    return found


def test_every_key_is_given_once(keys):
    every = [key for phase in keys.values() for key in phase]
    assert len(every) == len(set(every))


def test_the_grid_is_the_designed_one(keys):
    assert Counter(key.split("/")[2] for key in keys["resident"]) == {
        "executor": 3 * 11 * 2, "hf-decode": 3 * 6, "hf-prefill": 3 * 5,
    }  # fmt: skip
    assert Counter(key.split("/")[2] for key in keys["offload"]) == {
        "executor": 3 * 3 * (5 + 2), "plan": 3, "ablation": 16, "hf-offloaded": 3 * (7 + 1),
    }  # fmt: skip
    assert len(keys["ssd"]) == 10 and len(keys["capture-cost"]) == 2 * 7 + 1


@pytest.fixture(scope="module")
def split():
    return read_split(campaign.HERE / "gpu" / "split.toml")


def test_every_key_is_on_one_side_of_the_split_or_not_compared(keys, split):
    assert split.holds_for("nvidia-h100-80gb-hbm3") and split.holds_for("nvidia-h200")
    for phase in ("calibrate", "resident", "offload", "ssd"):
        assert all(split.is_fit(key) != split.is_held_out(key) for key in keys[phase])
    others = [key for phase in ("info", "capture-cost", "train", "text", "closed-loop") for key in keys[phase]]
    others += [f"nvidia-h100/sentinel/{phase}/1/start/gemm" for phase in campaign.PHASES]
    others += [f"nvidia-h100/error/{phase}/7" for phase in campaign.PHASES]
    assert not any(split.is_fit(key) or split.is_held_out(key) for key in others)


def test_what_is_fitted_is_calibration_and_the_resident_1b_shape(keys, split):
    assert all(split.is_fit(key) for key in keys["calibrate"])
    assert not any(split.is_fit(key) for phase in ("offload", "ssd") for key in keys[phase])
    fitted = [key.split("/") for key in keys["resident"] if split.is_fit(key)]
    assert Counter(what for _, _, what, *_ in fitted) == {"executor": 22, "hf-decode": 6, "hf-prefill": 3}
    assert {model for _, _, _, model, *_ in fitted} == {ONE}
    assert [size for _, _, what, _, size, *_ in fitted if what == "hf-prefill"] == ["1x128", "1x512", "1x2048"]


def test_every_row_held_out_is_in_one_group(keys, split):
    held = [split.groups_of(key) for phase in keys.values() for key in phase if split.is_held_out(key)]
    assert all(len(groups) == 1 for groups in held)
    assert Counter(group for (group,) in held) == {
        "resident": 2 * (22 + 6), "prefill": 2 * 5 + 2, "executor-host": 63, "ablation": 16, "plans": 3,
        "offloaded-cache": 24, "ssd": 10,
    }  # fmt: skip


def test_the_knee_is_where_a_layers_copies_take_as_long_as_the_layer():
    expected = {
        (ONE, (1, 8192), False): 0.81,
        (EIGHT, (1, 8192), False): 0.71,
        (EIGHT, (1, 32768), False): 0.91,
        (EIGHT, (8, 4096), False): 0.91,
        ("qwen2.5-7b", (1, 8192), False): 0.41,
        ("qwen2.5-7b", (1, 32768), False): 0.84,
        (EIGHT, (1, 8192), True): 0.79,
    }
    for (name, size, h200), r in expected.items():
        assert campaign.knee(SHAPES[name], size, h200) == pytest.approx(r, abs=0.006)


def test_estimates_count_the_weights():
    """Llama-3.2-1B has 1.24e9 parameters, its embedding counted once; a token of 8B takes 131 kB."""
    assert campaign.weight_bytes(SHAPES[ONE]) == pytest.approx(2 * 1.236e9, rel=0.01)
    assert campaign.kv_bytes(SHAPES[EIGHT], (1, 1)) == 131072
