"""Where the time of a lossy run goes: 16 layers x 8 KV heads, 4,096 tokens, a fifth of them kept; or any trace.

    python benchmarks/run.py [--trace traces/reasoner.kvtrace] [--policy h2o] [--budget 20%] [--steps 96] [--repeats 3]

Clocks around the parts of `kvsim.simulate.run`, each counted without the parts inside it; the fastest of the repeats,
which come after one that compiles. Made-up rows are written to a trace first, so that decoding is among the parts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trace_read import write

import kvsim.replay
import kvsim.simulate
from kvsim import Trace, open_trace
from kvsim.cache.cache import Cache
from kvsim.cache.lanes import Lanes
from kvsim.cache.quality import Quality
from kvsim.machine.stream import Stream
from kvsim.trace.access import Request

LAYERS, HEADS, TOKENS = 16, 8, 4096
PARTS: dict[str, tuple[Any, str]] = {
    "read the trace": (Request, "accesses"),
    "cache: look up": (Cache, "_touch"),
    "cache: observe": (Lanes, "observe"),
    "cache: evict": (Cache, "_settle"),
    "cache: the rest": (Cache, "access"),
    "ceiling": (kvsim.replay.Replay, "_ceiling"),
    "needed sources, output": (Quality, "__call__"),
    "stranded tokens": (kvsim.replay, "stranded"),
    "work for the machine": (kvsim.simulate, "_work"),
    "machine's clock": (Stream, "iterate"),
    "books": (kvsim.simulate._Books, "step"),
    "tables": (kvsim.simulate._Books, "tables"),
    "manifest": (kvsim.simulate, "manifest"),
    "prepare": (kvsim.simulate, "prepare"),
}


class Clocks:
    """Seconds by part, each without what other parts inside it took."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inside = [0.0]
        for part, (owner, name) in PARTS.items():
            setattr(owner, name, self._around(part, getattr(owner, name)))

    def _around(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            answer = self._clock(part, lambda: call(*args, **kwargs))
            return self._each(part, answer) if part == "read the trace" else answer

        return timed

    def _clock(self, part: str, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        self._inside.append(0.0)
        answer = call()
        took = time.perf_counter() - begin
        self.seconds[part] += took - self._inside.pop()
        self._inside[-1] += took
        return answer

    def _each(self, part: str, items: Iterator[Any]) -> Iterator[Any]:
        while (item := self._clock(part, lambda: next(items, None))) is not None:
            yield item


def measure(clocks: Clocks, trace: Trace, **settings: Any) -> dict[str, float]:
    """Seconds by part, the whole under "all"."""
    clocks.seconds = dict.fromkeys(PARTS, 0.0)
    begin = time.perf_counter()
    kvsim.simulate.run(trace, **settings)
    took = time.perf_counter() - begin
    return clocks.seconds | {"anything else": took - sum(clocks.seconds.values()), "all": took}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--trace", type=Path, help="default: made-up rows")
    options.add_argument("--policy", default="h2o")
    options.add_argument("--budget", default="20%")
    options.add_argument("--model", default="llama-3.1-8b")
    options.add_argument("--steps", type=int, default=96, help="decode steps of made-up rows")
    options.add_argument("--repeats", type=int, default=3)
    a = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = a.trace or Path(folder) / "made-up.kvtrace"
        if a.trace is None:
            write(path, LAYERS, HEADS, TOKENS - a.steps, a.steps)
        trace, clocks = open_trace(path), Clocks()
        asked = {"policy": a.policy, "budget": a.budget, "model": a.model}
        runs = [measure(clocks, trace, **asked) for _ in range(1 + a.repeats)][1:]
    steps = sum(source.output_tokens for source in trace.sources)
    fastest = min(runs, key=lambda run: run["all"])
    for part, seconds in fastest.items():
        print(f"{part:24} {seconds:8.3f} s {seconds / steps * 1e3:8.3f} ms per step {seconds / fastest['all']:6.1%}")


if __name__ == "__main__":
    main()
