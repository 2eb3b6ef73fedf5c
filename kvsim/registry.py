"""Names of policies: registering them, finding them, and reading spec strings such as "h2o(recent=64)".

A policy is a plain class with one required method. The decorator makes it a dataclass, fills in the
optional parts of the interface and puts it in the table; entry points of the group `kvsim.plugins`,
a user's file and the built-in modules differ only in how the module comes to be imported.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from kvsim.errors import PolicyError, nearest

_PLUGIN = "kvsim_plugin_"  # how modules made from a user's file are called
_TABLE: dict[tuple[str, str], type] = {}
# A user's files are asked for by path, so two of them may use the same name: two versions of one idea, side by side.
_FILES: dict[str, dict[tuple[str, str], type]] = {}
_SOURCES: dict[str, str] = {}  # of these modules, what was loaded: their files may hold something else by now
_TEXTS: ContextVar[dict[Path, bytes] | None] = ContextVar("texts", default=None)

# What a policy gets when it does not say otherwise. Fields become parameters of its spec string.
_COMMON = {
    "columns": {},  # private per-page state: name -> dtype
    "batch": 1,  # pages to evict at once when full; the budget is never exceeded
    "lag": 1,  # decide every `lag` steps; may overshoot by lag - 1
    "clock": "step",  # what `lag` counts: decode "step"s, or "token"s of the whole sequence
    "once": False,  # decides at the end of prefill alone: whatever is generated stays, beside the budget
    "granularity": "head",  # one decision per "head", "layer" or "token"
    "rows": "visible",  # weights it sees: renormalised over visible pages, or "full"
    "state_bytes": 0,  # that it keeps per page and lane beside its columns
    "needs": frozenset(),  # trace data beyond decode rows: see `kvsim.trace.access.Source.provides`
    "wraps": (),  # policies that this one holds: a wrapper's inner ones
    "files": (),  # files that it reads (`read` them): their content is part of a run's identity
    "bounded": True,  # False: keeps everything, whatever the budget
    "budget_free": False,  # the same score in caches of every size, given full rows: its curve is one pass
    "cut_prompt": True,  # is an over-long prompt cut at the end of prefill? (with offload it always is)
    "evidence": "own",  # code, abs, 3rd, mem, derived, own: see kvsim/policies/classic.py
    "regimes": ("lossy", "offload"),
}
_CHOICES = {"granularity": ("head", "layer", "token"), "rows": ("visible", "full"), "clock": ("step", "token")}
_REGIMES = ("lossy", "offload")
_TAKEN = ("key", "born", "arrived", "last", "uses", "mass", "weights", "resident", "pins", "size", "wanted")  # columns
_HOOKS = ("place", "prefetch", "backup", "rebuild")  # of an offload policy
PROTECTION: dict[str, tuple[str, Any]] = {
    "sink": ("int", 0),
    "recent": ("int | str", 1),
    "protect_head": ("float", 0.0),
    "protect_tail": ("float", 0.0),
}


def policy(name: str) -> Callable[[type], type]:
    """Class decorator: register an eviction policy under `name`.

    Every policy also gets the parameters `sink` and `recent` (tokens that may not leave: the first ones and
    the newest ones; `recent` may be a share of the budget, "50%") and `protect_head`, `protect_tail` (shares
    of the budget), which the engine enforces.
    """

    def register(cls: type) -> type:
        if not callable(getattr(cls, "score", None)) and not callable(getattr(cls, "select", None)):
            raise PolicyError(f'policy "{name}" has neither score(view) nor select(view)', where=_home(cls))
        own = dict(inspect.get_annotations(cls))
        for key, (kind, default) in PROTECTION.items():
            own.setdefault(key, kind)
            if not hasattr(cls, key):
                setattr(cls, key, default)
        cls.__annotations__ = own
        for key, default in _COMMON.items():
            if not hasattr(cls, key):
                setattr(cls, key, default)
        return _enter("policy", name, cls)

    return register


def offload(name: str) -> Callable[[type], type]:
    """Class decorator: register an offload policy (where victims go) under `name`.

    Raises PolicyError for a class without `place`, or with a public method that takes a view and is no hook: the engine
    would never call it.
    """

    def register(cls: type) -> type:
        if not callable(getattr(cls, "place", None)):
            raise PolicyError(f'offload policy "{name}" has no place(view, victims)', where=_home(cls))
        for key, method in inspect.getmembers(cls, inspect.isfunction):
            if not key.startswith("_") and key not in _HOOKS and "view" in inspect.signature(method).parameters:
                hint = f"the hooks are {', '.join(_HOOKS)}; begin the name of a method of your own with _"
                raise PolicyError(
                    f'offload policy "{name}": the engine does not call {key}', where=_home(cls), hint=hint
                )
        for key, default in {"inclusive": True, "waits": False}.items():
            if not hasattr(cls, key):
                setattr(cls, key, default)
        return _enter("offload", name, cls)

    return register


def _enter(kind: str, name: str, cls: type) -> type:
    for key in inspect.get_annotations(cls):
        if not hasattr(cls, key):
            raise PolicyError(f'parameter "{key}" of {kind} "{name}" has no default', where=_home(cls))
    try:
        cls = dataclass(cls)
    except (TypeError, ValueError) as error:
        raise PolicyError(f'the parameters of {kind} "{name}" do not work: {error}', where=_home(cls)) from error
    own = _FILES.setdefault(cls.__module__, {}) if cls.__module__.startswith(_PLUGIN) else _TABLE
    held = own.get((kind, name))
    if held is not None and _home(held) != _home(cls):
        raise PolicyError(
            f'two {kind} classes are called "{name}"', where=_home(cls), hint=f"the other is {_home(held)}"
        )
    cls.spec_name = name  # type: ignore[attr-defined]
    own[kind, name] = cls
    return cls


def _home(cls: type) -> str:
    """Where a class is written: an edited file that is loaded again is the same home."""
    origin = getattr(sys.modules.get(cls.__module__), "__file__", None) if cls.__module__.startswith(_PLUGIN) else None
    return f"{origin or cls.__module__}:{cls.__qualname__}"


@dataclass(frozen=True)
class Spec:
    """A parsed spec string: what to load and with which parameters."""

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in self.parameters.items())
        return f"{self.name}({inner})" if inner else self.name


def parse_spec(text: str) -> Spec:
    """Read "name", "file.py", "file.py:Class" or any of them with (keyword=literal, ...). Parsed, never evaluated."""
    text = text.strip()
    head, bracket, _ = text.partition("(")
    if not bracket:
        return Spec(text)
    try:
        call = ast.parse("f" + text[len(head) :], mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        parameters = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        if None in (k.arg for k in call.keywords) or len(parameters) < len(call.keywords):  # **x, or one given twice
            raise ValueError
        return Spec(head.strip(), parameters)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise PolicyError(
            f'cannot read "{text}"', hint='write it like "h2o(recent=64)": keyword=literal, ...'
        ) from None


def build(text: str, kind: str = "policy") -> Any:
    """A fresh policy object from a spec string.

    Raises PolicyError for an unknown name, a file that does not import, or a parameter it does not have.
    """
    spec = parse_spec(text)
    cls = find(spec.name, kind)
    known = [f.name for f in fields(cls)]
    for key in spec.parameters:
        if key not in known:
            raise PolicyError(
                f'{kind} "{spec.name}" has no parameter "{key}"', where=text, hint=f"it has {', '.join(known)}"
            )
    try:
        made = cls(**spec.parameters)
    except (TypeError, ValueError) as error:
        raise PolicyError(f'{kind} "{spec.name}" refused its parameters: {error}', where=text) from error
    if kind == "policy" and (wrong := _wrong(made)):
        what, hint = wrong
        raise PolicyError(f'policy "{spec.name}": {what}', where=_home(cls), hint=hint)
    return made


def _wrong(policy: Any) -> tuple[str, str] | None:
    """The first attribute that the engine cannot use, and what would be right."""
    for name, good in _CHOICES.items():
        if getattr(policy, name) not in good:
            return f"{name} is {getattr(policy, name)!r}", f"write one of {', '.join(good)}"
    for name in ("batch", "lag"):
        value = getattr(policy, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            return f"{name} is {value!r}", "write a whole number from 1"
    if isinstance(policy.regimes, str) or not policy.regimes or not set(policy.regimes) <= {*_REGIMES}:
        return f"regimes is {policy.regimes!r}", 'write a tuple of names, such as ("lossy",)'
    if not isinstance(policy.needs, (set, frozenset)) or not all(isinstance(name, str) for name in policy.needs):
        return f"needs is {policy.needs!r}", 'write a set of names, such as {"colsum"}'
    if not isinstance(policy.columns, dict):
        return f"columns is {policy.columns!r}", 'write names and NumPy types, such as {"heat": np.float32}'
    for name, dtype in policy.columns.items():
        if name in _TAKEN:
            return f'column "{name}" has the name of one of the engine\'s', f"choose another than {', '.join(_TAKEN)}"
        if not _is_number(dtype):
            return f'column "{name}" is not of a NumPy type of numbers but {dtype!r}', "np.float32, say"
    return None


def _is_number(dtype: Any) -> bool:
    import numpy as np

    try:
        return dtype is not None and np.dtype(dtype).base.kind in "biuf"
    except (TypeError, ValueError):
        return False


def find(name: str, kind: str = "policy") -> type:
    """The class behind a registered name, a module or a file (optionally ":Class")."""
    path, _, attribute = name.partition(":")
    if path.endswith(".py"):
        module = load_file(Path(path))
        return _from_module(module, attribute, kind, name)
    load_all()
    if (kind, name) in _TABLE:
        return _TABLE[kind, name]
    if attribute or "." in path:
        return _from_module(_import(path), attribute, kind, name)
    listing = "`kvsim list policies`" if kind == "policy" else "`kvsim list offload`"
    raise PolicyError(f'unknown {kind} "{name}"', hint=nearest(name, names(kind), listing))


def names(kind: str = "policy") -> list[str]:
    """All registered names, sorted."""
    load_all()
    return sorted(n for k, n in _TABLE if k == kind)


def load_all() -> None:
    """Import the built-in policies and the installed plug-ins; a second call does nothing.

    A plug-in that does not import is named in a warning and left out.
    """
    if "built-in" not in _LOADED:
        built_in = importlib.import_module("kvsim.policies")
        for module in pkgutil.iter_modules(built_in.__path__):
            importlib.import_module(f"kvsim.policies.{module.name}")
        _LOADED.add("built-in")
    if "plugins" not in _LOADED:
        _LOADED.add("plugins")
        from importlib.metadata import entry_points

        for entry in entry_points(group="kvsim.plugins"):
            try:
                _import(entry.module)
            except PolicyError as error:
                warnings.warn(f'plug-in "{entry.name}" is left out: {error}', stacklevel=2)


_LOADED: set[str] = set()


@contextmanager
def reading(texts: dict[Path, bytes]) -> Iterator[None]:
    """Within it a file that a policy comes from or reads is read once, into `texts`, and stays what it was then: a run
    is of what it began with, whatever is saved meanwhile."""
    before = _TEXTS.set(texts)
    try:
        yield
    finally:
        _TEXTS.reset(before)


def texts() -> dict[Path, bytes]:
    """Of the `reading` that we are in; without one, none yet."""
    known = _TEXTS.get()
    return {} if known is None else known


def read(path: str | Path) -> bytes:
    """A file's content, as of the `reading` that we are in: what a policy reads its `files` with. Raises OSError."""
    known, place = texts(), _place(path)
    if place not in known:
        known[place] = Path(path).read_bytes()
    return known[place]


