"""Train the reasoner from nothing.

    python -m experiments.reasoner.train --device cpu --minutes 60 --seed 0 --out experiments/reasoner/model

The curriculum goes from one short problem to the full pack.  A level is passed when enough fresh packs are entirely
right.  Every generated token is determined by what precedes it, so "the arg-max is right at every position of the right
text" and "greedy decoding writes the right text" are the same event, and one forward pass over a batch of gold packs
measures it; no generation is needed while training.  A stopped run goes on from DIR/checkpoint.pt.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from experiments import training

from . import task

LEVELS = [(1, 4), (2, 6), (4, 8), (6, 9), (8, 10), (10, 12)]  # (problems, steps)
PASS = 0.3  # share of entirely right packs that opens the next level


def build(args) -> LlamaForCausalLM:
    special = {"bos_token_id": task.BOS, "eos_token_id": task.EOS, "pad_token_id": task.PAD}
    model = training.llama(args, len(task.VOCAB), 2048, attention_bias=True, **special)
    with torch.no_grad():
        start_well(model, args)
    return model


def start_well(model: LlamaForCausalLM, args) -> None:
    """Initial weights from which one-hop look-ups are found in minutes instead of hours.

    From plain random weights the heads first have to discover "look k tokens back" before matching on a key can pay
    off at all; 5 to 6 M tokens were not enough for that.  So the first layer starts with four heads that look 1, 2, 3
    and 5 tokens back (a query bias that is the key bias turned by that many positions), and the second layer with
    one group of heads whose queries compare the token at hand with what the one-back head wrote elsewhere.  What
    is copied, when, and all the rest is left to training.
    """
    hd, half = args.head_dim, args.head_dim // 2
    group = args.heads // args.kv_heads
    freq = args.theta ** (-torch.arange(half) / half)
    for layer in model.model.layers:
        # Otherwise the branches drown the embeddings, whose norm is about one at this sigma.
        layer.self_attn.o_proj.weight *= 0.15
        layer.mlp.down_proj.weight *= 0.15
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    strength = torch.where(torch.arange(half) < 5, 45.0, 0.0).sqrt()
    for head, back in enumerate((1, 2, 3, 5)):
        if head >= args.heads:
            break
        q, k = slice(head * hd, (head + 1) * hd), slice(head // group * hd, (head // group + 1) * hd)
        first.q_proj.weight[q] *= 0.1
        if head % group == 0:
            first.k_proj.weight[k] *= 0.1
        first.k_proj.bias[k] = torch.cat([strength, torch.zeros(half)])
        # Rotary positions turn pair i by -freq*distance; start turned the other way, so that they agree at `back`.
        turn = -freq * back
        first.q_proj.bias[q] = torch.cat([strength * turn.cos(), strength * turn.sin()])
    if args.compose:
        value = torch.nn.init.orthogonal_(torch.empty(hd, args.width))
        write = torch.nn.init.orthogonal_(torch.empty(args.width, hd))
        first.v_proj.weight[:hd] = value
        first.o_proj.weight[:, :hd] = 0.15 * write
        for head in range(group):
            second.q_proj.weight[head * hd : (head + 1) * hd] += args.compose * value
        second.k_proj.weight[:hd] += args.compose * write.T


def batch(rng: np.random.Generator, level: tuple[int, int], tokens: int, device: str):
    """Packs of one level, about ``tokens`` tokens.  One level has one length, so there is no padding."""
    problems, steps = level
    prompt, cot = task.lengths(problems=problems, steps=steps)
    packs = [task.make(rng, problems=problems, steps=steps).tokens for _ in range(max(4, tokens // (prompt + cot)))]
    return torch.from_numpy(np.stack(packs)).long().to(device), prompt


def logits_of(model, ids, prompt):
    """Scores for the generated tokens only: the vocabulary projection of the prompt would be wasted work."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[:, prompt - 1 :]
    return model.lm_head(hidden), ids[:, prompt:]


# The five kinds of generated token, to see which skill lags.
KIND = np.zeros(len(task.VOCAB), dtype=np.int64)
KIND[task.DIGIT : task.DIGIT + 10] = 1
KIND[task.PLAIN : task.PLAIN + task.NAMES] = 2
KIND[task.EDGE : task.EDGE + task.NAMES] = 3
KIND[task.VALUE : task.VALUE + task.NAMES] = 4
KIND_NAMES = ["label", "digit", "plain", "edge", "value_name"]


