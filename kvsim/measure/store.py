"""Carries a batch's rows from the recorder to the trace writer: per request, padding removed, a chunk at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from kvsim.measure.prompts import Prompt
from kvsim.measure.recorder import DecodeRow, PromptLayer, Vectors
from kvsim.trace import TraceWriter
from kvsim.trace.layout import PARQUET, spans_name

CHUNK_BYTES = 64 << 20  # of decode rows that wait on the device
CHUNK_STEPS = 32


class Store:
    """Writes one batch. `first`: number of its first request; `layers`: layer number -> place in the trace.

    A column c of the batch is position c - pad of the request. Decode rows wait on their device until a chunk
    is full, then cross in one copy per kind of number.
    """

    def __init__(
        self, writer: TraceWriter, first: int, prompts: Sequence[Prompt], pads: Sequence[int], layers: dict[int, int]
    ):
        self.writer, self.first, self.prompts, self.pads, self.layers = writer, first, prompts, pads, layers
        self._waiting: list[tuple[int, list[int], list[DecodeRow]]] = []
        self._bytes = 0
        self._spans: list[list[tuple[int, np.ndarray]]] = [[] for _ in prompts]  # per request: (layer, sums)

    def columns_of_spans(self) -> list[list[tuple[int, int]]]:
        """Per request, the batch columns of its spans; empty if no request has any."""
        spans = [[(s + pad, e + pad) for s, e, _ in p.spans] for p, pad in zip(self.prompts, self.pads, strict=True)]
        return spans if any(spans) else []

    def prompt(self, note: PromptLayer) -> None:
        """One layer of the prompt: statistics, last rows, spans, vectors."""
        layer = self.layers[note.layer]
        for b, pad in enumerate(self.pads):
            stats = (s[b, :, pad:].numpy() for s in (note.colsum, note.colsq, note.colmax))
            self.writer.prompt(self.first + b, layer, *stats)
            if note.spans and len(note.spans[b]):
                self._spans[b].append((layer, note.spans[b][:, :, pad:].numpy()))
            self._prompt_rows(b, pad, layer, note)
        if note.vectors:
            self._vectors(0, layer, range(len(self.pads)), [x.cpu().numpy() for x in _parts(note.vectors)])

    def _prompt_rows(self, b: int, pad: int, layer: int, note: PromptLayer) -> None:
        kept, columns = note.rows.shape[2:]
        for back in range(1, min(kept, columns - pad) + 1):
            at = kept - back
            low, high = max(note.visible[at], pad), columns - back + 1
            row = note.rows[b, :, at, low:high].numpy()
            peak = None if note.peaks is None else note.peaks[b, :, at, low:high].numpy()
            sink = None if note.sinks is None else note.sinks[b, :, at].numpy()
            self.writer.row(self.first + b, -back, layer, low - pad, row, peak, sink)

    def step(self, step: int, alive: list[int], rows: list[DecodeRow]) -> None:
        """The rows of one decode step; only those of the requests `alive` are written."""
        self._waiting.append((step, alive, rows))
        self._bytes += sum(x.nbytes for note in rows for x in _tensors(note))
        if len(self._waiting) >= CHUNK_STEPS or self._bytes >= CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write all rows that wait."""
        arrays = iter(_fetched([x for _, _, rows in self._waiting for note in rows for x in _tensors(note)]))
        for step, alive, rows in self._waiting:
            for note in rows:
                layer = self.layers[note.layer]
                mean, peak, sink = (None if x is None else next(arrays) for x in (note.mean, note.peak, note.sink))
                for b in alive:
                    low = max(note.kv_lo, self.pads[b])
                    row, top = (None if x is None else x[b, :, low - note.kv_lo :] for x in (mean, peak))
                    lost = None if sink is None else sink[b]
                    self.writer.row(self.first + b, step, layer, low - self.pads[b], row, top, lost)
                if note.vectors:
                    self._vectors(step, layer, alive, [next(arrays) for _ in _parts(note.vectors)])
        self._waiting, self._bytes = [], 0

    def _vectors(self, step: int, layer: int, alive: Sequence[int], arrays: list[np.ndarray]) -> None:
        for b in alive:
            skip = self.pads[b] if step == 0 else 0
            q, k, v = (x[b, :, skip:] for x in arrays)
            past = 0 if step == 0 else self.prompts[b].prompt_len + step - 1
            self.writer.vectors(self.first + b, step, layer, np.arange(past, past + q.shape[1]), q, k, v)

    def write_spans(self, b: int) -> None:
        """`spans-<request>.parquet`: per span, layer and head the column sums over the span's rows, float32."""
        if not self._spans[b]:
            return
        lines = [
            {"span": i, "start": start, "end": end, "name": name, "layer": layer, "head": head, "colsum": row.tobytes()}
            for layer, sums in self._spans[b]
            for i, (start, end, name) in enumerate(self.prompts[b].spans)
            for head, row in enumerate(sums[i])
        ]
        types = {"span": pa.int32(), "start": pa.int32(), "end": pa.int32(), "layer": pa.int16(), "head": pa.int16()}
        columns = {key: pa.array([line[key] for line in lines], types.get(key)) for key in lines[0]}
        path = self.writer.partial / spans_name(self.first + b)
        pq.write_table(pa.table(columns), path, compression=PARQUET["compression"])


def _parts(vectors: Vectors) -> tuple[Tensor, Tensor, Tensor]:
    return vectors.q, vectors.k, vectors.v


def _tensors(note: DecodeRow) -> list[Tensor]:
    """The tensors of a row in the order `flush` reads them back."""
    vectors = _parts(note.vectors) if note.vectors else ()
    return [x for x in (note.mean, note.peak, note.sink, *vectors) if x is not None]


def _fetched(tensors: list[Tensor]) -> list[np.ndarray]:
    """The tensors as NumPy arrays; those on a device cross in one copy per number type."""
    out: list[np.ndarray] = [None] * len(tensors)  # type: ignore[list-item]
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        mine = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        away = [i for i in mine if tensors[i].device.type != "cpu"]
        for i in set(mine) - set(away):
            out[i] = tensors[i].numpy()
        if away:
            home = tensors[away[0]].device
            flat = torch.cat([tensors[i].reshape(-1).to(home) for i in away]).cpu().numpy()
            ends = np.cumsum([tensors[i].numel() for i in away])
            for i, part in zip(away, np.split(flat, ends[:-1]), strict=True):
                out[i] = part.reshape(tensors[i].shape)
    return out
