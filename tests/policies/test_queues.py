"""Object caches that are queues, against the published algorithms written again with lists; and pages of many sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvsim import registry
from kvsim.cache.cache import Cache
from kvsim.cache.demand import Use
from kvsim.cache.tiers import Capacity
from kvsim.errors import ConfigError
from kvsim.testing.reference import ReferenceCache
from tests.helpers import THETA, drive, matrix_trace, policy_for, refer, references, replay
from tests.policies.test_sieve import moments, rows
from tests.properties.test_laws import Shuffling
from tests.properties.test_reference import same
from tests.strategies import DEMANDS, traces

some = settings(deadline=None, max_examples=50)
NAMES = "abcadaebcafabcdb"


class Model:
    """An object cache: what it holds, `order` it may, and what a request does. `size`: of a page, 1 by default."""

    def __init__(self, room, size=None):
        self.room, self.size, self.held = room, size or {}, set()

    def of(self, *pages):
        return sum(self.size.get(k, 1) for k in pages)

    def request(self, k):
        """True for a hit."""
        if k in self.held:
            self.hit(k)
            return True
        if self.of(k) <= self.room:
            self.miss(k)
        return False

    def step(self, wanted):
        """Several at once: what is here first."""
        here = {k for k in wanted if k in self.held}
        for k in (*sorted(here), *sorted(set(wanted) - here)):
            self.request(k)

    def full(self, k):
        return self.of(*self.held) + self.of(k) > self.room

    def drop(self, k, queue, ghosts=None, most=0):
        queue.remove(k)
        self.held.discard(k)
        if ghosts is not None and self.of(k) <= most:
            while self.of(*ghosts, k) > most:
                ghosts.pop(0)
            ghosts.append(k)


class Arc(Model):
    """Figure 4 of Megiddo and Modha. Lists from the oldest to the newest."""

    def __init__(self, *a):
        super().__init__(*a)
        self.t1, self.t2, self.b1, self.b2, self.p = [], [], [], [], 0.0

    def hit(self, k):
        (self.t1 if k in self.t1 else self.t2).remove(k)
        self.t2.append(k)

    def replace(self, in_b2=False):
        one = self.of(*self.t1)
        if self.t1 and (one > self.p or (in_b2 and one == self.p)) or not self.t2:
            self.drop(self.t1[0], self.t1, self.b1, np.inf)
        else:
            self.drop(self.t2[0], self.t2, self.b2, np.inf)

    def miss(self, k):
        one, two = self.of(*self.b1), self.of(*self.b2)
        ghost = self.b1 if k in self.b1 else self.b2 if k in self.b2 else None
        if ghost is not None:
            up = ghost is self.b1
            self.p = min(self.p + max(1, two / one), self.room) if up else max(self.p - max(1, one / two), 0)
            ghost.remove(k)
        while self.full(k):
            if ghost is not None:
                self.replace(ghost is self.b2)
            elif self.of(*self.t1, *self.b1, k) <= self.room:
                if self.of(*self.t1, *self.t2, *self.b1, *self.b2) >= 2 * self.room and self.b2:
                    self.b2.pop(0)
                self.replace()
            elif self.b1:
                self.b1.pop(0)
                self.replace()
            else:
                self.drop(self.t1[0], self.t1)
        (self.t1 if ghost is None else self.t2).append(k)
        self.held.add(k)


class S3Fifo(Model):
    """Algorithm 1 of Yang et al.; `warm`: the small queue is kept short from the start."""

    def __init__(self, room, size=None, small=0.1, ghost=0.9, threshold=2, warm=False):
        super().__init__(room, size)
        self.small, self.ghost, self.threshold, self.warm = (
            max(1, int(room * small)),
            int(room * ghost),
            threshold,
            warm,
        )
        self.s, self.m, self.g, self.f = [], [], [], {}

    def hit(self, k):
        self.f[k] += 1

    def evict(self):
        self.warm = False
        if self.of(*self.m) <= self.room - self.small and self.s:
            while self.s:
                k = self.s[0]
                if self.f[k] < self.threshold:
                    return self.drop(k, self.s, self.g, self.ghost)
                self.s.pop(0)
                self.m.append(k)
                self.f[k] = 0
            return None
        while self.f[self.m[0]]:
            self.f[self.m[0]] = min(self.f[self.m[0]], 3) - 1
            self.m.append(self.m.pop(0))
        return self.drop(self.m[0], self.m)

    def miss(self, k):
        known = k in self.g
        if known:
            self.g.remove(k)
        while self.full(k):
            self.evict()
        spill = self.warm and self.of(*self.s) >= self.small
        (self.m if known or spill else self.s).append(k)
        self.f[k] = 0
        self.held.add(k)


class TwoQ(Model):
    """The full version of Johnson and Shasha."""

    def __init__(self, *a):
        super().__init__(*a)
        self.i, self.m, self.o = [], [], []

    def hit(self, k):
        if k in self.m:
            self.m.remove(k)
            self.m.append(k)

    def miss(self, k):
        known = k in self.o
        if known:
            self.o.remove(k)
        while self.full(k):
            if self.of(*self.i) > max(1, int(self.room * 0.25)) or not self.m:
                self.drop(self.i[0], self.i, self.o, int(self.room * 0.5))
            else:
                self.drop(self.m[0], self.m)
        (self.m if known else self.i).append(k)
        self.held.add(k)


class Clock(Model):
    """Second chances; `most`: a counter's largest value."""

    def __init__(self, room, size=None, most=1):
        super().__init__(room, size)
        self.q, self.f, self.most = [], {}, most

    def hit(self, k):
        self.f[k] = min(self.f[k] + 1, self.most)

    def miss(self, k):
        while self.full(k):
            while self.f[self.q[0]]:
                self.f[self.q[0]] -= 1
                self.q.append(self.q.pop(0))
            self.drop(self.q[0], self.q)
        self.q.append(k)
        self.f[k] = 0
        self.held.add(k)


