"""Policies that go by what a token is: gates from outside, kinds and rounds of a video stream."""

from __future__ import annotations

import numpy as np
import pytest

from kvsim import registry
from kvsim.cache.cache import Cache
from kvsim.cache.tiers import Capacity
from kvsim.errors import ConfigError, PolicyError
from kvsim.policies.segments import OTHER, SYSTEM, TEXT, VISION
from kvsim.testing import check_policy
from kvsim.trace.access import DenseSource, dense_trace
from kvsim.trace.format import TraceWriter
from kvsim.trace.reader import open_trace
from tests.helpers import M1, THETA, drive, matrix_trace

GATE = [0.9, 0.2, 0.8, 0.4, 0.7, 0.6]


def even_trace(tokens: int, prompt: int, layers: int = 1, heads: int = 1, **facts):
    rows = np.tril(np.ones((tokens, tokens), np.float32)) / np.arange(1, tokens + 1, dtype=np.float32)[:, None]
    rows = np.broadcast_to(rows[:, None, None, :], (tokens, layers, heads, tokens))
    facts = {name: np.array(x) for name, x in facts.items()}
    return dense_trace([DenseSource(rows[:prompt, ..., :prompt], rows[prompt:], facts=facts)])


def replay(spec, trace, budget=2, **regime):
    """As `tests.helpers.replay`, with the trace's facts, and with what attention saw of each step."""
    request, policy = trace.requests()[0], registry.build(spec)
    if "offload" in regime:
        regime["offload"] = registry.build(regime["offload"], "offload")
    cache = Cache(
        trace.lanes, request.stride, policy, Capacity(budget),
        use=THETA, page_size=trace.page_size, facts=request.facts, audit=True, **regime,
    )  # fmt: skip
    attended = []
    cache.watch = lambda a, read: attended.append(
        [sorted(k[r].tolist()) for k, r in zip(cache.table.key, read, strict=True)]
    )
    run = drive(cache, request.accesses(), request.stride)
    return run, attended


# -- attention gate ----------------------------------------------------------------------------------------------------


def saved(path, gates):
    np.save(path, np.asarray(gates, np.float32))
    return f"attention-gate(scores={str(path)!r})"


@pytest.fixture(params=["fact", "file"])
def gated(request, tmp_path):
    """A spec and the facts that go with it."""

    def make(gates):
        gates = np.asarray(gates, np.float32)
        if request.param == "fact":
            return "attention-gate", {"gate": gates}
        return saved(tmp_path / "gates.npy", gates.reshape(1, 1, -1)), {}

    return make


def test_gate_vector(gated):
    """A token below the threshold is seen by its own query and no other."""
    spec, facts = gated(GATE)
    source = matrix_trace(M1).sources[0]
    run, attended = replay(spec, dense_trace([DenseSource(source._prompt, source._decode, facts=facts)]))
    assert [lane[0] for lane in attended] == [[0, 1], [0, 2], [0, 2, 3], [0, 2, 4], [0, 2, 4, 5]]
    assert run.kept(start=0) == [[0], [0, 2], [0, 2], [0, 2, 4], [0, 2, 4, 5]]


def test_gate_has_no_budget(gated):
    spec, facts = gated([0.9] * 8)
    for budget in (1, 99):
        assert replay(spec, even_trace(8, 3, **facts), budget)[0].kept()[-1] == list(range(8))
    spec, facts = gated([0.1, 0.3, 0.2, 0.1, 0.3, 0.1])
    assert replay(spec, even_trace(6, 3, **facts))[0].kept() == [[1], [4], [4]]  # the best gate, of equals the newer


def test_gate_of_pages(gated):
    """From a file a page is kept for any of its tokens, from the fact by its first; one being filled stays."""
    spec, facts = gated([0.1, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1])
    run, _ = replay(spec, even_trace(7, 3, **facts).paged(2))
    first = [] if facts else [0]
    assert run.kept(start=0) == [[*first, 1], [*first, 1], [*first, 1, 2], [*first, 1], [*first, 1, 3]]


def test_gates_per_lane(tmp_path):
    gates = np.array([[[0.9, 0.1, 0.9, 0.9], [0.1, 0.9, 0.1, 0.9]], [[0.9] * 4, [0.1, 0.1, 0.1, 0.9]]])
    run, _ = replay(saved(tmp_path / "g.npy", gates), even_trace(4, 3, layers=2, heads=2))
    assert [run.kept(lane)[-1] for lane in range(4)] == [[0, 2, 3], [1, 3], [0, 1, 2, 3], [3]]


