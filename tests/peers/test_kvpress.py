"""Our one-shot and key policies against kvpress: the same entries of the same prompt, head by head."""

from __future__ import annotations

import pytest

kvpress = pytest.importorskip("kvpress")
torch = pytest.importorskip("torch")
tf = pytest.importorskip("transformers")

import numpy as np  # noqa: E402

from kvsim import registry  # noqa: E402
from tests.peers.models import PROMPT, found, observe, replay, tiny, tokens  # noqa: E402

SEEDS = range(8)
NEAR = 1e-6  # scores that differ by less, relatively, may change places: both sides compute in float32

PRESSES = {
    "SnapKVPress": (lambda: kvpress.SnapKVPress(0.5, 16, 5), "snapkv(window=16, kernel=5)"),
    "SnapKVPress, kernel 7": (lambda: kvpress.SnapKVPress(0.7, 8, 7), "snapkv(window=8, kernel=7)"),
    "ObservedAttentionPress": (lambda: kvpress.ObservedAttentionPress(0.5), "observed-attention"),
    "TOVAPress": (lambda: kvpress.TOVAPress(0.5), "tova-prefill"),
    "KnormPress": (lambda: kvpress.KnormPress(0.5), "knorm"),
    "KeyDiffPress": (lambda: kvpress.KeyDiffPress(0.5), "keydiff"),
    "LagKVPress": (lambda: kvpress.LagKVPress(0.5, 4, 16), "lagkv(chunk=16, sink=4)"),
    "LagKVPress, cut within a rank": (lambda: kvpress.LagKVPress(0.53, 4, 16), "lagkv(chunk=16, sink=4)"),
    "CURPress": (lambda: kvpress.CURPress(0.5), "curdkv"),
    "CURPress, key, whole prompt": (
        lambda: kvpress.CURPress(0.5, leverage_type="key", use_local_approximation=False),
        "curdkv(local=0, use='key')",
    ),
    "ExpectedAttentionPress": (lambda: kvpress.ExpectedAttentionPress(0.5), "expected-attention"),
    "ExpectedAttentionPress, mean only": (
        lambda: kvpress.ExpectedAttentionPress(0.7, 64, 2, False, False),
        "expected-attention(future=64, sink=2, covariance=False, norm=False)",
    ),
    "StreamingLLMPress": (lambda: kvpress.StreamingLLMPress(0.5, 4), "streaming-llm(sink=4)"),
}


@pytest.fixture(scope="module")
def llama():
    return tiny(tf.LlamaConfig)


@pytest.fixture(scope="module")
def prompts(llama):
    return [observe(llama, tokens(seed, PROMPT)) for seed in SEEDS]


@torch.no_grad()
def pressed(model, press, seed):
    """Per layer and head, what the press leaves of the prompt."""
    cache = tf.DynamicCache()
    with press(model):
        model(input_ids=tokens(seed, PROMPT), past_key_values=cache, use_cache=True)
    return [layer.keys[0] for layer in cache.layers]


def compare(spec, theirs, seen) -> int:
    """Assert that `theirs`, sets of one budget by lane, are ours but for near ties; returns how many changed places."""
    budget, stride = len(next(iter(theirs.values()))), seen.trace.requests()[0].stride
    run, scored = replay(spec, budget, seen.trace), replay(spec, stride, seen.trace)
    changed = 0
    for lane, right in theirs.items():
        ours, score = set(run.kept(lane, start=0)[0]), scored.score[0][lane]
        assert len(ours) == len(right) == budget
        for mine, other in zip(
            sorted(ours - right, key=lambda j: score[j]), sorted(right - ours, key=lambda j: score[j]), strict=True
        ):
            assert abs(score[mine] - score[other]) <= NEAR * abs(score[other]), (spec, lane, mine, other)
            changed += 1
    return changed


@pytest.mark.parametrize("name", PRESSES)
def test_press(name, llama, prompts, agreement):
    make, spec = PRESSES[name]
    per_layer = registry.build(spec).granularity == "layer"
    entries = changed = 0
    for seed, seen in zip(SEEDS, prompts, strict=True):
        left = [found(kept, keys) for kept, keys in zip(pressed(llama, make(), seed), seen.keys, strict=True)]
        if per_layer:
            assert all(heads[0] == heads[1] for heads in left)
            left = [heads[:1] for heads in left]
        theirs = dict(enumerate(heads for layer in left for heads in layer))
        changed += compare(spec, theirs, seen)
        entries += sum(map(len, theirs.values()))
    report(agreement, name, spec, f"{len(theirs[0])} of {PROMPT}", entries, changed)


def report(agreement, theirs, ours, kept, entries, changed, note=""):
    agreement(
        "kvpress",
        kvpress=theirs, kvsim=f"`{ours}`", kept=kept,
        **{"entries compared": f"{entries:,}", "ties that changed places": changed}, note=note,
    )  # fmt: skip


