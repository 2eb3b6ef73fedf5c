"""A tiny random model, what it computes for one prompt, and that as a trace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import transformers as tf
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvsim import registry
from kvsim.cache.cache import Cache
from kvsim.cache.tiers import Capacity
from kvsim.trace.access import DenseSource, Trace, dense_trace
from tests.helpers import Run, drive

torch.set_num_threads(1)  # the models are too small for more
PROMPT = 96
SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny(config: type, attention: str = "eager", **more):
    """A random model, its matrices scaled up so that attention is far from uniform."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config(**SIZES | more), attn_implementation=attention).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4.0)
    return model


def tokens(seed: int, count: int) -> torch.Tensor:
    return torch.randint(3, 128, (1, count), generator=torch.Generator().manual_seed(seed))


@dataclass
class Seen:
    """`trace`: what the model computed; `keys`: [layers][kv_heads, tokens, dim], to find entries by."""

    trace: Trace
    keys: list[torch.Tensor]


@torch.no_grad()
def observe(model, ids: torch.Tensor, prompt: int = PROMPT) -> Seen:
    """One forward pass over all of `ids`, of which the first `prompt` are the prompt, as a trace with q, k and v."""
    c, queries, hooks = model.config, [], []
    for layer in model.model.layers:
        hooks.append(layer.self_attn.q_proj.register_forward_hook(lambda m, i, o: queries.append(o[0])))
    out = model(input_ids=ids, use_cache=True, output_attentions=True, past_key_values=tf.DynamicCache())
    for hook in hooks:
        hook.remove()
    rope, count = model.model.rotary_emb, ids.shape[1]
    cos, sin = rope(queries[0], torch.arange(count)[None])
    q = [x.view(count, c.num_attention_heads, -1).transpose(0, 1) for x in queries]
    q = [apply_rotary_pos_emb(x[None], x[None], cos, sin)[0][0] for x in q]
    keys = [layer.keys[0] for layer in out.past_key_values.layers]
    values = [layer.values[0] for layer in out.past_key_values.layers]
    group = c.num_attention_heads // c.num_key_value_heads
    rows = torch.stack([a[0].unflatten(0, (-1, group)).mean(1) for a in out.attentions])  # layer, head, row, column
    rows = rows.permute(2, 0, 1, 3).numpy()
    vectors = tuple(torch.stack(x).numpy() for x in (q, keys, values))
    source = DenseSource(
        rows[:prompt, ..., :prompt], rows[prompt:], vectors=vectors, inv_freq=rope.inv_freq.double().numpy()
    )
    return Seen(dense_trace([source]), keys)


def replay(spec: str, budget: int, trace: Trace, granularity: str | None = None) -> Run:
    policy, request = registry.build(spec), trace.requests()[0]
    policy.granularity = granularity or policy.granularity
    cache = Cache(trace.lanes, request.stride, policy, Capacity(budget), page_size=trace.page_size, audit=True)
    return drive(cache, request.accesses(vectors=bool(policy.needs & set("qkv"))), request.stride)


def found(kept: torch.Tensor, keys: torch.Tensor) -> list[set[int]]:
    """Per head, the positions of `kept` [kv_heads, n, dim] in all `keys` [kv_heads, tokens, dim], bit for bit."""
    same = (kept[:, :, None] == keys[:, None]).all(-1)
    assert (same.sum(-1) == 1).all(), "a key that is no key of the prompt, or that of two tokens"
    return [set(np.flatnonzero(s.any(0)).tolist()) for s in same.numpy()]
