"""The optional hooks of an offload policy: what they move, and what they may not break."""

import numpy as np
import pytest

from kvsim import registry
from kvsim.cache.cache import Cache
from kvsim.cache.demand import Use
from kvsim.cache.table import GPU, HOST, SSD
from kvsim.cache.tiers import Capacity
from kvsim.errors import PolicyError
from kvsim.testing import tiny_trace
from kvsim.trace.access import Geometry, dense_trace
from tests.conftest import SIZES, random_source
from tests.helpers import references

BUDGET = 12
THETA = Use("weight", 0.05)


class Plain:
    inclusive, waits = True, False

    def place(self, view, victims):
        return np.int8(1)


def fresh(offload, policy="lru", **more):
    """An empty cache, and the accesses of one request."""
    trace = dense_trace([random_source(5)], Geometry(2, 2, 2, 16, **SIZES))
    (request,) = trace.requests()
    settings = {"offload": offload, "demand": THETA, "audit": True, "capacity": Capacity(BUDGET), **more}
    return Cache((2, 2), request.stride, registry.build(policy), **settings), request.accesses()


def replay(offload, policy="lru", **more):
    """Outcomes of one request and the cache afterwards."""
    cache, accesses = fresh(offload, policy, **more)
    return [cache.access(a) for a in accesses], cache


def total(outcomes, name):
    return np.sum([getattr(o, name).sum(-1) for o in outcomes], axis=0)


class Ahead(Plain):
    """Wants the page with the largest mass that is not on the GPU."""

    def prefetch(self, view):
        away = np.where(view.resident | (view.key < 0), -np.inf, view.mass)
        return away == away.max(-1, keepdims=True)


def test_prefetched_pages_count_once_and_keep_the_budget():
    outcomes, cache = replay(Ahead(), policy="h2o(recent=1)")
    assert total(outcomes, "prefetched")[1] > 0 and total(outcomes, "prefetched")[2] == 0
    assert all((o.resident <= BUDGET).all() for o in outcomes)
    assert total(outcomes, "spilled")[1] <= cache.lanes * cache.stride  # written at most once each


def test_a_prefetch_that_does_not_survive_moves_nothing():
    """FIFO: of all pages fetched unasked only the newest that fit stay, and only they count."""
    wanted = []

    class Everything(Plain):
        def prefetch(self, view):
            wanted.append((~view.resident & (view.key >= 0)).reshape(-1, view.key.shape[-1]))
            return True

    cache, accesses = fresh(Everything(), "fifo")
    stayed = []
    for a in accesses:
        out = cache.access(a)
        assert (out.resident <= BUDGET).all()
        stayed.append(int((wanted[-1] & (cache.table.copies & GPU > 0)).sum()))
        assert out.prefetched.sum() == stayed[-1]
    assert [w.sum() > n for w, n in zip(wanted, stayed, strict=True)] == [n > 0 for n in stayed]
    assert sum(n > 0 for n in stayed) == 20  # at every step: what is away, more than fits, is wanted back


def test_a_step_waits_for_the_prefetched_pages_it_reads():
    """Layers are awaited where a page is read for the first time since it was prefetched; or all, if asked."""

    class Record(Ahead):
        def __init__(self, waits):
            self.waits, self.sent = waits, []

        def prefetch(self, view):
            self.sent.append(super().prefetch(view) & ~view.resident & (view.key >= 0))
            return self.sent[-1]

    some, cache = replay(Record(False), policy="h2o(recent=1)")
    assert not some[0].awaits.any()
    waited = np.array([o.awaits for o in some[1:]])
    assert waited.any() and not waited.all()
    moved = np.array([o.prefetched.sum(0) for o in some[:-1]])
    assert (waited.cumsum(0) <= (moved > 0).cumsum(0)).all()  # nothing is awaited that was not sent for
    every, _ = replay(Record(True), policy="h2o(recent=1)")
    assert all(o.awaits.all() for o in every)
    assert [o.fetched.sum() for o in every] == [o.fetched.sum() for o in some]  # when one waits decides nothing


def test_every_page_that_moves_is_listed():
    """The list of a recording cache adds up to the counts, and names pages that were where it says."""

    class Both(Ahead):
        def backup(self, view):
            return view.key % 3 == 0

    outcomes, cache = replay(Both(), policy="h2o(recent=1)", record=True)
    counts = {"load": "fetched", "prefetch": "prefetched", "store": "spilled"}
    for o in outcomes:
        for action, name in counts.items():
            listed = np.zeros((3, 2), int)
            for move in o.moved:
                if move.action == action:
                    np.add.at(listed[move.tier], move.layer, 1)
            assert (listed == getattr(o, name)).all()
    held = set()
    for o in outcomes:
        for move in o.moved:
            pages = list(zip(move.layer.tolist(), move.page.tolist(), strict=True))
            if move.action == "store":
                held |= set(pages)
            else:
                assert set(pages) <= held  # only what was stored can be loaded
    assert not any(o.moved for o in replay(Both(), policy="h2o(recent=1)")[0])


