"""What the machine is asked to do in one iteration, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

MOVES = ("fetch_host", "fetch_ssd", "spill_host", "spill_ssd", "prefetch_host", "prefetch_ssd")


@dataclass(slots=True)
class Work:
    """One iteration of the serving loop, as the cache left it. Arrays are [layers], float64 but for `awaits`."""

    queries: int  # query tokens in this iteration (decode: running sequences; prefill: prompt tokens)
    sequences: int
    prefill: bool
    kv_read: np.ndarray  # KV bytes that attention reads
    fetch_host: np.ndarray  # bytes host -> GPU, waited for
    fetch_host_copies: np.ndarray  # in how many copies: pages, or merged runs
    fetch_ssd: np.ndarray  # bytes SSD -> pinned staging -> GPU, waited for
    fetch_ssd_copies: np.ndarray
    spill_host: np.ndarray  # bytes GPU -> host, not waited for
    spill_host_copies: np.ndarray
    spill_ssd: np.ndarray  # bytes host -> SSD, not waited for
    spill_ssd_copies: np.ndarray
    prefetch_host: np.ndarray  # bytes host -> GPU for later iterations
    prefetch_host_copies: np.ndarray
    prefetch_ssd: np.ndarray
    prefetch_ssd_copies: np.ndarray
    awaits: np.ndarray  # bool: layers that wait for prefetches of iterations before that are still on their way
    rebuild: np.ndarray  # tokens of each layer that are computed again instead of fetched
    recode_s: np.ndarray  # GPU time for pages that change their format
    known: str = "layer"  # the fetch list of a layer is known at the "start" of the step, or after the "layer" before
    policy_s: float = 0.0  # modelled compute of the policy on the GPU stream, spread over the layers

    @classmethod
    def idle(cls, layers: int, **given) -> Work:
        """Work that moves and reads nothing but what is given; a number stands for every layer."""
        moved = [move + suffix for move in MOVES for suffix in ("", "_copies")]
        arrays = {name: np.zeros(layers) for name in ("kv_read", "rebuild", "recode_s", *moved)}
        for name in arrays.keys() & given.keys():
            arrays[name] = arrays[name] + given.pop(name)
        given["awaits"] = np.full(layers, given.get("awaits", True), bool)
        return cls(**{"queries": 1, "sequences": 1, "prefill": False, **arrays, **given})


@dataclass(slots=True)
class Record:
    """What an iteration took: end - start = compute + stall + submit + queued."""

    start_s: float
    end_s: float = 0.0
    compute_s: float = 0.0
    stall_s: float = 0.0  # the stream waited for a transfer
    submit_s: float = 0.0  # the stream waited for the submit thread
    queued_s: float = 0.0  # the stream was computing for somebody else
    layer_end_s: np.ndarray = field(default_factory=lambda: np.empty(0))
