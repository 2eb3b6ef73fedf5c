"""What the trainings here share: options, a Llama, AdamW, a rate that follows the clock, weights on disk."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Options of every training; `defaults` where they are to differ."""
    ap = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    ap.add_argument("--minutes", type=float, default=60)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--layers", type=int, default=3)
    ap.add_argument("--width", type=int, default=128)
    ap.add_argument("--heads", type=int, default=8)
    ap.add_argument("--kv-heads", type=int, default=4)
    ap.add_argument("--head-dim", type=int, default=32)
    ap.add_argument("--mlp", type=int, default=3, help="width of the feed-forward layer, in model widths")
    ap.add_argument("--init", type=float, default=0.08, help="initial sigma; about width**-0.5, smaller learns late")
    ap.add_argument("--theta", type=float, default=1e6, help="base of the rotary positions")
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--report", type=float, default=30, help="seconds between measurements")
    ap.set_defaults(**defaults)
    return ap


def llama(args: argparse.Namespace, vocabulary: int, positions: int, **more: Any) -> LlamaForCausalLM:
    """A Llama of the sizes asked for, its embeddings tied; `more` goes to its config."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.width,
        intermediate_size=args.mlp * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        initializer_range=args.init,
        rope_parameters={"rope_type": "default", "rope_theta": args.theta},
        **more,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def optimiser(model: torch.nn.Module, rate: float, decay: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=decay)


def rate(peak: float, warmed: float, spent: float, floor: float = 0.02) -> float:
    """The learning rate once `spent` of the time is gone: flat until 65 % of it, then straight down to `floor`.

    `warmed`: how much of the warm-up is done; 1 is all of it.
    """
    left = min(1.0, (1.0 - spent) / 0.35)
    return peak * min(1.0, warmed) * max(floor, left)


def autocast(device: str) -> torch.autocast:
    """bfloat16 products on a GPU; the weights stay in float32."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def learn(model: torch.nn.Module, opt: torch.optim.Optimizer, loss: torch.Tensor, rate: float) -> None:
    """One step down the gradient, whose norm is held to 1."""
    for group in opt.param_groups:
        group["lr"] = rate
    opt.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()


def save(model: LlamaForCausalLM, out: Path, tokenizer: str, **special: str) -> None:
    """Weights and tokenizer as transformers reads them: `tokenizer` is tokenizer.json, `special` names its tokens."""
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    (out / "tokenizer.json").write_text(tokenizer + "\n", encoding="utf-8")
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "clean_up_tokenization_spaces": False}
    (out / "tokenizer_config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
