"""The recorder sees what eager attention computes, in every architecture, padded or not, and changes nothing."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvsim.measure import CaptureError  # noqa: E402
from kvsim.measure.hooks import NAME, watching  # noqa: E402
from kvsim.measure.recorder import Recorder  # noqa: E402
from tests.measure.models import CONFIGS, batch, forced_run, tiny  # noqa: E402

TOLERANCE = 5e-6


def record(model, ids, mask, forced, cache=None, via=None, spans=(), **settings):
    """(logits, prompt layers, decode rows per step)."""
    recorder = Recorder(prompt_rows=4, row_block=7, **settings)
    recorder.spans = spans
    with watching(model, recorder, via=via):
        logits, _ = forced_run(model, ids, mask, forced, cache=cache)
    notes = recorder.take()
    layers = len(recorder.features)
    passes = [notes[i :: len(notes) // layers] for i in range(len(notes) // layers)]
    return logits, passes[0], passes[1:]


def grouped(weights, kv_heads):
    """[batch, query heads, rows, keys] -> [batch, KV heads, group, rows, keys]."""
    b, h, r, s = weights.shape
    return weights.float().view(b, kv_heads, h // kv_heads, r, s)


def close(a, b, tolerance=TOLERANCE):
    assert a.shape == b.shape
    assert float((torch.as_tensor(a) - torch.as_tensor(b)).detach().abs().max()) <= tolerance


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_and_prompt_statistics_equal_eager_attention(name, padded):
    model = tiny(name)
    ids, mask, forced = batch(padded)
    wanted, attention = forced_run(model, ids, mask, forced, attentions=True)
    logits, prompt, steps = record(model, ids, mask, forced, heads="max")
    assert float((logits - wanted).abs().max() / wanted.abs().max()) <= 4e-6

    P, B = ids.shape[1], ids.shape[0]
    for layer, note in enumerate(prompt):
        eager = grouped(attention[0][layer], note.colsum.shape[1]) * mask[:, None, None, :, None]  # padding rows: none
        mean = eager.mean(2)
        close(mean.sum(2), note.colsum)
        close(mean.square().sum(2), note.colsq)
        close(mean.amax(2), note.colmax)
        close(mean[:, :, -4:], note.rows)
        close(eager.amax(2)[:, :, -4:], note.peaks)
    for step, notes in enumerate(steps, 1):
        assert [n.layer for n in notes] == list(range(len(notes)))
        for note in notes:
            eager = grouped(attention[step][note.layer], note.mean.shape[1])[:, :, :, 0]
            assert note.kv_lo == P + step - eager.shape[-1]
            close(eager.mean(2), note.mean)
            close(eager.amax(2), note.peak)
            total = note.mean.sum(-1) + (0 if note.sink is None else note.sink)
            close(total, torch.ones(B, note.mean.shape[1]))
    assert (prompt[0].sinks is not None) == (name == "gpt-oss")


def test_every_query_head_without_reduction():
    model = tiny("llama")
    ids, mask, forced = batch(True)
    _, attention = forced_run(model, ids, mask, forced, attentions=True)
    _, prompt, steps = record(model, ids, mask, forced, heads="query")
    close(attention[3][1][:, :, 0], steps[2][1].mean)
    close(attention[0][0][:, :, -4:], prompt[0].rows)


def test_half_precision_rows_are_softmax_in_float32():
    model = tiny("llama").to(torch.bfloat16)
    ids, mask, forced = batch(False)
    _, _, steps = record(model, ids, mask, forced)
    for note in steps[-1]:
        assert note.mean.dtype == torch.float32
        close(note.mean.sum(-1), torch.ones(3, 2), 1e-6)


def test_span_sums_add_up_rows_of_the_span_only():
    model = tiny("llama")
    ids, mask, forced = batch(True)
    _, attention = forced_run(model, ids, mask, forced, attentions=True)
    spans = [[(0, 6), (6, 20)], [(5, 13)], []]
    _, prompt, _ = record(model, ids, mask, forced, spans=spans)
    mean = grouped(attention[0][1], 2).mean(2)
    close(mean[0, :, 0:6].sum(1), prompt[1].spans[0][0])
    close(mean[0, :, 6:20].sum(1), prompt[1].spans[0][1])
    close(mean[1, :, 5:13].sum(1), prompt[1].spans[1][0])
    assert prompt[1].spans[2].shape[0] == 0


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_a_static_cache_is_cut_to_what_is_filled(name):
    model = tiny(name)
    ids, mask, forced = batch(False, prompt=7)
    _, attention = forced_run(model, ids, mask, forced, attentions=True)
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    _, prompt, steps = record(model, ids, mask, forced, cache=cache)
    close(grouped(attention[0][0], 2).mean(2).sum(2), prompt[0].colsum)
    for step, notes in enumerate(steps, 1):  # with the window, keys are dropped from step 4 on
        eager = grouped(attention[step][1], 2)[:, :, :, 0].mean(2)
        assert notes[1].kv_lo == 7 + step - eager.shape[-1]
        close(eager, notes[1].mean)


def test_prompt_rows_know_where_a_sliding_layer_begins_to_see():
    _, prompt, steps = record(tiny("mistral-window"), *batch(False))
    assert prompt[0].visible == [7, 8, 9, 10]  # queries 16..19 see ten tokens, themselves included
    assert steps[0][0].kv_lo == 11
    assert (prompt[0].rows[:, :, 0, :7] == 0).all() and (prompt[0].rows[:, :, 0, 7] > 0).all()


def test_vectors_are_the_new_tokens_as_attention_receives_them():
    model = tiny("llama")
    ids, mask, forced = batch(False)
    cache = transformers.DynamicCache(config=model.config)
    _, prompt, steps = record(model, ids, mask, forced, cache=cache, vectors=True)
    keys = torch.cat([prompt[1].vectors.k] + [s[1].vectors.k for s in steps], 2)
    values = torch.cat([prompt[1].vectors.v] + [s[1].vectors.v for s in steps], 2)
    assert torch.equal(keys, cache.layers[1].keys.half()) and torch.equal(values, cache.layers[1].values.half())
    q = steps[-1][1].vectors.q.float().view(3, 2, 4, 8)
    row = torch.softmax(torch.einsum("bhgd,bhsd->bhgs", q, keys.float()) / 8**0.5, -1).mean(2)
    close(row, steps[-1][1].mean, 2e-2)  # vectors are half precision, and the scores of this model are large


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2"])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_the_tap_sees_what_the_registry_sees(name, padded):
    model = tiny(name, attention="sdpa")
    run = batch(padded)
    _, prompt, steps = record(model, *run, via="registry")
    _, tapped_prompt, tapped_steps = record(model, *run, via="tap")
    for a, b in zip(prompt, tapped_prompt, strict=True):
        close(a.colsum, b.colsum)
        close(a.rows, b.rows)
    for here, there in zip(steps, tapped_steps, strict=True):
        for a, b in zip(here, there, strict=True):
            assert a.kv_lo == b.kv_lo
            close(a.mean, b.mean)


class Plain(torch.nn.Module):
    """A decoder of two attention layers that transformers has never heard of, without a cache."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(32, 96) for _ in range(2))

    def forward(self, x):
        for project in self.qkv:
            q, k, v = (t.view(*x.shape[:2], 4, 8).transpose(1, 2) for t in project(x).chunk(3, -1))
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + y.transpose(1, 2).flatten(2)
        return x


