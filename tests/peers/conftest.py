"""What the tests against other implementations agreed on, as the tables of docs/peers.md.

A test adds a line to a table with the fixture `agreement`; `pytest tests/peers --tables docs/peers.md` rewrites what
stands between `<!-- begin NAME -->` and `<!-- end NAME -->` of that page: every table, or none and exit status 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

_TABLES: dict[str, list[dict[str, object]]] = {}


def pytest_addoption(parser):
    parser.addoption("--tables", help="rewrite the tables of this page from what the tests measured")


@pytest.fixture
def agreement() -> Callable[..., None]:
    """`agreement(table, **columns)` adds a line: what agrees to PEER, what differs to "PEER differs"."""

    def add(table: str, **columns: object) -> None:
        _TABLES.setdefault(table, []).append(columns)

    return add


def pytest_sessionfinish(session, exitstatus):
    page, options = session.config.getoption("--tables", default=None), session.config.option
    if not page or exitstatus:
        return
    if (
        missing := ["some lines"]
        if options.keyword or "::" in "".join(options.file_or_dir)
        else write(Path(page), _TABLES)
    ):
        print(f"\n{page} is as it was: nothing was measured for {', '.join(missing)}")
        session.exitstatus = 1


def write(page: Path, tables: dict[str, list[dict[str, object]]]) -> list[str]:
    """Fill in every table of `page`; if it has other ones than `tables`, leave it and return their names."""
    text = page.read_text(encoding="utf-8")
    places = re.findall("<!-- begin (.+?) -->", text)
    if missing := sorted(({*places} ^ {*tables}) - {"versions", "summary"}):
        return missing
    tables = tables | {
        "versions": [{n: version(n) for n in ("kvpress", "transformers", "torch", "libcachesim", "numpy")}],
        "summary": [summary(peer, tables) for peer in ("kvpress", "transformers", "libcachesim")],
    }
    for name in places:
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        before, _, rest = text.partition(begin)
        text = before + begin + markdown(tables[name]) + end + rest.partition(end)[2]
    page.write_text(text, encoding="utf-8")
    return []


def summary(peer: str, tables: dict[str, list[dict]]) -> dict[str, object]:
    """How many lines and entries (of libcachesim, requests) agree, and how many differ."""
    same, other = tables[peer], tables.get(f"{peer} differs", [])
    return {
        "against": peer, "comparisons that agree": len(same), "entries compared": sum(x["compared"] for x in same),
        "that differ": len(other), "entries compared in these": sum(x["compared"] for x in other),
        "of which differ": sum(x["differ"] for x in other),
    }  # fmt: skip


def markdown(lines: list[dict[str, object]]) -> str:
    names = list(lines[0])
    rows = [names, ["---"] * len(names)]
    rows += [[f"{x:,}" if isinstance(x := line[n], int) else str(x) for n in names] for line in lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
