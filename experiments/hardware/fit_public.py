"""Fit the compute constants of the shipped hardware files to public operator times, and say how well they predict.

    python experiments/hardware/fit_public.py --data DIR [--report FILE.json] [--write]

Only constants and errors enter the repository. Every error is of rows whose group (a head layout, a matrix, a model, a
block of contexts and batches) was left out of the fit. Sources, snapshots, licences and rules: README.md beside this
file. The fits themselves are `kvsim.machine.fit`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kvsim.machine.compute import Matrix, ModelShape, gemm_seconds, head_seconds, layer_seconds
from kvsim.machine.fit import DECODE, GEMM, LINEAR, PREFILL, Fitted, Form, fit_small
from kvsim.machine.hardware import FOLDER, Constant, Gpu, Hardware
from kvsim.machine.interpolate import Table

MIB = 2.0**20
GEMMS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
SMALL = {"layernorm": 2, "rotary_emb": 1, "act_fn": 1}  # calls per layer
LLAMA = ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256)
QWEN = ModelShape("qwen3-32b, one of two GPUs", 64, 5120, 32, 4, 128, 12800, 75968)
AICONFIGURATOR = {
    "project": "ai-dynamo/aiconfigurator", "snapshot": "095f58a51", "licence": "Apache-2.0",
    "measured": "H100 80GB HBM3, vLLM 0.24.0, tables of h100_sxm",
}  # fmt: skip
LLMSERVINGSIM = {
    "project": "casys-kaist/LLMServingSim", "snapshot": "5daddb2", "licence": "MIT",
    "measured": "profiler/perf, vLLM 0.19, medians of 3",
}  # fmt: skip
DISTSERVE = "LLMServe/DistServe, simdistserve profile of OPT-13B on one A100-80G (snapshot 82831f1, Apache-2.0)"
NOISE = (
    "The tables hold one number per point (of LLMServingSim the median of 3 calls); the spread of repeated calls is not"
    " in them, so no error can be compared with it. What like calls differ by is given where the tables show it."
)
COMMAND = "python experiments/hardware/fit_public.py --data DIR --report experiments/hardware/public_errors.json"
FOLDS = 5


@dataclass(frozen=True)
class Device:
    """Datasheet figures of a GPU: bytes and FLOP per second (dense BF16 with FP32 sums), bytes of the L2."""

    bandwidth: float
    flops: float
    l2: float
    tile_rows: int  # of its prefill kernel: FlashAttention-3 has 128 query rows to a tile, FlashAttention-2 here 64


DEVICES = {
    "h100-pcie5": Device(3.35e12, 989e12, 50e6, 128),
    "rtx4090-pcie4": Device(1.008e12, 165.2e12, 72e6, 64),
    "rtxpro6000-pcie5": Device(1.792e12, 503.8e12, 128e6, 64),
}


@dataclass
class Operator:
    """Measured calls of one operator.

    `table` has a column for everything its form counts, `seconds`, `group` (what is left out together), `regime`
    ("" for rows that are judged) and `line`, `x`, `geometry` (where a row lies in a table of interpolated times).
    Rows of the regimes in `with_fit` take part in fits, but are not judged with the others.
    """

    table: pd.DataFrame
    form: Form
    rule: str
    left_out: str
    target: float
    excluded: dict[str, str] = field(default_factory=dict)  # regime: why
    with_fit: tuple[str, ...] = ()
    table_rule: str = ""
    log: bool = False  # is the table interpolated in logarithms?
    parts: dict[str, Callable[[pd.DataFrame], pd.Series]] = field(default_factory=dict)
    blame: str = ""


# --- the public tables ----------------------------------------------------------------------------------------


def h100(data: Path) -> dict[str, Operator]:
    folder, l2 = data / "h100-vllm", DEVICES["h100-pcie5"].l2
    return {
        "gemm": _h100_gemm(folder / "gemm.parquet", l2),
        "decode": _h100_decode(folder / "generation_attention.parquet", l2),
        "prefill": _h100_prefill(folder / "context_attention.parquet"),
    }


def _h100_gemm(path: Path, l2: float) -> Operator:
    g = pd.read_parquet(path).query("gemm_dtype == 'bfloat16'")
    g = g.groupby(["m", "n", "k"], as_index=False).latency.median()
    t = pd.DataFrame({"rows": g.m, "out": g.n, "inp": g.k, "value_bytes": 2.0, "seconds": g.latency / 1e3})
    weights, side = 2.0 * g.n * g.k, np.minimum(g.n, g.k)
    small = (weights <= 0.5 * MIB) & (g.m <= 64) & (side >= 128)
    regime = np.select([small, weights <= l2, side < 1024], ["small", "L2", "thin"], "")
    t = t.assign(regime=regime, group=g.n * 100_000 + g.k, geometry=g.n * 100_000 + g.k, line=0, x=g.m)
    return Operator(
        t,
        GEMM,
        "bfloat16; weights larger than the 50 MB L2, because calls were repeated on one buffer and a layer's weights"
        " come from memory in a step; both sides at least 1,024, as in models; all row counts (1 to 32,768)",
        "matrices, in five folds",
        0.05,
        {
            "small": "weights up to 0.5 MiB, sides from 128, rows up to 64: they give the fixed time and nothing else",
            "L2": "weights up to 50 MB were read from the L2",
            "thin": "a side below 1,024",
        },
        table_rule="every other row count of each matrix",
        parts={"rows": lambda t: _bins(t.rows, (16, 64, 256, 1025, 4353, 32768))},
        blame="like calls take one of two times 15 % apart (see neighbours); nothing that is counted tells which",
    )


def _h100_decode(path: Path, l2: float) -> Operator:
    d = pd.read_parquet(path)
    t = pd.DataFrame(
        {"sequences": d.batch_size, "context": d.isl + d.step, "heads": d.num_heads, "kv_heads": d.num_key_value_heads}
    ).assign(head_dim=d.head_dim, value_bytes=2.0, seconds=d.latency / 1e3)
    kv = 4.0 * t.kv_heads * t.head_dim * t.context * t.sequences
    other = [d.kv_cache_dtype != "bfloat16", d.window_size != 0, d.kernel_source != "vllm_flash_attn_fa3"]
    names = ["fp8", "window", "other kernel", "small", "L2"]
    t = t.assign(regime=np.select([*other, kv <= 2 * MIB, kv <= l2], names, ""))
    t = t.assign(group=_layout(t), geometry=_layout(t), line=t.sequences, x=t.context)
    return Operator(
        t[~t.regime.isin(["fp8", "window"])],
        DECODE,
        "bfloat16 keys and values, no window, FlashAttention-3 (head sizes 64 to 256); keys and values larger than the"
        " 50 MB L2, because calls were repeated on one buffer and a layer's come from memory in a step; every batch"
        " and every head layout",
        "head layouts, in five folds",
        0.05,
        {
            "small": "keys and values up to 2 MiB: the time of the kernel itself, wherever they come from",
            "L2": "2 MiB to 50 MB were read from the L2",
            "other kernel": "head size 512 runs FlashAttention-4",
        },
        ("small",),
        "every other context of each layout and batch",
        parts={
            "head size": lambda t: t.head_dim.astype(str),
            "sequences": lambda t: _bins(t.sequences, (1, 4, 32, 256, 2048)),
        },
        blame="one sequence with one KV head cannot use the whole memory; like calls take one of two times 13 % apart",
    )


def _h100_prefill(path: Path) -> Operator:
    p = pd.read_parquet(path).query("kv_cache_dtype == 'bfloat16' and window_size == 0")
    t = pd.DataFrame(
        {"sequences": p.batch_size, "queries": p.isl, "context": p.isl, "heads": p.num_heads, "head_dim": p.head_dim}
    ).assign(kv_heads=p.num_key_value_heads, seconds=p.latency / 1e3)
    other = p.kernel_source != "vllm_flash_attn_fa3"
    t = t.assign(regime=np.select([other, t.queries < 512], ["other kernel", "short"], ""))
    t = t.assign(group=_layout(t), geometry=_layout(t), line=t.sequences, x=t.queries)
    return Operator(
        t,
        PREFILL,
        "bfloat16 keys and values, no window, FlashAttention-3 (head sizes 64 to 256); prompts of 512 tokens and more;"
        " every batch and every head layout",
        "head layouts, in five folds",
        0.05,
        {"short": "prompts below 512 tokens", "other kernel": "head size 512 runs FlashAttention-4"},
        table_rule="every other prompt length of each layout and batch",
        log=True,
        parts={
            "head size": lambda t: t.head_dim.astype(str),
            "prompt": lambda t: _bins(t.queries, (512, 1024, 2048, 4096, 16384)),
            "head layout": lambda t: pd.Series(
                np.select([t.heads < 8, t.heads == t.kv_heads], ["below 8 heads", "a KV head each"], "shared KV heads"),
                index=t.index,
            ),
        },
        blame="below 8 heads on a GPU the kernel splits keys in its own way; how it packs the query heads of a KV head"
        " into tiles changes the rate by 5 to 8 % between layouts",
    )


def _layout(t: pd.DataFrame) -> pd.Series:
    return t.head_dim * 10_000_000 + t.heads * 1000 + t.kv_heads


def _bins(values: pd.Series, edges: tuple[int, ...]) -> pd.Series:
    """The class of each value, by upper edges, as text."""
    low = (0, *edges[:-1])
    names = [f"{a + 1}-{b}" if a + 1 < b else f"{b}" for a, b in zip(low, edges, strict=True)]
    return pd.cut(values, [0, *edges], labels=names).astype(str)


def rtx(data: Path, models: dict[str, ModelShape]) -> dict[str, Operator]:
    """Tables of one GPU: per model the GEMMs, decode attention, and prefill chunks of one sequence."""
    parts = [_rtx_model(data, stem, model) for stem, model in models.items()]
    gemm, decode, prefill = (pd.concat(some, ignore_index=True) for some in zip(*parts, strict=True))
    alone = len(models) == 1
    if alone:  # one layout: leave out blocks of neighbouring contexts and batches, and whole chunk sizes
        block = np.log2(decode.context / 16) // 3 * 10 + np.log2(decode.sequences) // 3
        decode, prefill = decode.assign(group=block), prefill.assign(group=prefill.queries)
    every = "all rows: reading below the L2's size shows no jump in these tables"
    return {
        "gemm": Operator(
            gemm,
            GEMM,
            "the four GEMMs of a layer and the vocabulary's, bfloat16, all token counts (1 to 2,048)",
            "matrices, one at a time",
            0.05,
            {"small": "norms, rotation and activation of up to 64 tokens: they give the fixed time and nothing else"},
            table_rule="every other token count of each matrix",
            parts={"rows": lambda t: _bins(t.rows, (16, 64, 256, 1024, 2048))},
        ),
        "decode": Operator(
            decode,
            DECODE,
            f"decode only, bfloat16, {every}",
            "blocks of neighbouring contexts and batches, one at a time" if alone else "models (head layouts)",
            0.08 if alone else 0.05,
            table_rule="every other context of each model and batch",
            parts={"sequences": lambda t: _bins(t.sequences, (1, 4, 32, 256))},
            blame="a single sequence runs another path; on the RTX 4090 its keys are read faster than memory can",
        ),
        "prefill": Operator(
            prefill,
            PREFILL,
            "one sequence, bfloat16, every chunk from 16 tokens and every cached prefix",
            "chunk sizes, one at a time" if alone else "models (head layouts)",
            0.05,
            table_rule="every other cached prefix of each model and chunk",
            parts={"chunk": lambda t: _bins(t.queries, (64, 256, 1024, 2048))},
        ),
    }  # fmt: skip


def _rtx_model(data: Path, stem: str, m: ModelShape) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    sizes = {**dict(zip(GEMMS, m.gemms, strict=True)), "lm_head": Matrix(m.vocab, m.hidden)}
    dense = pd.read_csv(data / f"{stem}_dense.csv").rename(columns={"tokens": "rows"})
    head = pd.read_csv(data / f"{stem}_per_sequence.csv").rename(columns={"sequences": "rows"})
    small = dense.layer.isin(SMALL) & (dense.rows <= 64)
    t = pd.concat([dense[dense.layer.isin(sizes) | small], head[head.layer == "lm_head"]], ignore_index=True)
    sides = [sizes.get(layer, Matrix(1, 1)) for layer in t.layer]
    t = t.assign(out=[s.out for s in sides], inp=[s.inp for s in sides], value_bytes=2.0, seconds=t.time_us / 1e6)
    t = t.assign(regime=np.where(t.layer.isin(sizes), "", "small"), group=stem + t.layer, geometry=stem + t.layer)
    gemm = t.assign(line=0, x=t.rows)
    a = pd.read_csv(data / f"{stem}_attention.csv")
    a = a.assign(seconds=a.time_us / 1e6, heads=m.heads, kv_heads=m.kv_heads, head_dim=m.head_dim, value_bytes=2.0)
    a = a.assign(regime="", group=stem, geometry=stem)
    d = a[(a.prefill_chunk == 0) & (a.kv_prefill == 0)]
    d = d.assign(sequences=d.n_decode, context=d.kv_decode, line=d.n_decode, x=d.kv_decode)
    p = a[(a.prefill_chunk > 0) & (a.n_decode == 0)]
    p = p.assign(queries=p.prefill_chunk, sequences=1, context=p.prefill_chunk + p.kv_prefill)
    return gemm, d, p.assign(line=p.queries, x=p.kv_prefill)


def a100(data: Path) -> dict[str, float]:
    """Whole-engine coefficients (ms per prompt token; ms per context token), so upper bounds of the operator times."""
    profile = json.loads((data / "distserve_profiler-a100-80g.distserve.json").read_text())["facebook/opt-13b"]["1"]
    layers, hidden = 40, 5120
    return {
        "gemm_flops": 2.0 * 12 * hidden**2 * layers / (profile["prefill"][1] / 1e3),
        "kv_bandwidth": 2.0 * hidden * 2 * layers / (profile["decoding_smallbs"][1] / 1e3),
    }


# --- errors of rows left out ------------------------------------------------------------------------------------


def errors(predicted: np.ndarray, t: pd.DataFrame) -> dict[str, Any]:
    """Relative errors as shares of the measured times."""
    off = np.asarray(predicted) / t.seconds.to_numpy() - 1.0
    size = np.abs(off)
    found = {"mape": size.mean(), "p90": np.percentile(size, 90), "worst": size.max(), "signed": off.mean()}
    return {**{k: round(float(v), 4) for k, v in found.items()}, "rows": len(t), "groups": int(t.group.nunique())}


def folds(t: pd.DataFrame, most: int) -> np.ndarray:
    """The fold of each row: groups dealt out in order."""
    groups = sorted(t.group.unique())
    return t.group.map({g: i % min(most, len(groups)) for i, g in enumerate(groups)}).to_numpy()


def held_out(op: Operator, gpu: Gpu, t: pd.DataFrame) -> np.ndarray:
    """Seconds of every row of `t`, each predicted by a fit to the kept rows without its group."""
    fold = folds(t, FOLDS if op.left_out.endswith("five folds") else len(t))
    taught, predicted = t.regime.isin(["", *op.with_fit]).to_numpy(), np.empty(len(t))
    for f in range(fold.max() + 1):
        trained = replace(gpu, **op.form.fit(gpu, columns(t[taught & (fold != f)])).values)
        predicted[fold == f] = op.form.predict(trained, columns(t[fold == f]))
    return predicted


def columns(t: pd.DataFrame) -> dict[str, np.ndarray]:
    counted = t.drop(columns=["group", "geometry", "regime", "layer"], errors="ignore")
    return {name: counted[name].to_numpy(float) for name in counted}


def interpolated(op: Operator, t: pd.DataFrame) -> dict[str, Any]:
    """Errors of a table that holds every other place of each line; `refused`: rows outside of what it then covers."""
    place = t.groupby("geometry").x.rank(method="dense").astype(int)
    kept = (place % 2 == 1).to_numpy()
    some = t[kept & ((t.x > 0) | (not op.log))]
    table = Table(some.geometry, some.line, some.x, some.seconds, log=op.log)
    rest = t[~kept]
    known = np.array(
        [g in table.lines and line in table.lines[g] for g, line in zip(rest.geometry, rest.line, strict=True)]
    )
    inside = known & np.array([table.covers(*at) for at in zip(rest.geometry, rest.line, rest.x, strict=True)])
    judged = rest[inside]
    found = [table.seconds(*at) for at in zip(judged.geometry, judged.line, judged.x, strict=True)]
    return {**errors(np.array(found), judged), "refused": int((~inside).sum()), "left_out": op.table_rule}


def roofline(name: str, operator: str, t: pd.DataFrame) -> np.ndarray:
    """Bytes over the datasheet's bandwidth, or FLOP over its rate: the longer."""
    d = DEVICES[name]
    if operator == "gemm":
        return np.maximum(2.0 * t.out * t.inp / d.bandwidth, 2.0 * t.out * t.inp * t.rows / d.flops).to_numpy()
    if operator == "decode":
        return (4.0 * t.kv_heads * t.head_dim * t.context * t.sequences / d.bandwidth).to_numpy()
    pairs = t.sequences * t.queries * (t.context - t.queries / 2.0)
    return (4.0 * t.heads * t.head_dim * pairs / d.flops).to_numpy()


