"""A policy's own text, compiled: `observe` and `score` where what they say of a page needs that page alone.

Where they do, they join the pass over memory that looks up the weights (`kernels.touch_lane`), lane by lane. Whatever
is compiled, columns that no hook's text mentions are not kept up to date.

A policy is NumPy text over whole columns. Where it is elementwise (arithmetic, comparisons, `np.where`, casts over
columns, scalars of the view and the policy's parameters), the same text is one loop over the slots, which needs no
array in between and no second pass for the victims. Nothing has to be declared: what is not elementwise, or could
differ in its last bit, such as `np.exp` (but not `kvsim.exp`), or could change while it runs, such as a module's
variable, runs as it is written. Types go by NumPy's own rules, operation by operation, so both ways decide the same;
tests compare them.

The loops are modules beside numba's cache of the kernels, named after what is in them, so they are compiled once.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np

import kvsim
from kvsim.cache import elementwise, kernels

LOADING, COMPILING = 5e7, 1e9  # slots times steps from which a loop pays: loading it, and making it

_COLUMNS: dict[str, np.dtype] = {name: np.dtype(np.int32) for name in ("key", "born", "arrived", "last", "uses")}
_COLUMNS |= {name: np.dtype(np.float32) for name in ("mass", "weights")}
_LARGEST = 2**28  # of Python's whole numbers: a sum of a few of them fits in 32 bits, as those of the view do
_SCALARS = ("now", "keys", "tokens", "newest", "page_size")
_UFUNCS: dict[type, tuple[np.ufunc, str]] = {
    ast.Add: (np.add, "+"), ast.Sub: (np.subtract, "-"), ast.Mult: (np.multiply, "*"), ast.Div: (np.true_divide, "/"),
    ast.BitAnd: (np.bitwise_and, "&"), ast.BitOr: (np.bitwise_or, "|"), ast.BitXor: (np.bitwise_xor, "^"),
    ast.Lt: (np.less, "<"), ast.LtE: (np.less_equal, "<="), ast.Gt: (np.greater, ">"),
    ast.GtE: (np.greater_equal, ">="), ast.Eq: (np.equal, "=="), ast.NotEq: (np.not_equal, "!="),
}  # fmt: skip
_CHOICES = {np.maximum: "max", np.minimum: "min"}

_HOOKS = ("observe", "score", "select", "split")  # what a cache may ask in a decode step of the lossy regime
_LOOKS_ROUND = {"eval", "exec", "locals", "vars", "globals"}  # by which a text reaches what it does not name
_TOUCH = ", ".join(f"its_{n}" for n in list(inspect.signature(kernels.touch_lane.py_func).parameters)[4:])

_HEAD = '''"""Written by kvsim.cache.fused from {policy}."""
import numpy as np
from numba import njit
from kvsim.cache.elementwise import exp_of, single_of
from kvsim.cache.kernels import lowest, release_lane, spare, take_line, touch_lane
_JIT = {{"cache": True, "nogil": True, "boundscheck": False, "error_model": "numpy"}}
'''
_LOOP = """

@njit(**_JIT)
def _{hook}({out}{arguments}):
    for s in range(key.shape[0]):
{body}

@njit(**_JIT)
def {hook}s(begin, end, {out}{every}):
    for t in range(begin, end):
        _{hook}({out_lane}{lane})
"""
_VICTIMS = """

@njit(**_JIT)
def victims(begin, end, copies, bit, excess, head, tail, pinned, out, counts, {every}):
    order, score = np.empty(key.shape[1], np.int32), np.empty(key.shape[1], np.float32)
    for t in range(begin, end):
        counts[t] = 0
        if excess[t] > 0:
            {score}
            counts[t] = lowest({values}, key[t], copies[t], bit, head[t], tail[t], pinned, excess[t], order, out[t])
"""
_STEP = """

