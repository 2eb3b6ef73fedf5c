"""What an oracle is told: the whole of what its cache will see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvsim.cache.demand import Use
from kvsim.trace.access import Access


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

    def uses(self) -> tuple[int, int, np.ndarray, np.ndarray]:
        """Lanes, stride (keys per lane), and all uses in decode steps in one pass, sorted by address, then step:
        `address` (int64: lane * stride + key) and `step` (int32)."""
        lanes = stride = 0
        addresses, steps = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
        for a in self.accesses():
            if a.prefill:
                lanes, stride = int(np.prod(a.row.shape[:2])), a.row.shape[2]
                continue
            visible, first = (np.repeat(x, lanes // len(x)) for x in (a.visible, a.first))
            lane, key = np.nonzero(self.use.used(a.peak.reshape(lanes, stride), a.keys, visible, first))
            addresses.append(lane * stride + key)
            steps.append(np.full(len(lane), a.step, np.int32))
        address, step = np.concatenate(addresses), np.concatenate(steps)
        order = np.argsort(address, kind="stable")  # steps stay ascending within an address
        return lanes, stride, address[order], step[order]