def test_write_through_moves_every_page_once_and_nothing_at_eviction():
    class Through(Plain):
        def backup(self, view):
            return True

    outcomes, cache = replay(Through())
    assert total(outcomes, "spilled")[1] == cache.lanes * cache.stride
    first = outcomes[0]
    assert first.spilled[1].sum() == cache.lanes * 24  # the prompt, evicted or not
    assert all(o.spilled[1].sum() == cache.lanes for o in outcomes[1:])


def test_an_exclusive_tier_is_written_again_at_every_eviction():
    class Exclusive(Plain):
        inclusive = False

    (kept, _), (apart, cache) = replay(Plain()), replay(Exclusive())
    assert total(apart, "fetched")[1] == total(kept, "fetched")[1] > 0
    assert total(apart, "spilled")[1] > total(kept, "spilled")[1]
    on_both = (cache.table.copies & 1).astype(bool) & (cache.table.copies > 1)
    assert not on_both.any()


def test_rebuilt_pages_are_not_fetched():
    class Recompute(Plain):
        def rebuild(self, view, needed):
            assert not needed.flags.writeable
            return needed & (view.key % 2 == 0)

    (kept, _), (half, _) = replay(Plain()), replay(Recompute())
    rebuilt, fetched = sum(o.rebuilt.sum() for o in half), total(half, "fetched")[1]
    assert rebuilt > 0 and fetched > 0
    assert rebuilt + fetched == total(kept, "fetched")[1]
    assert [o.found.sum() for o in half] == [o.found.sum() for o in kept]


def test_rates_tell_whether_to_fetch_or_to_rebuild():
    class Cheaper(Plain):
        def rebuild(self, view, needed):
            return needed & (view.rates["recompute"] * 4096 > view.rates["host"])

    trace = dense_trace([random_source(5)], Geometry(2, 2, 2, 16, **SIZES))
    for speed, expected in ((1e3, False), (1e9, True)):
        settings = {"offload": Cheaper(), "demand": THETA, "rates": {"host": 50e9, "recompute": speed}}
        cache = Cache((2, 2), 44, registry.build("lru"), Capacity(BUDGET), **settings)
        outcomes = [cache.access(a) for a in trace.requests()[0].accesses()]
        assert bool(sum(o.rebuilt.sum() for o in outcomes)) == expected


@pytest.mark.parametrize("hook", ["prefetch", "backup", "rebuild"])
def test_a_mask_of_a_wrong_shape_is_named(hook):
    broken = type("Broken", (Plain,), {hook: lambda self, view, *needed: np.ones(3)})()
    with pytest.raises(PolicyError, match=hook):
        replay(broken)


def test_what_goes_to_the_ssd_crosses_the_host_link():
    class Deep(Plain):
        def place(self, view, victims):
            return np.int8(2)

    outcomes, _ = replay(Deep(), capacity=Capacity(BUDGET, None, None))
    spilled = total(outcomes, "spilled")
    assert spilled[1] == spilled[2] > 0


def test_a_page_on_host_and_ssd_comes_from_the_host():
    cache, accesses = fresh(Plain(), demand=Use("all"))
    cache.access(next(accesses))
    copies = cache.table.copies
    copies[copies == HOST] = HOST | SSD
    out = cache.access(next(accesses))
    assert out.fetched.sum(1).tolist() == [0, 4 * (24 - BUDGET), 0]  # of four lanes, all that the prompt had too much


def test_a_prefetched_page_that_left_unread_is_waited_for_no_more():
    """FIFO over two pages: "a" comes back unasked at step 3, leaves at step 5 and is read, so fetched, at step 6."""

    class Once(Plain):
        def prefetch(self, view):
            return (view.key == 0) & (view.now == 3)

    cache = Cache((1, 1), 5, registry.build("fifo"), Capacity(2), offload=Once(), demand=Use("topk", 1))
    outcomes = [cache.access(a) for a in references("abccdea")]
    assert [int(o.prefetched.sum()) for o in outcomes] == [0, 0, 0, 1, 0, 0, 0]
    assert outcomes[6].fetched.sum() == 1 and not outcomes[6].awaits.any()


def test_write_through_waits_until_a_page_is_whole():
    class Through(Plain):
        def backup(self, view):
            return True

    trace = tiny_trace(layers=1, heads=1, prompt=3, steps=3).paged(2)
    cache = Cache((1, 1), 3, registry.build("lru"), Capacity(3), offload=Through(), demand=Use("all"), page_size=2)
    written = [int(cache.access(a).spilled[1].sum()) for a in trace.requests()[0].accesses()]
    assert written == [1, 1, 0, 1]  # of 3, 4, 5 and 6 tokens
