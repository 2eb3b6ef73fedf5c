"""Prompt rows that are made as they are asked for: the same numbers as dense ones, and little of them at a time."""

from __future__ import annotations

import weakref
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from kvsim.errors import TraceError
from kvsim.testing import tiny_trace
from kvsim.trace import layout, open_trace, pack, reader
from kvsim.trace.access import POOLS
from kvsim.trace.check import check
from kvsim.trace.export import save
from kvsim.trace.files import group_steps
from kvsim.trace.prompt_rows import Rows
from tests.helpers import policy_for, replay
from tests.trace.conftest import rewrite

PARTS = (
    0, -1, np.int64(3), slice(None), slice(-3, None), slice(4, 2), slice(1, 9, 3), slice(None, None, -1), ...,
    (2, 1), (-1, 1, slice(None), slice(2, 5)), (slice(2, 4), ..., slice(1, 6)), (slice(None), 0, 1), (..., 3),
    (slice(0, 0), ..., slice(1, 4)),
)  # fmt: skip


@pytest.fixture
def many_groups(tmp_path, monkeypatch):
    """A trace in row groups of few steps, and the prompt rows it was made of."""
    for module in (layout, pack):
        monkeypatch.setattr(module, "GROUP_BYTES", 3000)
    monkeypatch.setattr("kvsim.trace.format.GROUP_BYTES", 3000)
    memory = tiny_trace(seed=4, prompt=40, steps=6)
    save(memory, tmp_path / "many.kvtrace", lossless=True)
    return open_trace(tmp_path / "many.kvtrace"), memory.sources[0]._prompt


@pytest.fixture
def opened(monkeypatch):
    """Row groups: all that were opened, and those still held when each was."""
    live, held = weakref.WeakSet(), []

    class Counted(reader.Group):
        def __init__(self, *args):
            super().__init__(*args)
            live.add(self)
            held.append(len(live))

    monkeypatch.setattr(reader, "Group", Counted)
    return live, held


def groups(trace) -> tuple[int, int]:
    """Row groups with prompt rows and with decode steps of the first request."""
    path = trace.sources[0].path / "attn-0.parquet"
    spans = group_steps(pq.ParquetFile(path), path)
    return sum(first < 0 for first, _ in spans), sum(last > 0 for _, last in spans)


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_rows_read_like_an_array(part):
    dense = np.random.default_rng(0).random((11, 2, 3, 7), np.float32)
    rows = Rows(dense.__getitem__, dense.shape)
    np.testing.assert_array_equal(rows[part], dense[part])
    assert rows[part].dtype == np.float32 and rows[part].shape == dense[part].shape
    assert rows.shape == np.asarray(rows).shape and len(rows) == 11 and not rows[part].flags.writeable


def test_rows_end():
    rows = Rows(np.zeros((2, 1, 1, 3), np.float32).__getitem__, (2, 1, 1, 3))
    assert [row.shape for row in rows] == [(1, 1, 3)] * 2
    for wrong in (2, -3):
        with pytest.raises(IndexError):
            rows[wrong]
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 1


def test_a_row_is_made_once_while_it_is_the_latest():
    made = []

    def make(i):
        made.append(i)
        return np.full((1, 1, 2), i, np.float32)

    rows = Rows(make, (4, 1, 1, 2))
    twice = Rows(lambda i: 2 * rows[i], rows.shape)
    for a, b in zip(rows, twice, strict=True):
        np.testing.assert_array_equal(2 * a, b)
    assert made == [0, 1, 2, 3]
    assert rows[1:3].sum() == 6 and rows[2].sum() == 4 and made[4:] == [1, 2]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("windows", [(), (9, 0)])
def test_a_view_of_stored_rows_is_that_of_dense_ones(tmp_path, pool, size, windows):
    memory = tiny_trace(seed=2, prompt=23, steps=2, windows=windows)
    save(memory, tmp_path / "t.kvtrace", lossless=True)
    dense = memory.sources[0]._prompt
    pooled = {"head": dense, "layer": dense.mean(2, keepdims=True), "token": dense.mean((1, 2), keepdims=True)}[pool]
    starts = np.arange(0, 23, size)
    for trace in (memory, open_trace(tmp_path / "t.kvtrace")):
        a = next(trace.paged(size).pooled(pool).requests()[0].accesses())
        np.testing.assert_array_equal(a.prompt.rows, np.add.reduceat(pooled, starts, axis=-1))
        np.testing.assert_array_equal(a.prompt.peaks, np.maximum.reduceat(pooled, starts, axis=-1))
        np.testing.assert_array_equal(a.row[..., : len(starts)], a.prompt.rows[-1])


