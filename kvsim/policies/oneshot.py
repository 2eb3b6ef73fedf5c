"""Policies that decide once, at the end of prefill: SnapKV and its kin. Lossy regime.

The budget is what is kept of the prompt, in pages per lane; generated tokens stay, beside it. Rows are means over the
query heads of a KV head's group, so there is one decision per KV head; published code that decides per query head (on
repeated keys and values) is a departure of all of them. In pages, votes are sums over a page's tokens.
"""

from __future__ import annotations

import math

import numpy as np

from kvsim.cache.view import pages, protected
from kvsim.errors import PolicyError
from kvsim.policies.parameters import choice, flag, number, odd, refuse, whole, windowed
from kvsim.registry import policy


class OneShot:
    """What they share: `votes(view)` [layers, kv_heads, keys] at the end of prefill; the lowest leave."""

    once = True
    regimes = ("lossy",)
    family = "prefill vote"
    evidence = "code"
    columns = {"vote": np.float32}

    def observe(self, view):
        if view.now == 0:
            view["vote"][:] = view.gather(self.votes(view))

    def score(self, view):
        return np.where(view.born > 0, np.float32(np.inf), view["vote"])

    def votes(self, view) -> np.ndarray:
        raise NotImplementedError


class _Splits:
    """Budgets that `shares(view)` finds at the end of prefill, and that stay."""

    def split(self, view):
        if view.now == 0:
            self._shares = self.shares(view)
        return self._shares

    def shares(self, view) -> np.ndarray:
        raise NotImplementedError


class _Windowed(OneShot):
    """With a window: the newest tokens of the prompt, which stay."""

    window: int
    recent: int | str

    def __post_init__(self):
        windowed(self)


