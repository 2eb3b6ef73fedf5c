"""Policies that learn from attention rows while decoding: H2O, TOVA, LazyEviction.

Rows are reduced to KV heads (mean over the query heads of a group) before a policy sees them; where the published code
decides per query head, that is a departure, named in each docstring.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvsim.cache.elementwise import exp
from kvsim.cache.view import protected
from kvsim.policies.parameters import choice, number, windowed
from kvsim.registry import policy


@policy("h2o")
class H2O:
    """Heavy-hitter oracle: the largest sums of attention, and a recent window of half the budget.

    arXiv 2306.14048, drop variant. Sum of every row since birth, prompt rows included; forgotten on eviction
    (modify_llama.py of utils_real_drop). Departures: one decision per KV head on the group's mean row (the
    published code is multi-head attention only); float32 sums where the code keeps the model's half precision,
    which stops growing at 2,048.
    """

    family = "heavy hitter"
    budget_free = True
    evidence = "code"
    recent: int | str = "50%"

    def score(self, view):
        return view.mass


@policy("h2o-mask")
class H2OMask:
    """H2O as a read set: pages are hidden, not dropped, and may return. arXiv 2306.14048, utils_hh/modify_llama.py.

    The budget is `heavy` + `recent` pages; when more exist, the newest `recent` (the incoming one among them) and
    the `heavy` best of those before the window are read. As in the code, the page that has just left the window is
    hidden for one step although its score survives; the score of every other hidden page starts again from zero.
    `recent` is a share of the budget. Ours: protected pages (`sink`, `protect_head`; the code has none) are read
    always, in place of heavy ones.
    """

    family = "heavy hitter"
    evidence = "code"
    columns = {"total": np.float32}
    recent: int | str = "50%"

    def select(self, view):
        budget = int(view.budget.max())
        sink, recent = (int(n.max()) for n in protected(self, view.budget, view.page_size))
        recent = max(1, recent)
        cached = view.keys - 1  # the incoming page is the last key
        key, total = view.key, view["total"]
        if view.now == 0 or cached <= budget:
            return None
        always = (key >= cached + 1 - recent) | ((key >= 0) & (key < sink))
        candidate = (key >= sink) & (key < cached - recent)
        heavy = _largest(np.where(candidate, total, -np.inf), key, budget - recent - sink) & candidate
        total[~(heavy | always | (key == cached - recent))] = 0.0
        return heavy | always

    def observe(self, view):
        view["total"][:] += view.mass if view.now == 0 else view.weights

    def score(self, view):
        return view["total"]


@policy("tova")
class Tova:
    """Keeps what the current token attends to most, one decision per layer; nothing is protected.

    arXiv 2401.06104, tova_cache.py. The published code averages all query heads; the mean over KV heads of
    group means is the same number. Rows are renormalised per lane before they are averaged.
    """

    family = "heavy hitter"
    budget_free = True
    evidence = "code"
    granularity = "layer"
    recent: int | str = 0

    def score(self, view):
        return view.weights


@policy("lazy-eviction")
class LazyEviction:
    """Recurrence: keeps what may be needed again within its own largest gap. arXiv 2506.15969, kv_utils.py.

    Per page the last step with weight >= `alpha` (TS) and the largest interval between such steps (MRI); with D =
    now - TS the score is 2 / (1 + exp(1 + D / (MRI + 1e-5))) + (0 if MRI = 0 else 2 / (1 + exp(MRI - 1))). Decides
    every `window` steps, so up to `window` - 1 pages over budget (declared as lag); keeps the newest `window` tokens,
    or `recent` where that is more; the prompt is not cut at prefill and its rows are not counted. Integer state ties
    often: `tie` keeps the "newest" (default), the "oldest", or the larger "last_weight". `dtype = "fp16"` keeps TS and
    MRI in half precision as the published code does, exact only to 2,048 steps.

    Departures: KV heads instead of query heads; `alpha` and `window` default to the paper's Llama-8B on GSM8K.
    """

    family = "recurrence"
    budget_free = True
    evidence = "code"
    cut_prompt = False
    alpha: float = 5e-4
    window: int = 27
    recent: int = 0
    tie: str = "newest"
    dtype: str = "int32"

    def __post_init__(self):
        number(self, "alpha")
        choice(self, "tie", "newest", "oldest", "last_weight")
        choice(self, "dtype", "int32", "fp16")
        windowed(self)
        self.lag = self.window
        kind: Any = np.int32 if self.dtype == "int32" else np.float16
        self.columns = {"ts": kind, "mri": kind}

    def observe(self, view):
        if view.now == 0:
            return
        ts, mri = view["ts"], view["mri"]
        ts[view.born == view.now] = view.now - 1
        new = np.where(view.weights >= self.alpha, view.now, ts)
        np.maximum(mri, new - ts, out=mri)
        ts[:] = new

    def score(self, view):
        ts, mri, now = view["ts"].astype(np.float32), view["mri"].astype(np.float32), np.float32(view.now)
        if self.dtype == "fp16":
            with np.errstate(over="ignore"):
                now = np.float32(np.float16(view.now))
        since = 2 / (1 + exp(1 + (now - ts) / (mri + np.float32(1e-5))))
        score = since + np.where(mri != 0, 2 / (1 + exp(mri - 1)), np.float32(0))
        if self.tie == "newest":
            return score
        return _ranked(score, -view.key if self.tie == "oldest" else view.weights)


def _largest(value: np.ndarray, key: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` largest along the last axis; among equals the newer key."""
    if count <= 0:
        return np.zeros(value.shape, bool)
    order = np.lexsort((key, value), axis=-1)[..., -count:]
    mask = np.zeros(value.shape, bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask


def _ranked(score: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Ranks 0, 1, ... by score, ties by `second`: a score in which nothing ties."""
    order = np.lexsort((second, score), axis=-1)
    rank = np.empty(score.shape, np.float32)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(score.shape[-1], dtype=np.float32), score.shape), axis=-1)
    return rank
