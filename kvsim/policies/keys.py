"""Policies that look at keys, values and queries themselves; a trace holds them where it was captured with --vectors.

All but R-KV decide once, at the end of prefill, in the lossy regime; each token's score is computed per KV head in
float32, and a page's is the mean over its tokens. Keys and queries are those that attention got, after rotation.

CriticalKV is not here: it weighs an entry by |W_o v|, the L1 norm of its value after the output projection, and a
trace holds no weights of the model; |v| in its place would be another policy.
"""

from __future__ import annotations

import numpy as np

from kvsim.errors import PolicyError
from kvsim.policies.oneshot import OneShot
from kvsim.policies.parameters import choice, flag, number, odd, whole, windowed
from kvsim.registry import policy

_NEW = np.int64(1 << 40)  # R-KV: places of entries that came after the last decision
_BLOCK = 1024  # and rows of the matrix of cosines at a time


class _ByToken(OneShot):
    """`tokens(seen, layer, held)` [kv_heads, tokens]: higher stays. `held`: bool, what is in the cache."""

    family = "key geometry"

    def votes(self, view):
        held = np.zeros((*view.shape, view.keys + 1), bool)
        np.put_along_axis(held, view.key + 1, True, -1)  # empty lines at 0
        held = held[..., 1:].repeat(view.page_size, -1)[..., : view.tokens]
        scores = np.stack([self.tokens(view.vectors, layer, held[layer]) for layer in range(view.shape[0])])
        starts = np.arange(0, view.tokens, view.page_size)
        return np.add.reduceat(scores, starts, -1) / np.diff(starts, append=view.tokens)

    def tokens(self, seen, layer: int, held: np.ndarray) -> np.ndarray:
        raise NotImplementedError


@policy("knorm")
class Knorm(_ByToken):
    """Keys of small L2 norm stay: they tend to get much attention. arXiv 2406.11430; kvpress, knorm_press.py.

    Nothing is protected. Departures: none (the paper leaves the first two layers whole, kvpress does not).
    """

    needs = frozenset({"k"})
    recent: int | str = 0

    def tokens(self, seen, layer, held):
        return -np.linalg.norm(seen.k[layer].astype(np.float32), axis=-1)


@policy("keydiff")
class KeyDiff(_ByToken):
    """Keys unlike the others stay: minus the cosine to the mean of the unit keys. arXiv 2504.15364; keydiff_press.py.

    Nothing is protected. Departures: none from kvpress; the paper goes through the prompt block by block.
    """

    needs = frozenset({"k"})
    recent: int | str = 0

    def tokens(self, seen, layer, held):
        unit = _unit(seen.k[layer].astype(np.float32))
        mean = unit.mean(1, keepdims=True) if held.all() else unit.mean(1, keepdims=True, where=held[..., None])
        return -(unit @ _unit(mean).swapaxes(1, 2))[..., 0]


@policy("curdkv")
class CurDKV(_ByToken):
    """Tokens whose keys and values weigh most among their neighbours stay. arXiv 2509.15038; kvpress, cur_press.py.

    Squared L2 norms of key and value, each as a share of its sum over the `local` tokens of its stretch (of all, with
    `local = 0`), multiplied: leverage, approximately. `use` is "product", "mean", "key" or "value". The first `sink`
    tokens stay. Departures: none; the press's random projection, off by default, is left out.
    """

    needs = frozenset({"k", "v"})
    local: int = 16
    use: str = "product"
    sink: int = 4
    recent: int | str = 0

    def __post_init__(self):
        whole(self, "local")
        choice(self, "use", "product", "mean", "key", "value")

    def tokens(self, seen, layer, held):
        k, v = (self._share((x[layer].astype(np.float32) ** 2).sum(-1)) for x in (seen.k, seen.v))
        return {"product": k * v, "mean": (k + v) / 2, "key": k, "value": v}[self.use]

    def _share(self, x: np.ndarray) -> np.ndarray:
        count = x.shape[-1]
        starts = np.arange(0, count, self.local or count)
        total = np.add.reduceat(x, starts, -1)
        return x / np.repeat(np.maximum(total, np.float32(1e-30)), np.diff(starts, append=count), -1)


