"""What a policy may see, and the two interfaces: who leaves, and where to.

The future is in none of it. A policy that defines `foresee(trace)` is an oracle and is drawn as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import numpy as np

from kvsim.errors import ConfigError, PolicyError

if TYPE_CHECKING:
    from kvsim.cache.future import Future
    from kvsim.cache.table import Table
    from kvsim.trace.access import Prompt, Seen

Facts = Callable[[], Mapping[str, np.ndarray]]  # what a trace knows of each key, arrays [stride]
_PUBLIC = ("key", "born", "arrived", "last", "uses", "mass", "weights")
_HISTORY = ("born", "arrived", "last", "uses", "mass")  # what a cache would have to keep for the policy


class View:
    """The table as a policy sees it: columns [layers, kv_heads, slots], read-only; private ones are writable.

    `key` (-1: empty line), `born`, `arrived` (on the GPU), `last` (used) in steps, prefill being 0; `uses`, `mass`
    (sum of weights), `weights` (this step), `resident` (bool: on the GPU), `pins` (1 while a page is being filled),
    `size` (in pages), `wanted` (waiting requests ahead of the first that will refer to it; large if none), private
    columns by `view["name"]`, facts of the trace about each key by `view.fact("tokens")`. Scalars: `now` (step),
    `keys` (pages that exist), `tokens`, `newest` (largest key), `page_size` (tokens). `budget`: int64
    [layers, kv_heads, 1], pages: in `split` the run's own, elsewhere what `split` said last. `prompt`: the prompt's
    statistics at prefill, else None. `vectors`: q, k and v of every token so far for a policy that `needs` them, else
    None. `seed`, `rng`: the run's seed and a generator made from it. `rates`: bytes/s from "host" and "ssd" to the GPU,
    tokens/s of "recompute" (all layers); empty where no machine is known.
    """

    def __init__(
        self,
        table: Table,
        shape: tuple[int, int],
        page_size: int,
        seed: int,
        rates: Mapping[str, float] | None = None,
        facts: Facts | None = None,
    ):
        self.page_size, self.seed, self.shape = page_size, seed, shape
        self.rng = np.random.default_rng(seed)
        self.rates = dict(rates or {})
        self._ask, self._known = facts, cast("Mapping[str, np.ndarray] | None", None)
        self.now, self.keys, self.tokens = 0, 0, 0
        self.prompt: Prompt | None = None
        self.vectors: Seen | None = None
        self.budget = np.zeros((*shape, 1), np.int64)
        self.sizes: np.ndarray | None = None  # of each key; None: every page is one
        self.asked: set[str] = set()  # columns that the policy has looked at
        self.bind(table)

    def bind(self, table: Table) -> None:
        """Show another table (after it grew or shrank)."""
        self._table = table
        self._columns = {n: locked(getattr(table, n).reshape(*self.shape, table.slots)) for n in _PUBLIC}
        self._copies = locked(table.copies.reshape(*self.shape, table.slots))
        self._private = {n: c.reshape(*self.shape, *c.shape[1:]) for n, c in table.private.items()}

    def __getattr__(self, name: str) -> Any:
        try:
            column = self.__dict__["_columns"][name]
        except KeyError:
            raise AttributeError(f"a view has no {name}") from None
        self.asked.add(name)
        return column

    def __getitem__(self, name: str) -> np.ndarray:
        return self._private[name]

    def gather(self, values: np.ndarray) -> np.ndarray:
        """What `values` [layers, kv_heads, keys] (or broadcastable) say of each page, in the shape of the columns.

        Empty lines show key 0.
        """
        values = np.broadcast_to(values, (*self.shape, values.shape[-1]))
        return np.take_along_axis(values, np.maximum(self._columns["key"], 0), -1)

    @property
    def state_bytes(self) -> int:
        """Bytes that the policy keeps per page: its private columns, and those of the table's history it looked at."""
        kept = [c for n, c in self._columns.items() if n in self.asked and n in _HISTORY]
        return sum(c.dtype.itemsize for c in kept) + sum(
            c.dtype.itemsize * int(np.prod(c.shape[3:])) for c in self._private.values()
        )

    @property
    def resident(self) -> np.ndarray:
        return (self._copies & 1).astype(bool)

    @property
    def newest(self) -> int:
        return self.keys - 1

    @property
    def pins(self) -> np.ndarray:
        filling = self.newest if self.tokens % self.page_size else self.keys
        return (self.key == filling).astype(np.int16)

    @property
    def size(self) -> np.ndarray:
        if self.sizes is None:
            return np.ones(self.key.shape, np.float32)
        return self.sizes[np.maximum(self.key, 0)]

    @property
    def wanted(self) -> np.ndarray:
        return np.full(self.key.shape, np.iinfo(np.int32).max, np.int32)

    def fact(self, name: str) -> np.ndarray:
        """What the trace knows of each page, in the shape of the columns; empty lines show that of key 0.

        Raises PolicyError for a fact that the trace does not have.
        """
        if self._known is None:
            self._known = self._ask() if self._ask else {}
        if name not in self._known:
            hint = f"it knows {', '.join(sorted(self._known)) or 'none'}"
            raise PolicyError(f'the trace does not know the fact "{name}" of its keys', hint=hint)
        return self._known[name][np.maximum(self.key, 0)]


