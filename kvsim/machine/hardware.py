"""A machine in constants: one TOML file per machine, each constant with its unit and where it comes from.

Every constant is `{value = "2.4TB/s", evidence = "fitted", source = "..."}`. Nothing has a hidden default:
a file lists all constants, so what a result rests on can be read in one place.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kvsim.errors import ConfigError, nearest
from kvsim.units import parse_bandwidth, parse_bytes, parse_flops, parse_seconds

EVIDENCE = ("fitted", "measured", "datasheet", "assumed")
FOLDER = Path(__file__).parent.parent / "hardware"
COPIES = ("pinned", "pageable", "staged")


def _of(kind: str) -> Any:
    return field(metadata={"kind": kind})


@dataclass(frozen=True)
class Gpu:
    """Sustained rates and fixed times of the GPU. Rates are what kernels reach, not the datasheet's peak."""

    memory: float = _of("bytes")
    weight_bandwidth: float = _of("bandwidth")  # weights streamed by a GEMM of few rows
    kv_bandwidth: float = _of("bandwidth")  # keys and values streamed by decode attention
    gemm_flops: float = _of("flops")
    attention_flops: float = _of("flops")  # prefill attention of long prompts
    attention_row_keys: float = _of("count")  # cost of a prefill row beside its keys, in keys
    kernel_time: float = _of("seconds")  # fixed part of every GEMM and small kernel
    small_kernels: float = _of("count")  # norms, rotation, activation: kernels per layer beside GEMMs and attention
    attention_fixed: float = _of("seconds")
    attention_per_sequence: float = _of("seconds")
    layer_gap: float = _of("seconds")  # between the kernels of two layers that are launched apart
    step_sync: float = _of("seconds")  # sampling and handing the token to the host
    copy_slowdown: float = _of("excess")  # compute takes (1 + this) times as long while a copy runs
    staging_layers: float = _of("count")  # layers whose fetched pages the GPU holds at once: the prefetch depth


@dataclass(frozen=True)
class Cpu:
    """The thread that submits kernels and copies."""

    layer_submit: float = _of("seconds")


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
    copy_threads: float = _of("count")
    thread_bandwidth: float = _of("bandwidth")
    copies: str = _of("choice")  # "pinned"; "pageable"; "staged": threads gather the pages, then one pinned copy
    merge: bool = _of("flag")  # do adjacent pages of a layer lie next to each other, so that one copy moves a run?


@dataclass(frozen=True)
class Ssd:
    """A block device: `queue_depth` requests are in flight at once."""

    capacity: float = _of("bytes")
    read_bandwidth: float = _of("bandwidth")
    write_bandwidth: float = _of("bandwidth")
    read_iops: float = _of("count")
    write_iops: float = _of("count")
    read_latency: float = _of("seconds")
    write_latency: float = _of("seconds")
    queue_depth: float = _of("count")
    mixed: float = _of("share")  # speed left to reads while writes run, and the reverse


TABLES: dict[str, type] = {"gpu": Gpu, "cpu": Cpu, "link.h2d": Link, "link.d2h": Link, "host": Host, "ssd": Ssd}
KINDS = {f"{table}.{f.name}": f.metadata["kind"] for table, kind in TABLES.items() for f in fields(kind)}


@dataclass(frozen=True)
class Constant:
    """One constant: `value` as written (with its unit), what kind of evidence stands behind it, and the source."""

    value: str | float | bool
    evidence: str
    source: str


