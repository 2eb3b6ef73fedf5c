"""What one access found and moved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Move(NamedTuple):
    """Pages that moved in one step: `action` is "load" (waited for), "prefetch", "store" or "drop" (they leave the GPU,
    the tier has a copy); `tier` is 1 for the host, 2 for the SSD; `layer` (of the table) and `page`: int arrays."""

    action: str
    tier: int
    layer: np.ndarray
    page: np.ndarray


@dataclass(slots=True)
class Outcome:
    """What one access found and moved.

    Per row lane [row_lanes]: `total`, `hit`, `attended` (float32): weight of the full row, found on the GPU, and
    read by attention; `used`, `found` (int64): used or needed pages, and those of them on the GPU. Per lane of the
    table, int64 [lanes]: `held`, pages on the GPU while attention ran (new and fetched ones among them, and those
    that a read set hides; the whole prompt at prefill); `resident`, pages on the GPU afterwards. Page counts by
    layer of the table, int64: `read` and `rebuilt` (computed again) [layers]; `fetched`, `fetched_runs` (from the tier,
    waited for; runs are neighbouring pages), `prefetched`, `prefetched_runs` (from the tier, for later steps) and
    `spilled` (written to the tier) [3, layers]. `awaits`: bool [layers], layers that wait for prefetches still on their
    way. `dropped`: pages that are gone. `moved`: every page that moved, where the cache was asked to record it.
    """

    total: np.ndarray
    hit: np.ndarray
    attended: np.ndarray
    used: np.ndarray
    found: np.ndarray
    held: np.ndarray
    resident: np.ndarray
    read: np.ndarray
    rebuilt: np.ndarray
    awaits: np.ndarray
    fetched: np.ndarray
    fetched_runs: np.ndarray
    prefetched: np.ndarray
    prefetched_runs: np.ndarray
    spilled: np.ndarray
    dropped: int = 0
    moved: list[Move] = field(default_factory=list)

    @classmethod
    def blank(cls, rows: int, layers: int, moved: tuple[np.ndarray, ...] | None = None) -> Outcome:
        """Nothing found, nothing moved: `rows` row lanes, `layers` layers of the table. `moved`: what `no_moves` gave,
        where steps may share it."""
        total, hit, attended = np.empty(rows, np.float32), np.empty(rows, np.float32), np.empty(rows, np.float32)
        used, found = np.empty(rows, np.int64), np.empty(rows, np.int64)
        read, moves = np.zeros(layers, np.int64), moved or no_moves(layers)
        return cls(total, hit, attended, used, found, _NONE, _NONE, read, *moves)  # type: ignore[arg-type]


_NONE = np.empty(0, np.int64)


def no_moves(layers: int) -> tuple[np.ndarray, ...]:
    """`rebuilt`, `awaits`, `fetched` to `spilled`: all zero."""
    return np.zeros(layers, np.int64), np.zeros(layers, bool), *np.zeros((5, 3, layers), np.int64)
