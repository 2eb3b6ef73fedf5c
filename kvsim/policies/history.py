"""Policies that remember more of attention's history than a sum: when, how often, how evenly, how noisily.

Rows reach a policy as means over the query heads of a KV head: where the source decides per query head, or marks a page
when any of them does, that mean is the departure. Prompt rows count. A policy that asks for the last `window` prompt
rows says so if the trace stores fewer. Equal shares are of tokens: a page's is the tokens it holds over those visible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvsim.cache.view import View, pages, protected, share_of, window
from kvsim.errors import PolicyError
from kvsim.policies.classic import uniform
from kvsim.policies.parameters import ROWS, flag, number, refuse, whole
from kvsim.registry import policy


@policy("lra")
class Lra:
    """Least recently attended: evicts what longest had no weight of at least `theta`. Attendre, arXiv 2401.04881.

    `theta` = 0 takes the run's predicate (`--use`), which makes it LRU; another number is an absolute weight, of a page
    the sum over its tokens. Prompt pages start as attended by the last prompt row, a new page as attended at its birth.

    Departures: a definition made from the abstract. Tokens come one at a time where the paper inserts chunks, and lanes
    are KV heads where it keeps one memory per attention sublayer (`--granularity layer`).
    """

    family = "recurrence"
    evidence = "derived"
    budget_free = True
    theta: float = 0.0

    def __post_init__(self):
        number(self, "theta")
        self.columns = {"attended": np.int32} if self.theta else {}

    def observe(self, view):
        if self.theta and view.now:
            view["attended"][(view.weights >= self.theta) | (view.born == view.now)] = view.now

    def score(self, view):
        return view["attended"] if self.theta else view.last


@policy("lfa")
class Lfa:
    """Least frequently attended: evicts the smallest sum of weights since birth. Attendre, arXiv 2401.04881.

    H2O without its window of recent tokens: only the newest one is protected. Departures: as those of `lra`.
    """

    family = "heavy hitter"
    evidence = "derived"
    budget_free = True

    def score(self, view):
        return view.mass


@policy("scissorhands")
class Scissorhands:
    """Persistence of importance: evicts what was most often below an equal share of late. arXiv 2305.17118.

    Per page the last `window` rows leave one bit each, low = (weight < tokens of the page / visible tokens). When the
    budget is full, the `drop` share of it that has most such bits leaves at once; the newest `recent` tokens stay.

    Departures: the rule is from memory, no official code was found. A prompt beyond the budget is cut to it, or by
    `drop` if that is more. Of pages, an equal share is that of their tokens.
    """

    family = "recurrence"
    evidence = "mem"
    needs = frozenset({"window_rows"})
    window: int = 400
    recent: int | str = 10
    drop: float = 0.5

    def __post_init__(self):
        whole(self, "window", least=1, most=ROWS)
        number(self, "drop", most=1)
        self.columns = {"low": np.int32, "ring": (np.uint64, (pages(self.window, 64),))}

    def observe(self, view):
        if view.now:
            self._note(view["ring"], view["low"], view.now, view.weights < _equal_share(*_held(view)))
            return
        self.batch = max(1, int(share_of(self.drop, view.budget).max()))
        low = np.zeros((*view.shape, view.keys), np.int32)
        ring = np.zeros((*low.shape, view["ring"].shape[-1]), np.uint64)
        for ago, row, held, seen in _prompt_rows(view, self.window):
            self._note(ring, low, -ago, row < _equal_share(held, seen))
        view["low"][:] = view.gather(low)
        for word in range(ring.shape[-1]):
            view["ring"][..., word] = view.gather(ring[..., word])

    def score(self, view):
        return -view["low"]

    def _note(self, ring, low, step, is_low):
        """The bit of the row before the window gives way to that of `step`; `low` counts the bits."""
        word, bit = divmod(step % self.window, 64)
        word, bit = ring[..., word], np.uint64(1 << bit)
        low += is_low
        low -= (word & bit) != 0
        word &= ~bit
        word[is_low] |= bit


@policy("roco")
class RoCo:
    """Lowest mean weight among what attention treats evenly. arXiv 2402.06262; EasyKV easykv/easykv.py.

    Per page the mean and the standard deviation of its weights in all rows since its birth. The victim has the lowest
    mean among the (budget - `exempt`) pages of lowest deviation, and those that tie with them; the newest `recent`
    tokens, and sinks, count as of highest deviation. So `exempt` (the code's recent_ratio) is no window: that many
    pages of uneven attention are safe; only where even more must leave, it is all those of lowest deviation.
    `generated` tokens (0: none) is the code's decoding mode: the prompt stays whole, and that many generated tokens
    beside it, whatever the run's budget.

    Departures: prompt rows count (the code's keep_attention, off by default). A long prompt is cut once, after all of
    it was read; the code evicts `stride` tokens per `stride` while reading, which needs rows that a trace cannot have.
    Its encoding mode is sink=4, exempt="10%". Negative variances are 0 (the code gets NaN). From the prompt a trace has
    squares of tokens per KV head: tokens of a page are taken as equal and uncorrelated, pooled lanes as one head.
    """

    family = "heavy hitter"
    evidence = "code"
    columns = {"squares": np.float32}
    needs = frozenset({"colsq"})
    exempt: int | str = "30%"
    recent: int | str = 10
    generated: int = 0

    def __post_init__(self):
        whole(self, "generated")
        window(self.exempt, np.zeros(1, np.int64), 1, "exempt")
        if self.generated and not (isinstance(self.recent, int) and self.recent <= self.generated):
            refuse(self, "recent", f"write {self.generated} (`generated`) tokens or less")
        self.bounded = not self.generated

    def observe(self, view):
        if view.now:
            view["squares"][:] += view.weights * view.weights
            return
        self._budget = view.budget.copy()
        if self.generated:
            self._budget[:] = pages(self.generated, view.page_size)
        rows, alike = _rows(view, np.arange(view.keys)), 1 - 1 / view.page_size
        view["squares"][:] = view.gather(view.prompt.colsq + view.prompt.colsum**2 / rows * alike)

    def split(self, view):
        beside = (view.key >= 0) & ~self._evictable(view)
        return self._budget + np.count_nonzero(beside, axis=-1, keepdims=True)

    def score(self, view):
        mean, deviation = self.moments(view)
        head, tail = protected(self, view.budget, view.page_size)
        mine = view.resident & self._evictable(view)
        even = mine & (view.key >= head) & (view.key < view.keys - tail)
        over = np.count_nonzero(mine, axis=-1, keepdims=True) - self._budget
        sinks = np.count_nonzero(mine & (view.key < head), axis=-1, keepdims=True)
        count = np.maximum(self._budget - window(self.exempt, self._budget, view.page_size) - sinks, over)
        deviation = np.where(even, deviation, np.inf).astype(np.float32)
        feasible = even & (deviation <= _smallest(deviation, count))
        score = np.where(feasible, mean, mean + 2)  # no mean is above 1
        return np.where(self._evictable(view), score, np.inf)

    def moments(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each page's weights since its birth."""
        rows = _rows(view, view.key)
        mean = view.mass / rows
        return mean, np.sqrt(np.maximum(view["squares"] / rows - mean * mean, 0))

    def _evictable(self, view):
        return view.born > 0 if self.generated else np.True_


class Unbudgeted:
    """A policy that says which pages it wants (`wanted`), not how many: what a lane holds floats, whatever the budget.

    `recent` is in tokens; `protect_head` and `protect_tail` are shares of what the lane held last.
    """

    bounded = False
    recent: Any
    spec_name: str
    wanted: Callable[[View], np.ndarray]

    def __post_init__(self):
        if not isinstance(self.recent, int):
            refuse(self, "recent", f"write tokens: {self.spec_name} has no budget")

    def split(self, view):
        stays = view.resident & (self.wanted(view) | _held_anyway(self, view))
        return np.count_nonzero(stays, axis=-1, keepdims=True)

    def score(self, view):
        return self.wanted(view)


@policy("corm")
class Corm(Unbudgeted):
    """Drops what none of the last `window` queries gave an equal share, outside the newest `recent`. arXiv 2404.15949.

    A query marks a page whose weight is at least (tokens of the page / visible tokens). There is no budget: what a lane
    holds floats, and may be more or less than the run's; `capped` never holds more than that, and then evicts those
    whose last mark is oldest, never marked ones first.

    Departures: from the abstract, windows from memory, no official code was found; the denominator is what is still
    visible; a page is marked by the mean over a group's query heads, not by any of them. A lane keeps a page at least.
    """

    family = "recurrence"
    evidence = "mem"
    needs = frozenset({"window_rows"})
    columns = {"until": np.int32}  # the step from which its last mark no longer counts; 0: never marked
    window: int = 256
    recent: int = 256
    capped: bool = False

    def __post_init__(self):
        super().__post_init__()
        whole(self, "window", least=1)
        flag(self, "capped")
        self.bounded = self.capped

    def observe(self, view):
        if view.now:
            view["until"][view.weights >= _equal_share(*_held(view))] = view.now + self.window
            return
        self._most = view.budget.copy()
        until = np.zeros((*view.shape, view.keys), np.int32)
        for ago, row, held, seen in _prompt_rows(view, self.window):
            until[(until == 0) & (row >= _equal_share(held, seen))] = self.window - ago
        view["until"][:] = view.gather(until)

    def wanted(self, view):
        return view["until"] > view.now

    def split(self, view):
        return np.minimum(super().split(view), self._most)

    def score(self, view):
        return view["until"]


@policy("keyformer")
class Keyformer:
    """H2O on logits made noisy and, step by step, more even. d-matrix-ai/keyformer-llm, models/*keyformer-lib.

    S += softmax((log a + zeta) / tau), zeta ~ Gumbel(0, 1) anew for each row and page, tau from `tau` at prefill to
    `tau_end` at decode step `steps` and later (0: `tau` throughout). Evicts the smallest S outside the newest `recent`,
    at every step or every `every` (the code's MPT variant: 8; declared as lag). The published budget is 60 % of the
    prompt. `noise=False, steps=0` is H2O.

    Departures: noise from a hash, one draw per KV head and page where the code has one per query head and token. It
    drops what the code masks for good, and attention sees the budget and the incoming token, where the code counts that
    one in. Prompt rows that the trace does not store (--prompt-rows all) count without noise and as at tau 1.
    """

    family = "heavy hitter"
    evidence = "code"
    columns = {"total": np.float32}
    recent: int | str = "30%"
    tau: float = 1.0
    tau_end: float = 2.0
    steps: int = 128
    noise: bool = True
    every: int = 1

    def __post_init__(self):
        whole(self, "steps")
        whole(self, "every", least=1)
        number(self, "tau", "tau_end", above=True)
        flag(self, "noise")
        self.lag = self.every

    def observe(self, view):
        if view.now:
            view["total"][:] += self._tempered(view.weights, view.key, view.now, view.seed)
            return
        total, key = view.prompt.colsum, np.broadcast_to(np.arange(view.keys), (*view.shape, view.keys))
        if self.noise or self.tau != 1:
            for ago, row, _, _ in _prompt_rows(view, len(view.prompt.rows)):
                total = total + (self._tempered(row, key, -ago, view.seed) - row)
        view["total"][:] = view.gather(total)

    def score(self, view):
        return view["total"]

    def _tempered(self, weights, key, step, seed):
        done = min(max(step, 0) / self.steps, 1) if self.steps else 0
        zeta = _gumbel(uniform(key, step, seed)) if self.noise else 0.0
        return tempered(weights, zeta, self.tau + done * (self.tau_end - self.tau))


def tempered(weights: np.ndarray, zeta: np.ndarray | float, tau: float) -> np.ndarray:
    """softmax((log weights + zeta) / tau) along the last axis, float32; what weighs nothing stays at zero."""
    if tau == 1 and not np.any(zeta):
        return weights
    with np.errstate(divide="ignore"):
        logits = (np.log(weights) + zeta) / np.float32(tau)
    top = logits.max(-1, keepdims=True)
    powers = np.exp(logits - np.where(np.isfinite(top), top, 0))
    return (powers / np.maximum(powers.sum(-1, keepdims=True), np.float32(1e-30))).astype(np.float32)


def _gumbel(u: np.ndarray) -> np.ndarray:
    """Gumbel(0, 1) from multiples of 2**-24, moved to the middles of their intervals."""
    return -np.log(-np.log(u + np.float64(2**-25))).astype(np.float32)


@policy("evict3r")
class Evict3R:
    """Lowest exposure-normalised attention per layer; layers of even attention keep more. arXiv 2509.17650; evict3r.

    Per page the sum over rows of weight * visible tokens, over the frames it has seen. A layer's budget is its share
    softmax(-var / `temp`) of all layers' budgets, var that of the weights which its pages got from the last frame.
    The first frame and the first `special` tokens of every frame (camera and registers) leave last. Frames: the
    trace's fact "frame", numbers 0, 1, 2, ... per token; a trace without it has one token per frame, and then none is
    special. The published budget is 50 % of the whole sequence.

    Departures: evicts at every token, not at the end of a frame, and in the last frame too; shares are rounded to add
    up to the layers' budgets. Prompt rows that the trace does not store (--prompt-rows all) count with the tokens that
    rows of their kind saw on average. Single rows differ little in variance: a smaller `temp` tells layers apart.
    """

    family = "heavy hitter"
    evidence = "code"
    granularity = "layer"
    columns = {
        "total": np.float32,
        "frame": np.float32,
        "kept": np.bool_,
    }  # "frame": weights so far from the newest one
    recent: int | str = 0
    temp: float = 0.5
    special: int = 5

    def __post_init__(self):
        self._frame = self._first = 0  # the newest frame and its first page
        whole(self, "special")
        number(self, "temp", above=True)

    def observe(self, view):
        if view.now == 0:
            self._start(view)
            return
        held, seen = _held(view)
        if (view.born == view.now).any():
            frame = int(self._frames(view)[view.key == view.newest].max())
            if frame != self._frame:
                self._frame, self._first = frame, view.newest
                if self._known:
                    self._share(view, view["frame"])
                    view["frame"][:] = 0
            place = (view.newest - self._first) * view.page_size
            view["kept"][view.key == view.newest] = self._known and place < self.special
        view["frame"][:] += view.weights
        view["total"][:] += view.weights * seen
        if not self._known:
            self._share(view, view.weights)

    def split(self, view):
        return self._budgets

    def score(self, view):
        frames = self._frame - self._frames(view) + 1
        return np.where(view["kept"], np.inf, view["total"] / np.maximum(frames, 1))

    def _share(self, view, weights):
        """Budgets from the variance of what each page got from a frame, which pages born after it did not see."""
        there = view.resident & ((view.key != view.newest) | (not self._known) | (view.now == 0))
        count = np.count_nonzero(there, axis=-1, keepdims=True)
        mean = np.sum(weights, axis=-1, keepdims=True, where=there, dtype=np.float64) / np.maximum(count, 1)
        variance = np.sum((weights - mean) ** 2, axis=-1, keepdims=True, where=there) / np.maximum(count, 1)
        upto = np.rint(np.cumsum(self._total * layer_shares(variance, self.temp), axis=0)).astype(np.int64)
        self._budgets = np.diff(upto, axis=0, prepend=0)

    def _frames(self, view):
        return view.fact("frame") if self._known else view.key

    def _start(self, view):
        """What prefill says of each prompt page: its frame, whether it stays for good, its sums."""
        p, key = view.prompt, np.arange(view.keys)
        self._total = view.budget.sum(0)
        try:
            view.fact("frame")
            self._known = True
        except PolicyError:
            self._known = False
        known = self._frames(view)
        frames = np.zeros(view.keys, np.int64)
        frames[view.key[view.key >= 0]] = known[view.key >= 0]
        first = np.maximum.accumulate(np.where(np.diff(frames, prepend=frames[0] - 1) != 0, key, 0))
        self._frame, self._first = int(frames[-1]), int(first[-1])
        kept = frames == frames[0]
        if self._known:
            kept |= (key - first) * view.page_size < self.special
        view["kept"][:] = view.gather(kept)
        total, newest = np.zeros((*view.shape, view.keys)), np.zeros((*view.shape, view.keys))
        older, stored = p.colsum, len(p.rows)
        for ago, row, _, seen in _prompt_rows(view, stored):
            total += row * seen
            older = older - row
            if view.tokens - ago > self._first * view.page_size:
                newest += row
        view["frame"][:] = view.gather(newest)
        self._share(view, view["frame"])
        if stored < view.tokens:
            total += older * (key * view.page_size + 1 + view.tokens - stored) / 2
        view["total"][:] = view.gather(total)


def layer_shares(variance: np.ndarray, temp: float) -> np.ndarray:
    """softmax(-variance / temp) over the layers, the first axis."""
    powers = np.exp((variance.min(0) - variance) / temp)
    return powers / powers.sum(0)


# -- what they share -----------------------------------------------------------------------------------------------


def _held(view: View) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each page, 0 in empty lines, and of all pages of its lane [layers, kv_heads, 1]."""
    held = (view.key >= 0).astype(np.int64)
    if view.page_size > 1:
        held *= np.minimum(view.page_size, view.tokens - view.key * view.page_size)
    return held, held.sum(-1, keepdims=True)


def _equal_share(held: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The weight of each page if all tokens weighed the same; NaN, below and above nothing, where there is no page."""
    return np.where(held > 0, held / np.maximum(seen, 1), np.nan).astype(np.float32)


def _rows(view: View, key: np.ndarray) -> np.ndarray:
    """Rows since the first token of each page, its own included."""
    return view.tokens - np.maximum(key, 0).astype(np.int64) * view.page_size


def _prompt_rows(view: View, count: int) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """The last `count` rows of the prompt (all, if it is shorter), newest first: how many rows ago, the weights
    [layers, kv_heads, keys], the tokens that each page held then, and those that the row saw [layers, 1, 1].

    Raises PolicyError where the trace stores fewer.
    """
    p, count = view.prompt, min(count, view.tokens)
    assert p is not None
    if len(p.rows) < count:
        raise PolicyError(
            f"the last {count} rows of the prompt are needed, and the trace stores {len(p.rows)}",
            hint=f"capture it with --prompt-rows {count}, or ask for a smaller window",
        )
    start = np.arange(view.keys) * view.page_size
    for ago in range(count):
        seen = p.visible[-1 - ago].reshape(-1, 1, 1)
        seen = seen if len(seen) == view.shape[0] else seen.max(keepdims=True)  # lanes that pool layers
        yield ago, p.rows[-1 - ago], np.clip(view.tokens - ago - start, 0, view.page_size), seen


def _held_anyway(policy: Any, view: View) -> np.ndarray:
    """Pages that the engine does not let go: protected ones, and one that is still being filled."""
    head, tail = protected(policy, view.budget, view.page_size)
    return (view.key < head) | (view.key >= view.keys - np.maximum(tail, view.tokens % view.page_size > 0))


def _smallest(value: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The `count`-th smallest along the last axis, 1 being the smallest; `count` [layers, kv_heads, 1]."""
    at = np.clip(count - 1, 0, value.shape[-1] - 1)
    return np.take_along_axis(np.partition(value, np.unique(at), axis=-1), at, -1)
