"""Search the layers' shares of a budget by CMA-ES on training requests; judge them on held-out ones.

    python -m experiments.evolkv.search --train 0,1,2,3 --test 4,5,6,7 --inner h2o --budget 10%

EvolKV (arXiv 2509.08315; its code was not found) as kvsim defines it: layers form groups of neighbours, and from the
bottom up CMA-ES moves the budgets of one group's layers while the others stay. Each candidate is rescaled to the run's
total, so the objective needs no term for efficiency: it is the recall of `layer-budgets` around the inner policy, or
the negative error of attention's output. The result is compared with even budgets and with `pyramid`. Needs `cma`
(`pip install kvsim[search]`). The same arguments give the same file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvsim.config import RunConfig
from kvsim.registry import Spec
from kvsim.replay import Replay, prepare
from kvsim.trace import open_trace
from kvsim.trace.access import Trace

OBJECTIVES = ("recall", "output-error")
STEP, REACH = 0.5, 4.0  # of a layer's log share: first standard deviation, and limit on either side


@dataclass
class Problem:
    """What is optimised: a policy under a budget on some requests of a trace. Larger values are better."""

    trace: Trace
    inner: str
    budget: str
    objective: str = "recall"
    tried: dict[tuple[float, ...], float] = field(default_factory=dict)

    def spec(self, shares: Sequence[float]) -> str:
        return str(Spec("layer-budgets", {"inner": self.inner, "budgets": [round(float(x), 4) for x in shares]}))

    def value(self, shares: Sequence[float]) -> float:
        """The mean over requests; each list of shares is replayed once."""
        key = tuple(round(float(x), 4) for x in shares)
        if key not in self.tried:
            self.tried[key] = float(np.mean(self.values(self.spec(shares))))
        return self.tried[key]

    def values(self, spec: str) -> list[float]:
        """Of each request, under any policy."""
        setting = prepare(self.trace, RunConfig(policy=spec, budget=self.budget, regime="lossy"))
        return [self._request(setting, request) for request in setting.trace.requests()]

    def _request(self, setting, request) -> float:
        total = attended = 0.0
        errors = []
        replay = Replay(setting, request, quality=self.objective == "output-error")
        for access, outcome in replay:
            if not access.prefill:
                total += float(outcome.total.sum(dtype=np.float64))
                attended += float(outcome.attended.sum(dtype=np.float64))
                errors.append(replay.quality.output_error if replay.quality else np.nan)
        return attended / total if self.objective == "recall" else -float(np.mean(errors))


def groups(layers: int, size: int) -> Iterator[list[int]]:
    """Neighbouring layers, bottom up; the last group may be smaller."""
    for first in range(0, layers, size):
        yield list(range(first, min(first + size, layers)))


def rescale(shares: np.ndarray) -> np.ndarray:
    """The same proportions with mean 1: what a layer gets, in even budgets."""
    return shares / shares.mean()


def search(problem: Problem, layers: int, size: int, evaluations: int, seed: int) -> tuple[np.ndarray, list[dict]]:
    """Shares per layer (mean 1), and what happened: one entry per better candidate. `evaluations`: per group."""
    import cma

    best, log = np.zeros(layers), []
    value = problem.value(np.ones(layers))
    for number, group in enumerate(groups(layers, size)):
        start = np.zeros(max(2, len(group)))  # cma wants two coordinates; the second of a single layer is not read
        start[: len(group)] = np.clip(best[group], -REACH, REACH)
        options = {"seed": seed + number + 1, "maxfevals": evaluations, "verbose": -9, "bounds": [-REACH, REACH]}
        strategy = cma.CMAEvolutionStrategy(start, STEP, options)
        count, others = 0, best.copy()
        while not strategy.stop():
            asked, found = strategy.ask(), []
            for x in asked:
                others[group] = x[: len(group)]
                shares, count = rescale(np.exp(others)), count + 1
                found.append(-problem.value(shares))
                if -found[-1] > value:
                    value, best = -found[-1], np.log(shares)
                    entry = {"group": group, "evaluation": count, "value": round(value, 6)}
                    log.append({**entry, "shares": np.round(shares, 4).tolist()})
            strategy.tell(asked, found)
    return rescale(np.exp(best)), log


def shape(shares: Sequence[float]) -> str:
    """An allocation in a word."""
    steps = np.sign(np.diff(np.round(shares, 2)))
    if not steps.any():
        return "even"
    return "falls" if (steps <= 0).all() else "rises" if (steps >= 0).all() else "neither falls nor rises"


def study(trace: Trace, train: list[int], test: list[int], inner: str, budget: str, **how: Any) -> dict[str, Any]:
    """One search and its verdict, as it is written down."""
    objective = how.pop("objective", "recall")
    problem = Problem(trace.only(train), inner, budget, objective)
    shares, log = search(problem, trace.geometry.layers, **how)
    held_out = Problem(trace.only(test), inner, budget, objective)
    specs = {"even": inner, "pyramid": str(Spec("pyramid", {"inner": inner})), "evolkv": problem.spec(shares)}
    sides = {"train": problem, "test": held_out}
    scores = {
        side: {name: [round(v, 6) for v in p.values(spec)] for name, spec in specs.items()} for side, p in sides.items()
    }
    return {
        "inner": inner,
        "budget": budget,
        "objective": objective,
        "shares": np.round(shares, 4).tolist(),
        "shape": shape(shares),
        "replayed": len(problem.tried),
        "mean": {side: {n: round(float(np.mean(v)), 6) for n, v in found.items()} for side, found in scores.items()},
        "by_request": scores,
        "log": log,
    }


def table(studies: list[dict]) -> str:
    """Held-out means as Markdown; training means in brackets."""
    lines = ["| around | budget | even | pyramid | evolkv | shares, first layer to last | shape |", "|---" * 7 + "|"]
    for s in studies:
        cells = [
            f"{abs(s['mean']['test'][n]):.4f} ({abs(s['mean']['train'][n]):.4f})" for n in ("even", "pyramid", "evolkv")
        ]
        shares = ", ".join(f"{x:.2f}" for x in s["shares"])
        lines.append(f"| {s['inner']} | {s['budget']} | {' | '.join(cells)} | {shares} | {s['shape']} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Search layer budgets by CMA-ES.")
    parser.add_argument("--trace", default="traces/reasoner.kvtrace")
    parser.add_argument("--train", default="0,1,2,3", help="request ids")
    parser.add_argument("--test", default="4,5,6,7", help="request ids")
    parser.add_argument("--inner", action="append", help="a policy; may be given several times (default h2o)")
    parser.add_argument("--budget", action="append", help="may be given several times (default 10%%)")
    parser.add_argument("--objective", choices=OBJECTIVES, default="recall")
    parser.add_argument("--group", type=int, default=8, help="layers per group (default 8)")
    parser.add_argument("--evaluations", type=int, default=60, help="per group (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", help="write the studies to this JSON file")
    a = parser.parse_args(arguments)
    trace = open_trace(a.trace)
    train, test = ([int(x) for x in ids.split(",")] for ids in (a.train, a.test))
    how = {"objective": a.objective, "size": a.group, "evaluations": a.evaluations, "seed": a.seed}
    studies = []
    for inner in a.inner or ["h2o"]:
        for budget in a.budget or ["10%"]:
            studies.append(study(trace, train, test, inner, budget, **how))
            print(table(studies[-1:]).splitlines()[-1], flush=True)
    if a.out:
        made = {"trace": trace.name, "fingerprint": trace.fingerprint, "train": train, "test": test, **how}
        text = json.dumps({**made, "studies": studies}, indent=1)
        Path(a.out).write_text(text + "\n", encoding="utf-8")
    print(table(studies))


if __name__ == "__main__":
    main()
