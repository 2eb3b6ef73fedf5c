"""The table of pages: one line per page, columns of shape [lanes, slots].

A slot is one page's line and keeps it wherever its bytes are; `copies` has one bit per tier (0 GPU, 1
host, 2 SSD), because KV pages are written once: a page that was fetched back still has a clean copy below.
Empty lines have key -1. In the lossy regime a freed line takes the next newcomer, so the table is as wide as
the budget, not as the sequence.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvsim.cache import kernels

GPU, HOST, SSD = 1, 2, 4
COLUMNS = ("key", "copies", "born", "arrived", "last", "uses", "mass", "weights")


class Table:
    """Columns [lanes, slots]; `private` holds the columns a policy asked for, in the same shape.

    A private column of a subarray type, such as ("u8", 7), has that axis last.
    """

    def __init__(self, lanes: int, slots: int, private: dict[str, Any]):
        self.lanes, self.slots = lanes, slots
        self.columns = np.zeros((7, lanes, slots), np.int32)
        self.key, self.born, self.arrived = self.columns[:3]  # born, and arrived on the GPU: step
        self.last, self.uses = self.columns[3:5]  # step of the last use
        self.mass, self.weights = self.columns[5:].view(np.float32)  # sum of weights; those of this step
        self.key[:] = -1
        self.copies = np.zeros((lanes, slots), np.uint8)  # one bit per tier
        self.private = {name: np.zeros((lanes, slots), dtype) for name, dtype in private.items()}
        # a stack of free slots per lane, lowest slot on top: a first filling is in key order
        self.free = np.tile(np.arange(slots - 1, -1, -1, dtype=np.int32), (lanes, 1))
        self.free_count = np.full(lanes, slots, np.int64)
        self.lines = self.columns, self.copies, self.free, self.free_count  # what it takes to fill a line
        self._lanes, self._slot_of = np.arange(lanes), np.empty(lanes, np.int64)

    def fill(self, keys: int) -> None:
        """The first `keys` pages into slots 0 .. keys-1 of every lane, in an empty table."""
        self.key[:, :keys] = np.arange(keys, dtype=np.int32)
        self.copies[:, :keys] = GPU
        self.free_count -= keys

    def insert(self, key: int, now: int) -> None:
        """A new page in every lane; its private columns start at zero."""
        kernels.insert(*self.lines, key, now, self._slot_of)
        for column in self.private.values():
            column[self._lanes, self._slot_of] = 0

    def land(self, missing: np.ndarray, now: int) -> None:
        """Pages of the mask [lanes, slots] have been fetched."""
        kernels.land(missing, self.copies, self.arrived, now)

    def release(self, victims: np.ndarray, counts: np.ndarray) -> None:
        """Free the first `counts[lane]` slots listed in `victims` [lanes, n]."""
        kernels.release(self.key, self.copies, self.free, self.free_count, victims, counts)

    def release_where(self, gone: np.ndarray) -> None:
        """Free the lines of the mask [lanes, slots]."""
        kernels.release_where(gone, self.key, self.copies, self.free, self.free_count)

    def filled(self) -> np.ndarray:
        """int64 [lanes]: pages with a line."""
        return self.slots - self.free_count

    def resident(self, bit: int = GPU) -> np.ndarray:
        """int64 [lanes]: pages with a copy in the tier."""
        return kernels.count_copies(self.copies, bit)

    def resized(self, slots: int) -> Table:
        """The same pages, in key order, in a table of `slots` lines."""
        new = Table(self.lanes, slots, {name: (c.dtype, c.shape[2:]) for name, c in self.private.items()})
        counts = self.filled()
        order, ascending = kernels.filled_lines(self.key, int(counts.max()))
        if not ascending:
            key = np.take_along_axis(self.key, order, 1)
            key[np.arange(order.shape[1]) >= counts[:, None]] = np.iinfo(np.int32).max
            order = np.take_along_axis(order, np.argsort(key, axis=1, kind="stable"), 1)
        kernels.copy_lines(order, counts, self.columns, self.copies, new.columns, new.copies)
        lines = (order + self.slots * self._lanes[:, None]).ravel()
        for name, column in self.private.items():
            moved = column.reshape(-1, *column.shape[2:])[lines]
            new.private[name][:, : order.shape[1]] = moved.reshape(*order.shape, *column.shape[2:])
        new.free_count -= counts
        return new

    def audit(self) -> None:
        """Recount everything; an assertion here is a mistake of ours."""
        filled = self.key >= 0
        assert (filled == (self.copies > 0)).all(), "a page without a copy, or a copy without a page"
        assert (np.count_nonzero(filled, axis=1) + self.free_count == self.slots).all(), "slots lost"
        for lane in range(self.lanes):
            keys = self.key[lane][filled[lane]]
            assert len(np.unique(keys)) == len(keys), "a page twice in a lane"
