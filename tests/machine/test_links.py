"""Servers: a timeline by hand, priorities, slowdowns, and a brute-force twin that cuts everything into pieces."""

from __future__ import annotations

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.machine.hardware import Link, Ssd
from kvsim.machine.links import DEMAND, PIECE, PREFETCH, WRITE_BACK, Clock, Engine, Line, Server, SsdEngine, ssd_rate

LINK = Link(bandwidth=1e9, pageable_bandwidth=1e8, latency=1e-3, per_copy=1e-4, submit=0, duplex=1)


def run(clock: Clock, arrivals):
    """Call each of `arrivals` [(time, call)] at its time, to the end."""
    for at, call in arrivals:
        clock.after(at, lambda _, call=call: call())
    clock.env.run()


def clock() -> Clock:
    return Clock(simpy.Environment())


def test_three_requests_on_one_link_by_hand():
    """latency 1 ms, 0.1 ms per copy, 1 GB/s, FIFO among equals."""
    c = clock()
    link, ends = Engine(c, "h2d", LINK), {}

    def ask(name, nbytes, copies):
        return lambda: link.move(nbytes, copies, DEMAND, lambda: ends.update({name: c.now}))

    run(c, [(0.0, ask("a", 10e6, 10)), (5e-3, ask("b", 1e6, 1)), (30e-3, ask("c", 2e6, 5))])
    assert ends == pytest.approx({"a": 12e-3, "b": 12e-3 + 2.1e-3, "c": 30e-3 + 3.5e-3})
    assert (link.bytes, link.transfers, link.copies) == (13e6, 3, 16)
    assert link.busy_s == pytest.approx(12e-3 + 2.1e-3 + 3.5e-3) == pytest.approx(3 * 1e-3 + 16 * 1e-4 + 13e6 / 1e9)
    assert link.waited_s == pytest.approx(7e-3)
    assert link.utilisation(0.1) == pytest.approx(0.176)


def test_a_demand_overtakes_a_write_back_at_the_next_piece():
    c = clock()
    link, ends = Engine(c, "d2h", LINK), {}
    total, piece = 100e6, PIECE / 1e9
    begin = 1e-3 + 1e-4

    def ask(name, nbytes, priority):
        return lambda: link.move(nbytes, 1, priority, lambda: ends.update({name: c.now}))

    asked = begin + 3.5 * piece
    run(
        c,
        [
            (0.0, ask("back", total, WRITE_BACK)),
            (asked, ask("urgent", 1e6, DEMAND)),
            (asked, ask("soon", 1e6, PREFETCH)),
        ],
    )
    cut = begin + 4 * piece
    assert ends["urgent"] == pytest.approx(cut + 2.1e-3)
    assert ends["soon"] == pytest.approx(cut + 2 * 2.1e-3)
    assert ends["back"] == pytest.approx(begin + total / 1e9 + 2 * 2.1e-3)
    assert link.busy_s == pytest.approx(ends["back"])


def pieces(jobs, piece):
    """End of each (arrival, seconds, priority), serving one piece at a time of the most urgent, then the earliest."""
    left, ends, now = [s for _, s, _ in jobs], {}, 0.0
    while len(ends) < len(jobs):
        ready = [i for i, (at, _, _) in enumerate(jobs) if at <= now and i not in ends]
        if not ready:
            now = min(at for i, (at, _, _) in enumerate(jobs) if i not in ends)
            continue
        i = min(ready, key=lambda i: (jobs[i][2], jobs[i][0], i))
        now += min(piece, left[i])
        left[i] -= min(piece, left[i])
        if left[i] <= 1e-12:
            ends[i] = now
    return [ends[i] for i in range(len(jobs))]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=8))
@settings(max_examples=150, deadline=None)
def test_equals_serving_piece_by_piece(jobs):
    """Arrivals lie off the ends of pieces, so that no tie decides."""
    jobs = sorted((at + 0.37 + 0.01 * i, seconds / 4, urgency) for i, (at, seconds, urgency) in enumerate(jobs))
    c = clock()
    server, ends = Server(c, "any"), {}

    def ask(i, seconds, urgency):
        return lambda: server.put(seconds, urgency, lambda: ends.update({i: c.now}), piece=1.5)

    run(c, [(at, ask(i, seconds, urgency)) for i, (at, seconds, urgency) in enumerate(jobs)])
    assert [ends[i] for i in range(len(jobs))] == pytest.approx(pieces(jobs, 1.5))
    assert server.busy_s == pytest.approx(sum(s for _, s, _ in jobs))


def test_both_directions_slow_each_other_while_both_run():
    c = clock()
    up, down, ends = Server(c, "up"), Server(c, "down"), {}
    up.slows((down,), 0.5)
    down.slows((up,), 0.8)

    def ask(server, seconds):
        return lambda: server.put(seconds, then=lambda: ends.update({server.name: c.now}))

    run(c, [(0, ask(up, 10)), (2, ask(down, 4))])
    assert ends == pytest.approx({"down": 2 + 4 / 0.8, "up": 7 + (10 - 2 - 2.5)})


def test_compute_slows_only_while_a_copy_runs():
    c = clock()
    stream, link, ends = Server(c, "stream"), Server(c, "link"), []
    stream.slows((link,), 0.5)
    run(c, [(0, lambda: stream.put(10, then=lambda: ends.append(c.now))), (3, lambda: link.put(4))])
    assert ends == pytest.approx([3 + 4 + 5])


@pytest.mark.parametrize(
    ("block", "depth", "expected"),
    [
        (1e6, 64, 5e9),  # bandwidth
        (4096, 64, 4096 * 500e3),  # requests per second
        (4096, 1, 4096 / (1e-4 + 4096 / 5e9)),  # latency, one at a time
        (128e3, 4, 4 * 128e3 / (1e-4 + 128e3 / 5e9)),  # latency, four in flight
    ],
)
def test_ssd_rate(block, depth, expected):
    assert ssd_rate(block, depth, 5e9, 500e3, 1e-4) == pytest.approx(expected)


def test_ssd_seconds():
    ssd = Ssd(1e12, 5e9, 2e9, 500_000, 100_000, 1e-4, 2e-5, 32, 1.0)
    read, write = SsdEngine(clock(), "read", ssd), SsdEngine(clock(), "write", ssd, write=True)
    assert read.seconds(1e9, 1000) == pytest.approx(1e-4 + 0.2)  # bandwidth, after the first latency
    assert read.seconds(4096, 1) == pytest.approx(1e-4 + 4096 / 5e9)
    assert read.seconds(4096e5, 1e5) == pytest.approx(1e5 / 320e3, rel=0.01)  # 32 in flight per 0.1 ms
    assert write.seconds(4096e5, 1e5) == pytest.approx(1.0)  # requests per second


def test_the_submit_thread_is_first_come():
    c = clock()
    line = Line(c)
    assert [line.reserve(2.0), line.reserve(1.0)] == [2.0, 3.0]
    run(c, [(10.0, lambda: None)])
    assert line.reserve(1.0) == 11.0
    assert line.busy_s == 4.0


def test_one_event_per_transfer():
    c = clock()
    link = Engine(c, "h2d", LINK)
    run(c, [(0, lambda: [link.move(1e9, 500, DEMAND) for _ in range(10)])])
    assert c.events == 1 + 10