@policy("lagkv")
class LagKV(_ByToken):
    """Tokens that spread far in terms of the chunk after theirs stay. arXiv 2504.04704; kvpress, lagkv_press.py.

    After the first `sink` tokens, in chunks of `chunk`: keys and values are scaled, dimension by dimension, by the
    smallest and largest of the next chunk; the standard deviation over dimensions, a softmax within the chunk, the
    mean of both; a token's score is its rank in its chunk. The last whole chunk, what follows it and the sinks stay;
    of a prompt without two chunks, the newest. So the chunks keep equally many, whatever their scores.

    Departures: a dimension in which the next chunk is constant is not scaled (the code divides by zero). Ranks tie
    between chunks: the newer stays, the code leaves it open.
    """

    needs = frozenset({"k", "v"})
    chunk: int = 128
    sink: int = 4
    recent: int | str = 0

    def __post_init__(self):
        whole(self, "chunk", least=1)
        whole(self, "sink")

    def tokens(self, seen, layer, held):
        k, v = (x[layer].astype(np.float32) for x in (seen.k, seen.v))
        heads, count = k.shape[:2]
        chunks = (count - self.sink) // self.chunk
        if chunks < 2:
            return np.broadcast_to(np.arange(count, dtype=np.float32), (heads, count))
        whole = slice(self.sink, self.sink + chunks * self.chunk)
        spread = [self._spread(x[:, whole].reshape(heads, chunks, self.chunk, -1)) for x in (k, v)]
        rank = np.argsort(np.argsort(sum(spread) / 2, axis=-1, kind="stable"), axis=-1).reshape(heads, -1)
        scores = np.full((heads, count), np.float32(self.chunk))
        scores[:, self.sink : self.sink + rank.shape[1]] = rank
        return scores

    def _spread(self, x: np.ndarray) -> np.ndarray:
        """[heads, chunks - 1, chunk] from [heads, chunks, chunk, dim]."""
        low, high = x[:, 1:].min(-2, keepdims=True), x[:, 1:].max(-2, keepdims=True)
        scaled = (x[:, :-1] - low) / np.where(high > low, high - low, 1)
        return _softmax(scaled.std(-1, ddof=1) if x.shape[-1] > 1 else np.zeros(scaled.shape[:-1]))


@policy("expected-attention")
class ExpectedAttention(_ByToken):
    """What queries to come are expected to give, were they like those of the prompt. expected_attention_press.py.

    Mean m and covariance C of the prompt's queries before rotation, without the first `sink`, each rotated by the mean
    rotation of the next `future` positions; score = softmax over tokens of k m / sqrt(D) + k C k / (2 D), averaged
    over the query heads of the group, plus `epsilon`, times the L2 norm of the value. `covariance = False` and `norm
    = False` leave out the second term and the norm. The first `sink` tokens stay. NVIDIA kvpress.

    Departures: none. Queries are turned back by their positions and the model's inverse frequencies, dimension i
    paired with i + half of the rotated ones, as in Llama; a model that pairs neighbours gives other numbers.
    """

    needs = frozenset({"q", "k", "v", "inv_freq"})
    future: int = 512
    covariance: bool = True
    norm: bool = True
    epsilon: float = 0.0
    sink: int = 4
    recent: int | str = 0

    def __post_init__(self):
        whole(self, "future", least=1)
        whole(self, "sink")
        number(self, "epsilon")
        flag(self, "covariance", "norm")

    def tokens(self, seen, layer, held):
        q, k, v = (x[layer].astype(np.float64) for x in (seen.q, seen.k, seen.v))
        heads, count, size = k.shape
        scores = np.full((heads, count), np.inf)
        if count <= self.sink:
            return scores
        angles = seen.positions[self.sink :, None] * seen.inv_freq
        before = _rotated(q[:, :, self.sink :], np.cos(angles), -np.sin(angles))
        ahead = (seen.positions[-1] + 1 + np.arange(self.future))[:, None] * seen.inv_freq
        turn = np.cos(ahead).mean(0), np.sin(ahead).mean(0)
        mean = before.mean(2, keepdims=True)
        k = k[:, None, self.sink :]
        logits = (k @ _rotated(mean, *turn).swapaxes(2, 3))[..., 0] / np.sqrt(size)
        if self.covariance:
            centred = _rotated(before - mean, *turn)
            cov = centred.swapaxes(2, 3) @ centred / centred.shape[2]
            logits = logits + ((k @ cov) * k).sum(-1) / (2 * size)
        expected = _softmax(logits).mean(1)
        if self.norm:
            expected = (expected + self.epsilon) * np.linalg.norm(v[:, self.sink :], axis=-1)
        scores[:, self.sink :] = expected
        return scores