@policy("snapkv")
class SnapKV(_Windowed):
    """The last `window` rows of the prompt vote, smoothed over neighbours. arXiv 2404.14469; snapkv_utils.py.

    A column's vote is its sum over those rows; columns before the window are pooled over `kernel` neighbours ("avg":
    zeros beyond the edges count, "max"), and the best of them stay beside the window. A prompt within the budget
    stays whole. `window` and `kernel` default to the published initialisation; `kernel = 7, pooling = "max"` is that
    of its LongBench runs. The mean of the rows instead of their sum (kvpress) is the same order.

    Departures: the group's mean row votes; with "avg" that is the mean of the heads' votes, with "max" it is not. In
    pages, the kernel reaches over the whole pages in `kernel // 2` tokens, on either side.
    """

    needs = frozenset({"window_rows"})
    window: int = 32
    kernel: int = 5
    pooling: str = "avg"

    def __post_init__(self):
        super().__post_init__()
        odd(self, "kernel")
        choice(self, "pooling", "avg", "max")

    def votes(self, view):
        votes = _summed(view, self.window)
        before = votes[..., : max(0, view.keys - pages(self.window, view.page_size))]
        before[:] = _pooled(before, self.kernel // 2 // view.page_size, self.pooling)
        return votes


@policy("pyramidkv")
class PyramidKV(_Splits, SnapKV):
    """SnapKV's votes under a budget that falls from layer to layer. arXiv 2406.02069; pyramidkv_utils.py.

    With c the run's budget and W the window, layer l of L keeps max - l * step pages beside its window, where min =
    (c - W) // `beta`, max = 2 (c - W) - min, step = (max - min) // (L - 1); should max reach the prompt without its
    window, max is that and min = 2 (c - W) - max. A prompt below c stays whole, one below 2 (c - W) keeps c in every
    layer. The integer step leaves the layers together a few pages above L c, as in the code.

    Departures: SnapKV's. One layer keeps c (the code divides by zero).
    """

    beta: int = 20

    def __post_init__(self):
        super().__post_init__()
        whole(self, "beta", least=1)

    def shares(self, view):
        window, layers = pages(self.window, view.page_size), view.shape[0]
        free = view.budget - window
        most = np.minimum(2 * free - free // self.beta, view.keys - window)
        least = np.where(most < view.keys - window, free // self.beta, 2 * free - most)
        budget = most - np.arange(layers)[:, None, None] * ((most - least) // max(1, layers - 1)) + window
        flat = (view.keys < np.maximum(view.budget, 2 * free)) | (layers == 1)
        return np.where(flat, view.budget, budget)


@policy("pyramidinfer")
class PyramidInfer(_Splits, OneShot):
    """Each layer passes on fewer tokens than it got. arXiv 2405.12532; modeling_llama_pyramidinfer.py; prefill, approx.

    The newest 1 + int(`share` * prompt) tokens stay and vote: their rows, weighted from 1 (oldest) to `weight`, are
    averaged. Layer l passes on int(n * r) of the n tokens before them, r = (1 - `rho`)(cos(pi l / L) + 1) / 2 + `rho`,
    the best by its votes and always the first `sink`; only every `interval`-th layer does, and none goes to
    `shortest` or below. So the first layer holds the whole prompt, and a layer only what all before it passed on.
    Defaults are those of the 8B configuration. `scaled` multiplies what the layers hold by the one factor that brings
    their mean to the run's budget (what a layer would hold beyond its prompt is not handed to others); the first
    layers then hold less than they got, by the votes of their own rows; `scaled = False` holds what the code does,
    whatever the run's budget.

    Departures: approximate, for deeper rows were computed with the tokens that this would have dropped, and the votes
    of survivors are not renormalised. The prefill half alone: while decoding, the code thins every 16 tokens that
    leave the newest ones, a share without a budget, by the last fifth of all rows; here generated tokens stay.
    """

    granularity = "layer"
    needs = frozenset({"window_rows"})
    rho: float = 0.9
    share: float = 0.2
    weight: float = 1.2
    interval: int = 1
    shortest: int = 64
    scaled: bool = True
    sink: int = 4

    def __post_init__(self):
        number(self, "rho", "share", most=1)
        number(self, "weight", above=True)
        whole(self, "interval", least=1)
        whole(self, "shortest", "sink")
        flag(self, "scaled")

    def votes(self, view):
        recent = 1 + int(self.share * view.tokens)
        own = _summed(view, recent, self.weight) / min(recent, view.tokens)
        own[..., max(0, view.keys - pages(recent, view.page_size)) :] = np.inf
        own[..., : pages(self.sink, view.page_size)] = np.inf
        votes, held = own[np.maximum(np.arange(len(own)) - 1, 0)], self.shares(view)
        for layer in range(1, len(votes)):
            passed = _largest(votes[layer - 1], held[layer - 1])
            votes[layer] = np.where(passed, votes[layer], -1)
        return votes

    def shares(self, view) -> np.ndarray:
        """int64 [layers, 1, 1]: pages that each layer keeps."""
        layers, held = view.shape[0], []
        recent = min(view.keys, pages(1 + int(self.share * view.tokens), view.page_size))
        before = view.keys - recent
        shortest = min(pages(self.shortest, view.page_size), before)
        for layer in range(layers):
            held.append(before + recent)
            ratio = (1 - self.rho) * (math.cos(math.pi * layer / layers) + 1) / 2 + self.rho
            if layer % self.interval == 0 and (fewer := int(before * ratio)) > shortest:
                before = fewer
        counts = np.array(held, np.int64)[:, None, None]
        return (view.budget * counts / counts.mean() + 1e-9).astype(np.int64) if self.scaled else counts


@policy("observed-attention")
class ObservedAttention(OneShot):
    """What a token was given on average by the rows that could see it. kvpress, observed_attention_press.py.

    The column sum over all prompt rows divided by their number, prompt - position; nothing is protected, so that the
    newest token, seen by itself alone, always ranks high. Departures: none at one token per page; in pages, the sum
    over a page's tokens divided by the sum of their numbers of rows.
    """

    needs = frozenset({"colsum"})
    recent: int | str = 0

    def votes(self, view):
        rows = np.add.reduceat(np.arange(view.tokens, 0, -1.0), np.arange(0, view.tokens, view.page_size))
        return view.prompt.colsum / rows


@policy("h2o-prefill")
class H2OPrefill(_Windowed):
    """The largest column sums over all prompt rows, and the newest `window`. KVCache-Factory, pyramidkv_utils.py.

    What several papers call H2O: it decides once, while H2O itself goes on (policy "h2o"). Departures: the group's
    mean, as above.
    """

    needs = frozenset({"colsum"})
    window: int = 32

    def votes(self, view):
        return view.prompt.colsum


@policy("tova-prefill")
class TovaPrefill(OneShot):
    """What the last prompt row attends to most, one decision per layer; the newest token stays. kvpress, tova_press.py.

    TOVA (arXiv 2401.06104) for the prompt alone; the policy "tova" goes on, and protects nothing. Departures: none.
    """

    granularity = "layer"
    needs = frozenset({"window_rows"})

    def votes(self, view):
        return view.prompt.rows[-1]


@policy("nacl")
class Nacl(OneShot):
    """Sinks, newest tokens, the best by proxy rows, and some at random. ACL 2024.acl-long.428; llama_nacl_patch.py.

    The last int(`proxies` * prompt) rows (at least one) are summed to s. Of the places beside the protected pages,
    `draw` / (`keep` + `draw`) go to pages drawn without replacement with p = softmax(s), the others to the largest s:
    the published shares of the prompt, 12 % and 7 %, as proportions of the run's budget. The newest int(`protect` *
    prompt) - `sink` tokens stay, which is none below 25,600 tokens with the published 256 sinks. A budget has to
    hold these and the newest token: for one below 257 tokens choose fewer sinks, such as `sink=4`.

    Departures: the proxies' own rows are causal (the code's are not). The published policy leaves prompts of 2,048
    tokens and less alone; here the budget says so. Drawn as the largest s + Gumbel noise, which is that distribution,
    from one draw of the run's generator, so that a larger budget draws a superset.
    """

    needs = frozenset({"window_rows"})
    proxies: float = 0.01
    keep: float = 0.12
    draw: float = 0.07
    protect: float = 0.01
    sink: int = 256

    def __post_init__(self):
        number(self, "proxies", "protect", most=1)
        number(self, "keep", "draw", most=1)
        whole(self, "sink")
        if self.keep + self.draw == 0:
            refuse(self, "keep", "keep or draw a share above 0")

    def votes(self, view):
        s = _summed(view, max(1, int(self.proxies * view.tokens)))
        head, tail = protected(self, view.budget, view.page_size)
        newest = pages(max(0, int(self.protect * view.tokens) - self.sink), view.page_size)
        tail, key = np.maximum(tail, newest), np.arange(view.keys)
        free = np.maximum(view.budget - head - tail, 0)
        drawn = (free * self.draw / (self.keep + self.draw) + 1e-9).astype(np.int64)
        between = (key >= head) & (key < view.keys - tail)
        best = _largest(np.where(between, s, -np.inf), free - drawn)
        return np.where(best | (key >= view.keys - newest), np.inf, s + view.rng.gumbel(size=s.shape))


@policy("simlayerkv")
class SimLayerKV(_Splits, OneShot):
    """Lazy layers keep a window, the others everything. arXiv 2410.13846; kvpress, simlayerkv_press.py.

    A layer is lazy when its last `last` rows, averaged over all heads, give more than `threshold` to the first `sink`
    tokens and to the newest n before those rows; it then keeps `sink` and the newest n - `last` tokens, which is the
    run's budget, and no other layer is cut. So the run's budget is a lazy layer's, not the mean. Departures: none;
    `threshold` is the one recommended for Llama 3 (as a default, kvpress calls no layer lazy).
    """

    granularity = "layer"
    needs = frozenset({"window_rows"})
    threshold: float = 0.9
    last: int = 1
    sink: int = 4

    def __post_init__(self):
        number(self, "threshold", most=1)
        whole(self, "last", least=1)
        whole(self, "sink")

    def votes(self, view):
        return np.arange(view.keys)

    def shares(self, view):
        row = _summed(view, self.last) / min(self.last, view.tokens)
        sink, last = pages(self.sink, view.page_size), pages(self.last, view.page_size)
        key, before = np.arange(view.keys), view.keys - last
        near = (key < sink) | (key >= before - (view.budget - sink + last))
        lazy = (row * (near & (key < before))).sum(-1, keepdims=True) > self.threshold
        return np.where(lazy, view.budget, view.keys)


def _summed(view, count: int, newest: float = 1.0) -> np.ndarray:
    """Sum of the last `count` prompt rows (all of a shorter prompt), float64, with weights from 1 to `newest`.

    Raises PolicyError where the trace holds fewer.
    """
    count, stored = min(count, view.tokens), view.prompt.rows
    if len(stored) < count:
        raise PolicyError(
            f"the last {count} rows of the prompt are needed, of which the trace holds {len(stored)}",
            hint=f"capture it with --prompt-rows {count}, or let fewer rows vote",
        )
    total = np.zeros(stored.shape[1:])
    for ago, weight in zip(range(count, 0, -1), np.linspace(1, newest, count), strict=True):
        total += np.multiply(stored[-ago], weight, dtype=np.float64)
    return total


def _pooled(x: np.ndarray, reach: int, pooling: str) -> np.ndarray:
    """Mean or largest of each entry and its `reach` neighbours on either side; what lies beyond an edge counts as 0."""
    if reach == 0 or x.shape[-1] == 0:
        return x
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(reach, reach)])
    near = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=-1)
    return near.mean(-1) if pooling == "avg" else near.max(-1)


def _largest(values: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Mask of the `count` [.., 1] largest along the last axis, which is in key order; among equals the newer."""
    order = np.argsort(values, axis=-1, kind="stable")
    mask = np.empty(values.shape, bool)
    rank = np.arange(values.shape[-1])
    np.put_along_axis(mask, order, np.broadcast_to(rank >= values.shape[-1] - count, values.shape), -1)
    return mask
