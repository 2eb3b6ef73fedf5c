"""What a whole curve costs: caches of every size in one pass, beside one replay. 16 layers x 8 KV heads, 4,096 pages.

    python benchmarks/curve.py [--steps 40] [--repeats 3] [--policies lru tova ...]

Both read the same rows, decoded beforehand; the time is `access` alone, the policy included. The replay holds all pages
but those that decoding adds, so that it decides at every step as the pass does. The two take turns step by step; the
fastest step of each is the one that nothing disturbed.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from replay import HEADS, LAYERS, VISIBLE, accesses

from kvsim import registry
from kvsim.cache.cache import Cache
from kvsim.cache.stack import Stacks
from kvsim.cache.tiers import Capacity

POLICIES = ("lru", "lfu", "h2o(recent=32)", "streaming-llm", "random", "tova", "lazy-eviction")


def measure(spec: str, steps: int) -> np.ndarray:
    """Nanoseconds per page of every step, of one replay and of the pass: [2, steps]."""
    pages, found = LAYERS * HEADS * VISIBLE, []
    caches = []
    for kind, budget in ((Cache, VISIBLE - steps), (Stacks, VISIBLE)):
        policy = registry.build(spec)
        policy.rows = "full"
        caches.append(kind((LAYERS, HEADS), VISIBLE, policy, Capacity(budget)))
    for a in accesses(steps):
        times = [time.perf_counter_ns()]
        for cache in caches:
            cache.access(a)
            times.append(time.perf_counter_ns())
        found.append(np.diff(times) / pages)
    return np.array(found[4:]).T  # compiled and warm


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--policies", nargs="*", default=POLICIES)
    chosen = options.parse_args()
    print(f"{'policy':16} {'replay':>7} {'curve':>7}   ns per page and step, the fastest step of each; curve / replay")
    for spec in chosen.policies:
        one, curve = np.min([measure(spec, chosen.steps) for _ in range(chosen.repeats)], axis=(0, 2))
        print(f"{spec:16} {one:7.2f} {curve:7.2f}   x{curve / one:.2f}")


if __name__ == "__main__":
    main()
