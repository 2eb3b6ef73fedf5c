"""The movement plan file: what goes in comes out, what is no plan is refused, and one is brought to another model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.errors import ResultError
from kvsim.plan import ACTIONS, COLUMNS, DROP, HOST, LOAD, SSD, STORE, Plan, PlanInfo, PlanWriter, mapped, read_plan

INFO = PlanInfo(
    trace="f" * 64,
    trace_name="toy",
    page_size=16,
    page_bytes=16 * 2 * 2 * 8 * 4,
    layers=2,
    kv_heads=2,
    head_dim=8,
    context=100,  # 7 pages
    steps=5,
    policy="lru",
    budget="50%",
)


def plan_of(*rows, info=INFO):
    columns = np.array(rows, np.int64).reshape(-1, 5).T
    return Plan(info, dict(zip(COLUMNS, columns, strict=True)))


def rows_of(plan):
    return list(zip(*(column.tolist() for column in plan.columns.values()), strict=True))


ROWS = [
    (1, 0, 2, HOST, LOAD),
    (1, 0, 2, HOST, DROP),
    (1, 1, 0, SSD, LOAD),
    (1, 1, 6, HOST, STORE),
    (4, 0, 1, HOST, LOAD),
]


def test_a_plan_survives_the_file(tmp_path):
    plan = plan_of(*ROWS)
    again = read_plan(plan.save(tmp_path / "a" / "plan.parquet"))
    assert rows_of(again) == ROWS
    assert again.info == INFO
    assert again.fingerprint == plan.fingerprint
    assert {name: column.dtype for name, column in again.columns.items()} == COLUMNS
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["plan.parquet"]


def test_the_file_is_what_the_format_says(tmp_path):
    schema = pq.read_schema(plan_of(*ROWS).save(tmp_path / "plan.parquet"))
    assert [str(schema.field(name).type) for name in COLUMNS] == [
        "int32", "int16", "int32", "int8", "dictionary<values=string, indices=int8, ordered=0>",
    ]  # fmt: skip
    meta = json.loads(schema.metadata[b"kvsim"])
    assert meta == {"format": "kvsim-plan", "version": "1.0", **asdict(INFO)}


def test_the_writer_sorts_each_step_and_takes_values_for_all(tmp_path):
    with PlanWriter(tmp_path / "plan.parquet", INFO) as writer:
        writer.add(1, np.array([1]), np.array([6]), HOST, "store")
        writer.add(1, np.array([0, 1]), np.array([2, 0]), np.array([HOST, SSD]), "load")
        writer.add(1, 0, 2, HOST, DROP)
        writer.add(2, np.empty(0, int), np.empty(0, int), HOST, "load")
        writer.add(4, 0, 1, HOST, np.array([LOAD]))
    assert rows_of(read_plan(tmp_path / "plan.parquet")) == ROWS


@given(st.sets(st.tuples(*(st.integers(0, n) for n in (4, 1, 6, 1, 2)))))
def test_any_set_of_moves_is_read_back_in_order(tmp_path_factory, moves):
    rows = sorted((s, layer, page, tier + 1, action) for s, layer, page, tier, action in moves)
    path = tmp_path_factory.mktemp("plan") / "plan.parquet"
    assert rows_of(read_plan(plan_of(*rows).save(path))) == rows


def test_a_failed_run_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError), PlanWriter(tmp_path / "plan.parquet", INFO) as writer:
        writer.add(0, 0, 0, HOST, "load")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((0, 2, 0, 1, 0), "layer 2 is outside of 0 ... 1"),
        ((0, 0, 7, 1, 0), "page 7 is outside of 0 ... 6"),
        ((0, 0, -1, 1, 0), "page -1 is outside"),
        ((5, 0, 0, 1, 0), "step 5 is outside of 0 ... 4"),
        ((0, 0, 0, 0, 0), "tier 0 is outside of 1 ... 2"),
        ((0, 0, 0, 1, 3), "action 3 is outside of 0 ... 2"),
    ],
)
def test_moves_outside_of_the_plan_are_refused(tmp_path, row, message):
    with pytest.raises(ResultError, match=message), PlanWriter(tmp_path / "p.parquet", INFO) as writer:
        writer.add(*row)
    with pytest.raises(ResultError, match=message):
        plan_of(row)


def test_order_and_repetition_are_checked(tmp_path):
    with pytest.raises(ResultError, match="out of order: step 1, layer 0, page 1"):
        plan_of((1, 0, 2, 1, 0), (1, 0, 1, 1, 0))
    with pytest.raises(ResultError, match="given twice: step 1, layer 0, page 2"):
        plan_of((1, 0, 2, 1, 0), (1, 0, 2, 1, 0))
    with pytest.raises(ResultError, match="given twice"), PlanWriter(tmp_path / "p.parquet", INFO) as writer:
        writer.add(1, [0, 0], [2, 2], HOST, "load")
    with pytest.raises(ResultError, match="step 0 comes after step 1"), PlanWriter(tmp_path / "p", INFO) as writer:
        writer.add(1, 0, 0, HOST, "load")
        writer.add(0, 0, 0, HOST, "load")


def file_of(path, meta, **columns):
    given = {name: pa.array([0], pa.from_numpy_dtype(kind)) for name, kind in COLUMNS.items()}
    given |= {"tier": pa.array([1], pa.int8()), "action": pa.array(["load"])} | columns
    table = pa.table({name: column for name, column in given.items() if column is not None})
    pq.write_table(table.replace_schema_metadata({"kvsim": json.dumps(meta)} if meta else None), path)
    return path


META = {"format": "kvsim-plan", "version": "1.0", **asdict(INFO)}


def test_a_file_written_by_others_is_read(tmp_path):
    later = META | {"version": "1.7", "unknown": 1}
    plan = read_plan(file_of(tmp_path / "p.parquet", later, more=pa.array([3])))
    assert rows_of(plan) == [(0, 0, 0, 1, 0)]


@pytest.mark.parametrize(
    ("meta", "columns", "message"),
    [
        (None, {}, "a Parquet file, but not a movement plan"),
        ({"format": "other", "version": "1.0"}, {}, 'the format is "other"'),
        (META | {"version": "2.0"}, {}, "version 2.0 is newer than this kvsim reads"),
        ({k: v for k, v in META.items() if k != "policy"}, {}, "lacks 'policy'"),
        (META | {"layers": 0}, {}, "no positive whole number"),
        (META, {"page": None}, 'the column "page" is missing'),
        (META, {"page": pa.array([1.5])}, 'the column "page" holds double'),
        (META, {"page": pa.array([None], pa.int32())}, 'the column "page" holds nulls'),
        (META, {"page": pa.array([-3], pa.int32())}, "page -3 is outside of 0 ... 6"),
        (META, {"action": pa.array(["fetch"])}, 'unknown action "fetch"'),
        (META, {"action": pa.array([1], pa.int8())}, '"action" holds something other than names'),
    ],
)
def test_what_is_no_plan_is_refused_and_the_file_named(tmp_path, meta, columns, message):
    path = file_of(tmp_path / "p.parquet", meta, **columns)
    with pytest.raises(ResultError, match=message) as refused:
        read_plan(path)
    assert refused.value.where == str(path)
    assert refused.value.hint


def test_a_file_that_is_not_parquet_or_not_there(tmp_path):
    (tmp_path / "text").write_text("hello")
    for name, message in (("text", "not a movement plan"), ("none", "no such file")):
        with pytest.raises(ResultError, match=message):
            read_plan(tmp_path / name)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match="cannot write"):
        plan_of(*ROWS).save(tmp_path / "file" / "plan.parquet")


def test_a_plan_belongs_to_its_trace():
    plan_of(*ROWS).require("f" * 64)
    with pytest.raises(ResultError, match="another trace"):
        plan_of(*ROWS).require("0" * 64)


def test_moves_of_a_step_by_layer():
    plan = plan_of(*ROWS)
    first, second = plan.step(1)
    assert first.pages(LOAD, HOST).tolist() == [2] and first.pages(DROP, HOST).tolist() == [2]
    assert second.pages(LOAD, SSD).tolist() == [0] and second.pages(STORE, HOST).tolist() == [6]
    assert [len(m.page) for m in plan.step(2)] == [0, 0]
    assert rows_of(plan.window(2, 5)) == ROWS[-1:]


def test_mapping_stretches_layers_and_repeats_the_context():
    here = mapped(plan_of((3, 0, 2, HOST, LOAD), (3, 1, 6, SSD, STORE)), 4, 8, 64, 300, value_bytes=2)
    # layers 0 and 1 follow layer 0, layers 2 and 3 layer 1; 19 pages of which a copy starts every 7
    load, store = ([(p, *what) for p in pages] for pages, what in (((2, 9, 16), (1, LOAD)), ((6, 13), (2, STORE))))
    assert rows_of(here) == [(3, layer, *row) for layer in range(4) for row in (load, load, store, store)[layer]]
    assert (here.info.layers, here.info.kv_heads, here.info.head_dim, here.info.context) == (4, 8, 64, 300)
    assert here.info.page_bytes == 16 * 2 * 8 * 64 * 2
    assert here.info.mapped["layers"] == 2 and here.info.mapped["repeated"] == 3.0
    assert (here.info.trace, here.info.steps, here.info.page_size) == (INFO.trace, 5, 16)


def test_mapping_onto_itself_changes_nothing_but_the_note():
    here = mapped(plan_of(*ROWS), 2, 2, 8, 100)
    assert rows_of(here) == ROWS
    assert replace(here.info, mapped=None) == INFO


def test_mapping_onto_less_leaves_out_layers_and_pages():
    here = mapped(plan_of(*ROWS), 1, 2, 8, 32)
    assert rows_of(here) == [(4, 0, 1, HOST, LOAD)]


def test_actions_have_their_numbers():
    assert [ACTIONS[i] for i in (LOAD, STORE, DROP)] == ["load", "store", "drop"]
