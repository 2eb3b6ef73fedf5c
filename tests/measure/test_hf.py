"""transformers models of a shape: decoding, the offloaded cache and what capture costs, on toy sizes."""

from __future__ import annotations

import tarfile

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvsim.errors import ConfigError  # noqa: E402
from kvsim.measure import hf, overhead  # noqa: E402
from kvsim.measure.bare import Shape  # noqa: E402
from kvsim.measure.rows import RowLog, read_rows  # noqa: E402
from kvsim.trace import open_trace  # noqa: E402

LLAMA = Shape("llama-3.2-1b", 2, 32, 4, 2, 8, 48, 64, 4)
QWEN = Shape("qwen2.5-7b", 2, 32, 4, 2, 8, 48, 64, 4)


@pytest.fixture(scope="module")
def model():
    return hf.model_of(LLAMA, "cpu")


def parameters(s: Shape, tied: bool, biased: bool) -> int:
    """Counted by hand: matrices, norms, biases of q, k and v, embeddings."""
    kv = s.kv_heads * s.head_dim
    query = s.heads * s.head_dim
    layer = s.hidden * (2 * query + 2 * kv) + 3 * s.hidden * s.intermediate + 2 * s.hidden
    layer += (query + 2 * kv) if biased else 0
    return s.layers * layer + s.hidden + (1 if tied else 2) * s.vocab * s.hidden


@pytest.mark.parametrize(("shape", "tied", "biased"), [(LLAMA, True, False), (QWEN, False, True)])
def test_a_model_has_the_sizes_of_its_shape(shape, tied, biased):
    model = hf.model_of(shape, "cpu", seed=1)
    assert type(model).__name__ == ("Qwen2ForCausalLM" if biased else "LlamaForCausalLM")
    assert sum(p.numel() for p in model.parameters()) == parameters(shape, tied, biased)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    again, other = hf.model_of(shape, "cpu", seed=1), hf.model_of(shape, "cpu", seed=2)
    assert model.lm_head.weight.equal(again.lm_head.weight) and not model.lm_head.weight.equal(other.lm_head.weight)


def test_value_bytes_of_two_mean_bfloat16():
    model = hf.model_of(Shape("tiny", 1, 16, 2, 1, 8, 16, 16, 2), "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_filled_cache_holds_the_tokens_of_every_layer(model):
    a, b = (hf.filled_cache(model, LLAMA, 3, 10) for _ in range(2))
    assert a.get_seq_length() == 10 and len(a.layers) == LLAMA.layers
    for x, y in zip(a.layers, b.layers, strict=True):
        assert x.keys.shape == (3, LLAMA.kv_heads, 10, LLAMA.head_dim)
        assert x.keys.equal(y.keys) and x.values.equal(y.values) and not x.keys.equal(x.values)
        assert 0.8 < float(x.keys.std()) < 1.2
    assert not a.layers[0].keys.equal(a.layers[1].keys)


def test_decoding_over_a_cache_is_decoding_without_one(model):
    prompt = torch.randint(0, LLAMA.vocab, (2, 7), generator=torch.Generator().manual_seed(3))
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=cache, use_cache=True)
    found = hf.decode_steps(model, cache, 2, 4)
    assert cache.get_seq_length() == 7 + 4
    tokens = torch.stack([torch.arange(2), *(s.argmax(-1) for s in found.scores[:-1])], 1)
    with torch.no_grad():
        wanted = model(input_ids=torch.cat([prompt, tokens], 1)).logits[:, 7:]
    torch.testing.assert_close(torch.stack(found.scores, 1), wanted, rtol=1e-4, atol=1e-5)
    assert len(found.ms) == len(found.submit_ms) == 4 and found.gpu_ms == []
    assert all(whole >= submit > 0 for whole, submit in zip(found.ms, found.submit_ms, strict=True))


