"""Caches of every size in one replay.

Where the order in which pages leave does not depend on what a cache holds, the caches of a lane are nested: the one of
B pages holds what the one of B - 1 holds, and at most one page more (the inclusion property; Mattson, Gecsei, Slutz and
Traiger, "Evaluation techniques for storage hierarchies", IBM Systems Journal 9(2), 1970). One list then tells them all:
at its place B stands that one page. The order may be another one at every step, as scores are; nesting needs no more
than that caches of all sizes use the same.

A page that enters goes down the list. At place B meet the page that the cache of B - 1 pages has let go and the one
page that the cache of B held more: the higher of the two is what the larger cache now has more, the lower goes on. So
what comes to a place is the lowest of all above it, and a page moves where it is lower than that. An empty place (its
page came back to the top, or a sliding window left it behind) takes what comes down, since no cache from that size on
is full. Of several pages that enter at once, those not yet placed are a queue, the highest first.

Places are the slots of the table, so the one pass that looks up every page's weight tells them by place. To have many
places done at once, the list is cut in strips that lie side by side: the lowest of each strip say what comes down to
the next, and then all strips go down together, one row of slots at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from kvsim import threads
from kvsim.cache import fused
from kvsim.cache.cache import Cache
from kvsim.cache.kernels import _JIT, _LAST, TOGETHER, _is_used, _ordered, _rank, forget_older
from kvsim.cache.outcome import Outcome
from kvsim.cache.view import protected
from kvsim.trace.access import Access

_STRIPS, _ROWS = 32, 4  # places that are done at once, and rows of them that are taken together
_KEYS, _ROWS_OF = _STRIPS, 2 * _STRIPS  # where keys and rows begin in `edge`
_KEY = np.uint64(2**31 - 1)  # the part of a rank that is its key + 1
_PINNED = np.uint64((2**33 - 1) << 31)  # above every rank: what may not leave
_GONE = np.uint64(0)  # below every rank: what is not in the stack any more
_NOBODY = np.int32(-(2**31))  # the order of an empty place, below every score's
_POURED = 2**31  # more pages than move one by one: they went as `_pour` says
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
    """The caches of all budgets of one request: a full cache whose table is their stacks.

    Pages change their slots; columns that no hook reads stay where they are. Arguments as in `Cache`, with a budget of
    the whole request. `mass` (float64) and `found` (int64), [stride + 1]:
    summed over decode steps and row lanes, the attention mass and the used (or needed) pages that were on the GPU at
    place B of the stacks; at 0, of pages that every cache has, whatever its size (new ones, before a decision). Their
    cumulative sums are those of the caches of B pages, the last one that of the full cache.
    """

    chooses = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        height = -(-self.stride // (_STRIPS * _ROWS)) * _ROWS
        self._slots = np.arange(height * _STRIPS).reshape(height, _STRIPS).T.ravel()  # by place
        self.entered = 0  # keys below have entered the stacks; the others are in every cache
        sums = (-(-self.lanes // TOGETHER), len(self._slots) + 1)
        self._mass_at, self._found_at = np.zeros(sums), np.zeros(sums, np.int32)  # a page a step and row at most
        self._found_new = np.zeros(self.lanes, np.int64)
        self._to, self._source = np.empty((2, self.lanes, len(self._slots)), np.int32)
        self._moves = np.empty(self.lanes, np.int64)
        self._score = np.empty((0, 0), np.float32)
        self._no_limits = np.empty(self.rows, np.float32), np.empty(self.rows, np.int32)  # never looked at
        self._moved = sorted(fused.columns_read(self.policy) - {"key", "weights"})  # these are moved first or made anew

    @property
    def mass(self) -> np.ndarray:
        return self._by_place(self._mass_at.sum(0))

    @property
    def found(self) -> np.ndarray:
        found = self._found_at.sum(0, dtype=np.int64)
        found[0] = self._found_new.sum()
        return self._by_place(found)

    def _by_place(self, column: np.ndarray) -> np.ndarray:
        return np.concatenate([column[:1], column[1:][self._slots]])[: self.stride + 1]

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

    def listed(self, lane: int) -> np.ndarray:
        """int32: the keys of a lane's stack by place, -1 at empty ones, as of the latest step."""
        keys = self.table.key[lane, self._slots]
        return np.where((keys >= self._first[lane]) & (keys < self.entered), keys, -1)

    def held(self, lane: int, budget: int) -> set[int]:
        """Keys on the GPU of the cache of `budget` pages, as of the latest step."""
        keys = self.listed(lane)[:budget]
        return {*keys[keys >= 0].tolist(), *range(max(self._first[lane], self.entered), self.view.keys)}

    def lines(self, a: Access) -> int:
        return len(self._slots)

    def each(self, loop: Callable[..., None], *arguments: Any) -> None:
        threads.each(loop, self.lanes, self.table.slots, *arguments, together=TOGETHER)

    def places(self, a: Access) -> tuple:
        self._first = self.per_lane(a.first)
        return self._mass_at, self._found_at, self._found_new, self.entered, self._first

    def _settle(self, a: Access, out: Outcome) -> None:
        self._first = self.per_lane(a.first)
        enters = a.keys > self.entered or not self.lossy
        if enters and self.evicts and self.policy.bounded and self._due(a):
            self._enter_stacks(a)
        if a.prefill:
            self.view.asked.clear()  # of the prompt all caches have seen the same

    def _enter_stacks(self, a: Access) -> None:
        t, score, (head, tail) = self.table, self._scores(), self.protected()
        peak, limits = a.peak.reshape(self.rows, -1), self._no_limits
        if not self.lossy:
            limits = self.predicate.limits(peak, a.keys, a.visible, a.first)
        pinned = a.keys - 1 if a.tokens % self.page_size else -1
        self.each(
            descend, score, t.key, t.copies, t.free, t.free_count, self._slots, a.keys, head, a.keys - tail, pinned,
            peak, *limits, not self.lossy, self.entered, self._to, self._source, self._moves,
        )  # fmt: skip
        self.check(a, self._moves)
        for column in (*(getattr(t, name) for name in self._moved), *t.private.values()):
            unit = np.int32 if column.dtype.itemsize % 4 == 0 else np.int8
            words = column.reshape(*column.shape[:2], -1).view(unit)
            for i in range(words.shape[2]):
                self.each(move, words[:, :, i], self._to, self._source, self._moves)
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
    begin, end, score, key, copies, free, free_count, slots, keys, head, tail, pinned, peak, need, need_key, comes_back,
    entered, to, source, moves,
):  # fmt: skip
    """Let pages go down the stacks of lanes `begin` to `end`: those from `entered` on, and with `comes_back` (the
    offload regime) every page that a row uses.

    Order, `head`, `tail` and `pinned` as in `kernels.victims`; `slots`: those of the places. Pages change their slots:
    `moves[t]` of them, from `source[t]` to `to[t]`, or, if that is `_POURED`, as `_pour` says. -1 where a score is NaN.
    What else the table knows of pages is moved by `move`.
    """
    n_slots, group = key.shape[1], peak.shape[0] // key.shape[0]
    entering, carried, at = np.empty(n_slots, np.int32), np.empty(n_slots, np.int32), np.empty(keys + 1, np.int32)
    rank, queue = np.empty(n_slots, np.uint64), np.empty(2 * n_slots, np.uint64)
    edge = np.empty(3 * _STRIPS, np.int32)
    for t in range(begin, end):
        page, order, low, high = key[t], to[t], np.int32(head[t]), np.int32(tail[t])
        below = min(high, np.int32(pinned)) if pinned >= 0 else high
        moves[t] = 0
        if _line_up_all(score[t], page, low, below, np.int32(entered), order):
            moves[t] = -1
            continue
        if keys - entered == 1 and page[free[t, free_count[t]]] == entered:  # the line taken last
            n, entering[0] = 1, free[t, free_count[t]]
        else:
            n = _find_from(page, np.int32(entered), entering)
        for s in range(n_slots if comes_back else 0):
            enters, k = False, page[s]
            if 0 <= k < entered:
                for m in range(t * group, (t + 1) * group):
                    enters = enters or _is_used(peak[m, k], k, need[m], need_key[m])
            if enters:
                entering[n] = s
                n += 1
        if n == 0:
            continue
        if n == 1 and (pinned < 0 or high < keys or low <= 0):  # else a protected page may have to leave
            slot = entering[0]
            k, first = page[slot], np.int32(_LAST)
            if k >= low and k < below:
                first = np.int32(_ordered(np.float32(score[t, slot])))
            page[slot], order[slot], copies[t, slot] = -1, _NOBODY, 0
            copies[t, _pour(order, page, first, k, slot, edge, source[t])] = 1
            moves[t] = _POURED
        else:
            for s in range(n_slots):
                at[page[s] + 1] = s
            for s in range(n_slots):
                x = score[t, s]
                rank[s] = _full_rank(x, page[s], low, high, pinned) if page[s] >= 0 else _GONE
            for i in range(n):
                queue[i] = rank[entering[i]]
                rank[entering[i]] = _GONE
            _sort(queue[:n])
            moves[t] = _carry(rank, queue, n, at, slots, to[t], source[t])
            for i in range(moves[t]):
                carried[i] = page[source[t, i]]
            for i in range(n):
                page[entering[i]], copies[t, entering[i]] = -1, 0
            for i in range(moves[t]):
                page[to[t, i]], copies[t, to[t, i]] = carried[i], 1
        left = False
        for i in range(n):
            left = left or page[entering[i]] < 0
        if left:
            free_count[t] = _list_empty(page, slots, free[t])