def test_gate_offload(gated):
    """Off the GPU is not gone: what a step needs comes back, and leaves again."""
    spec, facts = gated([0.9, 0.1, 0.9, 0.1, 0.9, 0.9])
    source = matrix_trace(M1).sources[0]
    trace = dense_trace([DenseSource(source._prompt, source._decode, facts=facts)])
    run, _ = replay(spec, trace, offload="spill", demand=THETA)
    assert run.kept() == [[0, 2], [0, 2], [0, 2, 4], [0, 2, 4, 5]]
    assert [int(o.fetched.sum()) for o in run.out[1:]] == [
        0,
        0,
        1,
        1,
    ]  # page 3 weighs .28 at t = 4, page 1 .56 at t = 5


def test_gate_contract(tmp_path):
    gates = np.random.default_rng(0).random((2, 2, 40))
    assert check_policy(saved(tmp_path / "gates.npy", gates)) == []


def test_the_file_is_part_of_what_a_run_is(tmp_path):
    one, two = (registry.build(saved(tmp_path / name, [[[x]]])) for name, x in (("a.npy", 0.1), ("b.npy", 0.2)))
    again = registry.build(saved(tmp_path / "c.npy", [[[0.1]]]))
    assert registry.source_hash(one) == registry.source_hash(again) != registry.source_hash(two)
    assert one.needs == frozenset() and registry.build("attention-gate").needs == {"gate"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "cannot read gates"),
        (lambda p: p.write_text("0.5"), "cannot read gates"),
        (lambda p: np.save(p, np.array([{}])), "cannot read gates"),
        (lambda p: np.save(p, np.zeros((2, 3))), r"gates are float64 \[2, 3\]"),
        (lambda p: np.save(p, np.full((1, 1, 2), "a")), r"gates are <U1"),
        (lambda p: np.save(p, np.full((1, 1, 4), np.nan)), "hold NaN"),
        (lambda p: np.savez(p.open("wb"), a=np.zeros((1, 1, 4))), "gates are an archive"),
    ],
)
def test_gates_that_cannot_be_used(tmp_path, make, words):
    make(path := tmp_path / "gates.npy")
    with pytest.raises(ConfigError, match=words):
        registry.build(f"attention-gate(scores={str(path)!r})")


@pytest.mark.parametrize("shape", [(2, 1, 6), (1, 2, 6), (1, 1, 5)])
def test_gates_of_another_trace(tmp_path, shape):
    spec = saved(tmp_path / "gates.npy", np.ones(shape))
    with pytest.raises(ConfigError, match=rf"gates of {shape[0]} layers x {shape[1]} KV heads x {shape[2]} pages"):
        replay(spec, even_trace(6, 3))


def test_gate_takes_tokens_to_protect():
    with pytest.raises(ConfigError, match="attention-gate has no budget"):
        registry.build("attention-gate(recent='50%')")


# -- streaming video ---------------------------------------------------------------------------------------------------

SMALL = "streaming-vlm(window=2, rounds=3, text_sink=2, text_window=3)"


def stream(rounds: int, vision: int = 4, text: int = 2, before: int = 3):
    """System prompt, previous text, then rounds of markup, vision and text. Returns kind and chunk of each token."""
    kinds, chunks = [SYSTEM] * 2 + [TEXT] * before, [-1] * (2 + before)
    for chunk in range(rounds):
        part = [OTHER] + [VISION] * vision + [TEXT] * text
        kinds += part
        chunks += [chunk] * len(part)
    return np.array(kinds, np.int32), np.array(chunks, np.int32)


def expected(kind, chunk, window=2, rounds=3, sink=2, last=3):
    """What stays when the last of these tokens has come: the rule, token by token."""
    now = chunk[-1]
    previous = [i for i in range(len(kind)) if kind[i] == TEXT and (chunk[i] <= now - rounds or chunk[i] < 0)]
    kept = {*previous[:sink], *(previous[-last:] if last else []), len(kind) - 1}  # the newest token is protected
    for i, (k, c) in enumerate(zip(kind, chunk, strict=True)):
        round_is_recent = c > now - rounds and not (k == TEXT and c < 0)
        if k == SYSTEM or (k == VISION and c > now - window) or (k in (TEXT, OTHER) and round_is_recent):
            kept.add(i)
    return sorted(kept)


@pytest.mark.parametrize("prompt", [1, 6, 12, 40])
@pytest.mark.parametrize(
    "changes", [{}, {"window": 4}, {"text_sink": 0}, {"text_window": 0}, {"rounds": 1}, {"text_sink": 40}]
)
def test_streaming_vlm_keeps_what_the_rule_says(prompt, changes):
    kind, chunk = stream(8)
    p = {"window": 2, "rounds": 3, "text_sink": 2, "text_window": 3} | changes
    spec = f"streaming-vlm({', '.join(f'{k}={v}' for k, v in p.items())})"
    run, _ = replay(spec, even_trace(len(kind), prompt, kind=kind, chunk=chunk))
    for i, kept in enumerate(run.kept(start=0)):
        part = slice(0, prompt + i)
        rule = expected(kind[part], chunk[part], p["window"], p["rounds"], p["text_sink"], p["text_window"])
        assert kept == rule


