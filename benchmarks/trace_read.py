"""How fast a trace is read: stored entries per second, from file bytes to dense float32 rows.

Writes a synthetic trace (heavy-tailed rows), then times, on one core or more and as the best of some rounds:
the whole reader, Parquet to byte planes alone, and decoding alone. The memory floor is the time to read the
byte planes once and to write every visible dense weight once, at the bandwidth of a large copy.

    python benchmarks/trace_read.py --layers 16 --heads 8 --prompt 1024 --steps 96 [--threads 1]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from kvsim import threads
from kvsim.trace import TraceWriter, open_trace, synthetic
from kvsim.trace.reader import FileSource


def write(path: Path, layers: int, heads: int, prompt: int, steps: int) -> float:
    """Seconds spent in the writer."""
    rows = list(synthetic.synthetic_rows(prompt + steps, layers, heads, seed=1, first=prompt - 1))
    stats = np.zeros((heads, prompt), np.float32)
    begin = time.perf_counter()
    with TraceWriter(path, layers=layers, kv_heads=heads, manifest={}) as writer:
        for layer in range(layers):
            writer.prompt(0, layer, stats)
        for i, row in enumerate(rows):
            for layer in range(layers):
                writer.row(0, i or -1, layer, 0, row[layer])
        writer.finish_request(0, tokens=np.zeros(prompt + steps, np.int32), prompt_len=prompt, n_steps=steps)
    return time.perf_counter() - begin


def best(action: Callable[[], None], rounds: int) -> float:
    """Seconds of the quickest round."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return min(times)


def read(source: FileSource) -> None:
    for _ in source.token_rows():
        pass


def decode(source: FileSource, groups: list, width: int) -> None:
    out = np.zeros((source.manifest["layers"], source.manifest["kv_heads"], width), np.float32)
    for group in groups:
        for at in range(0, group.rows, group.layers):
            group.decode(at, at + group.layers, out)


def bandwidth(rounds: int, size: int = 1 << 28) -> float:
    """Bytes per second, read plus written, of copying a buffer far larger than any cache."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    return 2 * size / best(lambda: np.copyto(target, source), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 16), ("heads", 8), ("prompt", 1024), ("steps", 96), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    pa.set_cpu_count(a.threads)
    threads.cores = lambda: a.threads
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.kvtrace"
        write(Path(folder) / "warm.kvtrace", 1, 1, 8, 2)  # compiles
        written = write(path, a.layers, a.heads, a.prompt, a.steps)
        trace = open_trace(path)
        source = trace.sources[0]
        read(open_trace(Path(folder) / "warm.kvtrace").sources[0])
        groups = list(source._groups(lambda first, last: last > 0))
        entries = sum(int(group.n.sum()) for group in groups)
        lanes, width = a.layers * a.heads, a.prompt + a.steps
        weights = lanes * sum(a.prompt + t for t in range(1, a.steps + 1))
        size = sum(entry["bytes"] for name, entry in trace.manifest["files"].items() if name.startswith("attn"))
        times = {
            "file bytes to weights": best(lambda: read(source), a.rounds),
            "Parquet to byte planes": best(lambda: list(source._groups(lambda first, last: last > 0)), a.rounds),
            "decode alone": best(lambda: decode(source, groups, width), a.rounds),
        }
    speed = bandwidth(a.rounds)
    floor = (3 * entries + 4 * weights) / speed
    print(f"{a.layers} x {a.heads} lanes, {a.steps} steps at {a.prompt}+ tokens, {len(groups)} row groups")
    print(f"{entries / 1e6:.2f} M entries, {entries / weights:.1%} of the weights, {size / weights:.3f} B/weight")
    print(f"write {weights / written / 1e6:.0f} M weights/s, {entries / written / 1e6:.1f} M entries/s")
    for name, seconds in times.items():
        print(f"{name:24} {entries / seconds / 1e6:7.1f} M entries/s  {weights / seconds / 1e6:7.0f} M weights/s")
    share = times["file bytes to weights"] / floor
    print(f"memory floor {entries / floor / 1e6:.0f} M entries/s at {speed / 1e9:.1f} GB/s, {share:.1f} times faster")


if __name__ == "__main__":
    main()
