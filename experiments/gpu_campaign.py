"""Measure a GPU machine, or a CPU in its place, in short commands that can be cut off and taken up again.

    python -m experiments.gpu_campaign --phase info,calibrate,resident --out DIR --deadline 560
    python -m experiments.gpu_campaign --list          # points and estimated seconds, measures nothing
    python -m experiments.gpu_campaign --device cpu    # small shapes; device memory is a pool of RAM, the link memcpy
    python -m experiments.gpu_campaign --dry --out DIR # toy shapes on the CPU: proves that every branch runs

A point is one JSON line in DIR/results.jsonl, written when it is measured. Points found under --resume are skipped, the
most telling ones come first, none is begun that would end behind the deadline, and one that fails is recorded and
passed over. Needs NumPy, numba, pyarrow, torch and transformers; kvsim from the working tree. How and in which order:
experiments/gpu/README.md.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kvsim.errors import ConfigError, KvsimError, nearest
from kvsim.measure import hf, machine_info, overhead, probes
from kvsim.measure.bare import SHAPES, Bare, Shape
from kvsim.measure.disk import PageFile
from kvsim.measure.executor import Executor
from kvsim.measure.probe_bench import Bench
from kvsim.measure.probe_ssd import check_disk
from kvsim.measure.rows import RowLog, quantiles
from kvsim.measure.schedule import Schedule
from kvsim.measure.streams import open_device
from kvsim.plan import HOST, SSD, loads, read_plan

STARTED = time.perf_counter()  # importing torch counts towards the deadline
HERE = Path(__file__).resolve().parent
MODELS = {  # the first one's resident rows are fitted, the second also has the ablation
    "cuda": ("llama-3.2-1b", "llama-3.1-8b", "qwen2.5-7b"),
    "cpu": ("cpu-small", "cpu-wide", "cpu-deep"),
}
LISTED, LISTED_THREADS = "nvidia-h100-80gb-hbm3", (1, 2, 4, 8, 16)  # a list is of this device, on 16 cores
NOT_TRIED = "not measured"  # how the error of a point begins whose feature does not work
FILE_BYTES, TRACE_BYTES = 16 << 20, 40 << 20  # a tar file, and a captured sample, hold no more
DEVICE_LOST = 3  # exit code: start again with --resume, the point that broke the device comes last then
HANGS_S, HANGS = 150.0, 5.0  # a point hangs that takes so long, and so many times what it should

Size = tuple[int, int]  # sequences, context
Row = dict[str, Any]


@dataclass(frozen=True)
class Heavy:
    """A model in memory, or none: what several points share. `build_s`: estimated seconds to make it."""

    name: str = ""
    make: Callable[[], Any] = lambda: None
    build_s: float = 0.0


@dataclass(frozen=True)
class Point:
    """One measurement. `key` (behind the device's name) begins with the phase; `value`: 0 is measured first;
    `needs`: features that must have worked; `measure`, given the heavy thing, returns a row without its key."""

    key: str
    value: int
    need_s: float
    measure: Callable[[Any], Row]
    heavy: Heavy = Heavy()
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """Where each phase measures. `resident_shares` are percent of pages that need no fetch."""

    resident: tuple[Size, ...]
    decode: tuple[Size, ...]
    prompts: tuple[int, ...]
    offload: tuple[Size, ...]
    resident_shares: tuple[int, ...]
    ablation: Size
    depths: tuple[int, ...]
    offloaded: tuple[Size, ...]
    ssd: Size
    ssd_shares: tuple[int, ...]
    capture: tuple[int, ...]
    trace: Size  # prompt and steps
    steps: int
    warm_up: int
    train: tuple[str, ...]  # arguments
    sample: tuple[int, str]  # requests, settings of the task
    text: tuple[str, ...]  # arguments
    chains: tuple[int, str, int]  # of closed loops: how many, settings of the task, points
    smoke: Shape


# Contexts of the offloaded cache lie away from powers of two: pinned blocks are rounded up to them, and a context that
# grows across one would measure the allocation.
REAL = Sizes(
    resident=((1, 512), (1, 2048), (1, 8192), (4, 2048), (16, 512), (1, 32768), (4, 8192), (16, 2048), (64, 512),
              (16, 8192), (64, 2048)),
    decode=((1, 512), (1, 2048), (1, 8192), (1, 32768), (4, 8192), (16, 2048)),
    prompts=(128, 512, 2048, 8192, 32768),
    offload=((1, 8192), (1, 32768), (8, 4096)),
    resident_shares=(100, 75, 50, 25, 0),
    ablation=(1, 8192),
    depths=(1, 2, 4),
    offloaded=((1, 12000), (1, 3000), (1, 24000), (4, 3000), (4, 6000), (1, 6000), (1, 1000)),
    ssd=(1, 8192),
    ssd_shares=(100, 90, 75, 50, 0),
    capture=(2048, 8192),
    trace=(384, 48),
    steps=20,
    warm_up=5,
    train=("--layers", "7", "--width", "256", "--heads", "8", "--kv-heads", "4", "--head-dim", "64", "--init", "0.06",
           "--lr", "3e-3", "--tokens", "65536", "--report", "20"),
    sample=(4, "problems=5,steps=8"),
    text=("--report", "15"),
    chains=(24, "problems=5,steps=8", 100),
    smoke=Shape("smoke", 2, 512, 8, 2, 64, 1024, 1024),
)  # fmt: skip
CPU = replace(
    REAL,
    resident=((1, 4096), (1, 1024), (4, 1024), (1, 8192), (8, 512)),
    decode=((1, 4096), (1, 1024), (4, 1024)),
    prompts=(128, 512),
    offload=((1, 4096), (4, 1024), (1, 8192)),
    ablation=(1, 4096),
    offloaded=(),  # it has streams on a GPU alone
    ssd=(1, 4096),
    ssd_shares=(100, 75, 50, 25, 0),
    capture=(1024,),
    trace=(128, 64),
    text=("--layers", "3", "--width", "128", "--head-dim", "32", "--init", "0.08", "--batch", "1",
          "--packages-mb", "20", "--held-out-mb", "0.1", "--report", "60"),
)  # fmt: skip
DRY = Sizes(
    resident=((1, 64), (2, 32)),
    decode=((1, 48),),
    prompts=(16, 32),
    offload=((1, 64), (2, 64)),
    resident_shares=(100, 50, 0),
    ablation=(1, 64),
    depths=(1, 2),
    offloaded=((1, 40), (2, 24)),
    ssd=(1, 64),
    ssd_shares=(100, 50),
    capture=(32,),
    trace=(16, 4),
    steps=3,
    warm_up=1,
    train=("--layers", "2", "--width", "32", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--tokens", "512",
           "--report", "1"),
    sample=(1, "problems=1,steps=3"),
    text=("--layers", "2", "--width", "32", "--heads", "4", "--kv-heads", "2", "--head-dim", "16",
          "--vocabulary", "320", "--batch", "4", "--window", "32", "--stdlib-mb", "0.05", "--packages-mb", "0",
          "--held-out-mb", "0.01", "--prompts", "2", "--prompt", "16", "--steps", "8", "--report", "1"),
    chains=(2, "problems=1,steps=3", 3),
    smoke=Shape("smoke", 2, 64, 4, 2, 16, 64, 64, 4),
)  # fmt: skip


def toy(shape: Shape) -> Shape:
    """A shape that keeps its name and its proportions of heads, and nothing else."""
    sizes: Row = {"layers": 2, "hidden": 64, "kv_heads": 2, "head_dim": 16, "intermediate": 64, "vocab": 128}
    return replace(shape, heads=2 * (shape.heads // shape.kv_heads), value_bytes=4, **sizes)


class DeviceLost(Exception):
    """The device no longer answers; nothing more can be measured in this process."""


class Campaign:
    """The device, where its rows go, and the one heavy thing in its memory."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, Path(args.out)
        self.sizes = DRY if args.dry else {"cuda": REAL, "cpu": CPU}[args.device]
        self.models = MODELS[args.device]
        self.shapes = {name: toy(SHAPES[name]) if args.dry else SHAPES[name] for name in args.models}
        self.disk = Path(args.disk)
        self.failed: dict[str, str] = {}  # feature -> error
        self.counts: dict[str, dict[str, int]] = {}
        self.held, self.thing = Heavy(), None

    def open(self, stack: ExitStack) -> None:
        """Open device, bench and log. Raises ConfigError for a machine without a GPU, or files that are no rows."""
        if self.args.list:  # nothing will be measured or written
            self.out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.out.mkdir(parents=True, exist_ok=True)
        kind = self.args.device
        self.device = stack.enter_context(open_device("cpu" if self.args.dry or self.args.list else kind))
        self.grid = probes.Grid.of("cpu" if self.args.dry else kind, quick=self.args.dry)
        self.bench = Bench(self.device, self.grid.seconds, self.grid.rotate)
        if self.args.list and kind == "cuda" and not self.args.dry:  # whatever machine the list is made on
            self.grid = replace(self.grid, threads=LISTED_THREADS)
            self.bench.slug, self.bench.cuda, self.bench.value_bytes = self.args.list, True, 2
        if self.args.dry:
            self.bench.slug = "dry-" + self.bench.slug  # toy rows are never taken for measured ones
        deadline = self.args.deadline - (time.perf_counter() - STARTED if self.args.from_start else 0.0)
        self.log = stack.enter_context(RowLog(self.out / "results.jsonl", _files(self.args.resume), deadline))
        errors = {row["key"]: row["error"] for row in self.log.rows if "error" in row}
        self.tried = {key for key, error in errors.items() if not error.startswith(NOT_TRIED)}
        stack.callback(self.drop)

    # -- running -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        for phase in self.args.phase:
            print(f"== {phase} at {self.log.elapsed:.0f} s", flush=True)
            if self.log.elapsed >= self.log.deadline:
                print("   no time is left", flush=True)
                return
            try:
                self.run_phase(phase)
            except DeviceLost:
                raise
            except Exception as error:  # of the phase itself: its points catch their own
                self.record_error(f"error/{phase}/{len(self.log.rows)}", "error", error)
                self.assert_alive()
            self.drop()

    def run_phase(self, phase: str) -> None:
        if phase == "info":
            probes.add_info(self.log, self.bench, self.disk)
            return self.measure_all(phase, info(self))
        if phase == "calibrate":
            return self.calibrate()
        with probes.phase(self.log, self.bench, phase, self.grid.warm_s):
            self.bench.release()
            self.measure_all(phase, PHASES[phase](self))
            self.drop()
        return None

    def calibrate(self) -> None:
        before = len(self.log.rows)
        disk: Path | None = self.disk
        try:
            check_disk(self.disk, self.grid.file)
        except ConfigError as error:  # all but the disk can still be measured
            self.record_error("calibrate/ssd/no-room", "calibrate", error)
            disk = None
        with ExitStack() as watch:

            def progress(done: int, total: int, what: str) -> None:
                watch.close()
                watch.enter_context(self.watched(f"error/calibrate/{before}/{done}", "error", 0.0))
                self.say_progress(done, total, what)

            probes.calibrate_rows(self.log, self.bench, self.grid, disk, progress)
        rows = [row for row in self.log.rows[before:] if row["phase"] == "calibrate"]
        self.count("calibrate", measured=sum("ms" in r for r in rows), failed=sum("error" in r for r in rows))
        self.assert_alive()

    def say_progress(self, done: int, total: int, what: str) -> None:
        if done % 50 == 0:
            print(f"   {self.log.elapsed:6.1f} s  {done}/{total} {what}", flush=True)

    def measure_all(self, phase: str, points: Iterable[Point]) -> None:
        """Measure what is wanted, the most telling points first, those that failed before last."""
        for point in sorted(points, key=lambda p: (self.key(p.key) in self.tried, p.value)):
            self.count(phase, points=1)
            self.measure(phase, point)

    def measure(self, phase: str, point: Point) -> None:
        key, build_s = self.key(point.key), 0.0 if point.heavy.name == self.held.name else point.heavy.build_s
        broken = next((self.failed[name] for name in point.needs if name in self.failed), None)
        if not self.log.wants(key, point.need_s + build_s):
            self.count(phase, **{"known" if key in self.log.done else "without time": 1})
        elif broken is not None:
            self.count(phase, **{NOT_TRIED: 1})
            self.log.add(key, phase, "error", {}, None, error=f"{NOT_TRIED}: {broken}"[:500])
        else:
            with self.watched(point.key, phase, point.need_s + build_s):
                self.attempt(phase, point)

    @contextmanager
    def watched(self, key: str, phase: str, need_s: float) -> Iterator[None]:
        """While inside, more than a multiple of `need_s` ends the process as a lost device would: nothing else ends a
        thread that waits for a device which never comes."""
        seconds = max(HANGS_S, HANGS * need_s)
        timer = threading.Timer(seconds, self.give_up, (key, phase, seconds))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def give_up(self, key: str, phase: str, seconds: float) -> None:
        """Say where all threads are, write the point's row, and end the process."""
        faulthandler.dump_traceback()
        self.record_error(key, phase, TimeoutError(f"it hangs: nothing came of it in {seconds:.0f} s"))
        os._exit(DEVICE_LOST)

    def attempt(self, phase: str, point: Point) -> None:
        try:
            row = point.measure(self.hold(point.heavy))
            self.log.add(self.key(point.key), **{**row, "phase": phase})
        except Exception as error:
            self.count(phase, failed=1)
            self.record_error(point.key, phase, error)
            if phase == "info":
                feature = point.key.rpartition("/")[2]
                self.failed[feature] = f"{feature} does not work here: {_words(error)}"
            self.drop()
            self.assert_alive()
        else:
            self.count(phase, measured=1)
            print(f"   {self.log.elapsed:6.1f} s  {point.key}  {quantiles(row['ms'])['p50']:.4g} ms", flush=True)

    def record_error(self, key: str, phase: str, error: Exception) -> None:
        print(f"   {self.log.elapsed:6.1f} s  {key}  FAILED: {_words(error)}", flush=True)
        self.log.add(self.key(key), phase, "error", {}, None, error=_words(error))

    def key(self, point: str) -> str:
        return f"{self.bench.slug}/{point}"

    def count(self, phase: str, **more: int) -> None:
        counts = self.counts.setdefault(phase, {})
        for name, n in more.items():
            counts[name] = counts.get(name, 0) + n

    # -- memory --------------------------------------------------------------------------------------------------

    def hold(self, heavy: Heavy) -> Any:
        """The thing, made if another was held, which is given back first."""
        if heavy.name != self.held.name:
            self.drop()
            self.thing = heavy.make()
            self.held = heavy
        return self.thing

    def drop(self) -> None:
        """Give back what is held, and what freed buffers still hold."""
        if hasattr(self.thing, "close"):
            self.thing.close()
        if self.thing is not None:
            self.held, self.thing = Heavy(), None
            gc.collect()
        with suppress(RuntimeError):  # of a lost device, which assert_alive tells
            self.bench.release()

    def assert_alive(self) -> None:
        """Raise DeviceLost if a failure has left the device unusable, as illegal accesses do."""
        try:
            self.device.synchronize()
            self.bench.normal(4).sum().item()
        except Exception as error:
            raise DeviceLost(_words(error)) from error

    def executor(self, shape: Shape, size: Size) -> Heavy:
        """An executor of a model at one size."""
        make = partial(Executor, self.device, shape, *size, folder=self.disk)
        seconds = 1.5 + weight_bytes(shape) / 50e9 + kv_bytes(shape, size) / 2.5e9  # filled; its twin pinned
        return Heavy(f"executor {shape.name} {size}", make, seconds)

    def model(self, shape: Shape) -> Heavy:
        """A transformers model."""
        make = partial(hf.model_of, shape, self.device.place)
        return Heavy(f"transformers {shape.name}", make, 4.0 + weight_bytes(shape) / 10e9)

    @property
    def steps(self) -> Row:
        return {"steps": self.sizes.steps, "warm_up": self.sizes.warm_up}


# -- estimates: lead constants, only to plan by ------------------------------------------------------------------


def weight_bytes(shape: Shape) -> float:
    s = shape
    layer = s.hidden * (2 * s.heads + 2 * s.kv_heads) * s.head_dim + 3 * s.hidden * s.intermediate
    return float(s.value_bytes * (s.layers * layer + s.hidden * s.vocab))


def kv_bytes(shape: Shape, size: Size) -> float:
    return float(shape.layers * shape.token_bytes * size[0] * size[1])


def step_seconds(shape: Shape, size: Size, fetched: float = 0.0, link: float = 50e9) -> float:
    """Seconds of a decode step that brings in a share of its KV."""
    kv = kv_bytes(shape, size)
    return weight_bytes(shape) / 2.5e12 + kv / 2e12 + fetched * kv / link + shape.layers * 30e-6


def executor_seconds(c: Campaign, shape: Shape, size: Size, fetched: float = 0.0, link: float = 50e9) -> float:
    """Seconds of a row: the check, warm-up and timed steps."""
    kv = kv_bytes(shape, size)
    check = 0.2 + kv / 10e9 + fetched * kv / 1.5e9
    return check + (c.sizes.steps + c.sizes.warm_up + 2) * step_seconds(shape, size, fetched, link)


def knee(shape: Shape, size: Size, h200: bool) -> float:
    """Resident share at which copying a layer's missing pages takes as long as computing it: where to look closely."""
    weights, kv, link, latency, fixed = (3.7e12, 3.1e12, 50e9, 10e-6, 20e-6) if h200 else (
        2.6e12, 2.2e12, 50e9, 10e-6, 20e-6)  # fmt: skip
    layer_kv = kv_bytes(shape, size) / shape.layers
    layer = (weight_bytes(shape) - shape.value_bytes * shape.hidden * shape.vocab) / shape.layers
    compute = layer / weights + layer_kv / kv + fixed
    return 1.0 - (compute - latency) * link / layer_kv


# -- info: does every CUDA feature work here? --------------------------------------------------------------------


def info(c: Campaign) -> Iterator[Point]:
    """A smoke test of each feature; one that fails takes the points that need it out of this run."""
    run = sum(row["phase"] == "info" and row["kind"] == "info" for row in c.log.rows)
    unused = () if c.sizes.offloaded else ("hf-offloaded",)
    for name, test in ((name, test) for name, test in FEATURES.items() if name not in unused):
        yield Point(f"info/{run}/{name}", 0, 5.0, partial(_tested, c, name, test))


def _tested(c: Campaign, name: str, test: Callable[[Campaign], Row], nothing: None) -> Row:
    began = time.perf_counter()
    facts = test(c)
    ms = (time.perf_counter() - began) * 1e3
    return {"kind": "feature", "params": {"feature": name, **facts}, "ms": [ms]}


def _require(held: bool, what: str) -> None:
    if not held:
        raise KvsimError(what)


def _graph(c: Campaign) -> Row:
    """A step as one graph, its attention over strided K and V, computes what it computes launch by launch."""
    model = Bare(c.sizes.smoke, 2, 64, c.device.place)
    (replay,) = c.device.compiled([model.step])
    token = model.token.clone()
    c.device.synchronize()
    c.device.compute.submit(replay)
    c.device.synchronize()
    got = model.logits.clone()
    model.token.copy_(token)
    model.step()
    c.device.synchronize()
    worst = float((got - model.logits).abs().max())
    _require(worst < 0.05, f"a graph differs by {worst} from the same launches")
    return {"worst_difference": worst}


def _streams(c: Campaign) -> Row:
    """What one stream writes another reads behind an event."""
    x, y = c.bench.normal(1 << 20), c.bench.normal(1 << 20)
    event, start = c.device.event(), c.device.event()
    c.device.synchronize()
    start.record(c.device.compute)
    c.device.compute.submit(lambda: [x.add_(1.0) for _ in range(50)] and x.fill_(7.0))
    event.record(c.device.compute)
    c.device.copy.wait(event)
    c.device.copy.submit(lambda: y.copy_(x))
    c.device.synchronize()
    _require(bool((y == 7.0).all()), "a stream did not wait for the event of another")
    return {"seconds": event.seconds_since(start)}


def _copies(c: Campaign) -> Row:
    """Pinned memory, and copies to the device and back that do not block."""
    source, back = (c.device.host_bytes(1 << 20) for _ in range(2))
    source.copy_(c.bench.torch.from_numpy(np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)))
    there, event = c.bench.on_device(1 << 20), c.device.event()
    c.device.synchronize()
    c.device.copy.submit(lambda: there.copy_(source, non_blocking=True))
    event.record(c.device.copy)
    c.device.write_back.wait(event)
    c.device.write_back.submit(lambda: back.copy_(there, non_blocking=True))
    c.device.synchronize()
    _require(bool(back.equal(source)), "what came back is not what was sent")
    _require(source.is_pinned() or not c.bench.cuda, "host memory is not pinned")
    return {"pinned": source.is_pinned()}