def _place(path: str | Path) -> Path:
    """As `resolve`, which gives up on links that go in a circle: reading them says what is wrong."""
    return Path(os.path.realpath(path))


def load_file(path: Path) -> ModuleType:
    """Import a user's file under a name made of its content, so that an edited file is a new module."""
    place = _place(path)
    if place not in texts() and not path.is_file():
        raise PolicyError(f'no file "{path}"', hint="give the path of a .py file that uses @policy")
    text = read(path)
    name = _PLUGIN + hashlib.sha256(str(place).encode() + text).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:  # not its loader, which reads the file again, or bytecode of another text that is as long and as old
        exec(compile(text, str(module.__file__), "exec", dont_inherit=True), vars(module))
        _SOURCES[name] = importlib.util.decode_source(text)
    except PolicyError:
        del sys.modules[name]
        raise
    except Exception as error:
        del sys.modules[name]
        raise PolicyError(f"the file does not import: {type(error).__name__}: {error}", where=str(path)) from error
    return module


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except PolicyError:
        raise
    except Exception as error:
        raise PolicyError(f'cannot import "{name}": {type(error).__name__}: {error}') from error


def _from_module(module: ModuleType, attribute: str, kind: str, name: str) -> type:
    table = _FILES.get(module.__name__, {}) if module.__name__.startswith(_PLUGIN) else _TABLE
    registered = [c for (k, _), c in table.items() if k == kind and c.__module__ == module.__name__]
    if attribute:
        cls = getattr(module, attribute, None)
        if cls in registered:
            return cls
        raise PolicyError(f'"{name}" is not a registered {kind}', hint=f"decorate the class with @{kind}(...)")
    if len(registered) == 1:
        return registered[0]
    found = ", ".join(c.__name__ for c in registered) or "none"
    raise PolicyError(
        f'"{name}" holds {len(registered)} {kind} classes ({found})',
        hint="name one: file.py:Class" if registered else f"decorate a class with @{kind}(...)",
    )


def source_hash(instance: Any) -> str:
    """Part of a run's identity: SHA-256 of the class's module source, the policies it wraps and the files it reads (as
    of the `reading` that we are in)."""
    module = type(instance).__module__
    source = _SOURCES[module] if module in _SOURCES else inspect.getsource(sys.modules[module])
    digest = hashlib.sha256(source.encode())
    for inner in getattr(instance, "wraps", ()):
        digest.update(source_hash(inner).encode())
    for path in getattr(instance, "files", ()):
        digest.update(read(path))
    return digest.hexdigest()
