"""A decode step of a Llama-shaped model on buffers of fixed size: its matrix products and attention, nothing around."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvsim.errors import ConfigError
from kvsim.measure import require

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder with grouped-query attention and a gated MLP. `value_bytes`: 2 is bfloat16, 4 is float32."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    value_bytes: int = 2

    @property
    def sizes(self) -> dict[str, int]:
        """Everything but the name."""
        return {key: value for key, value in asdict(self).items() if key != "name"}

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.value_bytes


SHAPES = {
    s.name: s
    for s in (
        Shape("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256),
        Shape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        Shape("qwen2.5-7b", 28, 3584, 28, 4, 128, 18944, 152064),
        # for a CPU: too large for its caches, 5 to 30 ms a step on one core, of different proportions
        Shape("cpu-small", 8, 512, 8, 4, 64, 1536, 8192, 4),
        Shape("cpu-wide", 6, 768, 12, 4, 64, 2048, 8192, 4),
        Shape("cpu-deep", 12, 384, 6, 3, 64, 1024, 8192, 4),
    )
}


def shape(name: str) -> Shape:
    """A shape by its name. Raises ConfigError for one that does not exist."""
    if name not in SHAPES:
        raise ConfigError(f'unknown shape "{name}"', hint=f"shapes are {', '.join(SHAPES)}")
    return SHAPES[name]


def attention(q: Tensor, kv: Tensor) -> Tensor:
    """Decode attention [sequences, heads * head_dim] of q [sequences, heads, head_dim] over kv [sequences, context, 2,
    KV heads, head_dim].

    The query heads of a group lie side by side as rows of their KV head, so K and V are read where they lie, once.
    """
    functional = require("torch.nn.functional")
    sequences, _, _, kv_heads, head_dim = kv.shape
    k, v = (kv[:, :, i].transpose(1, 2) for i in (0, 1))
    rows = q.view(sequences, kv_heads, -1, head_dim)
    return functional.scaled_dot_product_attention(rows, k, v).reshape(sequences, -1)


class Bare:
    """A model of random normal weights (never zeros: power and clocks differ) with a full cache of random K and V.

    `kv[layer]`: [sequences * context, 2, KV heads, head_dim], tokens of a sequence together, so that a page of tokens
    is one piece of memory. A step overwrites the last token of every sequence: the context does not grow. Values
    pass between the parts of a step in `token`, `x` and `logits` alone, so each part can be captured by itself.
    """

    def __init__(self, shape: Shape, sequences: int, context: int, device: torch.device, seed: int = 0):
        torch = self._torch = require("torch")
        self._functional = require("torch.nn.functional")
        self.shape, self.sequences, self.context = shape, sequences, context
        self.dtype = {2: torch.bfloat16, 4: torch.float32}[shape.value_bytes]
        generator = torch.Generator(device).manual_seed(seed)
        self._like: dict[str, Any] = {"device": device, "dtype": self.dtype}

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return torch.empty(*size, **self._like).normal_(0.0, scale, generator=generator)

        def matrix(out: int, inp: int) -> Tensor:
            return normal(out, inp, scale=inp**-0.5)

        s = shape
        query, pair = s.heads * s.head_dim, 2 * s.kv_heads * s.head_dim
        self._layers = [
            {
                "qkv": matrix(query + pair, s.hidden),
                "o": matrix(s.hidden, query),
                "up": matrix(2 * s.intermediate, s.hidden),
                "down": matrix(s.hidden, s.intermediate),
            }
            for _ in range(s.layers)
        ]
        self._head = matrix(s.vocab, s.hidden)  # also the embedding
        self._norm = torch.ones(s.hidden, **self._like)
        self.kv = [normal(sequences * context, 2, s.kv_heads, s.head_dim) for _ in range(s.layers)]
        self.token = torch.arange(sequences, device=device) % s.vocab
        self.x = torch.empty(sequences, s.hidden, **self._like)
        self.logits = torch.empty(sequences, s.vocab, **self._like)
        self._cos, self._sin = self._rotation()

    def _rotation(self) -> tuple[Tensor, Tensor]:
        """Cosine, and sine with the sign of the rotated half, of the newest token's position: [head_dim]."""
        torch, half = self._torch, self.shape.head_dim // 2
        angle = (self.context - 1) * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        cos, sin = torch.cat([angle.cos()] * 2), torch.cat([-angle.sin(), angle.sin()])
        return cos.to(**self._like), sin.to(**self._like)

    def parts(self) -> list[Callable[[], None]]:
        """A step as layers + 1 calls: one per layer (the first embeds the tokens), then head and choice of tokens."""
        return [*((lambda layer=layer: self.layer(layer)) for layer in range(self.shape.layers)), self.tail]

    def step(self) -> None:
        """All parts of a step."""
        for part in self.parts():
            part()

    def newest(self, layer: int) -> Tensor:
        """K and V of the newest token of every sequence, a view [sequences, 2, KV heads, head_dim]."""
        return self._by_sequence(layer)[:, -1]

    def layer(self, layer: int) -> None:
        """One layer: from `x` to `x`."""
        torch, f, s, w = self._torch, self._functional, self.shape, self._layers[layer]
        if layer == 0:
            torch.index_select(self._head, 0, self.token, out=self.x)
        qkv = f.linear(f.rms_norm(self.x, (s.hidden,), self._norm), w["qkv"])
        heads = qkv.view(self.sequences, s.heads + 2 * s.kv_heads, s.head_dim)
        qk, v = heads[:, : s.heads + s.kv_heads], heads[:, s.heads + s.kv_heads :]
        qk = torch.addcmul(qk * self._cos, qk.roll(s.head_dim // 2, -1), self._sin)
        newest = self.newest(layer)
        newest[:, 0].copy_(qk[:, s.heads :])
        newest[:, 1].copy_(v)
        mixed = attention(qk[:, : s.heads], self._by_sequence(layer))
        self.x.add_(f.linear(mixed, w["o"]))
        gate, up = f.linear(f.rms_norm(self.x, (s.hidden,), self._norm), w["up"]).chunk(2, -1)
        self.x.add_(f.linear(f.silu(gate) * up, w["down"]))

    def tail(self) -> None:
        """From `x` to `logits`, and the most likely token of each sequence to `token`."""
        torch = self._torch
        normed = self._functional.rms_norm(self.x, (self.shape.hidden,), self._norm)
        torch.mm(normed, self._head.t(), out=self.logits)
        torch.argmax(self.logits, -1, out=self.token)

    def _by_sequence(self, layer: int) -> Tensor:
        s = self.shape
        return self.kv[layer].view(self.sequences, self.context, 2, s.kv_heads, s.head_dim)
