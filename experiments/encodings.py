"""What a trace's encoding changes: recall on the same requests, stored three ways, written into docs/traces.md.

    python -m experiments.encodings

Captures two requests of the reasoner losslessly (float32), with every weight in a byte (`--keep 1`) and with 99 % of
the mass (`--keep 0.99`), and replays them: three minutes on a busy core.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from kvsim.measure.capture import capture
from kvsim.measure.prompts import task_prompts
from kvsim.simulate import run
from kvsim.trace import Trace, open_trace

HERE = Path(__file__).resolve().parent
PAGE, START, END = HERE.parent / "docs" / "traces.md", "<!-- encodings -->\n", "<!-- end -->"
ENCODINGS: dict[str, dict[str, Any]] = {"float32": {"lossless": True}, "keep 1": {}, "keep 0.99": {"keep": 0.99}}
BUDGETS = ("10%", "20%", "30%", "50%")
POLICIES = (
    "lru", "lfu", "sieve", "arc", "s3-fifo", "lirs", "streaming-llm", "h2o", "tova", "lfa", "roco",
    "keyformer(steps=309)", "lazy-eviction(window=16)", "scissorhands(window=64)", "evict3r", "belady", "mass-oracle",
)  # fmt: skip


def traces(folder: Path) -> dict[str, Trace]:
    """The same two requests in each encoding."""
    prompts = task_prompts(HERE / "reasoner" / "task.py", 2, settings="problems=5,steps=8")
    return {
        name: open_trace(
            capture(
                HERE / "reasoner" / "model", prompts, folder / f"{i}.kvtrace", batch_size=2, prompt_rows="all", **how
            )
        )
        for i, (name, how) in enumerate(ENCODINGS.items())
    }


def size(trace: Trace) -> float:
    """Bytes of the attention files, per request."""
    assert trace.path is not None
    return sum(p.stat().st_size for p in Path(trace.path).glob("attn-*")) / len(trace.sources)


def lines(found: dict[str, Trace]) -> list[str]:
    """The table: sizes, and recall beside that of the exact weights."""
    exact, *others = ENCODINGS
    rows = [["policy", *(f"{budget}, {name}" for budget in BUDGETS for name in others)]]
    rows.append(["---", *("---:" for _ in rows[0][1:])])
    worst = dict.fromkeys(others, (0.0, "", ""))
    for policy in POLICIES:
        row = [f"`{policy}`"]
        for budget in BUDGETS:
            recall = {name: run(t, policy=policy, budget=budget).summary["recall"] for name, t in found.items()}
            for name in others:
                off = recall[name] - recall[exact]
                row.append(f"{off:+.3f}")
                worst[name] = max(worst[name], (abs(off), policy, budget))
        rows.append(row)
    sizes = ", ".join(f"{name} {size(trace) / 1e6:.1f} MB" for name, trace in found.items())
    most = "; ".join(f"{name} {off:.3f} (`{policy}` at {budget})" for name, (off, policy, budget) in worst.items())
    return [
        f"Attention of one request: {sizes}. Largest difference in recall: {most}.",
        "",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = lines(traces(Path(folder)))
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.index(START) + len(START), text.index(END)
    PAGE.write_text(text[:before] + "\n".join(table) + "\n" + text[after:], encoding="utf-8")
    print("\n".join(table))


if __name__ == "__main__":
    main()
