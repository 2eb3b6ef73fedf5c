"""Which rows a fit may see and by which it is judged: one file, committed before the first fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kvsim.config import read_toml
from kvsim.errors import ConfigError
from kvsim.results import digest

_FORM = 'a split has device = "<slug>", fit = [...], held_out = [...] and [groups], all globs over keys of rows'


@dataclass(frozen=True)
class Split:
    """Globs over the keys of rows: what is fitted, what is held out, and groups of what is held out.

    `device`: a slug, or a glob where one split holds for several devices, each of which is fitted by itself.
    """

    device: str
    fit: tuple[str, ...]
    held_out: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what it says."""
        return digest({"device": self.device, "fit": self.fit, "held_out": self.held_out, "groups": self.groups})

    def holds_for(self, device: str) -> bool:
        """Is it a split of this device's rows?"""
        return _matches(device, (self.device,))

    def is_fit(self, key: str) -> bool:
        """Raises ConfigError for a key that is held out as well."""
        fit, held_out = _matches(key, self.fit), _matches(key, self.held_out)
        if fit and held_out:
            raise ConfigError(
                f'the row "{key}" is both fitted and held out', hint="let the globs of the split be apart"
            )
        return fit

    def is_held_out(self, key: str) -> bool:
        """Raises ConfigError for a key that is fitted as well."""
        return not self.is_fit(key) and _matches(key, self.held_out)

    def groups_of(self, key: str) -> tuple[str, ...]:
        """Names of the groups a held-out row belongs to; "other" where there is none."""
        return tuple(name for name, globs in self.groups.items() if _matches(key, globs)) or ("other",)


def read_split(path: str | Path) -> Split:
    """Raises ConfigError, naming the key, for a file that is no split."""
    table, where = read_toml(path), str(path)
    if unknown := sorted(set(table) - {"device", "fit", "held_out", "groups"}):
        raise ConfigError(f'unknown key "{unknown[0]}"', where=where, hint=_FORM)
    if not isinstance(table.get("device"), str):
        raise ConfigError("the split names no device", where=where, hint=_FORM)
    groups = table.get("groups", {})
    if not isinstance(groups, dict):
        raise ConfigError("[groups] is not a table", where=where, hint=_FORM)
    fit, held_out = (_globs(table.get(name), name, where) for name in ("fit", "held_out"))
    named = {name: _globs(globs, f"groups.{name}", where) for name, globs in groups.items()}
    return Split(table["device"], fit, held_out, named)


def _globs(value: Any, name: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(glob, str) for glob in value):
        raise ConfigError(f'"{name}" is no list of globs', where=where, hint=_FORM)
    return tuple(value)


def _matches(key: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(key, glob) for glob in globs)
