"""From a model and prompts to a trace that reads back as eager attention, and what stops on the way."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvsim.errors import ConfigError, TraceError  # noqa: E402
from kvsim.measure import CaptureError  # noqa: E402
from kvsim.measure.capture import capture  # noqa: E402
from kvsim.measure.prompts import prompt, task_prompts  # noqa: E402
from kvsim.simulate import run  # noqa: E402
from kvsim.trace import open_trace  # noqa: E402
from tests.measure.models import forced_run, tiny  # noqa: E402
from tests.measure.test_prompts import TASK  # noqa: E402

LENGTHS = (17, 9, 13)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", attention="sdpa")


def prompts(steps: int | None = 12, lengths=LENGTHS):
    """Prompts of different lengths; with `steps`, a continuation of that many tokens."""
    rng = np.random.default_rng(3)
    return [prompt(rng.integers(3, 128, n + (steps or 0)), n) for n in lengths]


def eager_rows(model, p):
    """Eager attention, mean over the group: (prompt [layers, heads, P, P], per decode step and layer [heads, keys])."""
    ids = torch.from_numpy(p.tokens.astype(np.int64))[None]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    head, tail = ids[:, : p.prompt_len], ids[:, p.prompt_len : -1]
    _, seen = forced_run(model, head, torch.ones_like(head), tail, attentions=True)
    model.set_attn_implementation(before)
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    rows = [[a[0].view(heads, -1, *a.shape[-2:]).mean(1).numpy() for a in layers] for layers in seen]
    return np.stack(rows[0]), [[a[:, 0] for a in layers] for layers in rows[1:]]


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "gpt-oss"])
def test_a_lossless_batched_trace_equals_eager_attention_of_each_request_alone(tmp_path, name):
    model = tiny(name, attention=None)
    asked = prompts()
    path = capture(model, asked, tmp_path / "t.kvtrace", mode="forced", batch_size=2, lossless=True, prompt_rows="all")
    trace = open_trace(path)
    assert len(trace.sources) == 3
    for p, source in zip(asked, trace.sources, strict=True):
        assert (source.prompt_tokens, source.output_tokens) == (p.prompt_len, 11)
        assert source.facts["tokens"].tolist() == p.tokens.tolist()
        whole, rows = eager_rows(model, p)
        stats = source.prompt()
        np.testing.assert_allclose(stats.rows, whole.transpose(2, 0, 1, 3), atol=1e-6)
        np.testing.assert_allclose(stats.colsum, whole.sum(2), atol=5e-6)
        np.testing.assert_allclose(stats.colsq, (whole**2).sum(2), atol=5e-6)
        np.testing.assert_allclose(stats.colmax, whole.max(2), atol=1e-6)
        for step, (t, wanted) in enumerate(zip(source.token_rows(), rows, strict=True), 1):
            assert (t.step, t.kv_hi) == (step, p.prompt_len + step)
            for layer, lo in enumerate(t.kv_lo):
                row = np.zeros_like(t.row[layer])
                row[:, t.kv_hi - wanted[layer].shape[-1] : t.kv_hi] = wanted[layer]
                np.testing.assert_allclose(t.row[layer], row, atol=1e-6)
                assert lo == t.kv_hi - wanted[layer].shape[-1]


def test_sliding_layers_and_sinks_are_in_the_trace(tmp_path):
    trace = open_trace(capture(tiny("gpt-oss"), prompts(), tmp_path / "t.kvtrace", mode="forced", batch_size=3))
    kinds = trace.manifest["model"]["layer_kinds"]
    assert [k["kind"] for k in kinds] == ["sliding", "full"] and kinds[0]["window"] == 12
    assert trace.manifest["model"]["sinks"] is True
    steps = list(trace.sources[0].token_rows())
    assert steps[-1].kv_lo.tolist() == [17 + 11 - 12, 0]
    last = open_trace(tmp_path / "t.kvtrace").sources[1].prompt()
    assert last.kv_lo.shape == (9, 2) and last.kv_lo.max() == 0  # nine tokens: the window is wider


def test_free_running_equals_generate(tmp_path, llama):
    asked = prompts(None)
    path = capture(llama, asked, tmp_path / "t.kvtrace", max_new_tokens=10, batch_size=3)
    for p, source in zip(asked, open_trace(path).sources, strict=True):
        ids = torch.from_numpy(p.tokens.astype(np.int64))[None]
        wanted = llama.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10)[0]
        assert source.facts["tokens"].tolist() == wanted.tolist()
        assert source.output_tokens == len(wanted) - p.prompt_len - 1


def test_a_request_is_dropped_from_its_stop_token_on(tmp_path, llama):
    asked = prompts(None)
    free = open_trace(capture(llama, asked, tmp_path / "free.kvtrace", max_new_tokens=12, batch_size=3))
    tails = [s.facts["tokens"][p.prompt_len :].tolist() for s, p in zip(free.sources, asked, strict=True)]
    stop = tails[0][4]
    before = llama.generation_config.eos_token_id
    llama.generation_config.eos_token_id = [stop, 127_000]
    try:
        cut = open_trace(capture(llama, asked, tmp_path / "cut.kvtrace", max_new_tokens=12, batch_size=3))
    finally:
        llama.generation_config.eos_token_id = before
    for source, tail, p in zip(cut.sources, tails, asked, strict=True):
        wanted = tail[: tail.index(stop) + 1] if stop in tail else tail
        assert source.facts["tokens"][p.prompt_len :].tolist() == wanted
        assert source.output_tokens == len(wanted) - 1 == len(list(source.token_rows()))
        assert source.facts["stop"] == ("eos" if wanted[-1] == stop else "length")


def test_a_padded_batch_equals_single_runs(tmp_path, llama):
    asked = prompts()
    how = {"mode": "forced", "lossless": True, "heads": "max"}
    single = open_trace(capture(llama, asked, tmp_path / "one.kvtrace", batch_size=1, **how))
    batched = open_trace(capture(llama, asked, tmp_path / "all.kvtrace", batch_size=3, **how))
    for a, b in zip(single.sources, batched.sources, strict=True):
        assert (b.facts["pad"], b.facts["batch_slot"]) == (17 - b.prompt_tokens, b.id)
        np.testing.assert_allclose(a.prompt().rows, b.prompt().rows, atol=2e-6)
        for x, y in zip(a.token_rows(), b.token_rows(), strict=True):
            np.testing.assert_allclose(x.row, y.row, atol=2e-6)
        for x, y in zip(a.max_rows(), b.max_rows(), strict=True):
            np.testing.assert_allclose(x.row, y.row, atol=2e-6)
        np.testing.assert_allclose(a.facts["logprob"], b.facts["logprob"], atol=1e-4)


def test_forced_requests_of_different_lengths_end_on_their_own(tmp_path, llama):
    asked = [*prompts(3, (11,)), *prompts(9, (6,)), *prompts(1, (5,))]
    trace = open_trace(capture(llama, asked, tmp_path / "t.kvtrace", mode="forced", batch_size=3))
    assert [s.output_tokens for s in trace.sources] == [2, 8, 0]
    assert [len(list(s.token_rows())) for s in trace.sources] == [2, 8, 0]
    short = open_trace(capture(llama, asked, tmp_path / "s.kvtrace", mode="forced", max_new_tokens=4))
    assert [s.output_tokens for s in short.sources] == [2, 3, 0]


def test_every_query_head_is_a_lane_of_its_own(tmp_path, llama):
    trace = open_trace(capture(llama, prompts(), tmp_path / "t.kvtrace", mode="forced", heads="query"))
    assert trace.lanes == (2, 8) and trace.manifest["heads"] == "query"
    assert trace.geometry.token_bytes * 8 == 2 * 8 * 4 * 2  # eight lanes share the bytes of two KV heads
    kv = open_trace(capture(llama, prompts(), tmp_path / "kv.kvtrace", mode="forced"))
    assert (kv.geometry.kv_heads, kv.geometry.group, kv.geometry.head_dim) == (2, 4, 8)


def test_step_columns(tmp_path, llama):
    asked = prompts(8, (10,))
    trace = open_trace(capture(llama, asked, tmp_path / "t.kvtrace", mode="forced"))
    facts, tokens = trace.sources[0].facts, asked[0].tokens.astype(np.int64)
    with torch.no_grad():
        log = torch.log_softmax(llama(torch.from_numpy(tokens)[None]).logits[0].float(), -1)
    at = np.arange(10, 17)  # step t feeds token 9 + t and chooses the next one
    assert facts["token"].tolist() == tokens[at + 1].tolist()
    np.testing.assert_allclose(facts["logprob"], log[at, tokens[at + 1]], atol=1e-4)
    np.testing.assert_allclose(facts["entropy"], -(log.exp() * log).sum(-1)[at], atol=1e-4)
    for name in ("step_seconds", "captured_step_seconds"):
        assert facts[name].shape == (7,) and (facts[name] > 0).all() and (facts[name] < 5).all()


def test_tasks_bring_gold_sources_and_checked_answers(tmp_path, llama):
    (tmp_path / "task.py").write_text(TASK)
    asked = task_prompts(tmp_path / "task.py", 2, settings={"size": 9})
    gold = open_trace(capture(llama, asked, tmp_path / "gold.kvtrace", mode="forced")).sources[0].facts
    assert [n.tolist() for n in gold["need"]] == [[1], [2], [3], [4]]  # of tokens 5 .. 8, behind the first one
    assert gold["right"] == [True]
    free = open_trace(capture(llama, asked, tmp_path / "free.kvtrace")).sources[0]
    assert free.output_tokens == 4 and free.facts["right"] == [False]
    assert not any(len(n) for n in free.facts["need"])  # left the gold chain at its first token


def test_query_heads_with_vectors_can_be_replayed(tmp_path, llama):
    """The output error knows the softmax of each query head for its row; a policy of keys sees those of its KV head."""
    found = {}
    for heads in ("query", "mean"):
        how = {"mode": "forced", "heads": heads, "vectors": True, "lossless": True}
        trace = open_trace(capture(llama, prompts(), tmp_path / f"{heads}.kvtrace", **how))
        found[heads] = run(trace, policy="keydiff", budget="50%", regime="lossy")
    by_query, by_group = found["query"], found["mean"]
    assert by_query.output_error == pytest.approx(by_group.output_error, abs=1e-6)
    assert by_query.recall == pytest.approx(by_group.recall, abs=1e-6) and by_group.recall < 1


def test_vectors_and_spans(tmp_path, llama):
    import pyarrow.parquet as pq

    asked = prompts(4, (10, 7))
    (tmp_path / "spans.json").write_text('[[0, 3, "head"], [3, 10, "tail"]]')
    path = capture(
        llama,
        asked,
        tmp_path / "t.kvtrace",
        mode="forced",
        batch_size=2,
        vectors=True,
        spans=tmp_path / "spans.json",
        prompt_rows="all",
        lossless=True,
    )
    trace = open_trace(path)
    for p, source in zip(asked, trace.sources, strict=True):
        parts = [v for v in source.vectors() if v.layer == 1]
        assert np.concatenate([v.positions for v in parts]).tolist() == list(range(p.prompt_len + 3))
        keys = np.concatenate([v.k for v in parts], 1).astype(np.float32)
        q = parts[-1].q[:, -1].astype(np.float32).reshape(2, 4, -1)
        score = np.einsum("hgd,hsd->hgs", q, keys) / 8**0.5
        weight = np.exp(score - score.max(-1, keepdims=True))
        weight = (weight / weight.sum(-1, keepdims=True)).mean(1)
        row = [t.row[1].copy() for t in source.token_rows()][-1]
        np.testing.assert_allclose(weight, row, atol=2e-2)  # vectors are half precision
        lines = pq.read_table(path / f"spans-{source.id}.parquet").to_pylist()
        rows = source.prompt().rows
        for line in lines:
            wanted = rows[line["start"] : line["end"], line["layer"], line["head"]].sum(0)
            np.testing.assert_allclose(np.frombuffer(line["colsum"], "<f4"), wanted, atol=5e-6)
        assert {line["name"] for line in lines} == {"head", "tail"} and lines[-1]["end"] == p.prompt_len
    assert len(trace.manifest["rotary"][0]["inv_freq"]) == 4


def test_rows_cross_in_chunks_whatever_their_size(tmp_path, llama, monkeypatch):
    from kvsim.measure import store

    whole = capture(llama, prompts(), tmp_path / "a.kvtrace", mode="forced", batch_size=2)
    monkeypatch.setattr(store, "CHUNK_BYTES", 1)
    each = capture(llama, prompts(), tmp_path / "b.kvtrace", mode="forced", batch_size=2)
    for i in range(3):
        name = f"attn-{i}.parquet"
        assert (whole / name).read_bytes() == (each / name).read_bytes()


# -- models from disk, manifest ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with a tokenizer of words w3 .. w127."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny("llama").save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


def test_a_folder_and_a_text_file_with_a_full_manifest(tmp_path, folder, monkeypatch):
    import hashlib

    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("w5 w6 w7 w8\nw9 w10\n")
    told = []
    capture(
        str(folder),
        "p.txt",
        "out.kvtrace",
        max_new_tokens=5,
        batch_size=2,
        seed=4,
        licence="CC0",
        captured_at="2026-01-01",
        progress=lambda *now: told.append(now),
    )
    trace = open_trace(tmp_path / "out.kvtrace")
    m = trace.manifest
    assert trace.sources[0].facts["tokens"][:4].tolist() == [5, 6, 7, 8]
    model = m["model"]
    assert (m["name"], model["architecture"], model["dtype"]) == ("tiny-llama", "LlamaForCausalLM", "float32")
    assert model["weights_sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert len(model["tokenizer"]["sha256"]) == 64 and model["config"]["num_hidden_layers"] == 2
    assert model["parameters"] == tiny("llama").num_parameters()
    assert [k["kind"] for k in model["layer_kinds"]] == ["full", "full"]
    assert (model["sinks"], model["softcap"]) == (False, None)
    assert m["prompts"] == {"source": "p.txt", "licence": "CC0", "count": 2}
    assert m["sampling"]["method"] == "greedy" and m["sampling"]["seed"] == 4 and m["sampling"]["stop_tokens"] == [2]
    assert m["attention"] == {"seen_through": "registry", "weights": "softmax in float32", "timed_with": "sdpa"}
    assert m["hardware"]["torch"] == torch.__version__ and m["hardware"]["transformers"] == transformers.__version__
    assert m["captured_at"] == "2026-01-01"
    assert str(tmp_path) not in json.dumps(m) and str(folder) not in json.dumps(m)
    assert trace.geometry.kv_bytes == 4 and trace.geometry.vocab == 128
    assert told[-1] == (8, 8, "done") and {what for _, _, what in told} == {"capturing", "timing", "done"}
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)


def test_number_type_is_asked_for_or_that_of_the_weights(tmp_path, folder):
    path = capture(folder, prompts(3, (5,)), tmp_path / "t.kvtrace", mode="forced", dtype="bfloat16")
    trace = open_trace(path)
    assert trace.manifest["model"]["dtype"] == "bfloat16" and trace.geometry.kv_bytes == 2
    assert "captured_at" not in trace.manifest


def test_models_in_memory_are_hashed_too_and_left_as_they_were(tmp_path, llama):
    a = open_trace(capture(llama, prompts(2), tmp_path / "a.kvtrace", mode="forced")).manifest["model"]
    b = open_trace(capture(tiny("llama", seed=1), prompts(2), tmp_path / "b.kvtrace", mode="forced")).manifest["model"]
    assert len(a["weights_sha256"]) == 64 and a["weights_sha256"] != b["weights_sha256"]
    assert llama.config._attn_implementation == "sdpa" and not llama._forward_pre_hooks
    assert a["tokenizer"] is None


# -- what stops a capture ---------------------------------------------------------------------------------------


def test_an_interrupted_capture_leaves_nothing(tmp_path, llama):
    def stop(done, total, what):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(llama, prompts(), tmp_path / "t.kvtrace", mode="forced", progress=stop)
    assert list(tmp_path.iterdir()) == []
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"mode": "sampled"}, "unknown mode"),
        ({"batch_size": 0}, "counted from 1"),
        ({"heads": "sum"}, "unknown reduction"),
        ({"dtype": "int8"}, "unknown number type"),
        ({"mode": "forced", "prompts": [prompt([3, 4])]}, "no tokens to follow"),
        ({"prompts": [prompt([3, 128])], "max_new_tokens": 5}, "outside of the model's 128"),
        ({"max_new_tokens": 257}, "the model has 256 positions"),
        ({"prompts": []}, "no prompts"),
        ({"prompt_rows": "most"}, 'prompt rows of "most"'),
        ({"prompt_rows": 0}, "counted from 1"),
    ],
)
def test_wrong_requests_are_refused(tmp_path, llama, how, match):
    how = {"prompts": prompts(), **how}
    with pytest.raises(ConfigError, match=match):
        capture(llama, how.pop("prompts"), tmp_path / "t.kvtrace", **how)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_captured_is_refused(tmp_path, llama):
    with pytest.raises(CaptureError, match="compiled"):
        capture(torch.compile(llama, backend="eager"), prompts(), tmp_path / "t.kvtrace")
    with pytest.raises(CaptureError, match="cannot be loaded"):
        capture(tmp_path, prompts(), tmp_path / "t.kvtrace")
    (tmp_path / "there.kvtrace").mkdir()
    with pytest.raises(TraceError, match="exists already"):
        capture(llama, prompts(), tmp_path / "there.kvtrace")
    if not torch.cuda.is_available():
        with pytest.raises(CaptureError, match="no CUDA GPU"):
            capture(llama, prompts(), tmp_path / "t.kvtrace", device="cuda")


def test_models_outside_of_the_registry_are_tapped(tmp_path, llama, monkeypatch):
    wanted = open_trace(capture(llama, prompts(), tmp_path / "a.kvtrace", mode="forced", batch_size=2, lossless=True))
    monkeypatch.setattr(type(llama), "_can_set_attn_implementation", classmethod(lambda cls: False))
    tapped = open_trace(capture(llama, prompts(), tmp_path / "b.kvtrace", mode="forced", batch_size=2, lossless=True))
    assert tapped.manifest["attention"]["seen_through"] == "tap"
    for a, b in zip(wanted.sources, tapped.sources, strict=True):
        for x, y in zip(a.token_rows(), b.token_rows(), strict=True):
            np.testing.assert_allclose(x.row, y.row, atol=1e-6)