class Gdsf(Model):
    """H = L + f * cost / size; among equals the one used longest ago."""

    def __init__(self, room, size=None, cost=1.0, compete=False):
        super().__init__(room, size)
        self.low, self.f, self.h, self.q, self.cost, self.compete = 0.0, {}, {}, [], cost, compete

    def hit(self, k):
        self.f[k] += 1
        self.h[k] = self.low + self.f[k] * self.cost / self.of(k)
        self.q.remove(k)
        self.q.append(k)

    def evict(self):
        k = min(self.q, key=self.h.get)
        self.low = self.h[k]
        self.drop(k, self.q)

    def miss(self, k):
        while not self.compete and self.full(k):
            self.evict()
        self.f[k] = 0
        self.q.append(k)
        self.held.add(k)
        self.hit(k)
        while self.of(*self.held) > self.room:
            self.evict()


class Lirs(Model):
    """Jiang and Zhang: stack and queue from the oldest to the newest; `extra`: what else a hit in Q does."""

    def __init__(self, room, size=None, hir=0.01, stack=2.0):
        super().__init__(room, size)
        self.short, self.tall = max(1, int(room * hir)), stack * room
        self.s, self.q, self.lir, self.away = [], [], set(), []

    def top(self, k):
        if k in self.s:
            self.s.remove(k)
        self.s.append(k)

    def prune(self):
        while self.s and self.s[0] not in self.lir:
            k = self.s.pop(0)
            if k in self.away:
                self.away.remove(k)

    def evict(self):
        k = self.q[0]
        self.drop(k, self.q)
        if k in self.s:
            self.away.append(k)

    def enqueue(self, k):
        while self.q and self.of(*self.q, k) > self.short:
            self.evict()
        self.q.append(k)

    def demote(self):
        k = self.s.pop(0)
        self.lir.remove(k)
        if self.of(k) <= self.short:
            self.enqueue(k)
        else:
            self.held.remove(k)
        self.prune()

    def promote(self, k):
        self.top(k)
        self.lir.add(k)
        while self.lir and self.of(*self.lir) > self.room - self.short:
            self.demote()

    def hit_queue(self, k):
        self.top(k)
        self.q.remove(k)
        self.q.append(k)

    def hit(self, k):
        if k in self.lir:
            self.top(k)
            self.prune()
        elif k in self.s:
            self.q.remove(k)
            self.promote(k)
        else:
            self.hit_queue(k)
        self.limit()

    def miss(self, k):
        if k in self.away:
            self.away.remove(k)
            self.held.add(k)
            self.promote(k)
        elif self.of(k) <= self.short:
            self.held.add(k)
            if self.of(*self.lir, k) <= self.room - self.short:
                self.lir.add(k)
            else:
                self.enqueue(k)
            self.top(k)
            self.prune()
        self.limit()

    def limit(self):
        while self.away and self.of(*self.s) > self.tall:
            self.s.remove(self.away.pop(0))


