"""A machine with round constants, and ways to run it."""

from __future__ import annotations

import simpy

from kvsim.machine import Hardware, Machine, ModelShape, Record, Work
from kvsim.machine.fit import LINEAR

KV_RATE = 1e9  # one KV byte read takes a nanosecond, and nothing else computes: kv_read sets a layer's time
BARE = {
    "gpu.memory": "80GB",
    "gpu.weight_bandwidth": "inf B/s",
    "gpu.kv_bandwidth": KV_RATE,
    "gpu.gemm_flops": "inf FLOP/s",
    "gpu.attention_flops": "inf FLOP/s",
    "gpu.attention_row_keys": 0,
    "gpu.kernel_time": 0,
    "gpu.small_kernels": 0,
    "gpu.attention_fixed": 0,
    "gpu.attention_per_sequence": 0,
    "gpu.prefill_fixed": 0,
    **{f"gpu.{loss}": 0 for loss in LINEAR},
    "gpu.layer_gap": 0,
    "gpu.step_sync": 0,
    "gpu.copy_slowdown": 0,
    "gpu.staging_layers": 2,
    "cpu.layer_submit": 0,
    **{f"link.{way}.bandwidth": 1e9 for way in ("h2d", "d2h")},
    **{f"link.{way}.{key}": 0 for way in ("h2d", "d2h") for key in ("latency", "per_copy", "submit")},
    **{f"link.{way}.duplex": 1.0 for way in ("h2d", "d2h")},
    "ssd.mixed": 1.0,
}


def hardware(**changed) -> Hardware:
    """Free compute but for KV bytes, links of 1 GB/s without fixed costs; keys with __ for dots."""
    machine = Hardware.load("h100-pcie5")
    return machine.with_overrides({**BARE, **{k.replace("__", "."): v for k, v in changed.items()}})


def shape(layers: int) -> ModelShape:
    return ModelShape("toy", layers, 64, 4, 2, 16, 128, 0)


def steps(
    hw: Hardware, works: list[Work], overlap: str = "layer", env: simpy.Environment | None = None, alone: bool = False
):
    """Run works one after another on one machine: (records, machine)."""
    env = env or simpy.Environment()
    machine = Machine(env, hw, shape(len(works[0].kv_read)), overlap, alone=alone)
    records: list[Record] = []

    def loop():
        for work in works:
            records.append((yield from machine.iterate(work)))

    env.process(loop())
    env.run()
    return records, machine


def step(hw: Hardware, work: Work, overlap: str = "layer") -> Record:
    return steps(hw, [work], overlap)[0][0]


def seconds(x: float) -> float:
    """Bytes that take `x` seconds, to read or to move."""
    return x * KV_RATE
