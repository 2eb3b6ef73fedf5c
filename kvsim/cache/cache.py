"""The cache: one state transition, `Cache.access`.

A step goes: the new page enters, the read set is chosen, attention looks up weights, the policy observes,
and every tier is brought down to its capacity. So attention sees up to budget + 1 pages and a victim
still counted in the step it leaves after.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kvsim.cache import fused, hooks, kernels, sized
from kvsim.cache.demand import FAIR_SHARE, Use
from kvsim.cache.lanes import Lanes
from kvsim.cache.outcome import Outcome, no_moves
from kvsim.cache.table import COLUMNS, GPU, Table
from kvsim.cache.tiers import Capacity, Tiers
from kvsim.cache.view import Facts, locked, pages
from kvsim.errors import ConfigError
from kvsim.trace.access import Access, Prompt
from kvsim.trace.prompt_rows import Rows


class Cache(Lanes):
    """The cache of one request.

    `row_lanes`: (layers, kv_heads) of the rows; the policy's granularity says how many of them share a decision.
    `stride`: pages of the whole request. `offload`: where victims go; None is the lossy regime, where they are gone
    and the policy sees rows renormalised over what is left. `use`: when a page counts as used; in the offload
    regime `demand` takes its place and says what a step needs (None: the policy's read set). `rates`, `facts` (asked
    when a policy first wants one): what the view shows of the machine and of each key. `audit`: recount the table
    after every step. `record`: list every page that moves (offload regime). `watch(access, read)`, if set, is called
    in every step when attention has looked: `read`, bool [lanes, slots], are the pages that it saw.

    Raises ConfigError for a budget below what is protected, or tiers that cannot hold the request.
    """

    chooses = True  # who leaves, in the compiled pass
    fusing: bool | None = None  # compile what of the policy can be: None where it pays; both ways decide the same

    def __init__(
        self,
        row_lanes: tuple[int, int],
        stride: int,
        policy: Any,
        capacity: Capacity,
        *,
        offload: Any = None,
        use: Use = FAIR_SHARE,
        demand: Use | None = None,
        page_size: int = 1,
        seed: int = 0,
        rates: Mapping[str, float] | None = None,
        facts: Facts | None = None,
        audit: bool = False,
        record: bool = False,
    ):
        super().__init__(
            row_lanes, stride, policy, capacity.gpu, page_size=page_size, seed=seed, rates=rates, facts=facts
        )
        self.lossy = offload is None
        self.predicate = use if self.lossy or demand is None else demand
        self.selects = callable(getattr(policy, "select", None))
        self.by_selection = demand is None and not self.lossy
        self.reads_resident = not self.by_selection and self.predicate.kind in ("share", "weight", "all")
        self.evicts = callable(getattr(policy, "score", None)) and not (self.lossy and self.selects)
        self.splits = callable(getattr(policy, "split", None))
        self.auditing = audit
        self._check(capacity)
        self.tiers = None if self.lossy else Tiers(self, offload, capacity, record)
        self._hit = np.empty(self.rows, np.float32)
        self._used, self._found = np.empty(self.rows, np.int64), np.empty(self.rows, np.int64)
        self._renormalise = self.lossy and policy.rows == "visible"
        self._one = np.ones(self.lanes, np.int64)
        self._unmoved = tuple(map(locked, no_moves(self.shape[0]))) if self.lossy else None
        self._cut = False  # has the budget been enforced yet?
        self.seen = self.table.key  # keys that attention may see in this step, [lanes, slots]; -1 elsewhere
        self.watch: Callable[[Access, np.ndarray], None] | None = None

    def _check(self, capacity: Capacity) -> None:
        head, tail = self.protected()
        least = max(1, int((head + tail).max()))
        if self.budget[0] < min(least, self.stride) and (self.evicts or self.selects):
            raise ConfigError(
                f"a budget of {capacity.gpu} pages is below the {least} that {hooks.name(self.policy)} protects",
                hint=f"raise the budget to at least {least} pages, or lower sink, recent or lag",
            )
        if self.by_selection and not self.selects:
            raise ConfigError(
                f'demand "select" needs a policy with a read set; {hooks.name(self.policy)} has none',
                hint='use "dense", "theta" or "topk(64)"',
            )
        if not self.lossy and not self.evicts and self.policy.bounded:
            hint = "define score(view) to say what leaves the GPU, or offer the lossy regime alone"
            raise hooks.broken(self.policy, "has no score, which the offload regime needs", "score", hint)

    # -- the step ----------------------------------------------------------------------------------------------

    def access(self, a: Access) -> Outcome:
        """One step. Raises PolicyError when the policy breaks its contract."""
        row, peak = a.row.reshape(self.rows, -1), a.peak.reshape(self.rows, -1)
        self.view.now, self.view.keys, self.view.tokens, self.view.vectors = a.step, a.keys, a.tokens, a.vectors
        limits = self.predicate.limits(peak, a.keys, a.visible, a.first)
        out = Outcome.blank(self.rows, self.shape[0], self._unmoved)
        if self.fused and self.fused.step and self.lossy and not (a.prefill or self.selects or self.watch):
            self._pass(self.fused, self.fused.step, a, row, peak, limits, out)
        else:
            self._enter(a)
            self.seen = seen = self._read_set()
            read = self._demand(row, peak, seen, limits, a.keys, out) if self.tiers else None
            if self.watch:
                self.watch(a, seen >= 0 if read is None else read)
            out.held = np.full(self.lanes, a.keys) if a.prefill else self.resident()
            self._touch(a, row, peak, limits, out)
            if self.lossy:
                out.read = self.sum_layers(self.table.filled()) if seen is self.table.key else self.by_layer(seen >= 0)
            self.observe()
            self._settle(a, out)
            out.resident = self.resident()
        if self.lossy:
            out.attended = out.hit
        self.view.prompt = None
        if self.auditing:
            self.audit(a)
        return out

    def _pass(
        self, compiled: fused.Fused, step: Callable[..., None], a: Access, row, peak, limits, out: Outcome
    ) -> None:
        """A decode step of the lossy regime in one compiled pass over the pages; what is not compiled comes after."""
        new_key, (head, tail) = -1, self.protected()
        if compiled.inserts and a.fresh == 1 and not np.count_nonzero(a.first):
            self.grow()
            new_key = a.keys - 1
        else:
            self._enter(a)
        self.seen = self.table.key
        whole = self.chooses and compiled.chooses and self.evicts and self.sizes is None and not self.splits
        due = whole and self._due(a)
        kept = compiled.kept_between if whole else compiled.kept
        pinned = a.keys - 1 if a.tokens % self.page_size else -1
        out.held, counts = np.empty(self.lanes, np.int64), np.empty(self.lanes, np.int64)
        self.each(
            step, *self.table.lines, new_key, due, self.budget, self._batch(a, head, tail), head,
            a.keys - tail, pinned, out.held, counts, *self._touching(a, row, peak, limits, out, kept),
            *compiled.arguments(self.table, self.view),
        )  # fmt: skip
        left = kernels.add_up(out.held, counts, out.read)
        compiled.ask(self.view, "observe")
        out.resident = out.held
        if not whole:
            self._settle(a, out)
            out.resident = self.resident()
        self._cut |= due
        if left:
            self.check(a, counts)
            compiled.ask(self.view, "score")
            self.shrink()
            out.dropped, out.resident = left, out.held - counts

    def _enter(self, a: Access) -> None:
        """New pages get their lines; pages that a sliding window has left behind lose theirs."""
        if a.prefill:
            own = self.tiers.columns if self.tiers else {}
            self.table = Table(self.lanes, self.lines(a), {**self.policy.columns, **own})
            self.table.fill(a.keys)
            self.view.bind(self.table)
            self.fused = self._fuse(a)
        elif a.fresh:
            for key in range(a.keys - a.fresh, a.keys):
                self.grow()
                self.table.insert(key, a.step)
        if np.count_nonzero(a.first):
            gone = self.table.key < self.per_lane(a.first)[:, None]
            self.table.release_where(gone & (self.table.key >= 0))

    def lines(self, a: Access) -> int:
        """Of the table, at first."""
        if not self.lossy:
            return self.stride
        uncut = 0 if self.policy.cut_prompt else self.policy.lag  # pages that may come before the prompt is cut
        return min(self.stride, max(a.keys + uncut, self.widest + self.policy.lag)) + 1

    def _fuse(self, a: Access) -> fused.Fused | None:
        """The policy's compiled loops, where the steps that this request may take pay for them."""
        if self.fusing is not None:
            return fused.fuse(self.policy, math.inf) if self.fusing else None
        slots = min(self.widest, self.stride) if self.lossy else self.stride
        return fused.fuse(self.policy, self.lanes * slots * (self.stride - a.keys) * self.page_size)

    def _read_set(self) -> np.ndarray:
        """Keys that attention may see, int32 [lanes, slots]; -1 hides a page."""
        if not self.selects:
            return self.table.key
        chosen = self.call("select", self.view)
        if chosen is None:
            return self.table.key
        head, tail = (x[:, None] for x in self.protected())
        key = self.table.key
        mask = self.broadcast(chosen, "a read set", np.bool_) | (key < head) | (key >= self.view.keys - tail)
        return np.where(mask, key, np.int32(-1))

    def _demand(self, row, peak, seen, limits, keys: int, out: Outcome) -> np.ndarray:
        """Find what the step reads and bring up what of it is not on the GPU; returns the mask of what it reads."""
        assert self.tiers
        t = self.table
        missing, read = np.empty(t.key.shape, bool), np.empty(t.key.shape, bool)
        kernels.find(
            row, peak, t.key, seen, t.copies, *limits, self.by_selection, self.reads_resident,
            out.hit, out.attended, out.found, out.used, missing, read,
        )  # fmt: skip
        out.read[:] = self.by_layer(read)
        self.tiers.demand(missing, read, keys, out)
        return read

    def _touch(self, a: Access, row, peak, limits, out: Outcome) -> None:
        if a.prefill:
            kernels.row_totals(row, peak, a.keys, *limits, self.page_size, out.total, self._used)
            self._warm_start(a)
            if self.lossy:
                out.used[:] = out.found[:] = self._used
                out.hit[:] = row[:, : a.keys].sum(1)
        else:
            kept = self.fused.kept if self.fused and self.lossy else COLUMNS
            self.each(kernels.touch, self.seen, *self._touching(a, row, peak, limits, out, kept))

    def _touching(self, a: Access, row, peak, limits, out: Outcome, kept: Collection[str]) -> tuple:
        """What `kernels.touch` asks for, beside the keys; in the offload regime `find` has counted already."""
        t = self.table
        found = (out.used, out.hit, out.found) if self.lossy else (self._used, self._hit, self._found)
        return (
            row, peak, a.keys, *(getattr(t, n) if n in kept else None for n in ("weights", "mass", "last", "uses")),
            a.step, self._renormalise, self.predicate.value, self.predicate.absolute, self.page_size,
            a.keys * self.page_size - a.tokens, *limits, out.total, *found,
            self.places(a),
        )  # fmt: skip

    def places(self, a: Access) -> tuple | None:
        """Where the pass over the pages counts them by place, if it does (`kvsim.cache.stack`)."""
        return None

    def _warm_start(self, a: Access) -> None:
        """Prompt rows count: mass is the column sum, uses the stored rows that used the page.

        Of several row lanes that share a decision it is the one that used the page most; a decode step compares the
        mean of their peaks with that of their limits.
        """
        assert a.prompt is not None
        prompt = self.view.prompt = self._pool(a.prompt)
        n = a.keys
        uses = np.zeros((self.rows, n), np.int32)
        start = a.tokens - len(a.prompt.peaks)
        for i, (peaks, visible) in enumerate(zip(a.prompt.peaks, a.prompt.visible, strict=True), start + 1):
            keys, first = pages(i, self.page_size), (i - visible) // self.page_size  # of the `i` tokens up to this row
            uses[:, :keys] += self.predicate.used(peaks.reshape(self.rows, n), keys, visible, first)
        t = self.table
        t.uses[:, :n] = uses.reshape(self.lanes, -1, n).max(1)
        t.mass[:, :n] = prompt.colsum.reshape(self.lanes, n)
        t.weights[:, :n] = prompt.rows[-1].reshape(self.lanes, n)

    def _pool(self, p: Prompt) -> Prompt:
        """Prompt statistics in the lanes of the policy, read-only: the mean over the rows that share a decision."""
        axes = {"head": (), "layer": (-2,), "token": (-3, -2)}[self.policy.granularity]

        def pooled(x):
            return None if x is None else locked(x.mean(axis=axes, keepdims=True) if axes else x)

        return replace(
            p,
            colsum=pooled(p.colsum),
            colsq=pooled(p.colsq),
            colmax=pooled(p.colmax),
            rows=Rows(lambda i: pooled(p.rows[i]), (len(p.rows), *self.shape, p.rows.shape[-1])),
            peaks=Rows(lambda i: p.peaks[i], p.peaks.shape),
            span_sums=pooled(p.span_sums),
        )

    def resident(self) -> np.ndarray:
        """int64 [lanes]: pages on the GPU."""
        return self.table.resident() if self.tiers else self.table.filled()

    # -- bringing tiers down to their capacity ------------------------------------------------------------------

    def _settle(self, a: Access, out: Outcome) -> None:
        ahead = self.tiers.prefetch() if self.tiers else None
        if self.evicts and self._due(a):
            self._settle_gpu(a, out)
        if self.tiers:
            if ahead is not None:
                self.tiers.prefetched(ahead, a.keys, out)
            self.tiers.backup(a, out)
            self.tiers.settle(a, out)

    def _due(self, a: Access) -> bool:
        """A lag delays decisions where pages are gone for good, and `once` leaves it at the first one.

        The GPU of the offload regime is full when it is full.
        """
        if not self.lossy:
            return True
        if a.prefill:
            return self.policy.cut_prompt
        clock = a.tokens if self.policy.clock == "token" else a.step
        return not self.policy.once and clock % self.policy.lag == 0

    def _settle_gpu(self, a: Access, out: Outcome) -> None:
        self._split()
        self._cut = True
        over = (self.resident() if self.sizes is None else self.occupied()) - self.budget
        if over.max() <= 0:
            return
        head, tail = self.protected()
        excess = np.maximum(over, 0)
        if self.sizes is None:
            excess = np.where(over > 0, np.maximum(over, self._batch(a, head, tail)), 0)
        chosen, counts = self.choose(a, GPU if self.tiers else 0, excess, head, tail)
        if self.tiers:
            self.tiers.place(self.mask(chosen, counts), out)
        else:
            out.dropped = int(counts.sum())
            self.table.release(chosen, counts)
            self.shrink()

    def _batch(self, a: Access, head, tail) -> np.ndarray:
        """Pages that leave together, by lane, where any has to."""
        if self.policy.batch == 1:
            return self._one
        held = head + np.maximum(tail, a.tokens % self.page_size > 0)  # with the page that is being filled
        return np.minimum(self.policy.batch, self.budget + 1 - held)  # only the excess takes protected pages

    def _split(self) -> None:
        if self.splits:
            in_force, self.view.budget = self.view.budget, self.run_budget
            wanted = self.broadcast(self.call("split", self.view), "budgets", np.float64, slots=1)
            self.view.budget = in_force
            if not (wanted >= 0).all():
                wrong = f"returned a budget of {wanted[~(wanted >= 0)][0]:g} pages at step {self.view.now}"
                raise hooks.broken(self.policy, wrong, "split", "every lane's budget is a number of pages, 0 or more")
            self.budget[:] = np.clip(wanted[:, 0], 1, self.total)
            self.widest = int(self.budget.max())
            self._protected = None

    def audit(self, a: Access) -> None:
        """Recount the table and the budget; an assertion here is a mistake of ours."""
        self.table.audit()
        if self._cut:
            late = self.policy.lag - 1 if self.lossy else 0
            late = a.step if self.lossy and self.policy.once else late
            page = 1 if self.sizes is None else self.sizes.max()
            assert (self.occupied() <= np.maximum(self.budget, page) + late * page + sized.NEAR).all(), "over budget"
