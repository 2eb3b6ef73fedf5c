"""Write docs/policies.md: every registered policy, and how they compare on our trace.

kvsim sweep experiments/policies/comparison.toml --jobs 2 -o runs/policies
python -m experiments.policies.page runs/policies   # new numbers and figures
python -m experiments.policies.page                 # the text again, from the numbers that are committed
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import groupby
from pathlib import Path
from typing import Any

from kvsim.catalogue import EVIDENCE, Entry, entries
from kvsim.figures import draw
from kvsim.figures.families import label
from kvsim.report import HELD
from kvsim.results import MORE
from kvsim.sweeps import open_results

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
RESULTS = HERE / "results.json"
METRICS = {
    "recall": "recall",
    "output_error": "output error",
    "gold_loss": "gold loss",
    "recurrence_loss": "recurrence loss",
    "stranded_share": "stranded",
}
SHOWN = ("20%", "50%")
KIB = 2**10


def read_grid(folder: Path) -> list[dict[str, Any]]:
    """What the page shows of each run, ordered by policy and budget."""
    bytes_ = ("held_mean_bytes", "read_mean_bytes", "state_bytes_per_page")
    kept = ("policy", "budget", *METRICS, *bytes_, "even_ceiling", "over_budget", "oracle")
    rows = [{key: row[key] for key in kept} for row in open_results(folder).rows()]
    for row in rows:
        for key, value in row.items():
            if isinstance(value, float):
                row[key] = round(value, 6) if math.isfinite(value) else None
    return sorted(rows, key=lambda row: (row["policy"], float(row["budget"].rstrip("%"))))


def catalogue_text() -> str:
    """One table per family, from the registry alone."""
    parts = []
    for family, members in groupby(entries(), key=lambda e: e.family):
        head = "| policy | what it keeps | kind | regimes | per | needs | evidence | parameters |\n" + "|---" * 8 + "|"
        parts.append(f"### {family[0].upper()}{family[1:]}\n\n{head}\n" + "\n".join(map(_line, members)))
    return "\n\n".join(parts)


def _line(e: Entry) -> str:
    needs = ", ".join(f"`{n}`" for n in e.needs)
    defaults = f"`{e.defaults}`" if e.defaults else ""
    cells = (f"`{e.name}`", e.summary, e.kind, ", ".join(e.regimes), e.decides, needs, e.evidence, defaults)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def results_text(rows: list[dict[str, Any]]) -> str:
    """The numbers at two budgets, best recall first, beside the bytes held: not every policy keeps to a budget."""
    parts = []
    for budget in SHOWN:
        at = [row for row in rows if row["budget"] == budget and row["policy"] != "full"]
        ceiling = next(row["even_ceiling"] for row in at if row["policy"] == "lru")
        head = f"| policy | {' | '.join(METRICS.values())} | read, KiB | held, KiB | state, bytes |\n|---|" + "---|" * (
            len(METRICS) + 2
        )
        lines = [_numbers(row) for row in sorted(at, key=lambda row: (-row["recall"], row["policy"]))]
        title = f"### At {budget} of each request's final length: the step ceiling is {ceiling:.3f}"
        parts.append("\n".join([title, "", head, *lines]))
    return "\n\n".join(parts)


def _numbers(row: dict[str, Any]) -> str:
    cells = ["" if row[key] is None else f"{row[key]:.3f}" for key in METRICS]
    read, held = (f"{row[f'{what}_mean_bytes'] / KIB:.0f}" for what in ("read", "held"))
    name = f"`{row['policy']}`" + (" (oracle)" if row["oracle"] else "")
    return "| " + " | ".join([name, *cells, read, held, str(row["state_bytes_per_page"])]) + " |"


def best(rows: list[dict[str, Any]], key: str, budget: str) -> list[dict[str, Any]]:
    """Policies that do not know the future and keep to the budget, best first: no read sets. LRU holds just that."""
    at = [row for row in rows if row["budget"] == budget]
    most = HELD * next(row["held_mean_bytes"] for row in at if row["policy"] == "lru")
    fair = [
        r
        for r in at
        if not r["oracle"] and r["policy"] != "full" and r[key] is not None
        and r["over_budget"] <= MORE and r["held_mean_bytes"] <= most
    ]  # fmt: skip
    return sorted(fair, key=lambda r: (-r[key] if key == "recall" else r[key], r["policy"]))


def winners_text(rows: list[dict[str, Any]]) -> str:
    """Who is best by which measure, among those that keep to the budget."""
    lines = ["| | " + " | ".join(f"at {b}" for b in SHOWN) + " |", "|---|" + "---|" * len(SHOWN)]
    for key in ("recall", "output_error", "gold_loss", "recurrence_loss"):
        cells = []
        for budget in SHOWN:
            found: dict[str, dict[str, Any]] = {}  # of a policy with and without protection, the better one
            for row in best(rows, key, budget):
                found.setdefault(label(row["policy"]), row)
            cells.append(", ".join(f"`{r['policy']}` {r[key]:.3f}" for r in list(found.values())[:3]))
        lines.append(f"| {METRICS[key]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(rows: list[dict[str, Any]]) -> str:
    evidence = "; ".join(f"*{tag}*: {words}" for tag, words in EVIDENCE.items())
    figures = "\n".join(f"![{name}](figures/policies-{key}.png)\n" for key, name in _FIGURES.items())
    return f"""# Policies

