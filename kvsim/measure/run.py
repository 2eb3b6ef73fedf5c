"""One capture under way: a model that has been looked at, prompts that fit it, and batch after batch of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvsim.measure import CaptureError
from kvsim.measure.generate import Choice, Decoder, longest
from kvsim.measure.hooks import uses_registry, watching
from kvsim.measure.prompts import Prompt
from kvsim.measure.recorder import Recorder
from kvsim.measure.store import Store
from kvsim.trace import TraceWriter

MODES = ("free", "forced")
FREE_TOKENS = 256  # generated where neither a limit nor a continuation is given


@dataclass(frozen=True)
class Settings:
    """How to run; the meanings are those of `capture`. `prompt_rows` None stores all of them."""

    mode: str = "free"
    max_new_tokens: int | None = None
    batch_size: int = 1
    heads: str = "mean"
    prompt_rows: int | None = 64
    vectors: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise CaptureError(f'unknown mode "{self.mode}"', hint='use "free" or "forced"')
        if self.batch_size < 1 or (self.max_new_tokens is not None and self.max_new_tokens < 1):
            raise CaptureError("batch size and new tokens are counted from 1")

    def tokens_after(self, p: Prompt) -> int:
        """Tokens that follow the prompt, at most."""
        given = len(p.tokens) - p.prompt_len
        if self.mode == "forced":
            return min(given, self.max_new_tokens or given)
        return self.max_new_tokens or given or FREE_TOKENS


class Run:
    """A capture of `prompts` on `model`.

    `features`: per attention layer, what it was found to use; `via`: the way in that sees it; `plain`: the
    attention implementation of the timed run without recorder (None: the model has no choice).
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        settings: Settings,
        progress: Callable[[int, int, str], None] | None = None,
    ):
        self.model, self.prompts, self.settings = model, list(prompts), settings
        self.device = next(model.parameters()).device
        self.recorder = Recorder(heads=settings.heads, prompt_rows=settings.prompt_rows, vectors=settings.vectors)
        if not self.prompts:
            raise CaptureError("there are no prompts to capture")
        for i, p in enumerate(self.prompts):
            check_fits(model, p, settings.tokens_after(p), f"prompt {i}")
        self.via, self.features = self._look()
        self.plain = self._plain()
        self.eos = stop_tokens(model)
        self.progress = progress or (lambda done, total, what: None)

    @property
    def kv_heads(self) -> int:
        """Heads of a stored row: KV heads, or query heads where nothing is reduced."""
        return self.features[min(self.features)]["query_heads" if self.settings.heads == "query" else "kv_heads"]

    def _look(self) -> tuple[str, dict[int, dict]]:
        """Which way in sees the attention of this model, and what it uses: found out with two tokens."""
        ways = ("registry", "tap") if uses_registry(self.model) else ("tap",)
        for via in ways:
            probe = Recorder()
            with watching(self.model, probe, via=via):
                self.model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device))
            if probe.features:
                break
        else:
            hint = 'load it with attn_implementation="sdpa", or feed a Recorder through observe()'
            raise CaptureError("this model's attention cannot be seen", hint=hint)
        if len({(f["kv_heads"], f["query_heads"]) for f in probe.features.values()}) > 1:
            hint = "a trace has one number of KV heads"
            raise CaptureError("the layers of this model differ in their number of heads", hint=hint)
        return via, probe.features

    def _plain(self) -> str | None:
        if not uses_registry(self.model):
            return None
        own = any(f["softcap"] is not None or f["sinks"] for f in self.features.values())
        return "eager" if own or not self.model._supports_sdpa else "sdpa"

    def write(self, out: Path, manifest: dict[str, Any], keep: float, lossless: bool) -> None:
        """Capture everything into the new trace `out`."""
        s, size = self.settings, self.settings.batch_size
        batches = [range(i, min(i + size, len(self.prompts))) for i in range(0, len(self.prompts), size)]
        steps = [2 * max(s.tokens_after(self.prompts[i]) - 1 for i in batch) for batch in batches]
        with TraceWriter(
            out,
            layers=len(self.features),
            kv_heads=self.kv_heads,
            manifest=manifest,
            keep=keep,
            lossless=lossless,
            with_max=s.heads == "max",
            vectors=s.vectors,
        ) as writer:
            for i, batch in enumerate(batches):
                self._batch(writer, batch, partial(self._tell, sum(steps[:i]), sum(steps)))
        self.progress(sum(steps), sum(steps), "done")

    def _tell(self, before: int, total: int, steps: int, what: str) -> None:
        self.progress(before + steps, total, what)

    def _batch(self, writer: TraceWriter, requests: range, tell: Callable[[int, str], None]) -> None:
        """Capture the requests of one batch, time them without capture, and close them."""
        prompts = [self.prompts[i] for i in requests]
        forced = [p.tokens[p.prompt_len :] for p in prompts] if self.settings.mode == "forced" else None
        choice = Choice([self.settings.tokens_after(p) for p in prompts], self.eos, forced)
        decoder = self._decoder(prompts)
        layers = {layer: i for i, layer in enumerate(sorted(self.features))}
        store = Store(writer, requests.start, prompts, decoder.pads, layers)
        self.recorder.spans = store.columns_of_spans()
        self.recorder.on_prompt = store.prompt
        with watching(self.model, self.recorder, via=self.via):
            fed, captured_us = self._captured(decoder, choice, store, tell)
        pads = decoder.pads
        del decoder  # and its cache, before the second one grows
        times = {"step_us": self._timed(prompts, fed, tell), "captured_step_us": captured_us}
        for b, p in enumerate(prompts):
            store.write_spans(b)
            _close(writer, requests.start + b, p, choice, b, times, {"batch_slot": b, "pad": pads[b]})

    def _decoder(self, prompts: Sequence[Prompt]) -> Decoder:
        return Decoder(self.model, [p.tokens[: p.prompt_len] for p in prompts], pad_token(self.model), self.device)

    def _captured(
        self, decoder: Decoder, choice: Choice, store: Store, tell: Callable[[int, str], None]
    ) -> tuple[list[list[int]], list[float]]:
        """Run the batch with the recorder in place: (tokens fed in each step, wall microseconds of each step)."""
        choice.add(decoder.prefill())
        fed: list[list[int]] = []
        times: list[float] = []
        while alive := choice.alive:
            fed.append(choice.feed())
            scores, micros = decoder.step(fed[-1])
            times.append(micros)
            store.step(len(fed), alive, self.recorder.take())
            choice.add(scores)
            tell(len(fed), "capturing")
        store.flush()
        return fed, times

    def _timed(self, prompts: Sequence[Prompt], fed: list[list[int]], tell: Callable[[int, str], None]) -> list[float]:
        """Wall microseconds of the same steps without a recorder."""
        decoder, times = self._decoder(prompts), []
        with attention(self.model, self.plain):
            decoder.prefill()
            for tokens in fed:
                times.append(decoder.step(tokens)[1])
                tell(len(fed) + len(times), "timing")
        return times


