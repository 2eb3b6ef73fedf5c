"""Caches of all sizes in one pass against a cache of each size, page by page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from kvsim import registry
from kvsim.cache.cache import Cache
from kvsim.cache.demand import FAIR_SHARE, Use
from kvsim.cache.future import Future
from kvsim.cache.stack import Stacks, not_nested
from kvsim.cache.table import GPU
from kvsim.cache.tiers import Capacity
from kvsim.errors import ConfigError
from kvsim.trace.access import VECTORS, Trace


def compare_sizes(
    trace: Trace, policy: Callable[[], Any], *, use: Use = FAIR_SHARE, demand: Use | None = None, seed: int = 0,
    budgets: Iterable[int] | None = None, fusing: bool | None = None,
) -> tuple[str | None, int]:  # fmt: skip
    """The first difference, in words, on the first request of a trace, and how many sizes were compared.

    `policy()` makes a fresh one; with a `demand` the regime is offload. `budgets`: those that are compared (None: all);
    `fusing`: as of a cache, for both. Compared are the pages on the GPU after every step, and the sums of attention
    mass and used pages found there, exactly. Where the caches are not nested, by what is known before or turns out,
    nothing is.
    """
    request = trace.requests()[0]

    def cache(kind: Callable[..., Cache], budget: int) -> Any:
        p = policy()
        if callable(getattr(p, "foresee", None)):
            pool = trace.pool if p.granularity == "head" else p.granularity
            p.foresee(Future(replace(request, pool=pool), demand or use))
        offload = registry.build("spill", "offload") if demand else None
        made = kind(
            trace.lanes, request.stride, p, Capacity(budget, None), offload=offload, use=use, demand=demand,
            page_size=trace.page_size, seed=seed, facts=request.facts,
        )  # fmt: skip
        made.fusing = fusing
        return made

    stacks = cache(Stacks, request.stride)
    single: dict[int, Cache] = {}
    for budget in sorted({min(b, request.stride) for b in budgets or range(1, request.stride + 1)}):
        try:
            single[budget] = cache(Cache, budget)
        except ConfigError:  # below what is protected
            continue
    mass, found = np.zeros(request.stride + 1), np.zeros(request.stride + 1, np.int64)
    if not_nested(stacks.policy):
        return None, 0
    for a in request.accesses(vectors=bool(stacks.policy.needs & VECTORS)):
        stacks.access(a)
        if stacks.depends:
            return None, 0
        for budget, c in single.items():
            out = c.access(a)
            mass[budget] += 0 if a.prefill else out.hit.sum(dtype=np.float64)
            found[budget] += 0 if a.prefill else out.found.sum()
            for lane in range(c.lanes):
                held = set(c.table.key[lane][(c.table.copies[lane] & GPU) > 0].tolist())
                if held != stacks.held(lane, budget):
                    apart = sorted(held ^ stacks.held(lane, budget))
                    return f"after step {a.step} a cache of {budget} pages differs in {apart} (lane {lane})", len(
                        single
                    )
    for budget in single:
        if mass[budget] != stacks.mass[: budget + 1].sum() or found[budget] != stacks.found[: budget + 1].sum():
            return f"a cache of {budget} pages finds something else", len(single)
    return None, len(single)
