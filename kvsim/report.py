"""The question a user really has: is this loss the policy's or the capacity's?

The policy stands beside LRU, the references that know the future, the bound and the full cache, at the same budget, and
one word says which is to blame. Only caches are replayed here; no time passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvsim.cache.quality import BLOCK
from kvsim.config import RunConfig, run_config
from kvsim.replay import Replay, opened, prepare
from kvsim.results import MORE, Result
from kvsim.simulate import run
from kvsim.trace.access import Trace
from kvsim.units import format_bandwidth, format_bytes, format_seconds

REFERENCES = {
    "lossy": ("random", "lru", "lfu", "belady", "mass-oracle"),
    "offload": ("random", "lru", "lfu", "belady"),
}
HELD = 1.10  # times the budget, on average, from which a policy is not judged by what others do with less
_TIMED = ("full", "lru")  # references whose latency is shown beside the policy's


@dataclass(frozen=True)
class Line:
    """One policy at the run's budget. `value` is recall (lossy) or page hit rate (offload), `tpot_p99_s` seconds.

    `kind` says what it may be used for: "policy", "baseline", "oracle", "bound" or "full".
    """

    name: str
    value: float
    kind: str
    tpot_p99_s: float = float("nan")


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


def compare(
    trace: Trace | str | Path, result: Result, progress: Callable[[int, int], None] | None = None
) -> Comparison:
    """Replay the references at the budget of `result`, a run of the same trace, and judge its loss.

    References decide at the policy's granularity. The full cache and LRU are timed too.
    """
    trace, config = opened(trace), run_config(result.manifest["config"])
    key = metric(result)
    policy = Line(config.policy, result.summary[key], "policy", result.summary["tpot_p99_s"])
    lines, names = [policy], ("full", *REFERENCES[str(config.regime)])
    granularity = result.manifest["policy"]["granularity"]
    for i, name in enumerate(names):
        if progress:
            progress(i, len(names))
        if name == config.policy or (config.demand == "select" and name != "full"):
            continue
        changed = {"policy": name, "granularity": granularity}
        if config.demand == "select":  # the full cache has no read set: it reads everything
            changed["demand"] = "dense"
        lines.append(_reference(trace, config.model_copy(update=changed), key))
    if key == "recall":
        lines.append(Line("step ceiling", result.summary["even_ceiling"], "bound"))
    best = bound([{"policy": x.name, key: x.value, "even_ceiling": result.summary["even_ceiling"]} for x in lines], key)
    lines.sort(key=lambda x: (-round(x.value, 6), x.name))
    verdict = judge(policy.value, best) if within(result) else "over"
    return Comparison(key.replace("_", " "), lines, verdict, policy.value, best)


def _reference(trace: Trace, config: RunConfig, key: str) -> Line:
    name = config.policy
    kind = {"full": "full", "belady": "oracle", "mass-oracle": "oracle"}.get(name, "baseline")
    label = "full cache" if name == "full" else name
    if name in _TIMED:
        summary = run(trace, config, ceiling=False).summary
        return Line(label, summary[key], kind, summary["tpot_p99_s"])
    return Line(label, replay_value(trace, config, key), kind)


def times_budget(result: Result) -> float:
    """What the decode steps held on average (a read set: read) over the budget and the newest page, whether a lag
    declares it or not."""
    steps, requests, m = result.tables["steps"], result.tables["requests"], result.manifest
    decode, order = steps["step"] > 0, np.argsort(requests["request"])
    if not decode.any():
        return 1.0
    at = np.searchsorted(requests["request"][order], steps["request"][decode])
    allowed = requests["budget_pages"][order][at] + 1
    page_bytes = m["budget_bytes"] / requests["budget_pages"].mean()
    held = steps["read_bytes" if m["config"]["regime"] == "lossy" else "resident_bytes"][decode]
    return float(held.sum() / (allowed.sum() * page_bytes))


def within(result: Result) -> bool:
    """Does it keep to the budget, so that it may be compared with what others do with that?"""
    return result.summary["over_budget"] <= MORE and times_budget(result) <= HELD


def metric(result: Result) -> str:
    """What tables and verdicts judge: recall, or the page hit rate where pages come back."""
    return "recall" if result.manifest["config"]["regime"] == "lossy" else "page_hit_rate"


def bound(rows: Iterable[Mapping[str, Any]], key: str) -> float:
    """The best any cache of this size could do, from comparable rows (same budget, pages, demand); nan if unknown.

    The step ceiling where pages are lost; Belady where they come back, exact for pages of one size.
    """
    if key == "recall":
        known = [row["even_ceiling"] for row in rows if math.isfinite(row["even_ceiling"])]
        return min(known, default=float("nan"))
    return max((row[key] for row in rows if row["policy"] == "belady"), default=float("nan"))


def judge(policy: float, bound: float) -> str:
    """Whose loss it is.

    "capacity" when at least two thirds of it lie above the bound, "policy" when they lie below, else "both".
    """
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
    "over": "none: on average it took more than the budget, which the others keep to",
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
    rows = [("recall", f"{s['recall']:.4f}", "attention mass that the decode steps still read")]
    if c["regime"] == "offload":
        rows.append(("page hit rate", f"{s['page_hit_rate']:.4f}", "needed pages found on the GPU"))
        rows.append(("mass hit rate", f"{s['mass_hit_rate']:.4f}", "attention mass found on the GPU"))
    else:
        rows.append(("recurrence loss", f"{s['recurrence_loss']:.4f}", "uses that found their page gone, of all uses"))
    if math.isfinite(s["gold_loss"]):
        rows.append(("gold-source loss", f"{s['gold_loss']:.4f}", "needed tokens gone, per token and lane"))
    if math.isfinite(s["output_error"]):
        rows.append(
            ("output error", f"{s['output_error']:.4f}", "of attention's output, relative, mean of query heads")
        )
    if (times := times_budget(result)) > MORE and c["policy"] != "full":
        rows.append(("budget taken", f"{times:.2f}x", "held or read in decode steps, mean, over the budget"))
    if s["stranded_share"] > 0:
        meaning = f"of tokens in blocks of {BLOCK} still held: gone, but not free"
        rows.append(("stranded tokens", f"{s['stranded_share']:.1%}", meaning))
    tpot = f"{format_seconds(s['tpot_p50_s'])} / {format_seconds(s['tpot_p99_s'])}"
    rows += [
        ("TPOT p50 / p99", tpot, "between tokens, other requests' prefills included, predicted"),
        ("TTFT mean", format_seconds(s["ttft_mean_s"]), "from admission, not from arrival, predicted"),
        ("throughput", f"{s['throughput']:.4g} tokens/s", "of all requests from first to last, predicted"),
        ("stall share", f"{s['stall_share']:.1%}", "of decode time: the GPU waits for pages"),
        ("submit share", f"{s['submit_share']:.1%}", "of decode time: the GPU waits for launches and copy submits"),
        ("peak KV on GPU", format_bytes(s["peak_bytes"]), "while attention runs, all running requests, prefill too"),
    ]
    links = result.tables["links"]
    for i, name in enumerate(links["link"]):
        if links["bytes"][i]:
            rate = format_bandwidth(links["bytes"][i] / links["busy_s"][i])
            meaning = f"busy {links['utilisation'][i]:.1%} of the run, {rate} while busy"
            rows.append((f"{name} {links['direction'][i]}", format_bytes(links["bytes"][i]), meaning))
    return rows


def title(result: Result) -> str:
    """One line that says what was run."""
    m, c = result.manifest, result.manifest["config"]
    parts = [
        f"{m['trace']['name']} ({m['trace']['requests']} requests)",
        f"{c['policy']} at {c['budget']} {m['budget_basis']} ({format_bytes(m['budget_bytes'])} per request)",
        c["regime"] if c["regime"] == "lossy" else f"offload to {c['offload']}, demand {c['demand']}",
        f"pages of {c['page_size']}, {c['concurrency']} at a time",
        f"{m['model']['name']} on {m['hardware']['name']}",
    ]
    return " | ".join(parts)
