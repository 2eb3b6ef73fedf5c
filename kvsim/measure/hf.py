"""Hugging Face models of a given shape with random weights, timed as their users run them: eagerly, launch by launch.

A second, independent target beside the executor: decode over the resident cache, prefill, and decode over transformers'
offloaded cache, which brings a layer's whole cache in and back for every token. No graph, no kernel of our own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from kvsim.errors import ConfigError
from kvsim.measure import require
from kvsim.measure.bare import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Row = dict[str, Any]


def model_of(shape: Shape, device: torch.device | str, *, attention: str = "sdpa", seed: int = 0) -> Any:
    """A causal language model of this shape, made where it will run: Qwen2 if the name says so, else Llama.

    Its matrices are normal with the architecture's usual spread; weights are tied where the original's are.
    """
    torch, transformers = require("torch"), require("transformers")
    sizes = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 1 << 18,
        "tie_word_embeddings": shape.name == "llama-3.2-1b",
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = (transformers.Qwen2Config if shape.name.startswith("qwen") else transformers.LlamaConfig)(**sizes)
    dtype = {2: torch.bfloat16, 4: torch.float32}[shape.value_bytes]
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False)


# -- caches ------------------------------------------------------------------------------------------------------


def filled_cache(model: Any, shape: Shape, sequences: int, context: int, *, seed: int = 0) -> Any:
    """A DynamicCache as after a prompt of `context` tokens, of normal values."""
    cache = require("transformers").DynamicCache(config=model.config)
    for layer in range(shape.layers):
        _fill(cache.layers[layer], *_keys_values(model, shape, sequences, context, seed + layer))
    return cache


def offloaded_cache(
    model: Any, shape: Shape, sequences: int, context: int, *, waiting: bool = True, seed: int = 0
) -> Any:
    """transformers' offloaded cache with the content of `filled_cache`, as between two steps: layer 0 on the device,
    the others in pinned host memory.

    `waiting`: a prefetch starts only after what was submitted before it, as from transformers 5.23 on. Without, 5.17
    may overwrite a buffer that is still being read. Raises ConfigError without CUDA, which this cache is made for.
    """
    torch = require("torch")
    if not torch.cuda.is_available():
        raise ConfigError("the offloaded cache needs a CUDA device", hint="measure it on a machine with a GPU")
    kind = _waiting_cache() if waiting else require("transformers").DynamicCache
    cache = kind(config=model.config, offloading=True)
    for layer in range(shape.layers):
        k, v = _keys_values(model, shape, sequences, context, seed + layer)
        host = (k, v) if layer == 0 else (_pinned(k), _pinned(v))
        _fill(cache.layers[layer], *host, like=k)
    return cache


def _waiting_cache() -> type:
    dynamic: Any = require("transformers").DynamicCache

    class WaitingCache(dynamic):
        """The offloaded cache with the wait that transformers 5.17 lacks."""

        def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
            self.prefetch_stream.wait_stream(require("torch").cuda.default_stream())
            super().prefetch(layer_idx, only_non_sliding)

    return WaitingCache


def _keys_values(model: Any, shape: Shape, sequences: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
    """Normal K and V of one layer, [sequences, KV heads, context, head_dim], the same for the same seed."""
    torch = require("torch")
    like = next(model.parameters())
    generator = torch.Generator(like.device).manual_seed(seed)
    sizes = (sequences, shape.kv_heads, context, shape.head_dim)
    k, v = (torch.empty(sizes, device=like.device, dtype=like.dtype).normal_(generator=generator) for _ in range(2))
    return k, v


def _fill(layer: Any, k: Tensor, v: Tensor, like: Tensor | None = None) -> None:
    """`like`: a tensor on the device that the layer computes on."""
    like = k if like is None else like
    layer.lazy_initialization(like, like)
    layer.keys, layer.values = k, v


def _pinned(x: Tensor) -> Tensor:
    return require("torch").empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)


# -- steps -------------------------------------------------------------------------------------------------------


@dataclass
class Steps:
    """Timed forward passes: milliseconds of each, and its scores [sequences, vocabulary].

    `ms`: until the chosen tokens are on the host. `submit_ms`: until the call returned. `gpu_ms`: on the device's clock
    (empty on a CPU).
    """

    ms: list[float] = field(default_factory=list)
    submit_ms: list[float] = field(default_factory=list)
    gpu_ms: list[float] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)

    def after(self, warm_up: int) -> Steps:
        """Without the first passes."""
        return Steps(self.ms[warm_up:], self.submit_ms[warm_up:], self.gpu_ms[warm_up:], self.scores[warm_up:])

    def times(self) -> dict[str, list[float]]:
        """As entries of a row."""
        found = {"ms": self.ms, "submit_ms": self.submit_ms, "gpu_ms": self.gpu_ms}
        return {name: times for name, times in found.items() if times}


def decode_steps(
    model: Any, cache: Any, sequences: int, steps: int, *, after: Callable[[], object] = lambda: None, **asked: Any
) -> Steps:
    """Greedy decoding over a filled cache, which grows; a step begins when the last one's tokens are known.

    `after` runs at the end of every step, inside its time. `asked`: further arguments of the model's forward.
    """
    torch = require("torch")
    device = next(model.parameters()).device
    token = torch.arange(sequences, device=device)[:, None] % model.config.vocab_size
    found = Steps()

    def step(token: Tensor) -> Tensor:
        scores = model(input_ids=token, past_key_values=cache, use_cache=True, **asked).logits[:, -1]
        after()
        return scores

    with torch.no_grad():
        for _ in range(steps):
            token = _timed(found, device, partial(step, token))
    return found


def prefill_steps(model: Any, sequences: int, queries: int, steps: int, *, seconds: float = 3.0) -> Steps:
    """The same random prompt again and again, each time into an empty cache; at least 3 times, then until `seconds`."""
    torch = require("torch")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (sequences, queries), device=device, generator=generator)
    found, began = Steps(), time.perf_counter()
    with torch.no_grad():
        while len(found.ms) < steps and (len(found.ms) < 3 or time.perf_counter() - began < seconds):
            _timed(found, device, lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[:, -1])
    return found


def _timed(found: Steps, device: torch.device, forward: Callable[[], Tensor]) -> Tensor:
    """Time one pass and the choice of tokens; the tokens [sequences, 1], which the host has seen by then."""
    torch = require("torch")
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None
    if events:
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    if events:
        events[0].record()
    scores = forward()
    token = scores.argmax(-1, keepdim=True)
    if events:
        events[1].record()
    submitted = time.perf_counter()
    token.tolist()
    found.ms.append((time.perf_counter() - began) * 1e3)
    found.submit_ms.append((submitted - began) * 1e3)
    if events:
        found.gpu_ms.append(events[0].elapsed_time(events[1]))
    found.scores.append(scores)
    return token


# -- rows --------------------------------------------------------------------------------------------------------


def params_of(impl: str, shape: Shape, sequences: int, context: int, **facts: Any) -> Row:
    """The parameters every row of a Hugging Face model has."""
    sizes = {"shape": shape.sizes, "sequences": sequences, "context": context}
    return {"impl": impl, "model": shape.name, **sizes, **facts}


def run_decode(
    model: Any, shape: Shape, sequences: int, context: int, *, steps: int = 16, warm_up: int = 4, **facts: Any
) -> Row:
    """A row of decode steps over the resident DynamicCache; `context` tokens are cached before the first step."""
    cache = filled_cache(model, shape, sequences, context)
    found = decode_steps(model, cache, sequences, warm_up + steps).after(warm_up)
    params = params_of("hf-decode", shape, sequences, context, **facts)
    return {"phase": "resident", "kind": "hf", "params": params, **found.times()}


def run_prefill(
    model: Any, shape: Shape, sequences: int, queries: int, *, steps: int = 6, warm_up: int = 1, **facts: Any
) -> Row:
    """A row of prefills of `queries` tokens ("context" in the row)."""
    found = prefill_steps(model, sequences, queries, warm_up + steps).after(warm_up)
    params = params_of("hf-prefill", shape, sequences, queries, **facts)
    return {"phase": "resident", "kind": "hf", "params": params, **found.times()}


def run_offloaded(
    model: Any,
    shape: Shape,
    sequences: int,
    context: int,
    *,
    waiting: bool = True,
    steps: int = 16,
    warm_up: int = 4,
    **facts: Any,
) -> Row:
    """A row of decode steps over the offloaded cache, whose scores are compared with those over a resident one.

    `same_steps` of `checked_steps` were equal bit by bit; `worst_difference` is the largest of a score. Choose a
    context from which on `steps` more tokens cross no power of two, else pinned memory is taken in the middle.
    """
    cache = filled_cache(model, shape, sequences, context)
    wanted = decode_steps(model, cache, sequences, warm_up + steps).scores
    del cache
    cache = offloaded_cache(model, shape, sequences, context, waiting=waiting)
    found = decode_steps(model, cache, sequences, warm_up + steps)
    pairs = list(zip(found.scores, wanted, strict=True))
    checked = {
        "checked_steps": len(pairs),
        "same_steps": sum(a.equal(b) for a, b in pairs),
        "worst_difference": max(float((a - b).abs().max()) for a, b in pairs),
    }
    params = params_of("hf-offloaded", shape, sequences, context, waiting=waiting, **checked, **facts)
    return {"phase": "offload", "kind": "hf", "params": params, **found.after(warm_up).times()}
