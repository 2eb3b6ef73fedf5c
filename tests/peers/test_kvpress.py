"""Our one-shot and key policies against kvpress: the same entries of the same prompt, head by head."""

from __future__ import annotations

import pytest

kvpress = pytest.importorskip("kvpress")
torch = pytest.importorskip("torch")
tf = pytest.importorskip("transformers")

import numpy as np  # noqa: E402

from kvsim import registry  # noqa: E402
from kvsim.trace.access import Seen as Vectors  # noqa: E402
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
        "kvpress", kvpress=theirs, kvsim=f"`{ours}`", kept=kept,
        **{"compared": entries, "ties that changed places": changed}, note=note,
    )  # fmt: skip


# What is another decision here than there. The budget is ours; theirs follows from the ratio.
DIFFERENT = {
    "SnapKVPress, its defaults": (
        lambda: kvpress.SnapKVPress(0.2), "snapkv", 76,
        "64 rows vote and stay there, here 32, as in the published initialisation; the kernel is 5 in both",
    ),
    "PyramidKVPress": (
        lambda: kvpress.PyramidKVPress(0.7, 8, 5, 3), "pyramidkv(window=8, beta=3)", 29,
        "keeps 48, 29 and 10 by layer; the published formula, which adds the window to each, 43, 29 and 15",
    ),
    "TOVAPress": (lambda: kvpress.TOVAPress(0.5), "tova", 48, "keeps the newest token whatever it got; TOVA does not"),
    "ObservedAttentionPress, as an H2O": (
        lambda: kvpress.ObservedAttentionPress(0.5), "h2o-prefill(window=1)", 48,
        "divides a token's sum by the number of its rows; KVCache-Factory's H2O does not",
    ),
    "ObservedAttentionPress, as H2O": (
        lambda: kvpress.ObservedAttentionPress(0.5), "h2o", 48, "as above, and half of H2O's budget is for the newest",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_decision(name, llama, prompts, agreement):
    make, spec, budget, why = DIFFERENT[name]
    entries = differ = 0
    for seed, seen in zip(SEEDS, prompts, strict=True):
        run = replay(spec, budget, seen.trace)
        for layer, kept in enumerate(pressed(llama, make(), seed)):
            for head, theirs in enumerate(found(kept, seen.keys[layer])):
                lane = layer if run.cache.lanes == 3 else 2 * layer + head
                entries, differ = entries + len(theirs), differ + len(theirs - set(run.kept(lane, start=0)[0]))
    contrast(agreement, name, spec, f"{budget} of {PROMPT}", entries, differ, why)


def contrast(agreement, theirs, ours, kept, entries, differ, why):
    assert differ > 0
    agreement(
        "kvpress differs",
        kvpress=theirs, kvsim=f"`{ours}`", kept=kept, compared=entries, differ=differ, why=why,
    )  # fmt: skip


def test_a_constant_dimension(llama):
    """Of the next chunk: there the whole chunk's scores are NaN and its order is left to the sort, here it is not."""
    keys = torch.randn(1, 2, PROMPT, 8, generator=torch.Generator().manual_seed(0))
    keys[:, :, 20:36, 3] = 1.0  # the second chunk of 16 after 4 sinks
    theirs = kvpress.LagKVPress(0.5, 4, 16, cross_scoring=True).score(None, None, keys, keys, None, None)[0]
    assert theirs.isnan().nonzero()[:, 1].tolist() == 2 * list(range(4, 20))
    x = keys.numpy()
    ours = registry.build("lagkv(chunk=16, sink=4)").tokens(
        Vectors(q=x, k=x, v=x, positions=None), 0, np.ones((1, x.shape[2]), bool)
    )
    assert all(sorted(head[4:20]) == list(range(16)) for head in ours)


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
    note = "at the press's layer budgets"
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
    assert kvpress.SimLayerKVPress().lazy_threshold == 1 > registry.build("simlayerkv").threshold == 0.9
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


SHORT, STEPS, EVERY, TARGET = 24, 32, 8, 28
DECODING = {  # press, inner policy, why they part after the first decision
    "KnormPress": (lambda: kvpress.KnormPress(), "knorm", ""),
    "TOVAPress": (lambda: kvpress.TOVAPress(), "tova-prefill", ""),
    "KeyDiffPress": (lambda: kvpress.KeyDiffPress(), "keydiff", ""),
    "StreamingLLMPress": (
        lambda: kvpress.StreamingLLMPress(n_sink=4), "streaming-llm(sink=4)",
        "the first decision is the same; it leaves entries in order of score, which the next takes for their age",
    ),
}  # fmt: skip


@torch.no_grad()
def decoded(model, press, ids):
    """The first layer's keys after the prompt and after each step."""
    cache = tf.DynamicCache()
    with kvpress.DecodingPress(press, compression_interval=EVERY, target_size=TARGET)(model):
        for step in range(STEPS + 1):
            at = torch.arange(SHORT) if step == 0 else torch.tensor([SHORT + step - 1])
            model(input_ids=ids[:, at], past_key_values=cache, use_cache=True, position_ids=at[None], cache_position=at)
            yield cache.layers[0].keys[0]


@pytest.mark.parametrize("name", DECODING)
def test_decoding(name, agreement):
    """Every 8 steps down to 28. In the first layer, where what was dropped has not changed queries and keys; one query
    head per KV head, so that rows renormalised are what the model computes. No token twice: its keys would be as long.
    """
    make, inner, why = DECODING[name]
    model, spec = tiny(tf.LlamaConfig, num_key_value_heads=4), f"lag(inner={inner!r}, every={EVERY}, shown={EVERY})"
    entries = differ = 0
    for seed in SEEDS:
        ids = 3 + torch.randperm(125, generator=torch.Generator().manual_seed(seed))[None, : SHORT + STEPS]
        seen = observe(model, ids, SHORT)
        run = replay(spec, TARGET, seen.trace)
        by_head = run.cache.lanes == 12
        for step, keys in enumerate(decoded(model, make(), ids)):
            near = (keys[:, :, None] - seen.keys[0][:, None]).abs().amax(-1)  # one pass over all rounds otherwise
            assert near.min(-1).values.max() < 1e-4
            for head, at in enumerate(near.argmin(-1).tolist()):
                theirs, ours = set(at), set(run.kept(head if by_head else 0, start=0)[step])
                assert len(theirs) == len(ours) == len(at) and (theirs == ours or (why and step >= 2 * EVERY))
                if step and step % EVERY == 0 and (by_head or head == 0):
                    entries, differ = entries + len(theirs), differ + len(theirs - ours)
    there, kept = f"DecodingPress({name})", f"{TARGET} of {SHORT + EVERY}, then of {TARGET + EVERY}"
    if why:
        contrast(agreement, there, spec, kept, entries, differ, why)
    else:
        report(agreement, there, spec, kept, entries, 0, f"first layer, a decision every {EVERY} steps")


def test_a_larger_score_does_not_hide_a_difference(llama, prompts):
    """The comparison can fail: another kernel leaves other entries."""
    theirs = found(pressed(llama, kvpress.SnapKVPress(0.5, 16, 5), 0)[0], prompts[0].keys[0])
    with pytest.raises(AssertionError):
        compare("snapkv(window=16, kernel=1)", dict(enumerate(theirs)), prompts[0])


ABSENT = {
    "base classes": ["BasePress", "ScorerPress"],
    "scores from trained weights, or from statistics, patterns or budgets published for certain models": [
        "DuoAttentionPress", "ExpectedAttentionStatsPress", "FastKVzipPress", "KVzapPress", "LUKVPress", "QFilterPress",
    ],
    "scores from W_o, from further passes or from gradients, none of which a trace holds": [
        "CriticalAdaKVPress", "CriticalKVPress", "KVgradPress", "KVzipPress",
    ],
    "merge, rewrite or add entries: what is left is no part of the prompt's": [
        "CAMPress", "KeyRerotationPress", "MergingPress", "RestoreKVPress", "ThinKPress",
    ],
    "random numbers of their own": ["CompactorPress", "LeverageScorePress", "RandomPress"],
    "other presses one after the other, or at other ratios by layer, chunk, block or step": [
        "BlockPress", "ChunkPress", "ComposedPress", "CompressionRatioDecodingPress", "PerLayerCompressionPress",
        "PrefillDecodingPress",
    ],
    "no policy here does the same": [
        "CapPress", "DMSPress", "EntropyGatedChunkKVPress", "FinchPress", "KVComposePress", "NonCausalAttnPress",
    ],
}  # fmt: skip


def test_every_press_is_compared_or_named(agreement):
    compared = {name.partition(",")[0] for name in [*PRESSES, *DIFFERENT, *DECODING]}
    compared |= {"AdaKVPress", "ChunkKVPress", "DecodingPress", "SimLayerKVPress"}
    absent = [name for names in ABSENT.values() for name in names]
    assert sorted([*compared, *absent]) == [name for name in dir(kvpress) if name.endswith("Press")]
    for why, names in ABSENT.items():
        agreement("kvpress not compared", why=why, presses=", ".join(names))
