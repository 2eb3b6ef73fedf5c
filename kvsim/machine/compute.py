"""How long the GPU computes: GEMMs, attention, small kernels and the head, from a model's shape.

The forms are linear in what is counted (weight bytes, FLOP, KV bytes, sequences), so that few measurements
fix the constants and shapes that were never measured can be predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvsim.errors import ConfigError
from kvsim.machine.hardware import Gpu
from kvsim.trace.access import Geometry


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder model; `value_bytes` of a weight or activation, `kv_bytes` of a cached element."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    value_bytes: float = 2.0
    kv_bytes: float = 2.0
    gated: bool = True  # an MLP with a gate has three matrices, one without has two

    @property
    def gemms(self) -> tuple[int, int, int, int]:
        """Parameters of the four GEMMs of a layer: query-key-value, output, up (with gate), down."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        up = self.intermediate * (2 if self.gated else 1)
        return self.hidden * (q + 2 * kv), q * self.hidden, self.hidden * up, self.intermediate * self.hidden

    @property
    def layer_bytes(self) -> float:
        """Weight bytes of one layer."""
        return sum(self.gemms) * self.value_bytes

    @property
    def weight_bytes(self) -> float:
        """Weight bytes of all layers and the head."""
        return self.layers * self.layer_bytes + self.hidden * self.vocab * self.value_bytes

    @property
    def kv_token_bytes(self) -> float:
        """Bytes of keys and values of one token in one layer, all KV heads."""
        return 2.0 * self.kv_heads * self.head_dim * self.kv_bytes

    @property
    def token_traffic(self) -> float:
        """Bytes per token and layer that norms, rotation and activation read and write."""
        norms = 8 * self.hidden  # two norms, each with the residual: two reads, two writes
        rotation = 2 * (self.heads + 2 * self.kv_heads) * self.head_dim
        return (norms + rotation + (3 if self.gated else 2) * self.intermediate) * self.value_bytes


