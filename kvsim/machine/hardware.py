"""A machine in constants: one TOML file per machine, each constant with its unit and where it comes from.

Every constant is `{value = "2.4TB/s", evidence = "fitted", source = "..."}`. Nothing has a hidden default:
a file lists all constants, so what a result rests on can be read in one place. What `kvsim calibrate` writes also says
how sure each constant is, what the fit rests on, and the range in which its operators were measured.
"""

from __future__ import annotations

import datetime
import fnmatch
import json
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kvsim.errors import ConfigError, nearest
from kvsim.units import parse_bandwidth, parse_bytes, parse_flops, parse_seconds

EVIDENCE = ("fitted", "measured", "datasheet", "assumed")
FOLDER = Path(__file__).parent.parent / "hardware"
COPIES = ("pinned", "pageable", "staged")


def _of(kind: str, least: float = 0) -> Any:
    return field(metadata={"kind": kind, "least": least})


@dataclass(frozen=True)
class Gpu:
    """Sustained rates and fixed times of the GPU. Rates are what kernels reach, not the datasheet's peak."""

    memory: float = _of("bytes")
    sms: float = _of("count", 1)  # multiprocessors, which take blocks of work in rounds
    weight_bandwidth: float = _of("bandwidth")  # weights streamed by a GEMM of few rows
    kv_bandwidth: float = _of("bandwidth")  # keys and values streamed by decode attention
    kv_ramp: float = _of("seconds")  # what that stream loses, at most, until it has its rate
    gemm_flops: float = _of("flops")
    gemm_knee: float = _of("excess")  # where reading and computing take equally long, a GEMM takes 2**knee times that
    gemm_depth: float = _of("count")  # starting and ending a tile of the output, in columns of its input
    gemm_edge: float = _of("excess")  # an m x n tile takes 1 + edge * (1/m + 1/n - 3/256) times its FLOP
    gemm_wave: float = _of("excess")  # share that shows of the loss in tiles and rounds that are not full
    eager_kv_passes: float = _of("excess")  # times a framework moves the bytes of a cache that it grows by copying
    kernel_time: float = _of("seconds")  # fixed part of every GEMM and small kernel
    small_kernels: float = _of("count")  # norms, rotation, activation: kernels per layer beside GEMMs and attention
    attention_fixed: float = _of("seconds")  # decode
    attention_batch: float = _of("seconds")  # decode: the same, more where there is more than one sequence
    attention_per_sequence: float = _of("seconds")
    attention_wave: float = _of("seconds")  # decode: each round of (sequence, KV head) after the first
    attention_tile_keys: float = _of("count")  # decode: keys that each block of such a round reads at least
    attention_flops: float = _of("flops")  # prefill attention of long prompts, softmax apart
    attention_row_keys: float = _of("count")  # cost of a prefill row beside its keys, in keys
    prefill_fixed: float = _of("seconds")
    prefill_tile_rows: float = _of("count")  # query rows that one multiprocessor takes through their keys; 0: any
    prefill_score_dims: float = _of("count")  # softmax of a score, in head dimensions
    prefill_tail: float = _of("excess")  # tiles that see most keys come late: share of the longest less the shortest
    prefill_split: float = _of("excess")  # 0: a tile's keys stay on one multiprocessor; 1: idle ones share them all
    prefill_token: float = _of("seconds")  # writing a new token's keys and values, at 1,024 elements of each
    layer_gap: float = _of("seconds")  # between the kernels of two layers that are launched apart
    step_sync: float = _of("seconds")  # sampling and handing the token to the host
    copy_slowdown: float = _of("excess")  # compute takes (1 + this) times as long while a copy runs
    staging_layers: float = _of("count", 1)  # layers whose fetched pages the GPU holds at once: the prefetch depth


@dataclass(frozen=True)
class Cpu:
    """The thread that submits kernels and copies."""

    layer_submit: float = _of("seconds")  # one graph per layer
    eager_submit: float = _of("seconds")  # kernel by kernel from an eager framework


@dataclass(frozen=True)
class Link:
    """One direction between host and GPU: n copies of m bytes take latency + n * per_copy + m / bandwidth."""

    bandwidth: float = _of("bandwidth")
    pageable_bandwidth: float = _of("bandwidth")
    latency: float = _of("seconds")
    per_copy: float = _of("seconds")
    submit: float = _of("seconds")  # time of the submit thread per copy
    duplex: float = _of("share")  # speed left while the other direction is busy


