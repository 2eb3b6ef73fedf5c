"""Fits of links, host memory and block devices: from plain arrays of measured times to constants, robust to outliers.

Every error is relative, and rows far off the rest count less: one slow point of a shared machine moves no constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

HUBER = 1.345  # in robust standard deviations: 95 % efficient where errors are normal
Found = dict[str, float]


def robust_terms(terms: Sequence[np.ndarray], seconds: np.ndarray) -> np.ndarray:
    """Coefficients >= 0 of a sum of terms that gives `seconds`: least squares of relative errors, Huber-weighted."""
    columns = np.stack([np.asarray(t, float) for t in terms], 1) / seconds[:, None]
    weights = np.ones(len(seconds))
    found = np.zeros(len(terms))
    for _ in range(12):
        before, found = found, _non_negative(columns * weights[:, None], weights)
        if (np.abs(found - before) <= 1e-6 * np.abs(found)).all():
            break
        off = np.abs(1.0 - columns @ found)
        spread = 1.4826 * np.median(off) + 1e-12
        weights = np.sqrt(np.minimum(1.0, HUBER * spread / np.maximum(off, 1e-300)))
    return found


def _non_negative(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares; a coefficient below zero is set to zero and the rest fitted again."""
    scale = np.abs(columns).max(0)
    kept = scale > 0
    while True:
        found = np.zeros(columns.shape[1])
        found[kept] = np.linalg.lstsq(columns[:, kept] / scale[kept], target, rcond=None)[0] / scale[kept]
        if (found >= 0).all():
            return found
        kept &= found > 0


def least_log_error(form: Callable[[np.ndarray], np.ndarray], measured: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Positive parameters for which `form` is nearest to `measured` in absolute logarithm, sought from `start`."""

    def loss(logs: np.ndarray) -> float:
        return float(np.abs(np.log(form(np.exp(logs)) / measured)).sum())

    at, step = np.log(start), 0.5
    best = loss(at)
    moves = [m for row in np.eye(len(at)) for m in (row, -row)]
    moves += [a + b for a in moves for b in moves if (np.abs(a) * np.abs(b)).sum() == 0]  # along ridges, too
    while step > 5e-4:
        for move in moves:
            if (found := loss(at + step * move)) < best - 1e-12:
                at, best = at + step * move, found
                break
        else:
            step /= 2
    return np.exp(at)


# --- links: latency + n per_copy + bytes / bandwidth -------------------------------------------------------


def link_form(c: Found, copies: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
    """Seconds of `copies` copies of `nbytes` in all."""
    return c["latency"] + copies * c["per_copy"] + nbytes / c["bandwidth"]


def link_fit(copies: np.ndarray, nbytes: np.ndarray, seconds: np.ndarray) -> Found:
    """Latency, time per copy and bandwidth; needs rows of one copy and of many."""
    latency, per_copy, per_byte = robust_terms([np.ones(len(seconds)), copies, nbytes], seconds)
    return {"latency": float(latency), "per_copy": float(per_copy), "bandwidth": inverse(per_byte)}


def slope_fit(count: np.ndarray, seconds: np.ndarray) -> float:
    """Seconds per unit of `count`, beside a fixed part."""
    return float(robust_terms([np.ones(len(seconds)), count], seconds)[1])


# --- host memory: bytes / min(threads * thread_bandwidth, bandwidth / 2) -----------------------------------


def host_form(c: Found, threads: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
    """Seconds in which `threads` threads copy `nbytes`, each read and written once."""
    return nbytes / np.minimum(threads * c["thread_bandwidth"], c["bandwidth"] / 2.0)


def host_fit(threads: np.ndarray, nbytes: np.ndarray, seconds: np.ndarray) -> Found:
    """Bandwidth of host memory and of one copying thread; where threads never saturate, the bandwidth they reached."""
    rate = nbytes / seconds
    start = np.array([np.median((rate / threads)[threads == threads.min()]), 2.0 * rate.max()])

    def form(p: np.ndarray) -> np.ndarray:
        return host_form({"thread_bandwidth": p[0], "bandwidth": p[1]}, threads, nbytes)

    found = least_log_error(form, seconds, start)
    return {"thread_bandwidth": found[0], "bandwidth": min(found[1], 2.0 * float(threads.max()) * found[0])}


# --- SSD: rate = min(bandwidth, iops block, depth block / (latency + block / bandwidth)) --------------------


def ssd_form(c: Found, block: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Bytes per second of blocks with `depth` requests in flight; `kvsim.machine.links.ssd_rate` of arrays."""
    transfer = block / c["bandwidth"]
    return block / np.maximum(np.maximum(transfer, 1.0 / c["iops"]), (c["latency"] + transfer) / depth)


def ssd_fit(block: np.ndarray, depth: np.ndarray, rate: np.ndarray) -> Found:
    """Bandwidth, requests per second and latency; a limit that no row ran into is the most that was seen."""
    names = ("bandwidth", "iops", "latency")
    least = depth == depth.min()
    waiting = np.median((depth * block / rate - block / rate.max())[least])
    start = np.array([rate.max(), (rate / block).max(), max(float(waiting), 1e-7)])

    def form(p: np.ndarray) -> np.ndarray:
        return ssd_form(dict(zip(names, p, strict=True)), block, depth)

    found = dict(zip(names, least_log_error(form, rate, start).tolist(), strict=True))
    reached = form(np.array([found[n] for n in names]))
    return found | {"iops": min(found["iops"], float((reached / block).max()))}


def enough_depth(block: np.ndarray, depth: np.ndarray, rate: np.ndarray, share: float = 0.95) -> float:
    """The least depth that reaches `share` of the best rate, for the block size where that takes the most."""
    needed = []
    for b in np.unique(block):
        here = block == b
        needed.append(depth[here][rate[here] >= share * rate[here].max()].min())
    return float(max(needed))


def inverse(per_byte: float) -> float:
    """Bytes per second; infinite where bytes cost nothing."""
    return 1.0 / float(per_byte) if per_byte > 0 else float("inf")