MODELS = {
    "arc": Arc,
    "s3-fifo": S3Fifo,
    "s3-fifo(small=0.3, ghost=0.5, threshold=1)": lambda *a: S3Fifo(*a, small=0.3, ghost=0.5, threshold=1),
    "s3-fifo(small=0.4, warm='main')": lambda *a: S3Fifo(*a, small=0.4, warm=True),
    "2q": TwoQ,
    "clock": Clock,
    "clock(bits=2)": lambda *a: Clock(*a, most=3),
    "lirs": Lirs,
    "lirs(hir=0.4, stack=1.5)": lambda *a: Lirs(*a, hir=0.4, stack=1.5),
    "gdsf": Gdsf,
    "gdsf(cost=3, compete=True)": lambda *a: Gdsf(*a, cost=3, compete=True),
}
models = st.sampled_from(sorted(MODELS))


def bare(spec: str, **attributes):
    return policy_for(spec, recent=0, **attributes)


def named_by(kept, names) -> list[str]:
    """Keys as the names that came first to have them."""
    order = list(dict.fromkeys(names))
    return ["".join(order[k] for k in keys) for keys in kept]


def named(kept) -> list[str]:
    return ["".join("abcdef"[k] for k in keys) for keys in kept]


# -- sequences worked by hand ----------------------------------------------------------------------------------


def hits(run, names=NAMES) -> int:
    return len(names) - len(set(names)) - run.misses()


def test_arc_worked_by_hand():
    p = [refer(bare("arc"), NAMES[:n], 3).cache.policy.memory() for n in (12, 13, 14, 16)]
    assert p == [0, 1, 2, 1]  # b is found in B1 at the 13th request, c at the 14th, b in B2 at the last
    run = refer(bare("arc"), NAMES, 3)
    t1, t2, b1, b2 = named(run.cache.policy.queues())
    assert (t1, t2, b1, b2) == ("d", "cb", "f", "a")
    assert hits(run) == 4


def test_s3_fifo_worked_by_hand():
    states = {7: "cde a b", 8: "de ab c", 9: "e abc d", 11: "f abc de", 16: " abcd ef"}
    for n, state in states.items():
        run = refer(bare("s3-fifo"), NAMES[:n], 4)
        small, main, ghosts, _ = named(run.cache.policy.queues())
        assert (small, main, ghosts) == tuple(state.split(" ")), n
    assert hits(run) == 7


GDSF_SIZES = dict(zip("abcdef", (1, 2, 1, 3, 1, 2), strict=True))


def test_gdsf_worked_by_hand():
    """Sizes a1 b2 c1 d3 e1 f2 in a cache of 4; contents and L after each miss from the fifth request on."""
    right = {5: "ad 1", 7: "ae 1.333", 9: "ace 1.833", 11: "acf 2.333", 13: "ab 2.833", 15: "ad 3.833", 16: "ab 4.167"}
    for n, state in right.items():
        run = sized("gdsf", NAMES[:n], 4, GDSF_SIZES)
        contents, low = state.split()
        assert named(run.kept(start=0))[-1] == contents
        assert run.cache.policy.memory() == pytest.approx(float(low), abs=1e-3)
    assert hits(run) == 4


def test_lirs_worked_by_hand():
    """Two LIR pages and a queue of one. Only a and b are LIR until c's second reuse comes while c is in the stack."""
    contents = "a ab abc abc abd abd abe abe abc abc abf abf abf abc abd abd"
    run = refer(bare("lirs"), NAMES, 3)
    assert named(run.kept(start=0)) == [x if set(x) != {"a"} or len(x) == 1 else x for x in contents.split()]
    assert hits(run) == 7


