"""Closed loop: a model decodes over what a policy leaves of its cache, and the policy sees the attention that results.

In every step the model attends to the surviving pages of each layer and KV head and to the new token; the softmax is
over those alone. Its weights, reduced to KV heads as capture reduces them, are the row that `kvsim.cache.Cache` is
given, and what it evicts is hidden from the model from then on, which is the same as gone. Tokens keep the positions
they were born at. Prefill attends to the whole prompt; a prompt above the budget is cut behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from kvsim import registry
from kvsim.cache.cache import Cache
from kvsim.cache.demand import FAIR_SHARE, Use
from kvsim.cache.outcome import Outcome
from kvsim.cache.tiers import Capacity
from kvsim.errors import ConfigError, PolicyError
from kvsim.measure import CaptureError
from kvsim.measure.generate import Choice, Decoder
from kvsim.measure.hooks import uses_registry, watching
from kvsim.measure.prompts import Prompt
from kvsim.measure.recorder import PromptLayer, Recorder
from kvsim.measure.run import MODES, attention, check_fits, pad_token, stop_tokens
from kvsim.measure.weights import Call, output
from kvsim.trace.access import VECTORS, Access, PromptRows, Request, Seen, Source, TokenRow
from kvsim.units import parse_budget

NAME = "kvsim_closed_loop"
PROVIDES = frozenset({"colsum", "colsq", "colmax", "window_rows"}) | VECTORS

Watch = Callable[[int, Access, Cache], None]


@dataclass(frozen=True)
class Played:
    """What one chain did: `tokens` generated, and the natural logarithm of the probability of each (the first comes
    from prefill, which nothing was evicted from). `right`: of the questions asked, which were answered rightly (free
    runs of prompts that can be checked). `budget`: pages per lane; `held`: mean pages per lane that attention saw.
    """

    tokens: np.ndarray
    logprob: np.ndarray
    right: list[bool] | None
    budget: int
    held: float


class ClosedLoop:
    """One batch of prompts, read once; `run` goes on from there under a policy, as often as asked.

    `model`: a causal language model whose attention asks transformers' registry, without sliding windows, caps on
    logits or learned sinks. `prompts`: with their continuation, or `max_new_tokens` says how many tokens follow.
    `prompt_rows`: how many of the last prompt rows the policies see; None for all.

    Raises CaptureError for a model or prompts that cannot be run like this.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        prompt_rows: int | None = None,
    ):
        self.model, self.prompts = model, list(prompts)
        if not self.prompts:
            raise CaptureError("there are no prompts to run")
        if not uses_registry(model):
            raise CaptureError("this model does not ask transformers' registry for its attention")
        self.device, self.eos = next(model.parameters()).device, stop_tokens(model)
        self.limits = [self._limit(i, p, max_new_tokens) for i, p in enumerate(self.prompts)]
        self.lengths = np.array([p.prompt_len for p in self.prompts])
        self.strides = self.lengths + self.limits - 1  # the last token is never fed
        with torch.no_grad():
            self._prefill(prompt_rows)

    def _limit(self, i: int, p: Prompt, most: int | None) -> int:
        given = len(p.tokens) - p.prompt_len
        new = min(given, most or given) or most or 0
        check_fits(self.model, p, new, f"prompt {i}")
        return new

    def _prefill(self, prompt_rows: int | None) -> None:
        recorder = Recorder(prompt_rows=prompt_rows, vectors=True)
        prompts = [p.tokens[: p.prompt_len] for p in self.prompts]
        decoder = Decoder(self.model, prompts, pad_token(self.model), self.device)
        with watching(self.model, recorder, via="registry"):
            self.scores = decoder.prefill()
        for layer, used in recorder.features.items():
            if strange := [what for what in ("window", "softcap", "sinks") if used[what]]:
                raise CaptureError(f"layer {layer} has a {strange[0]}", hint="closed loops run plain attention only")
        self.notes: list[PromptLayer] = recorder.take()
        self.stats = [_prompt_rows(self.notes, b, pad) for b, pad in enumerate(decoder.pads)]
        self.pads = decoder.pads
        layers: list[Any] = [decoder.cache.layers[note.layer] for note in self.notes]
        self._place = {note.layer: i for i, note in enumerate(self.notes)}  # of a model's layer in ours
        batch, heads, _, size = layers[0].keys.shape
        self.lanes = len(layers), heads
        # columns are positions: padding is left behind, and every chain writes its next token at its own length
        self.k, self.v = (layers[0].keys.new_zeros(len(layers), batch, heads, self.strides.max(), size) for _ in "kv")
        for i, cached in enumerate(layers):
            for b, pad in enumerate(decoder.pads):
                self.k[i, b, :, : self.lengths[b]] = cached.keys[b, :, pad:]
                self.v[i, b, :, : self.lengths[b]] = cached.values[b, :, pad:]

    # -- running -------------------------------------------------------------------------------------------------

    def run(
        self,
        policy: str,
        budget: str | float,
        *,
        mode: str = "forced",
        page_size: int = 1,
        seed: int = 0,
        use: Use = FAIR_SHARE,
        audit: bool = False,
        only: Collection[tuple[int, int]] | None = None,
        watch: Watch | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Played]:
        """Decode every chain under a `policy` of its own, of this spec.

        `budget`: pages per lane, or a share ("20%") of each request's final length. `mode`: "forced" feeds the
        continuation of each prompt, "free" what the model finds likeliest, up to a stop token. `only`: the (layer, KV
        head) where what is evicted is gone; elsewhere the model goes on to see it. `watch(chain, access, cache)` is
        called after each access. `use`, `audit`: as in `Cache`. `progress(done, total)`: decode steps.

        Raises PolicyError for a policy that knows the future or hides pages without evicting them, or needs what is
        not known here; ConfigError for a budget that is none.
        """
        if mode not in MODES:
            raise ConfigError(f'unknown mode "{mode}"', hint='use "free" or "forced"')
        whole = np.full(self.lanes, only is not None)
        for lane in only or ():
            whole[lane] = False
        chains = [self._chain(b, policy, budget, page_size, seed, use, audit, whole) for b in range(len(self.prompts))]
        after = [p.tokens[p.prompt_len :] for p in self.prompts]
        if mode == "forced" and not all(map(len, after)):
            raise CaptureError("a forced run has no tokens to follow a prompt", hint="run free")
        choice = Choice(self.limits, self.eos, after if mode == "forced" else None)
        step = _Step(self, any(c.vectors for c in chains))
        with torch.no_grad(), step.attending():
            for b, chain in enumerate(chains):
                chain.see(step.keep[b], watch)
            choice.add(self.scores)
            total = max(self.limits) - 1
            while alive := choice.alive:
                scores = step.forward(choice.feed())
                rows = step.rows.cpu().numpy()
                for b in alive:
                    chains[b].next(rows[b], step.news(b))
                    chains[b].see(step.keep[b], watch)
                choice.add(scores)
                progress(step.number, total)
        return [c.played(self.prompts[b], choice, b, mode == "free") for b, c in enumerate(chains)]

    def _chain(
        self,
        b: int,
        spec: str,
        budget: str | float,
        page_size: int,
        seed: int,
        use: Use,
        audit: bool,
        whole: np.ndarray,
    ) -> _Chain:
        policy = _policy(spec)
        request = Request(_Live(b, self.stats[b], int(self.strides[b] - self.lengths[b])), page_size)
        pages = pages_of(budget, request.stride)
        cache = Cache(
            self.lanes, request.stride, policy, Capacity(pages, None, None), use=use, page_size=page_size, seed=seed,
            audit=audit,
        )  # fmt: skip
        vectors = _Vectors(self.notes, b, self.pads[b], int(self.strides[b])) if policy.needs & VECTORS else None
        return _Chain(request, cache, pages, vectors, whole)


