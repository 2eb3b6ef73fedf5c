"""The cache: one state transition, `Cache.access`.

A step goes: the new page enters, the read set is chosen, attention looks up weights, the policy observes,
and every tier is brought down to its capacity. So attention sees up to budget + 1 pages and a victim
still counted in the step it leaves after.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvsim.cache import hooks, kernels
from kvsim.cache.demand import FAIR_SHARE, Use
from kvsim.cache.table import GPU, HOST, SSD, Table
from kvsim.cache.view import View, locked, pages, protected
from kvsim.errors import ConfigError
from kvsim.trace.access import Access, Prompt


@dataclass(slots=True)
class Outcome:
    """What one access found and moved.

    Per row lane [row_lanes]: `total`, `hit`, `attended` (float32): weight of the full row, found on the GPU, and
    read by attention; `used`, `found` (int64): used or needed pages, and those of them on the GPU. Per lane of the
    table, int64 [lanes]: `held`, pages on the GPU while attention ran (new and fetched ones among them, and those
    that a read set hides; the whole prompt at prefill); `resident`, pages on the GPU afterwards. Page counts by
    layer of the table, int64: `read` and `rebuilt` (computed again) [layers]; `fetched`, `fetched_runs` (from the tier,
    waited for; runs are neighbouring pages), `prefetched`, `prefetched_runs` (from the tier, for later steps) and
    `spilled` (written to the tier) [3, layers]. `dropped`: pages that are gone.
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
    fetched: np.ndarray
    fetched_runs: np.ndarray
    prefetched: np.ndarray
    prefetched_runs: np.ndarray
    spilled: np.ndarray
    dropped: int = 0


@dataclass(frozen=True)
class Capacity:
    """Pages per lane in each tier; None is unlimited. `gpu` is the budget."""

    gpu: int
    host: int | None = None
    ssd: int | None = 0


