"""Numbers with units there and back, and errors that survive a worker process."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim import errors, units
from kvsim.errors import ConfigError, KvsimError, PolicyError, nearest


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (units.parse_bytes, "64GiB", 64 * 2**30),
        (units.parse_bytes, " 1.5 TB ", 1.5e12),
        (units.parse_bytes, "1_000kB", 1e6),
        (units.parse_bytes, "5e2B", 500),
        (units.parse_bytes, 4096, 4096),
        (units.parse_bandwidth, "25GB/s", 25e9),
        (units.parse_bandwidth, "1GiB/s", 2**30),
        (units.parse_bandwidth, 7, 7),
        (units.parse_seconds, "10us", 1e-5),
        (units.parse_seconds, "10µs", 1e-5),
        (units.parse_seconds, "2min", 120),
        (units.parse_seconds, ".5 ms", 5e-4),
        (units.parse_flops, "312TFLOP/s", 312e12),
    ],
)
def test_parse(parse, text, value):
    assert parse(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (units.parse_bytes, "64 giga"),
        (units.parse_bytes, "GiB"),
        (units.parse_bytes, "1 2 GB"),
        (units.parse_bytes, True),
        (units.parse_bytes, None),
        (units.parse_bytes, "25GB/s"),
        (units.parse_bytes, "-1GiB"),
        (units.parse_bytes, float("nan")),
        (units.parse_bytes, "1e999"),
        (units.parse_bandwidth, "25GB"),
        (units.parse_bandwidth, -1),
        (units.parse_seconds, "3 days"),
        (units.parse_flops, "1TiFLOP/s"),
    ],
)
def test_refuse(parse, text):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(text) in caught.value.what and "like" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20%", (0.2, "fraction")),
        ("512", (512, "pages")),
        (512, (512, "pages")),
        ("64 pages", (64, "pages")),
        ("4KiB", (4096, "bytes")),
    ],
)
def test_budget(text, value):
    assert units.parse_budget(text) == value


@pytest.mark.parametrize(
    "text", ["0", "-3", "0%", "1.5", "4GiB/s", "much", float("nan"), float("inf"), "-1GiB", "0B", ""]
)
def test_budgets_refused(text):
    with pytest.raises(ConfigError):
        units.parse_budget(text)


@given(st.floats(1e-9, 1e15))
def test_round_trips(value):
    """What is printed for a person reads back as the same number, to three digits."""
    assert units.parse_bytes(units.format_bytes(value)) == pytest.approx(value, rel=6e-3, abs=0.5)
    assert units.parse_bandwidth(units.format_bandwidth(value)) == pytest.approx(value, rel=6e-3, abs=0.5)
    assert units.parse_seconds(units.format_seconds(value)) == pytest.approx(value, rel=6e-3)


@given(st.floats(1, 9e14))
def test_sizes_read_like_sizes(value):
    for text in (units.format_bytes(value), units.format_bandwidth(value)):
        assert "e+" not in text


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (units.format_bytes(1536), "1.5 KiB"),
        (units.format_bytes(1023 * 1024), "0.999 MiB"),
        (units.format_bytes(12), "12 B"),
        (units.format_bandwidth(25e9), "25 GB/s"),
        (units.format_seconds(0.00123), "1.23 ms"),
        (units.format_seconds(0.9999), "1 s"),
        (units.format_seconds(0), "0 s"),
        (units.format_seconds(3e-9), "3 ns"),
    ],
)
def test_format(found, text):
    assert found == text


@pytest.mark.parametrize("kind", [KvsimError, ConfigError, PolicyError, errors.TraceError, errors.ResultError])
def test_errors_survive_pickling(kind):
    error = kind("what", where="where", hint="hint")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == "what\nin where\nhint"
    assert (again.what, again.where, again.hint) == ("what", "where", "hint")
    assert str(kind("only")) == "only"


def test_nearest():
    assert nearest("h20", ["h2o", "lru"], "`kvsim list`") == 'did you mean "h2o"? `kvsim list` shows all 2'
    assert nearest("zzz", ["h2o"], "`kvsim list`") == "`kvsim list` shows all 1"
