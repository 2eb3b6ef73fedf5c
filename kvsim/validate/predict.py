"""What the machine model says a measured step should have taken, and what two simpler models say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvsim.machine import Hardware, ModelShape, Record, Work
from kvsim.machine.closed import offloaded_cache_step
from kvsim.machine.compute import head_seconds, layer_seconds
from kvsim.machine.hardware import Link
from kvsim.machine.stream import Stream
from kvsim.measure.executor import READERS
from kvsim.validate.cases import Case

STEPS = 4  # identical steps until what is written back behind them has settled; without, the first is like the others


@dataclass(frozen=True, eq=False)
class Prediction:
    """One step of the steady state: seconds = compute + stall + submit.

    `layer_end_s`: since its start, float64 [layers]; nan where a closed form gives the step alone.
    """

    seconds: float
    compute_s: float
    stall_s: float
    submit_s: float
    layer_end_s: np.ndarray


def predict(case: Case, hardware: Hardware) -> Prediction:
    """The step of `case` on `hardware`; depth, order and copies are the row's, everything else the hardware's."""
    if case.impl == "hf-offloaded":
        return _offloaded_cache(case, hardware)
    kv_multiplier = hardware.gpu.eager_kv_passes if case.impl == "hf-decode" else 1.0
    works = [work_of(case)] * (STEPS if case.stored_pages.any() else 1)
    return prediction(simulate(as_performed(case, hardware), case.shape, works, kv_multiplier)[-1])


def simulate(hardware: Hardware, shape: ModelShape, works: Sequence[Work], kv_multiplier: float = 1.0) -> list[Record]:
    """Steps one after another on a machine of their own."""
    machine = Stream(hardware, shape, kv_multiplier=kv_multiplier)
    return [machine.iterate(work) for work in works]


def prediction(record: Record) -> Prediction:
    """The step that a record tells of."""
    times = record.end_s - record.start_s, record.compute_s, record.stall_s, record.submit_s
    return Prediction(*times, record.layer_end_s - record.start_s)


def work_of(case: Case) -> Work:
    """What one step of the case asks of the machine."""
    pages = case.host_pages + case.ssd_pages
    from_ssd = np.divide(case.ssd_pages, pages, out=np.zeros_like(pages), where=pages > 0)
    prefill = case.impl == "hf-prefill"
    return Work.idle(
        case.shape.layers,
        queries=case.sequences * case.context if prefill else case.sequences,
        sequences=case.sequences,
        prefill=prefill,
        known=case.known,
        kv_read=case.kv_bytes,
        fetch_host=case.host_pages * case.page_bytes,
        fetch_host_copies=case.copies * (1.0 - from_ssd),
        fetch_ssd=case.ssd_pages * case.page_bytes,
        fetch_ssd_copies=case.copies * from_ssd,
        spill_host=case.stored_pages * case.page_bytes,
        spill_host_copies=case.stored_pages,
    )


def as_performed(case: Case, hardware: Hardware) -> Hardware:
    """The machine as the executor or the framework uses it."""
    if case.impl != "executor":
        return eager(hardware, case.in_line)
    used: dict[str, Any] = {
        "gpu.staging_layers": case.depth,
        "host.copies": "pinned",
        "ssd.queue_depth": READERS,
    }
    if case.whole:  # submitted once, and nothing between the layers
        used |= {"gpu.layer_gap": 0.0, "cpu.layer_submit": hardware.cpu.layer_submit / case.shape.layers}
    return hardware.with_overrides(used)


def eager(hardware: Hardware, in_line: bool) -> Hardware:
    """The machine under a framework that submits kernel by kernel.

    `in_line`: the thread that submits a kernel also runs it, so that nothing overlaps.
    """
    each = hardware.cpu.eager_submit
    if in_line:
        return hardware.with_overrides({"gpu.layer_gap": hardware.gpu.layer_gap + each, "cpu.layer_submit": 0.0})
    return hardware.with_overrides({"cpu.layer_submit": each})


def _offloaded_cache(case: Case, hardware: Hardware) -> Prediction:
    """The framework's offloaded cache, in closed form: the next layer is fetched, this one written back whole."""
    hardware, layers, kv = as_performed(case, hardware), case.shape.layers, case.kv_bytes
    compute = _compute(case, hardware)
    concatenate = (hardware.gpu.eager_kv_passes - 1.0) * kv / hardware.gpu.kv_bandwidth
    fetch, back = (_whole_layer(link, kv) for link in (hardware.h2d, hardware.d2h))
    head = head_seconds(hardware.gpu, case.shape, case.sequences)
    free = offloaded_cache_step(layers, compute, fetch, back, concatenate)
    step = offloaded_cache_step(layers, compute, fetch, back, concatenate, hardware.cpu.layer_submit)
    busy = layers * (compute + concatenate)
    return Prediction(step + head, busy + head, free - busy, step - free, np.full(layers, np.nan))


