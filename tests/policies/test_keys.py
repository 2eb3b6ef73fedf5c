"""Policies that look at keys: published vectors, small cases by hand, and rotation undone on a captured model."""

from __future__ import annotations

import numpy as np
import pytest

from kvsim import registry
from kvsim.cache.cache import Cache
from kvsim.cache.tiers import Capacity
from kvsim.config import RunConfig
from kvsim.errors import ConfigError, PolicyError
from kvsim.policies.keys import importance, redundancy
from kvsim.replay import prepare
from kvsim.testing.contract import moved
from kvsim.trace.access import DenseSource, Seen, dense_trace
from tests.helpers import M1, drive

KEYS = np.array([(1, 0), (0.9, 0.1), (0, 1), (0.95, 0.05), (0.1, 1), (1, 0.2)], np.float32)
SPECS = [
    "knorm",
    "keydiff",
    "lagkv(chunk=4, sink=1)",
    "expected-attention(sink=1, future=8)",
    "r-kv(window=2, every=4)",
]


def vector_trace(k, v=None, q=None, prompt=None, inv_freq=None):
    """One layer from k, v [heads, tokens, dim] and q [query heads, tokens, dim]; rows are their attention."""
    k = np.asarray(k, np.float32)
    heads, tokens, size = k.shape
    v, q = (k if x is None else np.asarray(x, np.float32) for x in (v, q))
    prompt = tokens if prompt is None else prompt
    logits = (q.reshape(heads, -1, tokens, size) @ k[:, None].swapaxes(2, 3)) / np.sqrt(size)
    weights = np.tril(np.exp(logits - logits.max(-1, keepdims=True)))
    rows = (weights / weights.sum(-1, keepdims=True)).mean(1).swapaxes(0, 1)[:, None].astype(np.float32)
    vectors = q[None], k[None], v[None]
    return dense_trace([DenseSource(rows[:prompt, ..., :prompt], rows[prompt:], vectors=vectors, inv_freq=inv_freq)])


def run(spec, budget, trace, kind=Cache):
    request = trace.requests()[0]
    policy = registry.build(spec)
    cache = kind(trace.lanes, request.stride, policy, Capacity(budget), page_size=trace.page_size, audit=True)
    return drive(cache, request.accesses(vectors=True), request.stride)


def kept(spec, budget, trace, lane=0):
    return run(spec, budget, trace).kept(lane, start=0)[0]


def scores(spec, trace, lane=0):
    return run(spec, trace.requests()[0].stride, trace).score[0][lane]


def test_lagkv_spreads_are_those_of_a_sample():
    """Two tokens of two numbers, scaled by a next chunk from 0 to 1: deviations of 0.5 sqrt(2) and 0, by n - 1."""
    x = np.array([[[[0, 1], [0.5, 0.5]], [[0, 0], [1, 1]]]], np.float32)
    high, low = np.exp([np.sqrt(0.5), 0])
    assert registry.build("lagkv")._spread(x)[0, 0] == pytest.approx([high / (high + low), low / (high + low)])


