"""Calling what a policy's author wrote: whatever goes wrong in it is said in words, with the place.

The contract itself is in `kvsim.cache.view`; nothing here knows a table.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from kvsim.errors import KvsimError, PolicyError

_METHOD = {"scores": "score", "a read set": "select", "budgets": "split", "tiers": "place"}


def call(owner: Any, method: str, *arguments: Any, now: int, optional: bool = False) -> Any:
    """The hook's answer; None for an optional one that is not defined.

    Raises PolicyError for whatever it raises; an error in kvsim's words gets the policy's name, where it has no place.
    """
    function = getattr(owner, method, None)
    if function is None and optional:
        return None
    try:
        return function(*arguments)  # type: ignore[misc]
    except KvsimError as error:
        if error.where:
            raise
        raise type(error)(error.what, where=f'policy "{name(owner)}"', hint=error.hint) from error
    except Exception as error:
        hint = f"{type(error).__name__}: {error}"
        if "read-only" in str(error):
            hint = "the view's columns are read-only; keep state of your own in `columns`"
        raise broken(owner, f"failed in {method} at step {now}", method, hint) from error


def array(owner: Any, what: str, value: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """What a hook returned, broadcast to `shape`. Raises PolicyError for another shape, or for what is no number."""
    method = _METHOD.get(what, what)
    given = np.asarray(value)
    if given.dtype.kind not in "biuf":
        hint = "numbers are expected; is a return missing?"
        raise broken(owner, f"returned {what} of type {given.dtype}", method, hint)
    try:
        return np.ascontiguousarray(np.broadcast_to(given, shape), dtype)
    except ValueError:
        wrong = f"returned {what} of shape {given.shape}, expected one broadcastable to {shape}"
        raise broken(owner, wrong, method, "the last axis is the slot; did a sum drop it?") from None


def broken(owner: Any, what: str, method: str, hint: str) -> PolicyError:
    """The error of a policy that broke its contract: who, what, where."""
    cls = type(owner)
    try:
        home = inspect.getsourcefile(cls)
    except TypeError:
        home = None
    return PolicyError(
        f'policy "{name(owner)}" {what}', where=f"{home or cls.__module__}:{cls.__name__}.{method}", hint=hint
    )


def name(owner: Any) -> str:
    """What a policy is called on the command line."""
    return getattr(owner, "spec_name", type(owner).__name__)
