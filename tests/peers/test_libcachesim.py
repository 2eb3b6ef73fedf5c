"""Our object caches against libcachesim (libCacheSim's Python package), request by request.

On our side it is the whole engine: each request is a decode step that needs one page, in the offload regime. Hits must
be equal one by one. Where libcachesim does something else than what was published, a model of just that, on top of the
published algorithm, must give its hits, and the published algorithm ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest

lcs = pytest.importorskip("libcachesim")

from kvsim import registry  # noqa: E402
from kvsim.cache.cache import Cache  # noqa: E402
from kvsim.cache.demand import Use  # noqa: E402
from kvsim.cache.future import Future  # noqa: E402
from kvsim.cache.tiers import Capacity  # noqa: E402
from kvsim.policies.oracle import Belady  # noqa: E402
from tests.helpers import _Sequence, references  # noqa: E402
from tests.policies.test_queues import Lirs, TwoQ  # noqa: E402

NEVER, USE = 2**63 - 1, Use("weight", 0.5)
CAPACITIES = (1, 3, 8, 20, 45)


@dataclass(frozen=True)
class Case:
    """Requests as page numbers in order of their first one. `sizes`: of each page, or None."""

    name: str
    requests: list[int]
    sizes: list[int] | None = None


def cases(count: int, pages: int, seed: int, largest: int = 1) -> list[Case]:
    rng, found = np.random.default_rng(seed), []
    weight = 1 / np.arange(1, pages + 1) ** 0.9
    zipf = rng.choice(pages, count, p=weight / weight.sum())
    scans = zipf.copy()
    for start in range(0, count, count // 5):
        scans[start : start + pages // 2] = np.arange(pages // 2)[: count - start]
    drift = (zipf + np.arange(count) * pages // count) % (2 * pages)
    kinds = {"zipf": zipf, "uniform": rng.integers(0, pages, count), "loop": np.arange(count) % (pages // 2)}
    for name, sequence in (kinds | {"scans": scans, "drift": drift}).items():
        number: dict[int, int] = {}
        requests = [number.setdefault(int(k), len(number)) for k in sequence]
        sizes = rng.integers(1, largest + 1, len(number)).tolist() if largest > 1 else None
        found.append(Case(name, requests, sizes))
    return found


UNIT = list(product(cases(400, 60, 1), CAPACITIES))
SIZED = list(product(cases(400, 60, 2, largest=8), (8 * c for c in CAPACITIES)))
# A hundredth of these, LIRS's queue, holds three to six of the largest pages
LARGE = list(product(cases(5000, 1200, 4, largest=8), (2400, 3600, 4800)))


def theirs(kind: str, case: Case, capacity: int, **parameters) -> list[bool]:
    cache, following = getattr(lcs, kind)(capacity, hashpower=12, **parameters), {}
    again = [NEVER] * len(case.requests)
    for i in range(len(again) - 1, -1, -1):
        again[i] = following.get(case.requests[i], NEVER)
        following[case.requests[i]] = i
    hits = []
    for i, k in enumerate(case.requests):
        r = lcs.Request()
        r.obj_id, r.obj_size, r.clock_time = k + 1, case.sizes[k] if case.sizes else 1, i + 1
        r.next_access_vtime = again[i]
        hits.append(bool(cache.get(r)))
    return hits


def ours(policy, case: Case, capacity: int) -> list[bool]:
    p = registry.build(policy) if isinstance(policy, str) else policy(recent=0)
    p.recent = 0
    accesses = references(case.requests)
    if hasattr(p, "foresee"):
        p.foresee(Future(_Sequence(accesses), USE))
    facts = {} if case.sizes is None else {"size": np.array(case.sizes, float)}
    cache = Cache(
        (1, 1), accesses[0].row.shape[-1], p, Capacity(capacity), offload=registry.build("spill", "offload"),
        use=USE, demand=USE, facts=lambda: facts,
    )  # fmt: skip
    return [not a.fresh and not out.fetched.any() for a, out in ((a, cache.access(a)) for a in accesses)]


class Admitting(Belady):
    """Belady's rule for a cache that admits whatever it is asked for."""

    def score(self, view):
        return np.where(view.last == view.now, np.inf, super().score(view))


class TheirTwoQ(TwoQ):
    """TwoQ.c: Am, besides, holds no more than what A1in's share leaves; with pages of one size that is so anyway."""

    def miss(self, k):
        super().miss(k)
        while k in self.m and self.of(*self.m) > self.room - int(self.room * 0.25):
            self.drop(self.m[0], self.m)