@njit(**_JIT)
def step(
    begin, end, columns, copies, free, free_count, new_key, due, budget, batch, head, tail, pinned, held, counts,
    {touch}, {every},
):
    slots = key.shape[1]
    scratch = spare(slots)
    order, out, score = np.empty(slots, np.int32), np.empty(slots, np.int32), np.empty(slots, np.float32)
    for t in range(begin, end):
        if new_key >= 0:
            s = take_line(t, key, copies, free, free_count, new_key)
            {start}
        held[t] = slots - free_count[t]
        touched = touch_lane(t, scratch, held[t], key, {touch})
        {observe}
        counts[t] = 0
        if due and held[t] > budget[t]:
            want = max(held[t] - budget[t], batch[t])
            {score}
            counts[t] = lowest({values}, key[t], copies[t], 0, head[t], tail[t], pinned, want, order, out)
            release_lane(t, key, copies, free, free_count, out, counts[t])
"""


class Refused(Exception):
    """The text is not elementwise, or its numbers might differ: in words."""


class Loop(NamedTuple):
    """One hook as a loop over the slots: its lines, and what it reads."""

    lines: tuple[str, ...]
    columns: tuple[str, ...]  # of the table, the policy's own ones in square brackets
    scalars: tuple[str, ...]  # of the view, then "self." and a parameter

    @property
    def column(self) -> str | None:
        """The column of the table that a score is, as it stands or as float32, if it is one."""
        same = re.fullmatch(r"score\[s\] = (\w+)\[s\]|score\[s\] = np.float32\((\w+)\[s\]\)", "\n".join(self.lines))
        name = (same[1] or same[2]) if same else None
        return name if name in _COLUMNS else None


class _Term(NamedTuple):
    """An expression for one slot; `kind` is a NumPy type, or `int` or `float` for a number of Python's."""

    code: str
    kind: Any


def translate(policy: Any, hook: str) -> Loop:
    """The loop of `score` or `observe`, in a decode step. Raises Refused for a text that has to stay NumPy's."""
    function = _method(policy, hook)
    if inspect.signature(function).parameters.keys() != {"self", "view"}:
        raise Refused(f"{hook} is not a function of self and view alone")
    return _Translator(policy, function.__globals__, hook).run(_text(function))


def columns_read(policy: Any) -> frozenset[str]:
    """The table's columns that the text of the policy's hooks mentions; all, where a hook hands its view on, or may."""
    found: set[str] = set()
    for hook in _HOOKS:
        if not callable(getattr(policy, hook, None)):
            continue
        try:
            tree = _text(_method(policy, hook))
        except Refused:
            return frozenset(_COLUMNS)
        a = tree.args
        if len(a.args) != 2 or a.posonlyargs or a.vararg or a.kwonlyargs or a.kwarg:
            return frozenset(_COLUMNS)
        view, nodes = a.args[1].arg, list(ast.walk(tree))
        alone = {id(n) for n in nodes if isinstance(n, ast.Name) and n.id == view}
        for node in nodes:
            if isinstance(node, (ast.Attribute, ast.Subscript)) and id(node.value) in alone:
                alone.remove(id(node.value))
                found.add(node.attr if isinstance(node, ast.Attribute) else "")
        names = {n.id if isinstance(n, ast.Name) else n.attr for n in nodes if isinstance(n, (ast.Name, ast.Attribute))}
        if alone or names & _LOOKS_ROUND or any(n.startswith("__") for n in names) or any(n[:1] == "_" for n in found):
            return frozenset(_COLUMNS)
    return frozenset(found & _COLUMNS.keys())


def _method(policy: Any, hook: str) -> FunctionType:
    function: Any = inspect.getattr_static(policy, hook, None)
    if function is None or not inspect.isfunction(function) or hook in vars(policy):
        raise Refused(f"{hook} is not a plain method")
    if function.__closure__:
        raise Refused(f"{hook} is made in a function")
    return function


