"""Closed forms against published or hand-made numbers; those the pipeline must meet are in test_pipeline."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.machine import SHAPES, closed

FLOPS, LINK = 0.6 * 312e12, 32e9


@pytest.mark.parametrize(
    ("hidden", "alone", "overlapped"), [(4096, 0.59, 0.83), (5120, 0.53, 0.73), (7168, 0.45, 0.58)]
)
def test_recompute_share(hidden, alone, overlapped):
    ratio = hidden * LINK / FLOPS
    assert closed.recompute_share(ratio) == pytest.approx(alone, abs=0.006)
    assert closed.recompute_share(ratio, overlapped=True) == pytest.approx(overlapped, abs=0.006)
    s, share = 1000, closed.recompute_share(ratio)  # where both branches of the max meet
    assert 4 * hidden**2 * share * s / FLOPS == pytest.approx(4 * hidden * (1 - share) * s / LINK)


def test_recomputing_pays_only_without_groups():
    for shape in SHAPES.values():
        assert not closed.recompute_pays(shape.hidden * 2, shape.kv_token_bytes)
    assert closed.recompute_pays(4096 * 2, 2 * 4096 * 2)


def test_offloaded_cache_is_bound_by_the_write_back():
    assert closed.offloaded_cache_step(10, 1.0, 3.0, 3.0, 0.5) == 45.0
    assert closed.offloaded_cache_step(10, 1.0, 9.0, 3.0, 0.5) == 90.0
    assert closed.offloaded_cache_step(10, 1.0, 3.0, 3.0, 0.5, submit=20.0) == 200.0


def test_stall_free_gap():
    assert closed.stall_free_gap(6e9, 6e9, 3e9) == 3.0


def test_quantised_bytes():
    assert closed.quantised_bytes(100, 128, 16, 64, 0) == 100 * 128 * 2
    long = closed.quantised_bytes(10**6, 128, 4, 64, 32, kept=128)
    assert 10**6 * 128 * 2 / long == pytest.approx(16 / 4.5, rel=1e-3)


def test_split_over_paths():
    assert closed.split_seconds(90.0, (10.0, 20.0)) == pytest.approx(3.0)
    for share in (0.1, 0.3, 0.4, 0.9):
        assert closed.split_seconds(90.0, (10.0, 20.0), (share, 1 - share)) > 3.0


def test_stable_heads():
    """FlexiCache: a quarter of the heads keeps everything, the others 1,024 tokens."""
    share = closed.stable_heads_share
    assert 1 - share(0.25, 1024, 20_000) == pytest.approx(0.712, abs=5e-4)
    assert 1 - share(0.25, 1024, 20_000, page=16) == pytest.approx(0.649, abs=5e-4)
    assert 1 - share(0.25, 1024, 8000) == pytest.approx(0.654, abs=5e-4)
    assert share(0.25, 1024, 1000) == share(1.0, 1024, 20_000) == 1.0  # nothing left to move away
    assert closed.kv_bytes(192, 2048, 128, 2) == 192 * 2**20
    llama = SHAPES["llama-3.1-8b"]
    assert closed.kv_bytes(llama.layers * llama.kv_heads, 1, llama.head_dim, 2) == llama.layers * llama.kv_token_bytes


def test_recurrent_states_by_hand():
    """The second sequence branches off inside the edge 1 2 3 4; the third at the branch there is, the fourth ends in
    an edge, the fifth runs on from an end."""
    sequences = [(1, 2, 3, 4), (1, 2, 5), (1, 2, 6, 7), (1,), (1, 2, 5, 8)]
    assert closed.branch_states(sequences) == [[4], [2, 3], [4], [1], [4]]
    assert closed.block_states(sequences, 2) == [[2, 4], [2], [2, 4], [], [2, 4]]
    kv = 4 + 1 + 2 + 0 + 1
    assert closed.prefix_cache_bytes(sequences, closed.branch_states(sequences), 10, 100) == 10 * kv + 100 * 6
    assert closed.prefix_cache_bytes(sequences, closed.block_states(sequences, 2), 10, 100) == 10 * kv + 100 * 7


served = st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=9)


@given(served)
def test_states_are_the_nodes_of_the_radix_tree(sequences):
    """At most two per sequence; together the ends, and the prefixes that are followed by different tokens."""
    states = closed.branch_states(sequences)
    assert all(len(positions) <= 2 for positions in states)
    following: dict[tuple, set] = {}
    for tokens in sequences:
        for i, token in enumerate(tokens):
            following.setdefault(tuple(tokens[:i]), set()).add(token)
    nodes = {tuple(tokens) for tokens in sequences} | {p for p, after in following.items() if len(after) > 1}
    stored = [tuple(tokens[:i]) for tokens, positions in zip(sequences, states, strict=True) for i in positions]
    assert len(stored) == len(set(stored)) and set(stored) == nodes - {()}
    assert closed.branch_states([*sequences, *sequences])[len(sequences) :] == [[] for _ in sequences]


@given(served, st.integers(1, 4))
def test_without_recurrent_layers_both_are_prefix_caching(sequences, block):
    blocks, branches = closed.block_states(sequences, block), closed.branch_states(sequences)
    assert [len(positions) for positions in blocks] == [len(tokens) // block for tokens in sequences]
    prefixes = {tuple(tokens[: i + 1]) for tokens in sequences for i in range(len(tokens))}
    for states in (blocks, branches):
        assert closed.prefix_cache_bytes(sequences, states, 8, 0) == 8 * len(prefixes)