@njit(**_JIT)
def _list_empty(key, slots, free):
    """Into `free` the empty lines, the one of the lowest place last, which is taken first; how many."""
    n = 0
    for p in range(key.shape[0] - 1, -1, -1):
        if key[slots[p]] < 0:
            free[n] = slots[p]
            n += 1
    return n


@njit(**_JIT)
def move(begin, end, column, to, source, moves):
    """What a column [lanes, slots] says of the pages that `descend` has moved."""
    carried = np.empty(column.shape[1], column.dtype)
    for t in range(begin, end):
        lines = column[t]
        if moves[t] == _POURED:
            _pour_column(lines, to[t], source[t], carried)
            continue
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
def _line_up_all(score, key, low, high, entered, order):
    """`order`: of the stack's pages as their scores are, `_LAST` for those below `low` or from `high` on (which then go
    by age: it shows in no cache that has room for all of them), and `_NOBODY` elsewhere. Returns whether any page's
    score is NaN."""
    bad = np.int32(0)
    for s in range(key.shape[0]):
        x = np.float32(score[s])
        bad = np.int32(bad | np.int32((key[s] >= 0) & (x != x)))
        guarded = _ordered(x) if (key[s] >= low) & (key[s] < high) else np.int32(_LAST)
        order[s] = guarded if (key[s] >= 0) & (key[s] < entered) else _NOBODY
    return bad > 0


