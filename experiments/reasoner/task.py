"""A chain-of-thought task that a program can generate, annotate and check.

One *pack* holds several problems.  All their statements are shuffled together in the prompt; the answer walks through
problem after problem without any further input.  Words, each one token:

    !n 7        value of n is 7 (given in the prompt, or worked out in the chain)
    @a b &x     from a go on to b, and value(b) = (value(a) + value(x)) mod 10
    @z ?7       a problem ends at z; go on with question 7
    ?7 &u       question 7 asks for the value of u
    ?9 #2       the questions are over, go on with problem 2;  `?9 <eos>` ends the pack
    #2 &a       problem 2 starts at a
    go #1       last two tokens of the prompt: begin with problem 1

    chain of thought, problem 1:    !a 4 @a b !x 3 !b 7 @b c !y 0 !c 7 @c ?7 !u 3 ?8 !a 4 ?9 #2 ...

The operand x is a constant (few of them, drawn with Zipf weights) or a node computed earlier in the pack, at a
Pareto-distributed distance; questions reach back over the whole pack.  So what was written long ago is needed again
after gaps with a heavy tail, which is what a cache policy for long generations has to cope with.

Three decisions make it learnable by a tiny model. Every look-up has its key in the token just before it, because such
one-hop copying is what small transformers pick up first. A word that means something else is another token: `!x` is
always followed by the value of x, while a statement that only refers to x writes `&x`. And every generated token is
determined by the prompt, so each of them is a training signal, and a greedy decode either follows the only right path
or has left it.

Only numpy and the standard library are needed here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NAMES = 160  # pool of names; one pack uses steps*problems + problems + constants of them
LABELS = 16  # problem labels #0..#15, used in cyclic order from a random start
QUESTIONS = 64  # question labels ?0..?63, the same
CONSTANTS = 5  # given values per pack
ASKS = 3  # questions per problem
PARETO = 1.1  # tail exponent of the distance of an operand, in nodes

_SPECIAL = ["<pad>", "<bos>", "<eos>", "go"]
VOCAB: list[str] = (
    _SPECIAL
    + [str(d) for d in range(10)]
    + [f"#{i}" for i in range(LABELS)]
    + [f"?{i}" for i in range(QUESTIONS)]
    + [f"{c}n{i}" for c in ("", "@", "!", "&") for i in range(NAMES)]
)
ID: dict[str, int] = {w: i for i, w in enumerate(VOCAB)}
PAD, BOS, EOS, GO = range(4)
DIGIT = ID["0"]
LABEL = ID["#0"]
QUESTION = ID["?0"]
PLAIN, EDGE, VALUE, REF = ID["n0"], ID["@n0"], ID["!n0"], ID["&n0"]


@dataclass(frozen=True)
class Problem:
    """One pack.  ``tokens[prompt_len:]`` is the only right continuation of ``tokens[:prompt_len]``.

    ``need[j]``: positions holding what token j follows from (empty in the prompt).  In an attention trace they belong
    to the row of query position j-1, the one that produced token j.  Look-ups name the statement or the worked-out
    result itself, never a later mention; what is carried over inside a step names its neighbour a few tokens back.
    ``origin[j]``: the position whose content token j repeats, j itself if it states something new.  A value mentioned
    again can be read from any mention: "a cached position has the same origin as the source" is the lenient test,
    "the source itself is cached" the strict one.
    ``answers``: for every problem of the pack its asked (name, value) token pairs in order.
    """

    tokens: np.ndarray
    prompt_len: int
    need: list[tuple[int, ...]]
    origin: np.ndarray
    answers: list[list[tuple[int, int]]]


def _distance(rng: np.random.Generator, most: int) -> int:
    """Pareto distance in 1..most.  What falls beyond is spread evenly instead of piling up on the oldest node."""
    d = int((1.0 - rng.random()) ** (-1.0 / PARETO))
    return d if d <= most else int(rng.integers(1, most + 1))


def make(
    rng: np.random.Generator, *, problems: int, steps: int, constants: int = CONSTANTS, asks: int = ASKS
) -> Problem:
    """Draw one pack of ``problems`` chains of ``steps`` steps each."""
    if problems < 1 or steps < 1 or constants < 1 or asks < 1:
        raise ValueError("problems, steps, constants and asks must be at least 1")
    nodes = problems * (steps + 1)
    if nodes + constants > NAMES or problems > LABELS or problems * (asks + 1) > QUESTIONS:
        raise ValueError(f"pack of {problems} x {steps} does not fit the vocabulary")
    perm = rng.permutation(NAMES).tolist()
    const, name = perm[:constants], perm[constants : constants + nodes]
    weight = 1.0 / np.arange(1, constants + 1)
    cdf = np.cumsum(weight / weight.sum())
    value = {c: int(v) for c, v in zip(const, rng.integers(0, 10, constants), strict=True)}
    label = [LABEL + (int(s) % LABELS) for s in rng.integers(LABELS) + np.arange(problems)]
    q0 = int(rng.integers(QUESTIONS))

    def question(p: int, k: int) -> int:
        return QUESTION + (q0 + p * (asks + 1) + k) % QUESTIONS

    # What is asked for, before anything is laid out.
    operand: dict[int, int] = {}
    asked: list[list[int]] = []
    for p in range(problems):
        first = p * (steps + 1)
        value[name[first]] = int(rng.integers(10))
        for i in range(first + 1, first + steps + 1):
            if i == 1 or rng.random() < 0.5:
                x = const[min(int(np.searchsorted(cdf, rng.random())), constants - 1)]
            else:
                x = name[i - 1 - _distance(rng, i - 1)]
            operand[i] = x
            value[name[i]] = (value[name[i - 1]] + value[x]) % 10
        last = first + steps
        # Half of the questions stay inside the problem, half reach back anywhere in the pack.
        asked.append(
            [
                name[int(rng.integers(first, last + 1) if rng.random() < 0.5 else rng.integers(0, last + 1))]
                for _ in range(asks)
            ]
        )

    # Prompt: statements in random order.  `where[w]` is the position of the statement that the key token w opens.
    statements: list[list[int]] = [[VALUE + c, DIGIT + value[c]] for c in const]
    for p in range(problems):
        first, last = p * (steps + 1), p * (steps + 1) + steps
        statements.append([VALUE + name[first], DIGIT + value[name[first]]])
        statements.append([label[p], REF + name[first]])
        statements += [[EDGE + name[i - 1], PLAIN + name[i], REF + operand[i]] for i in range(first + 1, last + 1)]
        statements.append([EDGE + name[last], question(p, 0)])
        statements += [[question(p, k), REF + u] for k, u in enumerate(asked[p])]
        statements.append([question(p, asks), label[p + 1] if p + 1 < problems else EOS])
    tokens: list[int] = [BOS]
    where: dict[int, int] = {}
    for s in rng.permutation(len(statements)).tolist():
        where[statements[s][0]] = len(tokens)
        tokens += statements[s]
    tokens += [GO, label[0]]
    prompt_len = len(tokens)
    need: list[tuple[int, ...]] = [()] * prompt_len
    origin: list[int] = list(range(prompt_len))
    held = {n: where[VALUE + n] + 1 for n in const + [name[p * (steps + 1)] for p in range(problems)]}

    def put(token: int, *sources: int, copy: bool = True) -> int:
        tokens.append(token)
        need.append(sources)
        origin.append(origin[sources[0]] if copy else len(tokens) - 1)
        return len(tokens) - 1

    for p in range(problems):
        first, last = p * (steps + 1), p * (steps + 1) + steps
        put(VALUE + name[first], where[label[p]] + 1, copy=False)
        now = put(DIGIT + value[name[first]], held[name[first]])
        here = now - 1
        for i in range(first + 1, last + 1):
            a, b, x = name[i - 1], name[i], operand[i]
            put(EDGE + a, here, copy=False)
            to = put(PLAIN + b, where[EDGE + a] + 1)
            put(VALUE + x, where[EDGE + a] + 2, copy=False)
            got = put(DIGIT + value[x], held[x])
            here = put(VALUE + b, to, copy=False)
            now = held[b] = put(DIGIT + value[b], now, got, copy=False)
        put(EDGE + name[last], here, copy=False)
        ask = put(question(p, 0), where[EDGE + name[last]] + 1)
        for k, u in enumerate(asked[p]):
            put(VALUE + u, where[question(p, k)] + 1, copy=False)
            put(DIGIT + value[u], held[u])
            ask = put(question(p, k + 1), ask, copy=False)
        put(label[p + 1] if p + 1 < problems else EOS, where[question(p, asks)] + 1)
    return Problem(
        np.array(tokens, dtype=np.int32),
        prompt_len,
        need,
        np.array(origin, dtype=np.int32),
        [[(VALUE + u, DIGIT + value[u]) for u in us] for us in asked],
    )


def sample(
    seed: int, index: int, *, problems: int, steps: int, constants: int = CONSTANTS, asks: int = ASKS
) -> Problem:
    """Pack number ``index`` of stream ``seed``; the same numbers always give the same pack."""
    return make(np.random.default_rng([seed, index]), problems=problems, steps=steps, constants=constants, asks=asks)


def lengths(*, problems: int, steps: int, constants: int = CONSTANTS, asks: int = ASKS) -> tuple[int, int]:
    """(prompt tokens, generated tokens); both depend on the settings only, so packs of one setting need no padding."""
    return (3 + 2 * constants + problems * (3 * steps + 2 * asks + 8), problems * (6 * steps + 3 * asks + 5))


def is_right(problem: Problem, generated) -> list[bool]:
    """Per problem of the pack: did ``generated`` (the tokens after the prompt) state all asked values, rightly?

    Only the answers count, not the way there.  The answers of problem p are looked for between the p-th label change
    and the next one, as the pairs after each question label.
    """
    g = [int(t) for t in generated]
    if EOS in g:
        g = g[: g.index(EOS)]
    parts: list[list[int]] = [[]]
    for t in g:
        if LABEL <= t < LABEL + LABELS:
            parts.append([])
        else:
            parts[-1].append(t)
    out = []
    for p, want in enumerate(problem.answers):
        part = parts[p] if p < len(parts) else []
        got = [(part[j + 1], part[j + 2]) for j, t in enumerate(part[:-2]) if QUESTION <= t < QUESTION + QUESTIONS]
        out.append(got == want)
    return out


def decode(tokens) -> str:
    return " ".join(VOCAB[int(t)] for t in tokens)


def encode(text: str) -> np.ndarray:
    return np.array([ID[w] for w in text.split()], dtype=np.int32)


if __name__ == "__main__":
    one = sample(0, 0, problems=2, steps=3)
    print(decode(one.tokens[: one.prompt_len]), decode(one.tokens[one.prompt_len :]), sep="\n\n")