def test_lirs_keeps_a_ghost_while_the_stack_is_no_taller_than_it_may_be():
    """Three LIR pages and a queue of one, a stack of five: at the sixth request it holds b, e, c, a and the ghost of d,
    which makes d LIR at the eighth and sends b to the queue, where g finds it."""
    run = refer(bare("lirs(hir=0.4, stack=1.25)"), "bcedcacdg", 4)
    assert named_by(run.kept(start=0), "bcedag") == ["b", "bc", "bce", "bced", "bced", "bcea", "bcea", "bced", "cedg"]


@pytest.mark.parametrize(("names", "last"), [("febbdebdeabcbfaf", "fba"), ("bddcadcadcgbedd", "dc")])
def test_arc_forgets_ghosts_for_pages_that_it_lost(names, last):
    """Three leave at once, so pages of T2 go without ARC's doing; T1 and its ghosts together hold three at most."""
    for n in range(1, len(names) + 1):
        run = refer(policy := bare("arc", batch=3), names[:n], 3)
        t1, _, b1, _ = policy.queues()
        assert len(t1) + len(b1) <= 3, names[:n]
    assert set(named_by(run.kept(), names)[-1]) == set(last)


def test_2q_worked_by_hand():
    """Capacity 4: one in A1in, two remembered. b comes back at the 8th request while A1out has it, and stays."""
    run = refer(bare("2q"), "abcdeabf", 4)
    assert named(run.kept(start=0)) == ["a", "ab", "abc", "abcd", "bcde", "acde", "abde", "abef"]
    assert named(run.cache.policy.queues())[:3] == ["ef", "ab", "cd"]


def test_clock_worked_by_hand():
    assert named(refer(bare("clock"), "abcadbe", 3).kept(start=0)) == ["a", "ab", "abc", "abc", "acd", "abd", "bde"]
    assert named(refer(bare("fifo"), "abcadbe", 3).kept(start=0)) == ["a", "ab", "abc", "abc", "bcd", "bcd", "cde"]


# -- any sequence ----------------------------------------------------------------------------------------------


@some
@given(models, st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=120), st.integers(1, 7))
def test_one_request_per_step_is_the_published_algorithm(spec, names, capacity):
    keys, model = {n: i for i, n in enumerate(dict.fromkeys(names))}, MODELS[spec](capacity)
    for name, kept in zip(names, refer(bare(spec), names, capacity).kept(start=0), strict=True):
        model.request(keys[name])
        assert kept == sorted(model.held)


def through(spec, steps, capacity, offload=True, kind=Cache, **attributes):
    accesses, use = rows(steps), Use("weight", 0.01)
    regime = {"offload": registry.build("spill", "offload"), "demand": use} if offload else {}
    stride = accesses[0].row.shape[-1]
    policy = policy_for(spec, **({"recent": 0} | attributes))
    return drive(kind((1, 1), stride, policy, Capacity(capacity), use=use, audit=True, **regime), accesses, stride)


@some
@given(models, moments(), st.integers(1, 7))
def test_several_requests_in_a_step(spec, steps, capacity):
    """What is on the GPU first, then what joins it; slots do not matter."""
    for kind in (Cache, Shuffling):
        model = MODELS[spec](capacity)
        for wanted, kept in zip(steps, through(spec, steps, capacity, kind=kind).kept(start=0), strict=True):
            model.step(wanted)
            assert kept == sorted(model.held)


@some
@given(models, moments(), st.integers(1, 7))
def test_where_an_evicted_page_is_gone(spec, steps, capacity):
    model, born, gone = MODELS[spec](capacity), set(), set()
    for wanted, kept in zip(steps, through(spec, steps, capacity, offload=False).kept(start=0), strict=True):
        model.step([k for k in wanted if k not in gone])
        born |= set(wanted)
        gone = born - model.held
        assert kept == sorted(model.held)


