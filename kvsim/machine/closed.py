"""Closed forms: what the pipeline must give where arithmetic already knows the answer.

Used by the tests, and by anybody who wants a number without a simulation. Times in seconds, sizes in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def prefetched_step(layers: int, compute: float, fetch: float) -> float:
    """A step of equal layers, lists known at its start, two or more staging buffers."""
    return fetch + (layers - 1) * max(compute, fetch) + compute


def on_demand_step(layers: int, compute: float, fetch: float) -> float:
    """A step of equal layers whose lists are known only when the layer before has finished."""
    return layers * (compute + fetch)


def submit_bound_step(layers: int, compute: float, submit: float) -> float:
    """A resident step whose kernels take longer to submit than to run."""
    return layers * submit + compute


def knee(compute: float, latency: float, bandwidth: float, layer_kv: float) -> float:
    """The resident fraction at which fetching a layer takes as long as computing one."""
    return 1.0 - (compute - latency) * bandwidth / layer_kv


def offloaded_cache_step(
    layers: int, compute: float, fetch: float, write_back: float, concatenate: float, submit: float = 0.0
) -> float:
    """A framework's offloaded cache: the next layer's fetch overlaps, but every layer is copied back whole, in line."""
    return layers * max(fetch, compute + concatenate + write_back, submit)


def preload_stall(layers: int, load: float, compute: float, buffered: int = 0) -> float:
    """GPU idle time of a layer-wise preload of equal layers, the first `buffered` of them already there."""
    return max(0.0, load - buffered * compute, (layers - buffered) * load - (layers - 1) * compute)


def recompute_share(ratio: float, overlapped: bool = False) -> float:
    """Share of the context to recompute instead of load (multi-head attention; loading a token's input is half its KV).

    `ratio`: hidden * bandwidth / FLOP/s. `overlapped`: the inputs' transfer hides behind another batch's compute.
    """
    return min(1.0, 1.0 / (ratio + 0.5)) if overlapped else 1.0 / (1.0 + ratio)


def recompute_pays(input_bytes: float, kv_token_bytes: float) -> bool:
    """A token's layer input must be smaller than the keys and values it rebuilds; with grouped heads it rarely is."""
    return input_bytes < kv_token_bytes


def stall_free_gap(nbytes: float, out: float, back: float) -> float:
    """Shortest time between two uses of a tensor in which it can be moved out and back at these bandwidths."""
    return nbytes / out + nbytes / back


def quantised_bytes(
    tokens: float, width: float, bits: float, group: int, group_bits: float, kept: float = 0.0
) -> float:
    """Bytes of `tokens` vectors of `width` values at `bits`, with `group_bits` per group; `kept` more stay in FP16."""
    return tokens * width * (bits + group_bits / group) / 8.0 + kept * width * 2.0


def stable_heads_share(unstable: float, kept: float, context: float, page: float = math.inf) -> float:
    """Share of the KV cache on the GPU when a share of the heads keeps all of it and the others `kept` tokens.

    `page`: tokens per page whose smallest and largest key stay on the GPU for every page. FlexiCache, arXiv 2511.00868.
    """
    return unstable + (1.0 - unstable) * min(1.0, kept / context) + 1.0 / page


def kv_bytes(heads: float, tokens: float, head_dim: float, value_bytes: float) -> float:
    """Keys and values of `tokens` in each of `heads` KV heads, all layers counted."""
    return 2.0 * heads * tokens * head_dim * value_bytes


def block_states(sequences: Iterable[Sequence[int]], block: int) -> list[list[int]]:
    """Where each sequence of tokens leaves a recurrent state (tokens before it), one after every full block."""
    return [list(range(block, len(tokens) + 1, block)) for tokens in sequences]


def branch_states(sequences: Iterable[Sequence[int]]) -> list[list[int]]:
    """Where each sequence leaves a new recurrent state under Marconi's admission (arXiv 2411.19379): at most two.

    One after its last token, and one where it leaves the sequences before it inside an edge of their radix tree, that
    is where no state is yet. Nothing is evicted.
    """
    seen: list[tuple[int, ...]] = []
    stored: set[tuple[int, ...]] = {()}
    found = []
    for tokens in map(tuple, sequences):
        states = {tokens[: _shared(tokens, seen)], tokens} - stored
        found.append(sorted(map(len, states)))
        stored |= states
        seen.append(tokens)
    return found


def prefix_cache_bytes(
    sequences: Sequence[Sequence[int]], states: Sequence[Sequence[int]], token_bytes: float, state_bytes: float
) -> float:
    """Bytes of a prefix cache of `sequences`, shared prefixes once, with `states` per sequence as the two above say.

    `token_bytes`: keys and values of a token; `state_bytes`: all recurrent layers, 0 for attention alone.
    """
    new = sum(len(tokens) - _shared(tokens, sequences[:i]) for i, tokens in enumerate(sequences))
    return new * token_bytes + sum(map(len, states)) * state_bytes


def _shared(tokens: Sequence[int], seen: Iterable[Sequence[int]]) -> int:
    """Tokens of the longest prefix that any sequence of `seen` has too."""
    return max((_common(tokens, other) for other in seen), default=0)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def split_seconds(nbytes: float, bandwidths: Sequence[float], shares: Sequence[float] | None = None) -> float:
    """Time to move bytes over several paths at once; by default in the ratio of their bandwidths, the fastest."""
    shares = shares or [b / sum(bandwidths) for b in bandwidths]
    return max(nbytes * share / b for share, b in zip(shares, bandwidths, strict=True))