def test_rows_have_the_form_of_measured_rows(model, tmp_path):
    rows = [
        hf.run_decode(model, LLAMA, 2, 12, steps=3, warm_up=2),
        hf.run_prefill(model, LLAMA, 1, 9, steps=4),
        overhead.run_cost(model, LLAMA, 1, 12, "plain", steps=2, warm_up=1),
    ]
    with RowLog(tmp_path / "rows.jsonl") as log:
        for i, row in enumerate(rows):
            log.add(f"cpu/{row['phase']}/{i}", **row)
    decode, prefill, cost = read_rows([tmp_path / "rows.jsonl"])
    assert (decode["params"]["impl"], decode["params"]["sequences"], decode["params"]["context"]) == (
        "hf-decode",
        2,
        12,
    )
    assert len(decode["ms"]) == len(decode["submit_ms"]) == 3
    assert decode["params"]["shape"] == LLAMA.sizes and decode["params"]["model"] == "llama-3.2-1b"
    assert (prefill["params"]["impl"], prefill["params"]["context"], len(prefill["ms"])) == ("hf-prefill", 9, 4)
    assert (cost["phase"], cost["params"]["mode"], len(cost["ms"])) == ("capture-cost", "plain", 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_offloaded_cache_is_refused_without_cuda(model):
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        hf.offloaded_cache(model, LLAMA, 1, 4)


class Stream:
    """Stands for a CUDA stream: notes what waits for what."""

    events: list[str] = []

    def __init__(self, name: str = "prefetch"):
        self.name = name

    def wait_stream(self, other):
        self.events.append(f"{self.name} waits for {other.name}")

    def __enter__(self):
        self.events.append("prefetch")

    def __exit__(self, *_):
        pass


@pytest.fixture
def streams(monkeypatch):
    """transformers' offloaded cache on a CPU, where moving a layer does nothing."""
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: Stream("compute"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hf, "_pinned", torch.clone)
    monkeypatch.setattr(Stream, "events", [])
    return Stream.events


@pytest.mark.parametrize("waiting", [True, False])
def test_the_offloaded_cache_decodes_as_the_resident_one(model, streams, waiting):
    row = hf.run_offloaded(model, LLAMA, 2, 10, waiting=waiting, steps=3, warm_up=1)
    p = row["params"]
    assert (p["impl"], p["waiting"], p["context"]) == ("hf-offloaded", waiting, 10)
    assert (p["checked_steps"], p["same_steps"], p["worst_difference"]) == (4, 4, 0.0)
    assert len(row["ms"]) == 3
    assert streams.count("prefetch") == 4 * LLAMA.layers


def test_a_waiting_cache_waits_before_every_prefetch(model, streams):
    hf.run_offloaded(model, LLAMA, 1, 10, steps=2, warm_up=0)
    before = [streams[i - 1] for i, event in enumerate(streams) if event == "prefetch"]
    assert len(before) == 2 * LLAMA.layers and set(before) == {"prefetch waits for compute"}


def test_a_cache_of_other_content_is_noticed(model, streams, monkeypatch):
    monkeypatch.setattr(hf, "_pinned", lambda x: x + 1.0)
    p = hf.run_offloaded(model, LLAMA, 1, 10, steps=2, warm_up=0)["params"]
    assert p["same_steps"] < p["checked_steps"] and p["worst_difference"] > 0


@pytest.mark.parametrize("mode", overhead.MODES)
def test_each_mode_of_capture_cost_leaves_the_model_as_it_was(model, mode):
    row = overhead.run_cost(model, LLAMA, 1, 16, mode, steps=2, warm_up=1)
    assert row["kind"] == row["params"]["mode"] == mode and len(row["ms"]) == 2
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks


def test_modes_do_what_they_say(model, monkeypatch):
    asked = []
    forward = type(model).forward

    def watched(self, *args, **kwargs):
        asked.append((self.config._attn_implementation, kwargs.get("output_attentions", False)))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    for mode in overhead.MODES:
        overhead.run_cost(model, LLAMA, 1, 16, mode, steps=1, warm_up=0)
    assert asked == [("sdpa", False), ("kvsim_capture", False), ("eager", True)]


def test_captured_rows_are_eagers(model):
    row = overhead.run_comparison(LLAMA, "cpu", 24, steps=3)
    assert 0 <= row["params"]["worst_difference"] < 1e-5 and len(row["ms"]) == 3
    assert row["params"]["shape"]["layers"] == 2 and row["params"]["shape"]["value_bytes"] == 4


def test_rows_that_are_not_eagers_are_noticed(model, monkeypatch):
    from kvsim.measure import recorder

    monkeypatch.setattr(recorder, "_reduced", lambda weights, heads: weights.amax(2))
    assert overhead.run_comparison(LLAMA, "cpu", 24)["params"]["worst_difference"] > 1e-3


def test_a_short_trace_comes_with_its_twin(model, tmp_path):
    row = overhead.run_trace(model, LLAMA, tmp_path / "t.tar", prompt=12, steps=5)
    assert len(row["ms"]) == 5 and row["params"]["bytes"] == (tmp_path / "t.tar").stat().st_size
    with tarfile.open(tmp_path / "t.tar") as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and later know filters
        tar.extractall(tmp_path)
    trace = open_trace(tmp_path / "llama-3.2-1b.kvtrace")
    (source,) = trace.sources
    assert (source.prompt_tokens, source.output_tokens) == (12, 5)
    assert source.facts["step_seconds"] * 1e3 == pytest.approx(row["ms"])
    assert len(source.facts["captured_step_seconds"]) == 5
    g = trace.geometry
    assert (g.layers, g.kv_heads, g.head_dim) == (LLAMA.layers, LLAMA.kv_heads, LLAMA.head_dim)