class _Step:
    """The step under way: what attention may see, in which columns it writes, and the rows it leaves behind.

    `keep`: bool [batch, layers, KV heads, positions], on the host; `rows`: float32 in the same shape, on the device.
    """

    def __init__(self, loop: ClosedLoop, vectors: bool):
        self.loop, self.number, self.vectors = loop, 0, vectors
        shape = (len(loop.prompts), *loop.lanes, int(loop.strides.max()))
        cuda = loop.device.type == "cuda"
        self._keep = torch.zeros(shape, dtype=torch.bool, pin_memory=cuda)
        self.keep = self._keep.numpy()
        self.rows = torch.zeros(shape, device=loop.device)
        self._chains = torch.arange(shape[0], device=loop.device)
        self._new: list[Any] = [None] * loop.lanes[0]
        self._fetched: tuple[np.ndarray, ...] = ()

    @contextlib.contextmanager
    def attending(self) -> Iterator[None]:
        """The model attends as this says, for a while."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if NAME in ALL_ATTENTION_FUNCTIONS:
            raise CaptureError("another closed loop runs in this process", hint="run one after the other")
        ALL_ATTENTION_FUNCTIONS[NAME] = self._attend  # a name that the mask registry does not know gets no mask
        try:
            with attention(self.loop.model, NAME):
                yield
        finally:
            del ALL_ATTENTION_FUNCTIONS[NAME]

    def forward(self, tokens: Sequence[int]) -> Tensor:
        """Feed one token per chain: scores [batch, vocabulary] of the next ones."""
        loop = self.loop
        self.number += 1
        at = np.minimum(loop.lengths + self.number - 1, loop.strides - 1)  # a finished chain is fed on, unseen
        self.keep[np.arange(len(at)), ..., at] = True
        self._columns = int(at.max()) + 1
        self._at = torch.from_numpy(at).to(loop.device)
        self._seen = self._keep.to(loop.device, non_blocking=True)
        ids = torch.tensor(tokens, device=loop.device)[:, None]
        out = loop.model(input_ids=ids, position_ids=self._at[:, None], use_cache=False)
        if self.vectors:
            self._fetched = tuple(torch.stack(x).to(torch.float16).cpu().numpy() for x in zip(*self._new, strict=True))
        return out.logits[:, -1]

    def news(self, b: int) -> tuple[np.ndarray, ...]:
        """q, k and v of the newest token of a chain, [layers, heads, head_dim]; nothing where nobody asks."""
        return tuple(x[:, b] for x in self._fetched)

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
        **ignored: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """transformers' attention signature, for one new token of each chain."""
        loop, i, n = self.loop, self.loop._place[module.layer_idx], self._columns
        loop.k[i][self._chains, :, self._at] = key[:, :, 0]
        loop.v[i][self._chains, :, self._at] = value[:, :, 0]
        if self.vectors:
            self._new[i] = query[:, :, 0], key[:, :, 0], value[:, :, 0]
        batch, heads, group = len(query), key.shape[1], query.shape[1] // key.shape[1]
        seen = self._seen[:, i, :, None, :n].expand(-1, -1, group, -1).reshape(batch, heads * group, 1, n)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        call = Call(query, loop.k[i, :, :, :n], seen, scale, n - 1)
        ((_, weights, _),) = call.blocks(1)
        self.rows[:, i, :, :n] = weights.mean(2)[:, :, 0]
        return output(call, loop.v[i], weights), None


