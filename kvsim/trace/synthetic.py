"""Made-up attention with the shape of real attention, from a seed: for tests, benchmarks and first steps.

A lane's logits add up what captured rows show: a sink on the first tokens, a recent window that fades with
the logarithm of age, a few heavy hitters, and recurrence - keys that come back after a heavy-tailed number
of idle steps. Lanes are of four kinds (sink, local, retrieval, diffuse, in the shares 50, 25, 15 and 10 %)
and a row is the mean of a softmax over the query heads of a group. Nothing here is measured: numbers
obtained on synthetic rows say so.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvsim.trace.access import DenseSource, Geometry, Trace, dense_trace

_KINDS = ("sink", "local", "retrieval", "diffuse")
_SHARES = (0.50, 0.25, 0.15, 0.10)
#                    sink, recency, heavy hitter, recurrence, sharpness: logits of a lane of each kind
_LOGITS = np.array(
    [
        [7.0, 0.6, 1.0, 2.5, 1.0],
        [1.0, 1.8, 0.5, 1.5, 1.1],
        [2.5, 0.4, 1.8, 5.0, 1.2],
        [0.5, 0.2, 0.5, 0.7, 0.6],
    ],
    np.float32,
)
_IDLE_TAIL = 1.1  # Pareto exponent of the idle steps between two recurrences


def synthetic_rows(
    tokens: int, layers: int = 2, kv_heads: int = 2, *, seed: int = 0, group: int = 2, first: int = 0
) -> Iterator[np.ndarray]:
    """Rows of the queries first .. tokens - 1: float32 [layers, kv_heads, query + 1], each summing to 1.

    Rows depend on `first` as well as on the seed: recurrence starts there.
    """
    rng = np.random.default_rng(seed)
    lanes = (layers, kv_heads)
    kind = rng.choice(len(_KINDS), size=lanes, p=_SHARES)
    sink, recency, hitter, recur, sharp = (_LOGITS[kind, i][..., None] for i in range(5))
    sinks = np.zeros(tokens, np.float32)
    sinks[:4] = (1.0, 0.5, 0.3, 0.2)[:tokens]
    heavy = rng.standard_exponential((*lanes, tokens), np.float32)
    rate = rng.pareto(_IDLE_TAIL, (*lanes, tokens)).astype(np.float32) + 1  # a key's own pace of coming back
    due = np.arange(tokens, dtype=np.float32) + 8 * rate
    fade = np.log1p(np.arange(tokens, dtype=np.float32))[::-1]  # fade[-1] is the newest key
    for query in range(first, tokens):
        seen = query + 1
        back = due[..., :seen] <= query
        again = query + 1 + rate[..., :seen] * rng.standard_exponential((*lanes, seen), np.float32)
        due[..., :seen] = np.where(back, again, due[..., :seen])
        logit = sink * sinks[:seen] + hitter * heavy[..., :seen] - recency * fade[tokens - seen :] + recur * back
        yield _softmax_mean(logit * sharp, group, rng)


def _softmax_mean(logit: np.ndarray, group: int, rng: np.random.Generator) -> np.ndarray:
    """Mean over `group` query heads, which see the same logits with noise of their own."""
    total = np.zeros_like(logit)
    for _ in range(group):
        z = logit + 0.7 * rng.standard_normal(logit.shape, np.float32)
        z = np.exp(z - z.max(-1, keepdims=True))
        total += z / z.sum(-1, keepdims=True)
    return total / np.float32(group)


def synthetic_source(
    prompt: int = 64,
    steps: int = 128,
    layers: int = 2,
    kv_heads: int = 2,
    *,
    seed: int = 0,
    group: int = 2,
    id: int = 0,
) -> DenseSource:
    """One request in memory: 4 (prompt + steps)^2 bytes per lane, half of them zeros, so keep it small."""
    tokens = prompt + steps
    dense = np.zeros((tokens, layers, kv_heads, tokens), np.float32)
    for query, row in enumerate(synthetic_rows(tokens, layers, kv_heads, seed=seed, group=group)):
        dense[query, ..., : query + 1] = row
    return DenseSource(dense[:prompt, ..., :prompt].copy(), dense[prompt:], id=id)


def synthetic_trace(
    requests: int = 1,
    prompt: int = 64,
    steps: int = 128,
    layers: int = 2,
    kv_heads: int = 2,
    *,
    seed: int = 0,
    group: int = 2,
) -> Trace:
    """Requests in memory, request i from seed `seed + i`."""
    sources = [
        synthetic_source(prompt, steps, layers, kv_heads, seed=seed + i, group=group, id=i) for i in range(requests)
    ]
    return dense_trace(sources, Geometry(layers, kv_heads, group=group, name="synthetic"), name="synthetic")