def locked(a: np.ndarray) -> np.ndarray:
    """The same memory, read-only."""
    a = a.view()
    a.flags.writeable = False
    return a


def pages(tokens: int, page_size: int) -> int:
    """Tokens rounded up to pages."""
    return -(-tokens // page_size)


def window(tokens: int | str, budget: np.ndarray, page_size: int, name: str = "") -> np.ndarray:
    """Pages per lane (int64, like `budget`): from tokens, or a share of the budget such as "50%".

    Raises ConfigError for anything else, saying the parameter's `name`.
    """
    if isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0:
        return np.full_like(budget, pages(tokens, page_size))
    try:
        if isinstance(tokens, str) and tokens.endswith("%"):
            return share_of(float(tokens[:-1]) / 100, budget)
    except (ValueError, ConfigError):
        pass
    raise ConfigError(f"{name or 'tokens'} = {tokens!r}", hint='write tokens, or a share of the budget like "50%"')


def share_of(share: float, budget: np.ndarray, name: str = "a share") -> np.ndarray:
    """Whole pages in a share (0 to 1) of each lane's budget; 29 % of 100 is 29, whatever binary fractions say."""
    if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 <= share <= 1:
        raise ConfigError(f"{name} = {share!r}", hint="write a number from 0 to 1")
    return np.floor(share * budget + 1e-9).astype(np.int64)


def protected(policy: Any, budget: np.ndarray, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pages per lane (int64, like `budget`) that `policy` protects at the head and at the tail.

    Raises ConfigError for what is neither tokens nor a share.
    """

    def held(tokens: str, share: str) -> np.ndarray:
        whole = window(getattr(policy, tokens), budget, page_size, tokens)
        return np.maximum(whole, share_of(getattr(policy, share), budget, share))

    return held("sink", "protect_head"), held("recent", "protect_tail")


def keep(view: View, score: Any, *, sink: int = 0, recent: int = 0) -> np.ndarray:
    """`score` with +inf for the first `sink` and the newest `recent` tokens' pages, which then leave last."""
    guarded = (view.key < pages(sink, view.page_size)) | (view.key > view.newest - pages(recent, view.page_size))
    return np.where(guarded, np.float32(np.inf), single(score))


def single(score: Any) -> np.ndarray:
    """Scores as the engine compares them, float32. One that is finite and beyond float32 becomes NaN, which is refused;
    what is no number stays as it is."""
    given = np.asarray(score)
    if given.dtype.kind not in "biuf":
        return given
    with np.errstate(over="ignore"):
        rounded = given.astype(np.float32, copy=False)
    if rounded is given or not np.isinf(rounded).any():
        return rounded
    return np.where(np.isinf(rounded) & np.isfinite(given), np.float32(np.nan), rounded)


class EvictionPolicy(Protocol):
    """Who leaves. Only `score` (or, for a read set, `select`) is required; `kvsim.registry` has the defaults."""

    columns: ClassVar[dict[str, type]]
    batch: int
    lag: int
    granularity: ClassVar[str]
    rows: ClassVar[str]
    needs: ClassVar[frozenset[str]]

    def score(self, view: View) -> np.ndarray:
        """Broadcastable to [layers, kv_heads, slots]; the lowest leaves, among equals the older one."""
        ...

    def observe(self, view: View) -> None:
        """Once per access, new pages included, before any eviction."""

    def select(self, view: View) -> np.ndarray | None:
        """The read set, before attention: bool [layers, kv_heads, slots]; None reads every page.

        Protected pages are read in any case. In the offload regime `score` is needed beside it.
        """

    def split(self, view: View) -> np.ndarray:
        """Budget per lane in pages, broadcastable to [layers, kv_heads, 1]."""
        ...

    def foresee(self, trace: Future) -> None:
        """Oracles only, once: what this cache will see, with its whole future, in its lanes and pages."""


class OffloadPolicy(Protocol):
    """Where victims go.

    `place` is required. The other hooks are optional; each returns a bool mask broadcastable to
    [layers, kv_heads, slots], or None.
    """

    inclusive: bool  # does a fetched page keep its copy below? (default True)
    waits: bool  # does a step wait for all prefetches under way? (default False: for those of pages that it reads)

    def place(self, view: View, victims: np.ndarray) -> np.ndarray | int:
        """Tier per page (1 host, 2 SSD) or -1 for none; broadcastable.

        `victims`: bool [layers, kv_heads, slots], pages that leave the GPU and have no copy below it; one that has a
        copy there just leaves.
        """
        ...

    def prefetch(self, view: View) -> np.ndarray | None:
        """Pages to copy up after this step; they join the GPU before it is brought down to its capacity."""

    def backup(self, view: View) -> np.ndarray | None:
        """Pages to copy down before they are evicted (write-through)."""

    def rebuild(self, view: View, needed: np.ndarray) -> np.ndarray | None:
        """Which of the pages that the step waits for are computed again instead of fetched."""
