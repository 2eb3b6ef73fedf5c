"""A point: one policy at one budget, on the same chains in a closed loop and in an open loop over their trace.

Needs NumPy, numba, pyarrow, torch and transformers alone: a GPU machine has no more.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import runpy
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from kvsim import registry
from kvsim.cache.cache import Cache
from kvsim.cache.quality import Quality
from kvsim.cache.tiers import Capacity
from kvsim.measure import machine_info
from kvsim.measure.capture import capture
from kvsim.measure.closed_loop import ClosedLoop, Played, pages_of
from kvsim.measure.prompts import Prompt, task_prompts
from kvsim.trace import open_trace
from kvsim.trace.access import Access

HERE = Path(__file__).resolve().parent
TASK = HERE.parent / "reasoner" / "task.py"
SHIPPED = HERE.parent / "reasoner" / "model"
SETTINGS, SEED, CHAINS = "problems=5,steps=8", 20_000, 24  # packs that training never drew
POLICIES = (  # those of the question with protected tokens too
    "h2o", "lazy-eviction", "tova", "random", "lru", "streaming-llm", "lfu", "r-kv(every=32)",
    "h2o(sink=4)", "lazy-eviction(sink=4)", "tova(sink=4, recent=16)",
)  # fmt: skip
BUDGETS = ("50%", "65%", "80%", "35%", "90%", "20%")  # the one that is asked about first
POINTS = [("full", "100%"), *((policy, budget) for budget in BUDGETS for policy in POLICIES)]
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
HALF, LOST = 0.5, 3  # of a row's weight; words that are named
NEAR = 6  # tokens: a source not further back is carried over inside a step of the task
KINDS = ("within a step", "result looked up", "statement looked up")
LANE_BUDGETS, LANE_CHAINS = ("50%", "80%"), 6  # of the look at single lanes

Row = dict[str, Any]
Progress = Callable[[int, int], None]


class Bench:
    """A model, its chains, the closed loop over them, and a trace captured from the same chains.

    The trace lies in a folder that is gone when this is.
    """

    def __init__(
        self, model: Path, device: str, *, name: str = "", chains: int = CHAINS, settings: str = SETTINGS,
        seed: int = SEED,
    ):  # fmt: skip
        self._work = tempfile.TemporaryDirectory()
        self._ahead: dict[tuple[str, str], Future[Row]] = {}
        self.prompts = task_prompts(TASK, chains, seed=seed, settings=settings)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()
        self.loop = ClosedLoop(loaded, self.prompts)
        self.path = capture(
            loaded, self.prompts, Path(self._work.name) / "chains.kvtrace", mode="forced", batch_size=chains,
            vectors=True, prompt_rows="all", lossless=True,
        )  # fmt: skip
        kind = f"cpu {machine_info.processor()}" if device == "cpu" else torch.cuda.get_device_name(device)
        weights = b"".join(path.read_bytes() for path in sorted(Path(model).glob("*.safetensors")))
        self.facts: Row = {
            "device": machine_info.slug(kind),
            "model": name or Path(model).resolve().parent.name,
            "parameters": loaded.num_parameters(),
            "weights": hashlib.sha256(weights).hexdigest()[:12],
            "lanes": list(self.loop.lanes),
            "task": settings,
            "seed": seed,
            "chains": chains,
            "prompt": int(self.loop.lengths[0]),
            "tokens": int(self.loop.strides[0]),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }

    def key(self, policy: str, budget: str) -> str:
        return "/".join([*(str(self.facts[k]) for k in ("weights", "task", "seed", "chains")), policy, budget])

    def start(self, points: Iterable[tuple[str, str]], workers: int) -> None:
        """Compute the open loops of these points beside what follows, in processes of their own."""
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        before = {name: os.environ.get(name) for name in ONE_THREAD}
        os.environ.update(dict.fromkeys(ONE_THREAD, "1"))  # for what is spawned here: there is a process per core
        try:
            self._ahead = {point: pool.submit(open_loop, self.path, *point) for point in points}
        finally:
            os.environ.update({name: value for name, value in before.items() if value is not None})
            for name in (name for name, value in before.items() if value is None):
                del os.environ[name]
        pool.shutdown(wait=False)

    def close(self) -> None:
        """Drop what was started and is not needed any more."""
        for future in self._ahead.values():
            future.cancel()

    def lane_by_lane(self, policy: str, budget: str, progress: Progress = lambda done, total: None) -> list[list[Row]]:
        """By layer and KV head: the gold loss of forced chains where eviction is applied there alone, and the words
        that it takes most attention from there in the open loop."""
        layers, heads = self.loop.lanes
        lost = lost_words(self.path, policy, budget)
        found: list[list[Row]] = []
        for layer in range(layers):
            found.append([])
            for head in range(heads):
                played = self.loop.run(policy, budget, only=[(layer, head)])
                found[-1].append(gold_loss(self.prompts, played) | {"lost": lost[layer][head]})
                progress(layer * heads + head + 1, layers * heads)
        return found

    def measure(self, policy: str, budget: str, progress: Progress = lambda done, total: None) -> Row:
        """The row of a point; the same numbers each time on the same device with as many threads."""
        total = 3 * int(self.loop.strides[0] - self.loop.lengths[0])

        def part(i: int) -> Progress:
            return lambda done, all_: progress(i * total // 3 + done * total // 3 // all_, total)

        forced = self.loop.run(policy, budget, mode="forced", progress=part(0))
        free = self.loop.run(policy, budget, mode="free", progress=part(1))
        ahead = self._ahead.pop((policy, budget), None)
        found = ahead.result() if ahead else open_loop(self.path, policy, budget, progress=part(2))
        row = {"key": self.key(policy, budget), **self.facts, "policy": policy, "budget": budget}
        return row | {"closed": closed(self.prompts, forced, free, self.loop.strides), "open": found}


def closed(prompts: list[Prompt], forced: list[Played], free: list[Played], strides: np.ndarray) -> Row:
    """What became of the chains: `loss`, nats per gold token of decode steps, by chain; `loss_by_kind`, over them all;
    `right`, share of the problems answered rightly, by chain; `exact`, chains whose every token is gold; `held`, mean
    pages per lane that attention saw in forced steps, of all pages."""
    golden = [np.array_equal(p.tokens[p.prompt_len :], x.tokens) for p, x in zip(prompts, free, strict=True)]
    return gold_loss(prompts, forced) | {
        "right": [_rounded(np.mean(x.right)) for x in free],
        "problems": len(free[0].right or ()),
        "exact": int(sum(golden)),
        "held": _rounded(np.mean([x.held / n for x, n in zip(forced, strides, strict=True)])),
    }


def gold_loss(prompts: list[Prompt], forced: list[Played]) -> Row:
    """`loss` and `loss_by_kind`, as in `closed`."""
    loss = [-played.logprob[1:] for played in forced]
    kinds, every = np.concatenate([kinds_of(p) for p in prompts]), np.concatenate(loss)
    return {
        "loss": [_rounded(x.mean()) for x in loss],
        "loss_by_kind": {KINDS[k]: _rounded(every[kinds == k].mean()) for k in range(len(KINDS))},
    }


def kinds_of(p: Prompt) -> np.ndarray:
    """Of each gold token that a decode step produces, the place in KINDS of its farthest source."""
    assert p.need is not None
    found = []
    for at in range(p.prompt_len + 1, len(p.tokens)):
        source = min(p.need[at])
        far = at - 1 - source > NEAR
        found.append(0 if not far else 2 if source < p.prompt_len else 1)
    return np.array(found)


def open_loop(path: Path, policy: str, budget: str, *, progress: Progress = lambda done, total: None) -> Row:
    """What replaying the trace predicts: metrics of `kvsim run`, over the decode steps of all requests."""
    trace = open_trace(path)
    names = ("weight", "hit", "used", "found", "needed", "lost", "gone", "rows", "halved")
    requests, sums = trace.requests(), dict.fromkeys(names, 0.0)
    errors: list[float] = []
    for i, request in enumerate(requests):
        capacity = Capacity(pages_of(budget, request.stride), None, None)
        cache = Cache(trace.lanes, request.stride, registry.build(policy), capacity, facts=request.facts)
        quality = Quality(cache, request.source.facts)
        for a in request.accesses(vectors=request.source.provides >= {"q", "k", "v"}):
            out = cache.access(a)
            if a.prefill:
                continue
            found = (out.total, out.attended, out.used, out.found)
            for name, values in zip(("weight", "hit", "used", "found"), found, strict=True):
                sums[name] += float(values.sum(dtype=np.float64))
            for name, count in zip(("needed", "lost", "gone"), _gold(quality), strict=True):
                sums[name] += count
            sums["rows"] += len(out.total)
            sums["halved"] += np.count_nonzero(out.attended < HALF * out.total)
            errors.append(quality.output_error)
        progress(i + 1, len(requests))
    return {
        "recall": _rounded(sums["hit"] / sums["weight"]),
        "gold_loss": _rounded(sums["lost"] / sums["needed"]),
        "gold_gone": int(sums["gone"]),
        "recurrence_loss": _rounded(1 - sums["found"] / sums["used"]),
        "output_error": _rounded(np.mean(errors)),
        "halved": _rounded(sums["halved"] / sums["rows"]),
    }


def lost_words(path: Path, policy: str, budget: str) -> list[list[list[tuple[str, float]]]]:
    """By layer and KV head of a trace: the words of the task that eviction took most attention from, and what share of
    all that was lost there each one had."""
    trace, words = open_trace(path), runpy.run_path(str(TASK))["VOCAB"]
    lost = np.zeros((*trace.lanes, len(words)))
    for request in trace.requests():
        capacity = Capacity(pages_of(budget, request.stride), None, None)
        cache = Cache(trace.lanes, request.stride, registry.build(policy), capacity, facts=request.facts)
        tokens, seen = request.source.facts["tokens"], _Seen(cache)
        for a in request.accesses(vectors=request.source.provides >= {"q", "k", "v"}):
            cache.access(a)
            if a.prefill:
                continue
            gone = np.ones((cache.lanes, a.keys + 1), bool)
            np.put_along_axis(gone, seen.keys + 1, False, axis=1)  # column 0 is that of empty lines
            gone = gone[:, 1:].repeat(cache.rows // cache.lanes, axis=0).reshape(*trace.lanes, -1)
            weight = np.where(gone, a.row[..., : a.keys], 0)
            for lane in np.ndindex(trace.lanes):
                lost[lane] += np.bincount(tokens[: a.keys], weight[lane], len(words))
    share = lost / np.maximum(lost.sum(-1, keepdims=True), 1e-12)
    most = np.argsort(-share, axis=-1, kind="stable")[..., :LOST]
    return [
        [[(words[w], _rounded(share[at][w])) for w in most[at] if share[at][w] > 0] for at in lanes]
        for lanes in ([(layer, head) for head in range(trace.lanes[1])] for layer in range(trace.lanes[0]))
    ]


class _Seen:
    """Watches a cache: the `keys` that attention saw in the latest step, -1 elsewhere, [lanes, slots]."""

    def __init__(self, cache: Cache):
        self.cache, self.keys = cache, np.empty((cache.lanes, 0), np.int32)
        cache.watch = self

    def __call__(self, a: Access, read: np.ndarray) -> None:
        self.keys = np.where(read, self.cache.seen, np.int32(-1))


def _gold(quality: Quality) -> tuple[int, int, int]:
    return quality.gold_needed, quality.gold_lost, quality.gold_gone


def _rounded(x: Any) -> float:
    return float(f"{float(x):.6g}")
