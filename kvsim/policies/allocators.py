"""Budgets that differ between heads and layers, around any policy.

Each takes `inner`, a spec string; the inner policy says who leaves, the allocator how many stay where. The lanes of a
request keep together what the run's budget gives them. Allocators nest from the inside:
`ada-kv(inner="pyramid(inner='h2o')")` splits the budget of each layer, as pyramid sets it, over the layer's heads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvsim.cache.view import protected, single, window
from kvsim.errors import ConfigError, PolicyError
from kvsim.policies.parameters import flag, number, refuse
from kvsim.policies.wrappers import Wrapper, place
from kvsim.registry import policy, read

_ALL = np.int64(2**31 - 1)


@policy("ada-kv")
class AdaKV(Wrapper):
    """The best pages of a layer stay, whichever heads they are in. arXiv 2407.11550; kvpress, adakv_press.py.

    Each head keeps its own int(`alpha` * budget) best; of all others in the layer the lowest leave until the heads
    together are at their budgets' sum. So a head with a flat distribution holds more than one with a few peaks.
    Around a policy for decoding the budgets are found anew at each decision.

    Departures: a head keeps at least one page, and the pages that the inner policy protects under an even budget.
    While a layer is below its sum, what is free is shared evenly.
    """

    family = "allocator"
    evidence = "code"
    inner: str = "h2o"
    alpha: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        number(self, "alpha", most=1)

    def split(self, view):
        given = self.given(view)
        score, here = self.inside(view, given), view.resident
        safe = np.maximum(1, (self.alpha * given + 1e-9).astype(np.int64))
        kept = place(view, np.zeros(score.shape, np.int64), score) < safe
        score = np.where(kept, np.float32(np.inf), score)

        layers, heads, _ = score.shape
        head = np.broadcast_to(np.arange(heads)[:, None], score.shape)
        order = np.lexsort([x.reshape(layers, -1) for x in (head, view.key, score, ~here)], axis=-1)
        turn = np.empty(order.shape, np.int64)  # in which the layer's pages leave
        np.put_along_axis(turn, order, np.broadcast_to(np.arange(order.shape[-1]), order.shape), -1)
        held = here.sum(-1, keepdims=True)
        free = given.sum(1, keepdims=True) - held.sum(1, keepdims=True)
        gone = (turn.reshape(score.shape) < -free).sum(-1, keepdims=True)
        return held - gone + _even(np.maximum(free, 0), heads)


class LayerBudgets(Wrapper):
    """What pyramid and layer-budgets share: `wanted` pages per layer become whole pages with the run's sum.

    No layer gets less than the tokens that the inner policy protects (where even budgets hold them), nor more than
    exists while another could use it.
    """

    def __post_init__(self):
        super().__post_init__()
        if callable(getattr(self.policy, "split", None)):
            raise ConfigError(
                f"{self.inner} splits the budget itself",
                hint="""nest from the inside: ada-kv(inner="pyramid"), not pyramid(inner="ada-kv")""",
            )

    def split(self, view):
        layers, even = len(self._run), int(self._run[0, 0, 0])
        least = min(max(1, self.fixed(view)), even)
        return whole(self.wanted(view, layers, even), even * layers, least, max(even, view.keys))[:, None, None]

    def fixed(self, view) -> int:
        """Pages that the inner policy protects whatever the budget, not as a share of it."""
        head, tail = protected(self, np.zeros(1, np.int64), view.page_size)
        return int(head[0] + tail[0])

    def wanted(self, view, layers: int, even: int) -> np.ndarray:
        raise NotImplementedError


@policy("pyramid")
class Pyramid(LayerBudgets):
    """Budgets that fall from the first layer to the last. arXiv 2406.02069; kvpress and KVCache-Factory, pyramidkv.

    Beside the tokens that the inner policy protects, the last layer keeps 1 / `beta` of the even budget, the first as
    much more, those between on a line. Where the first would get more than exists, it gets that and the last the
    more. The policy `pyramidkv` is this around SnapKV with the published integer steps.

    Departures: around any policy, also while decoding (budgets settle once the context is long enough); exactly the
    run's total, which the published steps exceed by a few pages; no jump to even budgets for short prompts.
    """

    family = "allocator"
    evidence = "code"
    inner: str = "h2o"
    beta: float = 20

    def __post_init__(self):
        super().__post_init__()
        number(self, "beta", least=1)

    def wanted(self, view, layers, even):
        beside = min(self.fixed(view), even)
        free = even - beside
        last = free / self.beta
        first = 2 * free - last
        if first >= view.keys - beside:
            first = max(free, view.keys - beside)
            last = 2 * free - first
        return beside + np.linspace(first, last, layers)


@policy("layer-budgets")
class GivenBudgets(LayerBudgets):
    """Each layer's share of the budget as listed: for allocations found elsewhere, EvolKV's among them.

    `budgets`: numbers in proportion to which the layers share the run's total, or the path of a JSON file with that
    list. With fewer numbers than layers each stands for a group of neighbours. EvolKV: arXiv 2509.08315;
    experiments/evolkv finds such a list.
    """

    family = "allocator"
    evidence = "derived"
    inner: str = "h2o"
    budgets: Sequence[float] | str = (1,)

    def __post_init__(self):
        super().__post_init__()
        shares, self.files = _read(self.budgets)
        listed = isinstance(shares, Sequence) and all(type(x) in (int, float) and 0 <= x < math.inf for x in shares)
        if not listed or not sum(shares) > 0:
            refuse(self, "budgets", "list numbers from 0, or name a JSON file of them")
        self._shares = np.asarray(shares, float)

    def wanted(self, view, layers, even):
        if len(self._shares) > layers:
            raise PolicyError(f"{len(self._shares)} budgets for {layers} layers", hint="list one per layer, or fewer")
        return self._shares[np.arange(layers) * len(self._shares) // layers]


@policy("duo-attention")
class DuoAttention(Wrapper):
    """Retrieval heads keep the context, streaming heads sinks and newest tokens. arXiv 2410.10819; kvpress.

    A streaming head keeps `stream` tokens (or a share of the even budget, "25%"): the first `sink` and the newest.
    The retrieval heads share the rest of the run's total; what they cannot use stays unused. As published they keep
    everything whatever the budget: `full = True`, which exceeds the run's total. `heads`: the retrieval heads,
    [[layer, head], ...], or the path of a JSON file with that list.

    Without `heads` (derived; the published table comes from training, kvpress also offers one from mean queries): the
    share `retrieval` of all heads whose prompt rows give most to tokens that are neither among the first `sink` nor
    among the newest of a streaming head. Departures: one label per KV head of the group's mean rows; where the budget
    does not pay for full retrieval heads, the inner policy decides what they keep.
    """

    family = "allocator"
    evidence = "derived"
    inner: str = "streaming-llm"
    retrieval: float = 0.5
    stream: int | str = "25%"
    heads: Sequence[Sequence[int]] | str = ()
    full: bool = False
    sink: int | str = 4

    def __post_init__(self):
        super().__post_init__()
        number(self, "retrieval", most=1)
        flag(self, "full")
        window(self.stream, np.zeros(1, np.int64), 1, "stream")
        self._listed, self.files = _read(self.heads)
        if not isinstance(self._listed, Sequence) or not all(_is_pair(head) for head in self._listed):
            refuse(self, "heads", "write [[layer, head], ...], or name a JSON file that holds such a list")

    def observe(self, view):
        super().observe(view)
        if view.now == 0:
            self._retrieves = self._named(view) if self._listed else self._found(view)

    def score(self, view):
        return np.where(self._retrieves, single(self.policy.score(view)), view.key)

    def split(self, view):
        given = self.given(view)
        budget, count = np.minimum(given, sum(self._streamed(view))), int(self._retrieves.sum())
        if self.full:
            return np.where(self._retrieves, _ALL, budget)
        if not count:
            return given
        rest = int(given.sum() - budget[~self._retrieves].sum())
        budget[self._retrieves] = _even(rest, count)[:, 0]
        return budget

    def _streamed(self, view) -> tuple[np.ndarray, np.ndarray]:
        """The first and the newest pages that a streaming head keeps; at least one newest."""
        sink = protected(self, self._run, view.page_size)[0]
        return sink, np.maximum(1, window(self.stream, self._run, view.page_size) - sink)

    def _named(self, view) -> np.ndarray:
        mask, (layers, heads) = np.zeros((*view.shape, 1), bool), view.shape
        for pair in self._listed:
            if not (0 <= pair[0] < layers and 0 <= pair[1] < heads):
                raise PolicyError(f"no head {list(pair)} among {layers} layers of {heads}", hint="write [layer, head]")
            mask[tuple(pair)] = True
        return mask

    def _found(self, view) -> np.ndarray:
        rows, key, (sink, newest) = view.prompt.rows, np.arange(view.keys), self._streamed(view)
        outside = np.zeros(view.shape)
        for query, row in enumerate(rows, view.tokens - len(rows)):
            far = (key >= sink) & (key <= query // view.page_size - newest)
            outside += (row * far).sum(-1, dtype=np.float64)
        best = np.argsort(-outside, axis=None, kind="stable")[: round(self.retrieval * outside.size)]
        mask = np.zeros(outside.size, bool)
        mask[best] = True
        return mask.reshape(*view.shape, 1)


def whole(wanted: np.ndarray, total: int, least: int, most: int) -> np.ndarray:
    """int64: `total` shared in proportion to `wanted`, each from `least` to `most`; largest remainders get the rest.

    What is more than `most` for all of them is shared evenly.
    """
    count = len(wanted)
    if total >= most * count:
        return most + _even(total - most * count, count)[:, 0]
    exact = wanted * (total / wanted.sum())
    if exact.min() < least or exact.max() > most:
        exact = _between(wanted, total, least, most)
    out = np.floor(exact + 1e-6).astype(np.int64)
    out[np.argsort(out - exact, kind="stable")[: total - int(out.sum())]] += 1
    return out


def _between(wanted: np.ndarray, total: int, least: int, most: int) -> np.ndarray:
    """`wanted` times the number that makes what is cut off at both limits add up to `total`."""
    shares = wanted / wanted.max() + 1e-9  # who asks for nothing comes last, but comes
    low, high = 0.0, most * 2e9
    while low < (level := (low + high) / 2) < high:
        low, high = (level, high) if np.clip(level * shares, least, most).sum() < total else (low, level)
    return np.clip(high * shares, least, most)


def _even(amount: Any, count: int) -> np.ndarray:
    """`amount` [.., 1, 1] as whole numbers [.., count, 1]: evenly, the first ones one more."""
    return amount // count + (np.arange(count)[:, None] < amount % count)


def _is_pair(head: Any) -> bool:
    return isinstance(head, Sequence) and len(head) == 2 and all(type(n) is int for n in head)


def _read(listed: Any) -> tuple[Any, tuple[str, ...]]:
    """A list, or the one in the JSON file of that name, and the files read. Raises ConfigError."""
    if not isinstance(listed, str):
        return listed, ()
    try:
        found = json.loads(read(listed))
    except (OSError, ValueError) as error:
        raise ConfigError(f'cannot read the list in "{listed}": {error}') from None
    if not isinstance(found, list):
        raise ConfigError(f'"{listed}" holds no list', hint="a JSON list and nothing around it")
    return found, (listed,)
