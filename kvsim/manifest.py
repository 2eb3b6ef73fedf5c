"""How a result was made, in words and numbers: what a run's manifest holds, and what decides its identity.

Everything here is a function of configuration, trace and code: no clock, no paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from kvsim import registry, results
from kvsim.replay import Setting
from kvsim.units import format_bytes, parse_budget

CAVEAT = (
    "open loop: attention was recorded with a full cache, so eviction does not change what is attended later; "
    "recall is a proxy for quality"
)
_BASIS = {"fraction": "of each request's final length", "pages": "per lane", "bytes": "over all lanes"}
Tables = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Crowd:
    """What requests did to each other: `peak` bytes on the GPU, the `most` that ran together, did one wait for room?"""

    peak: float
    most: int
    waited: bool


def manifest(
    setting: Setting, identity: Mapping[str, Any], tables: Tables, crowd: Crowd, *, events: int, state_bytes: int
) -> dict[str, Any]:
    """The manifest of a run from its `identity` (`identify`, before the first step: files may be edited meanwhile), its
    tables, the number of SimPy `events` and what its policy keeps per page.
    """
    policy = setting.policy()
    summary = {
        **results.summarise(tables),
        "peak_bytes": crowd.peak,
        "running_peak": crowd.most,
        "over_budget": _over_budget(setting, policy, tables),
        "state_bytes_per_page": state_bytes,
    }
    constants = {key: [c.value, c.evidence, c.source] for key, c in setting.hardware.constants.items()}
    return {
        "schema": results.SCHEMA,
        "id": results.run_id(identity),
        **identity,
        "hardware": {"name": setting.hardware.name, "constants": constants},
        "model": vars(setting.shape),
        "policy": {
            "name": policy.spec_name,
            "parameters": {f.name: getattr(policy, f.name) for f in fields(policy)},
            "oracle": callable(getattr(policy, "foresee", None)),
            "evidence": policy.evidence,
            "granularity": policy.granularity,
            "rows": policy.rows,
        },
        "budget_basis": _BASIS[parse_budget(setting.config.budget)[1]],
        "budget_bytes": float(setting.stored(np.mean(tables["requests"]["budget_pages"]))) * setting.page_bytes,
        "evidence": "latency: predicted by the machine model from the constants above; " + CAVEAT,
        "warnings": _warnings(setting, crowd.peak),
        "notes": [*_notes(setting, policy, tables["requests"], summary), *_crowding(setting, crowd)],
        "events": int(events),
        "summary": summary,
    }


def _over_budget(setting: Setting, policy: Any, tables: Tables) -> float:
    """What the decode steps held (a read set: read), over what the budget allows: 1 and less for who keeps to it.

    Allowed are the newest page, before it is decided who leaves, and what a lag declares.
    """
    steps, requests = tables["steps"], tables["requests"]
    decode = steps["step"] > 0
    if not decode.any() or not policy.bounded and policy.spec_name == "full":
        return 1.0
    reads = callable(getattr(policy, "select", None))
    column = "read_bytes" if reads and setting.lossy else "held_bytes" if setting.lossy else "resident_bytes"
    late = policy.lag - 1 if setting.lossy and not policy.once else 0
    pages = dict(zip(requests["request"].tolist(), requests["budget_pages"].tolist(), strict=True))
    most = np.array([pages[r] + 1 + late for r in steps["request"][decode].tolist()], np.float64)
    allowed = setting.stored(most) * setting.page_bytes
    return float(steps[column][decode].sum() / allowed.sum())


def _warnings(setting: Setting, peak: float) -> list[str]:
    """What makes the numbers those of a machine that does not exist."""
    weights, memory = setting.shape.weight_bytes, setting.hardware.gpu.memory
    if weights + peak <= memory:
        return []
    need = f"{format_bytes(weights)} of weights and {format_bytes(peak)} of pages"
    return [f"{need} are more than the GPU's {format_bytes(memory)}; the run goes on as if they fitted"]


def _crowding(setting: Setting, crowd: Crowd) -> list[str]:
    if not crowd.waited:
        return []
    room = format_bytes(max(0.0, setting.memory["gpu"]))
    return [
        f"requests waited for memory: {crowd.most} of {setting.concurrency} ran together "
        f"in the {room} that the weights leave on the GPU"
    ]


def _notes(
    setting: Setting, policy: Any, requests: Mapping[str, np.ndarray], summary: Mapping[str, float]
) -> list[str]:
    """What a reader of the numbers has to know."""
    notes, shape, name = list(setting.notes), setting.shape, setting.config.policy
    full = int((requests["budget_pages"] >= requests["request_pages"]).sum())
    reads, splits = (callable(getattr(policy, hook, None)) for hook in ("select", "split"))
    if full and policy.bounded and not splits:
        total = len(requests["request"])
        notes.append(f"{full} of {total} requests fit into the budget whole: there the cache is the full cache")
    if policy.once:
        notes.append(
            f"{name} decides once, after the prompt; what is generated stays beside the budget: see peak_bytes"
        )
    if setting.lossy and policy.lag > 1:
        late = f"may hold {policy.lag - 1} pages per lane over the budget: see peak_bytes"
        notes.append(f"{name} decides every {policy.lag} steps and {late}")
    if setting.lossy and reads:
        notes.append(f"{name} holds every page: it saves bandwidth, not memory")
    if summary["over_budget"] > results.MORE:
        what, times = "reads" if reads and setting.lossy else "holds", summary["over_budget"]
        notes.append(f"{name} {what} {times:.2f} times the budget: do not compare it with others at the same budget")
    if setting.lossy and policy.rows == "visible" and setting.trace.manifest.get("heads") != "query":
        notes.append(
            "after eviction rows are renormalised per KV head, on the mean of its query heads: our variant of what the "
            "published code sees per query head"
        )
    if setting.demand is not None:
        notes.append("demand is clairvoyant: a step waits for the pages its true attention weights name")
        if setting.config.overlap != "layer" and setting.demand.kind != "all":
            notes.append(f"overlap = {setting.config.overlap}: what every layer needs is known when the step starts")
        if name.startswith("belady"):
            notes.append(
                "belady misses the fewest pages, which is no bound on time: it may need more and smaller copies"
            )
    if summary["prefill_gaps"]:
        share = summary["prefill_gaps"]
        notes.append(
            f"{share:.1%} of the gaps between tokens hold another request's prefill, which is not cut into chunks: "
            f"of these are the quantiles of TPOT above p{100 * (1 - share):.3g}"
        )
    if setting.config.model is None and shape.layer_bytes < setting.hardware.gpu.weight_bandwidth * 1e-6:
        notes.append(f"{shape.name} is so small that fixed kernel times are all there is; --model times another one")
    return notes


def identify(setting: Setting) -> dict[str, Any]:
    """What decides a result: configuration and the files it names, trace content, version, source of the policies."""
    from kvsim import __version__

    trace, config = setting.trace, setting.config
    with registry.reading(setting.texts):
        source = registry.source_hash(setting.policy())
        offload = None if setting.lossy else registry.source_hash(registry.build(str(config.offload), "offload"))
    loaded = {
        "hardware": {key: c.value for key, c in setting.hardware.constants.items()},
        "model": vars(setting.shape),
        "offload": offload,
    }
    return {
        "config": config.model_dump(),
        "trace": {"fingerprint": trace.fingerprint, "name": trace.name, "requests": len(trace.sources)},
        "source": source,
        "loaded": results.digest(loaded),
        "kvsim": __version__,
    }