class _Live(Source):
    """A request that is being generated: `row` is set before each step is asked for."""

    facts: dict[str, Any] = {}

    def __init__(self, id: int, prompt: PromptRows, steps: int):
        self.id, self._prompt = id, prompt
        self.prompt_tokens, self.output_tokens = prompt.colsum.shape[-1], steps
        self.row = np.empty(0, np.float32)

    @property
    def provides(self) -> frozenset[str]:
        return PROVIDES

    def prompt(self) -> PromptRows:
        return self._prompt

    def token_rows(self) -> Iterator[TokenRow]:
        first = np.zeros(self._prompt.colsum.shape[0], np.int32)
        for step in range(1, self.output_tokens + 1):
            yield TokenRow(step, self.row, first, self.prompt_tokens + step)


class _Chain:
    """One request, its cache, and the policy in it. `whole`: bool [layers, KV heads], where nothing is ever gone."""

    def __init__(self, request: Request, cache: Cache, budget: int, vectors: _Vectors | None, whole: np.ndarray):
        self.request, self.cache, self.budget, self.vectors, self.whole = request, cache, budget, vectors, whole
        self._accesses = request.accesses()
        self._held: list[float] = []

    def next(self, row: np.ndarray, news: Sequence[np.ndarray]) -> None:
        """Take over what the step showed: a row [layers, KV heads, positions], and q, k and v where asked for."""
        self.request.source.row = row[..., : self.request.tokens]  # type: ignore[attr-defined]
        if self.vectors:
            self.vectors.add(news)

    def see(self, keep: np.ndarray, watch: Watch | None) -> None:
        """The policy sees the step and decides; `keep` [layers, KV heads, positions] follows."""
        a = next(self._accesses)
        a.vectors = self.vectors.seen if self.vectors else None
        out: Outcome = self.cache.access(a)
        if a.prefill or out.dropped:
            table = self.cache.table
            _mark(table.key, self.request.page_size, a.tokens, keep.reshape(-1, keep.shape[-1]))
            keep[self.whole, : a.tokens] = True
        if not a.prefill:
            self._held.append(float(out.held.mean()))
        if watch:
            watch(self.request.id, a, self.cache)

    def played(self, p: Prompt, choice: Choice, b: int, free: bool) -> Played:
        tokens = np.array(choice.chosen[b], np.int32)
        right = [bool(x) for x in p.check(tokens)] if free and p.check else None
        held = float(np.mean(self._held)) if self._held else float("nan")
        return Played(tokens, np.array(choice.logprob[b]), right, self.budget, held)