@dataclass(frozen=True)
class Host:
    """Host memory, and how pages move through it."""

    capacity: float = _of("bytes")
    bandwidth: float = _of("bandwidth")
    copy_threads: float = _of("count", 1)
    thread_bandwidth: float = _of("bandwidth")
    copies: str = _of("choice")  # "pinned"; "pageable"; "staged": threads gather the pages, then one pinned copy
    merge: bool = _of("flag")  # do adjacent pages of a layer lie next to each other, so that one copy moves a run?


@dataclass(frozen=True)
class Ssd:
    """A block device: `queue_depth` requests are in flight at once."""

    capacity: float = _of("bytes")
    read_bandwidth: float = _of("bandwidth")
    write_bandwidth: float = _of("bandwidth")
    read_iops: float = _of("count", 1)
    write_iops: float = _of("count", 1)
    read_latency: float = _of("seconds")
    write_latency: float = _of("seconds")
    queue_depth: float = _of("count", 1)
    mixed: float = _of("share")  # speed left to reads while writes run, and the reverse


TABLES: dict[str, type] = {"gpu": Gpu, "cpu": Cpu, "link.h2d": Link, "link.d2h": Link, "host": Host, "ssd": Ssd}
KINDS = {f"{table}.{f.name}": f.metadata["kind"] for table, kind in TABLES.items() for f in fields(kind)}
_LEAST = {f"{table}.{f.name}": f.metadata["least"] for table, kind in TABLES.items() for f in fields(kind)}


# What the operators that are fitted count, and thus what has a measured range.
RANGES = {
    "gemm": ("parameters", "rows"),
    "attention": ("sequences", "kv_bytes"),
    "prefill": ("sequences", "queries"),
    "copy": ("bytes", "copies"),
    "ssd": ("block", "depth"),
}


@dataclass(frozen=True)
class Constant:
    """One constant: `value` as written (with its unit), what kind of evidence stands behind it, and the source.

    A calibrated one may have a band `low` ... `high` (90 %, same unit), a `method`, a `date` (2026-11-21) and a
    `residual`: the mean relative error of the rows it was fitted to.
    """

    value: str | float | bool
    evidence: str
    source: str
    low: str | float | None = None
    high: str | float | None = None
    method: str | None = None
    date: str | None = None
    residual: float | None = None


@dataclass(frozen=True)
class Fit:
    """What a calibrated file was fitted to.

    `device`: slug; `rows`: (file, SHA-256); `keys`: hash of the fitted rows' keys; `patterns`: globs that match them
    and nothing held out; `split`: fingerprint of the split file; `drift`: per phase, how far its sentinels lay apart.
    """

    device: str
    rows: tuple[tuple[str, str], ...]
    keys: str
    patterns: tuple[str, ...]
    kvsim: str
    date: str
    split: str | None = None
    drift: Mapping[str, float] = field(default_factory=dict)

    def covers(self, key: str) -> bool:
        """May a row of this key be among those fitted?"""
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in self.patterns)