def test_a_module_without_transformers_is_tapped():
    model, x = Plain(), torch.randn(2, 9, 32) * 3
    recorder = Recorder(prompt_rows=None, row_block=4)
    with watching(model, recorder):
        seen = model(x)
    assert torch.equal(seen, model(x))
    q, k, _ = (t.view(2, 9, 4, 8).transpose(1, 2) for t in model.qkv[0](x).chunk(3, -1))
    score = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
    first, second = recorder.take()
    close(torch.softmax(score, -1), first.rows)
    assert (first.layer, second.layer) == (0, 1)


def test_observe_feeds_the_recorder_by_hand():
    recorder = Recorder(prompt_rows=None)
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    recorder.observe(0, q, k)
    recorder.begin(5)
    additive = torch.zeros(1, 1, 1, 6).index_fill(3, torch.tensor([2]), torch.finfo(torch.float32).min)
    recorder.observe(0, q[:, :, -1:], torch.cat([k, k[:, :, :1]], 2), additive, 0.5)
    prompt, step = recorder.take()
    close(prompt.rows.sum(-1), torch.ones(1, 2, 5))
    assert prompt.rows[0, 0, 0, 0] == 1 and (step.mean[..., 2] == 0).all() and step.mean.shape == (1, 2, 6)
    assert recorder.take() == []


