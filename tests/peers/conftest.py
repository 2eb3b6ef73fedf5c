"""What the tests against other implementations agreed on, as the tables of docs/peers.md.

A test adds a line to a table with the fixture `agreement`; `pytest tests/peers --tables docs/peers.md` rewrites what
stands between `<!-- begin NAME -->` and `<!-- end NAME -->` of that page.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

_TABLES: dict[str, list[dict[str, object]]] = {}


def pytest_addoption(parser):
    parser.addoption("--tables", help="rewrite the tables of this page from what the tests measured")


@pytest.fixture
def agreement() -> Callable[..., None]:
    """`agreement(table, **columns)` adds a line."""

    def add(table: str, **columns: object) -> None:
        _TABLES.setdefault(table, []).append(columns)

    return add


def pytest_sessionfinish(session, exitstatus):
    page = session.config.getoption("--tables", default=None)
    if page and exitstatus == 0 and not session.config.option.keyword:  # all of a table or none
        write(
            Path(page), _TABLES | {"versions": [_versions("kvpress", "transformers", "torch", "libcachesim", "numpy")]}
        )


def _versions(*names: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "-"
    return found


def write(page: Path, tables: dict[str, list[dict[str, object]]]) -> None:
    text = page.read_text(encoding="utf-8")
    for name, lines in tables.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        before, found, rest = text.partition(begin)
        if not found:
            raise ValueError(f'{page} has no place for the table "{name}"')
        text = before + begin + markdown(lines) + end + rest.partition(end)[2]
    page.write_text(text, encoding="utf-8")


def markdown(lines: list[dict[str, object]]) -> str:
    names = list(lines[0])
    rows = [names, ["---"] * len(names), *([str(line[n]) for n in names] for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
