"""The reasoner: generator, gold sources, checker, training script, committed weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.reasoner import task

HERE = Path(__file__).resolve().parents[2] / "experiments" / "reasoner"

shapes = st.tuples(st.integers(1, 5), st.integers(1, 12), st.integers(1, 6), st.integers(1, 4))


def words(pack, positions):
    return [task.VOCAB[int(pack.tokens[s])] for s in positions]


def test_same_seed_same_pack():
    a, b = (task.sample(3, 5, problems=3, steps=6) for _ in range(2))
    assert (a.tokens == b.tokens).all() and a.need == b.need and (a.origin == b.origin).all()
    others = [task.sample(3, 6, problems=3, steps=6), task.sample(4, 5, problems=3, steps=6)]
    assert all((a.tokens != o.tokens).any() for o in others)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_length_needs_only_the_settings(shape, seed):
    problems, steps, constants, asks = shape
    p = task.sample(seed, 0, problems=problems, steps=steps, constants=constants, asks=asks)
    prompt, cot = task.lengths(problems=problems, steps=steps, constants=constants, asks=asks)
    assert (p.prompt_len, len(p.tokens)) == (prompt, prompt + cot)
    assert len(p.need) == len(p.origin) == len(p.tokens)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_every_generated_token_follows_from_its_gold_sources(shape, seed):
    """Rebuild each token from the words at its sources alone, knowing only the form of a step."""
    problems, steps, constants, asks = shape
    p = task.sample(seed, 1, problems=problems, steps=steps, constants=constants, asks=asks)
    text = [task.VOCAB[int(t)] for t in p.tokens]
    assert not any(p.need[: p.prompt_len])
    for j in range(p.prompt_len, len(text)):
        src, w = words(p, p.need[j]), text[j]
        assert src and all(0 <= s < j for s in p.need[j]), "row j-1 can only see positions before j"
        if len(src) == 2:  # the sum
            assert int(w) == (int(src[0]) + int(src[1])) % 10 and text[j - 2] == src[1]
        elif w[0] == "@":
            assert src == ["!" + w[1:]]
        elif w[0] == "!" and src[0][0] == "n":
            assert src == [w[1:]]
        elif w[0] == "!":
            assert src == ["&" + w[1:]] and text[j - 1] in (text[p.need[j][0] - 1], text[p.need[j][0] - 2])
        elif w[0] == "?" and text[j - 1].isdigit():
            assert src == [f"?{(int(w[1:]) - 1) % task.QUESTIONS}"] and text[j - 2][0] == "!"
        else:  # a look-up: the same word, found behind its key
            assert src == [w]
            s, key = p.need[j][0], text[j - 1]
            assert key in (text[s - 1], text[s - 2])
        if w.isdigit() and len(src) == 1:  # a recalled value is read where it was first stated
            assert text[p.need[j][0] - 1] == text[j - 1] and p.origin[p.need[j][0]] == p.origin[j]


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_origin_is_the_first_statement_of_the_same_content(shape, seed):
    problems, steps, constants, asks = shape
    p = task.sample(seed, 2, problems=problems, steps=steps, constants=constants, asks=asks)
    assert (p.tokens[p.origin] == p.tokens).all()
    assert (p.origin <= np.arange(len(p.tokens))).all() and (p.origin[p.origin] == p.origin).all()


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 2**31), st.data())
def test_checker_takes_gold_and_refuses_a_wrong_answer(shape, seed, data):
    problems, steps, constants, asks = shape
    p = task.sample(seed, 3, problems=problems, steps=steps, constants=constants, asks=asks)
    gold = p.tokens[p.prompt_len :].copy()
    assert task.is_right(p, gold) == [True] * problems
    assert task.is_right(p, np.append(gold, [task.EOS, task.BOS])) == [True] * problems
    which, k = data.draw(st.integers(0, problems - 1)), data.draw(st.integers(0, asks - 1))
    at = which * (6 * steps + 3 * asks + 5) + 2 + 6 * steps + 1 + 3 * k + 2
    assert task.VOCAB[gold[at]].isdigit()
    gold[at] = task.DIGIT + (gold[at] - task.DIGIT + 1) % 10
    assert task.is_right(p, gold) == [i != which for i in range(problems)]


def test_checker_survives_nonsense():
    p = task.sample(0, 0, problems=2, steps=3)
    assert task.is_right(p, []) == [False, False]
    assert task.is_right(p, [task.LABEL] * 40) == [False, False]
    assert task.is_right(p, [task.QUESTION]) == [False, False]
    cut = p.tokens[p.prompt_len : p.prompt_len + 35]  # the first problem is complete after 32 tokens
    assert task.is_right(p, cut) == [True, False]


def test_text_round_trip_and_size_limits():
    p = task.sample(1, 1, problems=2, steps=4)
    assert (task.encode(task.decode(p.tokens)) == p.tokens).all()
    assert len(set(task.VOCAB)) == len(task.VOCAB)
    with pytest.raises(ValueError):
        task.sample(0, 0, problems=20, steps=8)
    with pytest.raises(ValueError):
        task.sample(0, 0, problems=1, steps=0)


def test_reuse_gaps_have_a_heavy_tail():
    pytest.importorskip("transformers")
    from experiments.reasoner import evaluate

    g = evaluate.gaps(*evaluate.SHIPPED, samples=30)["results"]
    assert g["p99"] > 8 * g["p50"] and g["max"] > 200


@pytest.fixture(scope="module")
def model():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if not (HERE / "model" / "model.safetensors").exists():
        pytest.skip("no committed weights")
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32).eval()


def test_committed_weights_solve_the_shipped_setting(model):
    from experiments.reasoner import evaluate

    got = evaluate.accuracy(model, *evaluate.SHIPPED, samples=4, seed=77)
    assert got["decode"] >= 300
    assert got["problem"] >= 0.9 and got["pack"] >= 0.75, got


def test_committed_folder_is_small_and_consistent(model):
    folder = HERE / "model"
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 4_000_000
    assert model.config.vocab_size == len(task.VOCAB)
    assert model.config.eos_token_id == task.EOS
    words_ = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert words_ == task.ID
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(folder)
    p = task.sample(5, 5, problems=1, steps=3)
    assert tok(task.decode(p.tokens), add_special_tokens=False)["input_ids"] == p.tokens.tolist()


def test_published_table_is_that_of_these_weights():
    if not (HERE / "accuracy.json").exists():
        pytest.skip("not measured")
    result = json.loads((HERE / "accuracy.json").read_text())
    pytest.importorskip("transformers")
    from experiments.reasoner import evaluate

    assert evaluate.tables(result) in (HERE / "README.md").read_text()
    row = next(r for r in result["accuracy"] if [r["problems"], r["steps"]] == result["shipped"])
    assert row["samples"] >= 200 and row["pack"] >= 0.9
    size = sum(f.stat().st_size for f in (HERE / "model").glob("*.safetensors"))
    assert result["weights_bytes"] == size


def test_training_runs_stops_resumes_and_writes_loadable_weights(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from experiments.reasoner import train

    # The form, not the skill: a tiny model, a few seconds.
    args = [
        "--out",
        str(tmp_path),
        "--layers",
        "2",
        "--width",
        "32",
        "--heads",
        "4",
        "--kv-heads",
        "2",
        "--head-dim",
        "16",
        "--tokens",
        "512",
        "--report",
        "1",
        "--checkpoint",
        "1",
    ]
    first = train.main([*args, "--minutes", "0.04"])
    assert first["steps"] > 0 and (tmp_path / "checkpoint.pt").exists()
    second = train.main([*args, "--minutes", "0.08"])
    assert second["steps"] > first["steps"] // 2 and second["minutes"] > 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    out = model(torch.tensor([[task.BOS, task.GO]])).logits
    assert out.shape == (1, 2, len(task.VOCAB)) and torch.isfinite(out).all()
    log = json.loads((tmp_path / "train_log.json").read_text())
    assert log["log"] and str(tmp_path) not in json.dumps(log), "no path of a machine in a committed file"