def judge(name: str, operator: str, op: Operator, gpu: Gpu, draws: int) -> tuple[dict[str, Any], Fitted]:
    """All errors of one operator, and the constants from all of its kept rows."""
    t = op.table[op.table.regime != "small"] if operator == "gemm" else op.table
    t = t.reset_index(drop=True)
    predicted, kept = held_out(op, gpu, t), (t.regime == "").to_numpy()
    taught = t[t.regime.isin(["", *op.with_fit])]
    fitted = op.form.fit(gpu, columns(taught), taught.group.to_numpy(), draws)
    found: dict[str, Any] = {
        "physical": errors(predicted[kept], t[kept]) | {"target": op.target, "left_out": op.left_out},
        "table": interpolated(op, t[kept]) | {"target": 0.04 if operator == "decode" else op.target},
        "roofline": errors(roofline(name, operator, t[kept]), t[kept]),
    }
    for part, classes in op.parts.items():
        of = classes(t[kept])
        for which in sorted(set(of), key=lambda name: (len(name.split("-")[0]), name)):
            found[f"physical, {part} {which}"] = errors(predicted[kept][of == which], t[kept][of == which])
    for regime in op.excluded:
        if (rows := (t.regime == regime).to_numpy()).any():
            found[f"physical, excluded: {regime}"] = errors(predicted[rows], t[rows])
    reasons = {regime: f"{why} ({int((op.table.regime == regime).sum())} rows)" for regime, why in op.excluded.items()}
    missed = any(found[form]["mape"] > found[form]["target"] for form in ("physical", "table"))
    return found | {"rule": op.rule, "excluded": reasons, **({"blame": op.blame} if missed else {})}, fitted