Written by `python -m experiments.policies.page` from the registry and `experiments/policies/results.json`; do not edit.

`kvsim list policies` prints the same list, `kvsim list policies NAME` the source, formula and departures of one, and
`kvsim check NAME` tries its contract. Every policy also takes `sink` and `recent` (tokens that stay; `recent` may be a
share of the budget) and `protect_head`, `protect_tail` (shares of the budget).

*Kind*: online decides while decoding; once decides after the prompt, and what is generated stays beside the budget; a
read set chooses what attention reads and keeps the rest; an oracle knows the future. *Needs*: what the trace must hold
beyond rows (`kvsim capture --vectors` for q, k, v; `--spans` for spans). *Evidence*: {evidence}.
Which of them agree with whose original: [peers.md](peers.md).

{catalogue_text()}

## Not here, and why

- CriticalKV needs the output projection of each head, which no trace holds; the norm of v in its place would be another
  policy. Leverage, Compactor and CAPKV sketch the keys at random in ways we could not check.
- KVzip, FastKVzip, KVzap, Q-Filter and DMS score tokens inside the model: `attention-gate` takes such scores from a
  file.
- ChunkKV is `snapkv` with `--page-size N --granularity layer`; DecodingPress is `lag` around a policy that decides
  once.
- PyramidInfer's thinning while decoding keeps a share without a budget and is left out; ALISA's placement in phases and
  Marconi's prefix nodes are offload systems, Cold-RL a learned policy: these are not policies of attention.
- H2O's FlexGen code counts its window in slots, into which later tokens are swapped: apart from that it is `h2o` with
  one recent token fewer. StreamingLLM's `evict_for_space` makes room before attention: that is `streaming-llm` at a
  budget of one page less, since here a step sees one page more than the budget.
- Finch reads the prompt chunk by chunk under the question's attention; a trace's prompt was read whole. BeladySize
  weighs distances by sizes, which pages of attention do not have: `belady` counts them all as one.
- How the query heads of a group become one row is settled when a trace is captured (their mean, and their largest
  where it is stored); only `quest`, which works on queries, takes a `reduce` of its own.
- KIVI and RotateKV change bits, not presence: they are [formats of a tier](hardware.md#tier-formats).

## On our trace

`experiments/policies/comparison.toml`: two requests of the reasoner (203 + 309 tokens, 3 layers of 4 KV heads), with
and without protected tokens. All numbers are of an open loop, and of one small model: they say how the policies treat
*this* attention, not which is best. Recall is attention mass; output error, what the missing pages do to attention's
output; gold loss, the share of the tokens that the answer comes from which are gone; recurrence loss, that of uses;
stranded, tokens that are gone but whose block of 16 is still held. Bytes are those of this
model's pages (float32), mean over decode steps: what attention reads, and what is held on the GPU (read sets hold all).

To read the tables with: pages are of one token, so Quest's bound of a page is its exact score, and with `dense` layers
(two of three here) it and FlexiCache read far more than the budget says: see the bytes. What decides once cuts the
prompt, which is less than half of the final length: at 50 % it has nothing to cut. What of a prompt is above the budget
leaves in one go: there RoCo's deviation decides, and its mean has no part yet.

Best three of those that hold no more than {HELD} times the budget on average, whatever lag they declare:

{winners_text(rows)}

{figures}
{results_text(rows)}
"""


_FIGURES = {
    "recall": "Recall against bytes read, by family",
    "output_error": "Output error against bytes read, by family",
    "gold_loss": "Gold-source loss against bytes read, by family",
    "recurrence_loss": "Recurrence loss against bytes read, by family",
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", nargs="?", type=Path, help="folder of the sweep; without it, the committed numbers")
    runs = options.parse_args().runs
    if runs:
        RESULTS.write_text(json.dumps(read_grid(runs), indent=0) + "\n", encoding="utf-8")
        grid = open_results(runs)
        for key in _FIGURES:
            path = DOCS / "figures" / f"policies-{key}.png"
            draw(grid, path, kind="families", x="read_mean_bytes", y=key)
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    (DOCS / "policies.md").write_text(page(rows), encoding="utf-8")
    print(f"written {DOCS / 'policies.md'}")


if __name__ == "__main__":
    main()
