"""Really performs a movement plan: copies its pages, computes the layers that wait for them, and says when each ended.

All buffers exist on the device (`Bare`), and twins of the KV in host memory and in a file; a plan's copies go into the
slots they belong to. So capacity is pretended, while traffic and dependencies are real. The order is that of
`kvsim.machine.pipeline`: layer l's copies start when layer l - depth has ended (when l - 1 has, if what to load is
only known then), and layer l computes after its copies.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from kvsim.errors import ConfigError, KvsimError
from kvsim.measure.bare import Bare, Shape
from kvsim.measure.disk import PageFile, Workers
from kvsim.measure.schedule import DEFAULT, Arrivals, Layer, Read, Schedule, page_runs, synthetic_moves
from kvsim.measure.streams import Device, Event
from kvsim.plan import HOST, LOAD, SSD, STORE, Moves, Plan, loads, mapped

if TYPE_CHECKING:
    from torch import Tensor

READ_BYTES = 1 << 20  # a longer run of pages is read from the SSD in pieces of at most this
READERS = 16  # threads that read from the SSD
UNMOVED = Schedule(1)


class MoveError(KvsimError):
    """Pages are not where the plan says they are."""


@dataclass(frozen=True)
class StepTimes:
    """One performed step; arrays are [layers].

    `wall_s`: from the first submission until the tokens are in host memory; `device_s`: the same by the device's
    stamps. `layer_end_s`, `copy_start_s`, `copy_end_s`: stamps since the start; nan where nothing was loaded. `copies`,
    `bytes`: what went to the device, and `stored_copies`, `stored_bytes` from it.
    """

    wall_s: float
    device_s: float
    layer_end_s: np.ndarray
    copy_start_s: np.ndarray
    copy_end_s: np.ndarray
    copies: np.ndarray
    bytes: np.ndarray
    stored_copies: np.ndarray
    stored_bytes: np.ndarray


@dataclass(frozen=True)
class Check:
    """What a check found: pages compared, (layer, page) of those that differ, and whether the output was the same."""

    pages: int
    wrong: list[tuple[int, int]]
    same_output: bool

    @property
    def ok(self) -> bool:
        return self.same_output and not self.wrong


class Executor:
    """A model on a device, its KV in pages of `page` tokens, and the tiers that pages come from.

    Pages are counted over all sequences: sequence b has pages b * context / page and on. `folder`: where the SSD tier's
    file is made, once it is needed. A context manager; the device stays open. Raises ConfigError for a context that
    is not a whole number of pages.
    """

    def __init__(
        self,
        device: Device,
        shape: Shape,
        sequences: int,
        context: int,
        page: int = 16,
        *,
        seed: int = 0,
        folder: str | os.PathLike | None = None,
    ):
        if min(sequences, context, page) < 1 or context % page:
            raise ConfigError(f"a context of {context} tokens is no whole number of pages of {page}")
        self.device, self.shape, self.page, self.folder = device, shape, page, folder
        self.model = Bare(shape, sequences, context, device.place, seed)
        self.pages, self.page_bytes = sequences * context // page, page * shape.token_bytes
        self._kv = [_bytes(kv) for kv in self.model.kv]
        self._twin = [device.host_bytes(kv.numel()) for kv in self._kv]
        self._token = device.host_bytes(_bytes(self.model.token).numel()).view(self.model.token.dtype)
        *self._layers, self._tail = device.compiled(self.model.parts())
        self._start, self._end = device.event(), device.event()
        self._begun, self._loaded, self._ended = ([device.event() for _ in range(shape.layers)] for _ in range(3))
        self._staging: list[Tensor] = []
        self._file: PageFile | None = None
        self._workers: Workers | None = None
        self._refresh_twins()

    def close(self) -> None:
        """End the threads and give the file back."""
        if self._workers is not None:
            self._workers.close()
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- one step ------------------------------------------------------------------------------------------------

    def step(self, moves: Sequence[Moves], schedule: Schedule = DEFAULT) -> StepTimes:
        """Perform one step: `moves` of each layer. Waits for its write-backs, too, after the clock has stopped."""
        layers = self._prepare(moves, schedule)
        wall = self._perform(layers, schedule)
        self.synchronize()
        return self._times(wall, layers)

    def synchronize(self) -> None:
        """Wait for all that was submitted. Raises what went wrong in it."""
        self.device.synchronize()
        if self._workers is not None:
            self._workers.synchronize()

    def _perform(self, layers: Sequence[Layer], schedule: Schedule) -> float:
        """Wall seconds of one step; its stamps are in the events until the next."""
        compute, fetched = self.device.compute, 0
        began = time.perf_counter()
        self._start.record(compute)
        for number in range(len(layers)):
            while fetched < min(number + schedule.ahead, len(layers)):
                self._fetch(layers[fetched], fetched, schedule)
                fetched += 1
            self._launch(layers[number], number)
        compute.submit(self._finish)
        self._end.record(compute)
        self._end.synchronize()
        return time.perf_counter() - began

    def _fetch(self, layer: Layer, number: int, schedule: Schedule) -> None:
        """Submit the copies of a layer; those from the SSD follow as they are read."""
        copy, before = self.device.copy, number - schedule.ahead
        gate = self._start if before < 0 else self._ended[before]
        if schedule.known == "layer" and layer.moves_in:
            gate.synchronize()  # the host chooses what to copy by what the layer before computed
        if layer.loads:
            copy.wait(gate)
            self._begun[number].record(copy)
            copy.submit(partial(_copy, layer.loads))
        if layer.reads:
            begun = None if layer.loads else self._begun[number]
            layer.arrivals = Arrivals(copy, gate, len(layer.reads), begun, self._loaded[number])
            for read in layer.reads:
                self._pool.put(partial(layer.arrivals.bring, self._disk, read))
        elif layer.loads:
            self._loaded[number].record(copy)

    def _launch(self, layer: Layer, number: int) -> None:
        """Submit a layer's compute behind its copies, and its write-backs behind that."""
        compute, back = self.device.compute, self.device.write_back
        if layer.arrivals is not None:
            layer.arrivals.all_submitted.wait()
        if layer.moves_in:
            compute.wait(self._loaded[number])
        compute.submit(self._layers[number])
        self._ended[number].record(compute)
        if layer.stores:
            back.wait(self._ended[number])
            back.submit(partial(_copy, layer.stores))
        if layer.writes:
            stored = self.device.event()
            stored.record(back)
            self._pool.put(partial(self._write, number, layer.writes, stored))

    def _finish(self) -> None:
        self._tail()
        self._hand_over()

    def _hand_over(self) -> None:
        self._token.copy_(self.model.token, non_blocking=True)

    def _write(self, layer: int, writes: Sequence[tuple[int, int]], stored: Event) -> None:
        """Bring pages that have come back to host memory to the SSD."""
        stored.synchronize()
        twin = self._twin[layer].numpy().data
        for start, stop in writes:
            self._disk.write(layer, start, twin[start:stop])

    def _times(self, wall_s: float, layers: Sequence[Layer]) -> StepTimes:
        """What the events of the step that was just performed say."""

        def stamps(events: Sequence[Event], loading: bool) -> np.ndarray:
            pairs = zip(events, layers, strict=True)
            return np.array([e.seconds_since(self._start) if x.moves_in or not loading else np.nan for e, x in pairs])

        return StepTimes(
            wall_s=wall_s,
            device_s=self._end.seconds_since(self._start),
            layer_end_s=stamps(self._ended, False),
            copy_start_s=stamps(self._begun, True),
            copy_end_s=stamps(self._loaded, True),
            copies=np.array([len(x.copies_in) for x in layers]),
            bytes=np.array([_size(x.copies_in) for x in layers]),
            stored_copies=np.array([len(x.stores) for x in layers]),
            stored_bytes=np.array([_size(x.stores) for x in layers]),
        )

    # -- what a step copies, made ready before the clock starts --------------------------------------------------

    def _prepare(self, moves: Sequence[Moves], schedule: Schedule) -> list[Layer]:
        if len(moves) != self.shape.layers:
            raise ConfigError(f"moves of {len(moves)} layers for a model of {self.shape.layers}", hint="map the plan")
        for number, m in enumerate(moves):
            if len(m.page) and not 0 <= m.page.min() <= m.page.max() < self.pages:
                raise ConfigError(f"layer {number} moves pages beyond the model's {self.pages}", hint="map the plan")
        return [self._prepare_layer(number, m, schedule) for number, m in enumerate(moves)]

    def _prepare_layer(self, number: int, moves: Moves, schedule: Schedule) -> Layer:
        kv, twin = self._kv[number], self._twin[number]
        to_load, to_read = self._spans_in(moves, schedule)
        back = np.union1d(moves.pages(STORE, HOST), moves.pages(STORE, SSD))  # both cross the link
        return Layer(
            loads=[(kv[a:z], twin[a:z]) for a, z in to_load],
            reads=self._prepare_reads(number, to_read, schedule) if to_read else [],
            stores=[(twin[a:z], kv[a:z]) for a, z in self._spans(back, schedule)],
            writes=self._spans(moves.pages(STORE, SSD), schedule),
        )

    def _spans_in(self, moves: Moves, schedule: Schedule) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Bytes (start, stop) of each copy to the device: from host memory, and from the SSD."""
        longest = max(1, READ_BYTES // self.page_bytes)
        to_load, to_read = moves.pages(LOAD, HOST), moves.pages(LOAD, SSD)
        return self._spans(to_load, schedule), self._spans(to_read, schedule, longest)

    def _spans(self, pages: np.ndarray, schedule: Schedule, longest: int | None = None) -> list[tuple[int, int]]:
        runs = page_runs(pages, 1 if schedule.method == "page" else longest)
        return [(first * self.page_bytes, stop * self.page_bytes) for first, stop in runs]

    def _prepare_reads(self, number: int, spans: Sequence[tuple[int, int]], schedule: Schedule) -> list[Read]:
        """Pieces of the file and where they go. Layers a staging depth apart share pinned memory."""
        pieces = [self._disk.span(number, *span) for span in spans]
        staging = self._staged(number % schedule.ahead, sum(length for _, length, _ in pieces))
        reads, used = [], 0
        for (start, stop), (offset, length, skip) in zip(spans, pieces, strict=True):
            piece = staging[used : used + length]
            pair = self._kv[number][start:stop], piece[skip : skip + stop - start]
            reads.append(Read(offset, piece.numpy().data, pair))
            used += length
        return reads

    def _staged(self, slot: int, size: int) -> Tensor:
        """Pinned memory of at least `size` bytes for one of the layers in flight."""
        while len(self._staging) <= slot:
            self._staging.append(self.device.host_bytes(0))
        if self._staging[slot].numel() < size:
            self._staging[slot] = self.device.host_bytes(size)
        return self._staging[slot]

    @property
    def _disk(self) -> PageFile:
        if self._file is None:
            self._file = PageFile([twin.numpy() for twin in self._twin], self.folder)
        return self._file

    @property
    def _pool(self) -> Workers:
        if self._workers is None:
            self._workers = Workers(READERS)
        return self._workers

    # -- content -------------------------------------------------------------------------------------------------

    def check(
        self, moves: Sequence[Moves], schedule: Schedule = DEFAULT, absent: Sequence[np.ndarray] | None = None
    ) -> Check:
        """Perform a step on poisoned pages and compare: the content of every page it moves, and its output, bit by bit.

        `absent`: pages per layer that are not on the device before the step, NaN therefore (None: those it loads). One
        that the moves forget spoils the output. The twins of pages that are stored, and not loaded, are poisoned too.
        """
        model, numbers = self.model, range(self.shape.layers)
        layers, token = self._prepare(moves, schedule), model.token.clone()
        self.synchronize()
        self._perform(self._prepare([loads([]) for _ in numbers], schedule), schedule)
        self._refresh_twins()
        wanted, kept = model.logits.clone(), [kv.clone() for kv in self._kv]
        loaded = [m.page[m.action == LOAD] for m in moves]
        lost = loaded if absent is None else absent
        safe = [np.union1d(a, b) for a, b in zip(loaded, lost, strict=True)]
        stored = [np.setdiff1d(m.page[m.action == STORE], pages) for m, pages in zip(moves, safe, strict=True)]
        for number in numbers:
            self._poison(self._kv[number], lost[number])
            self._poison(self._twin[number], stored[number])
        model.token.copy_(token)
        self.synchronize()
        self._perform(layers, schedule)
        self.synchronize()
        moved = [np.union1d(a, b) for a, b in zip(loaded, stored, strict=True)]
        wrong = [(number, page) for number in numbers for page in self._differing(number, moved[number])]
        found = Check(sum(map(len, moved)), wrong, bool(model.logits.equal(wanted)))
        if not found.ok:
            for kv, content in zip(self._kv, kept, strict=True):
                kv.copy_(content)
            self._refresh_twins()
        return found

    def _refresh_twins(self) -> None:
        """The twins hold what the device holds, the newest tokens among it."""
        self.synchronize()
        for twin, kv in zip(self._twin, self._kv, strict=True):
            twin.copy_(kv)
        self.synchronize()

    def _poison(self, buffer: Tensor, pages: np.ndarray) -> None:
        self._lines(buffer)[pages.tolist()] = float("nan")

    def _differing(self, number: int, pages: np.ndarray) -> list[int]:
        """Those of the pages whose content is not that of their twin, or is no number."""
        kv, twin = self._kv[number], self._twin[number].to(self._kv[number].device)
        same = (self._lines(kv)[pages.tolist()] == self._lines(twin)[pages.tolist()]).all(1)
        return pages[~same.cpu().numpy()].tolist()

    def _lines(self, buffer: Tensor) -> Tensor:
        """The numbers of a buffer, a page a line."""
        return buffer.view(self.model.dtype).view(self.pages, -1)

    # -- many steps ----------------------------------------------------------------------------------------------

    def run(
        self,
        moves: Sequence[Sequence[Moves]],
        schedule: Schedule = DEFAULT,
        *,
        steps: int = 20,
        warm_up: int = 5,
        **facts: Any,
    ) -> dict[str, Any]:
        """Check the one of `moves` with the most pages, then time `steps` steps that take them in turn.

        `warm_up` others come first.

        Returns a row without its key: phase, kind, params (`facts` among them), ms, gpu_ms, layer_ms. Raises MoveError
        when pages or output come out wrong.
        """
        found = self.check(max(moves, key=lambda step: sum(len(m.page) for m in step)), schedule)
        if not found.ok:
            output = "right" if found.same_output else "wrong"
            raise MoveError(f"{len(found.wrong)} of {found.pages} pages came out wrong, the output is {output}")
        ready, times = [self._prepare(m, schedule) for m in moves], []
        turns = [i % len(moves) for i in range(warm_up + steps)]
        for i in turns:
            wall = self._perform(ready[i], schedule)
            times.append(self._times(wall, ready[i]))
        self.synchronize()
        times = times[warm_up:]
        params = self._params([moves[i] for i in turns[warm_up:]], "layer", schedule, [t.copies for t in times])
        params |= {"checked_pages": found.pages, **facts}
        ends = np.median([t.layer_end_s for t in times], axis=0)
        return _row(params, [t.wall_s for t in times], [t.device_s for t in times], ends)

    def run_synthetic(
        self,
        resident: float,
        schedule: Schedule = DEFAULT,
        *,
        clustered: bool = True,
        tier: int = HOST,
        seed: int = 0,
        variants: int = 3,
        **run: Any,
    ) -> dict[str, Any]:
        """Run steps that load a fixed share of each layer's pages, in `variants` different choices by turns."""
        size = self.shape.layers, self.pages, resident
        moves = [synthetic_moves(*size, clustered=clustered, seed=seed + i, tier=tier) for i in range(variants)]
        return self.run(moves, schedule, clustered=clustered, **run)

    def run_plan(
        self,
        plan: Plan,
        schedule: Schedule = DEFAULT,
        *,
        first: int | None = None,
        steps: int = 20,
        warm_up: int = 5,
        **facts: Any,
    ) -> dict[str, Any]:
        """Run consecutive steps of an exported plan, mapped onto this model and all its sequences.

        `first`: the first step, which begins the warm-up (None: so that the plan's last step is run last). Raises
        ConfigError for another page size, or steps that the plan does not have.
        """
        info, total = plan.info, warm_up + steps
        first = info.steps - total if first is None else first
        if info.page_size != self.page:
            hint = f"measure with pages of {info.page_size}"
            raise ConfigError(f"the plan has pages of {info.page_size} tokens, the executor of {self.page}", hint=hint)
        if not 0 <= first <= info.steps - total:
            what = f"the plan has {info.steps} steps; {total} from step {first} on are asked for"
            raise ConfigError(what, hint="ask for fewer steps")
        here = self.fitted(plan.window(first, first + total))
        facts = {"plan": plan.fingerprint, "policy": info.policy, "mapped": here.info.mapped, **facts}
        moves = [here.step(first + i) for i in range(total)]
        return self.run(moves, schedule, steps=steps, warm_up=warm_up, first_step=first + warm_up, **facts)

    def fitted(self, plan: Plan) -> Plan:
        """The plan on this executor's geometry, all sequences counted as one context."""
        s, context = self.shape, self.model.sequences * self.model.context
        return mapped(plan, s.layers, s.kv_heads, s.head_dim, context, s.value_bytes)

    def run_whole(self, *, steps: int = 20, warm_up: int = 5, **facts: Any) -> dict[str, Any]:
        """Time the fully resident step in one piece (on CUDA one graph): without the gaps between layers."""
        (whole,) = self.device.compiled([self.model.step])
        compute, times = self.device.compute, []
        for _ in range(warm_up + steps):
            began = time.perf_counter()
            self._start.record(compute)
            compute.submit(whole)
            compute.submit(self._hand_over)
            self._end.record(compute)
            self._end.synchronize()
            times.append((time.perf_counter() - began, self._end.seconds_since(self._start)))
        self.synchronize()
        wall, device = zip(*times[warm_up:], strict=True)
        return _row({**self._params([[loads([])] * self.shape.layers], "step"), **facts}, wall, device, ())

    def _params(
        self,
        moves: Sequence[Sequence[Moves]],
        graph: str,
        schedule: Schedule = UNMOVED,
        copies: Sequence[np.ndarray] | None = None,
    ) -> dict[str, Any]:
        """What was measured: the model, and per layer how many pages, in how many copies, the steps moved on average.

        `copies`: to the device, int [layers] of each step; none where nothing is moved.
        """

        def mean(action: int, tier: int) -> np.ndarray:
            counts = {id(step): [len(m.pages(action, tier)) for m in step] for step in moves}  # few of them differ
            return np.mean([counts[id(step)] for step in moves], axis=0)

        host, ssd, back = mean(LOAD, HOST), mean(LOAD, SSD), mean(STORE, HOST) + mean(STORE, SSD)
        fetched = host + ssd
        return {
            "impl": "executor",
            "model": self.shape.name,
            "shape": self.shape.sizes,
            "sequences": self.model.sequences,
            "context": self.model.context,
            "page": self.page,
            "tier": "ssd" if ssd.any() else "host" if host.any() else None,
            "method": schedule.method,
            "known": schedule.known,
            "depth": schedule.depth,
            "resident": 1.0 - float(fetched.mean()) / self.pages,
            "clustered": None,
            "fetched_pages": fetched.tolist(),
            "copies": [0.0] * self.shape.layers if copies is None else np.mean(copies, axis=0).tolist(),
            "plan": None,
            "policy": None,
            "graph": graph,
            **({"ssd_pages": ssd.tolist(), "direct": self._disk.direct} if ssd.any() else {}),
            **({"stored_pages": back.tolist()} if back.any() else {}),
        }


def _row(
    params: dict[str, Any], wall: Sequence[float], device: Sequence[float], ends: Sequence[float]
) -> dict[str, Any]:
    """A row of measured milliseconds."""
    ms, gpu_ms, layer_ms = ([round(float(s) * 1e3, 5) for s in seconds] for seconds in (wall, device, ends))
    phase = {None: "resident", "host": "offload", "ssd": "ssd"}[params["tier"]]
    return {"phase": phase, "kind": "executor", "params": params, "ms": ms, "gpu_ms": gpu_ms, "layer_ms": layer_ms}


def _bytes(buffer: Tensor) -> Tensor:
    """The memory of a contiguous tensor as one line of bytes."""
    import torch

    return buffer.view(-1).view(torch.uint8)


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for destination, source in pairs:
        destination.copy_(source, non_blocking=True)


def _size(pairs: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(source.numel() for _, source in pairs)