def _disk(c: Campaign) -> Row:
    """Reads from a file; `direct` says whether they pass the page cache by."""
    region = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    with closing(PageFile([region], c.disk)) as file:
        offset, length, skip = file.span(0, 12288, 81920)
        into = c.device.host_bytes(length)
        file.read(offset, into.numpy().data)
        _require(bytes(into.numpy()[skip : skip + 69632]) == bytes(region[12288:81920]), "the file reads differently")
        return {"direct": file.direct}


def _executor(c: Campaign) -> Row:
    """A step whose pages come from host memory leaves the right pages and the right output."""
    with Executor(c.device, c.sizes.smoke, 1, 128) as executor:
        found = executor.check([loads([1, 2, 5])] * c.sizes.smoke.layers)
    _require(found.ok, f"{len(found.wrong)} pages wrong, same output: {found.same_output}")
    return {"pages": found.pages}


def _hf_cache(c: Campaign) -> Row:
    row = hf.run_decode(hf.model_of(c.sizes.smoke, c.device.place), c.sizes.smoke, 1, 50, steps=2, warm_up=1)
    return {"ms_per_step": row["ms"][-1]}


def _hf_offloaded(c: Campaign) -> Row:
    model = hf.model_of(c.sizes.smoke, c.device.place)
    facts = hf.run_offloaded(model, c.sizes.smoke, 1, 50, steps=2, warm_up=1)["params"]
    return {name: facts[name] for name in ("same_steps", "checked_steps", "worst_difference")}


