"""The tiers below the GPU: which copies exist where, and what moves because of it.

KV pages are written once. A page that goes up keeps its copy below (unless the offload policy is not inclusive), and
one that has such a copy just leaves the GPU when it is evicted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvsim.cache import hooks, kernels
from kvsim.cache.lanes import Lanes
from kvsim.cache.outcome import Move, Outcome
from kvsim.cache.table import GPU, HOST, SSD
from kvsim.errors import ConfigError
from kvsim.trace.access import Access

_AHEAD = "_ahead"  # the engine's own column: prefetched, and not read since


@dataclass(frozen=True)
class Capacity:
    """Pages per lane in each tier; None is unlimited. `gpu` is the budget."""

    gpu: int
    host: int | None = None
    ssd: int | None = 0


class Tiers:
    """Host and SSD of one cache, and the offload policy that fills them. `record`: list every page that moves.

    Raises ConfigError where GPU, host and SSD together cannot hold the request.
    """

    def __init__(self, lanes: Lanes, offload: Any, capacity: Capacity, record: bool = False):
        self.lanes, self.offload, self.capacity, self.record = lanes, offload, capacity, record
        self.prefetches = callable(getattr(offload, "prefetch", None))
        self.columns = {_AHEAD: np.bool_} if self.prefetches else {}
        below = (capacity.host, capacity.ssd)
        held = math.inf if None in below else capacity.gpu + sum(x or 0 for x in below)
        if held < lanes.total:
            raise ConfigError(
                f"GPU, host and SSD hold {held} pages per lane, the request needs {lanes.total}",
                hint="raise --host or --ssd, or let pages go: --regime lossy",
            )

    # -- up ----------------------------------------------------------------------------------------------------

    def demand(self, missing: np.ndarray, read: np.ndarray, keys: int, out: Outcome) -> None:
        """Bring up the pages of the mask `missing`; `read` are all that the step reads."""
        t, fetched = self.lanes.table, missing
        if missing.any():
            rebuilt = missing & self._wish("rebuild", self.lanes.view, self.lanes.shown(missing))
            out.rebuilt[:] = self.lanes.by_layer(rebuilt)
            fetched = missing & ~rebuilt
        self._fetch(fetched, keys, out, "load")
        t.land(missing, self.lanes.view.now)
        if self.prefetches:
            ahead = t.private[_AHEAD]
            out.awaits[:] = self.offload.waits or self.lanes.by_layer(read & ahead) > 0
            ahead &= ~read

    def prefetch(self) -> np.ndarray | None:
        """Pages that the offload policy wants on the GPU before they are needed; they join it at once."""
        if not self.prefetches:
            return None
        t = self.lanes.table
        chosen = self._wish("prefetch", self.lanes.view) & (t.key >= 0) & ((t.copies & GPU) == 0)
        t.land(chosen, self.lanes.view.now)
        return chosen

    def prefetched(self, chosen: np.ndarray, keys: int, out: Outcome) -> None:
        """Move those that the GPU has room for; a page that did not survive its settling was never worth moving."""
        stayed = chosen & ((self.lanes.table.copies & GPU) != 0)
        self._fetch(stayed, keys, out, "prefetch")
        self.lanes.table.private[_AHEAD][stayed] = True

    def _fetch(self, moved: np.ndarray, keys: int, out: Outcome, action: str) -> None:
        """Count pages by the highest tier below the GPU that has them; drop those copies unless tiers are inclusive."""
        t = self.lanes.table
        count, runs = (out.fetched, out.fetched_runs) if action == "load" else (out.prefetched, out.prefetched_runs)
        for tier, bit, above in ((1, HOST, 0), (2, SSD, HOST)):
            source = moved & ((t.copies & bit) != 0) & ((t.copies & above) == 0)
            if source.any():
                count[tier] = self.lanes.by_layer(source)
                runs[tier] = self.lanes.sum_layers(kernels.count_runs(source, t.key, keys))
                self._note(out, action, tier, source)
        if not self.offload.inclusive:
            t.copies[moved] = GPU

    # -- down --------------------------------------------------------------------------------------------------

    def place(self, victims: np.ndarray, out: Outcome) -> None:
        """Evicted pages leave the GPU. Pages are written once: only one without a copy below is sent anywhere."""
        t = self.lanes.table
        homeless = victims & (t.copies == GPU)
        if homeless.any():
            self._send(homeless, out)
        t.copies[victims] &= ~np.uint8(GPU)
        if self.prefetches:
            t.private[_AHEAD][victims] = False
        gone = victims & (t.copies == 0)
        out.dropped += int(gone.sum())
        self._note(out, "drop", 1, victims & ((t.copies & HOST) != 0))
        self._note(out, "drop", 2, victims & (t.copies == SSD))
        t.release_where(gone)

    def _send(self, leaving: np.ndarray, out: Outcome) -> None:
        """Copy pages to where the offload policy says."""
        t = self.lanes.table
        where = self.lanes.call("place", self.lanes.view, self.lanes.shown(leaving), of=self.offload)
        tier = self.lanes.broadcast(where, "tiers", np.int64, of=self.offload)
        if not np.isin(tier[leaving], (-1, 1, 2)).all():
            hint = "1 is host, 2 is SSD, -1 is none"
            raise hooks.broken(self.offload, "named a tier that does not exist", "place", hint)
        for number, bit in ((1, HOST), (2, SSD)):
            new = leaving & (tier == number)
            out.spilled[number] += self.lanes.by_layer(new)
            if bit == SSD:  # on its way down it crosses the host link too
                out.spilled[1] += self.lanes.by_layer(new)
            self._note(out, "store", number, new)
            t.copies[new] |= bit

    def backup(self, a: Access, out: Outcome) -> None:
        """Write-through: whole pages get a copy in host memory while they are still on the GPU."""
        if not callable(getattr(self.offload, "backup", None)):
            return
        t = self.lanes.table
        whole = t.key < (a.keys - 1 if a.tokens % self.lanes.page_size else a.keys)
        chosen = self._wish("backup", self.lanes.view) & (t.copies == GPU) & whole
        out.spilled[1] += self.lanes.by_layer(chosen)
        self._note(out, "store", 1, chosen)
        t.copies[chosen] |= HOST

    def settle(self, a: Access, out: Outcome) -> None:
        """A full tier gives up copies that another tier has too; then a host's lowest scores go down to the SSD."""
        t, none = self.lanes.table, np.zeros_like(self.lanes.budget)
        for bit, capacity in ((HOST, self.capacity.host), (SSD, self.capacity.ssd)):
            over = none if capacity is None else np.maximum(self.lanes.occupied(bit) - capacity, 0)
            if not over.any():
                continue
            limit = np.full_like(none, capacity)
            spare = (t.copies & ~np.uint8(bit)) != 0
            score = np.where(spare, np.float32(-np.inf), self.lanes.score())
            gone = self.lanes.mask(*self.lanes.choose(a, bit, over, none, none, score, limit))
            down = gone & ~spare
            if bit == SSD and down.any():
                raise ConfigError(
                    f"at step {a.step} the SSD needs more than its {capacity} pages per lane",
                    hint="raise --host or --ssd",
                )
            out.spilled[2] += self.lanes.by_layer(down)
            self._note(out, "store", 2, down)
            t.copies[down] |= SSD
            t.copies[gone] &= ~np.uint8(bit)

    # -- small things ------------------------------------------------------------------------------------------

    def _wish(self, hook: str, *arguments: Any) -> np.ndarray:
        """Mask [lanes, slots] that an optional hook of the offload policy asks for."""
        chosen = self.lanes.call(hook, *arguments, of=self.offload, optional=True)
        if chosen is None:
            return np.zeros(self.lanes.table.key.shape, bool)
        return self.lanes.broadcast(chosen, hook, np.bool_, of=self.offload)

    def _note(self, out: Outcome, action: str, tier: int, mask: np.ndarray) -> None:
        if self.record and mask.any():
            lane, slot = np.nonzero(mask)
            out.moved.append(Move(action, tier, lane // self.lanes.shape[1], self.lanes.table.key[lane, slot]))
