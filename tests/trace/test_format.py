"""Codes, the keep rule, and round trips through a file."""

from __future__ import annotations

import filecmp
import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.errors import TraceError
from kvsim.trace import TraceWriter, kernels, open_trace
from kvsim.trace.export import save
from tests.trace.conftest import softmax_rows

WORST = 2 ** (1 / 24) - 1  # 2.93 %, of weights above 2**-12


def worst(weights):
    """The largest relative error of each weight's code: half a step, which grows by 3.6 % per step below 2**-12."""
    octaves = np.maximum(0, -np.log2(np.asarray(weights, float)) - 12)
    return 2 ** ((1 + 12 * 0.036 * octaves) * 1.04 / 24) - 1


def write_one(path, rows, prompt=None, kv_lo=0, sink=None, peaks=None, **options):
    """One layer, one request: rows[0] is the last prompt row, the others decode rows."""
    heads, size = rows[0].shape
    prompt = prompt or size + kv_lo
    with TraceWriter(path, layers=1, kv_heads=heads, manifest={}, with_max=peaks is not None, **options) as writer:
        writer.prompt(0, 0, np.ones((heads, prompt), np.float32))
        for i, row in enumerate(rows):
            writer.row(0, i or -1, 0, kv_lo, row, None if peaks is None else peaks[i], sink)
        writer.finish_request(0, tokens=[0] * (prompt + len(rows) - 1), prompt_len=prompt, n_steps=len(rows) - 1)
    return open_trace(path).sources[0]


def test_codes_are_the_nearest_of_twelve_per_octave_and_of_fewer_below():
    octaves = np.linspace(0, 122, 50_001)
    codes = kernels.codes((2.0**-octaves).astype(np.float32)).astype(int)
    fine = octaves <= 12
    assert np.abs(codes - 1 - 12 * octaves)[fine].max() < 0.5 + 1e-4
    level = 12 + np.cumsum(1.036 ** np.arange(1, 110) / 12)  # of codes 146 to 254
    nearest = 146 + np.abs(octaves[octaves > 12.1, None] - level).argmin(1)
    assert (codes[octaves > 12.1] != nearest).mean() < 1e-3 and (np.diff(codes) >= 0).all()
    error = np.abs(kernels.WEIGHT[codes] * 2.0**octaves - 1)
    assert error[fine].max() <= WORST + 1e-6 and (error <= worst(2.0**-octaves) + 1e-6).all()
    ends = np.array([1, 0.5, 0.25, 2.0**-12, 2.0**-126, 0, 1e-45, 1.001], np.float32)
    assert kernels.codes(ends).tolist() == [1, 13, 25, 145, 254, 255, 255, 1]


def test_weights_of_any_size_keep_their_order(tmp_path):
    """What a sharp head's tail is needed for; and what was left out is never above what was kept."""
    row = np.full((1, 120), 1e-45, np.float32)
    row[0, :100] = 2.0 ** -np.linspace(0.5, 120, 100)
    row[0, 0] = 1 - row[0, 1:].sum()
    for keep in (1.0, 0.99):
        source = write_one(tmp_path / f"{keep}.kvtrace", [row, np.pad(row, ((0, 0), (0, 1)))], keep=keep)
        (seen,) = [t.row[0, 0].copy() for t in source.token_rows()]
        kept = 100 if keep == 1 else 64
        assert (np.diff(seen[:kept]) <= 0).all() and len(np.unique(seen[:kept])) > 0.6 * kept
        assert seen[kept:].max() <= seen[:kept].min() and seen.sum() == pytest.approx(1, abs=1e-3)


