"""The lanes of one cache: its table, what the policy sees of it, and how what its hooks answer becomes columns.

A lane is where one decision is made: a KV head, a layer, or the whole model, as the policy's granularity says. The
rows of attention have lanes of their own (every layer and KV head of the trace's view); several of them may share
a table lane.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kvsim import threads
from kvsim.cache import fused, hooks, kernels, sized
from kvsim.cache.table import GPU, Table
from kvsim.cache.view import Facts, View, locked, protected, single
from kvsim.trace.access import Access


class Lanes:
    """Table, view and policy of one cache; arguments as in `Cache`."""

    def __init__(
        self,
        row_lanes: tuple[int, int],
        stride: int,
        policy: Any,
        budget: int,
        *,
        page_size: int = 1,
        seed: int = 0,
        rates: Mapping[str, float] | None = None,
        facts: Facts | None = None,
    ):
        layers, heads = row_lanes
        self.shape = {"head": (layers, heads), "layer": (layers, 1), "token": (1, 1)}[policy.granularity]
        self.lanes, self.rows = self.shape[0] * self.shape[1], layers * heads
        self.row_lanes, self.stride, self.page_size, self.policy = row_lanes, stride, page_size, policy
        self.policy_seconds = 0.0  # wall time spent in hooks; a score that is compiled into the choice is not among it
        self.sizes = sized.sizes_of(facts, stride)  # None: every page is one
        self.total = stride if self.sizes is None else math.ceil(self.sizes.sum(dtype=np.float64))
        self.budget = np.full(self.lanes, min(budget, self.total) if policy.bounded else self.total, np.int64)
        self.widest = int(self.budget[0])  # of all budgets
        self._protected: tuple[np.ndarray, np.ndarray] | None = None
        self.fused: fused.Fused | None = None  # the policy's hooks as compiled loops, where that pays
        self.table = Table(self.lanes, 0, {})
        self.view = View(self.table, self.shape, page_size, seed, rates, facts)
        self.view.budget = locked(self.budget.reshape(*self.shape, 1))  # follows every change of ours
        self.run_budget = locked(self.view.budget.copy())  # what `split` shares out
        self.view.sizes = self.sizes

    # -- the table's size --------------------------------------------------------------------------------------

    def grow(self) -> None:
        """Lines for a policy that outgrows its budget (a read set, a prompt not yet cut, a larger split)."""
        if np.count_nonzero(self.table.free_count) < self.lanes:
            self.resize(min(self.stride, 2 * self.table.slots) + 1)

    def shrink(self) -> None:
        """Once a long prompt is cut, the table is as wide as the budget again, and what comes until the next cut."""
        coming = self.stride - self.view.keys if self.policy.once else self.policy.lag  # pages, before the next cut
        needed = self.widest + coming + 1
        if 2 * needed < self.table.slots:
            needed = max(needed, int(self.table.filled().max()) + coming + 1)
        if 2 * needed < self.table.slots:
            self.resize(needed)

    def resize(self, slots: int) -> None:
        self.table = self.table.resized(slots)
        self.view.bind(self.table)

    def each(self, loop: Callable[..., None], *arguments: Any) -> None:
        """A compiled loop over all lanes."""
        threads.each(loop, self.lanes, self.table.slots, *arguments)

    # -- asking the hooks --------------------------------------------------------------------------------------

    def call(self, method: str, *arguments: Any, of: Any = None, optional: bool = False) -> Any:
        """What a hook of the policy (or of `of`) answers; None for an optional one that is not defined."""
        begin = time.perf_counter()
        answer = hooks.call(of or self.policy, method, *arguments, now=self.view.now, optional=optional)
        self.policy_seconds += time.perf_counter() - begin
        return answer

    def broadcast(self, value: Any, what: str, dtype: Any, slots: int | None = None, of: Any = None) -> np.ndarray:
        """What a hook returned, as [lanes, slots]."""
        shape = (*self.shape, self.table.slots if slots is None else slots)
        return hooks.array(of or self.policy, what, value, shape, dtype).reshape(self.lanes, -1)

    def shown(self, mask: np.ndarray) -> np.ndarray:
        """A mask [lanes, slots] in the shape that hooks get, read-only."""
        return locked(mask.reshape(*self.shape, self.table.slots))

    def observe(self) -> None:
        """The policy looks at what attention did."""
        if self.fused and self.fused.observes and self.view.now:
            begin = time.perf_counter()
            self.fused.ask(self.view, "observe")
            self.each(self.fused.observes, *self.fused.arguments(self.table, self.view))
            self.policy_seconds += time.perf_counter() - begin
        elif callable(getattr(self.policy, "observe", None)):
            self.call("observe", self.view)
            self._protected = None  # a policy may make up its mind about what it protects

    # -- choosing victims --------------------------------------------------------------------------------------

    def score(self) -> np.ndarray:
        return self.broadcast(single(self.call("score", self.view)), "scores", np.float32)

    def protected(self) -> tuple[np.ndarray, np.ndarray]:
        """Pages per lane at the head and at the tail that leave last, and that a read set holds."""
        if self._protected is None:
            self._protected = protected(self.policy, self.budget, self.page_size)
        return self._protected

    def occupied(self, bit: int = GPU) -> np.ndarray:
        """[lanes]: what of the tier's capacity is taken: pages, or the sum of their sizes."""
        if self.sizes is None:
            return self.table.resident(bit)
        return sized.load(self.table.key, self.table.copies, bit, self.sizes)

    def choose(
        self, a: Access, bit: int, excess, head, tail, score=None, capacity=None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Slots [lanes, n] and how many per lane: the lowest-scored copies in the tier `bit`, protected ones last.

        `bit` 0: in any tier; `score`: the policy's, if None; `capacity` of the tier by lane, the budget if None.
        """
        t = self.table
        pinned = a.keys - 1 if a.tokens % self.page_size else -1  # a page that is still being filled
        most = int(excess.max()) if self.sizes is None else t.slots
        out, counts = np.empty((self.lanes, most), np.int32), np.empty(self.lanes, np.int64)
        limits = head, a.keys - tail, pinned, out, counts
        if score is None and self.sizes is None and self.fused and self.fused.victims and a.step:
            self.fused.ask(self.view, "score")
            self.each(self.fused.victims, t.copies, bit, excess, *limits, *self.fused.arguments(t, self.view))
        else:
            score = self.score() if score is None else score
            if self.sizes is None:
                self.each(kernels.victims, score, t.key, t.copies, bit, excess, *limits)
            else:
                limit = self.budget if capacity is None else capacity
                sized.victims(score, t.key, t.copies, bit or GPU, excess, limit, self.sizes, *limits)
        self.check(a, counts)
        return out, counts

    def check(self, a: Access, counts: np.ndarray) -> None:
        """Raises PolicyError where a lane's count of victims says that a score is NaN."""
        if counts.min() < 0:
            lane = tuple(int(i) for i in np.unravel_index(counts.argmin(), self.shape))
            wrong = f"returned more than float32 holds, or NaN at step {a.step}, lane {lane}"
            hint = "every resident page needs a number, and scores are float32: up to 3.4e38"
            raise hooks.broken(self.policy, wrong, "score", hint)

    # -- between lanes, layers and row lanes --------------------------------------------------------------------

    def mask(self, chosen: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The first `counts[lane]` slots listed in `chosen` [lanes, n], as a mask [lanes, slots]."""
        mask = np.zeros(self.table.key.shape, bool)
        kernels.mark(chosen, counts, mask)
        return mask

    def by_layer(self, mask: np.ndarray) -> np.ndarray:
        """int64 [layers of the table]: how many slots of a mask [lanes, slots] are set."""
        return self.sum_layers(np.count_nonzero(mask, axis=1))

    def sum_layers(self, per_lane: np.ndarray) -> np.ndarray:
        return per_lane.reshape(self.shape).sum(1)

    def per_lane(self, first: np.ndarray) -> np.ndarray:
        """First visible key per table lane from the one per layer."""
        return first.repeat(self.shape[1]) if len(first) == self.shape[0] else np.full(self.lanes, first.min())
