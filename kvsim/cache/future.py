"""What an oracle is told: the whole of what its cache will see."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import IO, Any

import numpy as np

from kvsim.cache.demand import Use
from kvsim.trace.access import Access

NEVER = np.int32(2**24)  # beyond any step, and exact in float32
_SPOOL = 2**24


@dataclass(frozen=True)
class Future:
    """One request in the lanes and pages of its cache, full rows, and the predicate by which a page is used.

    `request`: anything with `accesses()` and `output_tokens`. `use`: the run's predicate; in the offload regime the
    demand model.
    """

    request: Any
    use: Use

    @property
    def steps(self) -> int:
        """Decode steps."""
        return self.request.output_tokens

    def accesses(self) -> Iterator[Access]:
        """Prefill, then one access per decode step; their buffers are reused."""
        return self.request.accesses()

    def uses(self) -> Uses:
        """Which pages are used in which decode step, and when next; in one pass over the rows."""
        uses = Uses()
        for a in self.accesses():
            if a.prefill:
                uses.begin(int(np.prod(a.row.shape[:2])), a.row.shape[2])
                continue
            visible, first = (np.repeat(x, uses.lanes // len(x)) for x in (a.visible, a.first))
            peak = a.peak.reshape(uses.lanes, uses.stride)
            lane, key = np.nonzero(self.use.used(peak, a.keys, visible, first))
            uses.append(lane * uses.stride + key)
        uses.link()
        return uses


class Uses:
    """The uses of a request's pages in its decode steps, by `address`: lane * stride + key.

    Kept in memory as far as `_SPOOL` bytes, beyond that in a temporary file, because a long request has
    gigabytes of them. `first`: int32 [lanes * stride], the step in which each page is used first, or `NEVER`.
    """

    def begin(self, lanes: int, stride: int) -> None:
        self.lanes, self.stride = lanes, stride
        self._dtype = np.dtype(np.int32 if lanes * stride < 2**31 else np.int64)
        self.first = np.full(lanes * stride, NEVER, np.int32)
        self._ends = [0, 0]  # uses up to and including each step; nothing is used in step 0
        self._address, self._next = files = SpooledTemporaryFile(_SPOOL), SpooledTemporaryFile(_SPOOL)  # noqa: SIM115
        for file in files:
            weakref.finalize(self, file.close)

    def append(self, address: np.ndarray) -> None:
        """The addresses, each once, that the next step uses."""
        self._address.write(address.astype(self._dtype).tobytes())
        self._ends.append(self._ends[-1] + len(address))

    def link(self) -> None:
        """Find each use's next one, from the last step to the first: it is the one that was seen before it."""
        for step in range(len(self._ends) - 2, 0, -1):
            address = self._read(self._address, self._dtype, step)
            self._next.seek(4 * self._ends[step])
            self._next.write(self.first[address].tobytes())
            self.first[address] = step

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Addresses that `step` uses, and the step in which each is used next (int32), or `NEVER`."""
        return self._read(self._address, self._dtype, step), self._read(self._next, np.dtype(np.int32), step)

    def _read(self, file: IO[bytes], dtype: np.dtype, step: int) -> np.ndarray:
        begin, end = self._ends[step : step + 2]
        file.seek(begin * dtype.itemsize)
        return np.frombuffer(file.read((end - begin) * dtype.itemsize), dtype)