def check_fits(model: Any, p: Prompt, new: int, where: str) -> None:
    """CaptureError unless the model has the positions for a prompt and `new` tokens, and knows its tokens."""
    most = longest(model)
    if new < 1:
        hint = 'give "completion", or more "tokens" than "prompt_len"; or run free'
        raise CaptureError("a forced run has no tokens to follow the prompt", where=where, hint=hint)
    if p.prompt_len + new - 1 > most:
        what = f"{p.prompt_len} prompt and {new} new tokens, the model has {most} positions"
        raise CaptureError(what, where=where, hint="ask for fewer new tokens")
    vocabulary = model.config.get_text_config().vocab_size
    if p.tokens.min() < 0 or p.tokens.max() >= vocabulary:
        hint = "were they made for another model?"
        raise CaptureError(f"token ids outside of the model's {vocabulary}", where=where, hint=hint)


def _close(
    writer: TraceWriter, request: int, p: Prompt, choice: Choice, b: int, times: dict[str, list[float]], facts: dict
) -> None:
    """Finish one request: its tokens, and what is known of each step.

    Step t fed the token at prompt_len + t - 1; `token`, `logprob`, `entropy` and `need` are about the next one,
    at prompt_len + t, which the step's attention row brought forth.
    """
    chosen = np.array(choice.chosen[b], np.int32)
    steps = len(chosen) - 1
    columns: dict[str, Any] = {
        "token": chosen[1:],
        "logprob": np.array(choice.logprob[b][1:], np.float32),
        "entropy": np.array(choice.entropy[b][1:], np.float32),
        **{name: np.array(micros[:steps], np.float32) for name, micros in times.items()},
    }
    if p.need is not None:
        columns["need"] = _needs(p, p.need, chosen)
    writer.steps(request, columns)
    facts = {"stop": choice.stop(b), **facts}
    if p.check is not None:
        facts["right"] = [bool(x) for x in p.check(chosen)]
    tokens = np.concatenate([p.tokens[: p.prompt_len], chosen])
    writer.finish_request(request, tokens=tokens, prompt_len=p.prompt_len, n_steps=steps, **facts)


def _needs(p: Prompt, need: Sequence[Sequence[int]], chosen: np.ndarray) -> list[list[int]]:
    """Per decode step what its next token follows from; nothing once the run has left the known continuation."""
    known = p.tokens[p.prompt_len :][: len(chosen)]
    same = np.logical_and.accumulate(known == chosen[: len(known)])
    on_path = int(same.sum())
    return [list(map(int, need[p.prompt_len + t])) if t < on_path else [] for t in range(1, len(chosen))]


@contextlib.contextmanager
def attention(model: Any, implementation: str | None) -> Iterator[None]:
    """The model with another attention implementation, for a while."""
    before = model.config._attn_implementation
    if implementation is None:
        yield
        return
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def stop_tokens(model: Any) -> frozenset[int]:
    """Tokens that end a generation, as `generate` would take them."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    eos = model.config.get_text_config().eos_token_id if eos is None else eos
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def pad_token(model: Any) -> int:
    """Any token will do: padding is never looked at."""
    pad = model.config.get_text_config().pad_token_id
    return 0 if pad is None or pad < 0 else pad
