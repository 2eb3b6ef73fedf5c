"""What a calibration measures: memory, matrix products, attention, copies, launches, host memory and the SSD.

A probe is a generator of points; a point knows its row and how to measure it. Buffers are made when a point that needs
them is measured, and kept for the points that follow. On a CPU "device memory" is RAM, the link is a thread that
copies, and pinned memory is ordinary memory: the rows carry the CPU's name and are fitted for it alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from kvsim.measure import machine_info, require
from kvsim.measure.bare import SHAPES, Shape, attention
from kvsim.measure.probe_bench import Bench, copy_all
from kvsim.measure.probe_ssd import BlockFile, allows_direct, check_disk
from kvsim.measure.rows import RowLog

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PATHS = ("h2d-pinned", "d2h-pinned", "h2d-pageable", "d2h-pageable")
SMALL = 64  # small kernels per launch
PAGE = MIB  # piece in which host threads copy

Sample = dict[str, Any]  # "ms" and what else the row holds
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Grid:
    """At which sizes to measure. Sizes are bytes; `reads` and `writes` are (block, depth) of the SSD."""

    shapes: tuple[Shape, ...]
    rows: tuple[int, ...]
    head_rows: int  # most rows for the matrix of the vocabulary
    sequences: tuple[int, ...]
    contexts: tuple[int, ...]
    kv_most: float
    prompts: tuple[int, ...]
    memory: tuple[int, ...]
    copies: tuple[int, ...]
    chunks: tuple[int, ...]
    counts: tuple[int, ...]
    both_ways: int  # of one copy while another runs
    link_buffer: int
    threads: tuple[int, ...]
    host_copy: int
    pins: tuple[int, ...]
    reads: tuple[tuple[int, int], ...]
    writes: tuple[tuple[int, int], ...]
    file: int
    ssd_s: float  # seconds of load per point
    seconds: float  # of timing per point
    warm_s: float  # of matrix products before anything is timed
    rotate: float = 0.0  # 0: as the caches ask for

    @classmethod
    def of(cls, kind: str, quick: bool = False) -> Grid:
        """The grid of a "cuda" or "cpu" device; `quick` finishes in seconds and proves only that everything runs."""
        return _quick(kind) if quick else _cuda() if kind == "cuda" else _cpu()


def _cuda() -> Grid:
    return Grid(
        shapes=tuple(SHAPES[name] for name in ("llama-3.2-1b", "llama-3.1-8b", "qwen2.5-7b")),
        rows=tuple(1 << i for i in range(13)),
        head_rows=256,
        sequences=(1, 2, 4, 8, 16, 32),
        contexts=tuple(512 << i for i in range(9)),
        kv_most=6e9,
        prompts=(128, 512, 2048, 8192, 32768),
        memory=(64 * MIB, 256 * MIB, GIB),
        copies=tuple(4 * KIB << i for i in range(0, 19, 2)),
        chunks=(8 * KIB, 32 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB),
        counts=(16, 128, 512),
        both_ways=64 * MIB,
        link_buffer=GIB,
        threads=_powers(machine_info.cores()),
        host_copy=256 * MIB,
        pins=(MIB, 16 * MIB, 64 * MIB, 256 * MIB),
        reads=tuple((b, d) for b in (16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB) for d in (1, 4, 16, 32)),
        writes=((16 * KIB, 1), (64 * KIB, 1), (MIB, 1), (16 * KIB, 16), (64 * KIB, 4), (MIB, 4), (MIB, 16)),
        file=8 * GIB,
        ssd_s=0.7,
        seconds=0.15,
        warm_s=4.0,
    )


def _cpu() -> Grid:
    return Grid(
        shapes=tuple(SHAPES[name] for name in ("cpu-small", "cpu-wide", "cpu-deep")),
        rows=(1, 2, 4, 8, 16, 64, 256),
        head_rows=64,
        sequences=(1, 4),
        contexts=(256, 1024, 4096, 16384),
        kv_most=3e8,
        prompts=(128, 256, 512, 1024),
        memory=(64 * MIB, 256 * MIB),
        copies=tuple(4 * KIB << i for i in range(0, 15, 2)),
        chunks=(8 * KIB, 32 * KIB, 128 * KIB, MIB),
        counts=(4, 16, 128),
        both_ways=16 * MIB,
        link_buffer=256 * MIB,
        threads=_powers(machine_info.cores()),
        host_copy=64 * MIB,
        pins=(),
        reads=tuple((b, d) for b in (16 * KIB, 64 * KIB, 256 * KIB, MIB) for d in (1, 4, 16)),
        writes=((16 * KIB, 1), (64 * KIB, 1), (MIB, 1), (16 * KIB, 16), (64 * KIB, 4), (MIB, 4)),
        file=2 * GIB,
        ssd_s=0.7,
        seconds=0.3,
        warm_s=1.0,
    )


def _quick(kind: str) -> Grid:
    full = _cuda() if kind == "cuda" else _cpu()
    return replace(
        full,
        shapes=full.shapes[:1],
        rows=(1, 64),
        head_rows=1,
        sequences=(1, 2),
        contexts=(256, 1024),
        prompts=(128, 256),
        memory=(4 * MIB,),
        copies=(4 * KIB, 256 * KIB, 4 * MIB),
        chunks=(64 * KIB, MIB),
        counts=(4, 8),
        both_ways=MIB,
        link_buffer=16 * MIB,
        threads=full.threads[:2],
        host_copy=4 * MIB,
        pins=full.pins[:1],
        reads=((64 * KIB, 1), (64 * KIB, 4), (MIB, 1)),
        writes=((64 * KIB, 1), (MIB, 1)),
        file=16 * MIB,
        ssd_s=0.02,
        seconds=0.005,
        warm_s=0.0,
        rotate=8e6,
    )


def _powers(most: int) -> tuple[int, ...]:
    """1, 2, 4 ... and `most`."""
    return tuple(sorted({*(1 << i for i in range(most.bit_length())), most}))


@dataclass
class Point:
    """One row to be: `measure` gives its sample; `need_s` is what that may take, buffers and all."""

    kind: str
    params: dict[str, Any]
    measure: Callable[[], Sample]
    need_s: float = 1.0

    def key(self, slug: str) -> str:
        return "/".join([slug, "calibrate", self.kind, *(str(value) for value in self.params.values())])


@dataclass
class Lazy:
    """Something made on first use."""

    make: Callable[[], Any]

    @cached_property
    def value(self) -> Any:
        return self.make()


def points(bench: Bench, grid: Grid, ssd: str | Path | None = None) -> Iterator[Point]:
    """All points of a calibration, those that most constants rest on first.

    `ssd`: a folder on the device to measure; none leaves it out. Raises ConfigError where the test file has no room.
    """
    if ssd is not None:
        check_disk(Path(ssd), grid.file)
    yield from memory(bench, grid)
    yield from copies(bench, grid)
    yield from gemms(bench, grid)
    yield from attentions(bench, grid)
    yield from small(bench)
    yield from launches(bench)
    yield from beside(bench, grid)
    yield from prefills(bench, grid)
    yield from host_copies(grid)
    if bench.cuda:
        yield from pins(bench, grid)
    if ssd is not None:
        yield from ssds(grid, Path(ssd))


def calibrate_rows(
    log: RowLog, bench: Bench, grid: Grid, ssd: str | Path | None = None, progress: Progress | None = None
) -> None:
    """Measure every point the log still wants, between two sentinels; `progress(done, total, what)`."""
    total = sum(1 for _ in points(bench, grid, ssd))
    with phase(log, bench, "calibrate", grid.warm_s):
        for done, point in enumerate(points(bench, grid, ssd)):
            if progress:
                progress(done, total, point.kind)
            key = point.key(bench.slug)
            if log.measure(key, "calibrate", point.kind, point.params, point.measure, point.need_s):
                bench.release()
    if progress:
        progress(total, total, "done")


def add_info(log: RowLog, bench: Bench, disk: str | Path | None = None) -> None:
    """Write the info row of this run."""
    run = 1 + sum(row["kind"] == "info" for row in log.rows)
    log.add(f"{bench.slug}/info/{run}", "info", "info", machine_info.info(bench.device, disk))


@contextmanager
def phase(log: RowLog, bench: Bench, name: str, warm_s: float = 4.0) -> Iterator[None]:
    """A phase of a campaign: warm up, then the same two measurements before and after it, which show drift."""
    run = 1 + max((r["params"]["run"] for r in log.rows if _is_sentinel(r, name)), default=0)
    work = _sentinels(bench)
    until = time.perf_counter() + warm_s
    while time.perf_counter() < until:
        bench.timed(work["gemm"], warm=0, reps=5)
    for at in ("start", "end"):
        for of, job in work.items():
            params = {"phase": name, "run": run, "at": at, "of": of}
            key = f"{bench.slug}/sentinel/{name}/{run}/{at}/{of}"
            log.add(key, "sentinel", "sentinel", params, bench.timed(job))
        if at == "start":
            yield


def _is_sentinel(row: dict[str, Any], phase: str) -> bool:
    return row["phase"] == "sentinel" and row["params"]["phase"] == phase


def _sentinels(bench: Bench) -> dict[str, Callable[[], object]]:
    side, nbytes = (4096, GIB) if bench.cuda else (512, 64 * MIB)
    a, b = bench.normal(side, side), bench.normal(side, side)
    x, y = bench.on_device(nbytes), bench.on_device(nbytes)
    return {"gemm": lambda: a @ b, "copy": lambda: y.copy_(x)}


# --- the device alone ------------------------------------------------------------------------------------


def memory(bench: Bench, grid: Grid) -> Iterator[Point]:
    """Copies within device memory; `bytes` are read and written ones."""

    def measure(nbytes: int) -> Sample:
        x, y = bench.on_device(nbytes), bench.on_device(nbytes)
        return {"ms": bench.timed(lambda: y.copy_(x))}

    for nbytes in grid.memory:
        yield Point("memory", {"bytes": 2 * nbytes}, partial(measure, nbytes))


def gemms(bench: Bench, grid: Grid) -> Iterator[Point]:
    """Matrix products with weights that come from memory, each matrix of each shape."""
    linear = require("torch.nn.functional").linear

    def measure(weights: Lazy, inp: int, rows: int) -> Sample:
        x = bench.normal(rows, inp)
        return _each(bench, lambda w: linear(x, w), weights.value)

    for (out, inp), most in _matrices(grid).items():
        weights = Lazy(partial(bench.rotated, out, inp))
        for rows in (n for n in grid.rows if n <= most):
            params = {"out": out, "inp": inp, "rows": rows, "value_bytes": bench.value_bytes}
            yield Point("gemm", params, partial(measure, weights, inp, rows))


def _matrices(grid: Grid) -> dict[tuple[int, int], int]:
    """(out, in) of every matrix, and the most rows to multiply it with."""
    found: dict[tuple[int, int], int] = {}
    for s in grid.shapes:
        query, pair = s.heads * s.head_dim, 2 * s.kv_heads * s.head_dim
        layer = [
            (query + pair, s.hidden),
            (s.hidden, query),
            (2 * s.intermediate, s.hidden),
            (s.hidden, s.intermediate),
        ]
        found |= dict.fromkeys(layer, max(grid.rows)) | {(s.vocab, s.hidden): grid.head_rows}
    return found


def attentions(bench: Bench, grid: Grid) -> Iterator[Point]:
    """Decode attention, K and V side by side as the executor keeps them."""

    def measure(heads: int, kv_heads: int, head_dim: int, sequences: int, context: int) -> Sample:
        q = bench.normal(sequences, heads, head_dim)
        return _each(bench, lambda kv: attention(q, kv), bench.rotated(sequences, context, 2, kv_heads, head_dim))

    for heads, kv_heads, head_dim in _heads(grid):
        token = 2 * kv_heads * head_dim * bench.value_bytes
        for sequences, context in ((b, s) for b in grid.sequences for s in grid.contexts):
            if sequences * context * token <= grid.kv_most:
                sizes = heads, kv_heads, head_dim, sequences, context
                names = ("heads", "kv_heads", "head_dim", "sequences", "context")
                params = dict(zip(names, sizes, strict=True)) | {"value_bytes": bench.value_bytes}
                yield Point("attention", params, partial(measure, *sizes))


def prefills(bench: Bench, grid: Grid) -> Iterator[Point]:
    """Causal attention of whole prompts."""
    functional = require("torch.nn.functional")

    def measure(heads: int, kv_heads: int, head_dim: int, sequences: int, queries: int) -> Sample:
        q = bench.normal(sequences, heads, queries, head_dim)
        k, v = (bench.normal(sequences, kv_heads, queries, head_dim) for _ in range(2))
        attend = functional.scaled_dot_product_attention
        return {"ms": bench.timed(lambda: attend(q, k, v, is_causal=True, enable_gqa=True), reps=20)}

    for heads, kv_heads, head_dim in _heads(grid):
        for sequences, queries in ((b, p) for b in grid.sequences if b in (1, 4) for p in grid.prompts):
            sizes = heads, kv_heads, head_dim, sequences, queries
            names = ("heads", "kv_heads", "head_dim", "sequences", "queries")
            params = dict(zip(names, sizes, strict=True)) | {"value_bytes": bench.value_bytes}
            yield Point("prefill", params, partial(measure, *sizes), need_s=2.0)


def _heads(grid: Grid) -> list[tuple[int, int, int]]:
    return list(dict.fromkeys((s.heads, s.kv_heads, s.head_dim) for s in grid.shapes))


def _each(bench: Bench, work: Callable[[Any], object], buffers: Sequence[Any]) -> Sample:
    """Time of `work` on one buffer, from launches that go through all of them."""

    def through_all() -> None:
        for buffer in buffers:
            work(buffer)

    return {"ms": [ms / len(buffers) for ms in bench.timed(bench.one_launch(through_all))]}


def small(bench: Bench) -> Iterator[Point]:
    """Kernels of no size: what is left is the fixed part of a kernel. "sample" is the end of a step, to the host."""
    torch, hidden, vocab = bench.torch, 2048, 128256 if bench.cuda else 8192

    def one(kind: str) -> Sample:
        x, weight = bench.normal(1, hidden), bench.normal(hidden)
        norm = torch.nn.functional.rms_norm
        kernels = {"norm": lambda: norm(x, (hidden,), weight), "add": lambda: x + weight, "silu": lambda: x.sigmoid()}
        job = kernels[kind]
        return _each(bench, lambda _: job(), range(SMALL))

    def sample() -> Sample:
        logits, token = bench.normal(1, vocab), bench.on_host(8)

        def work() -> None:
            token.view(torch.int64).copy_(logits.argmax(-1), non_blocking=True)

        return {"ms": bench.wall(work)}

    for kind in ("norm", "add", "silu"):
        yield Point("small", {"kind": kind}, partial(one, kind))
    yield Point("small", {"kind": "sample"}, sample)


def launches(bench: Bench) -> Iterator[Point]:
    """Time of the submitting thread for n of a kind: a layer as one graph, an event; on CUDA a plain kernel, too.

    "gap": device time of n small layers launched one by one, with that of all in one launch as "alone_ms".
    """
    stream, n = bench.device.compute, 256

    def submitting(submit: Callable[[], object]) -> Sample:
        taken = [bench.held(submit, 0.01, stream)[1] for _ in range(10)]
        return {"ms": taken[2:]}

    def layers() -> Callable[[], None]:
        x = bench.normal(1)
        layer = bench.one_launch(lambda: x.add_(1.0))

        def submit() -> None:
            for _ in range(n):
                stream.submit(layer)

        return submit

    def kernels() -> Callable[[], None]:
        x = bench.normal(1)
        return lambda: stream.submit(lambda: [x.add_(1.0) for _ in range(n)])

    def events() -> Callable[[], None]:
        event = bench.device.event()

        def submit() -> None:
            for _ in range(n):
                event.record(stream)

        return submit

    def gap() -> Sample:
        x = bench.normal(1)
        one, event = bench.one_launch(lambda: x.add_(1.0)), bench.device.event()
        every = bench.one_launch(lambda: [x.add_(1.0) for _ in range(n)])

        def apart() -> None:
            for _ in range(n):
                stream.submit(one)
                event.record(stream)

        ms = [bench.held(apart, 0.01, stream)[0] for _ in range(10)]
        return {"ms": ms[2:], "alone_ms": bench.timed(every, reps=10)}

    yield Point("launch", {"kind": "graph", "n": n}, lambda: submitting(layers()))
    yield Point("launch", {"kind": "event", "n": n}, lambda: submitting(events()))
    yield Point("launch", {"kind": "gap", "n": n}, gap)
    if bench.cuda:
        yield Point("launch", {"kind": "kernel", "n": n}, lambda: submitting(kernels()))


# --- the link --------------------------------------------------------------------------------------------


@dataclass
class Link:
    """Buffers at both ends of the link, as large as its largest copy; a slot is a piece of each at the same place."""

    bench: Bench
    nbytes: int
    device: Any = field(init=False)
    host: dict[bool, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.device = self.bench.on_device(self.nbytes)
        self.host = {pinned: self.bench.on_host(self.nbytes, pinned) for pinned in (True, False)}

    def stream(self, path: str) -> Any:
        return self.bench.device.copy if path.startswith("h2d") else self.bench.device.write_back

    def pair(self, path: str, start: int, stop: int) -> tuple[Any, Any]:
        """(destination, source) of a copy along `path`."""
        near, far = self.device[start:stop], self.host[path.endswith("pinned")][start:stop]
        return (near, far) if path.startswith("h2d") else (far, near)

    def pairs(self, path: str, size: int, slots: Sequence[int]) -> list[tuple[Any, Any]]:
        return [self.pair(path, s * size, (s + 1) * size) for s in slots]

    def shuffled(self, size: int) -> np.ndarray:
        """All slots of `size`, in an order no prefetcher expects."""
        return np.random.default_rng(0).permutation(self.nbytes // size)


def copies(bench: Bench, grid: Grid) -> Iterator[Point]:
    """Single copies by size, then many back to back with the time to submit them."""
    link = Lazy(lambda: Link(bench, grid.link_buffer))

    def single(path: str, size: int) -> Sample:
        slots = link.value.shuffled(size)[:256].tolist()
        each = cycle([[pair] for pair in link.value.pairs(path, size, slots)])
        return {"ms": bench.timed(lambda: copy_all(next(each)), reps=100, on=link.value.stream(path))}

    def many(path: str, chunk: int, n: int) -> Sample:
        slots = link.value.shuffled(chunk)
        sets = cycle([sorted(s) for s in slots[: len(slots) // n * n].reshape(-1, n).tolist()])
        moved: list[tuple[float, float]] = []
        began = time.perf_counter()
        while len(moved) < 20 and (len(moved) < 4 or time.perf_counter() - began < bench.seconds):
            moved.append(bench.moved(link.value.pairs(path, chunk, next(sets)), link.value.stream(path)))
        device, submit = zip(*moved[1:], strict=True)
        return {"ms": list(device), "submit_ms": list(submit)}

    for size in grid.copies:
        for path in PATHS:
            yield Point("copy", {"path": path, "bytes": size}, partial(single, path, size), need_s=3.0)
    for chunk, n in ((c, n) for c in grid.chunks for n in grid.counts if c * n <= grid.link_buffer):
        for path in PATHS[:2]:
            yield Point("chunks", {"path": path, "chunk": chunk, "n": n}, partial(many, path, chunk, n), need_s=2.0)


def beside(bench: Bench, grid: Grid) -> Iterator[Point]:
    """Copies while the other direction runs, and compute while pages come in; each with the time "alone"."""
    link = Lazy(lambda: Link(bench, 4 * grid.both_ways))
    size, shape = grid.both_ways, grid.shapes[0]

    def duplex(path: str) -> Sample:
        other = "d2h-pinned" if path.startswith("h2d") else "h2d-pinned"
        each = cycle([[pair] for pair in link.value.pairs(path, size, (0, 1))])
        time_it = partial(bench.timed, lambda: copy_all(next(each)), on=link.value.stream(path))
        alone = time_it()
        to, source = link.value.pair(other, 2 * size, 4 * size)
        with bench.copying(to, source, link.value.stream(other)) as still:
            return {"ms": time_it(valid=still), "alone_ms": alone}

    def contention(of: str) -> Sample:
        work = bench.one_launch(_stream_weights(bench, shape) if of == "gemm" else _stream_kv(bench, shape))
        alone = bench.timed(work)
        to, source = link.value.pair("h2d-pinned", 0, 4 * size)
        with bench.copying(to, source, link.value.stream("h2d")) as still:
            return {"ms": bench.timed(work, valid=still), "alone_ms": alone}

    for path in PATHS[:2]:
        yield Point("duplex", {"path": path, "bytes": size}, partial(duplex, path), need_s=3.0)
    for of in ("gemm", "attention"):
        yield Point("contention", {"of": of}, partial(contention, of), need_s=3.0)


def _stream_weights(bench: Bench, s: Shape) -> Callable[[], object]:
    weights, x = bench.rotated(2 * s.intermediate, s.hidden), bench.normal(1, s.hidden)
    linear = require("torch.nn.functional").linear
    return lambda: [linear(x, w) for w in weights]


def _stream_kv(bench: Bench, s: Shape) -> Callable[[], object]:
    kv, q = bench.rotated(1, 8192, 2, s.kv_heads, s.head_dim), bench.normal(1, s.heads, s.head_dim)
    return lambda: [attention(q, x) for x in kv]


def pins(bench: Bench, grid: Grid) -> Iterator[Point]:
    """First use of pinned memory."""

    def measure(nbytes: int) -> Sample:
        kept, taken = [], []
        bench.torch._C._host_emptyCache()  # what was freed before would be handed out again
        for _ in range(3):  # kept, so that the allocator has none to hand out again
            began = time.perf_counter()
            kept.append(bench.torch.empty(nbytes, dtype=bench.torch.uint8, pin_memory=True))
            taken.append(1e3 * (time.perf_counter() - began))
        return {"ms": taken}

    for nbytes in grid.pins:
        yield Point("pin", {"bytes": nbytes}, partial(measure, nbytes), need_s=2.0)


# --- host memory and the SSD -----------------------------------------------------------------------------


def host_copies(grid: Grid) -> Iterator[Point]:
    """Scattered pages copied by threads; `bytes` are those copied, each read and written once."""

    def measure(threads: int) -> Sample:
        source, to = (np.ones((grid.host_copy // PAGE, PAGE), np.uint8) for _ in range(2))
        shares = np.array_split(np.random.default_rng(0).permutation(len(source)), threads)

        def copy(pages: np.ndarray) -> None:
            for place, page in zip(np.sort(pages).tolist(), pages.tolist(), strict=True):
                np.copyto(to[place], source[page])

        taken = []
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(10):
                began = time.perf_counter()
                list(pool.map(copy, shares))
                taken.append(1e3 * (time.perf_counter() - began))
        return {"ms": taken[2:]}

    for threads in grid.threads:
        yield Point("host_copy", {"threads": threads, "bytes": grid.host_copy}, partial(measure, threads), need_s=2.0)


def ssds(grid: Grid, folder: Path) -> Iterator[Point]:
    """Random reads and writes by block size and depth, then both at once; the file is gone afterwards."""
    direct = allows_direct(folder)
    file = BlockFile(folder, grid.file, direct)

    def load(jobs: Sequence[tuple[str, int, int]]) -> Sample:
        return file.load(jobs, grid.ssd_s)[0]

    def point(rw: str, block: int, depth: int, measure: Callable[[], Sample]) -> Point:
        params = {"rw": rw, "block": block, "depth": depth, "direct": direct}
        return Point("ssd", params, measure, need_s=1.0 + grid.ssd_s)

    try:
        yield replace(point("fill", 4 * MIB, 1, file.fill), need_s=2.0 + grid.file / 3e8)
        for rw, pairs in (("read", grid.reads), ("write", grid.writes)):
            for block, depth in pairs:
                yield point(rw, block, depth, partial(load, [(rw, block, depth)]))
        block, depth = grid.writes[-1]
        jobs = [("read", block, depth), ("write", block, depth)]
        yield point("read-beside-write", block, depth, partial(load, jobs))
        yield point("write-beside-read", block, depth, partial(load, jobs[::-1]))
    finally:
        file.close()