@cache
def _text(function: FunctionType) -> ast.FunctionDef:
    """The text of a function that compiles to what runs: its file may have been edited since it was imported."""
    code = function.__code__
    try:
        text = "".join(inspect.findsource(function)[0])  # whole: what a call compiles to depends on the imports
        found = code in _codes(compile(text, code.co_filename, "exec", dont_inherit=True))
    except (OSError, TypeError, SyntaxError, ValueError):
        raise Refused(f"the text of {function.__name__} is not to be had") from None
    if not found:
        raise Refused(f"the text of {function.__name__} is not what runs")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and (node.lineno, node.name) == (code.co_firstlineno, code.co_name):
            return node  # a decorator would be on a line before
    raise Refused(f"{function.__name__} is not a plain method")


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


class _Translator:
    """Walks the text of one hook; every `_on_` method is a form that it knows, anything else is refused."""

    def __init__(self, policy: Any, module: Mapping[str, Any], hook: str):
        self.policy, self.module, self.hook = policy, module, hook
        self.private = {n: np.dtype(d) for n, d in policy.columns.items()}
        self.names: dict[str, _Term] = {}
        self.columns: dict[str, None] = {"key": None}
        self.scalars: dict[str, None] = {"now": None}
        self.lines: list[str] = []
        self.written: dict[str, None] = {}

    def run(self, tree: ast.FunctionDef) -> Loop:
        ended = self._block(tree.body)
        if self.hook == "score" and not ended:
            raise Refused("score may end without a return")
        lines = self.lines
        for column in self.written:  # read once and written once, and always: a store that may be left out is slow
            held = f"of_{column[:-3]}"
            inside = (re.sub(rf"\b{re.escape(column)}", held, line) for line in lines)
            lines = [f"{held} = {column}", *inside, f"{column} = {held}"]
        return Loop(tuple(lines), tuple(self.columns), tuple(self.scalars))

    # -- statements --------------------------------------------------------------------------------------------

    def _block(self, body: list[ast.stmt]) -> bool:
        """Did it return?"""
        return any(self._statement(node) for node in body)

    def _statement(self, node: ast.stmt) -> bool:
        match node:
            case ast.Expr(ast.Constant()):  # a docstring
                return False
            case ast.Return(None) if self.hook == "observe":
                return True
            case ast.Return(ast.expr() as value) if self.hook == "score":
                term = self.value(value)
                double = term.kind in (float, np.float64)  # which may be more than float32 holds
                single = f"single_of({term.code})" if double else _cast(term, np.dtype(np.float32))
                self.lines.append(f"score[s] = {single}")
                return True
            case ast.If():
                return self._block(node.body if self._static(node.test) else node.orelse)
            case ast.With() if all(self._is_silent(i.context_expr) for i in node.items):
                return self._block(node.body)
            case ast.Assign([ast.Tuple(targets)], ast.Tuple(values)) if len(targets) == len(values):
                terms = [self.value(v) for v in values]
                for target, term in zip(targets, terms, strict=True):
                    self._bind(target, term)
            case ast.Assign([target], value):
                self._assign(target, value)
            case ast.AugAssign(target, op, value):
                whole = target.value if isinstance(target, ast.Subscript) and _everything(target) else target
                if isinstance(whole, ast.Subscript) and whole is target:  # a view takes no items
                    raise self._refuse(node)
                before = self._column(whole)
                self._store(before, self._binary(op, before, self.value(value)), same_kind=True)
            case ast.Expr(ast.Call(_, [a, b], [ast.keyword("out", out)]) as call) if self._callee(call) in _CHOICES:
                self._store(self._column(out), self._choice(self._callee(call), a, b), same_kind=True)
            case _:
                raise self._refuse(node)
        return False

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if not isinstance(target, ast.Subscript):
            self._bind(target, self.value(value))
            return
        column, term = self._column(target.value), self.value(value)
        if not _everything(target):
            mask = self.value(target.slice)
            if mask.kind != np.bool_ or re.search(r"\[s\]|\bx\d+\b", term.code):  # NumPy takes one number here
                raise self._refuse(target)
            term = _Term(f"({_cast(term, column.kind)} if {mask.code} else {column.code})", column.kind)
        self._store(column, term)

    def _bind(self, target: ast.expr, term: _Term) -> None:
        if not isinstance(target, ast.Name):
            raise self._refuse(target)
        if not _is_column(term):  # a column's name stays that column; what is computed is computed here
            name = f"x{len(self.lines)}"
            self.lines.append(f"{name} = {term.code}")
            term = _Term(name, term.kind)
        self.names[target.id] = term

    def _store(self, column: _Term, term: _Term, same_kind: bool = False) -> None:
        if same_kind and not isinstance(term.kind, type) and not np.can_cast(term.kind, column.kind, "same_kind"):
            raise Refused(f"NumPy refuses to write {term.kind} into {column.kind} in place")
        self.written[column.code] = None
        self.lines.append(f"{column.code} = {_cast(term, column.kind)}")

    def _column(self, node: ast.expr) -> _Term:
        """A private column, which may be written."""
        term = self.value(node)
        if self.hook == "score" or not (term.code.startswith("own_") and _is_column(term)):
            raise self._refuse(node)
        return term

    def _static(self, node: ast.expr) -> bool:
        """A test that is the same for all slots and all decode steps: of `now` against 0, or of parameters."""
        match node:
            case ast.Attribute(ast.Name("view"), "now"):
                return True
            case ast.Compare(ast.Attribute(ast.Name("view"), "now"), [ast.Eq() | ast.NotEq() | ast.Gt() as op],
                             [ast.Constant(0)]):  # fmt: skip
                return not isinstance(op, ast.Eq)
            case ast.Compare(ast.Attribute(ast.Name("self"), name), [ast.Eq() | ast.NotEq() as op],
                             [ast.Constant(str(value))]) if self._is_field(name):  # fmt: skip
                equal = getattr(self.policy, name) == value
                return bool(equal if isinstance(op, ast.Eq) else not equal)
        raise self._refuse(node)

    # -- expressions -------------------------------------------------------------------------------------------

    def value(self, node: ast.expr) -> _Term:
        match node:
            case ast.Constant(value):
                return self._number(value, node)
            case ast.Name(name) if name in self.names:
                return self.names[name]
            case ast.Attribute(ast.Name("view"), name) if name in _COLUMNS:
                self.columns[name] = None
                return _Term(f"{name}[s]", _COLUMNS[name])
            case ast.Attribute(ast.Name("view"), name) if name in _SCALARS:
                self.scalars[name] = None
                return _Term(name, int)
            case ast.Attribute(ast.Name("self"), name):
                return self._parameter(name, node)
            case ast.Subscript(ast.Name("view"), ast.Constant(str(name))) if name in self.private:
                kind = self.private[name]
                if kind.subdtype or kind.kind not in "biuf" or kind == "f2" or not kind.isnative:
                    raise self._refuse(node)
                if not re.fullmatch(r"\w+", name, re.ASCII):  # it is part of a name in the loop
                    raise self._refuse(node)
                self.columns[f"[{name}]"] = None
                return _Term(f"own_{name}[s]", kind)
            case ast.BinOp(left, op, right):
                return self._binary(op, self.value(left), self.value(right))
            case ast.Compare(left, [op], [right]):
                return self._binary(op, self.value(left), self.value(right))
            case ast.UnaryOp(ast.USub(), operand):
                term = self.value(operand)
                if not isinstance(term.kind, type) and term.kind.kind not in "if":
                    raise self._refuse(node)
                if term.kind == np.int64:
                    return _typed(f"(np.uint64(0) - np.uint64({term.code}))", term.kind)
                return _typed(f"-{term.code}", term.kind)
            case ast.UnaryOp(ast.Invert(), operand) if (term := self.value(operand)).kind == np.bool_:
                return _Term(f"(not {term.code})", term.kind)
            case ast.Call(ast.Attribute(value, "astype"), [kind], []):
                return self._convert(self.value(value), self._type(kind), node)
            case ast.Call(_, arguments, []) as call:
                callee = self._callee(call)
                if callee is elementwise.exp and len(arguments) == 1:
                    single = np.dtype(np.float32)
                    return _Term(f"exp_of({_cast(self.value(arguments[0]), single)})", single)
                if callee is np.where and len(arguments) == 3:
                    return self._where(*(self.value(a) for a in arguments))
                if callee in _CHOICES and len(arguments) == 2:
                    return self._choice(callee, *arguments)
                if isinstance(callee, type) and issubclass(callee, np.generic) and len(arguments) == 1:
                    if isinstance(arguments[0], ast.Constant) and type(arguments[0].value) in (int, float):
                        return self._number(callee(arguments[0].value), node)
                    term = self.value(arguments[0])  # of its own type it is the same array, not a copy
                    return term if term.kind == np.dtype(callee) else self._convert(term, np.dtype(callee), node)
        raise self._refuse(node)

    def _number(self, value: Any, node: ast.AST) -> _Term:
        if isinstance(value, np.generic) and value.dtype.kind in "biuf" and value.dtype != np.float16:
            return (
                _typed(repr(value.item()), value.dtype) if np.isfinite(value) else _Term(_special(value), value.dtype)
            )
        if type(value) is float:
            return _Term(repr(value) if np.isfinite(value) else _special(value), float)
        if type(value) is int and abs(value) < _LARGEST:
            return _Term(repr(value), int)
        raise self._refuse(node)

    def _parameter(self, name: str, node: ast.AST) -> _Term:
        value = getattr(self.policy, name, None)
        if (
            type(value) not in (int, float)
            or not self._is_field(name)
            or (type(value) is int and abs(value) >= _LARGEST)
        ):
            raise self._refuse(node)
        self.scalars[f"self.{name}"] = None
        return _Term(f"self_{name}", type(value))

    def _is_field(self, name: str) -> bool:
        return name in getattr(self.policy, "__dataclass_fields__", {})

    def _binary(self, op: ast.AST, left: _Term, right: _Term) -> _Term:
        if type(op) not in _UFUNCS:
            raise self._refuse(op)
        ufunc, sign = _UFUNCS[type(op)]
        if isinstance(left.kind, type) and isinstance(right.kind, type):  # Python's own arithmetic
            if isinstance(op, (ast.Add, ast.Sub, ast.Div)):  # whose whole numbers stay small
                kind = float if float in (left.kind, right.kind) or isinstance(op, ast.Div) else int
                return _Term(f"({left.code} {sign} {right.code})", kind)
            raise self._refuse(op)
        try:
            one, two, result = ufunc.resolve_dtypes((left.kind, right.kind, None))
        except TypeError:
            raise self._refuse(op) from None
        if one == np.bool_ and isinstance(op, (ast.Add, ast.Mult)):
            raise self._refuse(op)
        a, b = _cast(left, one), _cast(right, two)
        if result == np.int64 and isinstance(op, (ast.Add, ast.Sub, ast.Mult)):  # which may overflow, as only these may
            a, b = f"np.uint64({a})", f"np.uint64({b})"
        code = f"({a} {sign} {b})"
        return _Term(code, result) if result == np.bool_ else _typed(code, result)

    def _choice(self, callee: Any, left: ast.expr, right: ast.expr) -> _Term:
        a, b = self.value(left), self.value(right)
        one, two, result = callee.resolve_dtypes((a.kind, b.kind, None))
        if isinstance(a.kind, type) and isinstance(b.kind, type):
            raise self._refuse(left)
        if result.kind not in "iu":  # which zero is the larger one depends on the processor
            raise self._refuse(left)
        return _typed(f"{_CHOICES[callee]}({_cast(a, one)}, {_cast(b, two)})", result)

    def _where(self, test: _Term, left: _Term, right: _Term) -> _Term:
        if test.kind != np.bool_:
            raise Refused("np.where with a condition that is not a bool")
        weak = [k() if isinstance(k, type) else k for k in (left.kind, right.kind)]
        kind = np.result_type(*weak)
        return _Term(f"({_cast(left, kind)} if {test.code} else {_cast(right, kind)})", kind)

    def _convert(self, term: _Term, kind: np.dtype, node: ast.AST) -> _Term:
        if kind.kind not in "biuf" or kind == np.float16:
            raise self._refuse(node)
        return _Term(f"({_cast(term, kind)})", kind)  # in brackets: a copy, which keeps its value if the column changes

    def _type(self, node: ast.expr) -> np.dtype:
        found = self._constant(node)
        if isinstance(found, type) and issubclass(found, np.generic):
            return np.dtype(found)
        raise self._refuse(node)

    def _is_silent(self, node: ast.expr) -> bool:
        """Is it `np.errstate` that ignores what it names?"""
        if not isinstance(node, ast.Call) or self._callee(node) is not np.errstate:
            return False
        given = [k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)]
        return not node.args and len(given) == len(node.keywords) and {*given} <= {"ignore"}

    def _callee(self, node: ast.AST) -> Any:
        return self._constant(node.func) if isinstance(node, ast.Call) else None

    def _constant(self, node: ast.expr) -> Any:
        """What a name such as `np.where` or `exp` is in the policy's module."""
        match node:
            case ast.Name(name) if name not in self.names and self.module.get(name) is elementwise.exp:
                return elementwise.exp
            case ast.Attribute(ast.Name(module), name) if self.module.get(module) is np and module not in self.names:
                return getattr(np, name, None)
            case ast.Attribute(ast.Name(module), "exp") if (
                self.module.get(module) is kvsim and module not in self.names
            ):
                return elementwise.exp
        return None

    def _refuse(self, node: ast.AST) -> Refused:
        text = ast.unparse(node) if isinstance(node, (ast.expr, ast.stmt)) else type(node).__name__
        return Refused(f"{self.hook}: {text}")


