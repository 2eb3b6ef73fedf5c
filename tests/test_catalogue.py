"""What is said about policies is complete, and the page that says it is up to date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.policies.page import catalogue_text
from kvsim import registry
from kvsim.catalogue import EVIDENCE, FAMILIES, entries, entry
from kvsim.errors import PolicyError

PAPER = re.compile(r"arXiv \d{4}\.\d{4,5}|(?:NSDI|ACL|SOSP|FAST|VLDB|SIGMETRICS|HPL)[- ](?:\d{4}|\d\d-)")
SOURCE = re.compile(PAPER.pattern + r"|\b\w+\.(?:py|c|cpp)\b|\b\w+/\w+-\w+")
DOCS = Path(__file__).parents[1] / "docs"


def test_every_policy_is_listed_once_with_family_evidence_and_a_source():
    found = entries()
    assert sorted(e.name for e in found) == registry.names()
    for e in found:
        assert e.family in FAMILIES and e.evidence in EVIDENCE, e
        assert e.summary and set(e.regimes) <= {"lossy", "offload"}, e
        if e.evidence != "own":
            assert SOURCE.search(e.text), e.name
        if e.evidence in ("abs", "mem"):
            assert PAPER.search(e.text), e.name


def test_a_source_is_a_paper_with_its_year_or_a_file():
    for text in ("the k/v pairs of ACL", "Someone et al. say so", "keys, values and/or both", "arXiv says", "FAST."):
        assert not SOURCE.search(text), text


def test_an_entry():
    e = entry("h2o")
    assert (e.kind, e.decides, e.needs, e.evidence) == ("online", "head", (), "code")
    assert e.parameters["recent"] == "50%" and e.defaults == "recent='50%'"
    assert entry("belady").kind == "oracle" and entry("snapkv").kind == "once" and entry("quest").kind == "read set"
    with pytest.raises(PolicyError, match="h20"):
        entry("h20")


def test_the_page_lists_what_is_registered():
    text = (DOCS / "policies.md").read_text(encoding="utf-8")
    assert catalogue_text() in text, "python -m experiments.policies.page rewrites it"