def test_lossless_round_trip_is_exact(memory, whole):
    for ours, theirs in zip(memory.requests(), open_trace(whole).requests(), strict=True):
        a, b = ours.source.prompt(), theirs.source.prompt()
        for name in ("colsum", "colsq", "colmax", "rows", "kv_lo"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        for x, y in zip(ours.source.token_rows(), theirs.source.token_rows(), strict=True):
            assert (x.step, x.kv_hi) == (y.step, y.kv_hi)
            np.testing.assert_array_equal(x.row, y.row)
            np.testing.assert_array_equal(x.kv_lo, y.kv_lo)


def test_lossy_rows_keep_enough_and_are_close(memory, lossy):
    for ours, theirs in zip(memory.sources, open_trace(lossy).sources, strict=True):
        for x, y, stored in zip(ours.token_rows(), theirs.token_rows(), theirs.entries(), strict=True):
            np.testing.assert_allclose(y.row.sum(-1), 1, atol=1e-3)
            _, layer, head, position, weight = stored
            true = x.row[layer, head, position]
            assert (np.abs(weight / true - 1) < worst(true) + WORST + 2e-3).all()  # the code, and the scale of the sum
            kept = np.zeros_like(x.row)
            kept[layer, head, position] = true
            assert kept.sum(-1).min() >= 0.99 - 1e-5
            assert (kept > 0).sum(-1).min() >= 8
            assert x.row[kept == 0].max() < 1e-4 * (1 + 2 * WORST)


def test_a_code_is_within_its_error_before_scaling(tmp_path):
    row = softmax_rows(np.random.default_rng(0), 2, 500)
    source = write_one(tmp_path / "t.kvtrace", [row])
    group = next(source._groups(lambda first, last: True))
    begin = 0
    for head in range(2):
        end = begin + int(group.n[0, head])
        gaps = group.planes["gap_lo"][begin:end] + 256 * group.planes["gap_hi"][begin:end].astype(int)
        true = row[head, np.cumsum(gaps)]
        assert (np.abs(kernels.WEIGHT[group.planes["w"][begin:end]] / true - 1) <= worst(true) + 1e-6).all()
        assert group.mass[0, head] == np.float16(1 - true.astype(float).sum())
        begin = end


def test_a_long_gap_is_continued(tmp_path):
    row = np.zeros((2, 200_000), np.float32)
    row[0, [3, 65_538, 65_539, 199_999]] = 0.25  # a step of exactly 65,535, then a long one
    row[1, 199_998] = 1.0
    source = write_one(tmp_path / "t.kvtrace", [row, np.pad(row, ((0, 0), (0, 1)))])
    (decode,) = [t.row.copy() for t in source.token_rows()]
    assert np.flatnonzero(decode[0, 0]).tolist() == [3, 65_538, 65_539, 199_999]
    np.testing.assert_allclose(decode[0, 0, [3, 199_999]], 0.25, rtol=1e-6)
    assert np.flatnonzero(decode[0, 1]).tolist() == [199_998]


def test_a_sliding_window_starts_where_it_starts(tmp_path):
    rng = np.random.default_rng(1)
    with TraceWriter(tmp_path / "t.kvtrace", layers=2, kv_heads=1, manifest={}, lossless=True) as writer:
        for layer in range(2):
            writer.prompt(0, layer, np.ones((1, 10), np.float32))
        rows = {}
        for step in (-1, 1, 2, 3):
            end = 10 + step + (step < 0)
            for layer, lo in ((0, 0), (1, end - 4)):
                rows[step, layer] = softmax_rows(rng, 1, end - lo)
                writer.row(0, step, layer, lo, rows[step, layer])
        writer.finish_request(0, tokens=range(13), prompt_len=10, n_steps=3)
    trace = open_trace(tmp_path / "t.kvtrace")
    for t in trace.sources[0].token_rows():
        lo = t.kv_hi - 4
        assert t.kv_lo.tolist() == [0, lo]
        assert not t.row[1, :, :lo].any() and not t.row[..., t.kv_hi :].any()
        np.testing.assert_array_equal(t.row[1, :, lo : t.kv_hi], rows[t.step, 1])
    access = list(trace.paged(4).requests()[0].accesses())[-1]
    assert access.first.tolist() == [0, 2] and access.visible.tolist() == [13, 4]
    assert trace.sources[0].prompt().kv_lo.tolist() == [[0, 6]]


def test_prompt_rows_of_a_layer_may_come_together(tmp_path):
    rng = np.random.default_rng(2)
    rows = {(s, layer): softmax_rows(rng, 2, 6 + s + 1) for s in (-3, -2, -1) for layer in range(2)}
    with TraceWriter(tmp_path / "t.kvtrace", layers=2, kv_heads=2, manifest={}, lossless=True) as writer:
        for layer in range(2):
            writer.prompt(7, layer, np.ones((2, 6), np.float32))
            for step in (-1, -3, -2):
                writer.row(7, step, layer, 0, rows[step, layer])
        writer.finish_request(7, tokens=range(6), prompt_len=6, n_steps=0)
    prompt = open_trace(tmp_path / "t.kvtrace").sources[0].prompt()
    for (step, layer), row in rows.items():
        np.testing.assert_array_equal(prompt.rows[step, layer, :, : row.shape[1]], row)
    assert prompt.colsq is None


@pytest.mark.parametrize("lossless", [False, True])
def test_a_sink_keeps_its_share(tmp_path, lossless):
    row = softmax_rows(np.random.default_rng(3), 2, 300) * np.array([[0.6], [0.9]], np.float32)
    rows = [row, np.pad(row, ((0, 0), (0, 1)))]
    source = write_one(tmp_path / "t.kvtrace", rows, sink=np.array([0.4, 0.1]), lossless=lossless)
    (decode,) = source.token_rows()
    np.testing.assert_allclose(decode.row[0].sum(-1), [0.6, 0.9], atol=1e-3)


def test_group_maxima_are_at_least_the_means(tmp_path):
    rng = np.random.default_rng(4)
    heads = np.stack([softmax_rows(rng, 2, 401) for _ in range(4)])
    rows = [heads[..., :400].mean(0) * 0.99, heads.mean(0)]
    peaks = [heads[..., :400].max(0), heads.max(0)]
    for lossless in (False, True):
        path = tmp_path / f"{lossless}.kvtrace"
        source = write_one(path, rows, peaks=peaks, lossless=lossless)
        (largest,) = [t.row[0].copy() for t in source.max_rows()]
        (_, _, head, position, _) = next(source.entries())
        true = peaks[1][head, position]
        assert (np.abs(largest[head, position] / true - 1) <= (0 if lossless else worst(true) + 1e-6)).all()
    with pytest.raises(TraceError, match="no group maxima"):
        next(write_one(tmp_path / "mean.kvtrace", rows).max_rows())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_round_trip_of_any_row(tmp_path_factory, data):
    heads, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 120))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows = [softmax_rows(rng, heads, size + i, data.draw(st.floats(0, 8))) for i in range(3)]
    keep, least = data.draw(st.floats(0.1, 1)), data.draw(st.integers(0, 130))
    lo = data.draw(st.integers(0, 70_000))
    path = tmp_path_factory.mktemp("any") / "t.kvtrace"
    source = write_one(path, rows, kv_lo=lo, keep=keep, min_keep=least)
    for t, (step, _, head, position, weight), row in zip(source.token_rows(), source.entries(), rows[1:], strict=True):
        true = row[head, position - lo]
        seen = t.row[0, :, lo : t.kv_hi]
        assert seen.shape == row.shape and step == t.step
        stored = np.zeros_like(row, dtype=bool)
        stored[head, position - lo] = True
        assert (np.abs(weight / true - 1) <= (1 + worst(true)) * (1 + worst(true.min())) - 1 + 2e-3).all()
        assert (row * stored).sum(1).min() >= keep - 2e-5
        assert (stored.sum(1) >= min(least, row.shape[1])).all()
        np.testing.assert_allclose(seen.sum(1), 1, atol=2e-3)
        assert (seen >= 0).all() and not t.row[0, :, :lo].any()


