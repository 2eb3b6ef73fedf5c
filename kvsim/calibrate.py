"""A hardware file for the machine at hand: measure it, fit every constant to the rows, say how sure each one is.

Measuring is `kvsim.measure.probes`; the fits are those of `kvsim.machine`. What could not be measured is taken from a
named base file, with that file's evidence. Needs only NumPy and, to measure, torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import kvsim
from kvsim.errors import ConfigError
from kvsim.machine.fit import LINEAR
from kvsim.machine.fit_rows import DRAWS, Part, kv_bytes, parts, pick
from kvsim.machine.fit_steps import step_parts
from kvsim.machine.hardware import KINDS, Constant, Fit, Hardware
from kvsim.measure.rows import DRIFT, Row, RowLog, device_of, drifts, read_rows
from kvsim.results import file_beside

BASE = "h100-pcie5"
QUICK_DRAWS = 20
SMALL_KERNELS = 11  # of a layer of `kvsim.measure.bare.Bare`, beside matrix products and attention


class Split(Protocol):
    """Which rows may be fitted: `kvsim.validate.split.Split`, of which this is what a fit needs to know."""

    @property
    def fit(self) -> Sequence[str]: ...

    @property
    def fingerprint(self) -> str: ...

    def holds_for(self, device: str) -> bool: ...

    def is_fit(self, key: str) -> bool: ...


# --- the two ways in ---------------------------------------------------------------------------------------


def calibrate(
    device: str | None,
    out: str | Path,
    ssd: str | Path | None = None,
    rows: Iterable[str | Path] | None = None,
    base: str | Path = BASE,
    split: Split | None = None,
    quick: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Write a hardware file for this machine's "cpu" or "cuda" device (None: CUDA where there is one).

    `rows`: files of rows to fit, nothing is measured then; else they are kept beside `out`, and a run that was cut
    short is gone on with. `ssd`: a folder on the device to measure. `quick` proves that everything runs, in seconds.
    Raises ConfigError for rows of another device, a missing device, an SSD without room, or too few rows.
    """
    out, known = Path(out), Hardware.load(base)
    if out.suffix != ".toml":
        raise ConfigError(f'"{out}" is no name of a hardware file', hint="write -o NAME.toml")
    files = [Path(p) for p in rows] if rows is not None else [measure(device, rows_beside(out), ssd, quick, progress)]
    found = fit(read_rows(files), known, split, files, out.stem, QUICK_DRAWS if quick else DRAWS)
    with file_beside(out) as partial:
        partial.write_text(found.to_toml(), encoding="utf-8")
    return out


