"""Policies that look at positions, ages and counts: what every cache knows.

The array [layers, kv_heads, slots] that `score` returns is an order: the lowest leaves. Evidence tags:
code (read in published code), abs (abstract only), 3rd (a third party), mem (from memory), derived, own.
"""

from __future__ import annotations

import numpy as np

from kvsim.cache.view import protected
from kvsim.policies.parameters import choice, number, whole
from kvsim.registry import policy


@policy("full")
class Full:
    """Keeps everything: the reference that every loss is measured from."""

    family = "reference"
    bounded = False
    recent = 0

    def score(self, view):
        return view.key


@policy("random")
class Random:
    """A victim drawn anew at every step, from a hash of seed, lane, key and step.

    A hash instead of one generator per run makes the draw independent of how many were made
    before, so that caches of different size agree on what they both hold.
    """

    family = "classic"
    budget_free = True

    def score(self, view):
        return uniform(view.key, view.now, view.seed)


def uniform(key: np.ndarray, step: int, seed: int) -> np.ndarray:
    """Multiples of 2**-24 from 0 to below 1 for keys [layers, kv_heads, n]: a hash of seed, lane, key and step.

    The multipliers of the four are xxHash's 32-bit primes 1 to 4 (Collet), those of the mixer "lowbias32"'s (Wellons,
    hash-prospector), which shifts by 15 in the middle where this shifts by 16.
    """
    lanes = np.arange(key[..., :1].size, dtype=np.uint32).reshape(key.shape[:2] + (1,))
    x = key.astype(np.uint32) * np.uint32(0x9E3779B1) + lanes * np.uint32(0x85EBCA77)
    x ^= np.uint32((step * 0xC2B2AE3D + seed * 0x27D4EB2F) & 0xFFFFFFFF)
    for multiplier in (0x7FEB352D, 0x846CA68B):  # two rounds of an xor-shift-multiply mixer
        x ^= x >> np.uint32(16)
        x *= np.uint32(multiplier)
    x ^= x >> np.uint32(16)
    return (x >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


@policy("fifo")
class Fifo:
    """First in, first out: with `sink = 0` in the lossy regime, the plain sliding window.

    Belady, IBM Systems Journal 5 (1966).
    """

    family = "classic"
    budget_free = True

    def score(self, view):
        return view.arrived


@policy("lru")
class Lru:
    """Least recently used; "used" is the run's predicate (`--use`), since dense attention touches every page.

    Mattson et al., IBM Systems Journal 9 (1970), whose stacks give the hits of every budget in one pass.
    """

    family = "classic"
    budget_free = True

    def score(self, view):
        return view.last


@policy("lfu")
class Lfu:
    """Least frequently used since it arrived; the count is lost on eviction (not perfect LFU). Prompt rows count.

    Mattson et al., IBM Systems Journal 9 (1970), study the perfect one.

    Among equal counts the earlier arrival leaves, with `tie="use"` the one used longest ago (so libCacheSim's LFU.c).
    What joins in this step leaves last: a newcomer is admitted.
    """

    family = "classic"
    budget_free = True
    columns = {"count": np.int32}
    tie: str = "arrival"

    def __post_init__(self):
        choice(self, "tie", "arrival", "use")

    def observe(self, view):
        count = view["count"]
        if view.now == 0:
            count[:] = view.uses
        else:
            count[:] = np.where(view.arrived == view.now, 0, count) + (view.last == view.now)

    def score(self, view):
        since = view.arrived if self.tie == "arrival" else view.last
        return np.where(_joined(view), np.inf, _exact(view["count"], since, view.now))


def _exact(first, second, now):
    """float32, in the order of two whole numbers (int32, from 0), of which the second is at most `now`.

    Up to 2**24 they are first * (now + 1) + second; larger ones are the bits of a float, whose order they have.
    """
    most = int(first.max(initial=0)) * (now + 1) + now
    if most <= _HUGE:
        both = first * np.int32(now + 1) + second
    else:
        pairs = first.astype(np.int64) * (now + 1) + second
        both = np.unique(pairs, return_inverse=True)[1].reshape(pairs.shape).astype(np.int32)
    return both.astype(np.float32) if most <= 2**24 else (both + _TINY).view(np.float32)


_TINY = np.finfo(np.float32).tiny.view(np.int32)  # bits of the least normal number, and what is left above them
_HUGE = int(np.finfo(np.float32).max.view(np.int32) - _TINY)


def _joined(view):
    """Pages that joined the GPU in this step; none at prefill, which all of them join."""
    return (view.arrived == view.now) & (view.now > 0)


@policy("sieve")
class Sieve:
    """A FIFO queue with second chances in place: a hit sets a bit and moves nothing. Zhang et al., NSDI 2024; Sieve.c.

    A hand goes from the oldest page to the newest and round again, clears the bits it finds and evicts the first page
    without one; it rests at that page's newer neighbour, or at the oldest page if there is none. Survivors keep their
    place, a page that was fetched comes back as the newest. So the k victims of a moment are the k lowest by (bit,
    passed by the hand, arrival), and where the hand rests is read off the survivors a step later.

    Departures: a step is one moment, in which hits set bits, then victims leave, then newcomers (by key) join; a
    newcomer leaves at once only when nothing older is left. The prompt arrives as one moment, and its rows are no
    hits. The hand passes protected pages, and a page still being filled, without evicting them. It cannot tell a page
    that a sliding window left behind, and that was next to leave, from one it has evicted.
    """

    family = "classic"
    evidence = "code"
    columns = {"visited": np.bool_, "passed": np.bool_, "stop": np.int64, "rank": np.float32}

    def observe(self, view):
        visited, passed = view["visited"], view["passed"]
        stayed = view.resident & (view.arrived < view.now)
        self._move_hand(view, stayed)
        visited &= stayed
        passed &= stayed  # who has left starts anew
        visited |= stayed & (view.last == view.now)
        self._line_up(view, stayed)

    def score(self, view):
        return view["rank"]

    def _move_hand(self, view, stayed):
        """Take note of what was evicted since the last step: the last victim is `stop` of the first survivor."""
        visited, passed, turn = view["visited"], view["passed"], _turn(view)
        victim = np.where(stayed, view["stop"], _AWAY).min(-1, keepdims=True)
        second_lap = victim >= _VISITED
        swept = turn < victim - second_lap * _VISITED
        visited &= ~(swept | second_lap)
        old = stayed & (view.arrived < view.now - 1)  # without those that joined after the hand had moved
        ahead = (old & ~passed & ~swept).any(-1, keepdims=True)
        passed[:] = np.where(ahead, passed | swept, passed & swept)  # with none left ahead, it has gone round
        passed &= (old & ~passed).any(-1, keepdims=True)  # no newer neighbour: back to the oldest

    def _line_up(self, view, stayed):
        """`rank`: the order in which pages would leave now. `stop`: turn and bit of the one that leaves just before."""
        head, tail = protected(self, view.budget, view.page_size)
        kept = (view.key < head) | (view.key >= view.keys - tail)
        kept |= (view.key == view.newest) & (view.page_size > 1)
        new, away = view.arrived == view.now, ~view.resident
        line = _turn(view) + view["visited"] * _VISITED + new * _NEW + kept * _KEPT + away * _AWAY
        order = np.argsort(line, axis=-1)
        line = np.take_along_axis(line, order, -1)
        before = np.full_like(line, -1)
        before[..., 1:] = np.where(line[..., :-1] < _NEW, line[..., :-1], -1)
        np.put_along_axis(view["stop"], order, np.maximum.accumulate(before, axis=-1), -1)
        ranks = np.arange(line.shape[-1], dtype=np.float32)
        np.put_along_axis(view["rank"], order, np.broadcast_to(ranks, line.shape), -1)


# Where SIEVE's hand comes to a page, as one integer: arrival (step, then key), and above it what makes it come later.
_PASSED, _VISITED, _NEW, _KEPT, _AWAY = (np.int64(1 << bit) for bit in range(56, 61))


def _turn(view):
    return (view.arrived.astype(np.int64) << 31) + view.key + view["passed"] * _PASSED


@policy("size")
class Size:
    """The largest page leaves, among equals the one that arrived first: FIFO where all pages are of one size.

    libCacheSim's Size.c, which leaves ties to its heap. What joins in this step leaves last: a newcomer is admitted.
    """

    family = "classic"
    evidence = "code"

    def score(self, view):
        order = np.lexsort((view.key, view.arrived, -view.size, _joined(view)), axis=-1)
        rank = np.empty(order.shape, np.float32)
        np.put_along_axis(rank, order, np.broadcast_to(np.arange(order.shape[-1], dtype=np.float32), order.shape), -1)
        return rank


@policy("adaptive-lru")
class AdaptiveLru:
    """LRU in which a large page counts as used `penalty` steps earlier than it was: the baseline of Cold-RL's code.

    ayushgupta4897/DRL-Cache: last - 1000 [size > 50 KB]; it is not ARC. `large`: pages, so 50 KB where a page is 1 KB.
    What joins in this step leaves last: a newcomer is admitted. Plain LRU where all pages are of one size.

    Departures: time is in steps; the source counts seconds.
    """

    family = "classic"
    evidence = "code"
    penalty: int = 1000
    large: float = 50.0

    def __post_init__(self):
        whole(self, "penalty")
        number(self, "large")

    def score(self, view):
        return np.where(_joined(view), np.inf, view.last - self.penalty * (view.size > self.large))


@policy("streaming-llm")
class StreamingLlm:
    """The first `sink` tokens and the newest ones. arXiv 2309.17453; streaming_llm/kv_cache.py.

    Departure: the paper re-assigns positions inside the cache (keys rotated at use); open-loop rows keep their
    own positions. `sink` defaults to the paper's 4.
    """

    family = "window"
    budget_free = True
    evidence = "code"
    sink: int = 4

    def score(self, view):
        return view.key
