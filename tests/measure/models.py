"""Tiny random models of the architectures capture is checked on, and eager attention as the reference."""

from __future__ import annotations

import torch
import transformers as tf

BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**BASE),
    "qwen2": lambda: tf.Qwen2Config(**BASE),
    "qwen2-window": lambda: tf.Qwen2Config(**BASE, use_sliding_window=True, sliding_window=12, max_window_layers=1),
    "qwen3": lambda: tf.Qwen3Config(**BASE, head_dim=16),
    "mistral": lambda: tf.MistralConfig(**BASE, sliding_window=None),
    "mistral-window": lambda: tf.MistralConfig(**BASE, sliding_window=10),
    "gemma2": lambda: tf.Gemma2Config(**BASE, head_dim=16, sliding_window=12, query_pre_attn_scalar=16),
    "gemma3": lambda: tf.Gemma3TextConfig(**BASE, head_dim=16, sliding_window=12, query_pre_attn_scalar=16),
    "phi3": lambda: tf.Phi3Config(**BASE),
    "gpt-oss": lambda: tf.GptOssConfig(
        **BASE, head_dim=16, sliding_window=12, num_local_experts=4, num_experts_per_tok=2
    ),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
    "neox": lambda: tf.GPTNeoXConfig(**SMALL, intermediate_size=128, bos_token_id=1, eos_token_id=2),
    "opt": lambda: tf.OPTConfig(**SMALL, ffn_dim=128, word_embed_proj_dim=64, pad_token_id=0),
}


def tiny(name: str, seed: int = 0, attention: str | None = "eager", sharpen: float = 6.0):
    """A random model, its matrices scaled up so that attention is far from uniform."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attention).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(sharpen)
    return model


@torch.no_grad()
def forced_run(model, ids, mask, forced, attentions: bool = False, cache=None):
    """Prefill, then one pass per forced token; (logits [batch, 1 + steps, vocab], attentions per pass)."""
    cache = tf.DynamicCache(config=model.config) if cache is None else cache
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    logits, seen = [], []
    for t in range(forced.shape[1] + 1):
        out = model(
            input_ids=ids if t == 0 else forced[:, t - 1 : t],
            attention_mask=mask,
            position_ids=position if t == 0 else mask.sum(-1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
            output_attentions=attentions,
        )
        logits.append(out.logits[:, -1])
        seen.append(out.attentions)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.stack(logits, 1), seen


def batch(padded: bool, size: int = 3, prompt: int = 20, steps: int = 14):
    """(ids, mask, forced tokens); with `padded`, rows 1 and 2 have 5 and 9 padding tokens on the left."""
    g = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 128, (size, prompt), generator=g)
    mask = torch.ones_like(ids)
    for b, pad in enumerate((0, 5, 9)[:size] if padded else ()):
        mask[b, :pad], ids[b, :pad] = 0, 0
    return ids, mask, torch.randint(3, 128, (size, steps), generator=g)
