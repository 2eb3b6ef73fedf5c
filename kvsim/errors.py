"""Every error a user can cause, and the line that suggests what was meant.

The command line prints the message, one line per fact (what, where, what would be right), and exits
with code 2. `assert` is kept for our own mistakes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KvsimError(Exception):
    """Base of all errors caused by input. `where` and `hint` become the second and third line."""

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None):
        self.what, self.where, self.hint = what, where, hint
        super().__init__("\n".join(line for line in (what, where and f"in {where}", hint) if line))

    def __reduce__(self):  # keyword arguments survive the trip back from a worker process
        return _rebuild, (type(self), self.what, self.where, self.hint)


class ConfigError(KvsimError):
    """A flag, a configuration key or a hardware file is wrong."""


class TraceError(KvsimError):
    """A trace cannot be read, or holds what no attention can produce."""


class PolicyError(KvsimError):
    """A policy is unknown, cannot be served by the trace, or broke its contract."""


class ResultError(KvsimError):
    """A result cannot be written or read."""


def _rebuild(kind: type[KvsimError], what: str, where: str | None, hint: str | None) -> KvsimError:
    return kind(what, where=where, hint=hint)


def nearest(name: str, known: Iterable[str], listing: str) -> str:
    """A hint: the closest known name if one is close, and where to see them all."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1) or [k for k in known if name and k.startswith(name)]
    guess = f'did you mean "{close[0]}"? ' if close else ""
    return f"{guess}{listing} shows all {len(known)}"