def neighbours(t: pd.DataFrame) -> float:
    """Mean difference, as a share, of GEMMs whose row counts differ by one, up to 16: the same tiles."""
    few = t[(t.regime == "") & (t.rows <= 16)].pivot_table(index="group", columns="rows", values="seconds")
    return round(float(np.abs(np.log(few).diff(axis=1)).stack().mean()), 4)


def alike(t: pd.DataFrame) -> float:
    """Mean difference, as a share, of decode calls with the same keys but other query heads, from their median."""
    t = t[t.regime == ""]
    of = t.groupby(["head_dim", "kv_heads", "sequences", "context"]).seconds
    off = np.abs(t.seconds / of.transform("median") - 1.0)[of.transform("size") > 2]
    return round(float(off.mean()), 4)


# --- fitting ----------------------------------------------------------------------------------------------------


@dataclass
class Machine:
    """What was found about one GPU: the fitted machine, its constants with bands, its errors."""

    name: str
    gpu: Gpu
    fitted: dict[str, Fitted]
    report: dict[str, Any]

    @property
    def constants(self) -> dict[str, float]:
        return {key: value for f in self.fitted.values() for key, value in f.values.items()}


def blank(name: str) -> Gpu:
    """The machine before any fit: no losses, so that nothing fitted before is in it."""
    return replace(Hardware.load(name).gpu, **LINEAR | {"prefill_tile_rows": DEVICES[name].tile_rows})