SHAPES = {
    s.name: s
    for s in (
        ModelShape("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256),
        ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        ModelShape("qwen2.5-7b", 28, 3584, 28, 4, 128, 18944, 152064),
    )
}


def gemm_seconds(gpu: Gpu, parameters: float, rows: float, value_bytes: float = 2.0) -> float:
    """One GEMM: its weights read once or its FLOP, whichever is longer, and the kernel's fixed part."""
    reading = parameters * value_bytes / gpu.weight_bandwidth
    return max(reading, 2.0 * rows * parameters / gpu.gemm_flops) + gpu.kernel_time


def decode_attention_seconds(gpu: Gpu, sequences: float, kv_bytes: Any) -> Any:
    """Attention of one query per sequence; `kv_bytes` (number or array) is read once from the GPU's memory."""
    return gpu.attention_fixed + gpu.attention_per_sequence * sequences + kv_bytes / gpu.kv_bandwidth


def prefill_attention_seconds(gpu: Gpu, shape: ModelShape, queries: float, sequences: float, context: Any) -> Any:
    """Causal attention of `sequences` prompts of `queries` new tokens each, at the end of `context` tokens.

    Each row also costs a fixed number of keys (its blocks on the diagonal, its epilogue), which is why short prompts
    reach a fraction of the rate of long ones.
    """
    keys = np.maximum(context, queries) - queries / 2.0 + gpu.attention_row_keys
    flop = 4.0 * shape.heads * shape.head_dim * sequences * queries * keys
    return gpu.attention_fixed + gpu.attention_per_sequence * sequences + flop / gpu.attention_flops


def layer_seconds(
    gpu: Gpu,
    shape: ModelShape,
    queries: int,
    sequences: int,
    prefill: bool,
    kv_read: np.ndarray,
    kv_multiplier: float = 1.0,
) -> np.ndarray:
    """Seconds of each layer, float64 [layers].

    `queries`: tokens of this iteration over all sequences; `kv_read`: KV bytes attention reads, float64 [layers];
    `kv_multiplier`: how often the implementation moves them (1 for bare buffers, 3 where a cache is concatenated).
    """
    linear = sum(gemm_seconds(gpu, g, queries, shape.value_bytes) for g in shape.gemms)
    small = gpu.small_kernels * gpu.kernel_time + queries * shape.token_traffic / gpu.weight_bandwidth
    attention = decode_attention_seconds(gpu, sequences, kv_multiplier * np.asarray(kv_read, float))
    if prefill and sequences:
        context = np.asarray(kv_read, float) / (shape.kv_token_bytes * sequences)
        pairs = prefill_attention_seconds(gpu, shape, queries / sequences, sequences, context)
        attention = np.maximum(attention, pairs)
    return linear + small + gpu.layer_gap + attention


def head_seconds(gpu: Gpu, shape: ModelShape, sequences: int) -> float:
    """Once per step: the vocabulary's GEMM for the last token of each sequence, sampling, and the host's answer."""
    if not shape.vocab:
        return gpu.step_sync
    return gemm_seconds(gpu, shape.hidden * shape.vocab, sequences, shape.value_bytes) + gpu.step_sync


def shape_from_geometry(geometry: Geometry) -> ModelShape:
    """The shape of the model a trace was captured from. Raises ConfigError where the trace does not say it."""
    g = geometry
    for key in ("hidden", "intermediate", "vocab"):
        if not getattr(g, key):
            raise ConfigError(
                f'the trace does not say the "{key}" size of its model, which compute time needs',
                where=g.name,
                hint=f"time it as another model: {', '.join(SHAPES)}, or a config.json",
            )
    sizes = (g.layers, g.hidden, g.kv_heads * g.group, g.kv_heads, g.head_dim, g.intermediate, g.vocab)
    return ModelShape(g.name, *sizes, kv_bytes=g.kv_bytes)


_GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "phi3", "granite", "olmo2")
_UNGATED = ("gpt2", "gpt_neox", "opt", "phi", "starcoder2")
_ALIASES = {
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "vocab": ("vocab_size",),
}
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_REFUSED = {
    "num_local_experts": "mixture of experts",
    "num_experts": "mixture of experts",
    "n_routed_experts": "mixture of experts",
    "kv_lora_rank": "latent attention",
    "quantization_config": "quantised weights",
}


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape in a Hugging Face config.json (as a dict).

    Raises ConfigError for a size that is missing, for an unknown architecture, and for mixtures of experts, latent
    attention and quantised weights, whose compute this model does not describe.
    """
    c = {**config, **config["text_config"]} if isinstance(config.get("text_config"), Mapping) else dict(config)
    where = str(c.get("_name_or_path") or c.get("name") or "config.json")
    for key, what in _REFUSED.items():
        if c.get(key):
            raise ConfigError(f"{what} ({key}) is not modelled", where=where, hint="only dense models can be timed")
    size = {name: _size(c, keys, where) for name, keys in _ALIASES.items()}
    kind = c.get("model_type")
    if "gated_mlp" not in c and kind not in (*_GATED, *_UNGATED):
        hint = 'say whether its MLP has a gate: "gated_mlp": true'
        raise ConfigError(f'unknown model_type "{kind}"', where=where, hint=hint)
    dtype = str(c.get("dtype") or c.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in _BYTES:
        raise ConfigError(f'unknown dtype "{dtype}"', where=where, hint=f"use one of {', '.join(_BYTES)}")
    return ModelShape(
        name=where,
        **size,
        kv_heads=int(c.get("num_key_value_heads") or size["heads"]),
        head_dim=int(c.get("head_dim") or size["hidden"] // size["heads"]),
        intermediate=_intermediate(c, size["hidden"], where),
        value_bytes=_BYTES[dtype],
        kv_bytes=_BYTES[dtype],
        gated=bool(c.get("gated_mlp", kind in _GATED)),
    )


def _intermediate(c: Mapping[str, Any], hidden: int, where: str) -> int:
    if c.get("model_type") == "gpt2" and not c.get("n_inner"):
        return 4 * hidden  # GPT-2's own default
    return _size(c, ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), where)


def _size(c: Mapping[str, Any], keys: tuple[str, ...], where: str) -> int:
    for key in keys:
        value = c.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise ConfigError(
        f'"{keys[0]}" is missing or not a positive number', where=where, hint="take the model's own config.json"
    )
