"""The command line as a person meets it: exit codes, three-line errors, nothing half-written."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvsim.config import RunConfig
from kvsim.trace.export import save

from .conftest import SIZES

MODEL = {
    "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "hidden_size": SIZES["hidden"], "intermediate_size": SIZES["intermediate"], "vocab_size": SIZES["vocab"],
}  # fmt: skip


@pytest.fixture(scope="session")
def toy(trace, tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "toy.kvtrace"
    save(trace, path, manifest={"model": MODEL}, lossless=True)
    return path


def kvsim(*arguments, cwd, check=None, **kwargs):
    done = subprocess.run(
        [sys.executable, "-m", "kvsim", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, **kwargs
    )
    if check is not None:
        assert done.returncode == check, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done


def test_run_prints_the_answer_and_writes_the_result(toy, tmp_path):
    done = kvsim("run", toy, "--policy", "h2o", "--budget", "30%", "-o", "out", cwd=tmp_path, check=0)
    for word in (
        "recall",
        "TPOT",
        "stall share",
        "step ceiling",
        "belady",
        "verdict:",
        "open loop",
        "predicted",
        "regret",
    ):
        assert word in done.stdout, word
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["config"]["policy"] == "h2o" and manifest["summary"]["decode_steps"] == 60
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "manifest.json", "timing.json", "steps.parquet", "requests.parquet", "lanes.parquet", "links.parquet",
    }  # fmt: skip


def test_two_processes_write_the_same_bytes(toy, tmp_path):
    for name in "ab":
        kvsim("run", toy, "--policy", "random", "--budget", "30%", "--no-references", "-o", name, cwd=tmp_path, check=0,
              env={**os.environ, "PYTHONHASHSEED": "1" if name == "a" else "2"})  # fmt: skip
    for file in sorted((tmp_path / "a").iterdir()):
        if file.name != "timing.json":
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_dry_run_prints_a_configuration_that_runs(toy, tmp_path):
    done = kvsim(
        "run", toy, "--regime", "offload", "--budget", "9", "--page-size", 1, "--dry-run", cwd=tmp_path, check=0
    )
    (tmp_path / "run.toml").write_text(done.stdout)
    a = kvsim("run", "--config", "run.toml", "--no-references", "-o", "a", cwd=tmp_path, check=0)
    assert "written to a" in a.stdout
    config = json.loads((tmp_path / "a" / "manifest.json").read_text())["config"]
    assert config["offload"] == "spill" and config["page_size"] == 1


BAD = [
    (["run"], "no trace was given"),
    (["run", "nowhere.kvtrace"], "nowhere.kvtrace"),
    (["run", "TOY", "--policy", "h20"], 'did you mean "h2o"'),
    (["run", "TOY", "--policy", "h2o("], "cannot read"),
    (["run", "TOY", "--policy", "absent.py"], "absent.py"),
    (["run", "TOY", "--policy", "h2o(recent=True)"], "recent = True"),
    (["run", "TOY", "--policy", "scissorhands(window=10000000000)"], "window = 10000000000"),
    (["run", "TOY", "--seed", "-1"], "seed = -1"),
    (["curve", "TOY", "--budgets", "10%,,20%"], "cannot read a budget"),
    (["run", "TOY", "--budget", "0"], "keeps nothing"),
    (["run", "TOY", "--budget", "-3"], "keeps nothing"),
    (["run", "TOY", "--set", "hardware.gpu.memroy=3GB"], "memroy"),
    (["run", "TOY", "--set", "colour=red"], "colour"),
    (["run", "TOY", "--config", "absent.toml"], "absent.toml"),
    (["run", "TOY", "--budget", "50%", "-o", "taken"], "not a kvsim result"),
    (["run", "TOY", "--budget", "50%", "-o", "/proc/none/out"], "cannot write"),
    (["run", "TOY", "--host", "64"], "has no unit"),
    (["run", "TOY", "--set", "hardware.link.h2d.bandwidth=64"], "64 has no unit"),
    (["run", "TOY", "--set", "hardware.gpu.sms=0"], "gpu.sms: 0 will not do"),
    (["run", "TOY", "--set", "hardware.ssd.queue_depth=0"], "1 or more"),
    (["run", "TOY", "--model", "llama-9"], 'no model "llama-9"'),
    (["list", "polices"], "policies"),
    (["sweep", "absent.toml"], "absent.toml"),
    (["sweep", "plain.toml"], "no [sweep] table"),
    (["plot", "empty"], "no result here"),
    (["trace", "info", "nowhere.kvtrace"], "nowhere.kvtrace"),
    (["frobnicate"], "frobnicate"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_two_and_three_lines(toy, tmp_path, arguments, says):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    (tmp_path / "empty").mkdir()
    (tmp_path / "plain.toml").write_text('trace = "demo"\n')
    done = kvsim(*[toy if a == "TOY" else a for a in arguments], cwd=tmp_path, check=2)
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 4 and done.stdout == ""
    assert {p.name for p in tmp_path.iterdir()} == {"taken", "empty", "plain.toml"}, "something was left behind"


def test_debug_shows_the_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "kvsim", "--debug", "run", "nowhere"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "Traceback" in done.stderr


def test_an_interrupt_is_130_and_leaves_nothing(toy, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\nfrom kvsim import policy\n\n@policy('slow')\nclass Slow:\n    'Waits.'\n"
        "    def score(self, view):\n        print('started', flush=True)\n"
        "        time.sleep(0.2)\n        return view.last\n"
    )
    command = [sys.executable, "-m", "kvsim", "run", str(toy), "--policy", "slow.py", "--budget", "30%", "-o", "out"]
    listens = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs do not
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, preexec_fn=listens, **pipes) as process:
        assert process.stdout.readline().startswith("started")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == {"slow.py"}


def test_a_full_disk_leaves_no_result(toy, tmp_path):
    """A real limit on file size: the kernel refuses the write, as it does when the disk is full."""
    script = (
        "import resource, runpy, signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\nsys.argv = ['kvsim'] + sys.argv[1:]\n"
        "runpy.run_module('kvsim', run_name='__main__')\n"
    )
    arguments = ["run", str(toy), "--policy", "lru", "--budget", "30%", "--no-references", "-o", "out"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot write" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_place_for_compiled_code(toy, tmp_path):
    """As where kvsim and the home folder are read-only: numba may look at its variable alone, which is not set."""
    command = [sys.executable, "-m", "kvsim", "run", str(toy), "--policy", "lru"]
    alone = {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    env = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | alone
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "NUMBA_CACHE_DIR" in done.stderr and "Traceback" not in done.stderr


SWEEP = """
name = "small"
trace = "{trace}"
[sweep]
policy = ["full", "lru", "h2o", "belady"]
budget = ["30%", "60%"]
[[sweep.also]]
policy = ["streaming-llm(sink=2)"]
budget = ["30%"]
[[plot]]
file = "recall.svg"
x = "budget"
y = "recall"
hue = "policy"
"""


def test_sweep_resumes_and_draws(toy, tmp_path):
    (tmp_path / "s.toml").write_text(SWEEP.format(trace=toy))
    listed = kvsim("sweep", "s.toml", "--dry-run", cwd=tmp_path, check=0)
    assert "9 points" in listed.stdout and not (tmp_path / "runs").exists()
    first = kvsim("sweep", "s.toml", "--jobs", "2", "-o", "out", cwd=tmp_path, check=0)
    assert "verdict" in first.stdout and "step ceiling" in first.stdout
    assert (tmp_path / "out" / "recall.svg").read_text().startswith("<?xml")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/manifest.json")}
    assert len(stamps) == 9
    again = kvsim("sweep", "s.toml", "-o", "out", cwd=tmp_path, check=0)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/manifest.json")} == stamps
    table = [x for x in first.stdout.splitlines() if "h2o" in x]
    assert table == [x for x in again.stdout.splitlines() if "h2o" in x]
    kvsim("sweep", "s.toml", "-o", "alone", "--no-plots", cwd=tmp_path, check=0)  # one process: the same bytes
    for file in sorted((tmp_path / "alone").rglob("*.parquet")):
        assert file.read_bytes() == (tmp_path / "out" / file.relative_to(tmp_path / "alone")).read_bytes()


def test_a_point_that_fails_is_said_before_the_first_is_run(toy, tmp_path):
    (tmp_path / "nan.py").write_text(
        "from kvsim import policy\n\n@policy('nan')\nclass Nan:\n    'Not a number.'\n"
        "    def score(self, view):\n        return view.last * float('nan')\n"
    )
    text = SWEEP.format(trace=toy).replace('"full", "lru"', '"lru", "nan.py"')
    (tmp_path / "s.toml").write_text(text)
    for jobs in ("1", "2"):
        done = kvsim("sweep", "s.toml", "--jobs", jobs, "-o", f"out{jobs}", cwd=tmp_path, check=2)
        assert "NaN" in done.stderr and "s.toml, policy = 'nan.py', budget = '30%'" in done.stderr
        assert len(done.stderr.strip().splitlines()) <= 4 and not (tmp_path / f"out{jobs}").exists()


def test_list_and_trace_commands(toy, tmp_path):
    listed = kvsim("list", "policies", cwd=tmp_path, check=0).stdout
    assert all(
        word in listed for word in ("lazy-eviction", "read in the published code", "--vectors", "list policies h2o")
    )
    (tmp_path / "own.py").write_text(
        "from kvsim import policy\n\n@policy('own')\nclass Own:\n    'Mine.'\n"
        "    def score(self, view):\n        return 0\n"
    )
    assert "own.py: online; lossy" in kvsim("list", "policies", "own.py", cwd=tmp_path, check=0).stdout
    assert "spill" in kvsim("list", "offload", cwd=tmp_path, check=0).stdout
    assert "h100-pcie5" in kvsim("list", "hardware", cwd=tmp_path, check=0).stdout
    assert "toy" in kvsim("trace", "info", toy, cwd=tmp_path, check=0).stdout
    assert "is whole" in kvsim("trace", "check", toy, cwd=tmp_path, check=0).stdout
    kvsim("trace", "export", toy, "-o", "long.parquet", cwd=tmp_path, check=0)
    import pyarrow.parquet as pq

    assert {"request", "step", "layer", "head", "position", "weight"} <= set(
        pq.read_schema(tmp_path / "long.parquet").names
    )


def test_plot_draws_a_timeline_and_lanes(toy, tmp_path):
    kvsim("run", toy, "--policy", "lru", "--budget", "30%", "--no-references", "-o", "out", cwd=tmp_path, check=0)
    for kind in ("timeline", "lanes"):
        kvsim("plot", "out", "--kind", kind, "-o", f"{kind}.png", cwd=tmp_path, check=0)
        assert (tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "command",
    [
        "run", "sweep", "plot", "list", "check", "curve", "capture", "calibrate", "perform", "validate",
        "trace info", "trace check", "trace quantise", "trace export",
    ],
)  # fmt: skip
def test_help_has_an_example_that_a_shell_can_read(command, tmp_path):
    done = kvsim(*command.split(), "--help", cwd=tmp_path, check=0)
    example = re.search(rf"Example:\s+(kvsim {command}.*?)\n\n", done.stdout, re.DOTALL)
    subprocess.run(["sh", "-n", "-c", " ".join(example[1].split())], check=True)


def test_help_names_what_is_left_out(tmp_path):
    said = " ".join(kvsim("run", "--help", cwd=tmp_path, check=0).stdout.split())
    config = RunConfig()
    for key in ("policy", "budget", "demand", "use", "hardware", "gpu_format", "overlap", "concurrency", "seed"):
        text = re.search(rf" --{key.replace('_', '-')} <.*?>(.*?) --", said)[1]
        assert re.search(rf"(?<!\w){getattr(config, key)}\b|(?<!\w){getattr(config, key)} of", text), key
        assert "if left out" in text, key


def test_light_imports(tmp_path):
    heavy = ("torch", "matplotlib", "numba", "pandas", "pyarrow", "simpy")
    code = f"import sys, kvsim, kvsim.cli; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path).stdout.strip()
        == "[]"
    )
    code = (
        "import sys\nfor m in ('pydantic', 'simpy', 'typer', 'tomli_w'): sys.modules[m] = None\n"
        "import kvsim.trace.reader, kvsim.trace.format, kvsim.cache.cache, kvsim.policies.attention, kvsim.measure\n"
        "import kvsim.registry\nkvsim.registry.load_all()"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path).returncode == 0


# --- measuring ------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
CPU = ROOT / "experiments" / "cpu"
PLAN = ROOT / "experiments/gpu/plans/lru.parquet"
ROWS, SPLIT, FITTED = (str(CPU / name) for name in ("results/results.jsonl", "split.toml", "cpu-amd-epyc.toml"))


def test_the_committed_fit_comes_from_the_committed_rows(tmp_path):
    kvsim("calibrate", "--rows", ROWS, "--split", SPLIT, "-o", tmp_path / "cpu-amd-epyc.toml", cwd=tmp_path, check=0)
    assert (tmp_path / "cpu-amd-epyc.toml").read_text() == Path(FITTED).read_text()


def test_rows_and_steps_are_judged(tmp_path):
    said = kvsim(
        "validate", "--rows", ROWS, "--hardware", FITTED, "--split", SPLIT, "-o", "rows", cwd=tmp_path, check=0
    ).stdout
    assert "| host memory, by resident share | 63 |" in said and "measured on cpu-amd-epyc" in said
    assert {"errors.parquet", "groups.parquet", "report.md", "manifest.json"} <= {
        f.name for f in (tmp_path / "rows").iterdir()
    }
    trace = ROOT / "traces" / "reasoner.kvtrace"
    said = kvsim("validate", trace, "--hardware", FITTED, "-o", "steps", cwd=tmp_path, check=0).stdout
    assert "| requests 0 to 7 | 309 |" in said and "steps.parquet" in {f.name for f in (tmp_path / "steps").iterdir()}


def test_a_plan_is_exported_and_performed(tmp_path):
    plan, rows = tmp_path / "p.parquet", tmp_path / "rows.jsonl"
    how = ("--regime", "offload", "--demand", "topk(2)", "--granularity", "layer", "--request", "0", "--no-references")
    kvsim(
        "run",
        "demo",
        "--policy",
        "lru",
        "--budget",
        "60%",
        *how,
        "--export-plan",
        plan,
        "-o",
        "run",
        cwd=tmp_path,
        check=0,
    )
    said = kvsim(
        "perform", plan, "--trace", "demo", "--hardware", FITTED, "--steps", "4", "-o", rows, cwd=tmp_path, check=0
    ).stdout
    assert "measured step" in said and "pages  poisoned, moved" in said and "predicted step" in said
    assert len(rows.read_text().splitlines()) == 1
    other = kvsim("perform", plan, "--trace", ROOT / "traces" / "reasoner.kvtrace", "-o", rows, cwd=tmp_path, check=2)
    assert "the plan belongs to another trace" in other.stderr and len(rows.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("validate",), "give either a trace or --rows"),
        (("validate", "demo"), "no hardware was given"),
        (("validate", "--rows", ROWS, "--hardware", FITTED), "no split was given"),
        (("validate", "--rows", ROWS, "--hardware", "h100-pcie5", "--split", SPLIT), "the measurements are of cpu-amd"),
        (("calibrate", "--rows", ROWS, "-o", "x.txt"), "is no name of a hardware file"),
        (("perform", SPLIT, "-o", "rows.jsonl"), "not a movement plan"),
        (("perform", ROOT / "kvsim/data/demo.kvtrace/requests.parquet", "-o", "rows.jsonl"), "kvsim-plan"),
        (("perform", PLAN, "--steps", "306", "-o", "rows.jsonl"), "ask for 305 at most"),
        (("perform", PLAN, "--context", "1000", "-o", "rows.jsonl"), "a multiple of 16"),
    ],
)
def test_what_cannot_be_measured_is_said(tmp_path, arguments, said):
    failed = kvsim(*arguments, cwd=tmp_path, check=2)
    assert said in failed.stderr and "Traceback" not in failed.stderr and not list(tmp_path.iterdir())