def _capture(c: Campaign) -> Row:
    facts = overhead.run_comparison(c.sizes.smoke, c.device.place, 50)["params"]
    return {"worst_difference": facts["worst_difference"]}


FEATURES = {
    "graph": _graph,
    "streams": _streams,
    "copies": _copies,
    "disk": _disk,
    "executor": _executor,
    "hf-cache": _hf_cache,
    "hf-offloaded": _hf_offloaded,
    "capture": _capture,
}


# -- resident ----------------------------------------------------------------------------------------------------


def resident(c: Campaign) -> Iterator[Point]:
    """Everything in device memory: the executor in graphs of a layer and of a step, transformers, prefill.

    The 1B shape comes first: its rows are fitted, those of the others judge the fit.
    """
    for name, shape in c.shapes.items():
        first = 0 if name == c.models[0] else 1
        for size in c.sizes.resident:
            value, heavy = first if _tokens(size) <= 65536 else 5, c.executor(shape, size)
            for graph in ("layer", "step"):
                key = f"resident/executor/{name}/{_named(size)}/{graph}"
                measure = partial(_resident, c, graph)
                yield Point(key, value, executor_seconds(c, shape, size), measure, heavy, ("executor",))
        for size in c.sizes.decode:
            key = f"resident/hf-decode/{name}/{_named(size)}"
            measure = partial(hf.run_decode, shape=shape, sequences=size[0], context=size[1])
            yield Point(key, 2 + first, 1.0 + kv_bytes(shape, size) / 20e9, measure, c.model(shape), ("hf-cache",))
        for queries in c.sizes.prompts:
            measure = partial(hf.run_prefill, shape=shape, sequences=1, queries=queries)
            seconds = 7 * (0.03 + queries * weight_bytes(shape) / 400e12)
            value = 2 + first if queries <= 8192 else 4
            key = f"resident/hf-prefill/{name}/1x{queries}"
            yield Point(key, value, min(seconds, 8.0) + 0.5, measure, c.model(shape), ("hf-cache",))


