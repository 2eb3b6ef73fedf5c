"""Fit the compute constants of the shipped hardware files to public operator times, and say how well they predict.

    python experiments/hardware/fit_public.py --data DIR [--write]

Only constants enter the repository. Every error printed is of rows whose shape (or, for a GPU with a single
shape, context length) was left out of the fit. Sources, snapshots and licences: README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from kvsim.machine.compute import (
    ModelShape,
    decode_attention_seconds,
    gemm_seconds,
    layer_seconds,
    prefill_attention_seconds,
)
from kvsim.machine.hardware import FOLDER, Constant, Gpu, Hardware

MIB = 2.0**20
GEMMS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
SMALL = {"layernorm": 2, "rotary_emb": 1, "act_fn": 1}  # calls per layer
LLAMA = ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256)
QWEN = ModelShape("qwen3-32b, one of two GPUs", 64, 5120, 32, 4, 128, 12800, 75968)
AICONFIGURATOR = "ai-dynamo/aiconfigurator, H100 SXM tables for vLLM 0.24 (snapshot 095f58a51, Apache-2.0)"
LLMSERVINGSIM = "casys-kaist/LLMServingSim, profiler/perf, vLLM 0.19 (snapshot 5daddb2, MIT)"
DISTSERVE = "LLMServe/DistServe, simdistserve profile of OPT-13B on one A100-80G (snapshot 82831f1, Apache-2.0)"


@dataclass
class Rows:
    """Measured calls of one operator; columns besides `seconds` and `shape` are what its form counts."""

    table: pd.DataFrame
    form: Callable[[Gpu, pd.DataFrame], np.ndarray]
    fit: Callable[[pd.DataFrame, Gpu], dict[str, float]]


def relative_least_squares(terms: Sequence[np.ndarray], seconds: np.ndarray) -> np.ndarray:
    """Coefficients >= 0 of a sum of terms with the least squared relative error (negative ones are dropped)."""
    columns = np.stack([np.asarray(t, float) for t in terms], 1) / seconds[:, None]
    scale = np.abs(columns).max(0)
    kept = np.ones(columns.shape[1], bool)
    while True:
        found = np.zeros(columns.shape[1])
        found[kept] = (
            np.linalg.lstsq(columns[:, kept] / scale[kept], np.ones(len(seconds)), rcond=None)[0] / scale[kept]
        )
        if (found >= 0).all():
            return found
        kept &= found > 0


# --- GEMMs: max(W / BW, 2 N |g| / F) + t_k ---------------------------------------------------------------


def gemm_form(gpu: Gpu, t: pd.DataFrame) -> np.ndarray:
    return np.array([gemm_seconds(gpu, p, n) for p, n in zip(t.parameters, t.rows, strict=True)])


def gemm_fit(t: pd.DataFrame, gpu: Gpu) -> dict[str, float]:
    """Alternate: which rows are bound by what, then the constants of each group."""
    kernel, bandwidth, flops = gpu.kernel_time, gpu.weight_bandwidth, gpu.gemm_flops
    seconds, weights = t.seconds.to_numpy(), 2.0 * t.parameters.to_numpy()
    flop = weights * t.rows.to_numpy()
    for _ in range(20):
        reading = weights / bandwidth > flop / flops
        clear = np.abs(np.log(weights / bandwidth / (flop / flops))) > np.log(2)  # the knee belongs to neither
        terms = [np.where(reading, weights, 0.0), np.where(reading, 0.0, flop)]
        if t.small.any():  # small calls in the table: they fix the kernel time
            kernel = float(np.median(seconds[t.small]))
        use = clear & ~t.small.to_numpy()
        a, b = relative_least_squares([x[use] / (1 - kernel / seconds[use]) for x in terms], seconds[use])
        bandwidth, flops = 1 / a, 1 / b
    return {"kernel_time": kernel, "weight_bandwidth": bandwidth, "gemm_flops": flops}


# --- decode attention: a0 + a1 B + bytes / BW ------------------------------------------------------------


def decode_form(gpu: Gpu, t: pd.DataFrame) -> np.ndarray:
    return decode_attention_seconds(gpu, t.sequences.to_numpy(), t.bytes.to_numpy())


def decode_fit(t: pd.DataFrame, gpu: Gpu) -> dict[str, float]:
    a0, a1, per_byte = relative_least_squares([np.ones(len(t)), t.sequences, t.bytes], t.seconds.to_numpy())
    return {"attention_fixed": a0, "attention_per_sequence": a1, "kv_bandwidth": 1 / per_byte}


# --- prefill attention: a0 + a1 B + 4 Hq D rows (keys + r) / F -------------------------------------------


def prefill_form(gpu: Gpu, t: pd.DataFrame) -> np.ndarray:
    def one(r) -> float:
        shape = ModelShape("", 1, 1, int(r.heads), 1, int(r.head_dim), 1, 0)
        return float(prefill_attention_seconds(gpu, shape, r.queries, r.sequences, r.context))

    return np.array([one(r) for r in t.itertuples()])


def prefill_fit(t: pd.DataFrame, gpu: Gpu) -> dict[str, float]:
    rows = 4.0 * t.heads * t.head_dim * t.sequences * t.queries
    rest = t.seconds - gpu.attention_fixed - gpu.attention_per_sequence * t.sequences
    seconds = t.seconds.to_numpy()
    per_key, per_row = relative_least_squares(
        [rows * (t.context - t.queries / 2) * t.seconds / rest, rows * t.seconds / rest], seconds
    )
    return {"attention_flops": 1 / per_key, "attention_row_keys": round(per_row / per_key)}


# --- the tables -------------------------------------------------------------------------------------------


def h100(data: Path) -> dict[str, Rows]:
    """Calls were repeated on one buffer, so what fits in the 50 MB L2 is another regime and left out."""
    folder = data / "h100-vllm"
    g = pd.read_parquet(folder / "gemm.parquet").query("gemm_dtype == 'bfloat16' and m <= 16384")
    g = g.groupby(["m", "n", "k"], as_index=False).latency.median()
    weights = 2.0 * g.n * g.k
    small = (weights <= 0.5 * MIB) & (g.m <= 64) & (np.minimum(g.n, g.k) >= 128)
    gemm = pd.DataFrame({"parameters": 1.0 * g.n * g.k, "rows": g.m, "small": small, "seconds": g.latency / 1e3})
    gemm = gemm.assign(shape=g.n * 100_000 + g.k)[small | ((weights > 80 * MIB) & (np.minimum(g.n, g.k) >= 2048))]
    same = "kv_cache_dtype == 'bfloat16' and window_size == 0 and head_dim == 128 and num_key_value_heads >= 4"
    d = pd.read_parquet(folder / "generation_attention.parquet").query(same + " and num_heads <= 64")
    kv = 4.0 * d.num_key_value_heads * d.head_dim * (d.isl + d.step) * d.batch_size
    decode = pd.DataFrame({"sequences": d.batch_size, "bytes": kv, "seconds": d.latency / 1e3})
    decode = decode.assign(shape=d.num_heads * 100 + d.num_key_value_heads)
    decode = decode[((kv > 80 * MIB) | (kv < 2 * MIB)) & (d.batch_size <= 256)]
    p = pd.read_parquet(folder / "context_attention.parquet").query(same + " and num_heads <= 64 and isl >= 512")
    prefill = pd.DataFrame(
        {"queries": p.isl, "sequences": p.batch_size, "context": p.isl, "heads": p.num_heads, "head_dim": p.head_dim}
    ).assign(seconds=p.latency / 1e3, shape=p.num_heads * 100 + p.num_key_value_heads)
    return _rows(gemm, decode, prefill)


def rtx(data: Path, models: dict[str, ModelShape]) -> dict[str, Rows]:
    """Tables of one GPU: per model the GEMMs, decode attention, and prefill chunks of 512 tokens and more."""
    gemm, decode, prefill = [], [], []
    for stem, m in models.items():
        dense = pd.read_csv(data / f"{stem}_dense.csv").rename(columns={"tokens": "rows"})
        head = pd.read_csv(data / f"{stem}_per_sequence.csv").rename(columns={"sequences": "rows"})
        head = head[head.layer == "lm_head"]
        size = dict(zip(GEMMS, m.gemms, strict=True)) | {"lm_head": m.hidden * m.vocab}
        small = dense.layer.isin(SMALL) & (dense.rows <= 64)
        t = pd.concat([dense[dense.layer.isin(size) | small], head])
        t = t.assign(parameters=t.layer.map(size).fillna(1.0), small=~t.layer.isin(size), seconds=t.time_us / 1e6)
        gemm.append(t.assign(shape=stem + t.layer))
        a = pd.read_csv(data / f"{stem}_attention.csv")
        a = a.assign(seconds=a.time_us / 1e6, heads=m.heads, head_dim=m.head_dim)
        d = a[(a.prefill_chunk == 0) & (a.kv_prefill == 0)]
        d = d.assign(sequences=d.n_decode, bytes=m.kv_token_bytes * d.n_decode * d.kv_decode)
        decode.append(d.assign(shape=stem if len(models) > 1 else d.kv_decode))
        p = a[(a.prefill_chunk >= 512) & (a.n_decode == 0)]
        p = p.assign(queries=p.prefill_chunk, sequences=1, context=p.prefill_chunk + p.kv_prefill)
        prefill.append(p.assign(shape=stem if len(models) > 1 else p.queries))
    return _rows(*(pd.concat(part, ignore_index=True) for part in (gemm, decode, prefill)))


def _rows(gemm: pd.DataFrame, decode: pd.DataFrame, prefill: pd.DataFrame) -> dict[str, Rows]:
    return {
        "gemm": Rows(gemm.reset_index(drop=True), gemm_form, gemm_fit),
        "decode": Rows(decode.reset_index(drop=True), decode_form, decode_fit),
        "prefill": Rows(prefill.reset_index(drop=True), prefill_form, prefill_fit),
    }


def a100(data: Path) -> dict[str, float]:
    """Whole-engine coefficients (ms per prompt token; ms per context token), so upper bounds of the operator times."""
    profile = json.loads((data / "distserve_profiler-a100-80g.distserve.json").read_text())["facebook/opt-13b"]["1"]
    layers, hidden = 40, 5120
    return {
        "gemm_flops": 2.0 * 12 * hidden**2 * layers / (profile["prefill"][1] / 1e3),
        "kv_bandwidth": 2.0 * hidden * 2 * layers / (profile["decoding_smallbs"][1] / 1e3),
    }


# --- fitting ----------------------------------------------------------------------------------------------


def errors(predicted: np.ndarray, measured: np.ndarray) -> str:
    off = 100 * (predicted / measured - 1)
    size = np.abs(off)
    return f"MAPE {size.mean():4.1f} %  p90 {np.percentile(size, 90):4.1f} %  signed {off.mean():+4.1f} %"


def held_out(rows: Rows, gpu: Gpu, folds: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """(predicted, measured) of every row, each predicted from a fit without its shape."""
    t = rows.table
    shapes = sorted(t.shape_key.unique())
    fold = t.shape_key.map({s: i % min(folds, len(shapes)) for i, s in enumerate(shapes)}).to_numpy()
    predicted = np.empty(len(t))
    for f in range(min(folds, len(shapes))):
        out = fold == f
        trained = replace(gpu, **rows.fit(t[~out | t.always], gpu))
        predicted[out] = rows.form(trained, t[out])
    judged = ~t.always.to_numpy()
    return predicted[judged], t.seconds.to_numpy()[judged]


def fit(name: str, tables: dict[str, Rows]) -> dict[str, float]:
    """Constants of one GPU from all rows; prints them with the errors of rows left out."""
    gpu, found = Hardware.load(name).gpu, {}
    print(f"\n{name}")
    for operator, rows in tables.items():
        rows.table["shape_key"] = rows.table["shape"]
        rows.table["always"] = rows.table.get("small", False)
        predicted, measured = held_out(rows, gpu)
        found |= rows.fit(rows.table, gpu)
        gpu = replace(gpu, **found)
        shapes = rows.table["shape"][~rows.table.always].nunique()
        print(f"  {operator:8s} {len(measured):6d} rows, {shapes:3d} groups: left out {errors(predicted, measured)}")
    return found


def whole_layers(name: str, data: Path, stem: str, shape: ModelShape, found: dict[str, float]) -> None:
    """Print how the sum of a decode layer's measured operators compares with the machine's layer."""
    gpu = replace(Hardware.load(name).gpu, **found)
    dense = pd.read_csv(data / f"{stem}_dense.csv").pivot(index="tokens", columns="layer", values="time_us")
    calls = dict.fromkeys(GEMMS, 1) | SMALL
    a = pd.read_csv(data / f"{stem}_attention.csv").query("prefill_chunk == 0 and kv_prefill == 0")
    measured, predicted = [], []
    for r in a.itertuples():
        measured.append(sum(n * dense.loc[r.n_decode, layer] for layer, n in calls.items()) + r.time_us)
        kv = np.array([shape.kv_token_bytes * r.n_decode * r.kv_decode])
        predicted.append(1e6 * layer_seconds(gpu, shape, r.n_decode, r.n_decode, False, kv)[0])
    print(f"  whole decode layers of {shape.name}: {errors(np.array(predicted), np.array(measured))}")


UNITS = {
    "kernel_time": (1e6, "us"),
    "attention_fixed": (1e6, "us"),
    "attention_per_sequence": (1e6, "us"),
    "weight_bandwidth": (1e-12, "TB/s"),
    "kv_bandwidth": (1e-12, "TB/s"),
    "gemm_flops": (1e-12, "TFLOP/s"),
    "attention_flops": (1e-12, "TFLOP/s"),
}


def text(key: str, value: float) -> str | int:
    """The constant with three significant digits and its unit, as the hardware file holds it."""
    if key not in UNITS:
        return int(float(f"{value:.3g}"))
    factor, unit = UNITS[key]
    return f"{float(f'{value * factor:.3g}'):g}{unit}"


RTX = {
    "rtx4090-pcie4": {"rtx4090_llama31-8b_tp1": LLAMA},
    "rtxpro6000-pcie5": {"rtxpro6000_llama31-8b_tp1": LLAMA, "rtxpro6000_qwen3-32b_tp2": QWEN},
}


def fit_rtx(name: str, data: Path, models: dict[str, ModelShape]) -> dict[str, float]:
    found = fit(name, rtx(data, models))
    for stem, shape in models.items():
        whole_layers(name, data, stem, shape, found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the public tables (see README.md)")
    parser.add_argument("--write", action="store_true", help="rewrite the fitted entries of kvsim/hardware/*.toml")
    args = parser.parse_args()
    jobs: dict[str, tuple[Callable[[], dict[str, float]], str]] = {
        "h100-pcie5": (lambda: fit("h100-pcie5", h100(args.data)), AICONFIGURATOR),
        **{name: (partial(fit_rtx, name, args.data, models), LLMSERVINGSIM) for name, models in RTX.items()},
        "a100-pcie4": (lambda: a100(args.data), DISTSERVE),
    }
    for name, (job, source) in jobs.items():
        found = job()
        entries = {f"gpu.{key}": Constant(text(key, value), "fitted", source) for key, value in found.items()}
        print(f"  {name}: " + ", ".join(f"{key[4:]} = {c.value}" for key, c in entries.items()))
        if args.write:
            path = FOLDER / f"{name}.toml"
            beside = path.with_suffix(".toml.partial")
            beside.write_text(Hardware.load(name).with_constants(entries).to_toml(), encoding="utf-8")
            beside.replace(path)


if __name__ == "__main__":
    main()