def test_masks_may_differ_between_query_heads():
    q, k, hidden = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.rand(2, 4, 3, 3) < 0.3
    hidden |= torch.ones(3, 3).triu(1).bool()
    wanted = torch.softmax((q @ k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(hidden, float("-inf")), -1)
    for mask in (~hidden, torch.zeros(2, 4, 3, 3).masked_fill(hidden, float("-inf"))):
        recorder = Recorder(heads="query", row_block=2)
        recorder.observe(0, q, k, mask)
        close(wanted.nan_to_num(0.0), recorder.take()[0].rows)


# -- refusals ---------------------------------------------------------------------------------------------------


def refused(model, match, **how):
    with pytest.raises(CaptureError, match=match), watching(model, Recorder(), **how):
        model(torch.ones(1, 4, dtype=torch.long))


def test_compiled_models_are_refused():
    compiled = torch.compile(tiny("llama"), backend="eager")
    refused(compiled, "compiled")
    inside = tiny("llama")
    inside.model.layers[0].compile(backend="eager")
    refused(inside, "compiled")
    method = tiny("llama")
    method.forward = torch.compile(method.forward, backend="eager")
    refused(method, "compiled")


def test_other_kernels_and_encoder_decoders_are_refused():
    model = tiny("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    refused(model, "flash_attention_2")
    model.config._attn_implementation_internal = "eager"
    model.config.is_encoder_decoder = True
    refused(model, "encoder-decoder")


def test_a_second_recorder_is_refused_and_the_model_is_left_as_it_was():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, other = tiny("llama"), tiny("qwen3", attention="sdpa")
    with watching(model, Recorder()):
        refused(other, "another model")
        refused(model, "already being captured")
    with pytest.raises(ZeroDivisionError), watching(other, Recorder()):
        raise ZeroDivisionError
    assert (model.config._attn_implementation, other.config._attn_implementation) == ("eager", "sdpa")
    assert NAME not in ALL_ATTENTION_FUNCTIONS and not model._forward_pre_hooks


def test_a_prompt_in_pieces_and_a_layer_seen_twice_are_refused():
    model = tiny("llama")
    cache = transformers.DynamicCache(config=model.config)
    with watching(model, Recorder()):
        model(torch.ones(1, 4, dtype=torch.long), past_key_values=cache)
        with pytest.raises(CaptureError, match="3 tokens were added to a cache that holds 4"):
            model(torch.ones(1, 3, dtype=torch.long), past_key_values=cache)
    recorder = Recorder()
    recorder.observe(0, torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    with pytest.raises(CaptureError, match="twice"):
        recorder.observe(0, torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))


def test_wrong_settings_are_refused():
    with pytest.raises(CaptureError, match="unknown reduction"):
        Recorder(heads="sum")
    with pytest.raises(CaptureError, match="counted from 1"):
        Recorder(prompt_rows=0)


def test_a_position_bias_is_refused():
    model = tiny("llama", attention="sdpa")
    with pytest.raises(CaptureError, match="position_bias"), watching(model, Recorder()):
        model(torch.ones(1, 4, dtype=torch.long), position_bias=torch.zeros(1, 8, 4, 4))
