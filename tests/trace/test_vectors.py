"""q, k and v of every token so far, and sums by span, as a policy gets them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvsim.errors import TraceError
from kvsim.trace import open_trace
from kvsim.trace.access import DenseSource, dense_trace
from kvsim.trace.synthetic import synthetic_trace

TRACE = Path(__file__).parents[2] / "traces" / "reasoner-vectors.kvtrace"


@pytest.fixture(scope="module")
def request_():
    return open_trace(TRACE).requests()[0]


def test_they_grow_with_the_steps_and_give_the_stored_rows(request_):
    for a in request_.accesses(vectors=True):
        seen = a.vectors
        assert seen.q.shape == (3, 4, 2, a.tokens, 32) and seen.k.shape == seen.v.shape == (3, 4, a.tokens, 32)
        assert seen.positions.tolist() == list(range(a.tokens))
        z = seen.q[..., -1:, :].astype(np.float32) @ seen.k[:, :, None].astype(np.float32).swapaxes(-1, -2)
        weights = np.exp(z / 32**0.5)
        rows = (weights / weights.sum(-1, keepdims=True)).mean(2)[..., 0, :]
        assert np.abs(rows - a.row[..., : a.tokens]).max() < 0.04  # weights are stored in twelfths of an octave
        if a.step == 20:
            break


def test_they_are_read_only_and_only_there_when_asked_for(request_):
    a = next(request_.accesses(vectors=True))
    with pytest.raises(ValueError, match="read-only"):
        a.vectors.k[0] = 0
    assert next(request_.accesses()).vectors is None


def test_what_a_trace_provides(request_):
    assert {"colsum", "colsq", "colmax", "window_rows", "spans", "q", "k", "v", "need"} <= request_.source.provides
    plain = synthetic_trace(1, 8, 4, 1, 1)
    assert "colsum" in plain.provides and not {"q", "spans", "need"} & plain.provides
    with pytest.raises(TraceError, match="no q, k and v"):
        next(plain.requests()[0].accesses(vectors=True))


def test_sums_by_span_add_up_to_the_column_sums(request_):
    prompt = next(request_.accesses()).prompt
    assert prompt.spans.tolist() == [[0, 101], [101, 203]]
    assert prompt.span_sums.sum(0) == pytest.approx(prompt.colsum, rel=1e-4, abs=1e-4)
    assert not prompt.span_sums[0][..., 101:].any()  # rows of the first span see nothing of the second
    paged = next(open_trace(TRACE).paged(16).pooled("layer").requests()[0].accesses()).prompt
    assert paged.span_sums.shape == (2, 3, 1, 13)
    assert paged.span_sums.sum(0) == pytest.approx(paged.colsum, rel=1e-4, abs=1e-4)


def test_vectors_that_stop_too_early_are_an_error():
    q, k = np.zeros((1, 2, 4, 8), np.float32), np.zeros((1, 1, 4, 8), np.float32)
    rows = np.tril(np.ones((5, 5), np.float32))[:, None, None]
    source = DenseSource(rows[:3, ..., :3], rows[3:], vectors=(q, k, k))
    steps = dense_trace([source]).requests()[0].accesses(vectors=True)
    assert [next(steps).tokens, next(steps).tokens] == [3, 4]
    with pytest.raises(TraceError, match="step 2: q, k and v of 5 tokens are not complete"):
        next(steps)


def test_query_heads_as_lanes_share_the_vectors_of_their_kv_head():
    rng = np.random.default_rng(2)
    q, (k, v) = rng.normal(size=(2, 4, 5, 8)), rng.normal(size=(2, 2, 2, 5, 8))
    rows = np.repeat(np.tril(np.ones((5, 5), np.float32))[:, None, None], 8, 1).reshape(5, 2, 4, 5)
    source = DenseSource(rows[:3, ..., :3], rows[3:], vectors=(q, k, v))
    *_, a = dense_trace([source]).requests()[0].accesses(vectors=True)
    assert a.vectors.q.shape == (2, 4, 1, 5, 8) and (a.vectors.q[:, :, 0] == q).all()
    for lane in range(4):
        assert (a.vectors.k[:, lane] == k[:, lane // 2]).all() and (a.vectors.v[:, lane] == v[:, lane // 2]).all()