def _resident(c: Campaign, graph: str, executor: Executor) -> Row:
    if graph == "step":
        return executor.run_whole(**c.steps)
    return executor.run_synthetic(1.0, variants=1, **c.steps)


# -- offload -----------------------------------------------------------------------------------------------------


def offload(c: Campaign) -> Iterator[Point]:
    """Pages from host memory: the grid, the surroundings of the knee, each choice varied alone, real plans, and
    transformers' offloaded cache."""
    for name, shape in c.shapes.items():
        for i, size in enumerate(c.sizes.offload):
            at = knee(shape, size, "h200" in c.bench.slug)
            near = {round(100 * at) + d for d in (-5, 5)}
            for share in (*c.sizes.resident_shares, *sorted(s for s in near if 0 < s < 100)):
                value = 2 * i + (share not in c.sizes.resident_shares)
                yield _executor_point(c, "offload/executor", shape, size, share, value)
        yield from _plans(c, shape)
        if name == c.models[1]:
            yield from _ablation(c, shape)
        for i, size in enumerate(c.sizes.offloaded):
            for waiting in (True, False) if i == 0 else (True,):
                key = f"offload/hf-offloaded/{name}/{_named(size)}/{'waiting' if waiting else 'as-shipped'}"
                measure = partial(hf.run_offloaded, shape=shape, sequences=size[0], context=size[1], waiting=waiting)
                seconds = 1.5 + kv_bytes(shape, size) / 1.2e9 + 22 * (step_seconds(shape, size, 1.3) + 0.03)
                yield Point(key, 1 if i < 3 else 4, seconds, measure, c.model(shape), ("hf-cache", "hf-offloaded"))


