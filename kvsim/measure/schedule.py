"""What the executor does to a layer, in which order, and the steps made up for it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvsim.errors import ConfigError
from kvsim.measure.disk import PageFile
from kvsim.measure.streams import Event, Stream
from kvsim.plan import HOST, Moves, loads

if TYPE_CHECKING:
    from torch import Tensor

KNOWN = ("start", "layer")
METHODS = ("runs", "page")


@dataclass(frozen=True)
class Schedule:
    """How a plan is performed.

    `depth`: layers whose loaded pages the device holds at once. `known`: what a layer loads is known at the "start" of
    the step, or to the host only once the "layer" before has ended. `method`: "runs" copies neighbouring pages
    together, "page" each by itself.
    """

    depth: int = 2
    known: str = "start"
    method: str = "runs"

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ConfigError(f"a staging depth of {self.depth}", hint="it counts layers, from 1")
        for name, value, known in (("known", self.known, KNOWN), ("method", self.method, METHODS)):
            if value not in known:
                raise ConfigError(f'unknown {name} "{value}"', hint=f"use {' or '.join(known)}")

    @property
    def ahead(self) -> int:
        """Layers between the one whose end lets copies start and the one they are for."""
        return self.depth if self.known == "start" else 1


DEFAULT = Schedule()


@dataclass(frozen=True)
class Read:
    """A piece of the file: where it starts, the memory it is read into, and the copy (destination, source) it feeds."""

    offset: int
    into: memoryview
    pair: tuple[Tensor, Tensor]


@dataclass
class Layer:
    """One layer of a step: copies as (destination, source), and bytes (start, stop) to write to the SSD."""

    loads: list[tuple[Tensor, Tensor]]
    reads: list[Read]
    stores: list[tuple[Tensor, Tensor]]
    writes: list[tuple[int, int]]
    arrivals: Arrivals | None = None  # while the step runs

    @property
    def moves_in(self) -> bool:
        return bool(self.loads or self.reads)

    @property
    def copies_in(self) -> list[tuple[Tensor, Tensor]]:
        return [*self.loads, *(read.pair for read in self.reads)]


class Arrivals:
    """The pages of one layer that come from the SSD: read once `gate` is open, copied on as they arrive, in any order.

    `begun` (None: something else began) and `loaded` are recorded around the copies; `all_submitted` is set then.
    """

    def __init__(self, copy: Stream, gate: Event, reads: int, begun: Event | None, loaded: Event):
        self.copy, self.gate, self.begun, self.loaded = copy, gate, begun, loaded
        self.left, self.open = reads, False
        self.all_submitted, self._lock, self._at_gate = threading.Event(), threading.Lock(), threading.Lock()

    def bring(self, disk: PageFile, read: Read) -> None:
        """Read one piece and submit its copy."""
        arrived = False
        try:
            with self._at_gate:  # one thread waits for the device, the others for it
                if not self.open:
                    self.gate.synchronize()
                    self.open = True
            disk.read(read.offset, read.into)
            arrived = True
        finally:
            with self._lock:
                self.left -= 1
                try:
                    self._submit(read, arrived)
                finally:  # whoever waits for the copies goes on even if the device took none
                    if not self.left:
                        self.all_submitted.set()

    def _submit(self, read: Read, arrived: bool) -> None:
        if self.begun is not None:
            self.begun.record(self.copy)
            self.begun = None
        if arrived:
            destination, source = read.pair
            self.copy.submit(partial(destination.copy_, source, non_blocking=True))
        if not self.left:
            self.loaded.record(self.copy)


def page_runs(pages: np.ndarray, longest: int | None = None) -> list[tuple[int, int]]:
    """Runs (first, stop) of neighbours among ascending page numbers, cut after `longest` pages."""
    if not len(pages):
        return []
    cuts = np.flatnonzero(np.diff(pages) != 1) + 1
    first, last = pages[np.r_[0, cuts]], pages[np.r_[cuts, len(pages)] - 1]
    runs = list(zip(first.tolist(), (last + 1).tolist(), strict=True))
    if longest is None:
        return runs
    return [(first, min(first + longest, stop)) for start, stop in runs for first in range(start, stop, longest)]


def synthetic_moves(
    layers: int, pages: int, resident: float, *, clustered: bool = True, seed: int = 0, tier: int = HOST
) -> Sequence[Moves]:
    """One step that loads the same number of pages in every layer, round(pages * (1 - resident)), chosen by `seed`.

    `clustered`: the pages come in groups of eight neighbours (some of which touch), else each by itself.
    """
    rng = np.random.default_rng(seed)
    missing, group = round(pages * (1.0 - resident)), 8 if clustered else 1

    def chosen() -> np.ndarray:
        starts = rng.permutation(-(-pages // group)) * group
        picked = (starts[:, None] + np.arange(group)).ravel()
        return picked[picked < pages][:missing]

    return [loads(chosen(), tier) for _ in range(layers)]