def _typed(code: str, kind: Any) -> _Term:
    """An operation's result: compiled code widens small integers, NumPy keeps them."""
    return _Term(code if isinstance(kind, type) else f"np.{kind.name}({code})", kind)


def _cast(term: _Term, kind: np.dtype) -> str:
    """The term as NumPy would convert it, where that is defined for every number."""
    if term.kind == kind:
        return term.code
    if term.kind is int and kind.kind in "iu" and kind not in (np.int32, np.int64):
        raise Refused(f"{term.code} as {kind} may overflow, which NumPy calls an error")
    real = term.kind is float or (not isinstance(term.kind, type) and term.kind.kind == "f")
    if (real and kind.kind != "f") or kind == np.bool_:
        raise Refused(f"{term.code} as {kind}: the result differs between processors")
    return f"np.{kind.name}({term.code})"


def _special(value: Any) -> str:
    code = "np.nan" if np.isnan(value) else "np.inf" if value > 0 else "-np.inf"
    return f"np.{value.dtype.name}({code})" if isinstance(value, np.generic) else code


def _is_column(term: _Term) -> bool:
    return term.code.endswith("[s]") and term.code[:-3].isidentifier()


def _everything(node: ast.Subscript) -> bool:
    """Is it `x[:]`?"""
    return isinstance(node.slice, ast.Slice) and node.slice.lower is node.slice.upper is node.slice.step is None


