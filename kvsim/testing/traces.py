"""A random trace whose sums are exact, small enough to print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kvsim.trace.access import DenseSource, PromptRows, TokenRow, Trace, dense_trace


def tiny_trace(
    seed: int = 0, layers: int = 2, heads: int = 2, prompt: int = 12, steps: int = 24, windows: Sequence[int] = ()
) -> Trace:
    """A random request whose weights are multiples of 1/1024, so that sums are exact in any order.

    `windows`: tokens each layer can see, for sliding-window layers; 0 sees all. It has q, k and v too (two query heads
    per KV head, four numbers each, not those that give the rows) and two spans.
    """
    rng = np.random.default_rng(seed)
    windows = windows or (0,) * layers
    rows = np.zeros((prompt + steps, layers, heads, prompt + steps), np.float32)
    for t, layer, head in np.ndindex(rows.shape[:3]):
        first = max(0, t + 1 - windows[layer]) if windows[layer] else 0
        chances = rng.dirichlet(np.full(t + 1 - first, 0.3))
        rows[t, layer, head, first : t + 1] = rng.multinomial(1024, chances) / np.float32(1024)
    q = rng.normal(size=(layers, 2 * heads, prompt + steps, 4)).astype(np.float32)
    k, v = (rng.normal(size=(layers, heads, prompt + steps, 4)).astype(np.float32) for _ in range(2))
    half = max(1, prompt // 2)
    extra: dict[str, Any] = {
        "vectors": (q, k, v),
        "inv_freq": np.array([1.0, 0.01]),
        "spans": [(0, half), (half, prompt)] if prompt > half else (),
    }
    return dense_trace([_Windowed(rows[:prompt, ..., :prompt], rows[prompt:], windows, **extra)])


class _Windowed(DenseSource):
    def __init__(self, prompt_rows, decode_rows, windows, **extra):
        super().__init__(prompt_rows, decode_rows, **extra)
        self._windows = np.asarray(windows)

    def _first(self, tokens: int) -> np.ndarray:
        return np.where(self._windows > 0, np.maximum(0, tokens - self._windows), 0).astype(np.int32)

    def prompt(self) -> PromptRows:
        p = super().prompt()
        return replace(p, kv_lo=np.stack([self._first(i + 1) for i in range(len(p.rows))]))

    def token_rows(self):
        for t in super().token_rows():
            yield TokenRow(t.step, t.row, self._first(t.kv_hi), t.kv_hi)
