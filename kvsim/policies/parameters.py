"""What policies ask of their parameters: a value outside its meaning is a ConfigError that says what would be right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kvsim.errors import ConfigError

ROWS = 1 << 16  # the longest window of rows that a policy may keep of every page


def whole(policy: Any, *names: str, least: int = 0, most: float = math.inf) -> None:
    """Raises ConfigError for a parameter that is no whole number from `least` to `most`."""
    for name in names:
        if not _is_whole(value := getattr(policy, name), least) or value > most:
            refuse(policy, name, f"write a whole number, {least} {'or more' if most == math.inf else f'to {most}'}")


def number(policy: Any, *names: str, least: float = 0, most: float = math.inf, above: bool = False) -> None:
    """Raises ConfigError for a parameter that is no number from `least` to `most`; `above`: not `least` itself."""
    upto = "" if most == math.inf else f" and at most {most:g}"
    for name in names:
        value = getattr(policy, name)
        if not _is_number(value) or not least <= value <= most or (above and value == least):
            refuse(policy, name, f"write a number {'above' if above else 'of at least'} {least:g}{upto}")


def choice(policy: Any, name: str, *known: str) -> None:
    """Raises ConfigError for a parameter that is none of the words `known`."""
    if getattr(policy, name) not in known:
        words = [f'"{word}"' for word in known]
        refuse(policy, name, f"use {', '.join(words[:-1])} or {words[-1]}")


def flag(policy: Any, *names: str) -> None:
    """Raises ConfigError for a parameter that is neither True nor False."""
    for name in names:
        if not isinstance(getattr(policy, name), bool):
            refuse(policy, name, "write True or False")


def places(policy: Any, *names: str) -> None:
    """Raises ConfigError for a parameter that is no list of whole numbers from 0."""
    for name in names:
        value = getattr(policy, name)
        if isinstance(value, str) or not isinstance(value, Sequence) or not all(_is_whole(x, 0) for x in value):
            refuse(policy, name, "list whole numbers, 0 or more")


def odd(policy: Any, name: str) -> None:
    """Raises ConfigError for a parameter that is no odd number of tokens."""
    value = getattr(policy, name)
    if not _is_whole(value, 1) or value % 2 == 0:
        refuse(policy, name, "use an odd number of tokens; 1 pools nothing")


def windowed(policy: Any) -> None:
    """The newest `window` tokens stay, or `recent` where that is more. Raises ConfigError for what is no number."""
    whole(policy, "window", least=1)
    if not _is_whole(policy.recent, 0):
        refuse(policy, "recent", "write tokens; the newest `window` are kept anyway")
    policy.recent = max(policy.recent, policy.window)


def refuse(policy: Any, name: str, hint: str) -> None:
    """Raises ConfigError: which policy, which parameter, what it was and what would be right."""
    raise ConfigError(f"{policy.spec_name}: {name} = {getattr(policy, name)!r}", hint=hint)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