def measure(
    device: str | None,
    path: str | Path,
    ssd: str | Path | None = None,
    quick: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Append the rows of a calibration to `path`, those that are not there yet. Raises ConfigError as `calibrate`."""
    from kvsim.measure.probes import Bench, Grid, add_info, calibrate_rows, check_disk
    from kvsim.measure.streams import open_device

    path = Path(path)
    with open_device(device) as opened:
        grid = Grid.of(opened.kind, quick)
        bench = Bench(opened, grid.seconds, grid.rotate)
        if ssd is not None:
            check_disk(Path(ssd), grid.file)
        with RowLog(path) as log:
            if log.rows and device_of(log.rows) != bench.slug:
                what = f"the rows there are of {device_of(log.rows)}, this is {bench.slug}"
                raise ConfigError(what, where=str(path), hint="choose another name with -o")
            add_info(log, bench, ssd)
            calibrate_rows(log, bench, grid, ssd, progress)
    return path


def rows_beside(out: Path) -> Path:
    """Where the rows of a hardware file are kept."""
    return out.with_suffix(".rows.jsonl")


def fit(
    rows: Sequence[Row],
    base: Hardware,
    split: Split | None = None,
    files: Sequence[str | Path] = (),
    name: str = "calibrated",
    draws: int = DRAWS,
) -> Hardware:
    """Hardware whose constants fit the rows; the rest is that of `base`, with its evidence.

    Without a split only calibration rows are fitted, so executor rows may still judge the result. `files` the rows came
    from are recorded; `draws`: fits behind each band. Raises ConfigError for rows of several devices, and when there is
    nothing to fit.
    """
    device = device_of(rows)
    used = chosen(rows, split)
    if not used:
        raise ConfigError("none of the rows may be fitted", hint="rows of phase calibrate are, or those a split names")
    info: dict[str, Any] = next((r["params"] for r in reversed(rows) if r["kind"] == "info"), {})
    cpu = device.startswith("cpu-")
    constants = {**_from_base(base), **_facts(device, info)}
    bare = replace(Hardware(name, "without losses", constants).gpu, **_lossless(device))
    constants |= _fitted(parts(used, bare, draws, tiles=not cpu), info, draws)
    machine = Hardware(name, "without whole steps", constants)
    constants |= _fitted(step_parts(used, machine, in_line=cpu), info, draws)
    return Hardware(
        name,
        _description(device, info),
        constants,
        fit=Fit(
            device=device,
            rows=tuple((Path(f).name, hashlib.sha256(Path(f).read_bytes()).hexdigest()) for f in files),
            keys=keys_hash(row["key"] for row in used),
            patterns=tuple(split.fit) if split else (f"{device}/calibrate/*",),
            kvsim=kvsim.__version__,
            date=_date(info),
            split=split.fingerprint if split else None,
            drift={phase: round(apart, 4) for phase, apart in sorted(drifts(rows).items())},
        ),
        ranges=_ranges(used),
    )


def chosen(rows: Sequence[Row], split: Split | None) -> list[Row]:
    """The rows to fit: what the split says; calibration rows where there is none. Errors are passed over."""
    measured = [row for row in rows if "ms" in row and row["phase"] not in ("info", "sentinel")]
    if split is None:
        return [row for row in measured if row["phase"] == "calibrate"]
    if not split.holds_for(device := device_of(rows)):
        raise ConfigError(f"the split does not hold for {device}", hint="use the split of that device")
    return [row for row in measured if split.is_fit(row["key"])]


def keys_hash(keys: Iterable[str]) -> str:
    """SHA-256 of a set of keys."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()


def summary(hardware: Hardware) -> list[tuple[str, str, str, str, str]]:
    """(constant, value, band, residual, where from) of every constant, for people."""
    lines = []
    for key, c in hardware.constants.items():
        band = f"{c.low} ... {c.high}" if c.low is not None else ""
        residual = f"{100 * c.residual:.1f} %" if c.residual is not None else ""
        lines.append((key, str(c.value), band, residual, c.method or c.source))
    return lines


def notes(hardware: Hardware) -> list[str]:
    """What a reader of the file must know: constants that were not measured, phases in which the machine drifted."""
    borrowed = [key for key, c in hardware.constants.items() if c.source.startswith(_BORROWED)]
    found = [f"not measured, taken over: {', '.join(borrowed)}"] if borrowed else []
    for phase, apart in (hardware.fit.drift if hardware.fit else {}).items():
        if apart > DRIFT:
            found.append(f"the machine drifted by {100 * apart:.0f} % in phase {phase}: was something else running?")
    return found


# --- constants with their evidence -------------------------------------------------------------------------

_BORROWED = "not measured here; "
_STANDS_FOR = "RAM stands for device memory, a thread that copies for the link, ordinary memory for pinned memory"


def _description(device: str, info: dict[str, Any]) -> str:
    text = f"{info.get('device', device)}, calibrated {_date(info)}"
    return f"{text}; {_STANDS_FOR}" if device.startswith("cpu-") else text


def _date(info: dict[str, Any]) -> str:
    return str(info.get("date", "1970-01-01"))


def _source(info: dict[str, Any]) -> str:
    """Device, driver and engine versions."""
    engine = (f"{name} {info[name]}" for name in ("driver", "torch", "transformers") if info.get(name))
    return ", ".join([str(info.get("device", "unknown device")), *engine, f"kvsim {kvsim.__version__}"])


def _from_base(base: Hardware) -> dict[str, Constant]:
    return {
        key: Constant(c.value, c.evidence, f"{_BORROWED}{base.name}: {c.source}") for key, c in base.constants.items()
    }


def _facts(device: str, info: dict[str, Any]) -> dict[str, Constant]:
    """Sizes that the system tells, and counts of our own executor."""
    told = "total memory, as the system tells it"
    counted = "counted: kernels of a layer of kvsim's executor beside matrix products and attention"
    facts = {"gpu.small_kernels": Constant(SMALL_KERNELS, "measured", counted, date=_date(info))}
    if device.startswith("cpu-"):
        none = Constant(0, "assumed", "a processor has no tiles and rounds of blocks", date=_date(info))
        facts |= {f"gpu.{key}": _zero(f"gpu.{key}", none) for key in (*LINEAR, "prefill_fixed")}
        facts["gpu.sms"] = Constant(1, "assumed", "one thread computes", date=_date(info))
    elif "sms" in info:
        facts["gpu.sms"] = Constant(info["sms"], "measured", "as the driver tells it", date=_date(info))
    if device.startswith("cpu-") and "memory" in info:
        half = Constant(_text("bytes", info["memory"] // 2), "assumed", f"half of this machine's RAM; {_STANDS_FOR}")
        facts |= {"gpu.memory": half, "host.capacity": half}
    elif "memory" in info:
        for key, size in (("gpu.memory", "device_memory"), ("host.capacity", "memory")):
            facts[key] = Constant(_text("bytes", info[size]), "measured", told, date=_date(info))
    if disk := info.get("disk"):
        said = f"free space of the file system ({disk['file_system']})"
        facts["ssd.capacity"] = Constant(_text("bytes", disk["free"]), "measured", said, date=_date(info))
    return facts


def _zero(key: str, like: Constant) -> Constant:
    return replace(like, value=_text(KINDS[key], 0.0))


def _lossless(device: str) -> dict[str, float]:
    """Where the fits of the operators begin; the tiles of a GPU's prefill kernel are the base's."""
    return {k: v for k, v in LINEAR.items() if k != "prefill_tile_rows" or device.startswith("cpu-")}


def _fitted(some: Iterable[Part], info: dict[str, Any], draws: int) -> dict[str, Constant]:
    """Every constant that measurements decide, with band, method and residual."""
    found: dict[str, Constant] = {}
    for part in some:
        values = part.find(part.columns)
        if not values or not all(map(math.isfinite, values.values())):
            continue  # too few rows, or rows that do not tell these constants apart
        bands, residual = part.bands(values, draws), part.residual(values)
        for key, value in values.items():
            low, high = (_text(KINDS[key], edge) for edge in bands.get(key, (value, value)))
            found[key] = Constant(
                _text(KINDS[key], value),
                "fitted" if part.predict else "measured",
                _source(info),
                low if key in bands else None,
                high if key in bands else None,
                f"{part.method}; {part.size} observations",
                _date(info),
                residual,
            )
    return found


_SCALES = {
    "seconds": ((1e-6, "us"),),
    "bandwidth": ((1e12, "TB/s"), (1e9, "GB/s")),
    "flops": ((1e12, "TFLOP/s"), (1e9, "GFLOP/s")),
    "bytes": ((1e9, "GB"),),
}


def _text(kind: str, value: float) -> str | float:
    """A constant as the hardware file holds it: four digits and its unit."""
    if kind == "count":
        return int(float(f"{value:.4g}"))
    if kind not in _SCALES:
        return float(f"{value:.4g}")
    factor, unit = next((s for s in _SCALES[kind] if value >= s[0]), _SCALES[kind][-1])
    return f"{float(f'{value / factor:.4g}'):g}{unit}"


# --- the ranges -----------------------------------------------------------------------------------------------

_COUNTED: dict[str, dict[str, Callable[[dict[str, Any]], dict[str, float]]]] = {
    "gemm": {"gemm": lambda p: {"parameters": p["out"] * p["inp"], "rows": p["rows"]}},
    "attention": {"attention": lambda p: {"sequences": p["sequences"], "kv_bytes": kv_bytes(p)}},
    "prefill": {"prefill": lambda p: {"sequences": p["sequences"], "queries": p["queries"]}},
    "copy": {
        "copy": lambda p: {"bytes": p["bytes"], "copies": 1},
        "chunks": lambda p: {"bytes": p["chunk"] * p["n"], "copies": p["n"]},
    },
    "ssd": {"ssd": lambda p: {"block": p["block"], "depth": p["depth"]}},
}


def _ranges(rows: Sequence[Row]) -> dict[str, dict[str, tuple[float, float]]]:
    """Least and most that was measured of what each operator counts."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for operator, kinds in _COUNTED.items():
        counts = [count(r["params"]) for kind, count in kinds.items() for r in pick(rows, kind)]
        if counts:
            found[operator] = {n: (min(c[n] for c in counts), max(c[n] for c in counts)) for n in counts[0]}
    return found