@some
@given(models, moments(), st.integers(5, 9), st.integers(0, 2), st.integers(0, 2))
@example("lirs", [[0], [0, 1], [2], [0, 3], [4], [1, 5], [2, 6]], 5, 1, 1)
def test_what_is_protected_is_no_part_of_the_algorithm(spec, steps, capacity, sinks, recent):
    """The machine has the rest of the budget; a page enters it when it is no longer protected."""
    run = through(spec, steps, capacity, sink=sinks, recent=recent)
    born = 0
    for wanted, kept in zip(steps, run.kept(start=0), strict=True):
        born = max(born, *(k + 1 for k in wanted), 0)
        guarded = {*range(min(sinks, born)), *range(max(born - recent, 0), born)}
        assert guarded <= set(kept) and len(kept) <= capacity
    policy = run.cache.policy
    inside = {k for k in range(born) if policy.holds(k)}
    assert inside == set(kept) - guarded


@some
@given(models, st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(4, 8), st.integers(0, 2))
def test_sinks_leave_the_bare_algorithm_in_a_smaller_cache(spec, names, capacity, sinks):
    """Requests that never touch the sinks: as if those and their places were not there."""
    steps = [[k] for k in range(sinks)] + [[sinks + k] for k in _numbered(names)]
    model = MODELS[spec](capacity - sinks)
    run = through(spec, steps, capacity, sink=sinks)
    for (k,), kept in zip(steps[sinks:], run.kept(start=sinks), strict=True):
        model.request(k)
        assert kept == sorted(model.held | set(range(sinks)))


def _numbered(names):
    keys = {}
    return [keys.setdefault(n, len(keys)) for n in names]


@some
@given(models, moments(), st.integers(3, 7), st.integers(2, 3), st.booleans())
def test_pages_that_a_batch_took_are_forgotten(spec, steps, capacity, batch, offload):
    """The machine's contents are the GPU's after each look, whoever evicted."""
    run = through(spec, [*steps, []], capacity, offload=offload, batch=batch)
    machine = run.cache.policy._machines
    assert machine[3][0, 1] == len(run.kept(start=0)[-1])
    assert (run.copies[:, 0] & 1).sum(1).max() <= capacity


@settings(deadline=None, max_examples=60)
@given(
    traces(), models, st.integers(4, 9), st.sampled_from(DEMANDS), st.booleans(),
    st.sampled_from(("head", "layer", "token")), st.integers(1, 3), st.integers(1, 3), st.sampled_from((0, 1, 3)),
)  # fmt: skip
def test_the_slow_engine_agrees(trace, spec, budget, demand, offload, granularity, lag, batch, recent):
    regime = {"offload": registry.build("spill", "offload"), "demand": demand} if offload else {}
    request = trace.requests()[0]
    fast, slow = (
        kind(
            trace.lanes, request.stride, policy_for(spec, granularity=granularity, lag=lag, batch=batch, recent=recent),
            Capacity(budget), page_size=trace.page_size, seed=3, use=demand, **regime,
        )
        for kind in (Cache, ReferenceCache)
    )  # fmt: skip
    fast.auditing = True
    for a in request.accesses():
        fast.access(a)
        slow.access(a)
        same(fast, slow)


@settings(deadline=None, max_examples=40)
@given(traces(windows=False, page_sizes=(1,)), models, st.integers(3, 9))
def test_every_lane_is_a_machine(trace, spec, budget):
    """Random rows, each head with requests of its own."""
    use = Use("weight", 0.1)
    run = replay(bare(spec), budget, trace, offload="spill", use=use, demand=use)
    lanes = [MODELS[spec](budget) for _ in range(run.cache.lanes)]
    for a, kept in zip(trace.requests()[0].accesses(), run.copies & 1, strict=True):
        peak, new = a.peak.reshape(len(lanes), -1), range(a.keys - a.fresh, a.keys)
        for model, row, found in zip(lanes, peak, kept, strict=True):
            used = [] if a.prefill else np.flatnonzero(row >= np.float32(0.1)).tolist()
            model.step({*used, *new})
            assert np.flatnonzero(found).tolist() == sorted(model.held)


