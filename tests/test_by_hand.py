"""What one iteration asks of the machine, and what a run says of itself, worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from kvsim import simulate
from kvsim.config import run_config
from kvsim.machine import Work
from kvsim.replay import Replay, Setting, prepare
from kvsim.trace.access import Access

LAYERS, HEADS, PROMPT = 2, 2, 24  # of the shared trace
PAGE = 2 * 16 * 2.0  # keys and values of a token in one lane: 16 elements of two bytes
INT8 = (1 + 4 / 16) / 2  # bytes of an element of int8(group=16), its part of scale and least value too, over those two

REBUILDS = """from kvsim import offload

@offload('again')
class Again:
    'Computes every page again.'
    def place(self, view, victims):
        return 1
    def rebuild(self, view, needed):
        return needed
"""


def works(trace, **settings) -> tuple[Setting, Iterator[tuple[Access, Work]]]:
    """The work of every step of the first request, alone on the machine."""
    setting = prepare(trace, run_config(settings))
    replay = Replay(setting, setting.trace.requests()[0])
    alone = SimpleNamespace(replay=replay)
    return setting, ((a, simulate._work(setting, [(alone, a, o)])) for a, o in replay)


def test_a_token_computed_again_serves_all_heads(trace, tmp_path):
    """Of 13 pages of two tokens ten are there and one is new; the two others are four tokens for every layer."""
    (file := tmp_path / "again.py").write_text(REBUILDS)
    keys = {"policy": "lru", "budget": "10", "page_size": 2, "regime": "offload", "offload": str(file)}
    _, steps = works(trace, **keys)
    assert next(steps)[1].rebuild.tolist() == [0, 0]
    a, work = next(steps)
    assert a.keys == 13 and work.rebuild.tolist() == [4, 4] and work.fetch_host.sum() == 0


def test_a_prompt_is_encoded_token_by_token(trace):
    """What 24 tokens take to be stored in the GPU's format, and then one."""
    setting, steps = works(trace, policy="full", gpu_format="int8(group=16)")
    one = HEADS * PAGE * (1 + INT8) / setting.hardware.gpu.kv_bandwidth
    for tokens, (_, work) in zip((PROMPT, 1, 1), steps, strict=False):
        assert work.recode_s == pytest.approx([tokens * one] * LAYERS)


@pytest.mark.parametrize("formats", [{"host_format": "int8(group=16)"}, {"ssd_format": "int8(group=16)"}])
def test_a_page_that_goes_to_the_host_is_encoded_for_the_host(trace, formats):
    """Fourteen pages of the prompt, in each head of a layer; none goes on to the SSD."""
    setting, steps = works(trace, policy="lru", budget="10", page_size=1, regime="offload", **formats)
    _, work = next(steps)
    share = INT8 if "host_format" in formats else 1.0
    assert work.spill_host.tolist() == [14 * HEADS * PAGE * share] * LAYERS and work.spill_ssd.sum() == 0
    seconds = 14 * HEADS * PAGE * (1 + INT8) / setting.hardware.gpu.kv_bandwidth if share < 1 else 0.0
    assert work.recode_s == pytest.approx([seconds] * LAYERS)


@pytest.mark.parametrize(("policy", "columns"), [("lru", 0), ("lfu", 1), ("sieve", 4)])
def test_choosing_reads_key_score_and_every_column(trace, policy, columns):
    setting, steps = works(trace, policy=policy, budget="10")
    gpu = setting.hardware.gpu
    state = LAYERS * HEADS * 10 * (8 + 4 * columns)
    assert next(steps)[1].policy_s == pytest.approx(LAYERS * gpu.kernel_time + state / gpu.weight_bandwidth)


def test_a_clock_of_tokens_decides_when_tokens_are_due(trace):
    """`lag = 8`: every eighth step, or at every eighth token, which after a prompt of 23 is one step later."""
    setting = prepare(trace, run_config({"policy": "lru", "budget": "10"}))
    replay = Replay(setting, setting.trace.requests()[0])
    replay.cache.policy.lag = 8

    def deciding(prompt):
        steps = (SimpleNamespace(step=i, tokens=prompt + i, keys=prompt + i, prefill=False) for i in range(1, 21))
        return [a.step for a in steps if replay.decides(a)]

    assert deciding(24) == deciding(23) == [8, 16]
    replay.cache.policy.clock = "token"
    assert deciding(24) == [8, 16] and deciding(23) == [1, 9, 17]


def test_a_read_set_reserves_every_page(trace):
    """It saves bandwidth, not memory: 44 pages, where LRU holds the prompt's 24 and a new one at most."""
    page = LAYERS * HEADS * PAGE
    for policy, pages in (("lru", PROMPT + 1), ("h2o-mask", 44)):
        setting = prepare(trace, run_config({"policy": policy, "budget": "10"}))
        assert Replay(setting, setting.trace.requests()[0]).reserves()["gpu"] == pages * page


def test_time_per_token_is_that_of_the_decode_steps(trace):
    run = simulate.run(trace, policy="lru", budget="10", model="llama-3.2-1b")
    for _, r in run.requests.iterrows():
        end = run.steps[run.steps["request"] == r["request"]].sort_values("step")["end_s"].to_numpy()
        assert r["tpot_s"] == pytest.approx((end[-1] - end[0]) / 20) and r["ttft_s"] == end[0] - r["admitted_s"]
        assert r["tpot_s"] == pytest.approx(np.diff(end).mean())


def test_a_ceiling_that_was_not_computed_is_not_known(trace):
    assert np.isnan(simulate.run(trace, policy="lru", budget="10", ceiling=False).summary["ceiling"])