class _Vectors:
    """q, k and v of one chain so far, in half precision, as a trace stores them."""

    def __init__(self, notes: Sequence[PromptLayer], b: int, pad: int, tokens: int):
        self._tokens = notes[0].colsum.shape[-1] - pad
        group = notes[0].vectors.q.shape[1] // notes[0].vectors.k.shape[1]  # type: ignore[union-attr]
        self._buffers = []
        for name in "qkv":
            prompt = np.stack([getattr(note.vectors, name)[b, :, pad:].cpu().numpy() for note in notes])
            if name == "q":
                prompt = prompt.reshape(len(notes), -1, group, *prompt.shape[-2:])
            buffer = np.zeros((*prompt.shape[:-2], tokens, prompt.shape[-1]), np.float16)
            buffer[..., : self._tokens, :] = prompt
            self._buffers.append(buffer)

    def add(self, news: Sequence[np.ndarray]) -> None:
        for buffer, new in zip(self._buffers, news, strict=True):
            buffer[..., self._tokens, :] = new.reshape(*buffer.shape[:-2], -1)
        self._tokens += 1

    @property
    def seen(self) -> Seen:
        q, k, v = (x[..., : self._tokens, :] for x in self._buffers)
        positions = np.arange(self._tokens, dtype=np.int32)
        for x in (q, k, v, positions):
            x.flags.writeable = False
        return Seen(q, k, v, positions)


def _prompt_rows(notes: Sequence[PromptLayer], b: int, pad: int) -> PromptRows:
    """What prefill showed of one request, its padding removed."""
    colsum, colsq, colmax = (
        np.stack([getattr(n, name)[b, :, pad:].numpy() for n in notes]) for name in ("colsum", "colsq", "colmax")
    )
    kept, columns = notes[0].rows.shape[2:]
    count = min(kept, columns - pad)
    rows = np.stack([n.rows[b, :, -count:, pad:].numpy().swapaxes(0, 1) for n in notes], 1)
    return PromptRows(colsum, colsq, colmax, rows, np.zeros((count, len(notes)), np.int32))


def _policy(spec: str) -> Any:
    """A fresh policy that can decide here."""
    policy = registry.build(spec)
    if callable(getattr(policy, "foresee", None)):
        raise PolicyError(f'policy "{spec}" knows the future, which a closed loop does not have')
    if callable(getattr(policy, "select", None)) or "lossy" not in policy.regimes:
        raise PolicyError(f'policy "{spec}" does not evict', hint="closed loops run policies whose victims are gone")
    if missing := sorted(policy.needs - PROVIDES):
        raise PolicyError(f'policy "{spec}" needs {", ".join(missing)}, which a closed loop does not have')
    if policy.needs & VECTORS and policy.granularity != "head":
        raise PolicyError(f'policy "{spec}" reads q, k or v, which are those of KV heads')
    return policy


def pages_of(budget: str | float, stride: int) -> int:
    """Pages per lane of a request of `stride` pages."""
    value, basis = parse_budget(budget)
    if basis == "bytes":
        raise ConfigError(f'a budget of "{budget}"', hint='write pages per lane, or a share of the request like "20%"')
    count = int(round(value * stride, 9) if basis == "fraction" else value)  # 29 % of 100 is 29, not 28.999...
    if count < 1:
        raise ConfigError(f'a budget of "{budget}" is less than one of {stride} pages', hint="raise it")
    return count


@njit(cache=True, nogil=True)
def _mark(key, page_size, tokens, keep):
    """Set `keep` [row lanes, positions] to the tokens of the pages in `key` [lanes, slots]."""
    rows = len(keep) // len(key)
    for r in range(len(keep)):
        keep[r] = False
        for page in key[r // rows]:
            if page >= 0:
                for t in range(page * page_size, min((page + 1) * page_size, tokens)):
                    keep[r, t] = True