def _executor_point(
    c: Campaign, where: str, shape: Shape, size: Size, share: int, value: int, tier: int = HOST
) -> Point:
    """A grid point: clustered pages in runs, depth 2, known from the start."""
    fetched, on_ssd = 1.0 - share / 100, tier == SSD
    heavy, link = c.executor(shape, size), 0.8e9 if on_ssd else 50e9
    key = f"{where}/{shape.name}/{_named(size)}/r{share}"
    steps = {"steps": min(4, c.sizes.steps), "warm_up": 1} if on_ssd else c.steps

    def measure(executor: Executor) -> Row:
        return executor.run_synthetic(share / 100, tier=tier, **steps)

    seconds = executor_seconds(c, shape, size, fetched)
    if on_ssd:
        seconds += kv_bytes(shape, size) / 1.5e9 + 7 * step_seconds(shape, size, fetched, link)
    return Point(key, value, seconds, measure, heavy, ("executor", "disk") if on_ssd else ("executor",))


def _ablation(c: Campaign, shape: Shape) -> Iterator[Point]:
    """Half the pages resident: {runs, page} x {clustered, uniform} x {depths, on demand}."""
    size = c.sizes.ablation
    schedules = [Schedule(depth, "start") for depth in c.sizes.depths] + [Schedule(1, "layer")]
    for method in ("runs", "page"):
        for clustered in (True, False):
            for s in schedules:
                how = replace(s, method=method)
                name = f"{method}-{'clustered' if clustered else 'uniform'}-{how.known}{how.depth}"

                def measure(executor: Executor, how: Schedule = how, clustered: bool = clustered) -> Row:
                    return executor.run_synthetic(0.5, how, clustered=clustered, **c.steps)

                key = f"offload/ablation/{shape.name}/{_named(size)}/{name}"
                seconds = executor_seconds(c, shape, size, 0.5)
                yield Point(key, 0, seconds, measure, c.executor(shape, size), ("executor",))