def small_rows(op: Operator) -> np.ndarray:
    return op.table[op.table.regime == "small"].seconds.to_numpy()


def fit(name: str, operators: dict[str, Operator], source: dict[str, str], draws: int) -> Machine:
    """Constants of one GPU from all kept rows, and the errors of rows left out."""
    small = fit_small(blank(name), small_rows(operators["gemm"]), draws)
    gpu, fitted, report = replace(blank(name), **small.values), {"small": small}, {}
    for operator, op in operators.items():
        report[operator], fitted[operator] = judge(name, operator, op, gpu, draws)
        gpu = replace(gpu, **fitted[operator].values)
        print_operator(operator, report[operator])
    report["source"] = {**source, "noise": NOISE, "command": COMMAND}
    return Machine(name, gpu, fitted, report)


def print_operator(operator: str, found: dict[str, Any]) -> None:
    print(f"  {operator}: {found['rule']}")
    for form, e in found.items():
        if isinstance(e, dict) and "mape" in e:
            goal = f"  target {100 * e['target']:.0f} %" if "target" in e else ""
            print(
                f"    {form:44s} {e['rows']:6d} rows {e['groups']:4d} groups  MAPE {100 * e['mape']:5.1f} %  p90"
                f" {100 * e['p90']:5.1f} %  worst {100 * e['worst']:5.0f} %  signed {100 * e['signed']:+5.1f} %{goal}"
            )


