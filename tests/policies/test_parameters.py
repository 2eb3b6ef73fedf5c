"""Parameters that mean nothing are refused in words, when the policy is built."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kvsim import registry
from kvsim.cache import hooks
from kvsim.errors import ConfigError, PolicyError, TraceError
from kvsim.policies.classic import _exact
from kvsim.trace.access import dense_trace
from tests.helpers import matrix_trace, refer, replay
from tests.policies.test_history import FewRows

# spec, its first parameter the wrong one: words of what would be right
WRONG = {
    "2q(a1in=1.5)": "a number of at least 0 and at most 1",
    "2q(a1out=-1)": "a number of at least 0",
    "ada-kv(alpha=2)": "at most 1",
    "ada-kv(inner=5)": "name a policy",
    "adaptive-lru(penalty=1.5)": "a whole number, 0 or more",
    "adaptive-lru(large=-1)": "a number of at least 0",
    "gdsf(cost=True)": 'a number above zero, or "fetch"',
    "alisa(window=1.5)": "a whole number, 1 to 65536",
    "alisa(share='half')": "a number above 0 and at most 1",
    "attention-gate(threshold='low')": "a number",
    "clock(bits=17)": "a whole number, 1 to 16",
    "corm(window=1.5)": "a whole number, 1 or more",
    "corm(capped='no')": "True or False",
    "curdkv(local=-1)": "a whole number",
    "curdkv(use='both')": '"product", "mean", "key" or "value"',
    "duo-attention(retrieval=-0.1)": "at least 0 and at most 1",
    "duo-attention(heads=[0, 1])": "[[layer, head], ...]",
    "duo-attention(heads=[[0]])": "[[layer, head], ...]",
    "duo-attention(heads=5)": "[[layer, head], ...]",
    "duo-attention(full=2)": "True or False",
    "evict3r(temp=0)": "a number above 0",
    "evict3r(special=0.5)": "a whole number",
    "expected-attention(future=0)": "1 or more",
    "expected-attention(epsilon=-1)": "at least 0",
    "expected-attention(covariance='no')": "True or False",
    "expected-attention(sink='10%')": "a whole number",
    "fair(spans=[-5])": "list whole numbers, 0 or more",
    "fair(spans='all')": "list whole numbers",
    "fair(local=None)": "True or False",
    "flexicache(rerank=1.5)": "a whole number, 1 or more",
    "flexicache(tokens=0)": "or None for the budget",
    "gdsf(cost=-1)": 'a number above zero, or "fetch"',
    "gdsf(compete='yes')": "True or False",
    "h2o-prefill(window=0)": "1 or more",
    "keyformer(every=1.5)": "a whole number, 1 or more",
    "keyformer(steps=0.5)": "a whole number",
    "keyformer(tau_end=0)": "a number above 0",
    "keyformer(noise='off')": "True or False",
    "lag(shown=1.5)": "a whole number, 1 to 65536",
    "lag(every=0)": "1 or more",
    "lagkv(chunk=0)": "1 or more",
    "lagkv(sink='4')": "a whole number",
    "layer-budgets(budgets=5)": "list numbers",
    "layer-budgets(budgets=[-1, 2])": "list numbers",
    "lazy-eviction(alpha=-1)": "at least 0",
    "lazy-eviction(window=2.5)": "a whole number",
    "lazy-eviction(recent='10%')": "write tokens",
    "lazy-eviction(dtype='fp8')": '"int32" or "fp16"',
    "lfps(history=33)": "a whole number, 1 to 32",
    "lfps(near=0.5)": "a whole number",
    "lfu(tie='newest')": '"arrival" or "use"',
    "lirs(hir=2)": "at most 1",
    "lirs(stack=-1)": "at least 1",
    "lra(theta='x')": "a number",
    "nacl(keep=-1)": "at least 0",
    "nacl(keep=0, draw=0)": "a share above 0",
    "nacl(proxies=2)": "at most 1",
    "nacl(sink='1%')": "a whole number",
    "optimal(limit=-1)": "a whole number",
    "pageify(size=0)": "1 or more",
    "pageify(reduce='sum')": '"max" or "mean"',
    "pyramid(beta=0)": "at least 1",
    "pyramidinfer(rho=2)": "at most 1",
    "pyramidinfer(interval=0)": "1 or more",
    "pyramidinfer(weight=0)": "a number above 0",
    "pyramidinfer(shortest=-1)": "0 or more",
    "pyramidinfer(scaled=1)": "True or False",
    "pyramidkv(beta=0)": "a whole number, 1 or more",
    "pyramidkv(beta=2.5)": "a whole number, 1 or more",
    "quest(least=-1)": "1 or more",
    "quest(dense_layers=-1)": "0 or more",
    "r-kv(every=8, window=9)": "a whole number, 9 or more",
    "r-kv(kernel=4)": "an odd number",
    "r-kv(mix=2)": "at most 1",
    "r-kv(similar=3)": "at least -1 and at most 1",
    "roco(generated=1.5)": "a whole number",
    "roco(recent=5, generated=4)": "4 (`generated`) tokens or less",
    "s3-fifo(ghost=-1)": "at least 0",
    "s3-fifo(threshold=-5)": "0 or more",
    "s3-fifo(threshold=1.5)": "a whole number",
    "s3-fifo(small='10%')": "at most 1",
    "s3-fifo(warm='cold')": '"small" or "main"',
    "scissorhands(window=1.5)": "a whole number, 1 to 65536",
    "scissorhands(drop=2)": "at most 1",
    "simlayerkv(last=0)": "1 or more",
    "simlayerkv(threshold=5)": "at most 1",
    "snapkv(window=True)": "a whole number, 1 or more",
    "snapkv(kernel=1.0)": "an odd number",
    "snapkv(pooling='sum')": '"avg" or "max"',
    "streaming-vlm(rounds=1.5)": "a whole number",
    "streaming-vlm(recent='10%')": "write tokens",
    "whitelist(inner=5)": "name a policy",
    "whitelist(positions=[-1])": "list whole numbers",
    "whitelist(positions=[1.5])": "list whole numbers",
    "whitelist(positions=3)": "list whole numbers",
    "whitelist(spans=['a'])": "list whole numbers",
}


@pytest.mark.parametrize("spec", WRONG)
def test_what_means_nothing_is_refused(spec):
    name, _, parameters = spec.partition("(")
    parameter, _, _ = parameters.partition("=")
    with pytest.raises(ConfigError) as error:
        registry.build(spec)
    assert error.value.what.startswith(f"{name}: ")
    assert f"{parameter} = " in error.value.what
    assert WRONG[spec] in error.value.hint


@pytest.mark.parametrize("name", registry.names("policy"))
def test_every_number_has_a_meaning(name):
    """No numeric parameter takes a word, a truth or NaN, and but for a gate's threshold none takes -7."""
    cls, shared = registry.find(name), ("sink", "recent", "protect_head", "protect_tail")  # the engine refuses these
    for field in dataclasses.fields(cls):
        if field.name not in shared and field.type in ("int", "float", "int | None", "float | None"):
            for value in ("many", True, float("nan"), *[-7] * (name != "attention-gate")):
                with pytest.raises(ConfigError, match=f"{name}: {field.name} = "):
                    cls(**{field.name: value})