def test_pages_and_pools_of_a_file_match_numpy(memory, whole):
    dense = memory.sources[1]
    view = open_trace(whole).paged(5).pooled("layer").requests()[1]
    pages = view.stride
    accesses = view.accesses()
    first = next(accesses)
    padded = np.pad(dense._prompt.mean(2, keepdims=True), ((0, 0),) * 3 + ((0, 5 * pages - 24),))
    np.testing.assert_allclose(first.row, padded[-1].reshape(2, 1, pages, 5).sum(-1), atol=1e-6)
    np.testing.assert_allclose(first.prompt.colsum, padded.sum(0).reshape(2, 1, pages, 5).sum(-1)[..., :5], atol=1e-5)
    for access, row in zip(accesses, dense._decode, strict=True):
        row = np.pad(row.mean(1, keepdims=True), ((0, 0), (0, 0), (0, 5 * pages - row.shape[-1])))
        row = row.reshape(2, 1, pages, 5)
        np.testing.assert_allclose(access.row, row.sum(-1), atol=1e-6)
        np.testing.assert_allclose(access.peak, row.max(-1), atol=1e-6)


def test_same_input_gives_the_same_bytes(memory, tmp_path):
    for name in ("a", "b"):
        save(memory, tmp_path / f"{name}.kvtrace")
    names = [p.name for p in (tmp_path / "a.kvtrace").iterdir()]
    assert filecmp.cmpfiles(tmp_path / "a.kvtrace", tmp_path / "b.kvtrace", names, shallow=False) == (names, [], [])