@dataclass(frozen=True)
class Hardware:
    """All constants of one machine; `constants` maps dotted keys ("link.h2d.bandwidth") to `Constant`."""

    name: str
    description: str
    constants: Mapping[str, Constant]
    where: str | None = None
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
        for table, kind in TABLES.items():
            values = {f.name: self._value(f"{table}.{f.name}") for f in fields(kind)}
            object.__setattr__(self, table.rpartition(".")[2], kind(**values))

    def _value(self, key: str) -> float | str | bool:
        value = self.constants[key].value
        try:
            return _READ[KINDS[key]](value)
        except ConfigError as bad:
            raise ConfigError(f"{key}: {bad.what}", where=self.where, hint=bad.hint) from None

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
        return cls(head["name"], head["description"], dict(_constants(table, where)), where)

    def with_overrides(self, overrides: Mapping[str, str | float | bool]) -> Hardware:
        """The same machine with constants replaced by dotted key; plain numbers are bytes, seconds and their ratios."""
        changed = dict(self.constants)
        for key, value in overrides.items():
            if key not in KINDS:
                raise ConfigError(f'unknown hardware constant "{key}"', where=self.where, hint=_listing(key))
            plain = isinstance(value, (int, float)) and not isinstance(value, bool) and KINDS[key] in _UNITS
            changed[key] = Constant(f"{value!r}{_UNITS[KINDS[key]]}" if plain else value, "assumed", "override")
        return replace(self, constants=changed)

    def with_constants(self, constants: Mapping[str, Constant]) -> Hardware:
        """The same machine with constants replaced, evidence included: what calibration and fits produce."""
        return replace(self, constants={**self.constants, **constants})

    def to_toml(self) -> str:
        """The file that `load` reads back as this machine."""
        lines = [f"name = {_quote(self.name)}", f"description = {_quote(self.description)}"]
        for table, kind in TABLES.items():
            lines += ["", f"[{table}]"]
            for f in fields(kind):
                c = self.constants[f"{table}.{f.name}"]
                entry = ", ".join(f"{part} = {_quote(getattr(c, part))}" for part in ("value", "evidence", "source"))
                lines.append(f"{f.name} = {{{entry}}}")
        return "\n".join(lines) + "\n"


def shipped() -> list[str]:
    """Names of the hardware files that come with kvsim."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def _constants(table: Mapping[str, Any], where: str | None, prefix: str = ""):
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
        if odd := set(entry) ^ {"value", "evidence", "source"}:
            problem = "is missing" if odd - set(entry) else "is not understood"
            raise ConfigError(f'{key}: "{sorted(odd)[0]}" {problem}', where=where, hint=_form(key))
        if entry["evidence"] not in EVIDENCE:
            raise ConfigError(
                f'{key}: evidence "{entry["evidence"]}"', where=where, hint=f"use one of {', '.join(EVIDENCE)}"
            )
        if not isinstance(entry["source"], str) or not entry["source"]:
            raise ConfigError(f"{key}: the source is empty", where=where, hint=_form(key))
        yield key, Constant(entry["value"], entry["evidence"], entry["source"])


def _form(key: str) -> str:
    return f'write {key.rpartition(".")[2]} = {{value = ..., evidence = "{"|".join(EVIDENCE)}", source = "..."}}'


def _listing(key: str) -> str:
    return nearest(key, KINDS, "docs/hardware.md")


def _quote(value: str | float | bool) -> str:
    return json.dumps(value, ensure_ascii=False)


_UNITS = {"bytes": "B", "bandwidth": "B/s", "seconds": "s", "flops": "FLOP/s"}


def _with_unit(parse: Callable[[str], float], least: float, right: str) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if not isinstance(value, str) or not value.strip()[-1:].isalpha():
            raise ConfigError(f"{value!r} has no unit", hint=f"write it like {right}")
        text = value.strip()
        number = float("inf") if text.startswith("inf") and text[3:].strip() in _UNITS.values() else parse(text)
        if number < 0 or (number == 0 and least):
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


_READ: dict[str, Callable[[Any], Any]] = {
    "bytes": _with_unit(parse_bytes, 1, '"80GB"'),
    "bandwidth": _with_unit(parse_bandwidth, 1, '"25GB/s"'),
    "seconds": _with_unit(parse_seconds, 0, '"10us"'),
    "flops": _with_unit(parse_flops, 1, '"312TFLOP/s"'),
    "count": _number(lambda v: v >= 0 and v == int(v), "a whole number"),
    "share": _number(lambda v: 0 < v <= 1, "a number above 0, at most 1"),
    "excess": _number(lambda v: v >= 0, "a number of 0 or more"),
    "choice": _member(COPIES, " or ".join(f'"{c}"' for c in COPIES)),
    "flag": _member((True, False), "true or false"),
}
