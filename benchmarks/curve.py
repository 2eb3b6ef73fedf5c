"""What a whole curve costs: caches of many sizes in one pass, beside one replay. 16 layers x 8 KV heads, 4,096 pages.

    python benchmarks/curve.py [--steps 40] [--repeats 3] [--threads 1] [--policies lru tova ...] [--demand "topk(64)"]

All read the same rows, decoded beforehand; the time is `access` alone, the policy included. The replay holds all pages
but those that decoding adds, so that it decides at every step as the pass does; the pass has the caches of every
number of pages. They take turns, run by run; a time is the mean over the steps of the fastest of the repeats.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from replay import HEADS, LAYERS, VISIBLE, accesses

from kvsim import registry, threads
from kvsim.cache.cache import Cache
from kvsim.cache.demand import FAIR_SHARE, parse_demand
from kvsim.cache.stack import Stacks
from kvsim.cache.tiers import Capacity

POLICIES = ("lru", "lfu", "h2o(recent=32)", "streaming-llm", "random", "tova", "lazy-eviction")


def measure(spec: str, steps: int, demand: str | None) -> list[np.ndarray]:
    """Nanoseconds per page of every step, of one replay and of the pass: [2][steps]."""
    kinds = (Cache, VISIBLE - steps), (Stacks, VISIBLE)
    return [_steps(spec, steps, demand, kind, budget) for kind, budget in kinds]


def _steps(spec: str, steps: int, demand: str | None, kind: Callable[..., Cache], budget: int) -> np.ndarray:
    policy, times = registry.build(spec), []
    policy.rows = "full"
    regime: dict[str, Any] = {}
    if demand:
        regime = {"offload": registry.build("spill", "offload"), "demand": parse_demand(demand, FAIR_SHARE)}
    cache = kind((LAYERS, HEADS), VISIBLE, policy, Capacity(budget, None), **regime)
    cache.fusing = True  # as in a run that is long enough
    warm = max(4, policy.lag)  # compiled, and the prompt has entered
    for a in accesses(warm + -(-steps // policy.lag) * policy.lag):
        begin = time.perf_counter_ns()
        cache.access(a)
        times.append((time.perf_counter_ns() - begin) / (LAYERS * HEADS * VISIBLE))
    return np.array(times[warm + 1 :])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--threads", type=int, default=1, help="cores to use (default: one)")
    options.add_argument("--demand", help="evicted pages come back: what a step needs (default: they are gone)")
    options.add_argument("--policies", nargs="*", default=POLICIES)
    chosen = options.parse_args()
    threads.cores = lambda: chosen.threads
    print(f"{'policy':16} {'replay':>7} {'curve':>7}   ns per page and step; the curve in replays")
    for spec in chosen.policies:
        one, every = np.min([measure(spec, chosen.steps, chosen.demand) for _ in range(chosen.repeats)], axis=0).mean(1)
        print(f"{spec:16} {one:7.2f} {every:7.2f}   x{every / one:.2f}")


if __name__ == "__main__":
    main()
