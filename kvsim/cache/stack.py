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

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numba import njit

from kvsim.cache import fused, threads
from kvsim.cache.cache import Cache
from kvsim.cache.kernels import _JIT, _LAST, TOGETHER, _is_used, _line_up, _ordered, _rank
from kvsim.cache.outcome import Outcome
from kvsim.cache.view import protected
from kvsim.trace.access import Access

_KEY = np.uint64(2**31 - 1)  # the part of a rank that is its key + 1
_PINNED = np.uint64((2**33 - 1) << 31)  # above every rank: what may not leave
_GONE = np.uint64(0)  # below every rank: what is not in the stack any more
_NOBODY = np.int32(-(2**31))  # the order of an empty place, below every score's
_COARSE = 16  # places per bucket from which on buckets pay
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

    Arguments as in `Cache`, with a budget of the whole request, and `edges`: the budgets that are wanted (None: all).
    `mass` (float64) and `found` (int64), [stride + 1]: summed over decode steps and row lanes, the attention mass and
    the used (or needed) pages that were on the GPU at place B of the stacks; at 0, of pages that every cache has,
    whatever its size (new ones, before a decision). Their cumulative sums at an edge are those of the cache of that
    budget, the last one that of the full cache.
    """

    chooses = False

    def __init__(self, *args: Any, edges: Iterable[int] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        edges = range(1, self.stride) if edges is None else edges
        self.edges = np.array(sorted({self.stride, *(e for e in edges if 0 < e < self.stride)}), np.int64)
        self.coarse = len(self.edges) * _COARSE <= self.stride  # buckets, not places
        self.depth = np.zeros(self.lanes, np.int64)  # places in use
        self.entered = 0  # keys below have entered the stacks; the others are in every cache
        places = (-(-self.lanes // TOGETHER), self.stride + 1)
        self._mass_at, self._found_at = np.zeros(places), np.zeros(places, np.int32)  # a page a step and row at most
        self._found_new = np.zeros(self.lanes, np.int64)
        self._to, self._source = np.empty((2, self.lanes, self.stride), np.int32)  # the pages that move
        self._score = np.empty((0, 0), np.float32)
        self._need, self._need_key = np.empty(self.rows, np.float32), np.empty(self.rows, np.int32)  # never looked at
        self._moved = fused.columns_read(self.policy) - {
            "key",
            "weights",
        }  # the one moves first, the other is made anew

    @property
    def mass(self) -> np.ndarray:
        return self._mass_at.sum(0)

    @property
    def found(self) -> np.ndarray:
        found = self._found_at.sum(0, dtype=np.int64)
        found[0] = self._found_new.sum()
        return found

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
        """Keys on the GPU of the cache of `budget` pages, one of the edges, as of the latest step."""
        keys, first = self.table.key[lane, : min(budget, self.depth[lane])], self._first[lane]
        entered = keys[(keys >= first) & (keys < self.entered)]
        return {*entered.tolist(), *range(max(first, self.entered), self.view.keys)}

    def each(self, loop: Callable[..., None], *arguments: Any) -> None:
        threads.each(loop, self.lanes, self.table.slots, *arguments, together=TOGETHER)

    def places(self, a: Access) -> tuple:
        self._first = self.per_lane(a.first)
        return self._mass_at, self._found_at, self._found_new, self.entered, self.depth, self._first

    def _settle(self, a: Access, out: Outcome) -> None:
        self._first = self.per_lane(a.first)
        if self.evicts and self.policy.bounded and self._due(a):
            self._enter_stacks(a)
        if a.prefill:
            self.view.asked.clear()  # of the prompt all caches have seen the same

    def _enter_stacks(self, a: Access) -> None:
        t, score, (head, tail) = self.table, self._scores(), self.protected()
        peak, limits = a.peak.reshape(self.rows, -1), (self._need, self._need_key)
        if not self.lossy:
            limits = self.predicate.limits(peak, a.keys, self.per_row(a.visible), self.per_row(a.first))
        pinned = a.keys - 1 if a.tokens % self.page_size else -1
        moves = np.empty(self.lanes, np.int64)
        self.each(
            descend, score, t.key, t.copies, t.free, t.free_count, a.keys, self._first, head, a.keys - tail, pinned,
            peak, *limits, not self.lossy, self.entered, self.edges, self.coarse, self.depth, self._to, self._source,
            moves,
        )  # fmt: skip
        self.check(a, moves)
        for column in (*(getattr(t, name) for name in sorted(self._moved)), *t.private.values()):
            unit = np.int32 if column.dtype.itemsize % 4 == 0 else np.uint8
            lines = column.reshape(*column.shape[:2], -1).view(unit)
            self.each(move, lines.swapaxes(1, 2), self._to, self._source, moves)
        self.entered = a.keys

    def _scores(self) -> np.ndarray:
        if not (self.fused and self.fused.scores and self.view.now):
            return self.score()
        self.fused.ask(self.view, "score")
        if self.fused.score_column:
            return getattr(self.table, self.fused.score_column)
        if self._score.shape != self.table.key.shape:
            self._score = np.empty(self.table.key.shape, np.float32)  # once: new memory is slow to touch
        self.each(self.fused.scores, self._score, *self.fused.arguments(self.table, self.view))
        return self._score


@njit(**_JIT)
def descend(
    begin, end, score, key, copies, free, free_count, keys, first, head, tail, pinned, peak, need, need_key, comes_back,
    entered, edges, coarse, depth, to, source, moves,
):  # fmt: skip
    """Let pages go down the stacks of lanes `begin` to `end`: those from `entered` on, and with `comes_back` (the
    offload regime) every page that a row uses.

    `first` by lane: keys below have been left behind by a window, so that there may be empty places. Order, `head`,
    `tail` and `pinned` as in `kernels.victims`. `edges`, `coarse`: the budgets that are wanted, and
    whether what is between them may be in any order. Pages change their slots: `moves[t]` of them, from `source[t]` to
    `to[t]`; -1 where a score is NaN. What else the table knows of them is moved by `move`.
    """
    slots = key.shape[1]
    group = peak.shape[0] // key.shape[0]
    order, entering = np.empty(slots, np.int32), np.empty(slots, np.int32)
    rank, heap, at = np.empty(slots, np.uint64), np.empty(slots, np.uint64), np.empty(keys + 1, np.int32)
    carried = np.empty(slots, np.int32)
    for t in range(begin, end):
        page, low, high = key[t], head[t], tail[t]
        moves[t] = 0
        if _line_up(score[t], page, np.int32(low), np.int32(min(high, pinned) if pinned >= 0 else high), order)[1]:
            moves[t] = -1
            continue
        if keys == entered and not comes_back:
            continue
        if first[t] > 0:
            _empty(page, np.int32(entered), order)
        if keys - entered == 1 and page[min(depth[t], slots - 1)] == entered:
            n, entering[0] = 1, depth[t]
        else:
            n = _find_from(page, np.int32(entered), entering)
        for s in range(slots if comes_back else 0):
            enters, k = False, page[s]
            if 0 <= k < entered:
                for m in range(t * group, (t + 1) * group):
                    enters = enters or _is_used(peak[m, k], k, need[m], need_key[m])
            if enters:
                entering[n] = s
                n += 1
        if coarse and n == 1 and not comes_back:
            places, count = _swap_down(
                score[t], page, order, depth[t], low, high, pinned, edges, entering[0], to[t], source[t]
            )
        else:
            for s in range(slots):
                x = score[t, s]
                rank[s] = _full_rank(x, page[s], low, high, pinned) if page[s] >= 0 else _GONE
            for i in range(n):
                s = entering[i]
                at[page[s] + 1] = s
                heap[i] = rank[s]
                rank[s] = _GONE
            for s in range(depth[t] if n > 1 else 0):
                at[page[s] + 1] = s
            places, count = _carry(rank, depth[t], heap, n, at, to[t], source[t])
        moves[t] = count
        for i in range(count):
            carried[i] = page[source[t, i]]
        for i in range(n):
            page[entering[i]] = -1
            copies[t, entering[i]] = 0
        for i in range(count):
            page[to[t, i]] = carried[i]
            copies[t, to[t, i]] = 1
        left = False
        for i in range(n):
            left = left or page[entering[i]] < 0
        while places > 0 and page[places - 1] < 0:
            places -= 1
        depth[t] = places
        if left:  # other lines are free now
            free_count[t] = 0
            for s in range(slots - 1, -1, -1):
                if page[s] < 0:
                    free[t, free_count[t]] = s
                    free_count[t] += 1


@njit(**_JIT)
def move(begin, end, column, to, source, moves):
    """Lines of a column [lanes, words, slots] to other slots."""
    carried = np.empty(column.shape[2], column.dtype)
    for t in range(begin, end):
        for w in range(column.shape[1]):
            lines = column[t, w]
            for i in range(moves[t]):
                carried[i] = lines[source[t, i]]
            for i in range(moves[t]):
                lines[to[t, i]] = carried[i]


@njit(**_JIT)
def _find_from(key, first, slots):
    """The slots of the keys from `first` on: how many."""
    n, whole = 0, key.shape[0] - key.shape[0] % 64
    for begin in range(0, key.shape[0], 64):
        if begin < whole:  # few blocks have any
            block, found = key[begin : begin + 64], np.int32(0)
            for j in range(64):
                found = np.int32(found | np.int32(block[j] >= first))
            if not found:
                continue
        for s in range(begin, min(begin + 64, key.shape[0])):
            if key[s] >= first:
                slots[n] = s
                n += 1
    return n


@njit(**_JIT)
def _empty(key, entered, order):
    """Below all, the places that are empty, which those of pages that have not entered are."""
    for s in range(key.shape[0]):
        order[s] = order[s] if (key[s] >= 0) & (key[s] < entered) else _NOBODY


@njit(inline="always")
def _full_rank(x, key, low, high, pinned):
    guard = _PINNED if key == pinned else _GONE
    return guard | _rank(key < low or key >= high, np.float32(x), key + 1)


@njit(**_JIT)
def _swap_down(score, key, order, depth, low, high, pinned, edges, slot, to, source):
    """The page of `slot` goes down a stack whose buckets end at `edges`, of each of which it may take the place of the
    lowest; `order`: of each place's page. Returns the stack's depth, and how many pages move."""
    limit, start, count = np.int32(_LAST), 0, 0
    if key[slot] >= low and key[slot] < high and key[slot] != pinned:
        limit = np.int32(_ordered(np.float32(score[slot])))
    for e in range(edges.shape[0]):
        end = edges[e]
        if end > depth:  # a cache that is not full
            break
        bucket, least = order[start:end], np.int32(_LAST)
        for j in range(bucket.shape[0]):
            least = min(least, bucket[j])
        if least <= limit:
            at = start + _lowest_of(bucket, key[start:end], score[start:end], least, low, high, pinned)
            if least < limit or _full_rank(score[at], key[at], low, high, pinned) < _full_rank(
                score[slot], key[slot], low, high, pinned
            ):
                to[count], source[count] = at, slot
                count += 1
                if least == _NOBODY:
                    return depth, count
                slot, limit = at, least
        start = end
    while start < depth and order[start] != _NOBODY:
        start += 1
    to[count], source[count] = start, slot
    return max(depth, start + 1), count + 1


@njit(inline="always")
def _lowest_of(order, key, score, least, low, high, pinned):
    """Where the lowest page is among those of order `least`, of which there is one: of protected pages by rank, of
    others that of the lowest key."""
    at, oldest, lowest = np.int32(_LAST), np.int32(_LAST), _PINNED | _KEY
    for s in range(key.shape[0] if least == np.int32(_LAST) else 0):
        if order[s] == least and _full_rank(score[s], key[s], low, high, pinned) <= lowest:
            oldest, lowest = key[s], _full_rank(score[s], key[s], low, high, pinned)
    for s in range(key.shape[0] if least < np.int32(_LAST) else 0):
        oldest = min(oldest, key[s] if order[s] == least else np.int32(_LAST))
    for s in range(key.shape[0]):
        at = min(at, np.int32(s) if key[s] == oldest else np.int32(_LAST))
    return at


@njit(**_JIT)
def _carry(rank, depth, heap, n, at, to, source):
    """The first `n` ranks of `heap` go down a stack whose places have pages of the ranks `rank`; `at`: slot by key + 1.
    Returns the stack's depth, and how many pages move."""
    for i in range(n // 2 - 1, -1, -1):
        _sink(heap, n, i)
    i, count = 0, 0
    while n > 1 and i < depth:
        r = rank[i]
        if r < heap[0]:
            to[count], source[count] = i, at[_key(heap[0])]
            count += 1
            if r == _GONE:
                n -= 1
                heap[0] = heap[n]
            else:
                heap[0] = r
            _sink(heap, n, 0)
        i += 1
    if n == 1:  # no branch, which would be guessed wrong too often
        carried, slot = heap[0], np.int32(at[_key(heap[0])])
        for j in range(i, depth):
            r = rank[j]
            lower = r < carried
            to[count], source[count] = j, slot
            count += lower
            slot = np.int32(j) if lower else slot
            carried = min(r, carried)
        if carried > _GONE:
            to[count], source[count] = depth, slot
            count += 1
            depth += 1
        n = 0
    while n > 0:
        to[count], source[count] = depth, at[_key(heap[0])]
        count += 1
        depth += 1
        n -= 1
        heap[0] = heap[n]
        _sink(heap, n, 0)
    return depth, count


@njit(inline="always")
def _key(rank):
    """The key + 1."""
    return np.int64(rank & _KEY)


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
