"""The exact lossy optimum beside its references: seconds, and recall.

    python benchmarks/optimal.py [--lanes 4] [--prompt 64] [--steps 1000] [--budget 64]

Synthetic rows, one layer; `optimal` solves one linear programme per lane, whose seconds are those of the whole run
divided by the lanes. The step ceiling is what no cache can beat at any single step, and need not be reachable.
"""

from __future__ import annotations

import argparse
import time

import kvsim
from kvsim.trace.synthetic import synthetic_trace

POLICIES = ("random", "lru", "h2o", "belady", "mass-oracle", "optimal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("lanes", 4), ("prompt", 64), ("steps", 1000), ("budget", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--policies", nargs="*", default=POLICIES)
    a = parser.parse_args()
    trace = synthetic_trace(1, a.prompt, a.steps, 1, a.lanes)
    size = (a.prompt + a.steps) * a.steps
    print(f"{a.lanes} lanes of {a.prompt} + {a.steps} tokens ({size / 1e6:.2f} M pages x steps), {a.budget} slots")
    print(f"{'policy':16} {'recall':>8} {'s per lane':>12}")
    for spec in a.policies:
        spec = f"optimal(limit={size})" if spec == "optimal" else spec
        begin = time.perf_counter()
        result = kvsim.run(trace, policy=spec, budget=str(a.budget), model="llama-3.2-1b")
        seconds = (time.perf_counter() - begin) / a.lanes
        print(f"{spec.partition('(')[0]:16} {result.recall:8.4f} {seconds:12.2f}", flush=True)
    print(f"{'step ceiling':16} {result.ceiling:8.4f}")


if __name__ == "__main__":
    main()