@torch.no_grad()
def measure(model, level, packs: int, seed: int, device: str) -> dict:
    """Share of entirely right packs and of right tokens per kind, on packs that training never draws."""
    model.eval()
    rng, good, hit, all_ = np.random.default_rng([987, seed]), 0, np.zeros(5), np.zeros(5)
    done = 0
    while done < packs:
        ids, prompt = batch(rng, level, 12000, device)
        score, want = logits_of(model, ids, prompt)
        ok = score.argmax(-1) == want
        good += int(ok.all(1).sum())
        kind = KIND[want.cpu().numpy().ravel()]
        hit += np.bincount(kind, weights=ok.cpu().numpy().ravel(), minlength=5)
        all_ += np.bincount(kind, minlength=5)
        done += len(ids)
    model.train()
    out = {"whole": round(good / done, 4), "token": round(float(hit.sum() / all_.sum()), 5)}
    out.update({n: round(float(h / a), 4) for n, h, a in zip(KIND_NAMES, hit, all_, strict=True)})
    return out


def save(model, out: Path) -> None:
    """Weights and tokenizer, the latter written by hand because it is nothing but a table of words."""
    special = [
        {
            "id": i,
            "content": task.VOCAB[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i in (task.PAD, task.BOS, task.EOS)
    ]
    table = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": task.ID, "unk_token": "<pad>"},
    }
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<pad>"}
    training.save(model, out, json.dumps(table, indent=0), **names)


def main(argv=None) -> dict:
    ap = training.parser(__doc__)
    ap.add_argument("--compose", type=float, default=1.5, help="strength of the initial key matching; 0 for none")
    ap.add_argument("--tokens", type=int, default=4096, help="tokens per batch")
    ap.add_argument("--checkpoint", type=float, default=120, help="seconds between checkpoints")
    args = ap.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    state_file = args.out / "checkpoint.pt"
    model = build(args).to(args.device)
    opt = training.optimiser(model, args.lr, 0.01)
    level = step = seen = 0
    before, log = 0.0, []
    if state_file.exists():
        state = torch.load(state_file, map_location=args.device, weights_only=False)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        level, step, seen, before, log = (state[k] for k in ("level", "step", "seen", "elapsed", "log"))
    # A resumed run draws new packs; repeating the old ones would teach nothing.
    rng = np.random.default_rng([args.seed, step])
    budget, start, reported, saved = args.minutes * 60, time.monotonic(), before, before
    model.train()
    while True:
        elapsed = before + time.monotonic() - start
        if elapsed >= budget:
            break
        # Mostly the level at hand; earlier ones stay in the mix, so that short packs are not forgotten.
        at = level if rng.random() < 0.7 else int(rng.integers(0, level + 1))
        ids, prompt = batch(rng, LEVELS[at], args.tokens, args.device)
        with training.autocast(args.device):
            score, want = logits_of(model, ids, prompt)
            loss = F.cross_entropy(score.flatten(0, 1).float(), want.flatten())
        training.learn(model, opt, loss, training.rate(args.lr, (step + 1) / 200, elapsed / budget))
        step += 1
        seen += ids.numel()
        elapsed = before + time.monotonic() - start
        if elapsed - reported >= args.report:
            reported = elapsed
            row = {
                "minutes": round(elapsed / 60, 2),
                "step": step,
                "tokens": seen,
                "level": LEVELS[level],
                "loss": round(float(loss.detach()), 4),
                **measure(model, LEVELS[level], 24, step, args.device),
            }
            log.append(row)
            print(json.dumps(row), flush=True)
            if row["whole"] >= PASS and level + 1 < len(LEVELS):
                level += 1
            if elapsed - saved >= args.checkpoint:
                saved = elapsed
                part = state_file.with_suffix(".part")
                torch.save(
                    {
                        "model": model.state_dict(),
                        "opt": opt.state_dict(),
                        "level": level,
                        "step": step,
                        "seen": seen,
                        "elapsed": elapsed,
                        "log": log,
                    },
                    part,
                )
                os.replace(part, state_file)
    final = {f"{p}x{s}": measure(model, (p, s), 96, 10**6, args.device) for p, s in LEVELS[: level + 1]}
    save(model, args.out)
    result = {
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "steps": step,
        "tokens": seen,
        "minutes": round((before + time.monotonic() - start) / 60, 1),
        "levels": LEVELS,
        "final_teacher_forced": final,
        "log": log,
    }
    (args.out / "train_log.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(final), flush=True)
    return result


if __name__ == "__main__":
    main()
