"""Closed forms: what the pipeline must give where arithmetic already knows the answer.

Used by the tests, and by anybody who wants a number without a simulation. Times in seconds, sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence


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


def split_seconds(nbytes: float, bandwidths: Sequence[float], shares: Sequence[float] | None = None) -> float:
    """Time to move bytes over several paths at once; by default in the ratio of their bandwidths, the fastest."""
    shares = shares or [b / sum(bandwidths) for b in bandwidths]
    return max(nbytes * share / b for share, b in zip(shares, bandwidths, strict=True))