@pytest.mark.parametrize(
    "spec",
    [
        "2q(a1out=0)", "s3-fifo(ghost=0, threshold=0)", "s3-fifo(ghost=1.5)", "lirs(stack=1)", "lirs(stack=1e999)",
        "nacl(draw=0)", "keyformer(steps=0)", "pyramidinfer(rho=0, share=0)", "whitelist(positions=(), spans=[])",
        "fair(spans=[])", "curdkv(local=0)", "attention-gate(threshold=-3)", "quest(dense_layers=0)", "pyramid(beta=1)",
    ],
)  # fmt: skip
def test_the_ends_of_what_means_something(spec):
    registry.build(spec)


def test_warm_is_no_sign_of_the_ghosts():
    """Without ghosts `warm` counts as well: b and c find the small queue full, and in the main one they outlive d."""
    for ghost in (0, 0.5):
        for warm, left in (("small", [2, 3, 4]), ("main", [1, 2, 4])):
            run = refer(f"s3-fifo(recent=0, ghost={ghost}, small=0.4, warm='{warm}')", "abcde", 3)
            assert run.kept(start=0)[-1] == left


# -- what a policy cannot be served with is said under its name -----------------------------------------------------

NEEDY = {
    "corm(window=3, recent=1)": "corm",
    "keyformer": None,  # looks at as many rows as there are
    "snapkv(window=3)": "snapkv",
    "simlayerkv(last=3, sink=1)": "simlayerkv",
    "alisa(window=3)": "alisa",
    "whitelist(inner='snapkv(window=3)')": "whitelist",
    "ada-kv(inner='snapkv(window=3)')": "ada-kv",
}


@pytest.mark.parametrize("spec", NEEDY)
def test_missing_rows_are_said_under_the_name(spec):
    source = matrix_trace(prompt=4).sources[0]
    few = dense_trace([FewRows(source._prompt, source._decode)])
    if NEEDY[spec] is None:
        assert replay(spec, 4, few).kept()
        return
    with pytest.raises(PolicyError) as error:
        replay(spec, 4, few)
    assert error.value.where == f'policy "{NEEDY[spec]}"'
    assert "--prompt-rows" in error.value.hint


def test_a_place_that_is_known_stays():
    class Policy:
        spec_name = "mine"

        def score(self, error):
            raise error

    for kind in (ConfigError, PolicyError, TraceError):
        for where, said in ((None, 'policy "mine"'), ("gates.npy", "gates.npy")):
            with pytest.raises(kind) as error:
                hooks.call(Policy(), "score", kind("wrong", where=where, hint="right"), now=3)
            assert (error.value.what, error.value.where, error.value.hint) == ("wrong", said, "right")


# -- LFU's order is exact ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "now"), [(30, 50), (4000, 4193), (4000, 4194), (50_000, 40_000), (70_000, 60_000)])
def test_counts_and_ties_are_in_order(count, now):
    """As whole numbers, as the bits of a float, and as places among all: float32 says what the pair says."""
    rng = np.random.default_rng(1)
    first, second = (rng.integers(most - 20, most + 1, (2, 3, 40)).astype(np.int32) for most in (count, now))
    score = np.asarray(_exact(first, second, now), np.float32)
    assert np.isfinite(score).all()
    pairs = list(zip(first.ravel().tolist(), second.ravel().tolist(), strict=True))
    places = {pair: place for place, pair in enumerate(sorted(set(pairs)))}
    assert np.unique(score, return_inverse=True)[1].ravel().tolist() == [places[pair] for pair in pairs]
