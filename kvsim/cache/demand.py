"""When a page counts as used, and what a step needs on the GPU.

One predicate serves LRU, LFU, Belady, hit recall, recurrence loss and the demand of the offload regime
(design decision 14): the largest token weight of the page, in the full row, reaches a limit of its row lane.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kvsim.errors import ConfigError
from kvsim.registry import parse_spec


@dataclass(frozen=True)
class Use:
    """`share`: at least `value` times an equal share of the visible tokens. `weight`: at least `value`.
    `topk`: among the `value` largest weights of the row (ties included). `all`: every visible page."""

    kind: str = "share"
    value: float = 1.0

    def limits(self, peak: np.ndarray, keys: int, visible: np.ndarray) -> np.ndarray:
        """float32 [row lanes]: the least `peak` that counts. `peak`: [row lanes, stride]; `visible`: tokens by lane."""
        if self.kind == "share":
            return (self.value / visible).astype(np.float32)
        if self.kind == "topk" and self.value < keys:
            at = keys - int(self.value)
            return np.partition(peak[:, :keys], at, axis=1)[:, at]
        return np.full(peak.shape[0], self.value if self.kind == "weight" else -np.inf, np.float32)

    @property
    def absolute(self) -> bool:
        return self.kind == "weight"


FAIR_SHARE = Use()


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
        raise ConfigError(f'"{text}" does not hold a number above zero', hint="at zero, every row would use every page")
    return use
