"""References that read the whole trace. `foresee` is the only door to the future, and makes a policy an oracle.

Neither is a bound on lossy recall: the step ceiling is. In the offload regime, on unit pages,
Belady is a true bound on misses.
"""

from __future__ import annotations

import numpy as np

from kvsim.registry import policy

_FIXED = 2.0**40  # weights as fixed-point integers: sums that are added and taken away again cancel exactly


@policy("belady")
class Belady:
    """Evicts what is used again last (never: first; among equals the older). Belady 1966.

    "Used" is the run's predicate on full rows, in the offload regime the demand model. Protects nothing.
    """

    family = "reference"
    budget_free = True
    rows = "full"
    recent: int | str = 0

    def foresee(self, trace):
        self._uses = trace.uses()
        self._next = self._uses.first.copy()  # of every page after this step
        self._lane = (np.arange(self._uses.lanes) * self._uses.stride)[:, None]

    def observe(self, view):
        address, following = self._uses.at(view.now)
        self._next[address] = following

    def score(self, view):
        key = view.key.reshape(len(self._lane), -1)
        return -self._next[self._lane + np.maximum(key, 0)].reshape(view.key.shape)


@policy("mass-oracle")
class MassOracle:
    """Evicts what will gather least attention from now on (sum of the remaining full rows). Protects nothing.

    Greedy: it ignores how long a page occupies its place, so it may be beaten.
    """

    family = "reference"
    budget_free = True
    rows = "full"
    recent: int | str = 0
    columns = {"spent": np.int64}

    def foresee(self, trace):
        total = np.empty((0, 0), np.int64)
        for a in trace.accesses():
            if a.prefill:
                total = np.zeros((a.row.shape[0] * a.row.shape[1], a.row.shape[2]), np.int64)
            else:
                total += _fixed(a.row.reshape(total.shape))
        self._total = total

    def observe(self, view):
        if view.now:
            view["spent"][:] += _fixed(view.weights)

    def score(self, view):
        key = np.maximum(view.key.reshape(len(self._total), -1), 0)
        left = np.take_along_axis(self._total, key, 1).reshape(view.key.shape) - view["spent"]
        return left / _FIXED


def _fixed(weights: np.ndarray) -> np.ndarray:
    return np.rint(weights.astype(np.float64) * _FIXED).astype(np.int64)
