"""Policies around a policy: whitelisting, fair shares per span, lagged decisions, whole pages.

Each takes `inner`, a spec string, and changes one thing about it. Wrappers nest:
`whitelist(inner="ada-kv(inner='snapkv')", spans=[0])`.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np

from kvsim import registry
from kvsim.cache.view import pages, protected, single
from kvsim.errors import ConfigError, PolicyError
from kvsim.policies.parameters import ROWS, choice, flag, places, refuse, whole
from kvsim.registry import PROTECTION, policy
from kvsim.trace.access import Prompt

_TAKEN_OVER = ("batch", "lag", "clock", "once", "granularity", "rows", "bounded", "cut_prompt")
_EVIDENCE = ("code", "abs", "3rd", "mem", "derived", "own")  # from strong to weak


class Wrapper:
    """What wrappers share: whatever they do not say themselves is the inner policy's, hooks included.

    Protection given to the wrapper is given to the inner policy; what that makes of it holds. The evidence is
    the weaker one of the two.
    """

    inner: str
    policy: Any  # the inner policy
    passes_on: bool = False  # are its hooks those of the inner policy, and nothing more? Then their text is compiled
    sink: Any = None  # None: the inner policy's
    recent: Any = None
    protect_head: Any = None
    protect_tail: Any = None
    once: bool
    budget_free: bool
    columns: dict[str, Any] = {}
    needs: frozenset[str] = frozenset()
    regimes: tuple[str, ...] = ("lossy", "offload")
    evidence: str = "own"

    def __post_init__(self):
        if not isinstance(self.inner, str):
            refuse(self, "inner", 'name a policy, such as "h2o"')
        given = {name: value for name in PROTECTION if (value := getattr(self, name)) is not None}
        spec = registry.parse_spec(self.inner)
        p = self.policy = registry.build(str(registry.Spec(spec.name, spec.parameters | given)))
        if callable(getattr(p, "select", None)):
            hint = "wrappers change what is evicted; wrap a policy without select"
            raise ConfigError(f'"{p.spec_name}" chooses what is read', hint=hint)
        if twice := sorted(set(self.columns) & set(p.columns)):
            raise ConfigError(
                f"{self.inner} already keeps the column {twice[0]}", hint="do not nest a wrapper in itself"
            )
        self.wraps = (p,)
        for name in (*PROTECTION, *_TAKEN_OVER):
            setattr(self, name, getattr(p, name))
        self.columns = {**p.columns, **self.columns}
        self.needs = self.needs | p.needs
        self.regimes = tuple(r for r in self.regimes if r in p.regimes)
        self.evidence = max(self.evidence, p.evidence, key=_EVIDENCE.index)

    def __getattr__(self, name: str) -> Any:
        """Optional hooks (`split`, `foresee`) exist where the inner policy has them."""
        if "policy" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["policy"], name)

    @property
    def state_bytes(self) -> int:
        return self.policy.state_bytes

    def observe(self, view):
        if view.now == 0:
            self._run = view.budget.copy()
        if callable(observe := getattr(self.policy, "observe", None)):
            observe(view)

    def score(self, view):
        return self.policy.score(view)

    def given(self, view) -> np.ndarray:
        """Budget per lane before this wrapper changes it: what the inner policy splits, or the run's."""
        split = getattr(self.policy, "split", None)
        return np.broadcast_to(split(Through(view, budget=self._run)), self._run.shape) if split else self._run

    def inside(self, view, budget: np.ndarray) -> np.ndarray:
        """The inner policy's scores under `budget`, float32 [layers, kv_heads, slots]; +inf for protected pages."""
        score = single(self.policy.score(Through(view, budget=budget)))
        head, tail = protected(self, budget, view.page_size)
        return np.where((view.key < head) | (view.key >= view.keys - tail), np.float32(np.inf), score)


class Through:
    """A view with some of its values replaced: what a wrapper shows the policy inside."""

    def __init__(self, view: Any, **other: Any):
        self.__dict__.update(other, _view=view)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_view"], name)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._view[name]