def test_a_prompt_is_one_moment():
    """Eleven pages pass one after another, as if each were asked for once; its rows are no hits."""
    rows = [[1.0] + [0] * n for n in range(11)] + [[0] * 11 + [1.0]]
    for spec in MODELS:
        model = MODELS[spec](4)
        for k in range(11):
            model.request(k)
        run = replay(bare(spec), 4, matrix_trace(rows, prompt=11), offload="spill", demand=THETA)
        assert run.kept(start=0)[0] == sorted(model.held), spec


def test_what_a_prefetch_brings_up_stays():
    """It joins on top, and its next look counts it as admitted."""

    class Ahead:
        inclusive, waits, spec_name = True, False, "ahead"

        def place(self, view, victims):
            return 1

        def prefetch(self, view):
            return (view.key == 0) & (view.now == 3)

    for spec in MODELS:
        accesses = rows([[0], [1], [2], [3], [4]])
        use = Use("weight", 0.01)
        cache = Cache((1, 1), 5, bare(spec), Capacity(2), offload=Ahead(), use=use, demand=use, audit=True)
        kept = drive(cache, accesses, 5).kept(start=0)
        assert kept[2] == [1, 2] or 0 in kept[2], spec
        assert 0 in kept[3], spec
        assert len(kept[4]) == 2 and 4 in kept[4], spec


@pytest.mark.parametrize(
    "spec",
    [
        "s3-fifo(small=2)", "s3-fifo(warm='cold')", "2q(a1in='x')", "clock(bits=0)", "lirs(hir=-0.1)",
        "gdsf(cost=0)", "gdsf(cost='ssd')", "lfu(tie='newest')",
    ],
)  # fmt: skip
def test_parameters_that_make_no_sense(spec):
    with pytest.raises(ConfigError):
        registry.build(spec)


# -- LFU, size, adaptive LRU, and pages of many sizes ---------------------------------------------------------------


def sized(policy, names, capacity, sizes, host=None, ssd=0, offload=True):
    """References to pages of the given sizes (by name) through a cache of `capacity`."""
    accesses, p = references(names), bare(policy) if isinstance(policy, str) else policy
    keys = list(dict.fromkeys(names))
    use, facts = Use("weight", 0.5), {"size": np.array([sizes[n] for n in keys], float)}
    regime = {"offload": registry.build("spill", "offload"), "demand": use} if offload else {}
    cache = Cache(
        (1, 1), len(keys), p, Capacity(capacity, host, ssd), use=use, facts=lambda: facts, audit=True, **regime
    )
    return drive(cache, accesses, len(keys))


def test_lfu_admits_what_it_is_asked_for():
    """c comes when a and b have two uses each: a arrived first, b was used longest ago."""
    for tie, right in (("arrival", "bc"), ("use", "ac")):
        assert named(refer(bare(f"lfu(tie='{tie}')"), "abbac", 2).kept(start=0))[-1] == right


def test_the_largest_page_leaves():
    sizes = {"a": 2, "b": 4, "c": 3, "d": 1, "e": 4}
    assert named(sized("size", "abcde", 9, sizes).kept(start=0)) == ["a", "ab", "abc", "acd", "ade"]
    assert sized("size", NAMES, 3, dict.fromkeys("abcdef", 1)).kept() == refer("fifo(recent=0)", NAMES, 3).kept()


def test_adaptive_lru():
    """A large page counts as used earlier: it leaves although it was used last, but not in the step it came."""
    sizes = {"a": 2, "b": 2, "c": 1}
    spec = "adaptive-lru(large=1.5, penalty=2)"
    assert named(sized(spec, "abcc", 4, sizes).kept(start=0)) == ["a", "ab", "bc", "bc"]
    assert named(sized(spec, "abc", 4, {"a": 1, "b": 2, "c": 2}).kept(start=0))[-1] == "ac"
    assert refer(bare("adaptive-lru"), NAMES, 3).kept() == refer(bare("lru"), NAMES, 3).kept()


class Simple(Model):
    """Evicts the lowest `rank` of (count, arrival, last use, size) until there is room."""

    def __init__(self, rank, *a):
        super().__init__(*a)
        self.rank, self.state, self.now = rank, {}, 0

    def request(self, k):
        self.now += 1
        return super().request(k)

    def hit(self, k):
        count, arrival, _ = self.state[k]
        self.state[k] = count + 1, arrival, self.now

    def miss(self, k):
        while self.full(k):
            self.held.remove(min(self.held, key=lambda j: self.rank(*self.state[j], self.of(j))))
        self.held.add(k)
        self.state[k] = 1, self.now, self.now


