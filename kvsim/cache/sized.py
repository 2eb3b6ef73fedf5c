"""Pages of different size: a tier's content is a sum of sizes, and as many of the lowest pages leave as make room.

Sizes are counted in pages, one per key, and come as the fact "size" of a trace. Where there is none, nothing of this
module is called: all pages are of size one, and counted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from kvsim.cache.kernels import _rank, forget_older
from kvsim.cache.view import Facts
from kvsim.errors import ConfigError

_JIT: Any = {"cache": True, "nogil": True, "boundscheck": False}
NEAR = 1e-6  # sums of many fractions are this exact


def sizes_of(facts: Facts | None, stride: int) -> np.ndarray | None:
    """Size of each key, float32 [stride] in pages; None where the trace knows none.

    Raises ConfigError for a size that is not above zero.
    """
    known = facts().get("size") if facts else None
    if known is None:
        return None
    sizes = np.asarray(known[:stride], np.float32)
    if not (np.isfinite(sizes) & (sizes > 0)).all():
        raise ConfigError('the fact "size" of a trace holds a size that is not above zero')
    return sizes


@njit(**_JIT)
def load(key, copies, bit, sizes):
    """float64 [lanes]: the sizes of all pages with a copy in the tier `bit`."""
    out = np.zeros(key.shape[0])
    for t in range(key.shape[0]):
        for s in range(key.shape[1]):
            if copies[t, s] & bit:
                out[t] += sizes[key[t, s]]
    return out


@njit(**_JIT)
def victims(score, key, copies, bit, excess, limit, sizes, head, tail, pinned, out, counts):
    """As `kernels.victims`, until what leaves is as large as `excess[t]` (float64).

    A page larger than `limit[t]`, all that the tier holds, leaves before any other: it passes through, and takes none
    with it that could stay.
    """
    slots = key.shape[1]
    rank, where = np.empty(slots, np.uint64), np.empty(slots, np.int32)
    for t in range(key.shape[0]):
        counts[t], freed = 0, 0.0
        if excess[t] <= NEAR:
            continue
        n = 0
        for s in range(slots):
            k = key[t, s]
            if k < 0 or not (copies[t, s] & bit) or k == pinned:
                continue
            x = score[t, s]
            if x != x:
                counts[t] = -1
                break
            if sizes[k] > limit[t]:
                rank[n] = np.uint64(k)  # below every score: those begin at 2**31
            else:
                rank[n] = _rank(k < head[t] or k >= tail[t], x, k)
            where[n] = s
            n += 1
        for i in np.argsort(rank[: n if counts[t] == 0 else 0]):
            if freed >= excess[t] - NEAR:
                break
            out[t, counts[t]] = where[i]
            counts[t] += 1
            freed += sizes[key[t, where[i]]]


forget_older(victims)
