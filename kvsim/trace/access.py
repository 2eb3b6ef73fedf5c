"""What a trace is: requests, each a sequence of accesses; and the two views, pages and pools.

A step's weights are stored per token and KV head. How coarse the cache looks at them is a property of
the *view*, not of the file: `trace.paged(16)` sums the weights of 16 tokens, `trace.pooled("layer")`
averages over the KV heads of a layer. Every trace, from a file or from memory, yields the same
`Access`, and nothing above this module knows where it came from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kvsim.errors import TraceError
from kvsim.trace.prompt_rows import Rows

POOLS = ("head", "layer", "token")
VECTORS = frozenset({"q", "k", "v"})


@dataclass(frozen=True)
class Geometry:
    """The shape of the cached model, from its configuration.

    Sizes are counts, except `kv_bytes`: bytes of one stored key or value element.
    """

    layers: int
    kv_heads: int
    group: int = 1  # query heads per KV head
    head_dim: int = 64
    kv_bytes: float = 2.0
    hidden: int = 0
    intermediate: int = 0
    vocab: int = 0
    name: str = "unnamed"

    @property
    def token_bytes(self) -> float:
        """Bytes of keys and values of one token in one KV head of one layer."""
        return 2.0 * self.head_dim * self.kv_bytes


@dataclass(frozen=True)
class Prompt:
    """What prefill left behind, in the units of the view (pages and pools already applied).

    `colsum`, `colsq`, `colmax`: float32 [layers, kv_heads, keys], over all prompt rows.
    `rows`: float32 [rows, layers, kv_heads, keys], the last stored prompt rows, oldest first; the last
    one belongs to the last prompt token. `peaks`: the largest single-token weight, same shape. Both may be `Rows`, made
    as they are asked for: a part of them costs what it holds, `rows[:]` all of it.
    `visible`: int32 [rows, layers], tokens each of those rows could see. `spans`: int32 [spans, 2], first token and one
    past the last of each span, and `span_sums`: float32 [spans, layers, kv_heads, keys], column sums over the rows of
    that span alone; None where the trace has no spans.
    """

    colsum: np.ndarray
    colsq: np.ndarray | None
    colmax: np.ndarray | None
    rows: Rows | np.ndarray
    peaks: Rows | np.ndarray
    visible: np.ndarray
    spans: np.ndarray | None = None
    span_sums: np.ndarray | None = None


@dataclass(frozen=True)
class Vectors:
    """q, k (after rotation) and v of some tokens of one layer: [heads, tokens, head_dim]."""

    step: int  # 0 for the prompt
    layer: int
    positions: np.ndarray  # int32 [tokens]: position ids
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray


@dataclass(frozen=True)
class Seen:
    """q, k (after rotation) and v of every token so far, grouped by KV head, in the precision of the trace.

    `q`: [layers, kv_heads, group, tokens, head_dim]; `k`, `v`: [layers, kv_heads, tokens, head_dim]; `positions`: int32
    [tokens], position ids. The last token is the one whose query this step is. Read-only views of buffers that grow.
    `inv_freq`: as `Source.inv_freq`. Where the trace's lanes are query heads, the group is one, and those of a KV head
    show the same k and v.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    positions: np.ndarray
    inv_freq: np.ndarray | None = None


@dataclass(slots=True)
class Access:
    """One step as the cache sees it.

    `row` and `peak` are float32 [layers, kv_heads, stride] over the keys of the request: the summed weight
    of each page, and the largest weight of one of its tokens. They are buffers, overwritten by the next
    access; keys at or beyond `keys` hold zeros. `step` is 0 at prefill and counts decode steps from 1.
    """

    step: int
    row: np.ndarray
    peak: np.ndarray
    keys: int  # keys that exist after this access: 0 .. keys-1
    tokens: int  # tokens that exist after this access
    fresh: int  # how many of the keys, the last ones, were born in this step
    first: np.ndarray  # int32 [layers of the view]: first key the layer's query can see (sliding window)
    visible: np.ndarray  # int32 [layers of the view]: tokens the layer's query can see
    prompt: Prompt | None = None
    vectors: Seen | None = None  # where they were asked for

    @property
    def prefill(self) -> bool:
        return self.step == 0