def test_rows_in_memory_are_not_copied():
    trace = tiny_trace()
    prompt = next(trace.requests()[0].accesses()).prompt
    assert prompt.rows is trace.sources[0]._prompt and prompt.peaks is prompt.rows


@pytest.mark.parametrize("granularity", ["head", "layer", "token"])
def test_a_policy_sees_read_only_rows_of_its_lanes(many_groups, granularity):
    trace, dense = many_groups
    seen, policy = [], policy_for("lru", granularity=granularity)
    policy.observe = lambda view: seen.append(view.prompt) if view.now == 0 else None
    replay(policy, 9, trace)
    axes = {"head": (), "layer": (2,), "token": (1, 2)}[granularity]
    np.testing.assert_array_equal(seen[0].rows, dense.mean(axes, keepdims=True) if axes else dense)
    np.testing.assert_array_equal(seen[0].peaks, dense)
    for rows in (seen[0].rows, seen[0].peaks):
        assert not rows[-1].flags.writeable and not rows[:].flags.writeable


@pytest.mark.parametrize("order", ["up", "down"])
def test_going_over_the_rows_opens_each_row_group_once_and_holds_one(many_groups, opened, order):
    trace, dense = many_groups
    rows, (live, held) = trace.sources[0].prompt().rows, opened
    count, _ = groups(trace)
    assert not held and count > 3  # nothing is decoded before it is asked for
    for i in range(40) if order == "up" else range(-1, -41, -1):
        np.testing.assert_array_equal(rows[i], dense[i])
    assert len(held) == count and max(held) == 1
    del rows
    assert not live


def test_after_prefill_nothing_of_the_prompt_is_held(many_groups, opened):
    trace, _ = many_groups
    rows = []
    for a in trace.requests()[0].accesses():
        if a.prefill:
            assert len(a.prompt.rows[:]) == 40 and len(opened[0]) == 1
            rows.append(weakref.ref(a.prompt.rows))
        if a.step == 2:
            assert rows[0]() is None and len(opened[0]) == 1


def test_a_run_opens_a_row_group_of_the_prompt_twice(many_groups, opened):
    """The last one for the row of prefill, all of them for the warm start, and all but the last going back."""
    trace, _ = many_groups
    prompt, decode = groups(trace)
    replay("keyformer", 9, trace)
    assert len(opened[1]) == 2 * prompt + decode and max(opened[1]) <= 2


def test_damage_in_the_keys_is_said_at_once_and_in_the_weights_when_they_are_met(whole):
    def damage(columns):
        columns["w32"][0] = columns["w32"][0][:-4]

    rewrite(whole, "attn-1.parquet", damage)
    prompt = open_trace(whole).sources[1].prompt()
    with pytest.raises(TraceError, match="step -24, layer 0: counts that disagree"):
        prompt.rows[0]
    assert any("counts that disagree" in problem for problem in check(whole))
    rewrite(whole, "attn-1.parquet", lambda c: c["kv_hi"].__setitem__(3, 999))
    with pytest.raises(TraceError, match="step -23, layer 1: kv_hi is not the end"):
        open_trace(whole).sources[1].prompt()


def test_a_trace_may_hold_fewer_rows_than_the_prompt_has(tmp_path):
    memory = tiny_trace(seed=1, prompt=12, steps=2)
    whole = memory.sources[0].prompt()
    memory.sources[0].prompt = lambda: replace(whole, rows=whole.rows[-5:], kv_lo=whole.kv_lo[-5:])
    save(memory, tmp_path / "few.kvtrace", lossless=True)
    source = open_trace(tmp_path / "few.kvtrace").sources[0]
    assert source.prompt().rows.shape == (5, 2, 2, 12) and source.prompt().kv_lo.shape == (5, 2)
    np.testing.assert_array_equal(source.prompt().rows, whole.rows[-5:])
    assert pq.ParquetFile(tmp_path / "few.kvtrace" / "attn-0.parquet").metadata.num_rows == 2 * (5 + 2)
