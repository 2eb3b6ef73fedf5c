"""Policies that a model decides: each token comes with a score from outside the attention rows."""

from __future__ import annotations

import math
from io import BytesIO

import numpy as np

from kvsim.errors import ConfigError
from kvsim.policies.history import Unbudgeted
from kvsim.policies.parameters import number
from kvsim.registry import policy, read


@policy("attention-gate")
class AttentionGate(Unbudgeted):
    """A token whose gate is below `threshold` is visible to its own query and then gone. arXiv 2410.12876.

    The gates are the model's, decided once per token: `scores` is a .npy file of floats [layers, kv_heads, tokens] for
    a trace of one request (KVzap, FastKVzip and DMS scores fit too); without it, the trace's fact "gate" (a float per
    token, the same in all lanes). There is no budget: what a lane holds floats, whatever the run's.

    Departures: no official code was found, and gates are recorded on the full cache. A page goes when all its tokens
    would; from the fact a page has the gate of its first token. A lane keeps a page at least, that of its best gate.
    """

    family = "gate"
    evidence = "derived"
    needs = frozenset({"gate"})
    recent: int | str = 0
    threshold: float = 0.5
    scores: str = ""

    def __post_init__(self):
        super().__post_init__()
        number(self, "threshold", least=-math.inf)
        self._gates = None
        if self.scores:
            self.needs, self.files, self._gates = frozenset(), (self.scores,), _load(self.scores)

    def observe(self, view):
        if self._gates is None:
            return
        if view.now == 0 and view.page_size > 1:
            starts = np.arange(0, self._gates.shape[-1], view.page_size)
            self._gates = np.maximum.reduceat(self._gates, starts, axis=-1)
        found, needed = self._gates.shape, (*view.shape, view.keys)
        if found[:2] != needed[:2] or found[2] < needed[2]:
            raise ConfigError(
                f"gates of {found[0]} layers x {found[1]} KV heads x {found[2]} pages",
                where=self.scores,
                hint=f"step {view.now} has {needed[0]} x {needed[1]} x {needed[2]}, pages of {view.page_size} tokens",
            )

    def wanted(self, view):
        return self.score(view) >= self.threshold

    def score(self, view):
        return view.fact("gate") if self._gates is None else view.gather(self._gates)


def _load(path: str) -> np.ndarray:
    """Gates [layers, kv_heads, tokens]. Raises ConfigError for anything else."""
    try:
        gates = np.load(BytesIO(read(path)), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"cannot read gates: {error}", where=path, hint="give a .npy file") from None
    if not isinstance(gates, np.ndarray) or gates.ndim != 3 or gates.dtype.kind not in "biuf" or not gates.size:
        found = f"{gates.dtype} {list(gates.shape)}" if isinstance(gates, np.ndarray) else "an archive"
        raise ConfigError(f"gates are {found}", where=path, hint="expected floats [layers, kv_heads, tokens]")
    if np.isnan(gates).any():
        raise ConfigError("gates hold NaN", where=path, hint="every token of every lane needs a number")
    return gates.astype(np.float32)