def _whole_layer(link: Link, nbytes: float) -> float:
    """Keys and values of a layer, one copy each."""
    return link.latency + 2 * link.per_copy + nbytes / link.bandwidth


def _compute(case: Case, hardware: Hardware) -> float:
    """Seconds of a layer when nothing is moved and keys and values are read once."""
    work = work_of(case)
    return float(
        layer_seconds(hardware.gpu, case.shape, work.queries, work.sequences, work.prefill, work.kv_read[:1])[0]
    )


# --- simpler models, to be beaten ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Peaks:
    """Rates as advertised: bytes/s of memory, host link and SSD, FLOP/s of a GEMM. `source`: whose they are."""

    memory: float
    flops: float
    link: float
    ssd: float
    source: str


_PCIE = {4: 32e9, 5: 64e9}  # bytes/s of 16 lanes in one direction, before any protocol
_DATASHEETS = {  # by the beginning of a device's slug: memory, dense bfloat16, generation of the host link
    "nvidia-h200": (4.8e12, 989e12, 5, "NVIDIA H200 datasheet (SXM)"),
    "nvidia-h100-80gb-hbm3": (3.35e12, 989e12, 5, "NVIDIA H100 datasheet (SXM)"),
    "nvidia-h100-pcie": (2.0e12, 756e12, 5, "NVIDIA H100 datasheet (PCIe)"),
    "nvidia-a100-sxm4-80gb": (2.039e12, 312e12, 4, "NVIDIA A100 80GB datasheet (SXM)"),
    "nvidia-geforce-rtx-4090": (1.008e12, 165.2e12, 4, "NVIDIA Ada architecture whitepaper"),
}


def peaks(device: str, rows: Sequence[Mapping[str, Any]], hardware: Hardware) -> Peaks:
    """Peak rates of a device: its datasheet's, or where there is none the best that was measured in `rows`.

    What was neither printed nor measured is the hardware's rate. Disks have no datasheet here.
    """
    best = _best_rates(rows)
    ssd = best.get("ssd", hardware.ssd.read_bandwidth)
    for start, (memory, flops, generation, source) in _DATASHEETS.items():
        if device.startswith(start):
            return Peaks(memory, flops, _PCIE[generation], ssd, f"{source}; disk: the best rate measured")
    gpu, h2d = hardware.gpu, hardware.h2d
    memory = best.get("memory", max(gpu.weight_bandwidth, gpu.kv_bandwidth))
    rates = memory, best.get("flops", gpu.gemm_flops), best.get("link", h2d.bandwidth), ssd
    return Peaks(*rates, "the best rates measured; not a datasheet's")


def _best_rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in rows:
        if row["phase"] != "calibrate" or "ms" not in row:
            continue
        name, amount, p = "", 0.0, row["params"]
        if row["kind"] == "memory":
            name, amount = "memory", p["bytes"]
        elif row["kind"] == "gemm":
            name, amount = "flops", 2.0 * p["out"] * p["inp"] * p["rows"]
        elif row["kind"] == "copy" and p["path"] == "h2d-pinned":
            name, amount = "link", p["bytes"]
        elif row["kind"] == "ssd" and p["rw"] == "read" and "gb_per_s" in row:
            name, amount = "ssd", row["gb_per_s"] * 1e6 * float(np.median(row["ms"]))
        if name and (ms := float(np.median(row["ms"]))):
            found[name] = max(found.get(name, 0.0), amount / ms * 1e3)
    return found


def roofline(case: Case, peak: Peaks) -> float:
    """max(compute at peak, bytes / peak link): what a datasheet promises."""
    shape, work = case.shape, work_of(case)
    weights, read = shape.read_bytes, shape.layers * case.kv_bytes
    pairs = work.queries * case.context * (0.5 if work.prefill else 1.0)
    flop = 2.0 * work.queries * sum(shape.gemms) + 4.0 * shape.heads * shape.head_dim * pairs
    flop = shape.layers * flop + 2.0 * case.sequences * shape.hidden * shape.vocab
    host, ssd = _fetched(case)
    return max((weights + read) / peak.memory, flop / peak.flops, (host + ssd) / peak.link, ssd / peak.ssd)


def calibrated_max(case: Case, hardware: Hardware) -> float:
    """max(compute, bytes / bandwidth) with calibrated rates: no submission, no copies, no depth, no order."""
    host, ssd = _fetched(case)
    compute = case.shape.layers * _compute(case, hardware)
    compute += head_seconds(hardware.gpu, case.shape, case.sequences)
    return max(compute, (host + ssd) / hardware.h2d.bandwidth, ssd / hardware.ssd.read_bandwidth)


def _fetched(case: Case) -> tuple[float, float]:
    """Bytes that a step fetches from host memory and from the SSD; an offloaded cache fetches everything."""
    if case.impl == "hf-offloaded":
        return case.shape.layers * case.kv_bytes, 0.0
    return float(case.host_pages.sum()) * case.page_bytes, float(case.ssd_pages.sum()) * case.page_bytes