@njit(inline="always")
def _full_rank(x, key, low, high, pinned):
    guard = _PINNED if key == pinned else _GONE
    return guard | _rank(key < low or key >= high, np.float32(x), key + 1)


@njit(**_JIT)
def _pour(order, key, first, new, slot, edge, source):
    """The page `new` of order `first` goes from `slot` down a stack of pages `key`, all strips at once.

    `order` becomes a mask: -1 where the page of a place went on and another one stayed, else 0. `source`: for each
    strip, from which slot that page came that entered it. Returns the slot that was empty and is not any more.
    `edge`: of what comes down to each strip the order, the key, and the row, which is known only at the end: until
    then, that it came from above is written as -1.
    """
    _lowest_of_strips(order, key, edge)
    for i in range(_STRIPS):
        lowest, oldest = edge[i], edge[_KEYS + i]
        edge[i], edge[_KEYS + i], edge[_ROWS_OF + i] = first, new, -1
        if lowest < first or (lowest == first and oldest < new):
            first, new = lowest, oldest
    _pour_strips(order, key, edge)
    for i in range(_STRIPS):
        source[i] = slot
        slot = edge[_ROWS_OF + i] * _STRIPS + i if edge[_ROWS_OF + i] >= 0 else slot
    return slot


# Loops over a few rows of slots, written so that a processor does the places of a row at once: no more than three
# arrays that could overlap (hence one `edge`), numbers of 32 bits (rows, not slots), and every store made, whatever the
# condition (hence an exclusive or under a mask where one could swap).