RANKS = {
    "fifo": lambda count, arrival, last, size: arrival,
    "lru": lambda count, arrival, last, size: last,
    "lfu": lambda count, arrival, last, size: (count, arrival),
    "lfu(tie='use')": lambda count, arrival, last, size: (count, last),
    "size": lambda count, arrival, last, size: (-size, arrival),
    "adaptive-lru(large=2.5, penalty=3)": lambda count, arrival, last, size: (last - 3 * (size > 2.5), arrival),
}
SIZES = st.lists(st.sampled_from((0.25, 0.5, 1, 1.5, 2, 3, 5)), min_size=8, max_size=8)


@some
@given(
    st.sampled_from((*sorted(MODELS), *sorted(RANKS))),
    st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=80), SIZES, st.integers(2, 9), st.booleans(),
)  # fmt: skip
@example("lirs", "ab", [0.5, 1.5, 1, 1, 1, 1, 1, 1], 2, True)  # b is larger than Q: it stays while there is room
@example("lru", "abcab", [5, 1, 1, 1, 1, 1, 1, 1], 2, True)  # a is larger than the cache: it takes nothing with it
def test_pages_of_many_sizes(spec, names, sizes, capacity, offload):
    size = dict(zip("abcdefgh", sizes, strict=True))
    keys = {n: i for i, n in enumerate(dict.fromkeys(names))}
    by_key = {i: size[n] for n, i in keys.items()}
    model = MODELS[spec](capacity, by_key) if spec in MODELS else Simple(RANKS[spec], capacity, by_key)
    run, born, gone = sized(spec, names, capacity, size, offload=offload), set(), set()
    for name, kept in zip(names, run.kept(start=0), strict=True):
        if keys[name] not in gone:
            model.request(keys[name])
        elif spec in RANKS:
            model.now += 1  # a step without a request is time all the same
        born.add(keys[name])
        gone = set() if offload else born - set(kept)
        assert kept == sorted(model.held) or (spec.startswith("lirs") and model.held < set(kept))


def test_sizes_reach_the_policy_and_the_tiers():
    """Two sizes: host and SSD count them too, and a page larger than the host goes down to the SSD."""
    sizes = {"a": 3, "b": 1, "c": 1, "d": 2}
    run = sized("lru", "abcd", 3, sizes, host=2, ssd=9)
    assert run.cache.view.size[0, 0][np.argsort(run.cache.table.key[0])][-4:].tolist() == [3, 1, 1, 2]
    assert named(run.kept(start=0)) == ["a", "b", "bc", "cd"]
    assert run.copies[-1, 0].tolist() == [4, 2, 1, 1]  # a on the SSD, b on the host
    with pytest.raises(ConfigError, match="hold 6 pages per lane, the request needs 7"):
        sized("lru", "abcd", 3, sizes, host=3, ssd=0)
    with pytest.raises(ConfigError, match="not above zero"):
        sized("lru", "ab", 3, {"a": 0, "b": 1})


def test_unit_sizes_are_no_sizes():
    for spec in ("lru", "h2o", "tova", "sieve", "arc"):
        ones = sized(policy_for(spec), NAMES, 3, dict.fromkeys("abcdef", 1.0))
        assert ones.kept() == refer(spec, NAMES, 3).kept()


# -- newcomers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "kept"), [("lfu(recent=0)", [0, 2]), ("size(recent=0)", [1, 2]), ("adaptive-lru(recent=0)", [1, 2])]
)
def test_the_prompt_joins_as_one_and_is_cut_by_its_scores(spec, kept):
    """All of it is new: LFU lets go of the page that was used least, not of the oldest."""
    trace = matrix_trace([[1.0], [0.9, 0.1], [0.5, 0.0, 0.5], [0.25] * 4], prompt=3)
    assert replay(spec, 2, trace).kept(start=0)[0] == kept
