"""Damaged traces are named for what they are; sound ones are read one row group at a time."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvsim import threads
from kvsim.errors import TraceError
from kvsim.testing import tiny_trace
from kvsim.trace import DenseSource, dense_trace, layout, open_trace, pack, reader
from kvsim.trace.check import check, info
from kvsim.trace.export import export, save
from kvsim.trace.synthetic import synthetic_trace
from tests.trace.conftest import edit_manifest, relabel, replay, rewrite


def refuses(trace, message):
    """Replay raises it, in at most three lines that name the place, and check lists it."""
    with pytest.raises(TraceError, match=message) as error:
        replay(open_trace(trace))
    lines = str(error.value).splitlines()
    assert len(lines) <= 3 and lines[1].startswith("in ") and str(trace) in lines[1]
    assert any(line in "\n".join(check(trace)) for line in lines[:1])


def test_a_sound_trace_has_no_problems(lossy, whole):
    assert check(lossy) == [] and check(whole) == []


def test_no_trace_at_all(tmp_path):
    with pytest.raises(TraceError, match="no such trace"):
        open_trace(tmp_path / "none.kvtrace")
    with pytest.raises(TraceError, match=r"no manifest\.json"):
        open_trace(tmp_path)
    with pytest.raises(TraceError, match="no such trace"):
        check(tmp_path / "none.kvtrace")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other", "version": "1.0"}', "\x00\x01"])
def test_a_broken_manifest(lossy, text):
    (lossy / "manifest.json").write_text(text)
    with pytest.raises(TraceError, match="manifest cannot be read"):
        open_trace(lossy)


@pytest.mark.parametrize("lanes", [{"layers": 0}, {"kv_heads": 0}])
def test_a_manifest_without_lanes(lossy, lanes):
    edit_manifest(lossy, **lanes)
    with pytest.raises(TraceError, match=r"manifest cannot be read: ValueError\('\d layers of \d KV heads'\)"):
        open_trace(lossy)


def test_a_foreign_format(lossy):
    edit_manifest(lossy, format="other")
    refuses(lossy, 'the format is "other"')


def test_another_major_is_refused_and_a_newer_minor_is_read(lossy):
    edit_manifest(lossy, version="2.7")
    replay(open_trace(lossy))
    edit_manifest(lossy, version="3.0")
    refuses(lossy, "newer than this kvsim reads")
    edit_manifest(lossy, version="1.0")
    refuses(lossy, "older than this kvsim reads")


@pytest.mark.parametrize("name", ["attn-1.parquet", "prefill.parquet", "requests.parquet"])
def test_a_truncated_file(lossy, name):
    data = (lossy / name).read_bytes()
    (lossy / name).write_bytes(data[: len(data) // 2])
    refuses(lossy, "bytes, the manifest says")
    relabel(lossy)
    refuses(lossy, "not a readable Parquet file")
    (lossy / name).unlink()
    with pytest.raises(TraceError):
        replay(open_trace(lossy))


@pytest.mark.parametrize("part", [0.1, 0.5, 0.8])
def test_a_flipped_bit_inside_a_row_group(lossy, part):
    data = bytearray((lossy / "attn-0.parquet").read_bytes())
    meta = pq.ParquetFile(lossy / "attn-0.parquet").metadata.row_group(1)
    w = next(c for i in range(meta.num_columns) if (c := meta.column(i)).path_in_schema == "w")
    data[w.data_page_offset + int(part * w.total_compressed_size)] ^= 4
    (lossy / "attn-0.parquet").write_bytes(data)
    assert any("not what was written" in problem for problem in check(lossy))
    with pytest.raises(TraceError, match="cannot be read"):
        replay(open_trace(lossy))


def test_a_foreign_parquet(lossy):
    pq.write_table(pa.table({"a": [1, 2]}), lossy / "attn-0.parquet")
    relabel(lossy)
    refuses(lossy, 'the column "request" is missing')


def test_a_missing_column(lossy):
    rewrite(lossy, "attn-0.parquet", lambda c: {k: v for k, v in c.items() if k != "gap_hi"})
    refuses(lossy, 'the column "gap_hi" is missing')


def test_an_unknown_column_is_ignored(lossy):
    table = pq.read_table(lossy / "attn-0.parquet")
    pq.write_table(table.append_column("later", pa.array([1] * len(table))), lossy / "attn-0.parquet")
    relabel(lossy)
    assert check(lossy) == []


@pytest.mark.parametrize(("value", "message"), [(np.nan, "not a number"), (-0.5, "negative"), (1.5, "above 1")])
def test_impossible_weights(whole, value, message):
    def change(columns):
        blob = np.frombuffer(columns["w32"][-1], np.float32).copy()
        blob[3] = value
        columns["w32"][-1] = blob.tobytes()

    rewrite(whole, "attn-0.parquet", change)
    refuses(whole, message)


def _halves(columns, name, value):
    blob = np.frombuffer(columns[name][-1], np.float16).copy()
    blob[1] = value
    columns[name][-1] = blob.tobytes()


@pytest.mark.parametrize("value", [np.nan, -0.25, 1.5])
def test_an_impossible_residual(lossy, value):
    rewrite(lossy, "attn-0.parquet", lambda c: _halves(c, "mass", value))
    refuses(lossy, "residual or sink outside")


def test_rows_that_sum_above_one(lossy):
    def change(columns):
        columns["w"][-1] = bytes([1]) * len(columns["w"][-1])

    rewrite(lossy, "attn-0.parquet", change)
    refuses(lossy, "kept weights that disagree")


def test_a_gap_beyond_the_last_position(lossy):
    def change(columns):
        columns["gap_hi"][-1] = bytes([1]) * len(columns["gap_hi"][-1])

    rewrite(lossy, "attn-1.parquet", change)
    refuses(lossy, "at or beyond kv_hi")


def test_a_position_twice(lossy):
    def change(columns):
        columns["gap_lo"][-1] = bytes(len(columns["gap_lo"][-1]))

    rewrite(lossy, "attn-1.parquet", change)
    refuses(lossy, "the same position twice")


@pytest.mark.parametrize("kind", ["lossy", "whole"])
def test_more_cores_read_the_same_and_name_the_first_damage(kind, request, monkeypatch):
    trace = request.getfixturevalue(kind)

    def read(cores):
        monkeypatch.setattr(threads, "cores", lambda: cores)
        monkeypatch.setattr(threads, "THREADED", 1)
        return [a.row.copy() for r in open_trace(trace).requests() for a in r.accesses()]

    assert all(map(np.array_equal, read(1), read(3)))
    columns = ["w32"] if kind == "whole" else ["gap_hi", "mass"]

    def change(lines):
        for i, name in ((-1, columns[0]), (-2, columns[-1])):  # both layers of the last step
            lines[name][i] = b"\xff" * len(lines[name][i])

    rewrite(trace, "attn-1.parquet", change)
    found = []
    for cores in (1, 3):
        with pytest.raises(TraceError) as error:
            read(cores)
        found.append(str(error.value))
    assert found[0] == found[1] and "layer 0" in found[0]


def test_counts_that_disagree_with_the_blobs(lossy):
    def change(columns):
        columns["w"][5] = columns["w"][5][:-1]

    rewrite(lossy, "attn-1.parquet", change)
    refuses(lossy, 'disagree with the length of the column "w"')


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("kv_hi", 999, "kv_hi is not the end"),
        ("kv_lo", -1, "kv_lo outside"),
        ("kv_lo", 999, "kv_lo outside"),
        ("layer", 5, "layers missing or out of order"),
        ("request", 8, "foreign request"),
        ("step", 0, "step 0|different steps"),
        ("step", 77, "different steps"),
    ],
)
def test_keys_that_no_capture_writes(lossy, column, value, message):
    rewrite(lossy, "attn-0.parquet", lambda c: c[column].__setitem__(-1, value))
    refuses(lossy, message)


def test_a_step_that_is_missing(lossy):
    rewrite(lossy, "attn-0.parquet", lambda c: {k: v[:-2] for k, v in c.items()})
    refuses(lossy, "step 40 of 40 is missing")
    rewrite(lossy, "attn-0.parquet", lambda c: {k: v[:60] + v[62:] for k, v in c.items()})
    refuses(lossy, "out of order")


def test_a_last_step_without_all_of_its_layers(lossy):
    rewrite(lossy, "attn-0.parquet", lambda c: {k: v[:-1] for k, v in c.items()})
    refuses(lossy, "the last step lacks layers")


def test_more_steps_than_the_request_has(lossy):
    rewrite(lossy, "requests.parquet", lambda c: c["n_steps"].__setitem__(0, 39))
    refuses(lossy, "out of order, step 40 of 39 is due")


@pytest.mark.parametrize("value", [-0.5, np.nan, np.inf])
def test_prompt_statistics_that_no_attention_has(lossy, value):
    def change(columns):
        blob = np.frombuffer(columns["colsum"][1], np.float32).copy()
        blob[3] = value
        columns["colsum"][1] = blob.tobytes()

    rewrite(lossy, "prefill.parquet", change)
    refuses(lossy, "colsum is negative or not a number")


def test_check_counts_the_token_ids(lossy):
    rewrite(lossy, "requests.parquet", lambda c: c["tokens"].__setitem__(1, c["tokens"][1][:-1]))
    assert check(lossy) == ["request 1: 63 token ids for 64 tokens"]


def test_prompt_statistics_that_are_cut(lossy):
    rewrite(lossy, "prefill.parquet", lambda c: c["colsum"].__setitem__(1, c["colsum"][1][:-4]))
    refuses(lossy, "colsum is not 24 float32 long")
    rewrite(lossy, "prefill.parquet", lambda c: {k: v[1:] for k, v in c.items()})
    refuses(lossy, "statistics are not complete")


def test_check_sees_what_a_replay_does_not(lossy):
    (lossy / "notes.txt").write_text("hello")
    edit_manifest(lossy, fingerprint="0" * 64)
    problems = "\n".join(check(lossy))
    assert "notes.txt" in problems and "fingerprint" in problems


@pytest.fixture
def many_groups(tmp_path, monkeypatch):
    for module in (layout, pack):
        monkeypatch.setattr(module, "GROUP_BYTES", 4000)
    monkeypatch.setattr("kvsim.trace.format.GROUP_BYTES", 4000)
    memory = synthetic_trace(prompt=40, steps=60, layers=2, kv_heads=2, seed=8)
    save(memory, tmp_path / "many.kvtrace", lossless=True)
    return memory, tmp_path / "many.kvtrace"


def test_a_reader_holds_one_row_group(many_groups, monkeypatch):
    memory, path = many_groups
    live, most, count = weakref.WeakSet(), [], []

    class Counted(reader.Group):
        def __init__(self, *args):
            super().__init__(*args)
            live.add(self)
            most.append(len(live))
            count.append(self.rows)

    monkeypatch.setattr(reader, "Group", Counted)
    for t, row in zip(open_trace(path).sources[0].token_rows(), memory.sources[0]._decode, strict=True):
        np.testing.assert_array_equal(t.row, row)
    assert len(count) > 10 and max(most) == 1
    assert pq.ParquetFile(path / "attn-0.parquet").num_row_groups == 20
    prompt = open_trace(path).sources[0].prompt()
    np.testing.assert_array_equal(prompt.rows, memory.sources[0]._prompt)
    assert max(most) == 1


def test_the_long_form_is_the_same_everywhere(lossy, whole, memory, tmp_path):
    for path in (lossy, whole):
        trace = open_trace(path)
        lines = export(trace, tmp_path / f"{path.stem}.parquet")
        frame = trace.to_pandas()
        assert pq.read_table(tmp_path / f"{path.stem}.parquet").to_pandas().equals(frame) and lines == len(frame)
    assert frame.equals(memory.to_pandas())
    assert list(frame.columns) == ["request", "step", "layer", "head", "position", "weight"]
    with pytest.raises(TraceError, match="exists already"):
        export(trace, tmp_path / "whole.parquet")
    with pytest.raises(TraceError, match="cannot write"):
        export(trace, tmp_path / "whole.parquet" / "x.parquet")


def test_an_export_that_meets_damage_leaves_nothing(lossy, tmp_path):
    rewrite(lossy, "attn-1.parquet", lambda c: c["kv_hi"].__setitem__(-1, 999))
    with pytest.raises(TraceError):
        export(open_trace(lossy), tmp_path / "out.parquet")
    assert not list(tmp_path.glob("out*"))


def test_info_counts(lossy, memory):
    facts = info(open_trace(lossy))
    assert (facts["requests"], facts["steps"], facts["prompt_tokens"]) == (2, 80, (24, 24))
    rows = 2 * 2 * (24 + 40)
    weights = 2 * 2 * 3 * (sum(range(1, 25)) + sum(range(25, 65)))
    assert (facts["rows"], facts["weights"]) == (rows, weights)
    assert 0 < facts["density"] < 1 and facts["bytes_per_weight"] > 0 and not facts["gold_sources"]
    assert info(memory)["geometry"]["kv_heads"] == 3
    json.dumps(facts)


def test_a_choice_of_requests_has_its_own_fingerprint(lossy):
    trace = open_trace(lossy)
    assert trace.only([1]).fingerprint != trace.fingerprint == open_trace(lossy).fingerprint
    assert [r.id for r in trace.only([1]).requests()] == [1]


def test_query_head_lanes_share_the_bytes_of_their_group():
    manifest = {"layers": 2, "kv_heads": 8, "heads": "query", "model": {"num_attention_heads": 8, "kv_heads": 2}}
    g = reader.geometry(manifest)
    assert (g.kv_heads, g.group) == (8, 1)
    assert g.kv_heads * g.token_bytes == reader.geometry(manifest | {"heads": "kv", "kv_heads": 2}).token_bytes * 2


# -- what a fingerprint covers -------------------------------------------------------------------------------------


@pytest.fixture
def demo(tmp_path):
    """A copy of the trace that comes with kvsim: it has facts of every step, and times."""
    return Path(shutil.copytree(reader.DEMO, tmp_path / "demo.kvtrace"))


def test_a_fingerprint_covers_every_step_but_not_its_times(demo):
    shipped = open_trace("demo").fingerprint
    rewrite(demo, "steps.parquet", lambda c: c["step_us"].__setitem__(3, 1.0))
    assert open_trace(demo).fingerprint == shipped and check(demo) == []
    found = {shipped}
    for name, value in (("need", [1]), ("need", None), ("token", 0), ("logprob", -9.0)):
        rewrite(demo, "steps.parquet", lambda c, name=name, value=value: c[name].__setitem__(3, value))
        found.add(open_trace(demo).fingerprint)
    assert len(found) == 5


def test_check_names_a_damaged_steps_file_and_what_it_found_before(demo):
    (demo / "notes.txt").write_text("hello")
    (demo / "steps.parquet").write_bytes(bytes((demo / "steps.parquet").stat().st_size))
    problems = check(demo)
    assert "steps.parquet: the content" in problems[0] and "notes.txt" in problems[1] and "readable" in problems[2]


def test_traces_in_memory_that_differ_in_anything_have_another_fingerprint():
    rows = np.ones((2, 1, 1, 2), np.float32), np.ones((1, 1, 1, 3), np.float32)
    q = np.zeros((1, 1, 3, 4), np.float32)
    other = [
        {},
        {"id": 1},
        {"facts": {"need": [np.array([0], np.int32)]}},
        {"facts": {"need": [np.array([1], np.int32)]}},
        {"facts": {"need": [np.array([0, 1], np.int32)], "tokens": np.arange(3)}},
        {"vectors": (q, q, q)},
        {"vectors": (q, q, q + 1)},
        {"spans": [(0, 1), (1, 2)]},
        {"inv_freq": np.ones(2)},
    ]
    assert len({dense_trace([DenseSource(*rows, **extra)]).fingerprint for extra in other}) == len(other)
    times = {"facts": {"step_seconds": np.ones(1)}}
    assert dense_trace([DenseSource(*rows, **times)]).fingerprint == dense_trace([DenseSource(*rows)]).fingerprint


def test_layers_that_share_a_lane_see_what_any_of_them_sees():
    """One layer sees three tokens, the other all: together they see all, by head and by layer each its own."""
    trace = tiny_trace(layers=2, heads=1, prompt=6, steps=2, windows=(3, 0))
    for pool, first, visible in (("head", [4, 0], [3, 7]), ("layer", [4, 0], [3, 7]), ("token", [0], [7])):
        _, a, _ = trace.pooled(pool).requests()[0].accesses()
        assert (a.first.tolist(), a.visible.max()) == (first, max(visible)) and a.first.dtype == np.int32


def test_a_fact_may_know_more_than_the_tokens_that_were_attended_to():
    """A capture keeps the last token it drew, which no row has; what is known of fewer tokens is no fact of them."""
    rows = np.ones((2, 1, 1, 2), np.float32), np.ones((1, 1, 1, 3), np.float32)
    facts = {"tokens": np.arange(4), "exact": np.arange(3), "short": np.arange(2), "need": [np.arange(9)]}
    request = dense_trace([DenseSource(*rows, facts=facts)]).requests()[0]
    assert {name: x.tolist() for name, x in request.facts().items()} == {"tokens": [0, 1, 2], "exact": [0, 1, 2]}