def test_facts_come_back(tmp_path):
    rng = np.random.default_rng(5)
    model = {"config": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "vocab_size": 99}}
    with TraceWriter(tmp_path / "t.kvtrace", layers=1, kv_heads=2, manifest={"model": model}, vectors=True) as writer:
        for request in (4, 2):  # rows of a batch come interleaved
            writer.prompt(request, 0, np.ones((2, 5), np.float32))
            writer.row(request, -1, 0, 0, softmax_rows(rng, 2, 5))
        q, kv = rng.normal(size=(4, 5, 8)), rng.normal(size=(2, 5, 8))
        writer.vectors(4, 0, 0, np.arange(5), q, kv, -kv)
        for step in (1, 2):
            for request in (4, 2):
                writer.row(request, step, 0, 0, softmax_rows(rng, 2, 5 + step))
        need = [[], [1, 3]]
        writer.steps(4, {"need": need, "step_us": np.array([10.0, 20.0]), "logprob": [-1.0, None]})
        writer.finish_request(4, tokens=range(7), prompt_len=5, n_steps=2, answers_right=True, seed=np.int64(9))
        writer.finish_request(2, tokens=range(8), prompt_len=5, n_steps=2)
    trace = open_trace(tmp_path / "t.kvtrace")
    g = trace.geometry
    assert (g.kv_heads, g.group, g.head_dim, g.hidden, g.vocab) == (2, 2, 8, 32, 99)
    first, second = trace.sources
    assert (first.id, first.facts["answers_right"], first.facts["seed"]) == (4, True, 9)
    assert [n.tolist() for n in first.facts["need"]] == need
    np.testing.assert_allclose(first.facts["step_seconds"], [1e-5, 2e-5])
    assert set(second.facts) == {"tokens"} and second.facts["tokens"].tolist() == list(range(8))
    (vectors,) = first.vectors()
    np.testing.assert_array_equal(vectors.q, q.astype(np.float16))
    np.testing.assert_array_equal(vectors.v, -kv.astype(np.float16))
    with pytest.raises(TraceError, match="--vectors"):
        next(second.vectors())


def test_prompt_rows_alone_without_the_order_of_decode_are_refused(tmp_path):
    row = softmax_rows(np.random.default_rng(6), 1, 4)

    def attempt(*calls, finish=None):
        with TraceWriter(tmp_path / "t.kvtrace", layers=2, kv_heads=1, manifest={}) as writer:
            for step, layer in calls:
                writer.row(0, step, layer, 0, row)
            for layer in range(2):
                writer.prompt(0, layer, np.ones((1, 4), np.float32))
            writer.finish_request(0, tokens=[0] * 9, prompt_len=4, n_steps=finish)

    for calls, message in (
        ([(-1, 0), (-1, 1), (1, 1)], "out of order"),
        ([(-1, 0), (-1, 0)], "out of order"),
        ([(-1, 0), (-1, 1), (0, 0)], "out of order"),
        ([(-1, 0)], "prompt rows are not complete"),
        ([(-1, 0), (-1, 1), (1, 0)], "put them"),
    ):
        with pytest.raises(TraceError):
            attempt(*calls, finish=0)
        assert list(tmp_path.iterdir()) == [], message