@njit(**_JIT)
def _lowest_of_strips(order, key, edge):
    """Into `edge`: the order and the key of the lowest page of each strip."""
    for i in range(2 * _STRIPS):
        edge[i] = _LAST
    for begin in range(0, order.shape[0], _ROWS * _STRIPS):
        o, k = order[begin : begin + _ROWS * _STRIPS], key[begin : begin + _ROWS * _STRIPS]
        for i in range(_STRIPS):
            lowest, oldest = edge[i], edge[_KEYS + i]
            for s in range(i, i + _ROWS * _STRIPS, _STRIPS):
                lower = (o[s] < lowest) | ((o[s] == lowest) & (k[s] < oldest))
                oldest = k[s] if lower else oldest
                lowest = min(lowest, o[s])
            edge[i], edge[_KEYS + i] = lowest, oldest


@njit(**_JIT)
def _pour_strips(order, key, edge):
    """`_pour`, between what comes down to each strip and what leaves it."""
    for row in range(0, order.shape[0] // _STRIPS, _ROWS):
        begin = row * _STRIPS
        o, k = order[begin : begin + _ROWS * _STRIPS], key[begin : begin + _ROWS * _STRIPS]
        top = np.int32(row)
        for i in range(_STRIPS):
            lowest, page, its = edge[i], edge[_KEYS + i], edge[_ROWS_OF + i]
            for r in range(_ROWS):
                s = r * _STRIPS + i
                here, there = o[s], k[s]
                goes = (here < lowest) | ((here == lowest) & (there < page))
                o[s] = np.int32(0) - np.int32(goes)
                k[s] = page if goes else there
                page = there if goes else page
                its = np.int32(top + np.int32(r)) if goes else its
                lowest = min(lowest, here)
            edge[i], edge[_KEYS + i], edge[_ROWS_OF + i] = lowest, page, its


@njit(**_JIT)
def _pour_column(column, goes, source, edge):
    """What a column says goes the way of the pages; `goes`, `source` as `_pour` left them."""
    for i in range(_STRIPS):
        edge[i] = column[source[i]]
    for begin in range(0, column.shape[0], _ROWS * _STRIPS):
        x, g = column[begin : begin + _ROWS * _STRIPS], goes[begin : begin + _ROWS * _STRIPS]
        for i in range(_STRIPS):
            value = edge[i]
            for s in range(i, i + _ROWS * _STRIPS, _STRIPS):
                other = (x[s] ^ value) & g[s]
                x[s] ^= other
                value ^= other
            edge[i] = value


@njit(**_JIT)
def _carry(rank, queue, n, at, slots, to, source):
    """The first `n` ranks of `queue`, the highest first, go down a stack of pages of the ranks `rank`; `at`: slot by
    key + 1, `slots`: by place. Returns how many pages move.

    What a place lets go is mostly lower than all that is in the queue, as in a stack of pages by age.
    """
    begin, end, p, count = 0, n, 0, 0
    while begin < end:
        s = slots[p]
        r = rank[s]
        if r < queue[begin]:
            to[count], source[count] = s, at[_key(queue[begin])]
            count += 1
            begin += 1
            if r != _GONE:
                place = end if begin == end or queue[end - 1] > r else _first_below(queue, r, begin, end)
                if end - place <= place - begin:
                    for i in range(end, place, -1):
                        queue[i] = queue[i - 1]
                    end += 1
                else:  # there is room: one has left
                    begin -= 1
                    place -= 1
                    for i in range(begin, place):
                        queue[i] = queue[i + 1]
                queue[place] = r
        p += 1
    return count


@njit(inline="always")
def _first_below(queue, r, begin, end):
    """Where in `queue`, the highest first, the first one below `r` is."""
    while begin < end:
        middle = (begin + end) // 2
        if queue[middle] > r:
            begin = middle + 1
        else:
            end = middle
    return begin


@njit(inline="always")
def _key(rank):
    """The key + 1."""
    return np.int64(rank & _KEY)


@njit(**_JIT)
def _sort(x):
    """The highest first, in place. (NumPy's takes seconds to compile.)"""
    n = x.shape[0]
    for i in range(n // 2 - 1, -1, -1):
        _sink(x, n, i)
    for end in range(n - 1, 0, -1):
        x[0], x[end] = x[end], x[0]
        _sink(x, end, 0)


@njit(inline="always")
def _sink(heap, n, i):
    """Put `heap[i]` where it belongs below it: no number is below its parent, (i - 1) // 2."""
    x = heap[i]
    child = 2 * i + 1
    while child < n:
        if child + 1 < n and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= x:
            break
        heap[i] = heap[child]
        i, child = child, 2 * child + 1
    heap[i] = x


forget_older(descend)