def test_pyramid(llama, prompts, agreement):
    """Given the layer budgets of the press, the same entries; its budgets are not the published ones."""
    press = kvpress.PyramidKVPress(0.7, 8, 5, 3)
    entries = changed = 0
    for seed, seen in zip(SEEDS, prompts, strict=True):
        for layer, kept in enumerate(pressed(llama, press, seed)):
            heads = found(kept, seen.keys[layer])
            theirs = {2 * layer + h: s for h, s in enumerate(heads)}
            changed += compare("snapkv(window=8, kernel=5)", theirs, seen)
            entries += sum(map(len, heads))
    budgets = [press.get_layer_budget(layer.self_attn, PROMPT) for layer in llama.model.layers]
    run = replay("pyramidkv(window=8, kernel=5, beta=3)", budgets[1], prompts[0].trace)
    own = [len(run.kept(2 * layer, start=0)[0]) for layer in range(3)]
    assert budgets == [48, 29, 10] and own == [43, 29, 15]  # both by hand from the two formulas
    note = f"at the press's layer budgets; `pyramidkv(window=8, beta=3)` at {budgets[1]} keeps {own}"
    report(agreement, "PyramidKVPress", "snapkv(window=8, kernel=5)", f"{budgets} of {PROMPT}", entries, changed, note)


def test_simlayer(llama, prompts, agreement):
    """Layers above the threshold keep sinks and a window, others all; the press's window is 29 - 1."""
    entries = lazy = 0
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.9):
        press = kvpress.SimLayerKVPress(threshold, 1, 29, 4)
        for seed, seen in zip(SEEDS, prompts, strict=True):
            run = replay(f"simlayerkv(threshold={threshold}, last=1, sink=4)", 32, seen.trace)
            for layer, kept in enumerate(pressed(llama, press, seed)):
                for heads in found(kept, seen.keys[layer]):
                    assert set(run.kept(layer, start=0)[0]) == heads
                    entries += len(heads)
                lazy += kept.shape[1] < PROMPT
    total = 5 * len(SEEDS) * 3
    assert 0 < lazy < total  # both kinds of layer were seen
    note = f"thresholds 0.1 to 0.9: {lazy} of {total} layers lazy"
    report(agreement, "SimLayerKVPress", "simlayerkv(sink=4)", f"32 or {PROMPT}", entries, 0, note)


def test_chunks_are_pages(prompts, agreement):
    """ChunkKV is a page size and one decision per layer: no policy of its own."""
    model = tiny(tf.LlamaConfig, "sdpa")  # the press refuses eager attention
    press = kvpress.ChunkKVPress(kvpress.SnapKVPress(0.5, 16, 1), chunk_length=8)
    entries = 0
    for seed, seen in zip(SEEDS, prompts, strict=True):
        run = replay("snapkv(window=16, kernel=1)", 6, seen.trace.paged(8), "layer")
        for layer, kept in enumerate(pressed(model, press, seed)):
            pages = set(run.kept(layer, start=0)[0])
            near = torch.cdist(kept, seen.keys[layer]).argmin(-1)  # sdpa's keys are eager's but for rounding
            for heads in near.tolist():
                assert {j // 8 for j in heads} == pages and len(set(heads)) == 48
                entries += 48
    report(
        agreement, "ChunkKVPress(SnapKVPress, kernel 1), chunks of 8", "snapkv(window=16, kernel=1)",
        f"48 of {PROMPT}", entries, 0, "`--page-size 8 --granularity layer`",
    )  # fmt: skip


@pytest.mark.skipif("ada-kv" not in registry.names("policy"), reason="no allocator of that name")
def test_ada(prompts, agreement):
    """AdaKV hides entries instead of dropping them; what it does not hide is what it keeps."""
    model = tiny(tf.LlamaConfig, "sdpa")  # the press refuses eager attention
    press, entries = kvpress.AdaKVPress(kvpress.SnapKVPress(0.5, 16, 5), 0.2), 0
    spec = "ada-kv(inner='snapkv(window=16, kernel=5)', alpha=0.2)"
    for seed, seen in zip(SEEDS, prompts, strict=True):
        pressed(model, press, seed)
        run = replay(spec, PROMPT // 2, seen.trace)
        for layer, module in enumerate(model.model.layers):
            kept = torch.ones(2, PROMPT, dtype=torch.bool)
            _, head, position = module.self_attn.masked_key_indices
            kept[head, position] = False
            for h in range(2):
                assert run.kept(2 * layer + h, start=0)[0] == np.flatnonzero(kept[h].numpy()).tolist()
            entries += int(kept.sum())
    report(agreement, "AdaKVPress(SnapKVPress)", spec, f"48 of {PROMPT} on average", entries, 0)


def test_a_larger_score_does_not_hide_a_difference(llama, prompts):
    """The comparison can fail: another kernel leaves other entries."""
    theirs = found(pressed(llama, kvpress.SnapKVPress(0.5, 16, 5), 0)[0], prompts[0].keys[0])
    with pytest.raises(AssertionError):
        compare("snapkv(window=16, kernel=1)", dict(enumerate(theirs)), prompts[0])
