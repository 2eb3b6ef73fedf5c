"""The cache engine written again, slowly: a table indexed by key, with loops over lanes and pages.

It shares with `kvsim.cache` the policies, the predicate, the names and types of the columns, and what turns tokens and
shares into pages; a property test compares the two.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from kvsim.cache.demand import FAIR_SHARE, NEARLY
from kvsim.cache.table import COLUMNS, Table
from kvsim.cache.view import pages, share_of, window
from kvsim.trace.access import Access


class _Columns(SimpleNamespace):
    """What a policy sees of the reference: the names of `View`, one line per key."""

    def __getitem__(self, name):
        return self.private[name]

    @property
    def resident(self):
        return (self.copies & 1).astype(bool)

    @property
    def newest(self):
        return self.keys - 1

    @property
    def size(self):
        return np.ones(self.key.shape, np.float32)


class ReferenceCache:
    """The rules of `Cache` in plain loops over a table [layer, KV head, key]; same arguments, no audit."""

    def __init__(
        self, row_lanes, stride, policy, capacity, *, offload=None, use=FAIR_SHARE, demand=None, page_size=1, seed=0
    ):  # fmt: skip
        layers, heads = row_lanes
        self.shape = {"head": (layers, heads), "layer": (layers, 1), "token": (1, 1)}[policy.granularity]
        self.policy, self.offload, self.capacity, self.page_size = policy, offload, capacity, page_size
        self.predicate = use if offload is None or demand is None else demand
        self.by_selection = offload is not None and demand is None
        self.selects = hasattr(policy, "select")
        self.group = layers * heads // (self.shape[0] * self.shape[1])
        shape = (*self.shape, stride)
        self.v = v = _Columns(**{name: np.zeros(shape, getattr(Table(0, 0, {}), name).dtype) for name in COLUMNS})
        v.key[:] = -1
        v.private = {name: np.zeros(shape, dtype) for name, dtype in policy.columns.items()}
        v.shape, v.page_size, v.seed, v.rng = self.shape, page_size, seed, np.random.default_rng(seed)
        v.budget = np.full((*self.shape, 1), min(capacity.gpu, stride) if policy.bounded else stride)
        self.run_budget = v.budget

    def access(self, a: Access) -> SimpleNamespace:
        """One step: `missing` (bool by key), `spilled` by tier, `dropped`, and the mass `hit` by row lane."""
        v, self.a = self.v, a
        v.now, v.keys, v.tokens, v.vectors, v.prompt = a.step, a.keys, a.tokens, a.vectors, None
        self.out = SimpleNamespace(missing=np.zeros(v.key.shape, bool), spilled=[0, 0, 0], dropped=0)
        self.row, self.peak = (x.reshape(*self.shape, self.group, -1) for x in (a.row, a.peak))
        self.used = self._used(a.peak, a.keys, a.visible, a.first)
        self._enter(a)
        v.key[v.key < self._per_lane(a.first)] = -1
        v.copies[v.key < 0] = 0
        seen = v.key >= 0
        if self.selects and (chosen := self.policy.select(v)) is not None:
            head, tail = self._protected(v.budget)
            seen = seen & (chosen | (v.key < head) | (v.key >= a.keys - tail))
        here = v.resident[:, :, None]
        if self.offload is not None:
            self._fetch(seen)
        visible = seen[:, :, None] if self.offload is None else here
        self.out.hit = np.where(visible, self.row, 0).sum(-1).reshape(-1)
        self._prefill(a) if a.prefill else self._touch(a, seen)
        if hasattr(self.policy, "observe"):
            self.policy.observe(v)
        if hasattr(self.policy, "score") and not (self.offload is None and self.selects):
            self._settle(a)
        v.prompt = None
        return self.out

    def _used(self, peak, keys, *seen):
        """Which keys each row uses, [*lanes, group, stride]; leaves the limits in `self.limits`."""
        rows, x = peak.shape[0] * peak.shape[1], np.zeros(peak.shape, bool)
        arguments = (peak.reshape(rows, -1), keys, *(np.repeat(s, rows // len(s)) for s in seen))
        self.limits = [x.reshape(*self.shape, self.group) for x in self.predicate.limits(*arguments)]
        x[..., :keys] = self.predicate.used(*arguments).reshape(*peak.shape[:2], keys)
        return x.reshape(*self.shape, self.group, -1)

    def _protected(self, budget):
        p, size = self.policy, self.page_size
        head = np.maximum(window(p.sink, budget, size), share_of(p.protect_head, budget))
        return head, np.maximum(window(p.recent, budget, size), share_of(p.protect_tail, budget))

    def _per_lane(self, first):
        return first.reshape(-1, 1, 1) if len(first) == self.shape[0] else first.min()

    def _enter(self, a):
        v = self.v
        for key in range(a.keys - a.fresh, a.keys):
            v.key[..., key], v.copies[..., key] = key, 1
            for column in (v.born, v.arrived, v.last):
                column[..., key] = a.step

    def _fetch(self, seen):
        v = self.v
        needed = seen if self.by_selection else (v.key >= 0) & self.used.any(2)
        self.out.missing = needed & ~v.resident
        v.copies[self.out.missing] |= 1
        v.arrived[self.out.missing] = v.now

    def _prefill(self, a):
        v, p, n = self.v, a.prompt, a.keys
        uses, lanes = np.zeros((*self.shape, self.group, n), np.int32), (*self.shape, self.group, n)
        for back, (peaks, visible) in enumerate(zip(p.peaks[::-1], p.visible[::-1], strict=True)):
            tokens = a.tokens - back
            uses += self._used(peaks, pages(tokens, self.page_size), visible, (tokens - visible) // self.page_size)
        v.uses[..., :n] = uses.max(2)
        v.mass[..., :n] = p.colsum.reshape(lanes).mean(2)
        v.weights[..., :n] = p.rows[-1].reshape(lanes).mean(2)
        v.prompt = p

    def _touch(self, a, seen):
        v, f = self.v, np.float32
        renormalise = self.offload is None and self.policy.rows == "visible"
        for lane in np.ndindex(self.shape):
            keys = np.flatnonzero(seen[lane])
            row, peak, least = self.row[lane][:, keys], self.peak[lane][:, keys], f(0)
            for limit in self.limits[0][lane]:
                least += limit
            least, newer = least / f(self.group), keys >= self.limits[1][lane].max()
            if renormalise:
                total = row.sum(1, keepdims=True, dtype=f)
                scale = np.divide(f(1), total, out=np.zeros_like(total), where=total >= np.finfo(f).tiny)
                row, peak = row * scale, peak * scale
                tokens = max(1, len(keys) * self.page_size - (a.keys * self.page_size - a.tokens))
                least = f(self.predicate.value)
                if not self.predicate.absolute:
                    least = least / f(tokens) * NEARLY
            v.weights[lane] = 0
            v.weights[lane][keys] = row.sum(0) / f(self.group)
            v.mass[lane] += v.weights[lane]
            peak = peak.sum(0) / f(self.group)
            used = keys[(peak > least) | ((peak == least) & newer)]
            v.last[lane][used] = a.step
            v.uses[lane][used] += 1

    def _settle(self, a):
        p, v = self.policy, self.v
        clock = a.tokens if p.clock == "token" else a.step
        due = self.offload is not None or (p.cut_prompt if a.prefill else not p.once and clock % p.lag == 0)
        if due and hasattr(p, "split"):
            v.budget = self.run_budget
            v.budget = np.clip(np.broadcast_to(p.split(v), v.budget.shape), 1, v.key.shape[-1])
        leaving = np.zeros(v.key.shape, bool)
        score = np.broadcast_to(np.asarray(p.score(v), np.float32), v.key.shape)
        for lane in np.ndindex(self.shape):
            budget = v.budget[lane]
            over = int(v.resident[lane].sum() - budget[0])
            head, tail = (int(x[0]) for x in self._protected(budget))
            if over > 0 and due:
                held = head + max(tail, a.tokens % self.page_size > 0)
                count = max(over, min(p.batch, int(budget[0]) + 1 - held))
                for key in self._lowest(lane, 1, score[lane], head, a.keys - tail)[:count]:
                    leaving[lane][key] = True
        if self.offload is None:
            self.out.dropped = int(leaving.sum())
            v.key[leaving], v.copies[leaving] = -1, 0
        else:
            self._place(leaving)

    def _lowest(self, lane, bit, score, head=0, tail=2**30):
        """Keys with a copy in the tier, the first to leave first; never a page that is still being filled."""
        v, partial = self.v, self.a.keys - 1 if self.a.tokens % self.page_size else -1
        keys = [k for k in np.flatnonzero(v.copies[lane] & bit) if k != partial]
        return sorted(keys, key=lambda k: (k < head or k >= tail, score[k], k))

    def _place(self, leaving):
        v = self.v
        tier = np.broadcast_to(self.offload.place(v, leaving), v.key.shape)
        for layer, head, key in np.argwhere(leaving):
            here, to = v.copies[layer, head], int(tier[layer, head, key])
            if to > 0 and here[key] == 1:  # no copy below
                for crossed in range(1, to + 1):
                    self.out.spilled[crossed] += 1
                here[key] |= 1 << to
            here[key] &= ~np.uint8(1)
            if not here[key]:
                self.out.dropped += 1
                v.key[layer, head, key] = -1
        score = np.broadcast_to(np.asarray(self.policy.score(v), np.float32), v.key.shape)
        for bit, capacity in ((2, self.capacity.host), (4, self.capacity.ssd)):
            for lane in np.ndindex(self.shape):
                copies = v.copies[lane]
                over = 0 if capacity is None else int(np.count_nonzero(copies & bit)) - capacity
                if over > 0:
                    elsewhere = (copies & ~np.uint8(bit)) != 0
                    for key in self._lowest(lane, bit, np.where(elsewhere, -np.inf, score[lane]))[:over]:
                        if not elsewhere[key]:
                            copies[key] |= 4
                            self.out.spilled[2] += 1
                        copies[key] &= ~np.uint8(bit)
