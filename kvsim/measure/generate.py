"""Runs a left-padded batch through a causal language model, one token a step, and times every step."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def longest(model: Any) -> int:
    """Positions the model was made for; without a limit, more than anyone has."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


class Decoder:
    """One batch in flight: its cache, mask and positions.

    Prompts of different lengths are padded on the left, so that the newest token of every request is in the
    last column; `pads` is how many columns of each request are padding. `step` feeds one token per request.
    """

    def __init__(self, model: Any, prompts: Sequence[np.ndarray], pad: int, device: torch.device):
        from transformers import DynamicCache

        self.model, self.device = model, device
        lengths = [len(p) for p in prompts]
        self.width = max(lengths)  # columns of the prompt
        self.pads = [self.width - n for n in lengths]
        ids = np.full((len(prompts), self.width), pad, np.int64)
        for row, p in zip(ids, prompts, strict=True):
            row[self.width - len(p) :] = p
        self.ids = torch.from_numpy(ids).to(device)
        columns = torch.arange(self.width, device=device)
        offset = torch.tensor(self.pads, device=device)[:, None]
        self.mask = (columns >= offset).long() if any(self.pads) else None
        self.position = (columns - offset).clamp(min=0)
        self.cache = DynamicCache(config=model.config)
        accepted = inspect.signature(model.forward).parameters
        self._last_position = longest(model) - 1
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def prefill(self) -> Tensor:
        """Scores [batch, vocabulary] of the token after the prompt."""
        return self._forward(self.ids)

    def step(self, tokens: Sequence[int]) -> tuple[Tensor, float]:
        """Feed one token per request: (scores of the next token, wall microseconds until they are known)."""
        ids = torch.tensor(tokens, device=self.device)[:, None]
        # a finished request is fed on, and must not run off the end of a position table
        self.position = (self.position[:, -1:] + 1).clamp(max=self._last_position)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], 1)
        self._synchronize()
        start = time.perf_counter()
        scores = self._forward(ids)
        self._synchronize()
        return scores, (time.perf_counter() - start) * 1e6

    def _forward(self, ids: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            **self._last_only,
        )
        return out.logits[:, -1]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Choice:
    """Chooses the tokens of a batch, greedily or as forced, and knows which requests are finished.

    Request b ends with a token of `eos` or at `limits[b]` generated tokens; its last token is never fed, so
    it has one decode step less than generated tokens. `chosen[b]`, `logprob[b]` and `entropy[b]` (nats) grow
    by one per call, the first of them from prefill.
    """

    def __init__(self, limits: Sequence[int], eos: frozenset[int], forced: Sequence[np.ndarray] | None = None):
        self.limits, self.eos, self.forced = limits, eos, forced
        self.chosen: list[list[int]] = [[] for _ in limits]
        self.logprob: list[list[float]] = [[] for _ in limits]
        self.entropy: list[list[float]] = [[] for _ in limits]

    @property
    def alive(self) -> list[int]:
        """Requests that still have a token to feed."""
        return [b for b in range(len(self.limits)) if not self.finished(b)]

    def finished(self, b: int) -> bool:
        chosen = self.chosen[b]
        stopped = self.forced is None and bool(chosen) and chosen[-1] in self.eos
        return stopped or len(chosen) >= self.limits[b]

    def stop(self, b: int) -> str:
        """Why the request ended: "eos" or "length"."""
        return "eos" if self.chosen[b][-1] in self.eos else "length"

    def add(self, scores: Tensor) -> None:
        """The next token of every request that is not finished, from scores [batch, vocabulary]."""
        alive, at = self.alive, max(map(len, self.chosen))
        if self.forced is None:
            token = scores.argmax(-1)
        else:
            token = torch.tensor([int(f[min(at, len(f) - 1)]) for f in self.forced], device=scores.device)
        log = torch.log_softmax(scores.float(), -1)
        of_token = log.gather(-1, token[:, None])[:, 0]
        entropy = -(log.exp() * log).nan_to_num(0.0).sum(-1)  # nan: a token ruled out, 0 times -inf
        facts = zip(token.tolist(), of_token.tolist(), entropy.tolist(), strict=True)
        for b, (chosen, logprob, nats) in enumerate(facts):
            if b in alive:
                self.chosen[b].append(chosen)
                self.logprob[b].append(logprob)
                self.entropy[b].append(nats)

    def feed(self) -> list[int]:
        """The token each request is fed next; a finished one repeats its last, which nobody looks at."""
        return [chosen[-1] for chosen in self.chosen]