@dataclass(slots=True)
class TokenRow:
    """One step before any view: weights per token. `row`: float32 [layers, kv_heads, tokens], a reused buffer."""

    step: int
    row: np.ndarray
    kv_lo: np.ndarray  # int32 [layers]
    kv_hi: int


@dataclass(frozen=True)
class PromptRows:
    """Prompt statistics before any view; shapes as in `Prompt`, in tokens. `kv_lo`: int32 [rows, layers]."""

    colsum: np.ndarray
    colsq: np.ndarray | None
    colmax: np.ndarray | None
    rows: Rows | np.ndarray
    kv_lo: np.ndarray
    spans: np.ndarray | None = None
    span_sums: np.ndarray | None = None


class Source:
    """One captured request as it is stored. Subclasses read a file or hold arrays."""

    id: int
    prompt_tokens: int
    output_tokens: int  # decode rows
    facts: Mapping[str, Any]  # "tokens", "span" (per token), "need" (gold sources per decode step), ... where known
    inv_freq: np.ndarray | None = None  # float64 [rotated dimensions / 2]: q and k are rotated by position * this

    @property
    def provides(self) -> frozenset[str]:
        """What a policy may name in `needs`: "colsum", "colsq", "colmax", "window_rows" and "spans" of the prompt, "q",
        "k", "v" of every token, "inv_freq" of their rotation, and the names of facts."""
        raise NotImplementedError

    def prompt(self) -> PromptRows:
        raise NotImplementedError

    def token_rows(self) -> Iterator[TokenRow]:
        """The decode rows in order; each yields the same buffer again."""
        raise NotImplementedError

    def entries(self) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """The stored weights of each decode step: step, and arrays of layer, head, position and weight."""
        for t in self.token_rows():
            layer, head, position = np.nonzero(t.row[..., : t.kv_hi])
            yield t.step, layer, head, position, t.row[layer, head, position]

    def vectors(self) -> Iterator[Vectors]:
        """q, k and v layer by layer for the prompt, then step by step, where they were captured."""
        raise TraceError("the trace holds no q, k and v", hint="capture it with --vectors")