def random_trace(seed=0, tokens=30, prompt=20, heads=2, group=2, size=8, page=1):
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, heads, tokens, size))
    q = rng.normal(size=(heads * group, tokens, size))
    return vector_trace(k, v, q, prompt, inv_freq=1 / 100 ** (np.arange(size // 2) / (size // 2))).paged(page)


# -- one score at a time -------------------------------------------------------------------------------------------


def test_knorm_keeps_small_keys():
    k = np.array([[[3, 4], [1, 0], [0, 2], [0.5, 0]]])
    assert scores("knorm", vector_trace(k)) == pytest.approx([-5, -1, -2, -0.5])
    assert kept("knorm", 2, vector_trace(k)) == [1, 3]
    assert kept("knorm", 2, vector_trace(k[:, :, ::-1].repeat(2, 1))) == [6, 7]  # the newest two of the smallest


def test_knorm_of_a_page_is_the_mean_of_its_tokens():
    k = np.array([[[3, 4], [1, 0], [0, 2], [2, 0], [4, 0]]])
    assert scores("knorm", vector_trace(k).paged(2)) == pytest.approx([-3, -2, -4])  # the last page holds one token


def test_keydiff_keeps_keys_unlike_the_others():
    k = np.array([[[2, 0], [1, 0], [0, 3]]])  # unit keys (1, 0), (1, 0), (0, 1); mean (2, 1) / 3
    assert scores("keydiff", vector_trace(k)) == pytest.approx([-2 / 5**0.5, -2 / 5**0.5, -1 / 5**0.5])
    assert kept("keydiff", 2, vector_trace(k)) == [1, 2]


def test_keydiff_takes_the_mean_of_the_keys_that_are_left():
    """Without the first of them the mean of (1, 0) and (0, 1) is as near to either."""
    k = np.array([[[2, 0], [1, 0], [0, 3]]])
    seen = Seen(k[None], k[None], k[None], np.arange(3))
    left = registry.build("keydiff").tokens(seen, 0, np.array([[False, True, True]]))
    assert left == pytest.approx(np.full((1, 3), -(0.5**0.5)))


def test_curdkv_by_hand():
    """Squared norms 1, 4, 9, 1 of keys and 1, 1, 1, 4 of values, in stretches of two."""
    k, v = np.array([[[1, 0], [0, 2], [3, 0], [1, 0]]]), np.array([[[1, 0], [0, 1], [1, 0], [0, 2]]])
    by = {use: scores(f"curdkv(local=2, sink=0, use='{use}')", vector_trace(k, v)) for use in ("key", "value")}
    assert by["key"] == pytest.approx([0.2, 0.8, 0.9, 0.1])
    assert by["value"] == pytest.approx([0.5, 0.5, 0.2, 0.8])
    assert scores("curdkv(local=2, sink=0)", vector_trace(k, v)) == pytest.approx([0.1, 0.4, 0.18, 0.08])
    mean = scores("curdkv(local=2, sink=0, use='mean')", vector_trace(k, v))
    assert mean == pytest.approx([0.35, 0.65, 0.55, 0.45])
    assert scores("curdkv(local=0, sink=0, use='key')", vector_trace(k, v)) == pytest.approx(
        [1 / 15, 4 / 15, 0.6, 1 / 15]
    )
    assert scores("curdkv(local=3, sink=0, use='key')", vector_trace(k, v))[3] == pytest.approx(
        1
    )  # alone in its stretch
    assert kept("curdkv(local=2, sink=1)", 2, vector_trace(k, v)) == [0, 1]


@pytest.mark.parametrize("more", ["local=-1", "use='both'"])
def test_curdkv_refuses(more):
    with pytest.raises(ConfigError):
        registry.build(f"curdkv({more})")


def test_lagkv_by_hand():
    """One sink, chunks of two, a tail: the next chunk spans [0, 2] x [0, 4] in keys and in values."""
    k = np.array([[[9, 9], [1, 0], [2, 2], [0, 4], [2, 0], [7, 7]]])
    # token 1 scales to (.5, 0), token 2 to (1, .5): the same spread, so the newer ranks higher
    assert scores("lagkv(chunk=2, sink=1)", vector_trace(k)) == pytest.approx([2, 0, 1, 2, 2, 2])
    k[0, 1] = [2, 0]  # now (1, 0): a larger spread
    assert scores("lagkv(chunk=2, sink=1)", vector_trace(k)) == pytest.approx([2, 1, 0, 2, 2, 2])
    assert kept("lagkv(chunk=2, sink=1)", 5, vector_trace(k)) == [0, 1, 3, 4, 5]


def test_lagkv_weighs_values_as_keys():
    k = np.array([[[9, 9], [2, 0], [2, 2], [0, 4], [2, 0], [7, 7]]])  # keys alone: token 1
    v = np.array([[[9, 9], [1, 2], [2, 0], [0, 4], [2, 0], [7, 7]]])  # (.5, .5) and (1, 0): token 2, by more
    assert scores("lagkv(chunk=2, sink=1)", vector_trace(k, v)) == pytest.approx([2, 0, 1, 2, 2, 2])


def test_lagkv_without_a_next_chunk_keeps_the_newest():
    k = np.random.default_rng(0).normal(size=(1, 8, 4))
    assert kept("lagkv(chunk=4, sink=1)", 4, vector_trace(k)) == [0, 5, 6, 7]  # 9 tokens would be two chunks


def test_lagkv_where_the_next_chunk_is_constant():
    k = np.array([[[9, 9], [1, 0], [2, 5], [3, 4], [3, 0], [7, 7]]])  # both keys of the next chunk have 3
    assert np.isfinite(scores("lagkv(chunk=2, sink=1)", vector_trace(k))).all()


def expected_attention(q, k, v, positions, inv_freq, sink, future, covariance=True, norm=True, epsilon=0.0):
    """The same, token by token and position by position, from the formula."""

    def turned(x, angle):
        half = len(x) // 2
        pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
        return np.concatenate([pairs.real, pairs.imag])

    heads, group, count, size = q.shape
    ahead = [positions[-1] + 1 + i for i in range(future)]
    turn = np.mean([[turned(e, p * inv_freq) for e in np.eye(size)] for p in ahead], 0).T
    total = np.zeros((heads, count - sink))
    for h, g in np.ndindex(heads, group):
        before = np.array([turned(q[h, g, t], -positions[t] * inv_freq) for t in range(sink, count)])
        mean, cov = turn @ before.mean(0), turn @ np.cov(before.T, bias=True) @ turn.T
        logits = [x @ mean / size**0.5 + covariance * (x @ cov @ x) / (2 * size) for x in k[h, sink:]]
        total[h] += np.exp(logits) / np.exp(logits).sum() / group
    return (total + epsilon) * np.linalg.norm(v[:, sink:], axis=-1) if norm else total


@pytest.mark.parametrize("more", ["", ", covariance=False", ", norm=False", ", epsilon=0.1"])
def test_expected_attention_is_its_formula(more):
    trace = random_trace(tokens=12, prompt=12)
    seen = next(trace.requests()[0].accesses(vectors=True)).vectors
    spec = f"expected-attention(sink=2, future=5{more})"
    p = registry.build(spec)
    right = expected_attention(
        seen.q[0], seen.k[0], seen.v[0], seen.positions, seen.inv_freq, 2, 5, p.covariance, p.norm, p.epsilon
    )
    for lane in range(2):
        found = scores(spec, trace, lane)
        assert found[2:] == pytest.approx(right[lane], rel=1e-4)
        assert np.isinf(found[:2]).all()


def test_expected_attention_of_a_prompt_of_sinks():
    assert kept("expected-attention(sink=4)", 4, random_trace(tokens=4, prompt=4)) == [0, 1, 2, 3]


def test_partial_rotation_leaves_the_other_dimensions():
    """With no frequencies at all, nothing is turned; with zero frequencies, neither."""
    rng = np.random.default_rng(1)
    q, k, v = rng.normal(size=(3, 1, 10, 6))
    found = [
        scores("expected-attention(sink=1)", vector_trace(k, v, q, inv_freq=f))
        for f in (np.zeros(0), np.zeros(2), np.zeros(3))
    ]
    assert found[1][1:] == pytest.approx(found[0][1:])
    assert found[2][1:] == pytest.approx(found[0][1:])
    turned = scores("expected-attention(sink=1)", vector_trace(k, v, q, inv_freq=np.array([1.0, 0.3])))
    assert not np.allclose(turned[1:], found[0][1:], rtol=1e-3)


# -- R-KV ----------------------------------------------------------------------------------------------------------


def test_rkv_vector():
    rows = np.log(np.array([M1[4][:4], M1[5][:4]]))
    r, i = redundancy(KEYS, 0.5), importance(rows, 1)
    assert r == pytest.approx([0.2053, 0.2135, 0.1306, 0.1776, 0.1395, 0.1335], abs=5e-5)
    assert i == pytest.approx([0.1339, 0.3777, 0.2225, 0.2659], abs=5e-5)
    z = 0.07 * i - 0.93 * r[:4]
    assert z == pytest.approx([-0.1816, -0.1721, -0.1059, -0.1465], abs=6e-5)
    assert sorted(np.argsort(z)[-2:]) == [2, 3]  # beside the window of 4 and 5


def test_rkv_keeps_the_vector_s_pages():
    """Queries of zero: equal importance, so redundancy decides, and the same two stay."""
    trace = vector_trace(KEYS[None], q=np.zeros((1, 6, 2)))
    assert kept("r-kv(window=2, kernel=1)", 4, trace) == [2, 3, 4, 5]


def test_redundancy_in_blocks(monkeypatch):
    k = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    whole = redundancy(k, 0.5)
    monkeypatch.setattr("kvsim.policies.keys._BLOCK", 7)
    assert redundancy(k, 0.5) == pytest.approx(whole, rel=1e-6)


def test_importance_is_the_largest_neighbour():
    p = np.array([0.1, 0.2, 0.4, 0.2, 0.1])
    assert importance(np.log(p)[None], 3) == pytest.approx([0.2, 0.4, 0.4, 0.4, 0.2])


def rkv(k, q, prompt, budget, every, window, kernel=7, mix=0.07):
    """The published loop over one KV head: lists, cut and reordered. k [tokens, dim], q [group, tokens, dim]."""
    cache, steps = list(range(prompt)), []
    for tokens in range(prompt, len(k) + 1):
        cache += [tokens - 1] if tokens > prompt else []
        if (tokens == prompt or tokens % every == 0) and len(cache) >= budget:
            old, new = cache[:-window], cache[-window:]
            logits = np.max([h[tokens - window : tokens] @ k[old].T for h in q], 0) / k.shape[1] ** 0.5
            e = np.exp(logits - logits.max(1, keepdims=True))
            mean = (e / e.sum(1, keepdims=True)).mean(0)
            peak = [mean[max(0, j - kernel // 2) : j + kernel // 2 + 1].max() for j in range(len(old))]
            unit = k[cache] / np.linalg.norm(k[cache], axis=1, keepdims=True)
            cosine = unit @ unit.T
            np.fill_diagonal(cosine, 0)
            for row in cosine:
                above = np.flatnonzero(row > 0.5)
                row[above[-1] if len(above) else 0] = 0
            r = np.exp(cosine.mean(0)) / np.exp(cosine.mean(0)).sum()
            z = mix * np.array(peak) - (1 - mix) * r[: len(old)]
            cache = [old[i] for i in np.argsort(-z, kind="stable")[: budget - window]] + new
        steps.append(sorted(cache))
    return steps


@pytest.mark.parametrize("seed", range(4))
def test_rkv_is_the_published_loop(seed):
    """Prefill, then every 8 tokens of the whole sequence, with survivors in the order of their scores."""
    rng = np.random.default_rng(seed)
    k, q = rng.normal(size=(2, 60, 6)), rng.normal(size=(4, 60, 6))
    k[:, 20:30] = k[:, 5:15] + 0.1 * rng.normal(size=(2, 10, 6))  # near copies
    trace = vector_trace(k, q=q, prompt=29)
    result = run("r-kv(window=4, kernel=3, every=8)", 12, trace)
    for head in range(2):
        right = rkv(k[head], q[2 * head : 2 * head + 2], 29, 12, 8, 4, kernel=3)
        assert result.kept(head, start=0) == right
    sizes = [len(s) for s in result.kept(start=0)]
    assert sizes[:4] == [12, 13, 14, 12] and max(sizes) == 12 + 7  # 32 is the first multiple of 8


def test_rkv_leaves_a_short_prompt_alone():
    result = run("r-kv(window=2, every=4)", 12, random_trace(tokens=18, prompt=6))
    assert [len(s) for s in result.kept(start=0)] == [6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 12, 13, 14]


def test_rkv_refuses_pages():
    with pytest.raises(PolicyError, match="single keys"):
        run("r-kv", 4, random_trace(page=4))


@pytest.mark.parametrize("more", ["window=0", "window=9, every=8", "kernel=2", "recent='50%'"])
def test_rkv_refuses(more):
    with pytest.raises(ConfigError):
        registry.build(f"r-kv({more})")


def test_lagkv_refuses():
    with pytest.raises(ConfigError):
        registry.build("lagkv(chunk=0)")


# -- what they share -----------------------------------------------------------------------------------------------


class Moved(Cache):
    """Pages change their slots after every step."""

    def access(self, a):
        out = super().access(a)
        self.table = moved(self.table, np.random.default_rng(a.step))
        self.view.bind(self.table)
        return out


@pytest.mark.parametrize("spec", SPECS)
def test_slots_do_not_matter(spec):
    trace = random_trace()
    first, again, other = (run(spec, 9, trace, kind) for kind in (Cache, Cache, Moved))
    assert np.array_equal(first.copies, again.copies) and np.array_equal(first.copies, other.copies)
    assert len(first.kept(start=0)[0]) == 9


@pytest.mark.parametrize("spec", SPECS[:-1])
def test_what_is_generated_stays(spec):
    for page in (1, 4):
        trace = random_trace(page=page)
        result = run(spec, 4, trace)
        for lane in range(2):
            sets = result.kept(lane, start=0)
            born = range(20 // page, -(-30 // page))
            assert len(sets[0]) == 4 and set(sets[-1]) == set(sets[0]) | set(born)


def test_needs_are_refused_where_the_trace_has_none():
    rows = random_trace().sources[0]
    bare = dense_trace([DenseSource(rows._prompt, rows._decode)])
    config = RunConfig(policy="expected-attention", budget="12", model="llama-3.2-1b")
    with pytest.raises(PolicyError, match="needs inv_freq, k, q, v, which the trace does not hold"):
        prepare(bare, config).policy()
    turned = dense_trace([DenseSource(rows._prompt, rows._decode, vectors=rows._vectors)])
    with pytest.raises(PolicyError, match="needs inv_freq, which the trace does not hold"):
        prepare(turned, config).policy()
    assert prepare(random_trace(), config).policy().spec_name == "expected-attention"


def test_unrotation_on_a_captured_model(tmp_path):
    """Queries of a small Llama, captured after rotation, are turned back to what its projection gave."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from kvsim.measure.capture import capture
    from kvsim.measure.prompts import prompt
    from kvsim.policies.keys import _rotated
    from kvsim.trace import open_trace
    from tests.measure.models import tiny

    model = tiny("llama", sharpen=2.0)
    ids = torch.randint(3, 128, (1, 24), generator=torch.Generator().manual_seed(0))
    projected = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda m, i, o: projected.append(o.detach()))
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    path = tmp_path / "llama.kvtrace"
    capture(model, [prompt(ids[0].numpy(), 24)], path, max_new_tokens=3, vectors=True)
    trace = open_trace(path)
    assert {"q", "k", "v", "inv_freq"} <= trace.provides
    seen = next(trace.requests()[0].accesses(vectors=True)).vectors
    assert isinstance(seen, Seen) and len(seen.inv_freq) == 4
    angle = seen.positions[:, None] * seen.inv_freq
    found = _rotated(seen.q[1].astype(np.float64), np.cos(angle), -np.sin(angle))
    right = projected[0][0].view(24, 2, 4, 8).permute(1, 2, 0, 3).numpy()
    np.testing.assert_allclose(found, right, atol=4e-3)  # vectors are half precision
    assert np.abs(seen.q[1] - right).max() > 0.5  # they were rotated
    assert len(kept("expected-attention", 9, trace)) == 9