# --- a whole serving iteration ------------------------------------------------------------------------------------

SERVED = "sum of the measured calls of an iteration against the machine's, fitted without them"


def composed_rtx(
    name: str, data: Path, models: dict[str, ModelShape], operators: dict[str, Operator]
) -> dict[str, Any]:
    """Decode iterations and prefill chunks of each model, all layers and the head, from fits without its rows.

    Where there are several models the whole model is left out; where there is one, a block of batches or a chunk size.
    """
    found: dict[str, Any] = {}
    for stem, model in models.items():
        measured = _Measured(data, stem, model)
        others = len(models) > 1
        for kind, rows in (("decode", measured.decode()), ("prefill", measured.prefill())):
            rows["block"] = 0 if others else np.log2(rows.queries * rows.sequences) // 2
            predicted = np.empty(len(rows))
            for block in rows.block.unique():
                here = (rows.block == block).to_numpy()
                tokens = rows[here].queries * rows[here].sequences
                gpu = _without(name, operators, stem, None if others else (tokens.min(), tokens.max()))
                predicted[here] = [_iteration(gpu, model, r, kind == "prefill") for r in rows[here].itertuples()]
            left_out = "the other model was fitted" if others else "blocks of token counts, within a factor of four"
            entry = errors(predicted, rows.assign(group=rows.sequences * rows.queries))
            found[f"{kind} iteration, {model.name}"] = entry | {"left_out": left_out}
    return found | {"what": f"{SERVED}: every layer's GEMMs, attention, norms, rotation and activation, and the head"}