def test_streaming_vlm_by_hand():
    """In round 4: system, vision of rounds 3 and 4, all else of 2 to 4; of older text the first 2 and the last 3."""
    kind, chunk = stream(5, vision=2, text=2, before=2)
    run, _ = replay(SMALL, even_trace(len(kind), 4, kind=kind, chunk=chunk))
    assert run.kept()[-1] == [0, 1, 2, 3, 8, 12, 13, 14, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28]


def test_streaming_vlm_levels_off():
    """What is held stops growing; it leaves old vision, old frames of rounds and the middle of the text."""
    kind, chunk = stream(16)
    run, _ = replay(SMALL, even_trace(len(kind), 5, kind=kind, chunk=chunk))
    held = np.array([len(kept) for kept in run.kept()])
    ends = np.flatnonzero(np.diff(chunk[5:], append=99))  # the last token of each round
    assert len(set(held[ends][4:])) == 1 and held.max() < held[ends][-1] + 7
    gone = sorted(set(range(len(kind))) - set(run.kept()[-1]))
    assert {int(k) for k in kind[gone]} == {TEXT, VISION, OTHER}
    assert (chunk[gone][kind[gone] == VISION] <= 15 - 2).all() and (chunk[gone] <= 15 - 2).all()


def test_streaming_vlm_defaults():
    """16 rounds and 16 chunks: nothing leaves 16 rounds, and one round's vision and frame leave with the next."""
    kind, chunk = stream(17, vision=2, text=1)
    run, _ = replay("streaming-vlm", even_trace(len(kind), 5, kind=kind, chunk=chunk))
    last_of_16 = int(np.flatnonzero(chunk == 15)[-1])
    assert run.kept()[last_of_16 - 5] == list(range(last_of_16 + 1))
    assert sorted(set(range(len(kind))) - set(run.kept()[-1])) == [5, 6, 7]  # text stays: 512 tokens and 512 more


def test_streaming_vlm_pages_and_lanes():
    """One set for all layers and heads; a page is what its first token is."""
    kind, chunk = stream(8, vision=4, text=2, before=4)
    kind, chunk = np.repeat(kind, 2), np.repeat(chunk, 2)
    spec = "streaming-vlm(window=2, rounds=3, text_sink=4, text_window=6)"
    paged, _ = replay(spec, even_trace(len(kind), 10, layers=2, heads=2, kind=kind, chunk=chunk).paged(2))
    single, _ = replay(SMALL, even_trace(len(kind) // 2, 5, kind=kind[::2], chunk=chunk[::2]))
    assert paged.cache.lanes == 1
    assert paged.kept()[1::2] == single.kept()


def test_streaming_vlm_offload():
    kind, chunk = stream(6)
    trace = even_trace(len(kind), 5, kind=kind, chunk=chunk)
    run, _ = replay(SMALL, trace, offload="spill", demand=THETA)
    assert run.kept()[-1] == replay(SMALL, trace)[0].kept()[-1]


@pytest.mark.parametrize(
    ("kind", "chunk", "words"),
    [
        ([0, 1, 7], [0, 0, 0], r'"kind" holds \[7\] at step 1'),
        ([0, 1, 2], [0, 1, 0], '"chunk" falls at step 1'),
        ([0, 1], [0, 0], "does not know the fact"),
    ],
)
def test_streaming_vlm_facts_that_make_no_sense(kind, chunk, words):
    with pytest.raises(PolicyError, match=words):
        replay(SMALL, even_trace(3, 2, kind=kind, chunk=chunk))


def test_streaming_vlm_parameters():
    for text in ("window=0", "rounds=0", "text_sink=-1", "text_window=-1", "recent='10%'"):
        with pytest.raises(ConfigError, match=text.partition("=")[0]):
            registry.build(f"streaming-vlm({text})")


def test_facts_reach_a_policy_from_a_file(tmp_path):
    """Columns of requests.parquet with a number per token."""
    kind, chunk = stream(2)
    n, prompt = len(kind), 6
    source = even_trace(n, prompt).sources[0]
    stats = source.prompt()
    with TraceWriter(tmp_path / "t.kvtrace", layers=1, kv_heads=1, manifest={}, lossless=True) as writer:
        writer.prompt(0, 0, stats.colsum[0], stats.colsq[0], stats.colmax[0])
        writer.row(0, -1, 0, 0, stats.rows[-1, 0])
        for t in source.token_rows():
            writer.row(0, t.step, 0, 0, t.row[0, :, : t.kv_hi])
        writer.finish_request(
            0, tokens=range(n), prompt_len=prompt, n_steps=n - prompt, kind=kind, chunk=chunk.tolist()
        )
    trace = open_trace(tmp_path / "t.kvtrace")
    assert {"kind", "chunk"} <= trace.provides
    run, _ = replay(SMALL, trace)
    assert run.kept()[-1] == expected(kind, chunk)
