"""What a lossy run needs in memory beyond its table and one row group of the trace: at most 100 MB, oracles excepted.

    python benchmarks/memory.py [--case LAYERS HEADS PROMPT STEPS]... [--budget 20%] [--policies h2o lru ...]

Writes a synthetic trace, then runs each policy in a process of its own: a small run first, so that everything is
imported, compiled and warm, then the long one. Its peak is the largest resident set less that before it (Linux alone
can say both). The table is as wide as the prompt until that is cut; a row group is counted as its decoded planes. What
the stored rows of the prompt (64, as by default) would take, were they held dense, is shown for comparison.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from kvsim import registry
from kvsim.cache.table import Table
from kvsim.trace import TraceWriter, open_trace, synthetic

MB = 1e6
POLICIES = ("h2o", "lru", "lazy-eviction", "tova", "belady", "mass-oracle")
PROMPT_ROWS = 64
CASES = ((8, 4, 7424, 768), (16, 8, 4096, 64))  # layers, KV heads, prompt and decode tokens


def write(path: Path, layers: int, heads: int, prompt: int, steps: int) -> None:
    """A trace as a capture leaves it, with the last 64 rows of the prompt."""
    kept = min(PROMPT_ROWS, prompt)
    stats = np.ones((heads, prompt), np.float32)
    with TraceWriter(path, layers=layers, kv_heads=heads, manifest={}) as writer:
        for layer in range(layers):
            writer.prompt(0, layer, stats, stats, stats)
        for query, row in enumerate(synthetic.synthetic_rows(prompt + steps, layers, heads, first=prompt - kept)):
            step = query - kept if query < kept else query - kept + 1
            for layer in range(layers):
                writer.row(0, step, layer, 0, row[layer])
        writer.finish_request(0, tokens=np.zeros(prompt + steps, np.int32), prompt_len=prompt, n_steps=steps)


def status(name: str) -> float:
    """Bytes, from /proc: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(warm: str, path: str, spec: str, budget: str) -> float:
    """Bytes above what was resident before the run."""
    import kvsim

    def run(trace: str) -> None:
        kvsim.run(open_trace(trace), policy=spec, budget=budget, model="llama-3.2-1b")

    run(warm)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run(path)
    return status("VmHWM") - before


def expected(path: Path, spec: str) -> dict[str, float]:
    """Bytes of the table, of the largest row group, and of the stored rows of the prompt if they were dense."""
    trace = open_trace(path)
    request = trace.requests()[0]
    lanes, slots = int(np.prod(trace.lanes)), request.prompt_tokens + 1
    table = Table(lanes, 1, registry.build(spec).columns)
    wide = sum(x.nbytes for x in (*vars(table).values(), *table.private.values()) if isinstance(x, np.ndarray))
    groups = pq.ParquetFile(next(path.glob("attn-*.parquet"))).metadata
    group = max(groups.row_group(i).total_byte_size for i in range(groups.num_row_groups))
    rows = 4 * min(PROMPT_ROWS, request.prompt_tokens) * lanes * request.prompt_tokens
    return {"table": wide * slots, "row group": group, "prompt rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs=4, type=int, action="append", metavar=("LAYERS", "HEADS", "PROMPT", "STEPS"))
    parser.add_argument("--budget", default="20%")
    parser.add_argument("--policies", nargs="*", default=POLICIES)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # in a process of its own: warm trace, trace, policy
    a = parser.parse_args()
    if a.one:
        print(measure(*a.one, a.budget))
        return
    for case in a.case or CASES:
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder), *case, a.budget, a.policies)


def run(folder: Path, layers: int, heads: int, prompt: int, steps: int, budget: str, policies: Sequence[str]) -> None:
    warm, path = folder / "warm.kvtrace", folder / "long.kvtrace"
    write(warm, layers, heads, 96, 96)
    write(path, layers, heads, prompt, steps)
    print(f"{layers} x {heads} lanes, {prompt} + {steps} tokens, budget {budget}; MB")
    print(f"{'policy':16} {'peak':>8} {'table':>8} {'row group':>10} {'beyond':>8}   dense prompt rows")
    for spec in policies:
        command = [sys.executable, __file__, "--budget", budget, "--one", str(warm), str(path), spec]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        e = expected(path, spec)
        beyond = peak - e["table"] - e["row group"]
        numbers = (f"{x / MB:{w}.1f}" for x, w in ((peak, 8), (e["table"], 8), (e["row group"], 10), (beyond, 8)))
        print(f"{spec:16}", *numbers, f"{e['prompt rows'] / MB:10.1f}", flush=True)


if __name__ == "__main__":
    main()
