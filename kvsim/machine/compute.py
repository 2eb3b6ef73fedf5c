"""How long the GPU computes: GEMMs, attention, small kernels and the head, from a model's shape.

Each operator takes what it reads over a bandwidth, or what it multiplies over a rate, and what the kernels lose beside:
blocks of work that do not fill the last round of multiprocessors, tiles that are not full, a stream that has to start.
Every such loss is a constant that 0 turns off. The forms take arrays, so that `fit` uses the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from kvsim.errors import ConfigError
from kvsim.machine.hardware import Gpu
from kvsim.machine.work import Work
from kvsim.trace.access import Geometry


class Matrix(int):
    """The number of parameters of a weight matrix that knows its sides: `rows x inp` times `inp x out`."""

    out: int
    inp: int

    def __new__(cls, out: int, inp: int) -> Matrix:
        made = super().__new__(cls, out * inp)
        made.out, made.inp = out, inp
        return made


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
    tied: bool = False  # one matrix is both the embedding and the head

    @property
    def gemms(self) -> tuple[Matrix, Matrix, Matrix, Matrix]:
        """The four GEMMs of a layer: query-key-value, output, up (with gate), down."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        up = self.intermediate * (2 if self.gated else 1)
        sides = (q + 2 * kv, self.hidden), (self.hidden, q), (up, self.hidden), (self.hidden, self.intermediate)
        first, second, third, fourth = (Matrix(*side) for side in sides)
        return first, second, third, fourth

    @property
    def layer_bytes(self) -> float:
        """Weight bytes of one layer."""
        return sum(self.gemms) * self.value_bytes

    @property
    def read_bytes(self) -> float:
        """Weight bytes that a step reads: all layers and the head."""
        return self.layers * self.layer_bytes + self.hidden * self.vocab * self.value_bytes

    @property
    def weight_bytes(self) -> float:
        """Weight bytes in memory: also the embedding, of which a step reads a line per token."""
        return self.read_bytes + (0.0 if self.tied else self.hidden * self.vocab * self.value_bytes)

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
        ModelShape("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256, tied=True),
        ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        ModelShape("qwen2.5-7b", 28, 3584, 28, 4, 128, 18944, 152064),
    )
}


TILES = np.array([(64, 64), (128, 128), (128, 256)], float)  # rows x columns of an output block, as libraries ship them
_HIGH, _WIDE = TILES.T
_EDGES = (1.0 / TILES).sum(1) - (1.0 / TILES[-1]).sum()
WRITTEN = 1024.0  # elements of a token's keys in one layer, at which `prefill_token` is stated


def gemm_seconds(gpu: Gpu, parameters: float, rows: float, value_bytes: float = 2.0) -> float:
    """One GEMM of `rows` rows with a `Matrix`; a plain number of parameters is taken for a square matrix."""
    if isinstance(parameters, Matrix):
        return _gemm_seconds(gpu, parameters.out, parameters.inp, rows, value_bytes)
    return _gemm_seconds(gpu, parameters**0.5, parameters**0.5, rows, value_bytes)


@lru_cache(maxsize=1 << 14)
def _gemm_seconds(gpu: Gpu, out: float, inp: float, rows: float, value_bytes: float) -> float:
    return float(gemm_times(gpu, out, inp, rows, value_bytes))


def gemm_times(gpu: Gpu, out: Any, inp: Any, rows: Any, value_bytes: Any = 2.0) -> Any:
    """Seconds of GEMMs, arrays or numbers: weights read once or FLOP, smoothly the longer, and the kernel's fixed part.

    The output is cut into tiles, which the multiprocessors take in rounds; of the tiles on offer the fastest is used.
    `gemm_wave` is the share of the loss in unfilled tiles and rounds that shows, `gemm_depth` the cost of starting and
    ending a tile in columns of `inp`, `gemm_edge` what a tile below 128 x 256 loses in loading its sides more often.
    """
    out, inp, rows = (np.asarray(a, float)[..., None] for a in (out, inp, rows))
    full = rows * out / (_HIGH * _WIDE * gpu.sms)
    rounds = np.ceil(np.ceil(rows / _HIGH) * np.ceil(out / _WIDE) / gpu.sms)
    tile = 2.0 * _HIGH * _WIDE * (inp + gpu.gemm_depth) * (1.0 + gpu.gemm_edge * _EDGES)
    computing = ((full + gpu.gemm_wave * (rounds - full)) * tile).min(-1) * (gpu.sms / gpu.gemm_flops)
    reading = (out * inp)[..., 0] * value_bytes / gpu.weight_bandwidth
    return _longer(reading, computing, gpu.gemm_knee) + gpu.kernel_time


def _longer(a: Any, b: Any, knee: float) -> Any:
    """The longer of two overlapping times; where they are alike, up to 2**knee times that."""
    most = np.maximum(a, b)
    if not knee:
        return most
    ratio = np.divide(np.minimum(a, b), most, out=np.zeros_like(most), where=most > 0)
    return most * (1.0 + ratio ** (1.0 / knee)) ** knee


