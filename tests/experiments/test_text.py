"""The model of text: what is read and held out, what the loss counts, and that a capture takes what is left."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from experiments import training  # noqa: E402
from experiments.text import corpus, train  # noqa: E402
from kvsim.errors import ConfigError  # noqa: E402
from kvsim.measure.capture import capture  # noqa: E402
from kvsim.measure.prompts import read_prompts  # noqa: E402
from kvsim.trace import open_trace  # noqa: E402

TOY = ["--layers", "2", "--width", "32", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--vocabulary", "320"]
WORDS = [
    "for",
    "name",
    "in",
    "sorted(found):",
    "if value is None",
    "return",
    "self.method(other, 1234)",
    "raise ValueError",
]


def written(rng, lines):
    """Lines of made-up source."""
    return "".join(f"{' ' * 4 * int(rng.integers(3))}{' '.join(rng.choice(WORDS, 7))}\n" for _ in range(lines))


def a_library(root):
    """Forty modules, and beside them all that is no part of a corpus."""
    rng = np.random.default_rng(0)
    for i in range(40):
        path = root / f"package{i % 3}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(written(rng, 30), encoding="utf-8")
    others = (
        "test/one.py", "package0/tests/two.py", "site-packages/three.py", "encodings/four.py", "config-3/five.py",
        "_sysconfigdata_x.py", "notes.txt",
    )  # fmt: skip
    for name in others:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("not = 'to be read'\n", encoding="utf-8")
    (root / "latin.py").write_bytes("# caf\xe9\n".encode("latin-1"))
    return root


@pytest.fixture
def library(tmp_path):
    return corpus.standard_library(a_library(tmp_path / "library"))


# -- corpus ----------------------------------------------------------------------------------------------------------


def test_the_corpus_is_the_librarys_own_modules(library):
    assert sorted(d.name for d in library) == sorted(f"package{i % 3}/module{i}.py" for i in range(40))


def test_same_files_elsewhere_give_the_same_split_and_the_same_tokenizer(library, tmp_path):
    again = corpus.standard_library(a_library(tmp_path / "elsewhere"))
    assert corpus.digest(library) == corpus.digest(again)
    assert [d.name for d in library if corpus.is_held_out(d.name)] == [
        d.name for d in again if corpus.is_held_out(d.name)
    ]
    assert corpus.tokenizer(library, 320).to_str() == corpus.tokenizer(again, 320).to_str()
    changed = [corpus.Document(library[0].name, library[0].text + "#"), *library[1:]]
    assert corpus.digest(changed) != corpus.digest(library)


def test_one_file_in_sixteen_is_held_out_by_its_name_alone():
    held = sum(corpus.is_held_out(f"module{i}.py") for i in range(16_000))
    assert held == pytest.approx(1000, abs=100)  # three standard deviations of 31


def test_a_python_without_sources_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="no sources"):
        corpus.standard_library(tmp_path)


def test_pythons_own_library_is_read_without_its_tests():
    """Of this interpreter: some hundred files, none of tests, none that says where it was built, and topics."""
    found = {d.name: d.text for d in corpus.standard_library()}
    assert len(found) > 300 and {"json/decoder.py", "topics/for"} <= found.keys()
    assert not any({"test", "tests", "idle_test", "site-packages"} & set(name.split("/")) for name in found)
    assert not any("_sysconfigdata" in name for name in found)


def test_packages_that_repeat_held_out_files_are_not_learnt_from(library, tmp_path):
    root = tmp_path / "site-packages"
    root.mkdir()
    copy = "# vendored\n" + library[0].text
    own = "".join(f"a_function_of_this_package_number_{i}()\n" for i in range(30))
    for name, text in (("copy.py", copy), ("own.py", own), ("mostly_own.py", own + library[0].text[:80])):
        (root / name).write_text(text, encoding="utf-8")
    assert {d.name for d in corpus.packages([root], library)} == {"own.py", "mostly_own.py"}
    assert len(list(corpus.packages([root], []))) == 3


def test_reading_stops_at_so_many_characters_or_at_the_time(library):
    assert [len(list(corpus.first(library, mb))) for mb in (0, 1e-6, 100)] == [0, 1, 40]
    tokens = corpus.tokenizer(library, 320)
    whole, none = corpus.encode(tokens, library), corpus.encode(tokens, library, until=-math.inf)
    assert (none.documents, none.characters, len(none.ids)) == (0, 0, 0)
    assert whole.documents == 40 and whole.characters == sum(len(d.text) for d in library)
    assert (whole.ids == 0).sum() == 40 and whole.ids[0] == 0  # the mark before every file


def test_tokens_are_bytes_and_digits_stand_alone(library):
    tokens = corpus.tokenizer(library, 320)
    assert tokens.get_vocab_size() == 320 and tokens.token_to_id(corpus.END) == 0
    text = "x = 1234  # caf\xe9 \u4e2d\U0001f600\n\tdone"
    found = tokens.encode(text, add_special_tokens=False)
    assert tokens.decode(found.ids) == text
    assert [t for t in found.tokens if any(c.isdigit() for c in t)] == ["1", "2", "3", "4"]
    assert not any(c.isdigit() for t in tokens.get_vocab() for c in t if len(t) > 1 and t != corpus.END)


def test_captured_texts_are_long_enough_and_carry_no_notice():
    text = "value = other\n" * 20
    documents = [
        corpus.Document("short.py", "x\n"),
        corpus.Document("noticed.py", "# Copyright of somebody\n" + text),
        corpus.Document("good.py", text),
        corpus.Document("spare.py", text),
    ]
    tokens = corpus.tokenizer(documents, 270)
    ((name, ids),) = corpus.to_capture(tokens, documents, 1, 24)
    assert name == "good.py" and len(ids) == 24 and ids[0] == 0
    assert text.startswith(tokens.decode(ids))
    with pytest.raises(ConfigError, match="1 more held-out files of 24 tokens"):
        list(corpus.to_capture(tokens, documents, 3, 24))


# -- training --------------------------------------------------------------------------------------------------------


def toy():
    torch.manual_seed(0)
    args = training.parser(None).parse_args(["--out", "x", *TOY[:-2]])
    return training.llama(args, 320, 128, bos_token_id=0, eos_token_id=0, pad_token_id=0)


def test_the_rate_warms_up_stays_and_falls_to_its_floor():
    spent = {0.0: 1.0, 0.65: 1.0, 0.825: 0.5, 1.0: 0.03}
    assert {s: training.rate(1.0, 1.0, s, 0.03) for s in spent} == pytest.approx(spent)
    assert training.rate(2e-3, 0.25, 0.0) == pytest.approx(5e-4) and training.rate(1.0, 7.0, 0.1) == 1.0


def test_the_model_asked_for_fits_a_file_of_16_mib():
    """7 layers of width 256 over 4,096 symbols: 7.93 M parameters, two bytes each."""
    args = training.parser(None, layers=7, width=256, head_dim=64).parse_args(["--out", "x"])
    with torch.device("meta"):
        parameters = sum(p.numel() for p in training.llama(args, 4096, 4096).parameters())
    assert parameters == 4096 * 256 + 7 * (256 * 64 * (8 + 4 + 4 + 8) + 3 * 256 * 768 + 2 * 256) + 256
    assert 2 * parameters < 15.2 * 2**20


def test_a_few_steps_lower_the_loss_and_a_seed_repeats_them(library):
    tokens = corpus.tokenizer(library, 320)
    learnt, held_out = corpus.encode(tokens, library[4:]), corpus.encode(tokens, library[:4])

    def trained(seed):
        model, told = toy(), []
        tick = itertools.count()
        steps = train.fit(
            model, torch.from_numpy(learnt.ids), 80, peak=1e-2, batch=8, window=32, seed=seed,
            tell=lambda elapsed, step, loss: told.append(float(loss)), clock=lambda: next(tick),
        )  # fmt: skip
        assert steps == len(told) == 40  # the clock is looked at twice a step
        return told, train.measure(model, held_out, 32, 8)["nats_per_token"]

    before = train.measure(toy(), held_out, 32, 8)["nats_per_token"]
    told, after = trained(3)
    assert before > 5.5 and after < 4.0 < 5.0 < told[0]
    assert trained(3) == (told, after) and trained(4)[0] != told


def test_every_held_out_token_is_counted_once(library):
    """A model of zeros gives every token ln 320 nats, whatever the windows."""
    held_out = corpus.encode(corpus.tokenizer(library, 320), library[:2])
    model = toy()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    bits = (len(held_out.ids) - 1) * math.log2(320) / held_out.characters
    for window, batch in ((len(held_out.ids) - 1, 1), (7, 5), (100, 2)):
        found = train.measure(model, held_out, window, batch)
        assert found == {"nats_per_token": round(math.log(320), 4), "bits_per_character": round(bits, 4)}


def test_what_a_training_leaves_can_be_captured(tmp_path):
    out = tmp_path / "text"
    sizes = ["--batch", "4", "--window", "32", "--stdlib-mb", "0.05", "--packages-mb", "0", "--held-out-mb", "0.01"]
    asked = ["--prompts", "2", "--prompt", "16", "--steps", "8", "--minutes", "0.03", "--report", "0.5"]
    result = train.main(["--out", str(out), *TOY, *sizes, *asked])
    log = json.loads((out / "train_log.json").read_text())
    assert log == result and log["steps"] > 0 and log["final_held_out"]["bits_per_character"] > 0
    assert log["log"] and str(tmp_path) not in json.dumps(log), "no path of a machine in a committed file"
    assert all(corpus.is_held_out(name) for name in log["prompts"]) and len(log["prompts"]) == 2

    prompts = read_prompts(out / "prompts.jsonl")
    words = transformers.AutoTokenizer.from_pretrained(out)
    library = {d.name: d.text for d in corpus.standard_library()}
    for name, p in zip(log["prompts"], prompts, strict=True):
        assert (p.prompt_len, len(p.tokens)) == (16, 24)
        text = words.decode(p.tokens[1:]).rstrip("\ufffd")  # a last character may lack bytes
        assert text and library[name].startswith(text)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and model.config.max_position_embeddings == 4096

    how = {"mode": "forced", "batch_size": 2, "dtype": "float32", "licence": "PSF-2.0"}
    trace = open_trace(capture(out, out / "prompts.jsonl", tmp_path / "text.kvtrace", **how))
    assert [(s.prompt_tokens, s.output_tokens) for s in trace.sources] == [(16, 7)] * 2
    for source, p in zip(trace.sources, prompts, strict=True):
        assert source.facts["tokens"].tolist() == p.tokens.tolist()
