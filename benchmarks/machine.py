"""What the machine costs to simulate: microseconds and events per layer and step, with SimPy and compiled.

    python benchmarks/machine.py [--steps 100] [--repeats 7]

One process, as in a run of one stream; both give the same times. Beside them, in the same run, the time of a bare SimPy
loop that requests a resource, waits and releases: ratios do not depend on how fast this computer is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import simpy

from kvsim.machine import SHAPES, Hardware, Machine, Work
from kvsim.machine.stream import Stream

SHAPE = SHAPES["llama-3.1-8b"]


def drive(hardware: Hardware, work: Work, overlap: str, steps: int) -> Machine:
    env = simpy.Environment()
    machine = Machine(env, hardware, SHAPE, overlap, alone=True)

    def loop():
        for _ in range(steps):
            yield from machine.iterate(work)

    env.process(loop())
    env.run()
    return machine


def drive_compiled(hardware: Hardware, work: Work, overlap: str, steps: int) -> Stream:
    stream = Stream(hardware, SHAPE, overlap)
    for _ in range(steps):
        stream.iterate(work)
    stream.finish()
    return stream


def bare(steps: int) -> None:
    """Request, timeout and release of one resource, once per layer and step."""
    env = simpy.Environment()
    resource = simpy.Resource(env, 1)

    def loop():
        for _ in range(steps * SHAPE.layers):
            with resource.request() as request:
                yield request
                yield env.timeout(1e-6)

    env.process(loop())
    env.run()


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Least CPU seconds of several calls."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    hardware, per = Hardware.load("h100-pcie5"), args.steps * SHAPE.layers
    layers = SHAPE.layers
    back = {"kv_read": 33.5e6, "spill_host": 64e3}
    moved = {**back, "fetch_host": 8e6, "fetch_host_copies": 8}
    cases = {
        "resident": (Work.idle(layers, kv_read=33.5e6), "layer"),
        "write-back": (Work.idle(layers, **back), "layer"),
        "known at start": (Work.idle(layers, **moved, known="start"), "layer"),
        "on demand": (Work.idle(layers, **moved), "layer"),
        "prefetch": (Work.idle(layers, **back, prefetch_host=8e6, prefetch_host_copies=8), "layer"),
        "with SSD": (Work.idle(layers, **moved, fetch_ssd=1e6, fetch_ssd_copies=16, spill_ssd=64e3), "layer"),
        "step": (Work.idle(layers, **moved), "step"),
    }
    start = time.process_time()
    drive_compiled(hardware, cases["with SSD"][0], "layer", 1)
    print(f"first compiled step       {time.process_time() - start:6.1f} s (compiled once, then loaded from disk)")
    loop = seconds(lambda: bare(args.steps), args.repeats) / per * 1e6
    print(f"bare request and timeout  {loop:6.1f} us")
    print(f"{'per layer and step':24s} {'us':>7s} {'events':>7s} {'x bare':>7s} {'compiled us':>12s} {'faster':>7s}")
    for name, (work, overlap) in cases.items():
        asked = hardware, work, overlap, args.steps
        took = seconds(lambda a=asked: drive(*a), args.repeats) / per * 1e6
        lean = seconds(lambda a=asked: drive_compiled(*a), args.repeats) / per * 1e6
        events = drive(*asked).events / per
        print(f"{name:24s} {took:7.1f} {events:7.2f} {took / loop:7.2f} {lean:12.2f} {took / lean:6.0f}x")


if __name__ == "__main__":
    main()