# -- loading -------------------------------------------------------------------------------------------------------


class Fused:
    """What is compiled of one policy: loops over lanes, None where the text stays NumPy's.

    `observes`, `scores`, `victims` (scores and chooses), and `step`, all that happens between two steps of the lossy
    regime: the new page, where `inserts` (all private columns are known to it), the touch, `observe`, and who leaves,
    where `chooses`. `kept`: columns that its hooks read; `kept_between`: those of them that must outlast a step where
    every hook is part of it; `score_column`: `Loop.column` of its score.
    """

    def __init__(self, policy: Any, loops: Mapping[str, Loop], module: ModuleType):
        self.policy, self.loops, self.kept = policy, loops, columns_read(policy)
        self.kept_between = self.kept - {"weights"}
        self.columns, self.scalars = _union(loops, 1), _union(loops, 2)
        names = ("observes", "scores", "victims", "step")
        self.observes, self.scores, self.victims, self.step = (getattr(module, name, None) for name in names)
        self.chooses = self.step is not None and "score" in loops
        self.score_column = loops["score"].column if "score" in loops else None
        self.inserts = self.step is not None and {f"[{name}]" for name in policy.columns} <= {*self.columns}

    def arguments(self, table: Any, view: Any) -> list[Any]:
        """What every loop reads, in its order."""
        columns = [table.private[n[1:-1]] if n[0] == "[" else getattr(table, n) for n in self.columns]
        return columns + [
            getattr(self.policy, n[5:]) if n.startswith("self.") else getattr(view, n) for n in self.scalars
        ]

    def ask(self, view: Any, hook: str) -> None:
        """The view takes note, as if the text of `hook` had asked."""
        view.asked.update(self.loops[hook].columns if hook in self.loops else ())


