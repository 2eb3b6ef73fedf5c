"""SIEVE against the algorithm as it is told: a queue, a bit per page and a hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvsim import registry
from kvsim.cache.cache import Cache, Capacity
from kvsim.cache.demand import Use
from kvsim.errors import ConfigError
from kvsim.trace.access import Access
from tests.helpers import THETA, Run, drive, matrix_trace, policy_for, refer, references, replay
from tests.properties.test_laws import Shuffling
from tests.properties.test_reference import both, same
from tests.strategies import DEMANDS, traces

some = settings(deadline=None, max_examples=150)
NAMES = "abcadaebcafabcdb"
# contents after each request, newest first; where the hand rests, if not at the oldest page
VECTOR = "a ba cba cba dca(c) dca(c) eda(d) bea(e) cba(b) cba(b) fca(c) fca(c) bfa(f) cba(b) dca(c) bda(d)"

# the hand goes round, and everything newer than its last victim has left
ROUND = [5, 6, 7, 9, 10], [5, 7, 8, 10, 11], [0, 1, 3, 5, 12], [11, 12, 13]

# it goes round twice in one step, past protected pages that are free to leave a step later
TWICE = [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [3, 5, 6]


@dataclass
class Queue:
    """Zhang et al., NSDI 2024, algorithm 1, on one queue; `pages` from the oldest to the newest."""

    pages: list = field(default_factory=list)
    visited: set = field(default_factory=set)
    hand: int | None = None
    sinks: int = 0  # so many first pages, and so many newest ones, may not leave: the hand passes them
    recent: int = 0
    born: int = 0
    wrapped: bool = False
    hit: set = field(default_factory=set)  # ever since they arrived; what LFU knows

    def protected(self, page):
        return page < self.sinks or page >= self.born - self.recent

    def evict(self):
        at = self.pages.index(self.hand) if self.hand is not None else 0
        while self.pages[at] in self.visited or self.protected(self.pages[at]):
            self.visited.discard(self.pages[at])
            at = (at + 1) % len(self.pages)
            self.wrapped |= at == 0
        victim = self.pages.pop(at)
        self.hand = self.pages[at] if at < len(self.pages) else None
        self.wrapped |= self.hand is None
        self.hit.discard(victim)
        return victim

    def step(self, wanted, capacity: int, batch: int = 1):
        """Requests of one moment: hits first, then room, then newcomers. The victims."""
        self.born = max(self.born, *(page + 1 for page in wanted), 0)
        new = [page for page in wanted if page not in self.pages]
        self.visited |= set(wanted) - set(new)
        self.hit |= set(wanted) - set(new)
        over = len(self.pages) + len(new) - capacity
        count = max(over, min(batch, capacity + 1)) if over > 0 else 0
        leaving = sum(not self.protected(page) for page in self.pages)
        victims = [self.evict() for _ in range(min(count, leaving))]
        rejected = [page for page in new if not self.protected(page)][: count - len(victims)]  # found no room
        self.pages += [page for page in new if page not in rejected]
        return victims + rejected

    def __str__(self):
        name = "abcdef".__getitem__
        return "".join(map(name, self.pages[::-1])) + ("" if self.hand is None else f"({name(self.hand)})")


def test_a_sequence_worked_by_hand():
    queue, contents = Queue(), []
    for name in NAMES:
        queue.step(["abcdef".index(name)], 3)
        contents.append(str(queue))
    assert contents == VECTOR.split()
    run = refer("sieve(recent=0)", NAMES, 3)
    found = ["".join("abcdef"[k] for k in kept) for kept in run.kept(start=0)]
    assert found == ["".join(sorted(c.split("(")[0])) for c in contents]
    assert len(NAMES) - len(set(NAMES)) - run.misses() == 4


@some
@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=80), st.integers(1, 6))
@example("abcdabedeafg", 4)  # f: past d and e, round, past a to b; so that g takes d
def test_unit_requests(names, capacity):
    keys, queue = {n: i for i, n in enumerate(dict.fromkeys(names))}, Queue()
    for name, kept in zip(names, refer("sieve(recent=0)", names, capacity).kept(start=0), strict=True):
        queue.step([keys[name]], capacity)
        assert kept == sorted(queue.pages)


@st.composite
def moments(draw):
    """Steps of several requests each; a page is born when it is first named, in order of its key."""
    steps, born = [[0]], 1
    for size in draw(st.lists(st.integers(0, 5), min_size=1, max_size=40)):
        wanted = draw(st.sets(st.integers(0, born), min_size=min(1, size), max_size=size))
        born += born in wanted
        steps.append(sorted(wanted))
    return steps


def rows(steps) -> list[Access]:
    """One lane of 0/1 rows, several ones in each."""
    stride = 1 + max(max(s, default=0) for s in steps)
    first = references("a")[0]
    accesses, born = [], 0
    for step, wanted in enumerate(steps):
        row = np.zeros((1, 1, stride), np.float32)
        row[0, 0, wanted] = 1
        before, born = born, max(born, 1 + max(wanted, default=0))
        lane, prompt = np.zeros(1, np.int32), None if step else first.prompt
        accesses.append(Access(step, row, row, born, born, born - before, lane, lane + born, prompt))
    return accesses


def through(steps, capacity: int, offload: bool, kind=Cache, **attributes) -> Run:
    accesses, use = rows(steps), Use("weight", 0.01)
    regime = {"offload": registry.build("spill", "offload"), "demand": use} if offload else {}
    policy = policy_for("sieve(recent=0)", **attributes)
    stride = accesses[0].row.shape[-1]
    return drive(kind((1, 1), stride, policy, Capacity(capacity), use=use, audit=True, **regime), accesses, stride)


@some
@given(moments(), st.integers(1, 7), st.integers(1, 3))
@example([*([k] for k in range(10)), *ROUND], 5, 1)
def test_several_requests_and_victims_in_a_step(steps, capacity, batch):
    """Several victims of one step are as many single evictions; slots do not matter."""
    for kind in (Cache, Shuffling):
        queue = Queue()
        for wanted, kept in zip(steps, through(steps, capacity, True, kind, batch=batch).kept(start=0), strict=True):
            queue.step(wanted, capacity, batch)
            assert kept == sorted(queue.pages)


@some
@given(moments(), st.integers(1, 7), st.integers(1, 3))
def test_where_an_evicted_page_is_gone(steps, capacity, batch):
    queue, gone = Queue(), set()
    for wanted, kept in zip(steps, through(steps, capacity, False, batch=batch).kept(start=0), strict=True):
        gone |= set(queue.step([page for page in wanted if page not in gone], capacity, batch))
        assert kept == sorted(queue.pages)


def test_a_prompt_is_one_moment():
    """Its oldest page leaves although every row of the prompt used it; then the hand starts at the oldest."""
    rows = [[1.0], [1.0, 0], [1.0, 0, 0], [1.0, 0, 0, 0], [0, 0.5, 0, 0, 0.5], [0, 0, 0, 0, 0, 1.0]]
    run = replay("sieve", 3, matrix_trace([*rows, [0] * 6 + [1.0]], prompt=4), offload="spill", demand=THETA)
    assert run.kept(start=0) == [[1, 2, 3], [1, 3, 4], [1, 4, 5], [1, 5, 6]]


@some
@example([[0], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], *TWICE], 4, 0, 2, True)
@given(moments(), st.integers(4, 7), st.integers(0, 2), st.integers(0, 2), st.booleans())
def test_the_hand_passes_what_is_protected(steps, capacity, sinks, recent, offload):
    queue, gone = Queue(sinks=sinks, recent=recent), set()
    run = through(steps, capacity, offload, sink=sinks, recent=recent)
    for wanted, kept in zip(steps, run.kept(start=0), strict=True):
        victims = queue.step([page for page in wanted if page not in gone], capacity)
        gone |= set() if offload else set(victims)
        assert kept == sorted(queue.pages)


@settings(deadline=None, max_examples=80)
@given(
    traces(), st.integers(4, 9), st.sampled_from(DEMANDS), st.booleans(), st.sampled_from(("head", "layer", "token")),
    st.integers(1, 3), st.integers(1, 4), st.sampled_from((0, 1, 3)), st.sampled_from((0, 2)),
)  # fmt: skip
def test_the_slow_engine_agrees(trace, budget, demand, offload, granularity, lag, batch, recent, sink):
    policy = policy_for(f"sieve(recent={recent}, sink={sink})", granularity=granularity, lag=lag, batch=batch)
    regime = {"offload": registry.build("spill", "offload"), "demand": demand} if offload else {}
    try:
        for cache, reference, *_ in both(trace, policy, Capacity(budget), use=demand, **regime):
            same(cache, reference)
    except ConfigError:
        assert recent + sink > budget


@settings(deadline=None, max_examples=60)
@given(traces(windows=False), st.integers(3, 9))
def test_every_lane_is_a_queue(trace, budget):
    """Random rows, each head with requests of its own; a page of several tokens stays while it is the newest."""
    use = Use("weight", 0.1)
    run = replay("sieve(recent=0)", budget, trace, offload="spill", use=use, demand=use)
    queues = [Queue(recent=int(trace.page_size > 1)) for _ in range(run.cache.lanes)]
    for a, kept in zip(trace.requests()[0].accesses(), run.copies & 1, strict=True):
        peak, new = a.peak.reshape(len(queues), -1), range(a.keys - a.fresh, a.keys)
        for queue, row, found in zip(queues, peak, kept, strict=True):
            used = [] if a.prefill else np.flatnonzero(row >= np.float32(0.1)).tolist()
            queue.step(sorted({*used, *new}), budget)
            assert np.flatnonzero(found).tolist() == sorted(queue.pages)
