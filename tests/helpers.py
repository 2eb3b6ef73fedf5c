"""Drive the cache from tests: replay a trace, or a string of page names, and look at every step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kvsim import registry
from kvsim.cache.cache import Cache
from kvsim.cache.demand import Use
from kvsim.cache.future import Future
from kvsim.cache.tiers import Capacity
from kvsim.trace.access import Access, DenseSource, Prompt, Trace, dense_trace

# the matrix of the published test vectors: rows are queries, the first two are the prompt
M1 = [[1.00], [0.50, 0.50], [0.78, 0.02, 0.20], [0.64, 0.03, 0.20, 0.13], [0.18, 0.05, 0.27, 0.28, 0.22]]
M1 += [[0.03, 0.56, 0.08, 0.14, 0.04, 0.15]]
THETA = Use("weight", 0.2)


def matrix_trace(rows=M1, prompt: int = 2) -> Trace:
    """One lane from a lower-triangular list of rows."""
    full = np.zeros((len(rows), 1, 1, len(rows)), np.float32)
    for i, row in enumerate(rows):
        full[i, 0, 0, : len(row)] = row
    return dense_trace([DenseSource(full[:prompt, ..., :prompt], full[prompt:])])


@dataclass
class Run:
    """`copies`: uint8 [accesses, lanes, stride], tiers of every key after each access (bit 0 is the GPU)."""

    cache: Cache
    out: list
    copies: np.ndarray
    score: list  # what the policy would say of every key after each access, NaN where there is no page

    def kept(self, lane: int = 0, start: int = 1) -> list[list[int]]:
        return [np.flatnonzero(c[lane] & 1).tolist() for c in self.copies[start:]]

    def mass(self, lane: int = 0) -> list[float]:
        return [round(float(o.attended[lane]), 3) for o in self.out[1:]]

    def misses(self) -> int:
        return int(sum(o.fetched.sum() for o in self.out))


def policy_for(spec: str, **attributes):
    """A policy whose class attributes (batch, lag, granularity, rows) are set for this test."""
    p = registry.build(spec)
    for name, value in attributes.items():
        setattr(p, name, value)
    return p


def replay(
    policy, budget, trace=None, *, kind=Cache, offload=None, use=THETA, demand=None, seed=0,
    host=None, ssd=None, audit=True, record=False,
):  # fmt: skip
    """One request through one cache. `policy`: a spec or an object; `offload`: a spec; with it, the offload regime."""
    p = registry.build(policy) if isinstance(policy, str) else policy
    trace = trace or matrix_trace()
    request = trace.requests()[0]
    if hasattr(p, "foresee"):
        pool = {"head": trace.pool}.get(p.granularity, p.granularity)
        p.foresee(Future(replace(request, pool=pool), demand or use))
    regime = {"offload": registry.build(offload, "offload"), "demand": demand} if offload else {}
    extra = {"audit": audit, "record": record} if issubclass(kind, Cache) else {}
    cache = kind(
        trace.lanes, request.stride, p, Capacity(budget, host, ssd), use=use,
        page_size=trace.page_size, seed=seed, **extra, **regime,
    )  # fmt: skip
    return drive(cache, request.accesses(), request.stride)


def drive(cache, accesses, stride) -> Run:
    out, copies, score = [], [], []
    for a in accesses:
        out.append(cache.access(a))
        copies.append(by_key(cache, cache.table.copies, stride))
        if callable(getattr(cache.policy, "score", None)):
            score.append(
                by_key(cache, np.broadcast_to(cache.policy.score(cache.view), cache.view.key.shape), stride, np.nan)
            )
    return Run(cache, out, np.array(copies), score)


def by_key(cache, column, stride, empty=0):
    """A column [.., slots] laid out by key: [lanes, stride]."""
    found = np.full((cache.lanes, stride + 1), empty, np.result_type(column, type(empty)))
    np.put_along_axis(found, cache.table.key.astype(np.intp), np.reshape(column, cache.table.key.shape), 1)
    return found[:, :-1].astype(np.uint8 if empty == 0 else float)


def references(names) -> list[Access]:
    """A sequence of page names as 0/1 attention rows: one reference per step, a page born when first named."""
    keys = {name: i for i, name in enumerate(dict.fromkeys(names))}
    accesses, born = [], 0
    for step, name in enumerate(names):
        row = np.zeros((1, 1, len(keys)), np.float32)
        row[0, 0, keys[name]] = 1
        before, born = born, max(born, keys[name] + 1)
        lane = np.zeros(1, np.int32)
        prompt = None
        if step == 0:
            first = row[..., :1]
            prompt = Prompt(first, first, first, first[None], first[None], np.ones((1, 1), np.int32))
        accesses.append(Access(step, row, row, born, born, born - before, lane, lane + born, prompt))
    return accesses


def refer(policy, names, budget: int) -> Run:
    """References through a cache of `budget` pages over an unlimited host."""
    accesses, p = references(names), registry.build(policy) if isinstance(policy, str) else policy
    stride, use = accesses[0].row.shape[-1], Use("weight", 0.5)
    if hasattr(p, "foresee"):
        p.foresee(Future(_Sequence(accesses), use))
    cache = Cache(
        (1, 1), stride, p, Capacity(budget), offload=registry.build("spill", "offload"), use=use, demand=use, audit=True
    )
    return drive(cache, accesses, stride)


class _Sequence:
    def __init__(self, accesses):
        self._accesses, self.output_tokens = accesses, len(accesses) - 1

    def accesses(self):
        return iter(self._accesses)