def fuse(policy: Any, work: float) -> Fused | None:
    """The compiled hooks of a policy, or None where none is elementwise, or `work` (slots times steps) is too little.

    Both ways decide the same, so it does not matter when this says yes.
    """
    if work < LOADING:
        return None
    while getattr(policy, "passes_on", False):
        policy = policy.policy
    loops = {}
    for hook in ("observe", "score"):
        try:
            loops[hook] = translate(policy, hook)
        except Refused:
            continue
    if not loops:
        return None
    text = _module(policy, loops)
    module = _load(f"fused_{hashlib.sha256((text + _kernels()).encode()).hexdigest()[:20]}", text)
    if work < COMPILING and not _compiled(module):
        return None
    return Fused(policy, loops, module)


def _union(loops: Mapping[str, Loop], field: int) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for loop in loops.values() for name in loop[field]))


def _module(policy: Any, loops: Mapping[str, Loop]) -> str:
    text = _HEAD.format(policy=type(policy).__qualname__)  # of any file: the same text is compiled once
    every = _arguments(_union(loops, 1), _union(loops, 2))
    lane = {hook: _arguments(loop.columns, loop.scalars, "[t]") for hook, loop in loops.items()}
    for hook, loop in loops.items():
        text += _LOOP.format(
            hook=hook,
            arguments=_arguments(loop.columns, loop.scalars),
            every=every,
            lane=lane[hook],
            out="score, " if hook == "score" else "",
            out_lane="score[t], " if hook == "score" else "",
            body=textwrap.indent("\n".join(loop.lines) or "pass", " " * 8),
        )
    score, values = "pass", "score"
    if "score" in loops:
        if loops["score"].column:
            values = f"{loops['score'].column}[t]"
        else:
            score = f"_score(score, {lane['score']})"
        text += _VICTIMS.format(every=every, score=score, values=values)
    if "observe" in loops or not callable(getattr(policy, "observe", None)):
        observe = f"_observe({lane['observe']})" if "observe" in loops else ""
        observe, score, values = (re.sub(r"\bweights\[t\]", "touched", code) for code in (observe, score, values))
        read = columns_read(policy)
        start = [f"columns[{i}, t, s] = {'now' if i < 4 else 0}" for i, n in enumerate(_COLUMNS) if i and n in read]
        start += [f"own_{n[1:-1]}[t, s] = 0" for n in _union(loops, 1) if n[0] == "["]
        text += _STEP.format(
            every=every,
            touch=_TOUCH,
            start="\n            ".join(start),
            observe=observe,
            score=score,
            values=values,
        )
    return text


def _arguments(columns: Iterable[str], scalars: Iterable[str], lane: str = "") -> str:
    arrays = [f"{n if n[0] != '[' else f'own_{n[1:-1]}'}{lane}" for n in columns]
    return ", ".join([*arrays, *(n.replace(".", "_") for n in scalars)])


@cache
def _kernels() -> str:
    """The text of what the loops call, which numba does not look at when it finds them in its cache."""
    return inspect.getsource(kernels) + inspect.getsource(elementwise)


def _compiled(module: ModuleType) -> bool:
    """Are its loops compiled already, or some of them, in this process or in numba's cache on disk?"""
    loop = getattr(module, "scores", None) or module.observes
    return bool(loop.signatures) or any(Path(loop.stats.cache_path).glob(f"{module.__name__}.*.nbi"))


def _load(name: str, text: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    path = Path(kernels.touch.stats.cache_path) / f"{name}.py"
    if not path.exists():  # numba looks at a file's date: it is written once
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
