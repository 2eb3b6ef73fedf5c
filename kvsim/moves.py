"""A run's movement plan: what its cache moves, in the layers and pages of the trace.

What a cache moves does not depend on time, so the plan of a run can be performed on a real device and timed there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvsim.cache.outcome import Outcome
from kvsim.errors import ConfigError
from kvsim.plan import PlanInfo, PlanWriter
from kvsim.replay import Replay, Setting
from kvsim.trace.access import Access


def plan_writer(path: Path, setting: Setting) -> PlanWriter:
    """A writer for the plan of this run. Raises ConfigError where the run's moves cannot be a plan's."""
    granularity, requests = setting.policy().granularity, setting.trace.requests()
    if setting.lossy:
        raise ConfigError("a lossy run moves nothing", hint="a plan needs --regime offload")
    if granularity == "head":
        hint = "decide by layer: --granularity layer"
        raise ConfigError("a plan moves pages of all KV heads, and the policy decides for each of them", hint=hint)
    if not all(form.plain for form in setting.formats.values()):
        raise ConfigError("a plan moves pages as they are, and a tier is quantised", hint="leave the formats at fp16")
    if len(requests) != 1:
        hint = f"choose one: --request {requests[0].id}"
        raise ConfigError(f"a plan is of one request, the run has {len(requests)}", hint=hint)
    g, request = setting.trace.geometry, requests[0]
    info = PlanInfo(
        trace=setting.trace.fingerprint,
        trace_name=setting.trace.name,
        page_size=request.page_size,
        page_bytes=round(request.page_size * g.kv_heads * g.token_bytes),
        layers=g.layers,
        kv_heads=g.kv_heads,
        head_dim=g.head_dim,
        context=request.tokens,
        steps=request.output_tokens + 1,
        policy=setting.config.policy,
        budget=setting.config.budget,
    )
    return PlanWriter(path, info)


class Moves:
    """Writes down the moves of one replay. A prefetch is a load of the step after, the first that may wait for it."""

    def __init__(self, writer: PlanWriter, replay: Replay):
        self.writer, self.layers = writer, writer.info.layers
        self.shared = self.layers // replay.lanes[0]  # layers of the trace that decide as one
        self.late: list[tuple[int, np.ndarray, np.ndarray]] = []

    def add(self, a: Access, o: Outcome) -> None:
        for tier, layer, page in self.late:
            self.writer.add(a.step, layer, page, tier, "load")
        self.late = []
        for move in o.moved:
            layer = (move.layer[:, None] * self.shared + np.arange(self.shared)).ravel()
            page = np.repeat(move.page, self.shared)
            if move.action == "prefetch":
                self.late.append((move.tier, layer, page))
            else:
                self.writer.add(a.step, layer, page, move.tier, move.action)