class _Measured:
    """Sums of the measured calls of one model's iterations, in seconds."""

    def __init__(self, data: Path, stem: str, model: ModelShape):
        dense = pd.read_csv(data / f"{stem}_dense.csv").pivot(index="tokens", columns="layer", values="time_us")
        calls = dict.fromkeys(GEMMS, 1) | SMALL
        self.layer = sum(n * dense[layer] for layer, n in calls.items()) / 1e6
        head = pd.read_csv(data / f"{stem}_per_sequence.csv").query("layer == 'lm_head'").set_index("sequences")
        self.head, self.model = head.time_us / 1e6, model
        self.attention = pd.read_csv(data / f"{stem}_attention.csv")

    def _rows(self, a: pd.DataFrame) -> pd.DataFrame:
        tokens = a.queries * a.sequences
        a = a[tokens.isin(self.layer.index)].reset_index(drop=True)
        layer = self.layer.loc[a.queries * a.sequences].to_numpy() + a.time_us / 1e6
        return a.assign(seconds=self.model.layers * layer + self.head.loc[a.sequences].to_numpy())

    def decode(self) -> pd.DataFrame:
        a = self.attention.query("prefill_chunk == 0 and kv_prefill == 0")
        return self._rows(a.assign(queries=1, sequences=a.n_decode, context=a.kv_decode))

    def prefill(self) -> pd.DataFrame:
        a = self.attention.query("prefill_chunk > 0 and n_decode == 0")
        return self._rows(a.assign(queries=a.prefill_chunk, sequences=1, context=a.prefill_chunk + a.kv_prefill))


def _without(name: str, operators: dict[str, Operator], stem: str, tokens: tuple[int, int] | None) -> Gpu:
    """The machine fitted without a model's rows, or without those of a range of token counts."""
    gpu = blank(name)
    for operator, op in operators.items():
        t = op.table
        if tokens is None:
            t = t[~t.geometry.str.startswith(stem)]
        else:
            count = {"gemm": "rows", "decode": "sequences", "prefill": "queries"}[operator]
            t = t[~t[count].between(*tokens)]
        if operator == "gemm":
            gpu = replace(gpu, **fit_small(gpu, t[t.regime == "small"].seconds.to_numpy()).values)
        gpu = replace(gpu, **op.form.fit(gpu, columns(t[t.regime == ""])).values)
    return gpu


def _iteration(gpu: Gpu, model: ModelShape, r: Any, prefill: bool) -> float:
    kv = np.full(model.layers, model.kv_token_bytes * r.sequences * r.context)
    layers = layer_seconds(gpu, model, int(r.queries * r.sequences), int(r.sequences), prefill, kv).sum()
    return float(layers) + head_seconds(gpu, model, int(r.sequences)) - gpu.step_sync  # no host in the tables


