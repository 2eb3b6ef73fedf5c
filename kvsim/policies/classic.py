"""Policies that look at positions, ages and counts: what every cache knows.

The array [layers, kv_heads, slots] that `score` returns is an order: the lowest leaves. Evidence tags:
code (read in published code), abs (abstract only), 3rd (a third party), mem (from memory), derived, own.
"""

from __future__ import annotations

import numpy as np

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

    def score(self, view):
        lanes = np.arange(view.key[..., :1].size, dtype=np.uint32).reshape(view.key.shape[:2] + (1,))
        x = view.key.astype(np.uint32) * np.uint32(0x9E3779B1) + lanes * np.uint32(0x85EBCA77)
        x ^= np.uint32((view.now * 0xC2B2AE3D + view.seed * 0x27D4EB2F) & 0xFFFFFFFF)
        for multiplier in (0x7FEB352D, 0x846CA68B):  # two rounds of an xor-shift-multiply mixer
            x ^= x >> np.uint32(16)
            x *= np.uint32(multiplier)
        x ^= x >> np.uint32(16)
        return (x >> np.uint32(8)).astype(np.float32)


@policy("fifo")
class Fifo:
    """First in, first out: with `sink = 0` in the lossy regime, the plain sliding window."""

    family = "classic"

    def score(self, view):
        return view.arrived


@policy("lru")
class Lru:
    """Least recently used; "used" is the run's predicate (`--use`), since dense attention touches every page."""

    family = "classic"

    def score(self, view):
        return view.last


@policy("lfu")
class Lfu:
    """Least frequently used since it arrived; the count is lost on eviction (not perfect LFU). Prompt rows count.

    Among equal counts the earlier arrival leaves: the score is the count and a fraction for the arrival.
    """

    family = "classic"
    columns = {"count": np.int32}

    def observe(self, view):
        count = view["count"]
        if view.now == 0:
            count[:] = view.uses
        else:
            count[:] = np.where(view.arrived == view.now, 0, count) + (view.last == view.now)

    def score(self, view):
        return view["count"] + view.arrived / (view.now + 1)


@policy("streaming-llm")
class StreamingLlm:
    """The first `sink` tokens and the newest ones. arXiv 2309.17453; streaming_llm/kv_cache.py.

    Departure: the paper re-assigns positions inside the cache (keys rotated at use); open-loop rows keep their
    own positions. `sink` defaults to the paper's 4.
    """

    family = "window"
    evidence = "code"
    sink: int = 4

    def score(self, view):
        return view.key
