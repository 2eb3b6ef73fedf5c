"""Measure the committed weights: free-running greedy answers by pack length, re-use gaps, and the README tables.

    python -m experiments.reasoner.evaluate [--samples 200] [--model experiments/reasoner/model]

The model gets the prompt and nothing else.  A problem counts as right if all its asked values are stated rightly, a
pack if all its problems are; `exact` asks for every generated token to be the gold one.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from . import task

HERE = Path(__file__).resolve().parent
SHIPPED = (5, 8)  # the setting of traces/reasoner.kvtrace
TRAINED = (10, 12)  # the longest packs of the training
# The settings of the shipped traces, other lengths, and beyond the training: more problems, longer chains.
SETTINGS = [(3, 8), (5, 8), (1, 10), (2, 10), (4, 10), (6, 10), (8, 10), (3, 30), (10, 10), (10, 12), (12, 11), (4, 30)]
EVAL_SEED = 20_000  # far from the seeds of training


@torch.no_grad()
def generate(model, prompts: np.ndarray, steps: int) -> np.ndarray:
    """Greedy continuation of prompts of one length, with the ordinary cache; nothing is forced."""
    ids = torch.from_numpy(np.asarray(prompts)).long().to(model.device)
    out, cache = [], None
    for _ in range(steps):
        step = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = step.past_key_values
        ids = step.logits[:, -1].argmax(-1, keepdim=True)
        out.append(ids.cpu().numpy())
    return np.concatenate(out, axis=1)


def accuracy(model, problems: int, steps: int, samples: int, seed: int = EVAL_SEED, batch: int = 50) -> dict:
    prompt, cot = task.lengths(problems=problems, steps=steps)
    packs = [task.sample(seed, i, problems=problems, steps=steps) for i in range(samples)]
    right, exact = [], 0
    for at in range(0, samples, batch):
        part = packs[at : at + batch]
        text = generate(model, np.stack([p.tokens[:prompt] for p in part]), cot)
        for p, t in zip(part, text, strict=True):
            right.append(task.is_right(p, t))
            exact += bool((t == p.tokens[prompt:]).all())
    ok = np.array(right)
    return {
        "problems": problems,
        "steps": steps,
        "prompt": prompt,
        "decode": cot,
        "samples": samples,
        "pack": round(float(ok.all(1).mean()), 4),
        "problem": round(float(ok.mean()), 4),
        "by_place": [round(float(v), 3) for v in ok.mean(0)],
        "exact": round(exact / samples, 4),
    }


def gaps(problems: int, steps: int, samples: int = 200, seed: int = EVAL_SEED) -> dict:
    """Decode steps since a gold source was last needed (or written), told apart by where the source lies."""
    seen: dict[str, list[int]] = {"all": [], "look-ups": [], "results": []}
    for i in range(samples):
        p = task.sample(seed, i, problems=problems, steps=steps)
        last: dict[int, int] = {}
        for j in range(p.prompt_len, len(p.tokens)):
            now = j - 1  # the query that produces token j
            for s in p.need[j]:
                # Prompt tokens count from the end of the prompt, where decoding could first have used them.
                gap = now - max(last.get(s, s), p.prompt_len - 1)
                seen["all"].append(gap)
                if now - s > 6:  # not carried over inside a step
                    seen["look-ups"].append(gap)
                    if s >= p.prompt_len:
                        seen["results"].append(gap)
                last[s] = now
    return {
        k: {
            "count_per_pack": round(len(v) / samples, 1),
            **{f"p{q}": int(np.percentile(v, q)) for q in (50, 90, 99)},
            "max": int(max(v)),
        }
        for k, v in seen.items()
    }


def tables(result: dict) -> str:
    out = [
        "| problems x steps | prompt | decode | samples | packs all right | problems right | every token gold |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in result["accuracy"]:
        mark = " (shipped)" if (r["problems"], r["steps"]) == tuple(result["shipped"]) else ""
        out.append(
            f"| {r['problems']} x {r['steps']}{mark} | {r['prompt']} | {r['decode']} | {r['samples']} "
            f"| {100 * r['pack']:.1f} % | {100 * r['problem']:.1f} % | {100 * r['exact']:.1f} % |"
        )
    out += [
        "",
        f"Seed {result['seed']}; {result['parameters']:,} parameters, weights "
        f"{result['weights_bytes'] / 1e6:.2f} MB, measured {result['date']} on one CPU thread.",
        "",
        "| gold sources, shipped setting | per pack | median gap | p90 | p99 | max |",
        "|---|---|---|---|---|---|",
    ]
    names = {
        "all": "all",
        "look-ups": "look-ups (not from within the same step)",
        "results": "look-ups of worked-out results",
    }
    for k, g in result["gaps"].items():
        out.append(f"| {names[k]} | {g['count_per_pack']} | {g['p50']} | {g['p90']} | {g['p99']} | {g['max']} |")
    return "\n".join(out)


def write_readme(result: dict, path: Path = HERE / "README.md") -> None:
    text = path.read_text()
    path.write_text(
        re.sub(
            r"(<!-- measured -->\n).*?(<!-- end -->)", lambda m: m[1] + tables(result) + "\n" + m[2], text, flags=re.S
        )
    )


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, default=HERE / "model")
    ap.add_argument("--samples", type=int, default=200)
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--out", type=Path, default=HERE / "accuracy.json")
    ap.add_argument("--readme", action=argparse.BooleanOptionalAction, default=True)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    rows, trained = [], task.lengths(problems=TRAINED[0], steps=TRAINED[1])[1]
    for problems, steps in SETTINGS:
        t0 = time.monotonic()
        # Packs longer than any trained on are for orientation; half the number keeps them affordable.
        longer = task.lengths(problems=problems, steps=steps)[1] > trained
        rows.append(accuracy(model, problems, steps, args.samples // 2 if longer else args.samples))
        print(json.dumps(rows[-1]), f"{time.monotonic() - t0:.0f} s", flush=True)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "device": args.device,
        "samples": args.samples,
        "seed": EVAL_SEED,
        "shipped": SHIPPED,
        "parameters": model.num_parameters(),
        "torch": torch.__version__,
        "weights_bytes": sum(f.stat().st_size for f in args.model.glob("*.safetensors")),
        "accuracy": rows,
        "gaps": gaps(*SHIPPED),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.readme:
        write_readme(result)


if __name__ == "__main__":
    main()
