"""Caches of every size in one replay.

Where the order in which pages leave does not depend on what a cache holds, the caches of a lane are nested: the one of
B pages holds what the one of B - 1 holds, and at most one page more (the inclusion property; Mattson, Gecsei, Slutz and
Traiger, "Evaluation techniques for storage hierarchies", IBM Systems Journal 9(2), 1970). One list then tells them all:
at its place B stands that one page. The order may be another one at every step, as scores are; nesting needs no more
than that caches of all sizes use the same.

A page that enters goes down the list. At place B meet the page that the cache of B - 1 pages has let go and the one
page that the cache of B held more: the higher of the two is what the larger cache now has more, the lower goes on. Of
several pages that enter at once, those not yet placed are a heap. An empty place (its page came back to the top, or a
sliding window left it behind) takes what comes down, since no cache from that size on is full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from kvsim.cache import hooks, threads
from kvsim.cache.cache import Cache
from kvsim.cache.kernels import _JIT, _is_used, _rank
from kvsim.cache.outcome import Outcome
from kvsim.cache.view import protected
from kvsim.trace.access import Access

_KEY = np.uint64(2**31 - 1)  # the part of a rank that is its key + 1
_PINNED = np.uint64((2**33 - 1) << 31)  # above every rank: what may not leave
_GONE = np.uint64(0)  # below every rank: what is not in the stack any more
_OF_ROWS = frozenset({"last", "uses", "mass", "weights"})  # columns that are made from rows


def not_nested(policy: Any) -> str | None:
    """Why caches of different size may disagree on who leaves, in words that follow "because"; None where they agree.

    Which columns a policy looks at shows only when it runs: `Stacks.depends`.
    """
    head, tail = protected(policy, np.array([1, 2**40]), 1)
    reasons = {
        "it chooses a read set at every step": callable(getattr(policy, "select", None)),
        "it splits the budget between lanes": callable(getattr(policy, "split", None)),
        "it evicts several pages at once": policy.batch > 1,
        "what it protects is a share of the budget": head[0] != head[1] or tail[0] != tail[1],
        "it does not say that its scores are the same at every budget (`budget_free`)": not policy.budget_free,
    }
    if not policy.bounded and not callable(getattr(policy, "split", None)):  # everything stays: nothing is decided
        return None
    return next((reason for reason, holds in reasons.items() if holds), None)


class Stacks(Cache):
    """The caches of all budgets of one request: a full cache that keeps their stacks beside its table.

    Arguments as in `Cache`, with a budget of the whole request. `mass` (float64) and `found` (int64), [stride + 1]:
    summed over decode steps and row lanes, the attention mass and the used (or needed) pages that were on the GPU at
    place B of the stacks; at 0, of pages that every cache has, whatever its size (new ones, before a decision). Their
    cumulative sums are those of the caches of every budget, the last one that of the full cache.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stack = np.full((self.lanes, self.stride), -1, np.int32)  # keys, -1 for an empty place
        self.depth = np.zeros(self.lanes, np.int64)  # places in use
        self.entered = 0  # keys below have entered the stacks; the others are in every cache
        places = (self.lanes, self.stride + 1)
        self._mass_at, self._found_at = np.zeros(places), np.zeros(places, np.int64)

    @property
    def mass(self) -> np.ndarray:
        return self._mass_at.sum(0)

    @property
    def found(self) -> np.ndarray:
        return self._found_at.sum(0)

    @property
    def depends(self) -> str | None:
        """What the policy looked at in a decode step that is not the same in caches of every size; as `not_nested`."""
        asked, once = self.view.asked, self.lossy and self.policy.once
        if self.sizes is not None:
            return "pages are of different size"
        if not self.policy.bounded or once:  # decides at the end of prefill, from what all of them have seen
            return None
        if self.lossy and self.policy.rows == "visible" and (columns := asked & _OF_ROWS):
            return f"it looks at {', '.join(sorted(columns))} of rows renormalised over the pages that a cache holds"
        if not self.lossy and "arrived" in asked:
            return "it looks at when pages arrived on the GPU"
        return None

    def held(self, lane: int, budget: int) -> set[int]:
        """Keys on the GPU of the cache of `budget` pages, as of the latest step."""
        first = self._first[lane]
        keys = self.stack[lane, : min(budget, self.depth[lane])]
        return {*keys[keys >= first].tolist(), *range(max(first, self.entered), self.view.keys)}

    def _settle(self, a: Access, out: Outcome) -> None:
        self._first = self.per_lane(a.first)
        row, peak = a.row.reshape(self.rows, -1), a.peak.reshape(self.rows, -1)
        limits = self.predicate.limits(peak, a.keys, self.per_row(a.visible), self.per_row(a.first))
        if not a.prefill:
            place = self.stack, self.depth, self._first, self.entered, a.keys
            self._each(tally, row, peak, self.page_size, *place, *limits, self._mass_at, self._found_at)
        if self.evicts and self.policy.bounded and self._due(a):
            self._enter_stacks(a, peak, limits)
        if a.prefill:
            self.view.asked.clear()  # of the prompt all caches have seen the same

    def _enter_stacks(self, a: Access, peak: np.ndarray, limits: tuple[np.ndarray, np.ndarray]) -> None:
        t, score, (head, tail) = self.table, self.score(), self.protected()
        pinned = a.keys - 1 if a.tokens % self.page_size else -1
        self._each(
            descend, score, t.key, head, a.keys - tail, pinned, peak, *limits, not self.lossy, self.entered,
            self.stack, self.depth,
        )  # fmt: skip
        if self.depth.min() < 0:
            lane = tuple(int(i) for i in np.unravel_index(self.depth.argmin(), self.shape))
            wrong = f"returned NaN at step {a.step}, lane {lane}"
            raise hooks.broken(self.policy, wrong, "score", "every resident page needs a number")
        self.entered = a.keys

    def _each(self, loop: Callable[..., None], *arguments: Any) -> None:
        threads.each(loop, self.lanes, self.stride, *arguments)