def _plans(c: Campaign, shape: Shape) -> Iterator[Point]:
    """Movement plans that kvsim exported from captured traces, brought to this geometry."""
    size = c.sizes.ablation
    for path in sorted(Path(c.args.plans).glob("*.parquet")):

        def measure(executor: Executor, path: Path = path) -> Row:
            return executor.run_plan(read_plan(path), **c.steps)

        key = f"offload/plan/{shape.name}/{_named(size)}/{path.stem}"
        yield Point(key, 0, executor_seconds(c, shape, size, 0.2), measure, c.executor(shape, size), ("executor",))


# -- SSD, capture, training --------------------------------------------------------------------------------------


def ssd(c: Campaign) -> Iterator[Point]:
    """Pages from a file beside the GPU: what this machine's disk does, not what an NVMe device would."""
    for shape in (c.shapes[name] for name in c.models[:2] if name in c.shapes):
        for share in c.sizes.ssd_shares:
            yield _executor_point(c, "ssd/executor", shape, c.sizes.ssd, share, 0, SSD)


def capture_cost(c: Campaign) -> Iterator[Point]:
    """Decode steps plain, captured, and with eager attention's weights; the rows compared; one short trace."""
    for value, shape in enumerate(c.shapes[name] for name in c.models[:2] if name in c.shapes):
        key = f"capture-cost/{shape.name}/comparison"
        yield Point(key, value, 6.0, partial(_comparison, c, shape), needs=("capture",))
        for context in c.sizes.capture:
            for mode in overhead.MODES:
                measure = partial(overhead.run_cost, shape=shape, sequences=1, context=context, mode=mode, **c.steps)
                key = f"capture-cost/{shape.name}/{context}/{mode}"
                yield Point(key, value, 3.0, measure, c.model(shape), ("hf-cache", "capture"))
        if value == 0:
            prompt, steps = c.sizes.trace
            path = c.out / f"{shape.name}.kvtrace.tar"
            measure = partial(overhead.run_trace, shape=shape, path=path, prompt=prompt, steps=steps)
            yield Point(f"capture-cost/{shape.name}/trace", 1, 25.0, measure, c.model(shape), ("capture",))


def _comparison(c: Campaign, shape: Shape, nothing: None) -> Row:
    return overhead.run_comparison(shape, c.device.place, c.sizes.capture[0])


def train(c: Campaign) -> Iterator[Point]:
    """The reasoner, for the time that is left; weights, log and a few captured requests go beside the rows."""
    yield Point("train/reasoner", 0, 5.0 if c.args.dry else 150.0, partial(_train, c))