def decode_attention_seconds(gpu: Gpu, sequences: Any, kv_bytes: Any, kv_heads: Any = 1, key_bytes: Any = 512.0) -> Any:
    """Attention of one query per sequence; `kv_bytes` (number or array) is read once from the GPU's memory.

    `kv_heads` of each sequence are a block of work each. Blocks beyond one round of multiprocessors come in further
    rounds, each with a fixed part, and each block reads at least `attention_tile_keys` keys of `key_bytes` (key and
    value of one head). The stream reaches its rate late: it loses up to `kv_ramp`.
    """
    blocks = np.maximum(sequences * kv_heads, 1)
    further = np.maximum(np.ceil(blocks / gpu.sms) - 1.0, 0.0)
    unfilled = np.maximum(gpu.attention_tile_keys * key_bytes - kv_bytes / blocks, 0.0) if further.any() else 0.0
    reading = (kv_bytes + further * gpu.sms * unfilled) / gpu.kv_bandwidth
    if gpu.kv_ramp:
        reading = reading + gpu.kv_ramp * reading / (reading + gpu.kv_ramp)
    fixed = gpu.attention_fixed + gpu.attention_batch * (np.asarray(sequences) > 1)
    return fixed + gpu.attention_per_sequence * sequences + gpu.attention_wave * further + reading


def prefill_attention_seconds(gpu: Gpu, shape: ModelShape, queries: float, sequences: float, context: Any) -> Any:
    """Causal attention of `sequences` prompts of `queries` new tokens each, at the end of `context` tokens."""
    return prefill_times(gpu, shape.heads, shape.kv_heads, shape.head_dim, sequences, queries, context)


def prefill_times(
    gpu: Gpu, heads: Any, kv_heads: Any, head_dim: Any, sequences: Any, queries: Any, context: Any
) -> Any:
    """Seconds of causal attention, arrays or numbers: `queries` new tokens of each sequence see up to `context` keys.

    Tiles of `prefill_tile_rows` rows, packed from the query heads that share keys, walk these keys, one tile on each
    multiprocessor. Every row also costs a fixed number of keys, and every score what its softmax takes, in head
    dimensions. The last round of tiles need not be full, the tiles that see most keys may come late (`prefill_tail`),
    and none ends before its own keys are done, unless the kernel gives them to idle multiprocessors too
    (`prefill_split`).
    """
    context, tile = np.maximum(context, queries), gpu.prefill_tile_rows
    key = 4.0 * (head_dim + gpu.prefill_score_dims) / gpu.attention_flops  # seconds of a row's key, on the whole GPU
    mean = context - queries / 2.0 + gpu.attention_row_keys
    written = sequences * queries * (kv_heads * head_dim / WRITTEN) ** (2.0 / 3.0)
    fixed = gpu.prefill_fixed + gpu.prefill_token * written
    if not tile:
        return fixed + heads * sequences * queries * mean * key
    one = tile * gpu.sms * key  # of a tile's key
    rounds = kv_heads * sequences * np.ceil(heads / kv_heads * queries / tile) / gpu.sms
    most = context + gpu.attention_row_keys
    least = np.minimum(most - queries + np.minimum(tile, queries), mean)
    total = rounds * mean
    unfilled = np.where(rounds > 1, np.ceil(rounds) - rounds, 0.0) * least
    late = gpu.prefill_tail * np.clip(rounds - 1.0, 0.0, 1.0) * (most - least)
    alone = most * np.minimum(total / most, 1.0) ** gpu.prefill_split
    return fixed + np.maximum(total + unfilled + late, alone) * one


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
    key_bytes = 2.0 * shape.head_dim * shape.kv_bytes
    moved = kv_multiplier * np.asarray(kv_read, float)
    attention = decode_attention_seconds(gpu, sequences, moved, shape.kv_heads, key_bytes)
    if prefill and sequences:
        context = np.asarray(kv_read, float) / (shape.kv_token_bytes * sequences)
        pairs = prefill_attention_seconds(gpu, shape, queries / sequences, sequences, context)
        attention = np.maximum(attention, pairs)
    return linear + small + gpu.layer_gap + attention


def work_seconds(gpu: Gpu, shape: ModelShape, work: Work, kv_multiplier: float = 1.0) -> np.ndarray:
    """Undisturbed seconds of each layer, float64 [layers], the policy's share included; without the head."""
    seconds = layer_seconds(gpu, shape, work.queries, work.sequences, work.prefill, work.kv_read, kv_multiplier)
    if work.rebuild.any():  # the GEMMs of a layer see the rebuilt tokens beside the queries
        for g in shape.gemms:
            alone = gemm_seconds(gpu, g, work.queries, shape.value_bytes)
            both = [gemm_seconds(gpu, g, work.queries + n, shape.value_bytes) for n in work.rebuild.tolist()]
            seconds = seconds + np.array(both) - alone
    return seconds + work.recode_s + work.policy_s / shape.layers


def head_seconds(gpu: Gpu, shape: ModelShape, sequences: int) -> float:
    """Once per step: the vocabulary's GEMM for the last token of each sequence, sampling, and the host's answer."""
    if not shape.vocab:
        return gpu.step_sync
    return gemm_seconds(gpu, Matrix(shape.vocab, shape.hidden), sequences, shape.value_bytes) + gpu.step_sync


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
        tied=bool(c.get("tie_word_embeddings", False)),
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