@policy("r-kv")
class RKV:
    """Important and not redundant: for reasoning that repeats itself. arXiv 2505.24133; rkv/compression/r1_kv.py.

    At the end of prefill, and whenever the whole sequence is a multiple of `every` long: of a cache at its budget or
    above, the newest `window` stay, and of the others those of largest `mix` * I - (1 - `mix`) * R. I, importance: the
    largest logit over the query heads of a group, for the last `window` queries; softmax over the entries before the
    window, mean over queries, largest of `kernel` neighbours. R, redundancy: the cosine of every two keys, from which
    each row loses its own and its last one above `similar` (the first, if none is); mean over rows, softmax. So up to
    `every` - 1 tokens over budget, declared as lag. Neighbours are those in the cache, where survivors lie in the order
    of their scores, as in the code.

    Departures: the code finds its moment after a step and cuts in the next one, when one more token is there.
    """

    family = "key geometry"
    evidence = "code"
    regimes = ("lossy",)
    clock = "token"
    needs = frozenset({"q", "k"})
    columns = {"vote": np.float32, "place": np.int64}
    window: int = 8
    kernel: int = 7
    mix: float = 0.07
    similar: float = 0.5
    every: int = 128
    recent: int | str = 1

    def __post_init__(self):
        windowed(self)
        whole(self, "every", least=self.window)
        odd(self, "kernel")
        number(self, "mix", most=1)
        number(self, "similar", least=-1, most=1)
        self.lag = self.every

    def observe(self, view):
        if view.page_size > 1:
            raise PolicyError("r-kv compares single keys", hint="use --page-size 1")
        new = view.born == view.now
        view["vote"][new] = np.inf
        view["place"][new] = view.key[new] + _NEW
        if view.now == 0 or view.tokens % self.every == 0:
            for lane in np.ndindex(*view.shape):
                self._judge(view, lane)

    def score(self, view):
        return view["vote"]

    def _judge(self, view, lane):
        """Scores of one lane's entries, and the places they will have."""
        key, vote, place = view.key[lane], view["vote"][lane], view["place"][lane]
        slots = np.flatnonzero(key >= 0)
        if len(slots) < view.budget[lane] or len(slots) <= self.window:
            return
        slots = slots[np.argsort(place[slots])]
        old, newest = slots[: -self.window], slots[-self.window :]
        k = view.vectors.k[lane][key[slots]].astype(np.float32)
        q = view.vectors.q[lane][:, -self.window :].astype(np.float32)
        logits = (q @ k[: len(old)].T).max(0) / np.sqrt(np.float32(k.shape[-1]))
        z = self.mix * importance(logits, self.kernel) - (1 - self.mix) * redundancy(k, self.similar)[: len(old)]
        vote[old], vote[newest] = z, np.inf
        place[old[np.argsort(-z, kind="stable")]] = np.arange(len(old))
        place[newest] = len(old) + np.arange(self.window)


def importance(logits: np.ndarray, kernel: int) -> np.ndarray:
    """R-KV's I of each entry from logits [queries, entries]."""
    mean, reach = _softmax(logits).mean(0), kernel // 2
    return np.lib.stride_tricks.sliding_window_view(np.pad(mean, reach), kernel).max(-1)


def redundancy(k: np.ndarray, similar: float) -> np.ndarray:
    """R-KV's R of each key [keys, dim]."""
    unit, count = k / (np.linalg.norm(k, axis=-1, keepdims=True) + np.float32(1e-8)), len(k)
    total = np.zeros(count)
    for start in range(0, count, _BLOCK):
        cosine = unit[start : start + _BLOCK] @ unit.T
        row = np.arange(len(cosine))
        cosine[row, start + row] = 0
        above = cosine > similar
        last = np.where(above.any(1), count - 1 - above[:, ::-1].argmax(1), 0)
        cosine[row, last] = 0
        total += cosine.sum(0, dtype=np.float64)
    return _softmax(total / count)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.float32(1e-12))


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """The rotary embedding of Llama on the first 2 * len(frequencies) dimensions of x; the others stay."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)