def text(c: Campaign) -> Iterator[Point]:
    """The model of Python source text, likewise."""
    yield Point("text/model", 0, 10.0 if c.args.dry else 210.0, partial(_text, c))


def _train(c: Campaign, nothing: None) -> Row:
    from experiments.reasoner import train as reasoner
    from kvsim.measure.prompts import task_prompts

    count, settings = c.sizes.sample
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "reasoner"
        row = _learn(c, reasoner.main, folder, c.sizes.train, "train_log.json", 60.0, "final_teacher_forced")
        prompts = task_prompts(HERE / "reasoner" / "task.py", count, settings=settings)
        row["params"] |= {
            "sample_requests": _sample(c, folder, prompts, "Apache-2.0", 1.0),
            "sample_settings": settings,
        }
    return row


def _text(c: Campaign, nothing: None) -> Row:
    from experiments.text import train as model
    from kvsim.measure.prompts import read_prompts

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "text"
        row = _learn(c, model.main, folder, c.sizes.text, "text_log.json", 90.0, "final_held_out", "corpus")
        row["params"]["sample_requests"] = _sample(c, folder, read_prompts(folder / "prompts.jsonl"), "PSF-2.0", 0.99)
    return row


def _learn(
    c: Campaign, main: Callable[..., Row], folder: Path, sizes: Sequence[str], log: str, after: float, *facts: str
) -> Row:
    """A training for the time that is left but `after` seconds; its folder and its log go beside the rows."""
    import torch
    from transformers import LlamaForCausalLM

    left = 2.0 if c.args.dry else min(510.0, c.log.deadline - c.log.elapsed - after)
    began = time.perf_counter()
    result = main(["--out", str(folder), "--device", c.device.kind, "--minutes", str(left / 60), *sizes])
    seconds = time.perf_counter() - began
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    _pack(folder, c.out)
    (c.out / log).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    kept = {name: result[name] for name in ("settings", "parameters", "steps", "tokens", *facts)}
    return {"kind": folder.name, "params": kept, "ms": [seconds * 1e3]}