@dataclass(frozen=True)
class Hardware:
    """All constants of one machine; `constants` maps dotted keys ("link.h2d.bandwidth") to `Constant`.

    `fit` and `ranges` (operator -> what it counts -> least and most measured) are those of a calibrated file.
    """

    name: str
    description: str
    constants: Mapping[str, Constant]
    where: str | None = None
    fit: Fit | None = None
    ranges: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    gpu: Gpu = field(init=False)
    cpu: Cpu = field(init=False)
    h2d: Link = field(init=False)
    d2h: Link = field(init=False)
    host: Host = field(init=False)
    ssd: Ssd = field(init=False)

    def __post_init__(self):
        for key in self.constants:
            if key not in KINDS:
                raise ConfigError(f'unknown hardware constant "{key}"', where=self.where, hint=_listing(key))
        if missing := [key for key in KINDS if key not in self.constants]:
            raise ConfigError(f'hardware constant "{missing[0]}" is missing', where=self.where, hint=_form(missing[0]))
        for key, constant in self.constants.items():
            self._check_band(key, constant)
        for table, kind in TABLES.items():
            values = {f.name: self._value(f"{table}.{f.name}") for f in fields(kind)}
            object.__setattr__(self, table.rpartition(".")[2], kind(**values))

    def _value(self, key: str, part: str = "value") -> float | str | bool:
        value = getattr(self.constants[key], part)
        try:
            read = _READ[KINDS[key]](value)
            if _LEAST[key] and read < _LEAST[key]:
                raise ConfigError(f"{value!r} will not do", hint=f"write a whole number, {_LEAST[key]} or more")
            return read
        except ConfigError as bad:
            what = f"{key}: {bad.what}" if part == "value" else f'{key}: "{part}": {bad.what}'
            raise ConfigError(what, where=self.where, hint=bad.hint) from None

    def _check_band(self, key: str, c: Constant) -> None:
        """Raise ConfigError unless the band, if there is one, is one and holds the value."""
        if c.low is None and c.high is None:
            return
        hint = "write low, value and high in ascending order, in the same unit"
        if c.low is None or c.high is None or KINDS[key] in ("choice", "flag"):
            raise ConfigError(f"{key}: half a band, or one around what is no number", where=self.where, hint=hint)
        low, value, high = (float(self._value(key, part)) for part in ("low", "value", "high"))
        if low > high:
            raise ConfigError(f'{key}: "low" is {c.low}, above "high" {c.high}', where=self.where, hint=hint)
        if not low <= value <= high:
            what = f"{key}: {c.value} lies outside of its band, {c.low} to {c.high}"
            raise ConfigError(what, where=self.where, hint=hint)

    def outside(self, operator: str, **counts: float) -> list[str]:
        """A sentence for each count that lies outside the range in which `operator` was measured.

        Empty where all lie inside, and for a file without ranges. Operators and what they count: `RANGES`.
        """
        assert set(counts) <= set(RANGES[operator]), counts
        found = []
        for name, value in counts.items():
            least, most = self.ranges.get(operator, {}).get(name, (-math.inf, math.inf))
            if not least <= value <= most:
                found.append(f"{operator}: {name} {value:g} lies outside of the measured {least:g} to {most:g}")
        return found

    @classmethod
    def load(cls, name: str | Path) -> Hardware:
        """A shipped machine by name ("h100-pcie5"), or a TOML file by path.

        Raises ConfigError, naming file and key, for anything but a complete set of constants with units and evidence.
        """
        path = Path(name) if str(name).endswith(".toml") else FOLDER / f"{name}.toml"
        if not path.is_file():
            raise ConfigError(f'no hardware "{name}"', hint=nearest(str(name), shipped(), "kvsim list hardware"))
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as bad:
            raise ConfigError(f"not TOML: {bad}", where=str(path)) from None
        return cls.from_table(table, where=path.name if path.parent == FOLDER else str(path))

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str | None = None) -> Hardware:
        """Hardware from a parsed TOML document; `where` names it in errors."""
        table = dict(table)
        head = {}
        for key in ("name", "description"):
            head[key] = table.pop(key, None)
            if not isinstance(head[key], str) or not head[key]:
                raise ConfigError(f'"{key}" is missing or not text', where=where, hint=f'write {key} = "..."')
        fit, ranges = _fit(table.pop("fit", None), where), _ranges(table.pop("range", {}), where)
        return cls(head["name"], head["description"], dict(_constants(table, where)), where, fit, ranges)

    def with_overrides(self, overrides: Mapping[str, str | float | bool]) -> Hardware:
        """The same machine with constants replaced by dotted key; plain numbers are bytes, seconds and their ratios."""
        changed = dict(self.constants)
        for key, value in overrides.items():
            if key not in KINDS:
                raise ConfigError(f'unknown hardware constant "{key}"', where=self.where, hint=_listing(key))
            plain = isinstance(value, (int, float)) and not isinstance(value, bool) and KINDS[key] in _UNITS
            changed[key] = Constant(f"{value!r}{_UNITS[KINDS[key]]}" if plain else value, "assumed", "override")
        return replace(self, constants=changed)

    @staticmethod
    def require_units(overrides: Mapping[str, Any], where: str | None = None) -> None:
        """Raise ConfigError for a number without its unit, where people write overrides; 0 needs none."""
        for key, value in overrides.items():
            if _is_number(value) and value and (unit := _UNITS.get(KINDS.get(key, ""))):
                what = f"hardware.{key}: {value!r} has no unit"
                raise ConfigError(what, where=where, hint=f"write it with one, such as {_RIGHT[unit]}")

    def with_constants(self, constants: Mapping[str, Constant]) -> Hardware:
        """The same machine with constants replaced, evidence included: what calibration and fits produce."""
        return replace(self, constants={**self.constants, **constants})

    def to_toml(self) -> str:
        """The file that `load` reads back as this machine."""
        lines = [f"name = {_quote(self.name)}", f"description = {_quote(self.description)}"]
        for table, kind in TABLES.items():
            lines += ["", f"[{table}]"]
            lines += [f"{f.name} = {_inline(vars(self.constants[f'{table}.{f.name}']))}" for f in fields(kind)]
        for operator, counts in self.ranges.items():
            lines += ["", f"[range.{operator}]", *(f"{name} = {_toml(list(span))}" for name, span in counts.items())]
        if self.fit:
            rows = [{"file": file, "sha256": digest} for file, digest in self.fit.rows]
            entries = vars(self.fit) | {"rows": rows, "patterns": list(self.fit.patterns)}
            lines += ["", "[fit]", *(f"{name} = {_toml(v)}" for name, v in entries.items() if v not in (None, {}))]
        return "\n".join(lines) + "\n"


