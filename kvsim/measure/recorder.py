"""Turns attention calls into the rows and prompt statistics a trace stores; knows no model.

`Recorder.observe` is the whole interface: the hooks of `kvsim.measure.hooks` call it for Hugging Face models and
for SDPA, and a custom kernel can call it itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvsim.measure import CaptureError
from kvsim.measure.weights import Call, output

HEADS = ("mean", "max", "query")
Spans = Sequence[Sequence[tuple[int, int]]]  # per batch row: [start, end) in key columns


@dataclass
class Vectors:
    """q [batch, query heads, rows, dim], k and v [batch, KV heads, rows, dim] of the new tokens, float16."""

    q: Tensor
    k: Tensor
    v: Tensor


class DecodeRow:
    """The row of one decode step in one layer. `mean`, `peak`: float32 [batch, heads, keys]; `sink`: [batch, heads].

    `peak` (with heads = "max") is the largest weight of a query head of the group; `sink` exists where the
    layer has learned sinks. `kv_lo`: token of key column 0.
    """

    def __init__(self, layer: int, call: Call, heads: str):
        self.layer, self._heads = layer, heads
        self.kv_lo = call.visible_from(0)
        self._cut = self.kv_lo - call.first_key
        self.mean: Tensor
        self.peak: Tensor | None = None
        self.sink: Tensor | None = None
        self.vectors: Vectors | None = None

    def add(self, first: int, weights: Tensor, sink: Tensor | None) -> None:
        row = weights[:, :, :, 0, self._cut :]
        self.mean = _reduced(row, self._heads)
        if self._heads == "max":
            self.peak = row.amax(2)
        if sink is not None:
            self.sink = _reduced(sink[..., 0], self._heads)

    def close(self) -> None:
        """Nothing is left to do: the row stays on its device until the runner fetches a chunk of them."""


class PromptLayer:
    """What prefill showed in one layer.

    `colsum`, `colsq`, `colmax`: float32 [batch, heads, keys], sum, sum of squares and largest of the stored
    (reduced) weight over all rows. `rows`, `peaks`: [batch, heads, last rows, keys]; `sinks`: [batch, heads, last
    rows]. `spans`: per batch row, float32 [spans, heads, keys], column sums over the rows of each span.
    `visible`: first visible token per stored row.
    """

    def __init__(self, layer: int, call: Call, heads: str, keep: int | None, spans: Spans):
        self.layer, self._heads, self._keys = layer, heads, call.keys
        self._keep = call.rows if keep is None else min(keep, call.rows)
        self._first_kept = call.rows - self._keep
        self.visible = [call.visible_from(r) for r in range(self._first_kept, call.rows)]
        count = call.q.shape[1] if heads == "query" else call.kv_heads
        shape, device = (call.q.shape[0], count, call.keys), call.k.device
        self.colsum, self.colsq, self.colmax = (torch.zeros(shape, device=device) for _ in range(3))
        self.spans = [torch.zeros(len(s), count, call.keys, device=device) for s in spans]
        self._span_rows = spans
        self._rows: list[Tensor] = []
        self._peaks: list[Tensor] = []
        self._sinks: list[Tensor] = []
        self.vectors: Vectors | None = None

    def add(self, first: int, weights: Tensor, sink: Tensor | None) -> None:
        mean = _reduced(weights, self._heads)  # [batch, heads, rows, keys]
        keys = mean.shape[-1]
        self.colsum[..., :keys] += mean.sum(2)
        self.colsq[..., :keys] += mean.square().sum(2)
        torch.maximum(self.colmax[..., :keys], mean.amax(2), out=self.colmax[..., :keys])
        self._add_spans(first, mean)
        kept = slice(max(0, self._first_kept - first), None)
        if kept.start >= mean.shape[2]:
            return
        self._rows.append(self._widened(mean[:, :, kept]))
        if self._heads == "max":
            self._peaks.append(self._widened(weights.amax(2)[:, :, kept]))
        if sink is not None:
            self._sinks.append(_reduced(sink, self._heads)[:, :, kept].cpu())

    def _add_spans(self, first: int, mean: Tensor) -> None:
        rows, keys = mean.shape[2:]
        for b, spans in enumerate(self._span_rows):
            for i, (start, end) in enumerate(spans):
                inside = slice(max(start - first, 0), min(max(end - first, 0), rows))
                self.spans[b][i, :, :keys] += mean[b, :, inside].sum(1)

    def _widened(self, rows: Tensor) -> Tensor:
        """Rows over all keys, off the device: many last rows would be the largest thing on it."""
        return torch.nn.functional.pad(rows.cpu(), (0, self._keys - rows.shape[-1]))

    def close(self) -> None:
        """Leave the device: everything is on the CPU from here on."""
        self.colsum, self.colsq, self.colmax = self.colsum.cpu(), self.colsq.cpu(), self.colmax.cpu()
        self.spans = [x.cpu() for x in self.spans]
        self.rows = torch.cat(self._rows, 2)
        self.peaks = torch.cat(self._peaks, 2) if self._peaks else None
        self.sinks = torch.cat(self._sinks, 2) if self._sinks else None
        self._rows, self._peaks, self._sinks = [], [], []


class Recorder:
    """Collects what attention computes, forward pass by forward pass; `take` hands it over.

    `heads`: "mean" averages the query heads of a group, "max" stores their largest weight beside it, "query"
    keeps every query head. `prompt_rows`: how many of the last prompt rows are kept (None: all). `row_block`:
    prompt rows computed at once. Rows are those of the *current* query positions: a pass that adds several
    tokens to an empty cache is the prompt, a pass that adds one token to a filled cache is a decode step.

    `on_prompt`, where set, is handed each layer of a prompt as soon as it is done, instead of `take`.
    """

    def __init__(
        self, *, heads: str = "mean", prompt_rows: int | None = 64, vectors: bool = False, row_block: int = 64
    ):
        if heads not in HEADS:
            raise CaptureError(f'unknown reduction "{heads}"', hint='use "mean", "max" or "query"')
        if row_block < 1 or (prompt_rows is not None and prompt_rows < 1):
            hint = "the last prompt row is always stored"
            raise CaptureError("prompt rows and row blocks are counted from 1", hint=hint)
        self.heads, self.prompt_rows, self.vectors, self.row_block = heads, prompt_rows, vectors, row_block
        self.spans: Spans = ()
        self.on_prompt: Callable[[PromptLayer], None] | None = None
        self.features: dict[int, dict] = {}  # layer -> window, softcap, sinks, heads: what the model turned out to use
        self.begin(None)
        self._notes: list[DecodeRow | PromptLayer] = []

    def begin(self, past: int | None) -> None:
        """A forward pass starts; `past` tokens are in the cache (None: as many as there are keys beyond the rows)."""
        self.past = past
        self.seen: set[int] = set()

    def observe(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
        *,
        v: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        causal: bool = True,
        window: int | None = None,
        compute: bool = False,
    ) -> Tensor | None:
        """Record one attention call; shapes and meanings as in `Call`.

        `scale` None is dim**-0.5. With `compute`, also returns the attention output [batch, rows, query heads,
        dim] from the same weights (needs `v`). Raises CaptureError for a layer seen twice in one pass, and for
        a prompt that is fed in pieces.
        """
        _refuse_graphs(q)
        if layer in self.seen:
            hint = "only decoder-only models can be captured"
            raise CaptureError(f"layer {layer} attends twice in one forward pass", hint=hint)
        self.seen.add(layer)
        past = k.shape[2] - q.shape[2] if self.past is None else self.past
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        with torch.no_grad():
            call = Call(q, k, mask, scale, past, softcap, sinks, causal, window).trimmed()
            return self._record(layer, call, v, compute)

    def _record(self, layer: int, call: Call, v: Tensor | None, compute: bool) -> Tensor | None:
        note = self._note(layer, call)
        outputs = []
        for first, weights, sink in call.blocks(self.row_block):
            note.add(first, weights, sink)
            if compute and v is not None:
                outputs.append(output(call, v, weights))
        if self.vectors and v is not None:
            new = slice(call.keys - call.rows, call.keys)
            v = v[:, :, : call.keys]
            note.vectors = Vectors(*(x.to(torch.float16, copy=True) for x in (call.q, call.k[:, :, new], v[:, :, new])))
        note.close()
        if self.on_prompt and isinstance(note, PromptLayer):
            self.on_prompt(note)
        else:
            self._notes.append(note)
        return torch.cat(outputs, 1) if outputs else None

    def _note(self, layer: int, call: Call) -> DecodeRow | PromptLayer:
        self.features[layer] = {
            "window": call.window,
            "softcap": call.softcap,
            "sinks": call.sinks is not None,
            "query_heads": call.q.shape[1],
            "kv_heads": call.kv_heads,
            "head_dim": call.q.shape[-1],
        }
        if call.past == 0:
            return PromptLayer(layer, call, self.heads, self.prompt_rows, self.spans)
        if call.rows > 1:
            raise CaptureError(
                f"{call.rows} tokens were added to a cache that holds {call.past}",
                hint="feed the prompt in one piece, then one token per step",
            )
        return DecodeRow(layer, call, self.heads)

    def take(self) -> list[Any]:
        """The DecodeRows and PromptLayers recorded since the last call, in layer order; they are forgotten here."""
        notes, self._notes = self._notes, []
        return sorted(notes, key=lambda n: n.layer)


def _reduced(weights: Tensor, heads: str) -> Tensor:
    """[batch, KV heads, group, ...] -> [batch, heads, ...]; query head h is number h % group of KV head h // group."""
    return weights.flatten(1, 2) if heads == "query" else weights.mean(2)


def _refuse_graphs(q: Tensor) -> None:
    if torch.compiler.is_compiling() or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        raise CaptureError("attention runs inside a compiled or captured graph", hint="run the model eagerly")
