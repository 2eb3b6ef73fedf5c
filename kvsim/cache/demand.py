"""When a page counts as used, and what a step needs on the GPU.

One predicate serves LRU, LFU, Belady, hit recall, recurrence loss and the demand of the offload regime: the largest
token weight of the page, in the full row, is above a limit of its row lane, or at
the limit and the page's key at or above another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kvsim.errors import ConfigError
from kvsim.registry import parse_spec

NEARLY = np.float32(1 - 2**-20)  # of a share is enough: where all weights are the same, rounding decides nothing


@dataclass(frozen=True)
class Use:
    """`share`: at least `value` times an equal share of the visible tokens (`NEARLY`). `weight`: at least `value`.
    `topk`: one of the `value` largest weights of the row, among equals the newer page: exactly that many pages, or
    every visible one if there are fewer. `all`: every visible page."""

    kind: str = "share"
    value: float = 1.0

    def limits(
        self, peak: np.ndarray, keys: int, visible: np.ndarray, first: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`need` float32 and `need_key` int32, both [row lanes]: the least `peak` that counts, and from which key on.

        A page is used when its peak is above `need`, or equal to it and its key at or above `need_key`. `peak`:
        [row lanes, stride], no weight below zero; `keys`: pages that the row may see. By row lane, or by layer of as
        many row lanes each, `visible`: tokens that it sees; `first`: the first of those pages.
        """
        rows, each = len(peak), len(peak) // len(first)
        if self.kind == "topk" and self.value < keys:
            return _largest(peak[:, :keys], int(self.value), first.repeat(each))
        if self.kind in ("topk", "all"):
            return np.zeros(rows, np.float32), first.astype(np.int32).repeat(each)
        if self.kind == "share":
            return ((self.value / visible).astype(np.float32) * NEARLY).repeat(each), np.zeros(rows, np.int32)
        return np.full(rows, self.value, np.float32), np.zeros(rows, np.int32)

    def used(self, peak: np.ndarray, keys: int, visible: np.ndarray, first: np.ndarray) -> np.ndarray:
        """bool [row lanes, keys]: the pages that are used; arguments as in `limits`."""
        need, need_key = (x[:, None] for x in self.limits(peak, keys, visible, first))
        peak = peak[:, :keys]
        return (peak > need) | ((peak == need) & (np.arange(keys) >= need_key))

    @property
    def absolute(self) -> bool:
        return self.kind == "weight"


FAIR_SHARE = Use()


def _largest(peak: np.ndarray, count: int, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Limits that let through the `count` (fewer than there are keys) largest of each row from key `first` on."""
    keys = peak.shape[1]
    if first.any():
        peak = np.where(np.arange(keys) < first[:, None], np.float32(-1), peak)
    need = np.partition(peak, keys - count, axis=1)[:, keys - count]
    room = count - np.count_nonzero(peak > need[:, None], axis=1)  # for the newest of those that tie: one or more
    ties = np.cumsum(peak[:, ::-1] == need[:, None], axis=1, dtype=np.int32)
    need_key = keys - 1 - np.argmax(ties == room[:, None], axis=1)
    few = need < 0  # not that many are visible
    return np.where(few, np.float32(0), need), np.where(few, first, need_key).astype(np.int32)


def parse_use(value: float | str) -> Use:
    """`1.0` is a share of the visible tokens; "weight(1e-4)" an absolute weight."""
    if isinstance(value, (int, float)):
        return _positive(Use("share", float(value)), str(value))
    spec = _arguments(str(value))
    if spec[0] in ("share", "weight") and spec[1] is not None:
        return _positive(Use(spec[0], spec[1]), str(value))
    try:
        return _positive(Use("share", float(value)), str(value))
    except ValueError:
        raise ConfigError(f'cannot read use = "{value}"', hint='write a share like 1.0, or "weight(1e-4)"') from None


def parse_demand(text: str, use: Use) -> Use | None:
    """The predicate of a demand model; None for "select" (the policy's own read set).

    "theta" alone is the predicate `use`; "theta(0.01)" an absolute weight; "topk(64)"; "dense" needs every page.
    """
    name, value = _arguments(text)
    if name == "dense" and value is None:
        return Use("all")
    if name == "theta":
        return use if value is None else _positive(Use("weight", value), text)
    if name == "topk" and value is not None and value == value // 1:
        return _positive(Use("topk", value), text)
    if name == "select" and value is None:
        return None
    raise ConfigError(
        f'unknown demand model "{text}"', hint='use "dense", "theta", "theta(0.01)", "topk(64)" or "select"'
    )


def _arguments(text: str) -> tuple[str, float | None]:
    """ "topk(64)" -> ("topk", 64.0); one bare number, unlike a policy's keywords. What is not a number is NaN."""
    head, bracket, rest = text.strip().partition("(")
    if not bracket:
        return parse_spec(head).name, None
    try:
        return head.strip(), float(rest.removesuffix(")"))
    except ValueError:
        return head.strip(), math.nan


def _positive(use: Use, text: str) -> Use:
    if not 0 < use.value < math.inf:
        hint = "at zero, no row would need a page" if use.kind == "topk" else "at zero, every row would use every page"
        raise ConfigError(f'"{text}" does not hold a number above zero', hint=hint)
    return use
