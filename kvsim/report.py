"""The question a user really has: is this loss the policy's or the capacity's?

The policy stands beside LRU, the references that know the future, the bound and the full cache, at the same budget, and
one word says which is to blame (design decision 18). Only caches are replayed here; no time passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvsim.config import RunConfig, run_config
from kvsim.replay import Replay, prepare
from kvsim.results import Result
from kvsim.trace.access import Trace
from kvsim.units import format_bandwidth, format_bytes, format_seconds

REFERENCES = {"lossy": ("random", "lru", "belady", "mass-oracle"), "offload": ("random", "lru", "belady")}


@dataclass(frozen=True)
class Line:
    """One policy at the run's budget. `value` is recall (lossy) or page hit rate (offload).

    `kind` says what it may be used for.
    """

    name: str
    value: float
    kind: str  # "policy", "baseline", "oracle", "bound", "full"


@dataclass(frozen=True)
class Comparison:
    """Policy, baselines, oracles, bound and full cache side by side, best first, and the verdict."""

    metric: str
    lines: list[Line]
    verdict: str
    policy: float
    bound: float

    @property
    def loss(self) -> float:
        return 1.0 - self.policy

    @property
    def regret(self) -> float:
        """What the best possible cache of this size could still gain."""
        return self.bound - self.policy


def compare(trace: Trace, result: Result, progress: Callable[[int, int], None] | None = None) -> Comparison:
    """Replay the references at the budget of `result`, a run of the same trace, and judge its loss."""
    config = run_config(result.manifest["config"])
    lossy = config.regime == "lossy"
    metric, key = ("recall", "recall") if lossy else ("page hit rate", "page_hit_rate")
    policy = result.summary[key]
    lines = [Line("full cache", 1.0, "full"), Line(config.policy, policy, "policy")]
    names = [n for n in REFERENCES[str(config.regime)] if n != config.policy and config.demand != "select"]
    for i, name in enumerate(names):
        if progress:
            progress(i, len(names))
        value = replay_value(trace, config.model_copy(update={"policy": name, "granularity": None}), key)
        lines.append(Line(name, value, "oracle" if name in ("belady", "mass-oracle") else "baseline"))
    if lossy:
        bound = result.summary["ceiling"]
        lines.append(Line("step ceiling", bound, "bound"))
    else:  # on unit pages nothing misses less than Belady
        bound = max((x.value for x in lines if x.name == "belady"), default=float("nan"))
    lines.sort(key=lambda x: (-x.value, x.name))
    return Comparison(metric, lines, judge(policy, bound), policy, bound)


def judge(policy: float, bound: float) -> str:
    """ "capacity" when at least two thirds of the loss lie above the bound, "policy" when they lie below it, else
    "both"."""
    loss = 1.0 - policy
    if loss < 5e-4:
        return "none"
    if math.isnan(bound):
        return "unknown"
    if 1.0 - bound >= 2 / 3 * loss:
        return "capacity"
    return "policy" if bound - policy >= 2 / 3 * loss else "both"


VERDICTS = {
    "none": "nothing to speak of is lost",
    "capacity": "capacity-bound: no policy could keep much more at this size",
    "policy": "policy-bound: a better policy could win back most of it",
    "both": "both: part of it is out of reach at this size, part is the policy's",
    "unknown": "no bound is known for this demand model",
}


def replay_value(trace: Trace, config: RunConfig, key: str) -> float:
    """Recall or page hit rate of one policy over all requests, decode steps only; no machine."""
    setting = prepare(trace, config)
    found = total = 0.0
    for request in setting.trace.requests():
        for a, o in Replay(setting, request):
            if not a.prefill:
                found += float(np.sum(o.attended if key == "recall" else o.found, dtype=np.float64))
                total += float(np.sum(o.total if key == "recall" else o.used, dtype=np.float64))
    return found / total if total else 1.0


def summary_rows(result: Result) -> list[tuple[str, str, str]]:
    """(what, value, meaning) for the table of a run."""
    s, c = result.summary, result.manifest["config"]
    lossy = c["regime"] == "lossy"
    rows = [("recall", f"{s['recall']:.4f}", "attention mass that the decode steps still read")]
    if not lossy:
        rows.append(
            ("page hit rate", f"{s['page_hit_rate']:.4f}", f"needed pages found on the GPU, demand {c['demand']}")
        )
        rows.append(("mass hit rate", f"{s['mass_hit_rate']:.4f}", "attention mass found on the GPU"))
    else:
        rows.append(
            ("recurrence loss", f"{s['recurrence_loss']:.4f}", "uses of a page that had been evicted, of all uses")
        )
    rows += [
        (
            "TPOT p50 / p99",
            f"{format_seconds(s['tpot_p50_s'])} / {format_seconds(s['tpot_p99_s'])}",
            "per output token, predicted",
        ),
        ("TTFT mean", format_seconds(s["ttft_mean_s"]), "from admission, predicted"),
        ("stall share", f"{s['stall_share']:.1%}", "GPU waiting for pages, of decode time"),
        ("peak KV on GPU", format_bytes(s["peak_bytes"]), "of the largest request"),
    ]
    links = result.tables["links"]
    for i, name in enumerate(links["link"]):
        if links["bytes"][i]:
            rate = format_bandwidth(links["bytes"][i] / links["busy_s"][i])
            meaning = f"busy {links['utilisation'][i]:.1%}, {rate} while busy"
            rows.append((f"{name} {links['direction'][i]}", format_bytes(links["bytes"][i]), meaning))
    return rows
