"""The stored rows of a prompt, made when they are asked for: there may be as many as the prompt has tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import EllipsisType
from typing import Any

import numpy as np

Part = int | slice | EllipsisType


class Rows:
    """Prompt rows, oldest first: float32 [rows, layers, kv_heads, keys] that is never held as a whole.

    Reads like a read-only array whose first index is a number or a slice: `rows[-1]`, `rows[-64:]`, `rows[:, ..., 9]`;
    `rows[:]` is all of it, dense. To go over many rows, iterate: one row is held at a time.

    `make(i)`: row i, float32 of `shape[1:]`. The latest row is kept, so that asking for it again costs nothing.
    """

    def __init__(self, make: Callable[[int], np.ndarray], shape: tuple[int, ...]):
        self.shape = shape
        self._make = make
        self._latest: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self._row, range(len(self)))

    def __getitem__(self, index: Part | tuple[Part, ...]) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if first is ...:
            first, rest = slice(None), [..., *rest]
        chosen, part = range(len(self))[first], tuple(rest)
        if isinstance(chosen, int):
            return self._row(chosen)[part]
        blank = np.broadcast_to(np.float32(0), self.shape[1:])
        out = np.empty((len(chosen), *blank[part].shape), np.float32)
        for i, row in enumerate(chosen):
            out[i] = self._row(row)[part]
        out.flags.writeable = False
        return out

    def __setitem__(self, index: Any, value: Any) -> None:
        raise ValueError("prompt rows are read-only")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def _row(self, i: int) -> np.ndarray:
        latest = self._latest
        if latest is None or latest[0] != i:
            latest = self._latest = None  # before the next one is made
            row = self._make(i).view()
            row.flags.writeable = False
            latest = self._latest = i, row
        return latest[1]
