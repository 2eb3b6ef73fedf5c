"""Numbers with units: "16GiB", "25GB/s", "10us", "312TFLOP/s", "20%".

Inside kvsim everything is bytes, seconds, tokens and FLOP as plain numbers; this module is where text
becomes such a number and where a number becomes text for a person.
"""

from __future__ import annotations

import math
import re

from kvsim.errors import ConfigError

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_PREFIX = _DECIMAL | _BINARY
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0}
_NUMBER = re.compile(r"\s*([-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(.*?)\s*")


def _split(text: str | float, what: str, right: str) -> tuple[float, str]:
    if isinstance(text, (int, float)) and not isinstance(text, bool) and math.isfinite(text):
        return float(text), ""
    found = _NUMBER.fullmatch(str(text))
    if not found or not math.isfinite(float(found[1].replace("_", ""))):
        raise ConfigError(f'cannot read {what} "{text}"', hint=f"write it like {right}")
    return float(found[1].replace("_", "")), found[2]


def _scaled(text: str | float, what: str, right: str, suffixes: dict[str, float]) -> float:
    value, unit = _split(text, what, right)
    if unit not in suffixes:
        raise ConfigError(f'cannot read {what} "{text}": unknown unit "{unit}"', hint=f"write it like {right}")
    if value < 0:
        raise ConfigError(f'{what} of "{text}" is below zero', hint=f"write it like {right}")
    if isinstance(text, str) and not unit and value:
        raise ConfigError(f'{what} of "{text}" has no unit', hint=f"write it like {right}")
    return value * suffixes[unit]


def parse_bytes(text: str | float) -> float:
    """Bytes from "64GiB", "1.5 TB", or a plain number that is no text; the same holds below."""
    return _scaled(text, "a size", '"64GiB" or "500MB"', {"": 1.0} | {p + "B": f for p, f in _PREFIX.items()})


def parse_bandwidth(text: str | float) -> float:
    """Bytes per second from "25GB/s"; a plain number is bytes per second."""
    return _scaled(text, "a bandwidth", '"25GB/s"', {"": 1.0} | {p + "B/s": f for p, f in _PREFIX.items()})


def parse_seconds(text: str | float) -> float:
    """Seconds from "10us", "1.5ms"; a plain number is seconds."""
    return _scaled(text, "a time", '"10us" or "2ms"', {"": 1.0} | _SECONDS)


def parse_flops(text: str | float) -> float:
    """FLOP per second from "312TFLOP/s"; a plain number is FLOP per second."""
    return _scaled(text, "a compute rate", '"312TFLOP/s"', {"": 1.0} | {p + "FLOP/s": f for p, f in _DECIMAL.items()})


def parse_budget(text: str | float) -> tuple[float, str]:
    """A budget as (value, basis): "20%" -> (0.2, "fraction"), "512" -> (512, "pages"), "4GiB" -> (..., "bytes")."""
    right = '"20%" of the final length, "512" pages per lane, or "4GiB" over all lanes'
    value, unit = _split(text, "a budget", right)
    if unit == "%":
        basis, value = "fraction", value / 100
    elif unit in ("", "pages"):
        basis = "pages"
        if value != int(value):
            raise ConfigError(f'a budget of "{text}" pages is not a whole number', hint=f"write it like {right}")
    else:
        basis, value = "bytes", _scaled(text, "a budget", right, {p + "B": f for p, f in _PREFIX.items()})
    if not value > 0:
        raise ConfigError(f'a budget of "{text}" keeps nothing', hint=f"write a positive one, like {right}")
    return value, basis


def format_bytes(value: float) -> str:
    """ "1.5 GiB": binary units, up to three significant digits."""
    return _format(value, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def format_bandwidth(value: float) -> str:
    """ "25 GB/s": decimal units, as datasheets print links."""
    return _format(value, 1000.0, ("B/s", "kB/s", "MB/s", "GB/s", "TB/s"))


def format_seconds(value: float) -> str:
    """ "1.23 ms": the unit that leaves one to three digits before the point."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(value) >= 0.9995 * factor:  # what would be rounded up to the next unit is in it
            return f"{value / factor:.3g} {unit}"
    return "0 s" if value == 0 else f"{value / 1e-9:.3g} ns"


def _format(value: float, base: float, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{value:.0f} {units[power]}" if power == 0 else f"{value:.3g} {units[power]}"
