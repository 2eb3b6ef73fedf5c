"""Read sets: nothing is lost, and a step reads only the pages that a cheap look promises to be worth it.

`select` comes before the step's attention: it may use the step's query, the keys and the rows of earlier steps, never
this step's row. How much is read is a parameter, by default the run's budget, so that policies compare at the same
number of pages. In the lossy regime that saves bandwidth, not memory; in the offload regime (demand "select") the
budget is the GPU's memory, and what was not read leaves first. Logits are q.k / sqrt(head_dim).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvsim.cache.view import protected
from kvsim.errors import ConfigError, PolicyError
from kvsim.policies.parameters import ROWS, choice, number, refuse, whole
from kvsim.registry import policy, read
from kvsim.trace.access import Seen, Trace


@policy("quest")
class Quest:
    """Reads the pages with the largest upper bound of q.k. arXiv 2406.10774; evaluation/quest_attention.py.

    Per page the smallest and the largest key, element by element; ub = sum_d max(q_d kmin_d, q_d kmax_d) is at least
    q.k of every key in the page. Read are the top min(max(`least`, tokens // page), pages); the first `dense_layers`
    read everything. `tokens`: the read budget (the paper: 512 to 4,096; None: the run's budget), in pages of the run
    (the paper: --page-size 16). The newest page is read beside them, as the kernels do; `recent=0` ranks it like any
    other, as the evaluation code does.

    Departures: one decision per KV head: `reduce="max"` ranks by the largest bound of the group's query heads and keeps
    to the budget; "union" reads what any of them would, which is what Quest's own decision per query head amounts to.
    """

    family = "read set"
    evidence = "code"
    needs = frozenset("qk")
    tokens: int | None = None
    least: int = 3
    dense_layers: int = 2
    reduce: str = "max"

    def __post_init__(self):
        _check_tokens(self)
        choice(self, "reduce", "max", "union")
        whole(self, "least", least=1)
        whole(self, "dense_layers")
        self._bounds = Bounds()

    @property
    def state_bytes(self) -> int:
        """Of the bounds, per page and lane."""
        return self._bounds.page_bytes

    def select(self, view):
        bound = self._bounds.of(view.vectors, view.keys, view.page_size)
        if self.reduce == "max":
            bound = bound.max(2, keepdims=True)
        bound = np.where(_present(view)[:, :, None], bound, -np.inf)
        chosen = top(bound, max(self.least, _count(self.tokens, view)))
        last = np.where(chosen, bound, np.inf).min(-1, keepdims=True)
        self._margin = (bound - last).max(2)  # over the last page that is read; with "max" the order of the bounds
        if view.now == 0:
            return None
        return view.gather(chosen.any(2)) | (np.arange(len(chosen))[:, None, None] < self.dense_layers)

    def score(self, view):
        return view.gather(self._margin)


@policy("flexicache")
class FlexiCache:
    """Heads whose top pages change slowly keep only those on the GPU. arXiv 2511.00868; flexi_cache_triton_kernels.py.

    A page's score is Quest's bound, the largest of the group's query heads; the newest page ranks first. A stable head
    ranks at step 1 and whenever `rerank` divides the step; in between it holds and reads its top K and the pages born
    since. An unstable head holds every page, ranks at every step and reads its top K. K is `tokens` in pages (the
    paper: 64 or 128 pages of 16; None: the run's budget). The prompt stays whole until step 1.

    `unstable`: [[layer, head], ...], or a JSON file with such a list; `unstable_heads` makes one from a trace. None
    given: every head is stable. How many pages the GPU holds follows from K and the map, whatever the budget is.
    Departure: what leaves the GPU is written when it leaves, not when the page is full (write-through is a matter of
    the offload policy).
    """

    family = "read set"
    evidence = "code"
    needs = frozenset("qk")
    columns = {"held": np.bool_}
    tokens: int | None = None
    rerank: int = 16
    unstable: list | tuple | str = ()

    def __post_init__(self):
        _check_tokens(self)
        whole(self, "rerank", least=1)
        if isinstance(self.unstable, str):
            self.files = (self.unstable,)
        self._bounds, self._heads = Bounds(), _heads(self.unstable)

    @property
    def state_bytes(self) -> int:
        """Of the bounds, per page and lane."""
        return self._bounds.page_bytes

    def select(self, view):
        held, there = view["held"], view.key >= 0
        bound = self._bounds.of(view.vectors, view.keys, view.page_size).max(2)
        if view.now == 0:
            held[:] = there
            self._k, self._loose = _count(self.tokens, view), self._map(view.key.shape[:2])
            return None
        bound = np.where(_present(view), bound, -np.inf)
        bound[..., view.newest] = np.inf
        best = view.gather(top(bound, self._k)) & there
        if view.now == 1 or view.now % self.rerank == 0:
            held[:] = best
        else:
            held |= there & (view.born == view.now)
        return np.where(self._loose, best, held)

    def split(self, view):
        held = np.count_nonzero(view["held"] & (view.key >= 0), axis=-1, keepdims=True)
        return np.where(self._loose, view.keys, held)

    def score(self, view):
        return view["held"]

    def _map(self, lanes: tuple[int, int]) -> np.ndarray:
        """bool [layers, kv_heads, 1]: the unstable heads."""
        mask = np.zeros((*lanes, 1), bool)
        for layer, head in self._heads:
            if not (0 <= layer < lanes[0] and 0 <= head < lanes[1]):
                hint = f"the trace has {lanes[0]} layers of {lanes[1]} KV heads"
                raise PolicyError(f"there is no head {head} in layer {layer}, which is to be unstable", hint=hint)
            mask[layer, head] = True
        return mask


@policy("lfps")
class Lfps:
    """Predicts which pages matter from those that did; exact scores for these alone. After arXiv 2506.15704.

    Only its abstract is known: what follows is kvsim's own completion. Candidates are the pages read in the last
    `history` steps (vertical), the pages that now lie where those lay seen from the query (slash), `near` neighbours on
    either side of both, and the protected pages (`sink`, `recent`). Of these the weights are computed, a softmax over
    the candidates' tokens, mean over the group's query heads, and the `tokens` (None: the run's budget) with the
    largest are read, protected pages first. At the end of the prompt and every `every` steps all pages are candidates.
    """

    family = "read set"
    evidence = "derived"
    needs = frozenset("qk")
    columns = {"read": np.uint32}  # bit i: read i steps before the last one
    tokens: int | None = None
    history: int = 8
    near: int = 1
    every: int = 32
    sink: int = 4
    recent: int | str = 16

    def __post_init__(self):
        _check_tokens(self)
        whole(self, "history", least=1, most=32)
        whole(self, "every", least=1)
        whole(self, "near")

    def select(self, view):
        read = _by_key(view, view["read"])
        head, tail = protected(self, view.budget, view.page_size)
        key = np.arange(view.keys)
        always = (key < head) | (key >= view.keys - tail)
        likely = np.ones_like(read, bool) if view.now % self.every == 0 else self.predicted(read, view.page_size)
        likely = (likely | always) & _present(view)
        weight = _weights(view.vectors, likely, view.page_size)
        value = np.where(likely, np.where(always, np.inf, weight), -np.inf)
        chosen = top(value, _count(self.tokens, view))
        self._order = weight + chosen
        mask = view.gather(chosen) & (view.key >= 0)
        forget = np.uint32(2**self.history - 1)
        view["read"][:] = ((view["read"] << np.uint32(1)) | mask) & forget
        return mask if view.now else None

    def score(self, view):
        return view.gather(self._order)

    def predicted(self, read: np.ndarray, page_size: int) -> np.ndarray:
        """bool [layers, kv_heads, keys]: pages that earlier read sets point at; `read` as in the column, by key."""
        found = read != 0
        for back in range(1, self.history + 1):
            then = (read >> np.uint32(back - 1)) & np.uint32(1) != 0
            for pages in {back // page_size, -(-back // page_size)}:  # a page that moved on may lie across two
                found |= _moved(then, pages)
        wide = found.copy()
        for side in range(1, self.near + 1):
            wide |= _moved(found, side) | _moved(found, -side)
        return wide


@policy("alisa")
class Alisa:
    """Sparse window attention: the newest pages, and those with the largest recent weight. arXiv 2403.17312.

    From memory of the paper. Of n pages K = `share` n are read (the paper's headline: 0.2; None: K is the run's
    budget), half of them (rounded down, one at least) the newest, the others by the sum of the last `window` rows, in
    which a page that was not read has weight zero; prompt rows count. One decision per layer, on the mean of its heads.

    Not here: ALISA's three phases of placement (all on the GPU, split with the host, part deleted and computed again)
    are an offload policy's, and its INT8 cache is a tier's format. `window` is kvsim's choice.
    """

    family = "read set"
    evidence = "mem"
    granularity = "layer"
    needs = frozenset({"window_rows"})
    share: float | None = None
    window: int = 4

    def __post_init__(self):
        if self.share is not None:
            number(self, "share", most=1, above=True)
        whole(self, "window", least=1, most=ROWS)
        self.columns = {"rows": ("f4", self.window)}

    def observe(self, view):
        rows = view["rows"]
        rows[..., view.now % self.window] = view.weights
        if view.now == 0:
            stored, wanted = len(view.prompt.rows), min(self.window, view.tokens)
            if stored < wanted:
                hint = f"capture with --prompt-rows {wanted}, or use a smaller window"
                raise PolicyError(f"the last {wanted} prompt rows are needed, the trace holds {stored}", hint=hint)
            for back in range(1, wanted):
                rows[..., -back % self.window] = view.gather(view.prompt.rows[-1 - back])

    def select(self, view):
        if view.now == 0:
            return None
        count, newest = self._sizes(view)
        old = np.arange(view.keys) < view.keys - newest
        recent = _by_key(view, view["rows"].sum(-1))
        chosen = top(np.where(old & _present(view), recent, -np.inf), count - newest)
        return view.gather(chosen | ~old)

    def score(self, view):
        return np.where(view.key >= view.keys - self._sizes(view)[1], np.inf, view["rows"].sum(-1))

    def _sizes(self, view) -> tuple[int, int]:
        """Pages that are read, and how many of them are the newest."""
        count = int(view.budget.max()) if self.share is None else max(1, int(self.share * view.keys + 1e-9))
        return count, max(1, count // 2)


# -- upper bounds ---------------------------------------------------------------------------------------------------


class Bounds:
    """The smallest and the largest key of every page, element by element, brought up to date by what is new."""

    def __init__(self) -> None:
        self._tokens = 0
        self._least = self._most = np.empty((0, 0, 0, 0), np.float32)  # [layers, kv_heads, pages, head_dim]

    @property
    def page_bytes(self) -> int:
        return 2 * self._least.shape[-1] * self._least.itemsize

    def of(self, seen: Seen, keys: int, page_size: int) -> np.ndarray:
        """float32 [layers, kv_heads, group, keys]: what q.k of the newest query cannot exceed, by page."""
        self._extend(seen.k, keys, page_size)
        q = seen.q[..., -1, :].astype(np.float32)
        least, most = (x[:, :, :keys].swapaxes(-1, -2) for x in (self._least, self._most))
        return np.maximum(q, 0) @ most + np.minimum(q, 0) @ least

    def _extend(self, k: np.ndarray, keys: int, page_size: int) -> None:
        held = self._least.shape[2]
        if keys > held:
            room = np.zeros((2, *k.shape[:2], 2 * keys, k.shape[-1]), np.float32)
            if held:
                room[:, :, :, :held] = self._least, self._most
            self._least, self._most = room
        first = self._tokens // page_size
        fresh = k[:, :, first * page_size :]
        starts = np.arange(0, fresh.shape[2], page_size)
        self._least[:, :, first:keys] = np.minimum.reduceat(fresh, starts, axis=2)
        self._most[:, :, first:keys] = np.maximum.reduceat(fresh, starts, axis=2)
        self._tokens = k.shape[2]


# -- which heads are unstable ---------------------------------------------------------------------------------------


def overlap(first: np.ndarray, later: np.ndarray) -> np.ndarray:
    """Share of `first` in `later`, corrected for chance (FlexiCache's RCO); bool masks [..., pages], of equal counts.

    (o - K/N) / (1 - K/N), 0 at least, for K of N pages (those of `later`, of which there may be more); 1 where all
    are chosen.
    """
    count, pages = later.sum(-1), later.shape[-1]
    both = (first & later[..., : first.shape[-1]]).sum(-1)
    rest = np.maximum(1 - count / pages, 0)
    corrected = np.divide(both / np.maximum(count, 1) - count / pages, rest, out=np.ones(count.shape), where=rest > 0)
    return np.clip(corrected, 0, 1)


def instability(tops: Sequence[np.ndarray]) -> np.ndarray:
    """float64 [layers, kv_heads]: 1 - the mean `overlap` of a window's first top set with each later one."""
    return 1 - np.mean([overlap(tops[0], later) for later in tops[1:]], axis=0)


def vote(windows: Sequence[np.ndarray], count: int) -> list[list[int]]:
    """The `count` heads that are most often among the `count` most unstable ones of a window, as [layer, head].

    Among equals the larger mean instability, then the first.
    """
    values = np.stack(windows)
    flat = values.reshape(len(values), -1)
    worst = np.argsort(-flat, axis=1, kind="stable")[:, :count]
    votes = np.bincount(worst.ravel(), minlength=flat.shape[1])
    chosen = np.lexsort((-flat.mean(0), -votes))[:count]
    return [[int(i) for i in np.unravel_index(head, values.shape[1:])] for head in np.sort(chosen)]


def unstable_heads(trace: Trace, count: int, tokens: int = 1024, window: int = 16) -> list[list[int]]:
    """FlexiCache's head map from a trace with q and k, paged as the run will be: `count` unstable [layer, head].

    Top sets of `tokens` are compared within windows of so many decode steps. Raises PolicyError where the trace is
    shorter than a window, TraceError where it has no q and k.
    """
    windows = []
    for request in trace.requests():
        bounds, tops = Bounds(), []
        for a in request.accesses(vectors=True):
            assert a.vectors is not None
            bound = bounds.of(a.vectors, a.keys, trace.page_size).max(2)
            if a.prefill:
                continue
            tops.append(top(bound, max(1, tokens // trace.page_size)))
            if len(tops) == window:
                windows.append(instability(tops))
                tops = []
    if not windows:
        raise PolicyError(f"no request has a window of {window} decode steps", where=trace.path)
    return vote(windows, count)


def _heads(unstable: Any) -> list[tuple[int, int]]:
    """(layer, head) of every unstable head, from a list or the JSON file that holds it."""
    hint = "write [[layer, head], ...], or name a JSON file that holds such a list"
    try:
        given = json.loads(read(unstable)) if isinstance(unstable, str) else unstable
        heads = [(layer, head) for layer, head in given]
    except OSError as error:
        raise ConfigError(f'cannot read the unstable heads "{unstable}": {error.strerror}', hint=hint) from None
    except (ValueError, TypeError):
        raise ConfigError(f"cannot read the unstable heads {unstable!r}", hint=hint) from None
    if not all(type(n) is int for pair in heads for n in pair):
        raise ConfigError(f"cannot read the unstable heads {unstable!r}", hint=hint)
    return heads


# -- small things ---------------------------------------------------------------------------------------------------


def top(value: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` largest along the last axis; among equals the last (the newer key); never one of -inf."""
    size = value.shape[-1]
    if not 0 < count < size:
        return (value > -np.inf) & (count > 0)
    least = np.partition(value, size - count, axis=-1)[..., size - count, None]
    above, ties = value > least, value == least
    room = count - np.count_nonzero(above, axis=-1, keepdims=True)
    newest = np.cumsum(ties[..., ::-1], axis=-1)[..., ::-1] <= room
    return (above | (ties & newest)) & (value > -np.inf)


def _check_tokens(policy: Any) -> None:
    if policy.tokens is not None and (type(policy.tokens) is not int or policy.tokens < 1):
        refuse(policy, "tokens", "write how many tokens a step reads, or None for the budget")


def _count(tokens: int | None, view) -> int:
    """Pages that a step reads."""
    return int(view.budget.max()) if tokens is None else max(1, tokens // view.page_size)


def _by_key(view, column: np.ndarray) -> np.ndarray:
    """A column [layers, kv_heads, slots] by key; 0 for pages that a sliding window left behind."""
    out = np.zeros((*column.shape[:2], view.keys + 1), column.dtype)  # empty lines, of key -1, write into the last
    np.put_along_axis(out, view.key.astype(np.intp), column, -1)
    return out[..., :-1]


def _present(view) -> np.ndarray:
    return _by_key(view, view.key >= 0)


def _moved(mask: np.ndarray, pages: int) -> np.ndarray:
    """The mask moved to larger keys."""
    out = np.zeros_like(mask)
    if pages >= 0:
        out[..., pages:] = mask[..., : max(0, mask.shape[-1] - pages)]
    else:
        out[..., :pages] = mask[..., -pages:]
    return out


def _weights(seen: Seen, pages: np.ndarray, page_size: int) -> np.ndarray:
    """float32 [layers, kv_heads, keys]: what the newest query gives each page of the mask, softmax over these alone."""
    tokens = seen.k.shape[2]
    mask = np.repeat(pages, page_size, axis=-1)[..., :tokens]
    weight = np.zeros(mask.shape, np.float32)
    for lane in np.ndindex(mask.shape[:2]):
        at = np.flatnonzero(mask[lane])
        q, k = (x.astype(np.float32) for x in (seen.q[lane][:, -1], seen.k[lane][at]))
        z = q @ k.T / np.sqrt(np.float32(q.shape[-1]))
        e = np.exp(z - z.max(-1, keepdims=True))
        weight[lane][at] = (e / e.sum(-1, keepdims=True)).mean(0)
    return np.add.reduceat(weight, np.arange(0, tokens, page_size), axis=-1)
