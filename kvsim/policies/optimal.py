"""The exact lossy optimum of each lane, from a linear programme: what no policy can beat, where a lane is small enough.

In the lossy regime a page holds a slot from its birth to one moment of release, for good. A slot at moment t, 0 .. T-1,
is held after step t and gains the page's full-row weight of step t + 1. To choose who holds what is a minimum-cost
flow: slots flow through time, along a page's chain of moments, back to the pool when the page is released, and from
the pool to a newborn page. The matrix is that of a network, so the corners of the linear programme are whole numbers.

The whole network has an arc per page and step. It is solved by column generation: a master programme knows a few
moments of release for each page; its dual prices say what a slot costs at each moment, and so for every page, in one
pass, the best moment of all. What is better than the master knows joins it, until nothing is. The prices then bound
the optimum from above: it is met, or an assertion fails.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvsim.cache.view import protected
from kvsim.errors import ConfigError
from kvsim.policies.parameters import whole
from kvsim.registry import policy

_BLOCK = 2**26  # weights in memory at once: beyond it the trace is read once more for the next lanes
_TIGHT = 1e-9  # what HiGHS may be off by, per page


@policy("optimal")
class Optimal:
    """The most attention mass that any lossy cache of this budget can keep, lane by lane. Exact; an oracle.

    Maximises the sum over decode steps of the full-row weights that are seen, by the engine's own rules: up to
    budget + 1 pages are seen, the prompt is cut at prefill, evicted pages are gone, pages that a sliding window leaves
    behind go for free, and pages that are protected (`sink`, `recent`, shares) or still being filled hold their slots.
    Protects nothing by itself. At layer granularity it keeps the most of the mean row. The value is exact to 1e-6 of
    itself; among several optimal plans the solver picks one.

    `limit`: pages times steps of a lane, beyond which it is refused; time grows faster than that.
    Needs HiGHS (`pip install "kvsim[optimal]"`).
    """

    family = "reference"
    evidence = "own"
    rows = "full"
    regimes = ("lossy",)
    recent: int | str = 0
    limit: int = 4_000_000

    def __post_init__(self):
        whole(self, "limit")

    def foresee(self, trace):
        _highs()  # a missing library is said before the work
        self._trace = trace

    def observe(self, view):
        if view.now == 0:
            self._until = self._plan(view)

    def score(self, view):
        key = np.maximum(view.key.reshape(len(self._until), -1), 0)
        return np.take_along_axis(self._until, key, 1).reshape(view.key.shape)

    def _plan(self, view) -> np.ndarray:
        """int64 [lanes, keys]: the step after which each page is gone."""
        (layers, heads), steps = view.shape, self._trace.steps
        stride = -(-(view.tokens + steps) // view.page_size)
        until = np.full((layers * heads, stride), steps + 1)
        budget = int(view.budget.max())
        if view.sizes is not None:
            raise ConfigError("optimal: pages of different sizes are a knapsack, not a flow", hint="use mass-oracle")
        if budget >= stride or not steps:
            return until
        if stride * steps > self.limit:
            raise ConfigError(
                f"optimal: lanes of {stride:,} pages times {steps:,} steps are above its limit of {self.limit:,}",
                hint=f'take a shorter trace or larger pages, or raise it: "optimal(limit={stride * steps})"',
            )
        head, tail = (int(x.max()) for x in protected(self, view.budget, view.page_size))
        block = max(1, _BLOCK // max(1, stride * steps))
        for begin in range(0, len(until), block):
            lanes = slice(begin, begin + block)
            gains, keys, filling, first = self._read(lanes, until.shape, view.page_size)
            free = keys - np.maximum(tail, filling)  # keys from here on are protected
            start = np.searchsorted(free, np.arange(stride), "right")  # the first moment at which each may be released
            start[:head] = steps
            for lane, gain in enumerate(gains, begin):
                gone = first[:, lane // heads]
                forced = np.maximum(np.minimum(head, keys) - gone, 0)
                forced += np.maximum(keys - np.maximum(np.maximum(free, head), gone), 0)
                if (forced > budget).any():
                    raise ConfigError(
                        f"optimal: {forced.max()} pages are protected or still being filled, the budget is {budget}",
                        hint="raise the budget, or lower sink or recent",
                    )
                until[lane], _ = hold(gain, start, budget - forced)
        return until

    def _read(self, lanes: slice, shape: tuple[int, int], page_size: int) -> tuple[np.ndarray, ...]:
        """The rows of some lanes, [lanes, steps, keys], and by moment: keys, 1 where the newest page is still being
        filled, and the first key that each layer can see [moments, layers]."""
        steps, keys, filling, first = self._trace.steps, [], [], []
        gains = np.empty((len(range(*lanes.indices(shape[0]))), steps, shape[1]), np.float32)
        for a in self._trace.accesses():
            if a.step:
                gains[:, a.step - 1] = a.row.reshape(shape)[lanes]
            if a.step < steps:
                keys.append(a.keys)
                filling.append(a.tokens % page_size > 0)
                first.append(a.first.copy())
        return gains, np.array(keys), np.array(filling, np.int64), np.array(first)


def hold(gains: np.ndarray, start: np.ndarray, room: np.ndarray) -> tuple[np.ndarray, float]:
    """When to release each page of a lane, and the most that can be gained.

    `gains` [moments, pages]: what holding a page at a moment is worth, nothing below zero; `start` [pages]: the first
    moment at which a slot has to be found for it (at or beyond the last: never); `room` [moments]: slots. Returns the
    first moment at which each page is not held (`start` of those that find no slot), and the sum of the gains.
    """
    moments, pages = gains.shape
    every, start = np.arange(pages), np.minimum(start, moments)
    worth = np.zeros((pages, moments + 1))  # of releasing a page at a moment
    np.cumsum(gains.T, axis=1, dtype=np.float64, out=worth[:, 1:])
    worth -= worth[every, start][:, None]
    worth[np.arange(moments + 1) < start[:, None]] = -np.inf
    master, known = _Master(start, room), np.zeros(worth.shape, bool)

    def offer(page, moment):
        new = (worth[page, moment] > 0) & ~known[page, moment]
        page, moment = page[new], moment[new]
        known[page, moment] = True
        master.add(page, moment, worth[page, moment])
        return len(page)

    offer(every, np.full(pages, moments))
    for exponent in range(moments.bit_length()):  # a few to begin with
        few = every[start + 2**exponent < moments]
        offer(few, start[few] + 2**exponent)
    left = np.empty_like(worth)
    while True:
        value, price, rent = master.solve()
        paid = np.append(0.0, np.cumsum(price))
        np.subtract(worth, paid, out=left)
        best = left.argmax(1)  # the earliest of equals
        profit = np.maximum(left[every, best] + paid[start], 0)
        better = np.flatnonzero(profit > rent + _TIGHT)
        if not offer(better, best[better]):
            break
    bound = float(room @ price + profit.sum())
    assert bound - value <= 1e-6 * max(1.0, value), f"{value} found, {bound} may be possible"
    until = start.copy()
    page, moment = master.chosen()
    until[page] = moment
    return until, float(worth[page, moment].sum())


class _Master:
    """The programme over the moments of release known so far.

    A column is a page held from `start` to a moment. Rows: one moment per page, and as many slots held at each moment
    as there is room, idle ones among them. The latter are written as differences between neighbouring moments, so that
    a column has three entries however long it holds.
    """

    def __init__(self, start: np.ndarray, room: np.ndarray):
        self._h = h = _highs().Highs()
        settings: dict[str, Any] = {"output_flag": False, "threads": 1, "solver": "simplex"}
        for name in ("primal_feasibility_tolerance", "dual_feasibility_tolerance"):
            settings[name] = _TIGHT
        for name, value in settings.items():
            h.setOptionValue(name, value)
        h.changeObjectiveSense(_highs().ObjSense.kMaximize)
        self._start, self._pages, self._moments = start, len(start), len(room)
        self._page, self._moment = np.empty(0, np.int64), np.empty(0, np.int64)
        change = np.diff(room, prepend=0)
        none = np.empty(0, np.int32)
        lower, upper = (np.append(np.full(self._pages, x), change) for x in (-np.inf, 1.0))
        h.addRows(len(lower), lower, upper, 0, np.zeros(len(lower), np.int32), none, none.astype(float))
        moments = np.arange(self._moments)
        self._columns(np.stack([moments, moments + 1], 1), np.zeros(self._moments))  # idle slots

    def add(self, page: np.ndarray, moment: np.ndarray, worth: np.ndarray) -> None:
        self._columns(np.stack([self._start[page], moment], 1), worth, page)
        self._page, self._moment = np.append(self._page, page), np.append(self._moment, moment)

    def solve(self) -> tuple[float, np.ndarray, np.ndarray]:
        """The value, the price of a slot at each moment, and of each page's one choice."""
        h = self._h
        h.run()
        if h.getModelStatus() != _highs().HighsModelStatus.kOptimal:  # a warm start that went astray
            h.clearSolver()
            h.run()
        assert h.getModelStatus() == _highs().HighsModelStatus.kOptimal, h.getModelStatus()
        dual = np.array(h.getSolution().row_dual)
        change = dual[self._pages :]
        price = change - np.append(change[1:], 0.0)
        return h.getInfo().objective_function_value, np.maximum(price, 0), np.maximum(dual[: self._pages], 0)

    def chosen(self) -> tuple[np.ndarray, np.ndarray]:
        """Pages that hold a slot, and the moments of their release."""
        share = np.array(self._h.getSolution().col_value)[self._moments :]
        assert np.abs(share - np.rint(share)).max(initial=0) < 1e-6, "a corner of a network is whole"
        return self._page[share > 0.5], self._moment[share > 0.5]

    def _columns(self, ends: np.ndarray, worth: np.ndarray, page: np.ndarray | None = None) -> None:
        """Slots held from the first of the moments `ends` [n, 2] to the second."""
        n = len(ends)
        row, value = ends + self._pages, np.tile([1.0, -1.0], (n, 1))
        within = np.stack([np.ones(n, bool), ends[:, 1] < self._moments], 1)
        if page is not None:
            row, value = np.column_stack([page, row]), np.column_stack([np.ones(n), value])
            within = np.column_stack([np.ones(n, bool), within])
        count = within.sum(1)
        begin = (np.cumsum(count) - count).astype(np.int32)
        entries = row[within].astype(np.int32), value[within]
        zero, free = np.zeros(n), np.full(n, np.inf)
        self._h.addCols(n, worth, zero, free, len(entries[0]), begin, *entries)


def _highs() -> Any:
    try:
        import highspy
    except ModuleNotFoundError:
        raise ConfigError(
            'policy "optimal" needs highspy, which is not installed', hint='pip install "kvsim[optimal]"'
        ) from None
    return highspy