def shipped() -> list[str]:
    """Names of the hardware files that come with kvsim."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def _constants(table: Mapping[str, Any], where: str | None, prefix: str = "") -> Iterator[tuple[str, Constant]]:
    """(dotted key, Constant) for every leaf of the document; a leaf is a table that has a value."""
    for name, entry in table.items():
        key = prefix + name
        if not isinstance(entry, dict):
            raise ConfigError(f'"{key}" is not a constant with its evidence', where=where, hint=_form(key))
        if "value" not in entry and key not in KINDS:
            if not any(known.startswith(key + ".") for known in TABLES) and key not in TABLES:
                raise ConfigError(f'unknown table or constant "{key}"', where=where, hint=_listing(key))
            yield from _constants(entry, where, key + ".")
            continue
        if missing := _CORE - set(entry):
            raise ConfigError(f'{key}: "{sorted(missing)[0]}" is missing', where=where, hint=_form(key))
        if odd := set(entry) - _CORE - set(_MORE):
            raise ConfigError(f'{key}: "{sorted(odd)[0]}" is not understood', where=where, hint=_form(key))
        if entry["evidence"] not in EVIDENCE:
            raise ConfigError(
                f'{key}: evidence "{entry["evidence"]}"', where=where, hint=f"use one of {', '.join(EVIDENCE)}"
            )
        if not isinstance(entry["source"], str) or not entry["source"]:
            raise ConfigError(f"{key}: the source is empty", where=where, hint=_form(key))
        for part, (holds, right) in _MORE.items():
            if part in entry and not holds(entry[part]):
                raise ConfigError(f"{key}: {part} = {entry[part]!r} will not do", where=where, hint=f"write {right}")
        yield key, Constant(**entry)


def _fit(table: Any, where: str | None) -> Fit | None:
    """The [fit] table of a calibrated file."""
    if table is None:
        return None
    hint = "calibrate again, or delete the table: then nothing is known of the rows behind the constants"
    known = {f.name for f in fields(Fit)}
    if not isinstance(table, dict) or (odd := sorted(set(table) - known)):
        raise ConfigError(
            f'[fit]: "{odd[0]}" is not understood' if odd else "[fit] is no table", where=where, hint=hint
        )
    try:
        rows = tuple((str(row["file"]), str(row["sha256"])) for row in table["rows"])
        drift = {str(phase): float(apart) for phase, apart in table.get("drift", {}).items()}
        text: dict[str, Any] = {name: table.get(name) for name in ("device", "keys", "kvsim", "date", "split")}
        if not all(isinstance(t, str) and t for name, t in text.items() if name != "split" or t is not None):
            raise TypeError
        return Fit(**text, rows=rows, patterns=tuple(map(str, table["patterns"])), drift=drift)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ConfigError("[fit] is not what kvsim calibrate writes", where=where, hint=hint) from None


def _ranges(table: Any, where: str | None) -> dict[str, dict[str, tuple[float, float]]]:
    """The [range] tables of a calibrated file: {operator: {what it counts: (least, most)}}."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for operator, counts in table.items() if isinstance(table, dict) else [("", {})]:
        known = RANGES.get(operator, ())
        if not isinstance(counts, dict) or not known or (odd := sorted(set(counts) - set(known))):
            name = f"range.{operator}" + (f".{odd[0]}" if known and isinstance(counts, dict) else "")
            raise ConfigError(f'unknown "{name}"', where=where, hint=f"ranges are of {', '.join(known or RANGES)}")
        found[operator] = {}
        for name, span in counts.items():
            numbers = isinstance(span, list) and len(span) == 2 and all(map(_is_number, span))
            if not numbers or not 0 <= span[0] <= span[1]:
                raise ConfigError(f"range.{operator}.{name} is {span!r}", where=where, hint="write [least, most]")
            found[operator][name] = (span[0], span[1])
    return found