class OurLirs(Lirs):
    """Where LIR pages and queue leave room, pages they let go or did not admit stay; the longest gone leaves first."""

    def __init__(self, *a):
        super().__init__(*a)
        self.rest, self.gone, self.leavers = set(), {}, 0

    def drop(self, k, queue):
        super().drop(k, queue)
        self.leavers += 1
        self.gone[k] = self.leavers

    def request(self, k):
        before = self.held | self.rest | {k}
        hit = (k in self.rest) | super().request(k)
        self.rest = before - self.held
        while self.rest and self.of(*self.held, *self.rest) > self.room:
            self.rest.remove(min(self.rest, key=lambda j: (self.gone.get(j, 0), j)))
        return hit


class TheirLirs(Lirs):
    """LIRS.c: a hit in Q, outside the stack, demotes LIR pages until there is room for one more, though the page stays
    HIR; that may evict the page itself, which the stack goes on calling resident: its next use there is a hit. (Where
    it does, the size that decides how many more leave is read from freed memory: here it is still the page's.)"""

    def __init__(self, *a):
        super().__init__(*a)
        self.phantom = set()

    def request(self, k):
        if k in self.phantom:
            if k in self.s:
                self.phantom.remove(k)
                self.held.add(k)
                self.promote(k)
                self.limit()
                return True
            self.phantom.remove(k)
        return super().request(k)

    def hit_queue(self, k):
        self.q.remove(k)
        self.q.append(k)
        while self.lir and self.of(*self.lir, k) > self.room - self.short:
            self.demote()
        self.s.append(k)
        if k not in self.held:
            self.phantom.add(k)

    def prune(self):  # the stack's top stays, whatever it is
        while len(self.s) > 1 and self.s[0] not in self.lir:
            k = self.s.pop(0)
            if k in self.away:
                self.away.remove(k)


def hits_of(model, case: Case, capacity: int) -> list[bool]:
    m = model(capacity, dict(enumerate(case.sizes or ())))
    return [m.request(k) for k in case.requests]