def test_what_no_softmax_gives_is_refused(tmp_path):
    good = softmax_rows(np.random.default_rng(7), 2, 50)
    for value, message in ((np.nan, "not a number"), (np.inf, "not a number"), (-0.1, "negative"), (1.5, "above 1")):
        for lossless in (False, True):
            bad = good.copy()
            bad[1, 7] = value
            with pytest.raises(TraceError, match=message):
                write_one(tmp_path / "t.kvtrace", [bad], lossless=lossless)
            assert list(tmp_path.iterdir()) == []


def test_an_interrupted_capture_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), TraceWriter(tmp_path / "t.kvtrace", layers=1, kv_heads=1, manifest={}) as w:
        w.row(0, -1, 0, 0, np.ones((1, 1)))
        assert [p.name for p in tmp_path.iterdir()] == ["t.kvtrace.partial"]
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_existing_or_impossible_output_is_refused(tmp_path, lossy):
    with pytest.raises(TraceError, match="exists already"):
        TraceWriter(lossy, layers=1, kv_heads=1, manifest={})
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match="cannot write"):
        TraceWriter(tmp_path / "file" / "t.kvtrace", layers=1, kv_heads=1, manifest={})


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    script = textwrap.dedent("""
        import resource, sys
        import numpy as np
        from kvsim.errors import TraceError
        from kvsim.trace import TraceWriter
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        rng = np.random.default_rng(0)
        try:
            with TraceWriter(sys.argv[1], layers=1, kv_heads=1, manifest={}, lossless=True) as writer:
                writer.prompt(0, 0, np.ones((1, 4000), np.float32))
                for step in [-1, *range(1, 60)]:
                    row = rng.random((1, 4000 + max(step, 0)), np.float32)
                    writer.row(0, step, 0, 0, row / row.sum())
                writer.finish_request(0, tokens=[0] * 4059, prompt_len=4000, n_steps=59)
        except TraceError as error:
            print(error)
    """)
    path = tmp_path / "t.kvtrace"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("cannot write the trace: File too large\nin "), done
    assert done.stderr == "" and done.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_nothing_heavy_is_loaded_before_a_file_is_opened():
    heavy = "{'pyarrow', 'numba', 'pandas', 'torch'}"
    script = f"import sys, kvsim.trace.synthetic; kvsim.trace.Trace; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_manifest_holds_no_clock_of_its_own(lossy):
    manifest = json.loads((lossy / "manifest.json").read_text())
    given = {"model"}
    own = "encoding files fingerprint format heads kv_heads layers requests totals version"
    assert set(manifest) == given | set(own.split())


def test_layers_without_a_sink_beside_layers_with_one(tmp_path):
    rng = np.random.default_rng(8)
    with TraceWriter(tmp_path / "t.kvtrace", layers=2, kv_heads=1, manifest={}) as writer:
        for layer in range(2):
            writer.prompt(0, layer, np.ones((1, 6), np.float32))
        for step in (-1, 1):
            row = softmax_rows(rng, 1, 6 + max(step, 0))
            writer.row(0, step, 0, 0, row)
            writer.row(0, step, 1, 0, row * 0.5, row, np.array([0.5]))  # maxima not asked for are left out
        writer.finish_request(0, tokens=range(7), prompt_len=6, n_steps=1)
    (t,) = open_trace(tmp_path / "t.kvtrace").sources[0].token_rows()
    np.testing.assert_allclose(t.row.sum(-1)[:, 0], [1, 0.5], atol=1e-3)


def test_any_files_a_caller_adds_are_part_of_the_trace(tmp_path):
    with TraceWriter(tmp_path / "t.kvtrace", layers=1, kv_heads=1, manifest={}) as writer:
        writer.prompt(0, 0, np.ones((1, 2), np.float32))
        writer.row(0, -1, 0, 0, np.full((1, 2), 0.5))
        writer.finish_request(0, tokens=[1, 2], prompt_len=2, n_steps=0)
        (writer.partial / "extra.txt").write_text("spans")
    assert "extra.txt" in open_trace(tmp_path / "t.kvtrace").manifest["files"]
    assert list(open_trace(tmp_path / "t.kvtrace").sources[0].token_rows()) == []