@njit(**_JIT)
def tally(begin, end, row, peak, page_size, stack, depth, first, entered, keys, need, need_key, mass, found):
    """Add the weights and the used pages at each place of a lane's stack; pages from `entered` on count at 0."""
    group = row.shape[0] // stack.shape[0]
    weight = np.empty(stack.shape[1], np.float32)
    for t in range(begin, end):
        places, least = depth[t], first[t]
        for m in range(t * group, (t + 1) * group):
            from_weight, from_key = need[m], need_key[m]
            for k in range(max(entered, least), keys):
                mass[t, 0] += row[m, k]
                found[t, 0] += _is_used(peak[m, k], k, from_weight, from_key)
            for i in range(places):
                weight[i] = row[m, np.uint32(max(stack[t, i], 0))]
            for i in range(places):
                mass[t, i + 1] += weight[i] if stack[t, i] >= least else np.float32(0.0)
            if page_size > 1:
                for i in range(places):
                    weight[i] = peak[m, np.uint32(max(stack[t, i], 0))]
            for i in range(places):
                k = stack[t, i]
                found[t, i + 1] += (k >= least) & _is_used(weight[i], k, from_weight, from_key)


@njit(**_JIT)
def descend(begin, end, score, key, head, tail, pinned, peak, need, need_key, comes_back, entered, stack, depth):
    """Let pages go down the stacks: those from `entered` on, and with `comes_back` (the offload regime) every page that
    a row uses. Order, `head`, `tail` and `pinned` as in `kernels.victims`. The depth of a lane with a NaN score is -1.
    """
    slots, stride = key.shape[1], stack.shape[1]
    group = peak.shape[0] // key.shape[0]
    ranks = np.empty(slots, np.uint64)
    rank, heap = np.empty(stride + 1, np.uint64), np.empty(stride, np.uint64)  # by key + 1; 0 is that of no key
    for t in range(begin, end):
        low, high, bad = head[t], tail[t], 0
        for s in range(slots):
            k, x = key[t, s], score[t, s]
            bad += (k >= 0) & (x != x)
            ranks[s] = _rank(k < low or k >= high, x, k + 1)
        if bad:
            depth[t] = -1
            continue
        rank[:] = _GONE
        for s in range(slots):
            rank[np.uint32(key[t, s] + 1)] = ranks[s]
        rank[0] = _GONE
        if pinned >= 0:
            rank[pinned + 1] = _PINNED | np.uint64(pinned + 1)
        n = 0
        for k in range(0 if comes_back else entered, stride):
            if rank[k + 1] == _GONE:
                continue
            enters = k >= entered
            if not enters:
                for m in range(t * group, (t + 1) * group):
                    enters = enters or _is_used(peak[m, k], k, need[m], need_key[m])
            if enters:
                heap[n] = rank[k + 1]
                rank[k + 1] = _GONE
                n += 1
        depth[t] = _carry(stack[t], depth[t], rank, heap, n)


@njit(**_JIT)
def _carry(stack, depth, rank, heap, n):
    """One lane: the first `n` ranks of `heap` go down `stack`, whose pages have the ranks `rank`; returns its depth."""
    for i in range(n // 2 - 1, -1, -1):
        _sink(heap, n, i)
    i = 0
    while n > 1 and i < depth:
        r = rank[np.uint32(stack[i] + 1)]
        if r < heap[0]:
            stack[i] = _key(heap[0])
            if r == _GONE:
                n -= 1
                heap[0] = heap[n]
            else:
                heap[0] = r
            _sink(heap, n, 0)
        i += 1
    if n <= 1:  # no branch, which would be guessed wrong too often
        carried = heap[0] if n else _GONE
        for j in range(i, depth):
            r = rank[np.uint32(stack[j] + 1)]
            stack[j] = _key(max(r, carried))
            carried = min(r, carried)
        n, heap[0] = int(carried > _GONE), carried
    while n > 0:
        stack[depth] = _key(heap[0])
        depth += 1
        n -= 1
        heap[0] = heap[n]
        _sink(heap, n, 0)
    while depth > 0 and stack[depth - 1] < 0:
        depth -= 1
    return depth


@njit(inline="always")
def _key(rank):
    return np.int32(rank & _KEY) - np.int32(1)


@njit(inline="always")
def _sink(heap, n, i):
    """Put `heap[i]` where it belongs below it: no rank is above its parent's, (i - 1) // 2."""
    x = heap[i]
    child = 2 * i + 1
    while child < n:
        if child + 1 < n and heap[child + 1] > heap[child]:
            child += 1
        if heap[child] <= x:
            break
        heap[i] = heap[child]
        i, child = child, 2 * child + 1
    heap[i] = x
