"""Write docs/quality.md and its figures from rows. Every word about what came out is chosen by the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from experiments.quality.rows import Row, read
from kvsim.errors import ResultError
from kvsim.figures import page as sheets
from kvsim.figures.families import is_protected, label
from kvsim.figures.line import COLOURS, MARKERS
from kvsim.results import file_beside
from kvsim.validate.judge import kendall_tau

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
KEPT = 0.05  # accuracy is kept where no more than this is lost against the full cache
SURE = 2.0  # standard errors, over chains, from which two policies are told apart
DRAWS, SEED = 400, 0  # of the bootstrap
CLAIMED, RIVALS, AT = "lazy-eviction", ("h2o", "tova"), "50 %"
SHOWN = ("recall", "gold_loss")  # predictors in the figure
# Of the open loop, the higher the worse; what it is called, and how it is read from a row.
PREDICTORS: dict[str, tuple[str, Callable[[Row], float]]] = {
    "recall": ("lost attention mass (1 - recall)", lambda row: 1 - row["open"]["recall"]),
    "halved": ("rows that lost more than half of their mass", lambda row: row["open"]["halved"]),
    "output_error": ("output error", lambda row: row["open"]["output_error"]),
    "recurrence_loss": ("recurrence loss", lambda row: row["open"]["recurrence_loss"]),
    "gold_loss": ("gold-source loss", lambda row: row["open"]["gold_loss"]),
    "gold_gone": ("gold sources gone from every lane", lambda row: row["open"]["gold_gone"]),
}


@dataclass(frozen=True)
class Point:
    """One policy at one budget: its row, and by chain its gold loss and share of right answers."""

    row: Row

    @property
    def policy(self) -> str:
        return self.row["policy"]

    @property
    def share(self) -> float:
        return float(self.row["budget"].rstrip("%"))

    @cached_property
    def loss(self) -> np.ndarray:
        return np.array(self.row["closed"]["loss"])

    @cached_property
    def right(self) -> np.ndarray:
        return np.array(self.row["closed"]["right"])


@dataclass(frozen=True)
class Group:
    """The points of one model on one device, over the same chains."""

    points: Sequence[Point]  # the full cache is not among them
    full: Point

    @property
    def facts(self) -> Row:
        return self.full.row

    @property
    def name(self) -> str:
        return f"{self.facts['model']} on {self.facts['device']}"

    @property
    def figure(self) -> str:
        return f"quality-{self.facts['model']}-{self.facts['device']}.png"

    @cached_property
    def budgets(self) -> list[float]:
        return sorted({p.share for p in self.points})

    @cached_property
    def policies(self) -> list[str]:
        return sorted({p.policy for p in self.points})

    def at(self, share: float) -> list[Point]:
        return [p for p in self.points if p.share == share]

    def point(self, policy: str, share: float) -> Point | None:
        return next((p for p in self.at(share) if p.policy == policy), None)


def groups(rows: Iterable[Row]) -> list[Group]:
    """Rows that may be compared with each other. Raises ResultError where one has no full cache, or nothing else."""
    found: dict[tuple, list[Point]] = {}
    for row in rows:
        same = tuple(row[k] for k in ("device", "weights", "task", "seed", "chains"))
        found.setdefault(same, []).append(Point(row))
    made = []
    for points in found.values():
        full = next((p for p in points if p.policy == "full"), None)
        rest = sorted((p for p in points if p.policy != "full"), key=lambda p: (p.share, p.policy))
        if full is None or not rest:
            raise ResultError("rows without a full cache, or of nothing else", hint="measure full and another policy")
        made.append(Group(rest, full))
    return made


# -- statistics --------------------------------------------------------------------------------------------------


def ranks(x: Sequence[float]) -> np.ndarray:
    """1, 2, ... in ascending order; equals share the mean of theirs."""
    a = np.asarray(x, float)
    return (a[:, None] > a).sum(1) + ((a[:, None] == a).sum(1) + 1) / 2


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation (1904): Pearson's of the ranks. NaN where one side does not vary."""
    a, b = (r - r.mean() for r in (ranks(x), ranks(y)))
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size else math.nan


