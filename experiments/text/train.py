"""Train a model of Python source text from nothing, on what this machine has of it.

    python -m experiments.text.train --device cuda --minutes 4 --seed 0 --out DIR

Leaves in DIR weights (bfloat16) and tokenizer, prompts.jsonl for `kvsim capture --mode forced`, and train_log.json.
`--minutes` is all the time there is, but for the last measurement: what reading the corpus took is not trained.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from experiments import training

from . import corpus

DECAY, WARM_UP, FLOOR = 0.05, 0.02, 0.03  # of weights; share of the time; share of the peak rate at the end
READING = 0.25  # share of the time after which no further package is read
QUICK = 0.1  # million characters that the log is measured on

Row = dict[str, Any]


def fit(
    model: LlamaForCausalLM,
    stream: torch.Tensor,
    seconds: float,
    *,
    peak: float,
    batch: int,
    window: int,
    seed: int,
    tell: Callable[[float, int, torch.Tensor], None] = lambda elapsed, step, loss: None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Train on windows drawn from the stream until the time is spent; returns the steps made."""
    model.train()
    opt, rng, start, step = training.optimiser(model, peak, DECAY), np.random.default_rng(seed), clock(), 0
    offsets = torch.arange(window + 1, device=stream.device)
    while (elapsed := clock() - start) < seconds:
        begins = torch.from_numpy(rng.integers(0, len(stream) - window, (batch, 1))).to(stream.device)
        spent = elapsed / seconds
        with training.autocast(stream.device.type):
            loss = _loss(model, stream[begins + offsets].long(), "mean")
        training.learn(model, opt, loss, training.rate(peak, (spent + 1e-3) / WARM_UP, spent, FLOOR))
        step += 1
        tell(clock() - start, step, loss.detach())
    return step


@torch.no_grad()
def measure(model: LlamaForCausalLM, held_out: corpus.Stream, window: int, batch: int) -> Row:
    """Loss over a whole stream, every token predicted once, from at most a window before it."""
    model.eval()
    device = model.device
    ids = torch.from_numpy(held_out.ids).long().to(device)
    predicted = len(ids) - 1
    ids = F.pad(ids, (0, -predicted % window), value=-100)
    rows = ids.unfold(0, window + 1, window)
    total = 0.0
    for part in rows.split(batch):
        with training.autocast(device.type):
            total += float(_loss(model, part, "sum"))
    bits = total / math.log(2) / held_out.characters
    return {"nats_per_token": round(total / predicted, 4), "bits_per_character": round(bits, 4)}


def _loss(model: LlamaForCausalLM, ids: torch.Tensor, how: str) -> torch.Tensor:
    """Of each row's tokens but the first; those below 0 are none."""
    scores = model(input_ids=ids[:, :-1].clamp(min=0), use_cache=False).logits
    return F.cross_entropy(scores.flatten(0, 1).float(), ids[:, 1:].flatten(), ignore_index=-100, reduction=how)


def write_prompts(path: Path, ids: list[list[int]], prompt: int) -> None:
    """Prompts with the text that follows, for `kvsim capture`."""
    lines = (json.dumps({"tokens": tokens, "prompt_len": prompt}) for tokens in ids)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main(argv: list[str] | None = None) -> Row:
    began = time.monotonic()
    sizes = {"layers": 7, "width": 256, "head_dim": 64, "init": 0.06, "theta": 1e4}
    ap = training.parser(__doc__, **sizes, minutes=4, report=20)
    ap.add_argument("--vocabulary", type=int, default=4096)
    ap.add_argument("--positions", type=int, default=4096)
    ap.add_argument("--batch", type=int, default=64, help="windows per step")
    ap.add_argument("--window", type=int, default=1024, help="tokens per window")
    ap.add_argument("--stdlib-mb", type=float, default=100, help="million characters of the standard library")
    ap.add_argument("--packages-mb", type=float, default=150, help="million characters of installed packages")
    ap.add_argument("--held-out-mb", type=float, default=1, help="million held-out characters to measure on")
    ap.add_argument("--prompts", type=int, default=8, help="held-out texts to capture")
    ap.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    ap.add_argument("--steps", type=int, default=512, help="tokens that follow it")
    args = ap.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    budget = args.minutes * 60

    library = corpus.standard_library()
    held_out = [document for document in library if corpus.is_held_out(document.name)]
    learnt = (document for document in library if not corpus.is_held_out(document.name))
    own = list(corpus.first(learnt, args.stdlib_mb))
    tokens = corpus.tokenizer(own, args.vocabulary)
    streams = {"standard library": corpus.encode(tokens, own)}
    if args.packages_mb:
        others = corpus.first(corpus.packages(corpus.package_roots(), held_out), args.packages_mb)
        streams["packages"] = corpus.encode(tokens, others, began + READING * budget)
    measured = corpus.encode(tokens, corpus.first(held_out, args.held_out_mb))
    quick = corpus.encode(tokens, corpus.first(held_out, min(QUICK, args.held_out_mb)))
    captured = dict(corpus.to_capture(tokens, held_out, args.prompts, args.prompt + args.steps))
    write_prompts(args.out / "prompts.jsonl", list(captured.values()), args.prompt)

    end = tokens.token_to_id(corpus.END)
    model = training.llama(args, args.vocabulary, args.positions, bos_token_id=end, eos_token_id=end, pad_token_id=end)
    model = model.to(args.device)
    stream = torch.from_numpy(np.concatenate([part.ids for part in streams.values()])).to(args.device)
    log: list[Row] = []
    reading = time.monotonic() - began

    def tell(elapsed: float, step: int, loss: torch.Tensor) -> None:
        if elapsed < args.report * (len(log) + 1):
            return
        spent = {"minutes": round((reading + elapsed) / 60, 2), "step": step, "tokens": step * args.batch * args.window}
        log.append({**spent, "loss": round(float(loss), 4), **measure(model, quick, args.window, args.batch)})
        model.train()
        print(json.dumps(log[-1]), flush=True)

    how = {"peak": args.lr, "batch": args.batch, "window": args.window, "seed": args.seed}
    steps = fit(model, stream, max(1.0, budget - reading), tell=tell, **how)
    training.save(model.to(torch.bfloat16), args.out, tokens.to_str(), bos_token=corpus.END, eos_token=corpus.END)
    final = measure(model.float(), measured, args.window, args.batch)  # of the weights as they were rounded
    result = {
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "tokenizers": tokenizers.__version__,
        "python": platform.python_version(),
        "corpus": {name: part.facts for name, part in {**streams, "held out": measured}.items()},
        "library_sha256": corpus.digest(library),
        "prompts": list(captured),
        "steps": steps,
        "tokens": steps * args.batch * args.window,
        "minutes": round((time.monotonic() - began) / 60, 2),
        "minutes_reading": round(reading / 60, 2),
        "final_held_out": final,
        "log": log,
    }
    (args.out / "train_log.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(final), flush=True)
    return result


if __name__ == "__main__":
    main()
