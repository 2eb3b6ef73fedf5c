"""Documents name what exists, and all of it."""

import re
from pathlib import Path

import pytest

import kvsim
from kvsim.machine.hardware import KINDS
from kvsim.results import TABLES

ROOT = Path(__file__).parent.parent


def _names(path):
    return set(re.findall(r"`([a-z0-9_.]+)`", (ROOT / path).read_text(encoding="utf-8")))


@pytest.mark.parametrize("table", TABLES)
def test_every_column_is_documented(table):
    section = (ROOT / "docs/results.md").read_text(encoding="utf-8").split(f"## {table}.parquet")[1].split("\n## ")[0]
    assert set(re.findall(r"`([a-z0-9_]+)`", section)) == set(TABLES[table])


def test_every_hardware_constant_is_documented():
    assert set(KINDS) <= _names("docs/hardware.md")


def test_what_the_documents_take_from_the_package_is_public():
    used = set()
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")]
    for page in [*pages, *(ROOT / "notebooks").glob("*.ipynb")]:
        text = page.read_text(encoding="utf-8")
        used |= set(re.findall(r"\bkvsim\.([A-Za-z_]+)(?=[(`])", text))
        for names in re.findall(r"from kvsim import ([\w, ]+)", text):
            used |= set(names.replace(" ", "").split(","))
    assert {"run", "sweep", "curve", "policy", "keep", "exp"} <= used <= set(kvsim.__all__)


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "experiments").glob("**/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists() or (ROOT / target).exists(), f"{page}: {target}"