def paired(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean of a - b over chains, and its standard error."""
    d = a - b
    return float(d.mean()), float(d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else math.nan


def error(x: np.ndarray) -> float:
    """Standard error of the mean over chains."""
    return float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan


def _band(points: Sequence[Point], predicted: Sequence[float], measured: str) -> tuple[float, float, float]:
    """Spearman over points, and 5 and 95 % of it where the chains are drawn anew. NaN for what does not vary."""
    if len(set(predicted)) == 1:
        return math.nan, math.nan, math.nan
    values = np.stack([getattr(p, measured) for p in points])
    sign = 1 if measured == "loss" else -1
    rng = np.random.default_rng(SEED)
    draws = [
        spearman(predicted, sign * values[:, rng.integers(0, values.shape[1], values.shape[1])].mean(1))
        for _ in range(DRAWS)
    ]
    known = [rho for rho in draws if not math.isnan(rho)]  # all chains drawn alike say nothing
    low, high = np.quantile(known, [0.05, 0.95]).tolist() if known else (math.nan, math.nan)
    return spearman(predicted, sign * values.mean(1)), low, high


@dataclass(frozen=True)
class Pair:
    """Two policies at one budget that the closed loop tells apart: `better` has the smaller loss by `gap` nats."""

    better: Point
    worse: Point
    gap: float

    @property
    def answers(self) -> float:
        """By how much more it answers rightly."""
        return float(self.better.right.mean() - self.worse.right.mean())


def told_apart(g: Group) -> list[Pair]:
    """Pairs at the same budget whose losses differ by more than `SURE` paired standard errors."""
    found = []
    for share in g.budgets:
        at = g.at(share)
        for i, a in enumerate(at):
            for b in at[i + 1 :]:
                gap, sigma = paired(b.loss, a.loss)
                if abs(gap) > SURE * sigma:
                    found.append(Pair(a, b, gap) if gap > 0 else Pair(b, a, -gap))
    return found


# -- text --------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *lines))


def percent(x: float) -> str:
    return f"{100 * x:.0f} %" if 100 * x >= 99.95 or x == 0 else f"{100 * x:.1f} %"


def small(x: float) -> str:
    return f"{x:.4f}" if x < 0.1 else f"{x:.3f}"


def points_text(g: Group) -> str:
    """Every point."""
    head = [
        "budget", "policy", "answers right", "gold loss, nats", "within a step", "results", "statements", "held",
        "recall", "output error", "recurrence loss", "gold-source loss", "gold gone",
    ]  # fmt: skip

    def line(p: Point) -> list[str]:
        c, o = p.row["closed"], p.row["open"]
        kinds = [small(x) for x in c["loss_by_kind"].values()]
        accuracy = f"{percent(p.right.mean())} ± {100 * error(p.right):.1f}"
        found = [f"{o[k]:.3f}" for k in ("recall", "output_error", "recurrence_loss", "gold_loss")]
        name = f"`{p.policy}`"
        return [
            f"{p.share:.0f} %", name, accuracy, small(p.loss.mean()), *kinds, percent(c["held"]), *found,
            str(o["gold_gone"]),
        ]  # fmt: skip

    order = sorted(g.points, key=lambda p: (-p.share, -p.right.mean(), p.loss.mean()))
    return table(head, [line(p) for p in (g.full, *order)])


def predictors(g: Group) -> Mapping[str, tuple[str, Callable[[Row], float]]]:
    """Those that all rows have: older ones may lack some."""
    return {key: pair for key, pair in PREDICTORS.items() if all(key in p.row["open"] for p in g.points)}


def correlations_text(g: Group) -> str:
    """How the open loop ranks all points, and the policies at each budget."""
    lines = []
    for name, value in predictors(g).values():
        predicted = [value(p.row) for p in g.points]
        cells = []
        for measured in ("loss", "right"):
            rho, low, high = _band(g.points, predicted, measured)
            cells.append("" if math.isnan(rho) else f"{rho:.2f} ({low:.2f} to {high:.2f})")
        for share in g.budgets:
            at = g.at(share)
            tau, _ = kendall_tau([value(p.row) for p in at], [p.loss.mean() for p in at])
            cells.append("" if math.isnan(tau) else f"{tau:.2f}")
        lines.append([name, *cells])
    head = ["open loop", "gold loss", "answers wrong", *(f"at {b:.0f} %" for b in g.budgets)]
    return table(head, lines)


def best_predictor(g: Group) -> str:
    """Which open-loop metric goes best with the loss."""
    found = {
        key: (spearman([value(p.row) for p in g.points], [p.loss.mean() for p in g.points]), name)
        for key, (name, value) in predictors(g).items()
    }
    known = [pair for pair in found.values() if not math.isnan(pair[0])]
    if not known:
        return "The open loop does not tell the points apart."
    (worst, last), *_, (rho, name) = sorted([*known, *known])
    points = f"Over all {len(g.points)} points"
    return f"{points} the gold loss goes best with {name} ({rho:.2f}), worst with {last} ({worst:.2f})."


def misleading_text(g: Group) -> str:
    """Pairs that the open loop orders the wrong way round."""
    pairs, lines = told_apart(g), []
    for name, value in predictors(g).values():
        wrong = [p for p in pairs if value(p.better.row) > value(p.worse.row)]
        share = f"{len(wrong)} ({percent(len(wrong) / len(pairs))})" if pairs else "0"
        lines.append([name, share, _case(max(wrong, key=lambda p: (p.answers, p.gap)), value) if wrong else "none"])
    count = len(g.budgets) * math.comb(len(g.policies), 2)
    head = ["open loop", "wrong way round", "the worst of them"]
    words = (
        f"Of {count} pairs of policies at the same budget, the closed loop tells {len(pairs)} apart (gold loss, paired "
        f"by chain, more than {SURE:.0f} standard errors). The open loop orders of these the wrong way round:"
    )
    return f"{words}\n\n{table(head, lines)}"


def _case(p: Pair, value: Callable[[Row], float]) -> str:
    a, b = p.worse, p.better
    return (
        f"at {a.share:.0f} %, `{a.policy}` before `{b.policy}` ({value(a.row):.4g} against {value(b.row):.4g}); in the "
        f"closed loop {small(a.loss.mean())} against {small(b.loss.mean())} nats, {percent(a.right.mean())} against "
        f"{percent(b.right.mean())} right"
    )


def lanes_text(g: Group) -> str:
    """What eviction costs in one lane alone, and what it took there."""
    points = sorted((p for p in g.points if "alone" in p.row), key=lambda p: (-p.share, p.loss.mean()))
    if not points:
        return "Not measured on this device (`python -m experiments.quality lanes`)."
    lines, alone, shared = [], 0, 0
    for p in points:
        lanes = {(layer, head): lane for layer, row in enumerate(p.row["alone"]) for head, lane in enumerate(row)}
        order = sorted(lanes, key=lambda at: -np.mean(lanes[at]["loss"]))
        chains = len(lanes[order[0]]["loss"])
        everywhere = p.loss[:chains].mean()
        alone += np.mean(lanes[order[0]]["loss"]) >= everywhere / 2
        shared += sum(np.mean(lane["loss"]) for lane in lanes.values()) < everywhere / 2
        cells = [f"{p.share:.0f} %", f"`{p.policy}`", small(everywhere)]
        for at in order[:2]:
            kinds = lanes[at]["loss_by_kind"]
            words = ", ".join(f"`{word}` {percent(share)}" for word, share in lanes[at]["lost"])
            cells += [f"{at[0]}, {at[1]}", small(np.mean(lanes[at]["loss"])), max(kinds, key=kinds.__getitem__), words]
        lines.append([*cells, small(np.mean([np.mean(lanes[at]["loss"]) for at in order[2:]]))])
    head = [
        "budget",
        "policy",
        "in all lanes",
        *2 * ["lane", "there alone", "mostly", "lost there"],
        "mean of the others",
    ]
    shown = ", which a mean over lanes, as recall is, can hardly show" if alone else ""
    return f"""Gold loss, nats, where eviction is applied in one layer and KV head alone and the model sees all else
({chains} chains): the two worst lanes of {len(lanes)}, the kind of token that fails most there, and the words that
eviction took most attention from in that lane of the captured trace, with their share of all that was lost there.
At {alone} of {len(points)} points one lane alone brings at least half of the loss of all of them{shown}.
At {shared} points not even the losses of all lanes alone add up to half of it: there lanes stand in for one another.

{table(head, lines)}"""


def claim_text(g: Group) -> str:
    """Does LazyEviction keep accuracy at half the cache where H2O and TOVA lose it?"""
    share = float(AT.rstrip(" %"))
    lazy, rivals = g.point(CLAIMED, share), [g.point(name, share) for name in RIVALS]
    if lazy is None or None in rivals:
        return f"Not measured: it takes `{CLAIMED}`, `{'` and `'.join(RIVALS)}` at {AT}."
    asked = [lazy, *[p for p in rivals if p]]
    states = {p.policy: state(p, g.full) for p in asked}
    shown = [*(p.policy for p in asked), *(p for p in g.policies if label(p) in states and p not in states)]
    head = ["budget", "full", *(f"`{policy}`" for policy in shown)]
    lines = []
    for budget in g.budgets:
        at = [g.point(policy, budget) for policy in shown]
        lines.append([f"{budget:.0f} %", *(_accuracy(p) for p in (g.full, *at))])
    sentences = [verdict(states), *(_against(lazy, p) for p in asked[1:]), _overshoot(lazy, asked[1:]), _ahead(g)]
    return f"{chr(10).join(sentences)}\n\n{table(head, lines)}\n\n{floors_text(g)}"


def state(p: Point, full: Point) -> str:
    """ "keeps", "loses" or "may keep" the accuracy of the full cache."""
    lost, sigma = paired(full.right, p.right)
    if lost <= KEPT:
        return "keeps"
    return "loses" if lost - KEPT > SURE * sigma else "may keep"


def verdict(states: Mapping[str, str]) -> str:
    """What became of the claim."""
    lazy, others = states[CLAIMED], {name: states[name] for name in RIVALS}
    losing = [name for name, s in others.items() if s == "loses"]
    here, names = f"at {AT} `{CLAIMED}`", "` and `".join(losing)
    if lazy == "keeps" and len(losing) == len(others):
        return f"Yes, here it does: {here} keeps its accuracy, `{names}` lose theirs."
    if lazy == "keeps":
        kept = "` and `".join(name for name in others if name not in losing)
        return f"Half of it: {here} keeps its accuracy, but `{kept}` cannot be said to lose it."
    if lazy == "loses":
        also = f", as `{names}` {'does' if len(losing) == 1 else 'do'}" if losing else ""
        return f"No, not here: {here} loses accuracy{also}."
    return f"Not decided: the chains are too few to say whether {here} keeps its accuracy."


def _against(lazy: Point, other: Point) -> str:
    more, sigma = paired(lazy.right, other.right)
    if abs(more) > SURE * sigma:
        answers = (
            f"gives {abs(100 * more):.1f} points {'more' if more > 0 else 'fewer'} right answers than `{other.policy}`"
        )
    else:
        answers = f"is not told apart from `{other.policy}` by its answers ({100 * more:+.1f} points)"
    nats, noise = paired(lazy.loss, other.loss)
    both = f"{small(lazy.loss.mean())} against {small(other.loss.mean())} nats"
    apart = ("smaller" if nats < 0 else "larger") if abs(nats) > SURE * noise else "not told apart"
    return f"It {answers}; its gold loss is {apart} ({both})."


def _overshoot(lazy: Point, others: Sequence[Point]) -> str:
    held, most = lazy.row["closed"]["held"], max(p.row["closed"]["held"] for p in others)
    more = held / most - 1
    how = "more than" if more > 0 else "no more than"
    return f"It held {how} they did: {percent(held)} of all pages in the mean, they at most {percent(most)}."


def _ahead(g: Group) -> str:
    """The budgets at which it answers more rightly than every rival."""

    def leads(share: float) -> bool:
        lazy, *rivals = (g.point(name, share) for name in (CLAIMED, *RIVALS))
        found = [paired(lazy.right, p.right) for p in rivals if p] if lazy else []
        return len(found) == len(RIVALS) and all(more > SURE * sigma for more, sigma in found)

    where = [f"{share:.0f} %" for share in g.budgets if leads(share)]
    return f"It answers more rightly than both, beyond the noise, at {', '.join(where) or 'no measured budget'}."


def _accuracy(p: Point | None) -> str:
    return "" if p is None else f"{percent(p.right.mean())} ± {100 * error(p.right):.1f}"


def floors_text(g: Group) -> str:
    """The smallest measured budget from which on each policy keeps its accuracy."""
    found: dict[str, list[str]] = {}
    for policy in g.policies:
        floor = None
        for share in sorted(g.budgets, reverse=True):
            p = g.point(policy, share)
            if p is None or state(p, g.full) != "keeps":
                break
            floor = share
        found.setdefault("" if floor is None else f"{floor:.0f} %", []).append(f"`{policy}`")
    words = [f"from {b} on {', '.join(names)}" for b, names in sorted(found.items()) if b]
    never = f"at no measured budget {', '.join(found[''])}" if "" in found else ""
    kept = "; ".join([*words, *([never] if never else [])])
    return f"Accuracy is kept (at most {100 * KEPT:.0f} points below the full cache): {kept}."


def group_text(g: Group) -> str:
    f = g.facts
    layers, heads = f["lanes"]
    cached = (
        f"{f['prompt']} prompt tokens, {f['tokens']} in the cache at the end, {f['closed']['problems']} problems each"
    )
    return f"""## {g.name}

Measured on `{f["device"]}`, {f["date"]}, torch {f["torch"]}, transformers {f["transformers"]}: a small model
trained by us ({f["parameters"]:,} parameters, {layers} layers of {heads} KV heads, weights {f["weights"]}),
{f["chains"]} chains of `{f["task"]}` ({cached}), seed {f["seed"]}.
With the full cache {percent(g.full.right.mean())} of the problems are answered rightly.

![Closed loop against open loop](figures/{g.figure})

### Does the open loop rank as the closed loop does?

{best_predictor(g)}
Spearman's correlation over all points, with 5 and 95 % where chains are drawn anew, and Kendall's tau of the policies
at each budget with their gold loss; 1 is the same order, -1 the opposite one. Points differ most by their budget, which
any such metric follows: the columns by budget are the harder question.

{correlations_text(g)}

### Where the open loop misleads

{misleading_text(g)}

### Which lanes the loss comes from

{lanes_text(g)}

### Does LazyEviction keep accuracy at {AT} where H2O and TOVA lose it?

{claim_text(g)}

### All points

{points_text(g)}
"""


def text(found: Sequence[Group]) -> str:
    return f"""# Quality: closed loop against open loop

Written by `python -m experiments.quality report` from the rows in `experiments/quality/results` (of
`python -m experiments.quality run`) and of the phase `closed-loop` of the [GPU campaign](../experiments/gpu/README.md);
do not edit.

Every other number of kvsim about quality is of an *open loop*: the attention was recorded with a full cache. Here the
same model decodes the same chains with eviction really applied: what a policy evicts is gone from that layer and KV
head, later tokens are computed from what is left, and the policy sees the attention that results
(`kvsim/measure/closed_loop.py`; a test compares it with a cache from which the entries are deleted).

- *Answers right*: free running, share of the problems whose asked values are all right, ± a standard error over chains.
- *Gold loss*: the right continuation is fed, nats per token of the decode steps; *within a step*, *results*,
  *statements*: tokens that follow from tokens nearby, from a result worked out before, from a statement of the prompt.
- *Held*: pages that attention saw, mean over steps and lanes, of the final length.
- Beside them what a replay of the captured trace of the same chains says at the same budget (the numbers of
  `kvsim run`): recall, output error, recurrence loss, gold-source loss, and *gold gone*, how often a needed token was
  in no lane at all; and the share of rows (a step in a layer and KV head) that lost more than half of
  their mass. That one was chosen among eleven candidates on the shipped reasoner's rows: what it says of others counts.

The models are small, trained by us on one task, in which most statements of the prompt are needed once, late, and
nothing before that says when. The numbers say how eviction treats such reasoning, not what it does to a large model.

{chr(10).join(group_text(g) for g in found)}"""


# -- figure ------------------------------------------------------------------------------------------------------


def draw(g: Group, path: Path) -> Path:
    """Accuracy and loss over the budget, and the loss over what the open loop says."""
    f, names = g.facts, sorted({label(policy) for policy in g.policies})
    with sheets.style():
        figure = sheets.sheet(9.6, 6.4)
        axes = figure.subplots(2, 2)
        for policy in g.policies:
            points, i = [p for p in g.points if p.policy == policy], names.index(label(policy))
            look: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            look |= {"markersize": 4, "linewidth": 1.3}
            if is_protected(policy):
                look |= {"linestyle": "--", "markerfacecolor": "white"}
            budgets, loss = [p.share for p in points], [p.loss.mean() for p in points]
            axes[0, 0].plot(budgets, [100 * p.right.mean() for p in points], **look)
            axes[0, 1].plot(budgets, loss, label=policy, **look)
            for ax, key in zip(axes[1], SHOWN, strict=True):
                ax.plot([PREDICTORS[key][1](p.row) for p in points], loss, **look | {"linestyle": ""})
        dots: dict[str, Any] = {"color": sheets.INK, "linewidth": 0.9, "linestyle": ":"}
        axes[0, 0].axhline(100 * g.full.right.mean(), **dots)
        axes[0, 0].set_ylabel("closed loop: answers right, %")
        for ax in (axes[0, 1], *axes[1]):
            ax.axhline(g.full.loss.mean(), label="full cache", **dots)
            ax.set(yscale="log", ylabel="closed loop: gold loss, nats")
        for ax in axes[0]:
            ax.set(xlabel="budget, % of the final length", xticks=g.budgets)
        for ax, key in zip(axes[1], SHOWN, strict=True):
            name, value = PREDICTORS[key]
            rho = spearman([value(p.row) for p in g.points], [p.loss.mean() for p in g.points])
            ax.set_xlabel(f"open loop: {name}")
            ax.set_title(f"Spearman {rho:.2f} over {len(g.points)} points", loc="left", fontsize=8)
        axes[0, 1].legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0.2)
        lines = [f"{f['model']} ({f['parameters']:,} parameters, trained by us) · {f['chains']} chains of {f['task']}"]
        foot = f"measured on {f['device']}; one model, one task; dashed with open markers: with protected tokens"
        sheets.head(figure, "What eviction costs, and what the open loop says", lines, foot)
    return sheets.save(figure, path)


def committed() -> list[Path]:
    """The files of rows in the repository: ours, and those of the GPU campaign."""
    return [
        p for folder in (HERE / "results", HERE.parent / "gpu" / "results") for p in sorted(folder.rglob("*.jsonl"))
    ]


def write(paths: Sequence[Path] = (), docs: Path = DOCS) -> Path:
    """docs/quality.md and its figures. Raises ConfigError for files that are no rows, ResultError for too few."""
    found = groups(read(paths or committed()))
    if not found:
        raise ResultError("there are no rows", hint="measure some: python -m experiments.quality run")
    for g in found:
        draw(g, docs / "figures" / g.figure)
    with file_beside(docs / "quality.md") as partial:
        partial.write_text(text(found), encoding="utf-8")
    return docs / "quality.md"
