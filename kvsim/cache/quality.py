"""What a step's attention lost, beyond its mass: the sources it needed, its output, and memory freed in vain.

The metrics of one request in the lossy regime, from what attention read at each step. All are of an open loop: the
queries are those of the full cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numba import njit

from kvsim.cache.cache import Cache
from kvsim.trace.access import Access, Seen

BLOCK = 16  # tokens of a memory block, as in vLLM: a single token that stays holds the whole block
_CLOSE = 0.05  # largest difference between a stored row and the softmax of q and k: stored weights are 6 % apart


class Quality:
    """Watches a cache (`Cache.watch`) through one request. `facts`: the request's, of which "need" is read.

    After each decode step: `gold_needed`, pairs of a lane and a page that holds a needed token (`need`: for each step
    the positions of the tokens that its answer comes from); `gold_lost`, those that attention could not read;
    `gold_gone`, needed pages that no lane at all could read. `output_error`: ||o - o'|| / ||o|| of the attention
    output, mean over query heads, o' from rows renormalised over what was read (NaN without q, k and v, or where
    their softmax is not the stored row: learned sinks, a cap on logits).
    """

    def __init__(self, cache: Cache, facts: Mapping[str, Any]):
        self._cache = cache
        self._need: Sequence[np.ndarray] | None = facts.get("need")
        self._known = True  # is the stored row what q and k give?
        self._clear()
        cache.watch = self

    def _clear(self) -> None:
        self.gold_needed = self.gold_lost = self.gold_gone = 0
        self.output_error = float("nan")

    def __call__(self, a: Access, read: np.ndarray) -> None:
        self._clear()
        if a.prefill:
            return
        table = self._cache.table
        if self._need is not None:
            pages = np.unique(self._need[a.step - 1] // self._cache.page_size)
            found = _holds(table.key, read, pages.astype(np.int64))
            self.gold_needed, self.gold_lost = found.size, int(found.size - found.sum())
            self.gold_gone = int(len(pages) - found.any(0).sum())
        if a.vectors is not None and self._known:
            self._compare_outputs(a, a.vectors, read)

    def _compare_outputs(self, a: Access, seen: Seen, read: np.ndarray) -> None:
        c = self._cache
        weights = _attention(seen, a.visible)  # [layers, kv_heads, group, tokens]
        if c.page_size == 1:
            stored = a.row[..., : a.tokens]
            self._known = bool(np.abs(weights.mean(2) - stored).max() <= _CLOSE)
            if not self._known:
                return
        kept = np.zeros((c.lanes, a.keys), bool)
        lane, slot = np.nonzero(read)
        kept[lane, c.table.key[lane, slot]] = True
        tokens = np.repeat(kept, c.page_size, axis=1)[:, : a.tokens]
        tokens = np.repeat(tokens, c.rows // c.lanes, axis=0).reshape(*c.row_lanes, 1, a.tokens)
        left = np.where(tokens, weights, 0)
        total = left.sum(-1, keepdims=True)
        np.divide(left, total, out=left, where=total > 0)
        v = seen.v.astype(np.float32)
        full, less = weights @ v, left @ v
        size = np.linalg.norm(full, axis=-1)
        lost = np.linalg.norm(full - less, axis=-1)
        self.output_error = float(np.mean(lost / np.where(size > 0, size, 1), dtype=np.float64))


def _attention(seen: Seen, visible: np.ndarray) -> np.ndarray:
    """Softmax of the newest token's queries over all keys: float32 [layers, kv_heads, group, tokens]."""
    tokens, size = seen.k.shape[-2:]
    q = seen.q[..., -1, :].astype(np.float32) / np.float32(np.sqrt(size))
    z = q @ seen.k.astype(np.float32).swapaxes(-1, -2)
    hidden = np.arange(tokens) < (tokens - visible)[:, None]
    z = np.where(hidden[:, None, None], np.float32(-np.inf), z)
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


@njit(cache=True, nogil=True)
def _holds(key, read, pages):
    """bool [lanes, pages]: is the page (in ascending order) among the lane's keys that are read?"""
    beyond = pages[-1] + 1 if len(pages) else 0  # stands for every later key
    place = np.full(beyond + 1, len(pages))
    for i in range(len(pages)):
        place[pages[i]] = i
    found = np.zeros((key.shape[0], len(pages) + 1), np.bool_)
    for t in range(key.shape[0]):
        for s in range(key.shape[1]):
            if read[t, s]:
                found[t, place[min(key[t, s], beyond)]] = True
    return found[:, :-1]


@njit(cache=True, nogil=True)
def stranded(key, tokens):
    """Tokens that are gone but whose memory is not free, over all lanes: another token of their block stays.

    `key`: int32 [lanes, slots], pages of one token, -1 for none; `tokens`: born so far. What stays holds its blocks,
    and of those is all but itself in vain.
    """
    held, count = np.zeros(tokens // BLOCK + 2, np.uint8), np.int64(0)
    short = tokens % BLOCK - BLOCK  # the newest block is not full
    for t in range(key.shape[0]):
        held[:] = 0
        for s in range(key.shape[1]):
            held[np.uint32(key[t, s] + BLOCK) // np.uint32(BLOCK)] = 1  # 0 for an empty line
            count -= key[t, s] >= 0
        for b in range(1, len(held)):
            count += BLOCK * np.int64(held[b])
        count += short * np.int64(held[-1])
    return count