def _sample(
    c: Campaign, model: Path, prompts: Sequence[Any], licence: str, keep: float, most: int = TRACE_BYTES
) -> int:
    """Capture known continuations on the trained model, as many as `most` bytes hold; how many these are."""
    from kvsim.measure.capture import capture

    with tempfile.TemporaryDirectory() as work:
        out, name, count = Path(work) / f"{model.name}-gpu.kvtrace", f"{model.name} (GPU)", len(prompts)
        how: Row = {"mode": "forced", "batch_size": count, "device": c.device.kind, "dtype": "float32", "keep": keep}
        trace = capture(model, prompts, out, name=name, licence=licence, **how)
        size = sum(path.stat().st_size for path in trace.iterdir())
        if size <= most or count == 1:
            _pack(trace, c.out)
            return count
    return _sample(c, model, prompts[: max(1, count * most // size)], licence, keep, most)


def _pack(folder: Path, out: Path, most: int = FILE_BYTES) -> None:
    """FOLDER.tar, and FOLDER.2.tar and so on for what one may not hold; unpacked in one place they are whole."""
    bundles: list[list[Path]] = []
    left = 0
    for path in sorted(folder.iterdir()):
        room = path.stat().st_size + 4096  # its headers, and what fills its last block
        if not bundles or room > left:
            bundles.append([])
            left = most - tarfile.RECORDSIZE
        bundles[-1].append(path)
        left -= room
    for i, paths in enumerate(bundles, 1):
        with tarfile.open(out / f"{folder.name}{f'.{i}' if i > 1 else ''}.tar", "w") as tar:
            for path in paths:
                tar.add(path, arcname=f"{folder.name}/{path.name}")


# -- closed loop: answers and losses, no times ---------------------------------------------------------------------


def closed_loop(c: Campaign) -> Iterator[Point]:
    """What eviction costs in right answers, beside what an open loop says: rows for docs/quality.md, not timings.

    On the reasoner that the phase train left under --out or --resume, or on the shipped one.
    """
    from experiments.quality.points import POINTS

    tar = next(
        (p for folder in (c.out, *map(Path, c.args.resume)) for p in sorted(folder.glob("**/reasoner.tar"))), None
    )
    name = "reasoner-gpu" if tar else "reasoner"
    points = POINTS[: c.sizes.chains[2]]
    missing = [point for point in points if c.key(f"closed-loop/{name}/{'/'.join(point)}") not in c.log.done]
    bench = Heavy(f"chains of {name}", partial(_bench, c, tar, name, missing), 40.0)
    for value, (policy, budget) in enumerate(points):  # in this order: the budget that is asked about first
        seconds = 40.0 if policy.startswith("r-kv") else 12.0
        measure = partial(_closed_loop, policy, budget)
        yield Point(f"closed-loop/{name}/{policy}/{budget}", value, seconds, measure, bench)


def _bench(c: Campaign, tar: Path | None, name: str, points: Sequence[tuple[str, str]]) -> Any:
    from experiments.quality.points import SHIPPED, Bench

    chains, settings, _ = c.sizes.chains
    how: Row = {"name": name, "chains": chains, "settings": settings}
    with tempfile.TemporaryDirectory() as work:
        for part in (tar, *sorted(tar.parent.glob("reasoner.*.tar"))) if tar else ():
            with tarfile.open(part) as packed:
                packed.extractall(work, filter="data")
        bench = Bench(Path(work) / "reasoner" if tar else SHIPPED, c.device.kind, **how)
    if not c.args.dry:  # open loops on the other cores, while the device decodes
        bench.start(points, max(1, machine_info.cores() - 2))
    return bench


def _closed_loop(policy: str, budget: str, bench: Any) -> Row:
    began = time.perf_counter()
    row = bench.measure(policy, budget)
    return {"kind": "quality", "params": row, "ms": [(time.perf_counter() - began) * 1e3]}  # of the whole point


PHASES: dict[str, Callable[[Campaign], Iterable[Point]]] = {
    "info": info,
    "calibrate": lambda c: (),  # its points are those of kvsim calibrate
    "resident": resident,
    "offload": offload,
    "ssd": ssd,
    "capture-cost": capture_cost,
    "train": train,
    "text": text,
    "closed-loop": closed_loop,
}


# -- command line ------------------------------------------------------------------------------------------------


@dataclass
class Estimate:
    """Points of a phase and the seconds they should take."""

    points: int = 0
    seconds: float = 0.0
    held: str = field(default="", repr=False)

    def add(self, point: Point) -> None:
        self.points += 1
        self.seconds += point.need_s + (point.heavy.build_s if point.heavy.name != self.held else 0.0)
        self.held = point.heavy.name


def listed(c: Campaign, phase: str) -> Iterator[Point]:
    """The points of a phase in their order, those of the calibration among them."""
    if phase == "calibrate":
        for probe in probes.points(c.bench, c.grid, c.disk):
            yield Point(probe.key(c.bench.slug).partition("/")[2], 0, probe.need_s, lambda _: {})
    yield from sorted(PHASES[phase](c), key=lambda p: p.value)


def listing(c: Campaign) -> None:
    """Print what would be measured, in order, and how long it should take."""
    for phase in c.args.phase:
        estimate = Estimate(seconds=c.grid.warm_s + 2.0)
        for point in listed(c, phase):
            estimate.add(point)
            print(f"   {point.need_s:6.1f} s  {point.key}")
        print(f"== {phase}: {estimate.points} points, at most about {estimate.seconds:.0f} s")


def summary(c: Campaign) -> None:
    for phase, counts in c.counts.items():
        print(f"{phase:14s}", ", ".join(f"{n} {what}" for what, n in counts.items()))
    print(f"{c.log.elapsed:.0f} s; {len(c.log.rows)} rows known; rows of this run are in {c.log.path.name}", flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--phase", default=",".join(PHASES), help=f"of {','.join(PHASES)}; in this order")
    ap.add_argument("--out", default="runs/gpu", help="folder for results.jsonl and the rest")
    ap.add_argument("--resume", nargs="*", default=[str(HERE / "gpu" / "results")], help="files or folders of rows")
    ap.add_argument("--deadline", type=float, default=560, help="seconds after which nothing is begun")
    ap.add_argument("--device", default="cuda", choices=tuple(MODELS))
    ap.add_argument("--models", help="; ".join(f"{kind}: {','.join(names)}" for kind, names in MODELS.items()))
    ap.add_argument("--plans", default=str(HERE / "gpu" / "plans"), help="folder of exported movement plans")
    ap.add_argument("--disk", default=".", help="folder on the disk to measure")
    ap.add_argument("--dry", action="store_true", help="toy shapes on the CPU")
    ap.add_argument(
        "--list", nargs="?", const=LISTED, metavar="DEVICE", help=f"say what would be measured on a device ({LISTED})"
    )
    args = ap.parse_args(argv)
    args.from_start = argv is None
    args.phase = _known(args.phase, PHASES, "phase")
    models = MODELS[args.device]
    args.models = _known(args.models, models, "model") if args.models else list(models)
    return args


def _known(text: str, known: Iterable[str], what: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f'unknown {what} "{name}"', hint=nearest(name, known, "--help"))
    return [name for name in known if name in names]


def _files(resume: Iterable[str]) -> list[Path]:
    found = [sorted(Path(p).rglob("*.jsonl")) if Path(p).is_dir() else [Path(p)] for p in resume]
    return [path for paths in found for path in paths if path.exists()]


def _named(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _tokens(size: Size) -> int:
    return size[0] * size[1]


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a campaign; 0, 2 for wrong arguments, or DEVICE_LOST."""
    try:
        args = arguments(argv)
        with ExitStack() as stack:
            campaign = Campaign(args)
            campaign.open(stack)
            if args.list:
                listing(campaign)
                return 0
            if campaign.bench.cuda:
                stack.enter_context(machine_info.clocks_logged(campaign.out / "clocks.csv"))
            try:
                campaign.run()
            finally:
                summary(campaign)
    except DeviceLost as error:
        print(f"the device is lost, start again with --resume: {error}", file=sys.stderr)
        return DEVICE_LOST
    except KvsimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    code = main()
    if code == DEVICE_LOST:  # what the interpreter tears down would meet the lost device, and may abort in another code
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