def _form(key: str) -> str:
    return f'write {key.rpartition(".")[2]} = {{value = ..., evidence = "{"|".join(EVIDENCE)}", source = "..."}}'


def _listing(key: str) -> str:
    return nearest(key, KINDS, "docs/hardware.md")


def _quote(value: str | float | bool) -> str:
    return json.dumps(value, ensure_ascii=False)


def _toml(value: Any) -> str:
    """A TOML value of numbers, text, lists and flat tables."""
    if isinstance(value, Mapping):
        return _inline(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return _quote(value)


def _inline(table: Mapping[str, Any]) -> str:
    """An inline table without what is None."""
    return "{" + ", ".join(f"{key} = {_toml(value)}" for key, value in table.items() if value is not None) + "}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_date(value: Any) -> bool:
    try:
        return bool(datetime.date.fromisoformat(value))
    except (TypeError, ValueError):
        return False


_CORE = {"value", "evidence", "source"}
_MORE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "low": (lambda v: _is_text(v) or _is_number(v), "a value with its unit"),
    "high": (lambda v: _is_text(v) or _is_number(v), "a value with its unit"),
    "method": (_is_text, "what was done, as text"),
    "date": (_is_date, 'a day, as "2026-11-21"'),
    "residual": (lambda v: _is_number(v) and v >= 0, "a share, 0 or more"),
}

_UNITS = {"bytes": "B", "bandwidth": "B/s", "seconds": "s", "flops": "FLOP/s"}


def _with_unit(parse: Callable[[str], float], least: float, right: str) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if not isinstance(value, str) or not value.strip()[-1:].isalpha():
            raise ConfigError(f"{value!r} has no unit", hint=f"write it like {right}")
        text = value.strip()
        number = float("inf") if text.startswith("inf") and text[3:].strip() in _UNITS.values() else parse(text)
        if number == 0 and least:
            raise ConfigError(f'"{value}" is not positive', hint=f"write it like {right}")
        return number

    return read


def _number(holds: Callable[[float], bool], right: str) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
            raise ConfigError(f"{value!r} will not do", hint=f"write {right}")
        return value

    return read


def _member(choices: tuple, right: str) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not any(value is c or (isinstance(value, str) and value == c) for c in choices):
            raise ConfigError(f"{value!r} will not do", hint=f"write {right}")
        return value

    return read


_RIGHT = {"B": '"80GB"', "B/s": '"25GB/s"', "s": '"10us"', "FLOP/s": '"312TFLOP/s"'}
_READ: dict[str, Callable[[Any], Any]] = {
    "bytes": _with_unit(parse_bytes, 1, _RIGHT["B"]),
    "bandwidth": _with_unit(parse_bandwidth, 1, _RIGHT["B/s"]),
    "seconds": _with_unit(parse_seconds, 0, _RIGHT["s"]),
    "flops": _with_unit(parse_flops, 1, _RIGHT["FLOP/s"]),
    "count": _number(lambda v: v >= 0 and v == int(v), "a whole number"),
    "share": _number(lambda v: 0 < v <= 1, "a number above 0, at most 1"),
    "excess": _number(lambda v: v >= 0, "a number of 0 or more"),
    "choice": _member(COPIES, " or ".join(f'"{c}"' for c in COPIES)),
    "flag": _member((True, False), "true or false"),
}
