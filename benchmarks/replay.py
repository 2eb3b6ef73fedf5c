"""How long one step of the cache takes: 16 layers x 8 KV heads, 1,024 of 4,096 visible pages resident.

    python benchmarks/replay.py [--steps 40] [--repeats 5] [--threads 1]

Rows are decoded beforehand and held in memory; the time is `Cache.access` alone, the policy included. Beside it
stands one pass over the memory that a step cannot avoid (the row's sums, then key, weight and score columns of
every resident page), timed in turns with the steps, so that the ratio says what is left to gain on any machine. The
pass takes the row of the step before last: like the step's own it was read two steps ago, and is as far away. "best"
is the mean over the steps of the fastest of the repeats: a machine that others use slows some of them.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from numba import njit

from kvsim import registry, threads
from kvsim.cache.cache import Cache
from kvsim.cache.tiers import Capacity
from kvsim.trace.access import Access, Prompt

LAYERS, HEADS, VISIBLE, BUDGET = 16, 8, 4096, 1024
POLICIES = ("h2o", "lru", "streaming-llm", "lfu", "tova", "lazy-eviction", "random")


def accesses(steps: int, seed: int = 0):
    """Prefill of 4,096 - `steps` tokens, then steps whose rows are taken in turn from a few buffers."""
    rng = np.random.default_rng(seed)
    prompt = VISIBLE - steps
    rows = rng.exponential(size=(4, LAYERS, HEADS, VISIBLE)).astype(np.float32) ** 6
    rows /= rows.sum(-1, keepdims=True)
    first, last = np.zeros(LAYERS, np.int32), rows[0][..., :prompt]
    seen = np.full((1, LAYERS), prompt, np.int32)
    stats = Prompt(last, None, None, last[None], last[None], seen)
    yield Access(0, rows[0], rows[0], prompt, prompt, prompt, first, seen[0], stats)
    for step in range(1, steps + 1):
        n = prompt + step
        yield Access(step, rows[step % 4], rows[step % 4], n, n, 1, first, first + n)


@njit(fastmath=True)
def memory_pass(row, keys, key, weights, column, out):
    """Reads the rows and three columns, writes two of them, once."""
    group = row.shape[0] // key.shape[0]
    for t in range(key.shape[0]):
        for m in range(t * group, (t + 1) * group):
            total = np.float32(0.0)
            for k in range(keys):
                total += row[m, k]
            out[m] = total
        for s in range(key.shape[1]):
            weights[t, s] = np.float32(key[t, s])
            column[t, s] += np.float32(1.0)


def measure(spec: str, steps: int) -> tuple[list[float], list[float]]:
    """Nanoseconds per resident slot of every step, and of a memory pass after every step."""
    policy = registry.build(spec)
    cache = Cache((LAYERS, HEADS), VISIBLE, policy, Capacity(BUDGET))
    cache.fusing = True  # as in a run that is long enough
    slots, step_ns, pass_ns, out = LAYERS * HEADS * BUDGET, [], [], np.empty(LAYERS * HEADS, np.float32)
    rows: list[np.ndarray] = []
    columns = np.empty((2, 0, 0), np.float32)
    warm = max(3, policy.lag)  # compiled, and the prompt is cut
    for a in accesses(warm + -(-steps // policy.lag) * policy.lag):  # each of a lagged policy's steps equally often
        begin = time.perf_counter_ns()
        cache.access(a)
        middle = time.perf_counter_ns()
        t = cache.table
        if columns.shape[1:] != t.key.shape:
            columns = np.zeros((2, *t.key.shape), np.float32)
        rows = [*rows[-2:], a.row.reshape(LAYERS * HEADS, -1)]
        again = time.perf_counter_ns()
        memory_pass(rows[0], a.keys, t.key, *columns, out)
        end = time.perf_counter_ns()
        if a.step > warm:
            step_ns.append((middle - begin) / slots)
            pass_ns.append((end - again) / slots)
    return step_ns, pass_ns


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--threads", type=int, default=1, help="cores to use (default: one)")
    options.add_argument("--policies", nargs="*", default=POLICIES)
    chosen = options.parse_args()
    threads.cores = lambda: chosen.threads
    print(f"{'policy':16} {'min':>7} {'median':>7} {'best':>7} {'pass':>7}   ns per slot and step; best by best pass")
    for spec in chosen.policies:
        runs = np.array([measure(spec, chosen.steps) for _ in range(chosen.repeats)])
        best, one = runs.min(0).mean(1)
        print(
            f"{spec:16} {runs[:, 0].min():7.2f} {np.median(runs[:, 0]):7.2f} {best:7.2f} {one:7.2f}   x{best / one:.1f}"
        )


if __name__ == "__main__":
    main()