@dataclass(frozen=True)
class Request:
    """One request through a view."""

    source: Source
    page_size: int = 1
    pool: str = "head"

    @property
    def id(self) -> int:
        return self.source.id

    @property
    def prompt_tokens(self) -> int:
        return self.source.prompt_tokens

    @property
    def output_tokens(self) -> int:
        return self.source.output_tokens

    @property
    def tokens(self) -> int:
        """Tokens in the cache at the end: prompt and decode steps."""
        return self.prompt_tokens + self.output_tokens

    @property
    def stride(self) -> int:
        """Keys (pages) of the whole request."""
        return -(-self.tokens // self.page_size)

    def facts(self) -> dict[str, np.ndarray]:
        """What is known of each key, arrays [stride]; of a page, what is known of its first token."""
        known = {name: np.asarray(x) for name, x in self.source.facts.items() if isinstance(x, np.ndarray)}
        per_token = {name: x[: self.tokens] for name, x in known.items() if x.ndim == 1 and len(x) >= self.tokens}
        return {name: x[:: self.page_size] for name, x in per_token.items()}

    def accesses(self, vectors: bool = False) -> Iterator[Access]:
        """Prefill, then one access per decode step. Buffers are reused: copy what must outlive a step.

        `vectors`: with q, k and v of every token so far. Raises TraceError where the trace does not hold them.
        """
        source, size = self.source, self.page_size
        stats = source.prompt()
        seen = _Vectors(source, stats.rows.shape[1:3], self.tokens) if vectors else _none
        prompt = self._prompt(stats)
        n = self.prompt_tokens
        keys = -(-n // size)
        row = np.zeros((*prompt.rows.shape[1:3], self.stride), np.float32)
        peak = row if size == 1 else np.zeros_like(row)
        row[..., :keys] = prompt.rows[-1]
        peak[..., :keys] = prompt.peaks[-1]
        first, visible = self._seen(stats.kv_lo[-1], n)
        yield Access(0, row, peak, keys, n, keys, first, visible, prompt, seen(0, n))
        del stats, prompt  # which may hold a row group
        for t in source.token_rows():
            before, keys = keys, -(-t.kv_hi // size)
            if size == 1 and self.pool == "head":
                row = peak = t.row
            else:
                pooled = _pool(t.row, self.pool)
                _page(pooled, size, t.kv_hi, row, peak)
            limits = self._seen(t.kv_lo, t.kv_hi)
            yield Access(t.step, row, peak, keys, t.kv_hi, keys - before, *limits, None, seen(t.step, t.kv_hi))

    def _seen(self, kv_lo: np.ndarray, kv_hi: int) -> tuple[np.ndarray, np.ndarray]:
        """First visible key and number of visible tokens, per layer of the view."""
        if self.pool == "token":
            kv_lo = kv_lo.min(keepdims=True)
        return (kv_lo // self.page_size).astype(np.int32), (kv_hi - kv_lo).astype(np.int32)

    def _prompt(self, stats: PromptRows) -> Prompt:
        size, n = self.page_size, self.prompt_tokens
        count = len(stats.rows)
        last = range(n - count + 1, n + 1)  # one past the query position of each stored row
        visible = np.stack([self._seen(lo, hi)[1] for lo, hi in zip(stats.kv_lo, last, strict=True)])

        def paged(a: np.ndarray, peaks: bool = False) -> np.ndarray:
            a = _pool(a, self.pool)
            if size == 1:
                return a
            starts = np.arange(0, n, size)
            return (np.maximum if peaks else np.add).reduceat(a, starts, axis=-1)

        colsum, rows = paged(stats.colsum), stats.rows
        if size > 1 or self.pool != "head":
            rows = Rows(lambda i: paged(stats.rows[i]), (count, *colsum.shape))
        return Prompt(
            colsum=colsum,
            colsq=None if stats.colsq is None else paged(stats.colsq),
            colmax=None if stats.colmax is None else paged(stats.colmax, peaks=True),
            rows=rows,
            peaks=rows if size == 1 else Rows(lambda i: paged(stats.rows[i], peaks=True), rows.shape),
            visible=visible,
            spans=stats.spans,
            span_sums=None if stats.span_sums is None else paged(stats.span_sums),
        )


class _Vectors:
    """A request's q, k and v, gathered as they come."""

    def __init__(self, source: Source, lanes: tuple[int, ...], tokens: int):
        self._source, self._lanes, self._tokens = source, lanes, tokens
        self._lines = source.vectors()
        self._next: Vectors | None = next(self._lines, None)
        self._filled = np.zeros(lanes[0], np.int64)
        self._positions = np.zeros(tokens, np.int32)
        self._buffers: tuple[np.ndarray, ...] = ()

    def __call__(self, step: int, tokens: int) -> Seen:
        """Everything up to and including `step`, of `tokens` tokens. Raises TraceError where some are missing."""
        while self._next is not None and self._next.step <= step:
            self._add(self._next)
            self._next = next(self._lines, None)
        if (self._filled != tokens).any():
            raise TraceError(f"request {self._source.id}, step {step}: q, k and v of {tokens} tokens are not complete")
        q, k, v = (x[..., :tokens, :] for x in self._buffers)
        positions = self._positions[:tokens]
        for x in (q, k, v, positions):
            x.flags.writeable = False
        return Seen(q, k, v, positions, self._source.inv_freq)

    def _add(self, line: Vectors) -> None:
        heads, size = self._lanes[1], line.q.shape[-1]
        if not self._buffers:
            group = len(line.q) // heads
            shapes = [(*self._lanes, group, self._tokens, size), *2 * [(*self._lanes, self._tokens, size)]]
            self._buffers = tuple(np.zeros(shape, line.k.dtype) for shape in shapes)
        start = self._filled[line.layer]
        end = self._filled[line.layer] = start + len(line.positions)
        copies = max(1, heads // len(line.k))  # where a lane is a query head, it has its KV head's k and v
        k, v = (x.repeat(copies, axis=0) for x in (line.k, line.v))
        for buffer, new in zip(self._buffers, (line.q, k, v), strict=True):
            buffer[line.layer, ..., start:end, :] = new.reshape(*buffer.shape[1:-2], -1, size)
        self._positions[start:end] = line.positions


def _none(step: int, tokens: int) -> None:
    return None


def _pool(a: np.ndarray, pool: str) -> np.ndarray:
    """Mean over the KV heads of a layer, or over all lanes; axes [..., layers, kv_heads, keys] stay."""
    if pool == "head":
        return a
    if pool == "layer":
        return a.mean(axis=-2, keepdims=True)
    return a.mean(axis=(-3, -2), keepdims=True)


def _page(tokens: np.ndarray, size: int, kv_hi: int, row: np.ndarray, peak: np.ndarray) -> None:
    """Sum and largest weight of each page of `size` tokens, into buffers that stay zero beyond `kv_hi`."""
    full, rest = divmod(kv_hi, size)
    if full:
        block = tokens[..., : full * size].reshape(*tokens.shape[:-1], full, size)
        np.sum(block, axis=-1, out=row[..., :full])
        np.max(block, axis=-1, out=peak[..., :full])
    if rest:
        row[..., full] = tokens[..., full * size : kv_hi].sum(-1)
        peak[..., full] = tokens[..., full * size : kv_hi].max(-1)


@dataclass(frozen=True)
class Trace:
    """Captured requests of one model, seen through a page size and a pool.

    `fingerprint` names the content: two traces with the same fingerprint hold the same rows. `path` is
    where it was read from, for messages only.
    """

    sources: Sequence[Source]
    geometry: Geometry
    fingerprint: str
    name: str = "trace"
    page_size: int = 1
    pool: str = "head"
    manifest: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None

    def paged(self, page_size: int) -> Trace:
        """The same trace in pages of `page_size` tokens (weights summed)."""
        if page_size < 1:
            raise TraceError(f"a page of {page_size} tokens", hint="use a page size of 1 or more")
        return replace(self, page_size=int(page_size))

    def pooled(self, pool: str) -> Trace:
        """The same trace with one lane per KV head ("head"), per layer ("layer") or in all ("token")."""
        if pool not in POOLS:
            raise TraceError(f'unknown pool "{pool}"', hint='use "head", "layer" or "token"')
        return replace(self, pool=pool)

    @property
    def lanes(self) -> tuple[int, int]:
        """(layers, KV heads) as the view shows them."""
        g = self.geometry
        return {"head": (g.layers, g.kv_heads), "layer": (g.layers, 1), "token": (1, 1)}[self.pool]

    @property
    def page_bytes(self) -> float:
        """Bytes of keys and values of one page in one lane of this view."""
        g, (layers, heads) = self.geometry, self.lanes
        return self.page_size * g.token_bytes * (g.layers * g.kv_heads) / (layers * heads)

    @property
    def provides(self) -> frozenset[str]:
        """What every request of the trace can serve: see `Source.provides`."""
        return frozenset.intersection(*(s.provides for s in self.sources)) if self.sources else frozenset()

    def requests(self) -> list[Request]:
        return [Request(s, self.page_size, self.pool) for s in self.sources]

    def only(self, ids: Sequence[int]) -> Trace:
        """The requests with these ids, in the trace's order; its fingerprint names the choice too."""
        known = {s.id for s in self.sources}
        if missing := [i for i in ids if i not in known]:
            raise TraceError(
                f"the trace holds no request {missing[0]}", where=self.path, hint=f"it holds {sorted(known)}"
            )
        chosen = [s for s in self.sources if s.id in set(ids)]
        tag = ",".join(str(s.id) for s in chosen)
        return replace(
            self, sources=chosen, fingerprint=hashlib.sha256(f"{self.fingerprint}:{tag}".encode()).hexdigest()
        )

    def to_pandas(self):
        """Long form, one line per stored weight of a decode row: request, step, layer, head, position, weight."""
        import pandas as pd

        parts = []
        for source in self.sources:
            for step, layer, head, position, weight in source.entries():
                parts.append(
                    pd.DataFrame(
                        {
                            "request": np.int32(source.id),
                            "step": np.int32(step),
                            "layer": layer.astype(np.int16),
                            "head": head.astype(np.int16),
                            "position": position.astype(np.int32),
                            "weight": weight,
                        }
                    )
                )
        return pd.concat(parts, ignore_index=True)


class DenseSource(Source):
    """A request held in memory: for tests, synthetic traces and benchmarks.

    `prompt_rows`: float32 [prompt, layers, kv_heads, prompt], lower-triangular in the first and last axis.
    `decode_rows`: float32 [steps, layers, kv_heads, prompt + steps]; row i sees keys 0 .. prompt + i.
    `vectors`: q [layers, query heads, tokens, head_dim], k and v [layers, kv_heads, tokens, head_dim].
    `spans`: (first, one past the last) token of each span of the prompt. `inv_freq`: as in `Source`.
    """

    def __init__(
        self,
        prompt_rows: np.ndarray,
        decode_rows: np.ndarray,
        id: int = 0,
        facts: Mapping[str, Any] | None = None,
        vectors: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
        spans: Sequence[tuple[int, int]] = (),
        inv_freq: np.ndarray | None = None,
    ):
        self.id, self.facts, self._vectors, self.inv_freq = id, dict(facts or {}), vectors, inv_freq
        self._spans = np.array(spans, np.int32).reshape(-1, 2)
        self._prompt = np.asarray(prompt_rows, np.float32)
        self._decode = np.asarray(decode_rows, np.float32)
        self.prompt_tokens = self._prompt.shape[0]
        self.output_tokens = self._decode.shape[0]

    @property
    def provides(self) -> frozenset[str]:
        own = {"colsum", "colsq", "colmax", "window_rows", *self.facts}
        own |= set() if self.inv_freq is None else {"inv_freq"}
        return frozenset(
            own | ({"q", "k", "v"} if self._vectors else set()) | ({"spans"} if len(self._spans) else set())
        )

    def prompt(self) -> PromptRows:
        p = self._prompt
        sums = np.stack([p[a:z].sum(0) for a, z in self._spans]) if len(self._spans) else None
        spans = None if sums is None else self._spans
        return PromptRows(p.sum(0), (p * p).sum(0), p.max(0), p, np.zeros(p.shape[:2], np.int32), spans, sums)

    def vectors(self) -> Iterator[Vectors]:
        if self._vectors is None:
            yield from super().vectors()
            return
        n = self.prompt_tokens
        for step in range(self.output_tokens + 1):
            part = slice(n + step - 1, n + step) if step else slice(0, n)
            for layer, (q, k, v) in enumerate(zip(*self._vectors, strict=True)):
                arrays = q[:, part], k[:, part], v[:, part]
                positions = part.start + np.arange(arrays[1].shape[1], dtype=np.int32)
                yield Vectors(step, layer, positions, *arrays)

    def token_rows(self) -> Iterator[TokenRow]:
        lo = np.zeros(self._decode.shape[1], np.int32)
        for i, row in enumerate(self._decode):
            yield TokenRow(i + 1, row, lo, self.prompt_tokens + i + 1)


def dense_trace(sources: Sequence[DenseSource], geometry: Geometry | None = None, name: str = "memory") -> Trace:
    """A trace of requests held in memory; its fingerprint covers all they hold but step times."""
    digest = hashlib.sha256()
    for s in sources:
        facts = {name: x for name, x in s.facts.items() if not name.endswith("step_seconds")}
        for part in _parts([s.id, s._prompt, s._decode, s._vectors, s._spans, s.inv_freq, facts]):
            digest.update(part)
    layers, heads = sources[0]._decode.shape[1:3]
    return Trace(list(sources), geometry or Geometry(layers, heads), digest.hexdigest(), name)


def _parts(value: Any) -> Iterator[bytes]:
    """The bytes of a value, so that no two values have the same."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        yield f"{value.dtype.str} {value.shape}:".encode()
        yield value.tobytes()
    elif isinstance(value, Mapping):
        yield from _parts(sorted(value.items()))
    elif isinstance(value, (list, tuple, np.ndarray)):
        yield f"{len(value)}:".encode()
        for item in value:
            yield from _parts(item)
    else:
        yield f"{value!r};".encode()
