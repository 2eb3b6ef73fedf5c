"""Closed loops: plain decoding where nothing is evicted, and otherwise what a really shortened cache computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
tf = pytest.importorskip("transformers")

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from kvsim import registry  # noqa: E402
from kvsim.cache.cache import Cache  # noqa: E402
from kvsim.cache.tiers import Capacity  # noqa: E402
from kvsim.errors import ConfigError, KvsimError, PolicyError  # noqa: E402
from kvsim.measure import CaptureError  # noqa: E402
from kvsim.measure.capture import capture  # noqa: E402
from kvsim.measure.closed_loop import ClosedLoop  # noqa: E402
from kvsim.measure.prompts import prompt, task_prompts  # noqa: E402
from kvsim.trace import open_trace  # noqa: E402
from kvsim.trace.access import Access, DenseSource, Request, Seen  # noqa: E402

from .models import tiny  # noqa: E402

REASONER = Path(__file__).parents[2] / "experiments" / "reasoner"
POLICIES = [
    "h2o", "tova", "lru", "random", "streaming-llm(sink=2)", "lazy-eviction(window=4)",
    "r-kv(every=4, window=2, kernel=3)", "ada-kv(inner='h2o')",
]  # fmt: skip


def prompts(lengths=(20, 13, 17), steps=14):
    """Random ones, each with a continuation of `steps` tokens."""
    rng = np.random.default_rng(3)
    return [prompt(rng.integers(3, 128, n + steps), n) for n in lengths]


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", attention="sdpa", sharpen=3.0)


@pytest.fixture(scope="module")
def loop(llama):
    return ClosedLoop(llama, prompts())


def kept(cache):
    """Keys of every row lane."""
    lanes = [frozenset(k[k >= 0].tolist()) for k in cache.table.key]
    return [lane for lane in lanes for _ in range(cache.rows // cache.lanes)]


class Log:
    """What a chain saw and kept, step by step."""

    def __init__(self, chain=0):
        self.chain, self.rows, self.kept, self.prompt = chain, [], [], None

    def __call__(self, chain, a, cache):
        if chain == self.chain:
            self.kept.append(kept(cache))
            self.prompt = a.prompt or self.prompt
            if not a.prefill:
                self.rows.append(a.row.copy())


def replayed(log, policy, budget):
    """What an open loop keeps of the same rows."""
    source = DenseSource(np.asarray(log.prompt.rows[:]), np.stack(log.rows))
    request = Request(source)
    cache = Cache(source._decode.shape[1:3], request.stride, registry.build(policy), Capacity(budget, None, None))
    found = []
    for a in request.accesses():
        cache.access(a)
        found.append(kept(cache))
    return found


class Shortened:
    """A decode whose cache is one list of positions, keys and values per layer and KV head, from which evicted ones
    are deleted; written on its own, with nothing of the closed loop but the policy's cache."""

    def __init__(self, model, p, policy, budget):
        self.model, self.p, self.steps = model, p, len(p.tokens) - p.prompt_len - 1
        c = model.config
        self.layers, self.heads = c.num_hidden_layers, c.num_key_value_heads
        self.group = c.num_attention_heads // self.heads
        self.cache = Cache(
            (self.layers, self.heads), p.prompt_len + self.steps, registry.build(policy), Capacity(budget, None, None)
        )

    @torch.no_grad()
    def run(self):
        n, ids = self.p.prompt_len, torch.tensor(self.p.tokens[None].astype(np.int64))
        self.q, self.k, self.v = ([[] for _ in range(self.layers)] for _ in "qkv")
        ALL_ATTENTION_FUNCTIONS["shortened"] = self.attend
        self.model.set_attn_implementation("shortened")
        try:
            self.weights, self.prefilling = [], True
            scores = [self.model(input_ids=ids[:, :n], use_cache=False).logits[0, -1]]
            rows = torch.stack(self.weights).numpy().transpose(2, 0, 1, 3)  # [prompt, layers, heads, prompt]
            self.lists = [
                [[(t, self.k[i][0][h, t], self.v[i][0][h, t]) for t in range(n)] for h in range(self.heads)]
                for i in range(self.layers)
            ]
            self.decide(next(Request(DenseSource(rows, np.zeros((self.steps, *rows.shape[1:3], 1)))).accesses()))
            self.prefilling, self.kept = False, [kept(self.cache)]
            for step in range(1, self.steps + 1):
                self.at = n + step - 1
                self.row = np.zeros((self.layers, self.heads, n + self.steps), np.float32)
                position = torch.tensor([[self.at]])
                out = self.model(input_ids=ids[:, self.at : self.at + 1], position_ids=position, use_cache=False)
                scores.append(out.logits[0, -1])
                first, visible = np.zeros(self.layers, np.int32), np.full(self.layers, self.at + 1, np.int32)
                self.decide(Access(step, self.row, self.row, self.at + 1, self.at + 1, 1, first, visible))
                self.kept.append(kept(self.cache))
        finally:
            self.model.set_attn_implementation("sdpa")
            del ALL_ATTENTION_FUNCTIONS["shortened"]
        gold = ids[0, n : n + self.steps + 1, None]
        return torch.stack(scores).log_softmax(-1).gather(1, gold)[:, 0].numpy()

    def decide(self, a):
        q, k, v = (torch.stack([torch.cat(x, 1) for x in xs]).half().numpy() for xs in (self.q, self.k, self.v))
        q = q.reshape(self.layers, self.heads, self.group, *q.shape[2:])
        a.vectors = Seen(q, k, v, np.arange(k.shape[2], dtype=np.int32))
        self.cache.access(a)
        for lane, keys in enumerate(kept(self.cache)):
            entries = self.lists[lane // self.heads][lane % self.heads]
            entries[:] = [e for e in entries if e[0] in keys]

    def attend(self, module, query, key, value, mask, scaling=None, **kw):
        i = module.layer_idx
        for store, x in zip((self.q, self.k, self.v), (query, key, value), strict=True):
            store[i].append(x[0])
        grouped = query[0].reshape(self.heads, self.group, *query.shape[2:])
        if self.prefilling:
            score = torch.einsum("hgqd,hkd->hgqk", grouped, key[0]) * scaling
            score = score.masked_fill(torch.ones(score.shape[-2:]).triu(1).bool(), float("-inf")).softmax(-1)
            self.weights.append(score.mean(1))
            return torch.einsum("hgqk,hkd->qhgd", score, value[0]).reshape(1, query.shape[2], -1, query.shape[3]), None
        out = torch.zeros_like(grouped[:, :, 0])
        for h, entries in enumerate(self.lists[i]):
            entries.append((self.at, key[0, h, 0], value[0, h, 0]))
            at, k, v = zip(*entries, strict=True)
            weight = (grouped[h, :, 0] @ torch.stack(k).T * scaling).softmax(-1)
            self.row[i, h, list(at)] = weight.mean(0).numpy()
            out[h] = weight @ torch.stack(v)
        return out.reshape(1, 1, -1, query.shape[3]), None


def test_with_every_page_it_is_plain_generation(llama, loop):
    forced, free = loop.run("h2o", "100%"), loop.run("full", "10%", mode="free")
    for p, teacher, own in zip(loop.prompts, forced, free, strict=True):
        ids = torch.tensor(p.tokens[None].astype(np.int64))
        with torch.no_grad():
            logits = llama(input_ids=ids[:, :-1]).logits[0, p.prompt_len - 1 :].log_softmax(-1)
            plain = llama.generate(ids[:, : p.prompt_len], max_new_tokens=14, do_sample=False, pad_token_id=0)
        gold = logits.gather(1, ids[0, p.prompt_len :, None])[:, 0].numpy()
        assert np.allclose(teacher.logprob, gold, atol=2e-4) and (teacher.tokens == p.tokens[p.prompt_len :]).all()
        assert own.tokens.tolist() == plain[0, p.prompt_len :].tolist()


@pytest.mark.parametrize("policy", POLICIES)
def test_hidden_is_gone(llama, loop, policy):
    """Log-probabilities and evictions are those of a cache from which pages are deleted."""
    log = Log(1)
    played = loop.run(policy, 10, audit=True, watch=log)[1]
    shortened = Shortened(llama, loop.prompts[1], policy, 10)
    assert np.allclose(played.logprob, shortened.run(), atol=2e-4)
    assert log.kept == shortened.kept
    assert min(map(len, log.kept[-1])) < 20  # of 26: something did leave


@pytest.mark.parametrize("policy", ["h2o", "tova"])
def test_eviction_in_some_lanes_alone(loop, policy):
    """None is the full cache, all are what they are without asking; in between, every lane has a say of its own."""

    def run(only):
        return np.concatenate([played.logprob for played in loop.run(policy, 10, only=only)])

    lanes = list(np.ndindex(loop.lanes))
    whole = np.concatenate([played.logprob for played in loop.run("full", "100%")])
    assert np.array_equal(run([]), whole) and np.array_equal(run(lanes), run(None))
    alone = [run([lane]) for lane in lanes]
    assert len({x.tobytes() for x in (whole, *alone)}) == len(lanes) + 1


@pytest.mark.parametrize("policy", ["h2o", "tova", "lru", "random", "lazy-eviction(window=4)"])
def test_an_open_loop_over_the_same_rows_decides_the_same(loop, policy):
    log = Log()
    loop.run(policy, 12, watch=log)
    assert replayed(log, policy, 12) == log.kept


@pytest.mark.parametrize("policy", ["h2o", "tova", "lru"])
def test_up_to_the_first_eviction_it_is_the_captured_trace(llama, loop, policy, tmp_path):
    """26 pages: the prompt of 20 fits, and the first page leaves after step 7, which the captured row decides too."""
    path = capture(
        llama, loop.prompts, tmp_path / "t.kvtrace", mode="forced", batch_size=3, lossless=True, prompt_rows="all"
    )
    request = open_trace(path).requests()[0]
    cache = Cache(loop.lanes, request.stride, registry.build(policy), Capacity(26, None, None))
    log = Log()
    loop.run(policy, 26, watch=log)
    for a in request.accesses():
        cache.access(a)
        if a.step:
            same = np.allclose(log.rows[a.step - 1], a.row, atol=1e-5)
            assert same or a.step > 7
        assert kept(cache) == log.kept[a.step] or a.step > 7
    assert len(log.kept[6][0]) == 26 == len(log.kept[7][0]) and log.kept[6] != log.kept[7]
    assert not same  # the end of the two is another one


def test_rows_lie_on_what_is_kept(loop):
    """A row sums to one over the pages kept before it and the new token, which is one page in all heads of a layer."""
    log = Log()
    loop.run("tova", 12, watch=log)
    for before, row, at in zip(log.kept, log.rows, range(20, 33), strict=False):
        for keys, lane in zip(before, row.reshape(-1, row.shape[-1]), strict=True):
            assert set(np.flatnonzero(lane)) <= keys | {at}
            assert lane.sum() == pytest.approx(1, abs=1e-5)


def test_pages_of_several_tokens_leave_whole(loop):
    log = Log()
    played = loop.run("lru", 4, page_size=4, audit=True, watch=log)[0]
    assert played.budget == 4 and max(len(k) for k in log.kept[-1]) == 4
    pages = log.rows[-1].reshape(-1, log.rows[-1].shape[-1])  # the new token, at 32, opens another one
    assert all(set(np.flatnonzero(lane)) == keys | {8} for lane, keys in zip(pages, log.kept[-2], strict=True))
    assert np.allclose(pages.sum(1), 1)


def test_chains_do_not_disturb_each_other(llama, loop):
    together = loop.run("h2o", "50%")
    alone = [ClosedLoop(llama, [p]).run("h2o", "50%")[0] for p in loop.prompts]
    assert [x.budget for x in together] == [16, 13, 15] == [x.budget for x in alone]
    assert all(np.allclose(a.logprob, b.logprob, atol=2e-4) for a, b in zip(together, alone, strict=True))
    assert all(np.array_equal(a.logprob, b.logprob) for a, b in zip(together, loop.run("h2o", "50%"), strict=True))


@pytest.mark.parametrize(
    "policy, budget, words",
    [
        ("belady", 9, "knows the future"),
        ("quest", 9, "does not evict"),
        ("attention-gate", 9, "needs gate"),
        ("lru", "1MiB", "a budget"),
        ("lru", "1%", "less than one"),
        ("h2o(recent=12)", 9, "below the 12"),
    ],
)
def test_what_cannot_be_run_is_refused(loop, policy, budget, words):
    with pytest.raises(KvsimError, match=words) as error:
        loop.run(policy, budget)
    assert isinstance(error.value, (PolicyError, ConfigError))
    assert loop.run("full", 9)[0].held == pytest.approx(20 + np.mean(range(1, 14)))  # and it can be asked again


def test_models_with_windows_are_refused():
    with pytest.raises(CaptureError, match="window"):
        ClosedLoop(tiny("mistral-window", attention="sdpa"), prompts())


def test_the_reasoner_answers_until_its_pages_are_taken_away():
    model = tf.AutoModelForCausalLM.from_pretrained(REASONER / "model", dtype=torch.float32).eval()
    chain = task_prompts(REASONER / "task.py", 1, seed=20000, settings="problems=3,steps=8")
    loop = ClosedLoop(model, chain)
    (whole,), (half,) = (loop.run("h2o", budget, mode="free") for budget in ("100%", "30%"))
    assert whole.right == [True] * 3 and not all(half.right)
    assert whole.tokens.tolist() == chain[0].tokens[chain[0].prompt_len :].tolist()
    (whole,), (half,) = (loop.run("h2o", budget) for budget in ("100%", "30%"))
    assert -whole.logprob.mean() < 0.01 < 0.1 < -half.logprob[1:].mean()
    assert half.logprob[0] == whole.logprob[0]  # comes from prefill
