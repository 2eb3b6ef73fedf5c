"""What the machine costs to simulate: microseconds and events per layer and step.

    python benchmarks/machine.py [--steps 100] [--repeats 7]

Every layer fetches and writes back. Beside it, in the same run, the time of a bare SimPy loop that requests a
resource, waits and releases: the ratio does not depend on how fast this computer is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import simpy

from kvsim.machine import SHAPES, Hardware, Machine, Work

SHAPE = SHAPES["llama-3.1-8b"]


def drive(hardware: Hardware, work: Work, overlap: str, steps: int) -> Machine:
    env = simpy.Environment()
    machine = Machine(env, hardware, SHAPE, overlap)

    def loop():
        for _ in range(steps):
            yield from machine.iterate(work)

    env.process(loop())
    env.run()
    return machine


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
    moved = {"kv_read": 33.5e6, "fetch_host": 8e6, "fetch_host_copies": 8, "spill_host": 64e3}
    cases = {
        "resident": (Work.idle(SHAPE.layers, kv_read=33.5e6), "layer"),
        "prefetch": (Work.idle(SHAPE.layers, **moved, known="start"), "layer"),
        "on demand": (Work.idle(SHAPE.layers, **moved), "layer"),
        "with SSD": (Work.idle(SHAPE.layers, **moved, fetch_ssd=1e6, fetch_ssd_copies=16, spill_ssd=64e3), "layer"),
        "step": (Work.idle(SHAPE.layers, **moved), "step"),
    }
    loop = seconds(lambda: bare(args.steps), args.repeats) / per * 1e6
    print(f"bare request and timeout  {loop:6.1f} us")
    print(f"{'per layer and step':24s} {'us':>7s} {'events':>7s} {'x bare':>7s}")
    for name, (work, overlap) in cases.items():
        took = seconds(lambda w=work, o=overlap: drive(hardware, w, o, args.steps), args.repeats) / per * 1e6
        events = drive(hardware, work, overlap, args.steps).events / per
        print(f"{name:24s} {took:7.1f} {events:7.2f} {took / loop:7.2f}")


if __name__ == "__main__":
    main()