WIDE = ModelShape("8,192 wide (64/8 heads of 128, MLP 8,192)", 1, 8192, 64, 8, 128, 8192, 0)


def composed_h100(name: str, operators: dict[str, Operator]) -> dict[str, Any]:
    """Layers of a shape whose four GEMMs the tables hold, all larger than the L2; its matrices and layout left out."""
    shape, gpu, found = WIDE, blank(name), {}
    gpu = replace(gpu, **fit_small(gpu, small_rows(operators["gemm"])).values)
    own = {"gemm": [g.out * 100_000 + g.inp for g in shape.gemms]}
    own["decode"] = own["prefill"] = [shape.head_dim * 10_000_000 + shape.heads * 1000 + shape.kv_heads]
    for operator, op in operators.items():
        t = op.table[op.table.regime.isin(["", *op.with_fit]) & ~op.table.group.isin(own[operator])]
        t = t[t.regime != "small"] if operator == "gemm" else t
        gpu = replace(gpu, **op.form.fit(gpu, columns(t)).values)
    gemms = operators["gemm"].table.set_index(["group", "rows"]).seconds
    times = {g: gemms.loc[g] for g in own["gemm"]}
    for kind in ("decode", "prefill"):
        a = operators[kind].table.query("regime == '' and group == @own['decode'][0]")
        tokens = a.sequences * (a.queries if kind == "prefill" else 1)
        a, tokens = a[tokens.isin(times[own["gemm"][0]].index)], tokens[tokens.isin(times[own["gemm"][0]].index)]
        a = a.assign(seconds=a.seconds + sum(times[g].loc[tokens].to_numpy() for g in own["gemm"]), group=tokens)
        linear = np.array([sum(gemm_seconds(gpu, g, n) for g in shape.gemms) for n in tokens.tolist()])
        form = operators[kind].form
        e = errors(linear + form.predict(gpu, columns(a)), a)
        found[f"{kind} layer, {shape.name}"] = e | {"left_out": "its matrices and its head layout"}
    return found | {"what": f"{SERVED}: the four GEMMs and attention of a layer (the tables have no norms)"}


# --- the hardware files -------------------------------------------------------------------------------------------

UNITS = {
    "bandwidth": (1e-12, "TB/s"), "seconds": (1e6, "us"), "flops": (1e-12, "TFLOP/s"), "count": (1.0, ""),
    "excess": (1.0, ""),
}  # fmt: skip
KIND = {f.name: f.metadata["kind"] for f in Gpu.__dataclass_fields__.values()}


def text(key: str, value: float) -> str | float:
    """The constant with three significant digits and its unit, as the hardware file holds it."""
    factor, unit = UNITS[KIND[key]]
    short = float(f"{value * factor:.3g}")
    if KIND[key] == "count":
        return round(short)
    return f"{short:g}{unit}" if unit else short


METHODS = {
    "small": "median of calls that do next to nothing",
    "gemm": "smooth maximum of reading and computing in tiles, robust relative least squares",
    "decode": "fixed, rounds of blocks, bytes over bandwidth, robust relative least squares",
    "prefill": "tiles of query rows in rounds, robust relative least squares",
}


def entries(machine: Machine, source: str) -> dict[str, Constant]:
    """The fitted constants, with bands, for the machine's file."""
    found = {}
    for operator, f in machine.fitted.items():
        for key, value in f.values.items():
            low, high = f.bands.get(key, (None, None))
            band = {} if low is None else {"low": text(key, low), "high": text(key, high)}
            more = {"method": METHODS[operator], "residual": round(f.error, 3)}
            found[f"gpu.{key}"] = Constant(text(key, value), "fitted", source, **band, **more)
    tile = DEVICES[machine.name].tile_rows
    kernel = "FlashAttention-3" if tile == 128 else "FlashAttention-2"
    how = f"{kernel}: query rows of a tile, seen in the steps of the public prefill times"
    return found | {"gpu.prefill_tile_rows": Constant(tile, "assumed", how)}


# GPUs that no table here measured take these of the H100's constants: the H200 is the same chip with other memory, for
# the A100 it is the nearest that there is.
SAME_CHIP, FASTER = "as fitted on the H100, the same chip", 4.8 / 3.35  # memory bandwidths of the two datasheets
NEAREST = ("kernel_time", "attention_fixed", "attention_per_sequence", "attention_row_keys", "prefill_fixed")