class Cache:
    """The cache of one request.

    `row_lanes`: (layers, kv_heads) of the rows; the policy's granularity says how many of them share a decision.
    `stride`: pages of the whole request. `offload`: where victims go; None is the lossy regime, where they are gone
    and the policy sees rows renormalised over what is left. `use`: when a page counts as used; in the offload
    regime `demand` takes its place and says what a step needs (None: the policy's read set). `rates`: what the view
    shows of the machine. `audit`: recount the table after every step.

    Raises ConfigError for a budget below what is protected, or tiers that cannot hold the request.
    """

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
        audit: bool = False,
    ):
        layers, heads = row_lanes
        self.shape = {"head": (layers, heads), "layer": (layers, 1), "token": (1, 1)}[policy.granularity]
        self.lanes, self.rows = self.shape[0] * self.shape[1], layers * heads
        self.row_lanes, self.stride, self.page_size = row_lanes, stride, page_size
        self.policy, self.offload, self.capacity = policy, offload, capacity
        self.lossy = offload is None
        self.predicate = use if self.lossy or demand is None else demand
        self.selects = callable(getattr(policy, "select", None))
        self.by_selection = demand is None and not self.lossy
        self.reads_resident = not self.by_selection and self.predicate.kind in ("share", "weight", "all")
        self.evicts = callable(getattr(policy, "score", None)) and not (self.lossy and self.selects)
        self.auditing = audit
        self.budget = np.full(self.lanes, min(capacity.gpu, stride) if policy.bounded else stride, np.int64)
        self._check()
        self.table = Table(self.lanes, 0, {})
        self.view = View(self.table, self.shape, page_size, seed)
        self.view.rates = dict(rates or {})
        self.view.budget = locked(self.budget.reshape(*self.shape, 1))  # follows every change of ours
        self._hit = np.empty(self.rows, np.float32)
        self._found = np.empty(self.rows, np.int64)
        self._renormalise = self.lossy and policy.rows == "visible"
        self._cut = False  # has the budget been enforced yet?

    # -- the step ----------------------------------------------------------------------------------------------

    def access(self, a: Access) -> Outcome:
        """One step. Raises PolicyError when the policy breaks its contract."""
        row, peak = a.row.reshape(self.rows, -1), a.peak.reshape(self.rows, -1)
        self.view.now, self.view.keys = a.step, a.keys
        limits = self._limits(a, peak)
        out = self._blank()
        kernels.row_totals(row, peak, a.keys, *limits, out.total, out.used)
        self._enter(a)
        seen = self._read_set()
        if not self.lossy:
            self._demand(row, peak, seen, limits, a.keys, out)
        out.held = np.full(self.lanes, a.keys) if a.prefill else self.table.resident()
        self._touch(a, row, peak, seen, limits)
        if self.lossy:
            out.hit[:], out.attended[:], out.found[:] = self._hit, self._hit, out.used if a.prefill else self._found
            out.read[:] = self._sum_layers(self.table.filled()) if seen is self.table.key else self._by_layer(seen >= 0)
        self._call("observe", self.view, optional=True)
        self._settle(a, out)
        out.resident = self.table.resident()
        if self.auditing:
            self.audit(a)
        return out

    def _blank(self) -> Outcome:
        total, hit, attended = (np.empty(self.rows, np.float32) for _ in range(3))
        used, found = (np.empty(self.rows, np.int64) for _ in range(2))
        fetched, runs, ahead, ahead_runs, spilled = (np.zeros((3, self.shape[0]), np.int64) for _ in range(5))
        read, rebuilt = (np.zeros(self.shape[0], np.int64) for _ in range(2))
        none = np.empty(0, np.int64)
        return Outcome(
            total, hit, attended, used, found, none, none, read, rebuilt, fetched, runs, ahead, ahead_runs, spilled
        )

    def _limits(self, a: Access, peak: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.predicate.limits(peak, a.keys, self._per_row(a.visible), self._per_row(a.first))

    def _enter(self, a: Access) -> None:
        """New pages get their lines; pages that a sliding window has left behind lose theirs."""
        if a.prefill:
            slots = self.stride if not self.lossy else max(a.keys, int(self.budget.max()) + self.policy.lag) + 1
            self.table = Table(self.lanes, slots, self.policy.columns)
            self.table.fill(a.keys)
            self.view.bind(self.table)
        elif a.fresh:
            for key in range(a.keys - a.fresh, a.keys):
                self._grow()
                self.table.insert(key, a.step)
        if a.first.any():
            gone = self.table.key < self._per_lane(a.first)[:, None]
            self.table.release_where(gone & (self.table.key >= 0))

    def _grow(self) -> None:
        """Lines for a policy that outgrows its budget (a read set, a prompt not yet cut, a larger split)."""
        if self.table.free_count.min() == 0:
            self._resize(min(self.stride, 2 * self.table.slots) + 1)

    def _resize(self, slots: int) -> None:
        self.table = self.table.resized(slots)
        self.view.bind(self.table)

    def _read_set(self) -> np.ndarray:
        """Keys that attention may see, int32 [lanes, slots]; -1 hides a page."""
        if not self.selects:
            return self.table.key
        chosen = self._call("select", self.view)
        if chosen is None:
            return self.table.key
        head, tail = (x[:, None] for x in self._protected())
        key = self.table.key
        mask = self._broadcast(chosen, "a read set", np.bool_) | (key < head) | (key >= self.view.keys - tail)
        return np.where(mask, key, np.int32(-1))

    def _demand(self, row, peak, seen, limits, keys: int, out: Outcome) -> None:
        """Bring up what the step needs."""
        t = self.table
        missing, read = np.empty(t.key.shape, bool), np.empty(t.key.shape, bool)
        kernels.find(
            row, peak, t.key, seen, t.copies, *limits, self.by_selection, self.reads_resident,
            out.hit, out.attended, out.found, out.used, missing, read,
        )  # fmt: skip
        out.read[:] = self._by_layer(read)
        fetched = missing
        if missing.any():
            needed = locked(missing.reshape(*self.shape, t.slots))
            rebuilt = missing & self._wish("rebuild", self.view, needed)
            out.rebuilt[:] = self._by_layer(rebuilt)
            fetched = missing & ~rebuilt
        self._fetch(fetched, keys, out.fetched, out.fetched_runs)
        t.land(missing, self.view.now)

    def _fetch(self, moved: np.ndarray, keys: int, count: np.ndarray, runs: np.ndarray) -> None:
        """Count pages by the highest tier below the GPU that has them; drop those copies unless tiers are inclusive."""
        t = self.table
        for tier, bit, above in ((1, HOST, 0), (2, SSD, HOST)):
            source = moved & ((t.copies & bit) != 0) & ((t.copies & above) == 0)
            if source.any():
                count[tier] = self._by_layer(source)
                runs[tier] = self._sum_layers(kernels.count_runs(source, t.key, keys))
        if not self.offload.inclusive:
            t.copies[moved] = GPU

    def _wish(self, hook: str, *arguments: Any) -> np.ndarray:
        """Mask [lanes, slots] that an optional hook of the offload policy asks for."""
        chosen = self._call(hook, *arguments, of=self.offload, optional=True)
        if chosen is None:
            return np.zeros(self.table.key.shape, bool)
        return self._broadcast(chosen, hook, np.bool_, of=self.offload)

    def _touch(self, a: Access, row, peak, seen, limits) -> None:
        t = self.table
        if a.prefill:
            self._warm_start(a)
            return
        missing = a.keys * self.page_size - a.tokens
        kernels.touch(
            row, peak, seen, t.weights, t.mass, t.last, t.uses, a.step, self._renormalise,
            self.predicate.value, self.predicate.absolute, self.page_size, missing, *limits, self._hit, self._found,
        )  # fmt: skip

    def _warm_start(self, a: Access) -> None:
        """Prompt rows count: mass is the column sum, uses the stored rows that used the page."""
        assert a.prompt is not None
        prompt = self.view.prompt = self._pool(a.prompt)
        n = a.keys
        uses = np.zeros((self.rows, n), np.int32)
        start = a.tokens - len(a.prompt.peaks)
        for i, (peaks, visible) in enumerate(zip(a.prompt.peaks, a.prompt.visible, strict=True), start + 1):
            keys, first = pages(i, self.page_size), (i - visible) // self.page_size  # of the `i` tokens up to this row
            seen = keys, self._per_row(visible), self._per_row(first)
            uses[:, :keys] += self.predicate.used(peaks.reshape(self.rows, n), *seen)
        t = self.table
        t.uses[:, :n] = uses.reshape(self.lanes, -1, n).max(1)
        t.mass[:, :n] = prompt.colsum.reshape(self.lanes, n)
        t.weights[:, :n] = prompt.rows[-1].reshape(self.lanes, n)
        self._hit[:] = a.row.reshape(self.rows, -1)[:, :n].sum(1)

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
            rows=pooled(p.rows),
            peaks=locked(p.peaks),
        )

    # -- bringing tiers down to their capacity ------------------------------------------------------------------

    def _settle(self, a: Access, out: Outcome) -> None:
        self.view.prompt = None
        ahead = None if self.lossy else self._prefetch()
        if self.evicts and self._due(a):
            self._settle_gpu(a, out)
        if ahead is not None:  # a page that did not survive the settling was never worth moving
            stayed = ahead & ((self.table.copies & GPU) != 0)
            self._fetch(stayed, a.keys, out.prefetched, out.prefetched_runs)
        if not self.lossy:
            self._backup(a, out)
            self._settle_below(a, out)

    def _prefetch(self) -> np.ndarray | None:
        """Pages that the offload policy wants on the GPU before they are needed."""
        if not callable(getattr(self.offload, "prefetch", None)):
            return None
        chosen = self._wish("prefetch", self.view) & (self.table.key >= 0) & ((self.table.copies & GPU) == 0)
        self.table.land(chosen, self.view.now)
        return chosen

    def _backup(self, a: Access, out: Outcome) -> None:
        """Write-through: whole pages get a copy in host memory while they are still on the GPU."""
        if not callable(getattr(self.offload, "backup", None)):
            return
        t = self.table
        whole = t.key < (a.keys - 1 if a.tokens % self.page_size else a.keys)
        chosen = self._wish("backup", self.view) & (t.copies == GPU) & whole
        out.spilled[1] += self._by_layer(chosen)
        t.copies[chosen] |= HOST

    def _due(self, a: Access) -> bool:
        """A lag delays decisions where pages are gone for good.

        The GPU of the offload regime is full when it is full.
        """
        if not self.lossy:
            return True
        return self.policy.cut_prompt if a.prefill else a.step % self.policy.lag == 0

    def _settle_gpu(self, a: Access, out: Outcome) -> None:
        self._split()
        self._cut = True
        over = self.table.resident() - self.budget
        if (over > 0).any():
            head, tail = self._protected()
            held = head + np.maximum(tail, a.tokens % self.page_size > 0)  # with the page that is being filled
            batch = np.minimum(self.policy.batch, self.budget + 1 - held)  # only the excess takes protected pages
            chosen, counts = self._choose(
                a, GPU, np.where(over > 0, np.maximum(over, batch), 0), self._score(), head, tail
            )
            if self.lossy:
                out.dropped = int(counts.sum())
                self.table.release(chosen, counts)
                self._shrink()
            else:
                self._place(self._mask(chosen, counts), out)

    def _choose(self, a: Access, bit: int, excess, score, head, tail) -> tuple[np.ndarray, np.ndarray]:
        """Slots [lanes, n] and how many per lane: the lowest-scored copies in the tier `bit`, protected ones last."""
        t = self.table
        pinned = a.keys - 1 if a.tokens % self.page_size else -1  # a page that is still being filled
        out, counts = np.empty((self.lanes, int(excess.max())), np.int32), np.empty(self.lanes, np.int64)
        bad = kernels.victims(score, t.key, t.copies, bit, excess, head, a.keys - tail, pinned, out, counts)
        if bad >= 0:
            lane = tuple(int(i) for i in np.unravel_index(bad, self.shape))
            wrong = f"returned NaN at step {a.step}, lane {lane}"
            raise hooks.broken(self.policy, wrong, "score", "every resident page needs a number")
        return out, counts

    def _score(self) -> np.ndarray:
        return self._broadcast(self._call("score", self.view), "scores", np.float32)

    def _place(self, victims: np.ndarray, out: Outcome) -> None:
        """Evicted pages leave the GPU. Pages are written once: only one without a copy below is sent anywhere."""
        t = self.table
        homeless = victims & (t.copies == GPU)
        if homeless.any():
            self._send(homeless, out)
        t.copies[victims] &= ~np.uint8(GPU)
        gone = victims & (t.copies == 0)
        out.dropped += int(gone.sum())
        t.release_where(gone)

    def _send(self, leaving: np.ndarray, out: Outcome) -> None:
        """Copy pages to where the offload policy says."""
        t = self.table
        where = self._call("place", self.view, locked(leaving.reshape(*self.shape, t.slots)), of=self.offload)
        tier = self._broadcast(where, "tiers", np.int64, of=self.offload)
        if not np.isin(tier[leaving], (-1, 1, 2)).all():
            hint = "1 is host, 2 is SSD, -1 is none"
            raise hooks.broken(self.offload, "named a tier that does not exist", "place", hint)
        for number, bit in ((1, HOST), (2, SSD)):
            new = leaving & (tier == number)
            out.spilled[number] += self._by_layer(new)
            if bit == SSD:  # on its way down it crosses the host link too
                out.spilled[1] += self._by_layer(new)
            t.copies[new] |= bit

    def _settle_below(self, a: Access, out: Outcome) -> None:
        """A full tier gives up copies that another tier has too; then a host's lowest scores go down to the SSD."""
        t, none = self.table, np.zeros_like(self.budget)
        for bit, capacity in ((HOST, self.capacity.host), (SSD, self.capacity.ssd)):
            over = none if capacity is None else np.maximum(t.resident(bit) - capacity, 0)
            if not over.any():
                continue
            spare = (t.copies & ~np.uint8(bit)) != 0
            score = np.where(spare, np.float32(-np.inf), self._score())
            gone = self._mask(*self._choose(a, bit, over, score, none, none))
            down = gone & ~spare
            if bit == SSD and down.any():
                raise ConfigError(
                    f"at step {a.step} the SSD needs more than its {capacity} pages per lane",
                    hint="raise --host or --ssd",
                )
            out.spilled[2] += self._by_layer(down)
            t.copies[down] |= SSD
            t.copies[gone] &= ~np.uint8(bit)

    def _split(self) -> None:
        if callable(getattr(self.policy, "split", None)):
            wanted = self._broadcast(self._call("split", self.view), "budgets", np.int64, slots=1)
            self.budget[:] = np.clip(wanted[:, 0], 1, self.stride)

    def _shrink(self) -> None:
        """Once a long prompt is cut, the table is as wide as the budget again."""
        needed = max(int(self.table.resident().max()), int(self.budget.max())) + self.policy.lag + 1
        if 2 * needed < self.table.slots:
            self._resize(needed)

    def _protected(self) -> tuple[np.ndarray, np.ndarray]:
        """Pages per lane at the head and at the tail that leave last, and that a read set holds."""
        return protected(self.policy, self.budget, self.page_size)

    def _check(self) -> None:
        head, tail = self._protected()
        least = max(1, int((head + tail).max()))
        if self.budget[0] < min(least, self.stride) and (self.evicts or self.selects):
            raise ConfigError(
                f"a budget of {self.capacity.gpu} pages is below the {least} that {hooks.name(self.policy)} protects",
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
        below = (self.capacity.host, self.capacity.ssd)
        held = math.inf if None in below else self.capacity.gpu + sum(x or 0 for x in below)
        if not self.lossy and held < self.stride:
            raise ConfigError(
                f"GPU, host and SSD hold {held} pages per lane, the request needs {self.stride}",
                hint="raise --host or --ssd, or let pages go: --regime lossy",
            )

    # -- small things -------------------------------------------------------------------------------------------

    def _mask(self, chosen: np.ndarray, counts: np.ndarray) -> np.ndarray:
        mask = np.zeros(self.table.key.shape, bool)
        kernels.mark(chosen, counts, mask)
        return mask

    def _by_layer(self, mask: np.ndarray) -> np.ndarray:
        return self._sum_layers(np.count_nonzero(mask, axis=1))

    def _sum_layers(self, per_lane: np.ndarray) -> np.ndarray:
        return per_lane.reshape(self.shape).sum(1)

    def _per_row(self, per_layer: np.ndarray) -> np.ndarray:
        """A value per layer of the view (or one for all), by row lane."""
        return np.repeat(per_layer, self.rows // len(per_layer))

    def _per_lane(self, first: np.ndarray) -> np.ndarray:
        """First visible key per table lane from the one per layer."""
        return np.repeat(first, self.shape[1]) if len(first) == self.shape[0] else np.full(self.lanes, first.min())

    def _broadcast(self, value: Any, what: str, dtype: Any, slots: int | None = None, of: Any = None) -> np.ndarray:
        """What a hook returned, as [lanes, slots]."""
        shape = (*self.shape, self.table.slots if slots is None else slots)
        return hooks.array(of or self.policy, what, value, shape, dtype).reshape(self.lanes, -1)

    def _call(self, method: str, *arguments: Any, of: Any = None, optional: bool = False) -> Any:
        return hooks.call(of or self.policy, method, *arguments, now=self.view.now, optional=optional)

    def audit(self, a: Access) -> None:
        """Recount the table and the budget; an assertion here is a mistake of ours."""
        self.table.audit()
        if self._cut:
            late = self.policy.lag - 1 if self.lossy else 0
            assert (self.table.resident() <= np.maximum(self.budget, 1) + late).all(), "over budget"