def apart(one: list[bool], other: list[bool]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def compare(agreement, kind, policy, right, wrong, least, where, note="", here=None, **parameters):
    """Add a line. `right`: what theirs must be, by default ours; `here`: what ours must be; `wrong`: do they differ?"""
    requests = hits = other = differ = runs = 0
    for case, capacity in where:
        if capacity < least:
            continue
        found, mine = theirs(kind, case, capacity, **parameters), ours(policy, case, capacity)
        assert found == (right(case, capacity) if right else mine), (case.name, capacity)
        assert here is None or mine == here(case, capacity), (case.name, capacity)
        runs, requests = runs + 1, requests + len(found)
        hits, other = hits + sum(found), other + sum(mine)
        differ += apart(found, mine)
    assert runs and (differ > 0) == wrong
    extra = ", ".join(f"{k}={v}" for k, v in parameters.items())
    line = {
        "libcachesim": (f"{kind}({extra})" if extra else kind) + ", large caches" * (where is LARGE),
        "kvsim": f"`{policy}`" if isinstance(policy, str) else "`belady`, always admitting",
        "pages": "1" if where is UNIT else "1 to 8", "runs": runs, "compared": requests, "hits there": hits,
    }  # fmt: skip
    if wrong:
        agreement("libcachesim differs", **line, **{"hits here": other, "differ": differ, "why": note})
    else:
        agreement("libcachesim", **line)


EXACT = [
    ("LRU", "lru", 1, {}),
    ("FIFO", "fifo", 1, {}),
    ("LFU", "lfu(tie='use')", 1, {}),
    ("Clock", "clock", 1, {}),
    ("Clock", "clock(bits=3)", 1, {"n_bit_counter": 3}),
    ("Sieve", "sieve", 1, {}),
    ("ARC", "arc", 1, {}),
    ("S3FIFO", "s3-fifo(warm='main')", 20, {}),
    ("S3FIFO", "s3-fifo(small=0.3, ghost=0.5, threshold=1, warm='main')", 7,
     {"small_size_ratio": 0.3, "ghost_size_ratio": 0.5, "move_to_main_threshold": 1}),
    ("TwoQ", "2q", 4, {}),
    ("GDSF", "gdsf(cost=1e6, compete=True)", 1, {}),
    ("Belady", Admitting, 1, {}),
]  # fmt: skip


@pytest.mark.parametrize("where", [UNIT, SIZED], ids=["unit", "sized"])
@pytest.mark.parametrize(("kind", "policy", "least", "parameters"), EXACT)
def test_equal_request_by_request(agreement, kind, policy, least, parameters, where):
    """Least capacities: theirs admits no page as large as S3-FIFO's small queue, or larger than 2Q's A1in."""
    if where is SIZED and kind == "TwoQ":
        note = "Am has a capacity of its own there (a model of that has their hits)"
        compare(agreement, kind, policy, lambda case, c: hits_of(TheirTwoQ, case, c), True, 32, where, note)
        return
    if where is SIZED:
        least = 9 / parameters.get("small_size_ratio", 0.1) if kind == "S3FIFO" else 1
    compare(agreement, kind, policy, None, False, least, where, **parameters)


@pytest.mark.parametrize("where", [UNIT, SIZED, LARGE], ids=["unit", "sized", "large"])
def test_lirs(agreement, where):
    """Each side departs from the published algorithm in one thing; models of just these have the hits of both."""
    runs = [(case, c) for case, c in where if c >= 3]
    published, there, here = (
        {(case.name, c): hits_of(model, case, c) for case, c in runs} for model in (Lirs, TheirLirs, OurLirs)
    )
    demoted, stayed = (sum(apart(hits, published[run]) for run, hits in found.items()) for found in (there, here))
    assert demoted and (stayed > 0) == (where is not UNIT)
    assert all(hits_of(Lirs, case, c) == ours("lirs", case, c) for case, c in where if c < 3)
    note = "a hit in Q outside the stack demotes a LIR page (a model of that has their hits, without it ours)"
    if stayed:
        note = (
            f"as with pages of one size: {demoted:,} differ from the published hits; and here what Q let go or did not "
            f"admit stays while there is room: {stayed:,} differ (models of just that have the hits of either)"
        )
    compare(
        agreement, "LIRS", "lirs", lambda case, c: there[case.name, c], True, 3, where, note,
        lambda case, c: here[case.name, c],
    )  # fmt: skip


def test_size(agreement):
    """Sizes that all differ: the heap of theirs decides between equal ones."""
    rng = np.random.default_rng(3)
    for case, _ in SIZED[:: len(CAPACITIES)]:
        pages = 1 + max(case.requests)
        case = Case(case.name, case.requests, (1 + rng.permutation(pages)).tolist())
        for capacity in (pages, 3 * pages, 9 * pages):
            assert theirs("Size", case, capacity) == ours("size", case, capacity)
    compare(
        agreement, "Size", "size", lambda case, c: theirs("Size", case, c), True, 1, SIZED,
        "equal sizes: their heap decides, here the first to arrive; where all sizes differ, none differs",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "policy", "least", "where", "note"),
    [
        ("LFU", "lfu", 1, SIZED, "among equal counts the first to arrive leaves; `tie='use'` is theirs"),
        ("S3FIFO", "s3-fifo", 20, UNIT, "as in the paper, the small queue fills first; `warm='main'` is theirs"),
        ("GDSF", "gdsf", 1, SIZED, "a newcomer is admitted, as in the paper; `compete=True` is theirs"),
        ("Belady", "belady", 1, UNIT, "may refuse a newcomer, so it has more hits; theirs never does"),
    ],
)
def test_where_the_default_is_another(agreement, kind, policy, least, where, note):
    compare(agreement, kind, policy, lambda case, c: theirs(kind, case, c), True, least, where, note)


ABSENT = {
    "random numbers of its own": ["FlashProb", "LRUProb", "Random"],
    "the policy is the caller's": ["PluginCache"],
    "no policy here does the same": [
        "BeladySize", "Cacheus", "Clock2QPlus", "ClockPro", "GLCache", "Hyperbolic", "LFUDA", "LHD", "LRB", "LRUK",
        "LeCaR", "MQ", "SLRU", "ThreeLCache", "WTinyLFU",
    ],
}  # fmt: skip


def test_every_cache_is_compared_or_named(agreement):
    compared = {kind for kind, *_ in EXACT} | {"LIRS", "Size"}
    absent = [name for names in ABSENT.values() for name in names]
    base = lcs.LRU.__base__
    assert sorted([*compared, *absent]) == sorted(c.__name__ for c in base.__subclasses__())
    for why, names in ABSENT.items():
        agreement("libcachesim not compared", why=why, caches=", ".join(names))