@policy("whitelist")
class Whitelist(Wrapper):
    """Keeps listed tokens, paid from the same budget. arXiv 2510.00231 (`force_keep` in its presses: score +inf).

    `positions`: tokens. `spans`: numbers of spans of the prompt, as in the trace's fact "span". Shares at both ends of
    the cache (arXiv 2605.18053: a tenth each) are every policy's `protect_head` and `protect_tail`. Of more listed
    pages than the budget holds the older leave first. A page of several tokens is kept for any of them (`positions`),
    or for its first (`spans`).
    """

    family = "wrapper"
    evidence = "code"
    inner: str = "h2o"
    positions: Sequence[int] = ()
    spans: Sequence[int] = ()

    def __post_init__(self):
        super().__post_init__()
        places(self, "positions", "spans")
        self.budget_free = self.policy.budget_free
        if len(self.spans):
            self.needs |= {"span"}

    def score(self, view):
        listed = np.isin(view.key, np.asarray(self.positions, np.int64) // view.page_size)
        if len(self.spans):
            listed |= np.isin(view.fact("span"), self.spans)
        return np.where(listed, np.float32(np.inf), single(self.policy.score(view)))


@policy("fair")
class Fair(Wrapper):
    """Every span of the prompt keeps the same share. arXiv 2510.00231; *_fair_eviction_press.py of its repository.

    Of B pages and N that exist, the spans that end at or before page e get floor(B * e / N) together: of two spans
    floor(B * len / N) and the rest, as published. Within a span the best stay, and its protected pages. `spans`: the
    tokens at which a span begins, each reaching to the next (default: the prompt is one); `spans = []` takes those of
    the trace.

    What decides once after the prompt by its attention (`observed-attention`, `snapkv`, `h2o-prefill`, `tova-prefill`,
    `pyramidkv`) is shown each span as a prompt of its own, unless `local = False`: a page is judged by its span's own
    queries, a window is shared by the spans (window // spans each, at least one) and stays. Other policies keep their
    score, which for `streaming-llm` is the published ramp per span. Needs the rows at the end of each span; for column
    sums the trace's spans, or with `spans` all prompt rows.

    Departures: any number of spans, not two. While decoding (ours) the generated text is one span more, so the prompt's
    shares shrink alike. Spans are rounded up to pages. Text before the first span counts to it, as published, but its
    queries do not where the trace's column sums are used.
    """

    family = "wrapper"
    evidence = "code"
    columns = {"local": np.float32}
    inner: str = "h2o"
    spans: Sequence[int] = (0,)
    local: bool = True

    def __post_init__(self):
        super().__post_init__()
        places(self, "spans")
        flag(self, "local")
        self.needs |= frozenset() if len(self.spans) else {"spans"}
        self._core = self.policy
        while self._core.wraps:
            self._core = self._core.wraps[0]
        self._shown = self.local and self._core.spec_name in _BY_ATTENTION
        if not self._shown:
            self.columns = self.policy.columns

    def observe(self, view):
        super().observe(view)
        if view.now:
            return
        spans = np.asarray(self.spans if len(self.spans) else view.prompt.spans[:, 0])
        begin = -(-spans // view.page_size)
        self._begin = np.unique(begin)
        if begin.max() >= view.keys:
            raise PolicyError(f"a span begins at token {spans.max()} of a prompt of {view.tokens}")
        self._edges = np.array([0, *self._begin[1:], view.keys])
        if self._shown:
            votes = [self._votes(view, i) for i in range(len(self._begin))]
            view["local"][:] = view.gather(np.concatenate(votes, -1))

    def score(self, view):
        score = view["local"] if self._shown else single(self.policy.score(view))
        head, tail = protected(self, view.budget, view.page_size)
        score = np.where((view.key < head) | (view.key >= view.keys - tail), np.float32(np.inf), score)
        span = np.searchsorted(self._edges[1:], view.key, side="right")
        quota = np.diff(view.budget * np.append(self._edges, view.keys) // view.keys, axis=-1)
        return np.take_along_axis(quota, span, -1) - place(view, span, score)  # positive: within the span's share

    def _votes(self, view, i: int) -> np.ndarray:
        """What the inner policy says of a prompt that is span `i` alone; +inf for the tokens that it protects."""
        p, size, count = view.prompt, view.page_size, len(self._edges) - 1
        lo, hi = self._edges[i : i + 2]
        start, end = lo * size, min(hi * size, view.tokens)
        policy = copy(self._core)
        recent = policy.recent if isinstance(policy.recent, int) else 0
        if hasattr(policy, "window"):
            policy.window = max(1, policy.window * (i + 1) // count - policy.window * i // count)
            if recent == self._core.window:
                self.recent = recent = policy.window  # the last span's is what the end of the prompt keeps
        if "colsum" in policy.needs and not len(self.spans):
            sums = p.span_sums[-(-p.spans[:, 0] // size) == self._begin[i]].sum(0)
            need = view.tokens
        else:
            sums, need = None, start if "colsum" in policy.needs else max(start, end - max(1, recent))
        if need < (first := view.tokens - len(p.rows)):
            wrong = f"the prompt's rows from token {need} on are needed, the trace holds those from {first} on"
            raise PolicyError(wrong, hint=f"capture it with --prompt-rows {view.tokens - need}")
        rows = p.rows[max(0, start - first) : max(0, end - first), ..., lo:hi]
        sums = rows.sum(0) if sums is None else sums[..., lo:hi]
        alone = replace(p, colsum=sums, colsq=None, colmax=None, rows=rows, peaks=rows, visible=p.visible[:0])
        votes = policy.votes(Through(view, keys=hi - lo, tokens=end - start, prompt=alone))
        votes = np.array(np.broadcast_to(votes, sums.shape), np.float32)
        votes[..., max(0, hi - lo - pages(recent, size)) :] = np.inf
        return votes


_BY_ATTENTION = ("observed-attention", "snapkv", "h2o-prefill", "tova-prefill", "pyramidkv")


def place(view, group: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Place of each page within its group, 0 for the best; among equals the newer, what is not resident last."""
    order = np.lexsort((-view.key, -score, ~view.resident, group), axis=-1)
    group, at = np.take_along_axis(group, order, -1), np.arange(score.shape[-1])
    new = np.ones(group.shape, bool)
    new[..., 1:] = group[..., 1:] != group[..., :-1]
    out = np.empty(score.shape, np.int64)
    np.put_along_axis(out, order, at - np.maximum.accumulate(np.where(new, at, 0), axis=-1), -1)
    return out


@policy("lag")
class Lag(Wrapper):
    """Decides every `every` steps, and may hold `every` - 1 pages more than the budget in between (declared).

    Around a policy that decides once, after the prompt, it is kvpress's DecodingPress (decoding_press.py; there every
    512 steps and with 256 rows): at each decision what is left is shown to it as if it were a prompt, with the last
    `shown` rows, renormalised over what is left.

    Departures: the rows are the last ones, be they from before the last decision (the code empties its buffer then) or
    of the prompt; what sets a token beside its neighbours (`lagkv`, `curdkv`) is shown also those that are gone;
    a prompt above the budget is cut as the inner policy does; column sums cannot be had from a few
    rows, so policies that need them are refused.
    """

    family = "wrapper"
    evidence = "code"
    inner: str = "tova"
    every: int = 16
    shown: int = 64

    def __post_init__(self):
        super().__post_init__()
        whole(self, "every", least=1)
        whole(self, "shown", least=1, most=ROWS)
        self._again, self.budget_free = self.once, self.policy.budget_free and not self.once
        self.lag, self.once, self._at = self.every, False, 0
        self.passes_on = not self._again
        if self._again:
            self.columns = {**self.columns, "shown": (np.float32, self.shown)}
            if sums := sorted(self.needs & {"colsum", "colsq", "colmax", "spans"}):
                hint = "wrap one that looks at a window of rows"
                raise ConfigError(f"{self.inner} needs {', '.join(sums)} of a whole prompt", hint=hint)

    def observe(self, view):
        if view.now == 0 or not self._again:
            super().observe(view)
        if not self._again:
            return
        ring, size = view["shown"], self.shown
        if view.now == 0:
            self._before = min(size, len(view.prompt.rows))
            for step in range(1 - self._before, 1):
                ring[..., step % size] = view.gather(view.prompt.rows[step - 1])
            return
        ring[..., view.now % size] = view.weights
        if view.now % self.every == 0:
            self._at = view.now
            steps = np.arange(max(1 - self._before, view.now - size + 1), view.now + 1) % size
            rows = np.moveaxis(_by_key(view, ring)[..., steps], -1, 0)
            rows = rows / np.maximum(rows.sum(-1, keepdims=True), np.float32(1e-30))
            visible = np.full((len(rows), view.shape[0]), view.tokens, np.int32)
            prompt = Prompt(rows.sum(0), None, None, rows, rows, visible)
            self.policy.observe(Through(view, now=0, born=np.zeros_like(view.born), prompt=prompt))

    def score(self, view):
        if not self._again:
            return self.policy.score(view)
        return self.policy.score(Through(view, born=np.where(view.born > self._at, view.born, 0)))


@policy("pageify")
class Pageify(Wrapper):
    """Tokens leave in whole pages of `size`, the page with the lowest score first.

    As PagedEviction (arXiv 2509.04377) does by a score of its own; here any policy's. A page's score is the largest or
    the mean of its tokens' (`reduce`). So that whole pages leave and the budget holds, what is kept falls short of it
    by up to `size` - 1 tokens. The page that is being filled, and pages that hold a protected token, stay; where the
    budget cannot hold even these, their tokens leave one by one. Runs at one token per page; with --page-size instead,
    policies see the sums of a page's weights and nothing finer.
    """

    family = "wrapper"
    regimes = ("lossy",)
    inner: str = "h2o"
    size: int = 16
    reduce: str = "max"

    def __post_init__(self):
        super().__post_init__()
        self.batch = 1
        whole(self, "size", least=1)
        choice(self, "reduce", "max", "mean")

    def split(self, view):
        if view.page_size > 1:
            raise PolicyError(f"{self.spec_name} groups tokens, not pages", hint="leave --page-size at 1")
        given, score = self.given(view), self._score(view)
        held = view.resident.sum(-1, keepdims=True)
        order = np.lexsort((view.key, score, ~view.resident), axis=-1)
        score = np.take_along_axis(score, order, -1)
        page = np.take_along_axis(view.key, order, -1) // self.size
        last = np.ones(page.shape, bool)  # of its page, in the order in which tokens leave
        last[..., :-1] = page[..., 1:] != page[..., :-1]
        count = np.where(last, np.arange(1, page.shape[-1] + 1), page.shape[-1])
        count = np.minimum.accumulate(count[..., ::-1], -1)[..., ::-1]  # that leave with the i-th
        over = np.maximum(held - given, 0)
        at = np.maximum(over - 1, 0)
        whole = np.isfinite(np.take_along_axis(score, at, -1)) & (np.take_along_axis(count, at, -1) < held)
        gone = np.where(whole, np.take_along_axis(count, at, -1), over)
        return np.where(over > 0, held - gone, given)

    def score(self, view):
        return self._score(view)

    def _score(self, view) -> np.ndarray:
        """The page's score for each of its tokens, in key order whatever the slots."""
        score, n = self.inside(view, self.given(view)), -(-view.keys // self.size)
        score = np.where(view.key >= view.tokens // self.size * self.size, np.float32(np.inf), score)
        score = np.clip(score, np.finfo(np.float32).min, None)
        tokens = np.full((*view.shape, n * self.size), -np.inf, np.float32)
        tokens[..., : view.keys] = _by_key(view, score, -np.inf)
        tokens = tokens.reshape(*view.shape, n, self.size)
        value, here = tokens.max(-1), tokens > -np.inf
        if self.reduce == "mean":
            mean = np.where(here, tokens, 0).sum(-1, dtype=np.float64) / np.maximum(here.sum(-1), 1)
            value = np.where(np.isfinite(value), mean, value)
        return view.gather(np.repeat(value.astype(np.float32), self.size, -1))


def _by_key(view, column: np.ndarray, empty: float = 0) -> np.ndarray:
    """A column [layers, kv_heads, slots, ...] laid out by key: [layers, kv_heads, keys, ...]."""
    out = np.full((*view.shape, view.keys + 1, *column.shape[3:]), empty, column.dtype)
    key = np.where(view.key < 0, view.keys, view.key)
    key = key.reshape(*key.shape, *[1] * (column.ndim - 3))
    np.put_along_axis(out, np.broadcast_to(key, column.shape), column, 2)
    return out[:, :, :-1]