def h200(h100: Machine) -> dict[str, Constant]:
    """The H100's compute, and its bandwidths raised as the memory's."""
    found = {f"gpu.{k}": Constant(text(k, v), "assumed", SAME_CHIP) for k, v in h100.constants.items()}
    for key in ("weight_bandwidth", "kv_bandwidth"):
        value = h100.constants[key]
        source = f"the H100's fitted {text(key, value)} x 4.8 / 3.35, memory bandwidths of the datasheets"
        found[f"gpu.{key}"] = Constant(text(key, value * FASTER), "assumed", source)
    return found | {"gpu.prefill_tile_rows": Constant(DEVICES[h100.name].tile_rows, "assumed", SAME_CHIP)}


def write(name: str, found: dict[str, Constant]) -> None:
    path = FOLDER / f"{name}.toml"
    beside = path.with_suffix(".toml.partial")
    beside.write_text(Hardware.load(name).with_constants(found).to_toml(), encoding="utf-8")
    beside.replace(path)


def _numbers(machine: Machine) -> dict[str, dict[str, Any]]:
    """Constants and their bands, in bytes, seconds and FLOP, for the report."""
    found = {}
    for key, value in machine.constants.items():
        bands = [f.bands[key] for f in machine.fitted.values() if key in f.bands]
        low, high = bands[0] if bands else (None, None)
        found[key] = {"value": _short(value), **({"low": _short(low), "high": _short(high)} if bands else {})}
    return found


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


RTX = {
    "rtx4090-pcie4": {"rtx4090_llama31-8b_tp1": LLAMA},
    "rtxpro6000-pcie5": {"rtxpro6000_llama31-8b_tp1": LLAMA, "rtxpro6000_qwen3-32b_tp2": QWEN},
}


def study(name: str, data: Path, draws: int) -> Machine:
    """One GPU from tables to errors."""
    print(f"\n{name}")
    if name not in RTX:
        operators = h100(data)
        machine = fit(name, operators, AICONFIGURATOR, draws)
        one_row, heads = neighbours(operators["gemm"].table), alike(operators["decode"].table)
        machine.report["source"] |= {
            "neighbours": f"GEMMs of 1 to 16 rows that differ by one row (the same tiles): {one_row:.1%} on average",
            "alike": f"decode calls with the same keys, other query heads: {heads:.1%} from their median on average",
        }
        composed = composed_h100(name, operators)
    else:
        operators = rtx(data, RTX[name])
        machine = fit(name, operators, LLMSERVINGSIM, draws)
        composed = composed_rtx(name, data, RTX[name], operators)
    machine.report["composed"] = composed
    machine.report["constants"] = _numbers(machine)
    print_operator("composed", {"rule": composed["what"], **composed})
    return machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the public tables (see README.md)")
    parser.add_argument("--report", type=Path, help="write every error here, as JSON")
    parser.add_argument("--write", action="store_true", help="rewrite the fitted entries of kvsim/hardware/*.toml")
    parser.add_argument("--draws", type=int, default=200, help="bootstrap draws of the bands")
    args = parser.parse_args()
    report: dict[str, dict[str, Any]] = {}
    fitted: dict[str, Machine] = {}
    for name in DEVICES:
        source = LLMSERVINGSIM if name in RTX else AICONFIGURATOR
        fitted[name] = machine = study(name, args.data, args.draws)
        report[name] = machine.report
        found = entries(machine, "{project}, {measured} (snapshot {snapshot}, {licence})".format(**source))
        print("  " + ", ".join(f"{key[4:]} = {c.value}" for key, c in found.items()))
        if args.write:
            write(name, found)
    nearest = fitted["h100-pcie5"]
    served = {f"gpu.{k}": Constant(text(k, v), "fitted", DISTSERVE) for k, v in a100(args.data).items()}
    lent = {f"gpu.{k}": Constant(text(k, nearest.constants[k]), "assumed", "as fitted on the H100") for k in NEAREST}
    for name, found in {"a100-pcie4": served | lent, "h200-pcie5": h200(nearest)}.items():
        print(f"\n{name}\n  " + ", ".join(f"{key[4:]} = {c.value}" for key, c in found.items()))
        if args.write:
            write(name, found)
    if args.report:
        beside = args.report.with_suffix(args.report.suffix + ".partial")
        beside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        beside.replace(args.report)


if __name__ == "__main__":
    main()
