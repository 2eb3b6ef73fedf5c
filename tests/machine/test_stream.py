"""The compiled pipeline gives what SimPy gives: every layer's end, every part of a step, every counter, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.errors import ConfigError
from kvsim.machine import SHAPES, Hardware, Record, Work, closed
from kvsim.machine.stream import Stream
from kvsim.machine.work import MOVES
from tests.machine.helpers import hardware, seconds, shape, steps

OVERLAPS = ("layer", "step", "none")
COUNTERS = ("bytes", "transfers", "copies", "busy_s", "waited_s")
PARTS = ("start_s", "end_s", "compute_s", "stall_s", "submit_s", "queued_s")


def compiled(hw: Hardware, works: list[Work], overlap: str = "layer") -> tuple[list[Record], Stream]:
    stream = Stream(hw, shape(len(works[0].kv_read)), overlap)
    return [stream.iterate(work) for work in works], stream


def assert_as_simpy(hw: Hardware, works: list[Work], overlap: str = "layer") -> None:
    records, stream = compiled(hw, works, overlap)
    expected, machine = steps(hw, works, overlap, alone=True)
    for got, want in zip(records, expected, strict=True):
        assert got.layer_end_s.tolist() == want.layer_end_s.tolist()
        assert {part: getattr(got, part) for part in PARTS} == {part: getattr(want, part) for part in PARTS}
    stream.finish()
    assert stream.now == machine.env.now and stream.events == machine.events
    for name, link in machine.links.items():
        counts = stream.links[name]
        assert {c: getattr(counts, c) for c in COUNTERS} == {c: getattr(link, c) for c in COUNTERS}
        assert counts.utilisation() == link.utilisation()


# --- random plans: few distinct times, so that events coincide; fractions, so that sums are rounded ----------

times = st.sampled_from([0.0, 0.0, 1e-3, 2e-3, 5e-3]) | st.floats(0, 20e-3)
small = st.sampled_from([0, 0, 1e-5, 1e-3, 3.3e-4])
rate = st.sampled_from(["inf B/s", 1e9, 1e9, 3e8, 7.7e9])
share = st.sampled_from([1.0, 0.9, 0.5])
CONSTANTS = {
    **{f"link.{way}.{key}": small for way in ("h2d", "d2h") for key in ("latency", "per_copy", "submit")},
    **{f"link.{way}.{key}": rate for way in ("h2d", "d2h") for key in ("bandwidth", "pageable_bandwidth")},
    **{f"link.{way}.duplex": share for way in ("h2d", "d2h")},
    **{f"ssd.{way}_bandwidth": rate for way in ("read", "write")},
    **{f"ssd.{way}_latency": small for way in ("read", "write")},
    **{f"ssd.{way}_iops": st.sampled_from([10**3, 10**6, 10**18]) for way in ("read", "write")},
    "ssd.queue_depth": st.sampled_from([1, 4, 64]),
    "ssd.mixed": share,
    "host.copies": st.sampled_from(["pinned", "pageable", "staged"]),
    "host.thread_bandwidth": rate,
    "host.copy_threads": st.sampled_from([1, 4]),
    "gpu.copy_slowdown": st.sampled_from([0, 0.02, 1.0]),
    "gpu.staging_layers": st.sampled_from([1, 2, 3, 8]),
    "gpu.layer_gap": small,
    "gpu.step_sync": small,
    "gpu.gemm_flops": st.sampled_from(["inf FLOP/s", 1e9]),
    "cpu.layer_submit": small,
}


@st.composite
def machines(draw) -> Hardware:
    changed = draw(st.lists(st.sampled_from(sorted(CONSTANTS)), unique=True))
    return hardware(**{key.replace(".", "__"): draw(CONSTANTS[key]) for key in changed})


@st.composite
def works(draw, layers: int) -> Work:
    def row(values):
        return np.array(draw(st.lists(values, min_size=layers, max_size=layers)))

    moves = draw(st.lists(st.sampled_from(MOVES), unique=True))
    moved = {name: seconds(row(times)) for name in moves}
    moved |= {name + "_copies": row(st.sampled_from([0.0, 1.0, 2.5, 40.0])) for name in moves}
    return Work.idle(
        layers,
        queries=draw(st.integers(1, 3)),
        kv_read=seconds(row(times)),
        rebuild=row(st.sampled_from([0.0, 0.0, 8.0])),
        awaits=row(st.booleans()),
        known=draw(st.sampled_from(["start", "layer"])),
        policy_s=draw(small),
        **moved,
    )


plans = st.integers(1, 9).flatmap(lambda layers: st.lists(works(layers), min_size=1, max_size=6))


@given(machines(), plans, st.sampled_from(OVERLAPS))
@settings(max_examples=400, deadline=None)
def test_equals_simpy(hw, plan, overlap):
    assert_as_simpy(hw, plan, overlap)


@given(plans, st.sampled_from(OVERLAPS))
@settings(max_examples=100, deadline=None)
def test_equals_simpy_on_a_shipped_machine(plan, overlap):
    """Copies slow the stream and each other, as in every shipped file."""
    assert_as_simpy(Hardware.load("h100-pcie5").with_overrides({"link.h2d.bandwidth": 1e9}), plan, overlap)


# --- by hand -------------------------------------------------------------------------------------------------

LAYERS = 8


def end(hw: Hardware, overlap: str = "layer", **asked) -> float:
    given_seconds = {key: seconds(asked.pop(key)) for key in ("kv_read", "fetch_host") if key in asked}
    return compiled(hw, [Work.idle(LAYERS, **given_seconds, **asked)], overlap)[0][0].end_s


@pytest.mark.parametrize("fetch", [0.2e-3, 1e-3, 3e-3])
def test_closed_forms(fetch):
    prefetched = end(hardware(), kv_read=1e-3, fetch_host=fetch, known="start")
    assert prefetched == pytest.approx(closed.prefetched_step(LAYERS, 1e-3, fetch), rel=1e-12)
    on_demand = end(hardware(), kv_read=1e-3, fetch_host=fetch)
    assert on_demand == pytest.approx(closed.on_demand_step(LAYERS, 1e-3, fetch), rel=1e-12)
    whole = end(hardware(), "step", kv_read=1e-3, fetch_host=fetch)
    assert whole == pytest.approx(LAYERS * max(1e-3, fetch), rel=1e-12)


def test_submit_bound():
    took = end(hardware(cpu__layer_submit=600e-6), kv_read=190e-6)
    assert took == pytest.approx(closed.submit_bound_step(LAYERS, 190e-6, 600e-6), rel=1e-12)


def test_a_late_prefetch_is_waited_for_by_its_layer():
    """Two layers of 1 s; 3 s of prefetch after each. On the link: 1 to 4 and 4 to 7. The next step's layers: 4, 7."""
    one = seconds(1.0)
    first, second = Work.idle(2, kv_read=one, prefetch_host=seconds(3.0)), Work.idle(2, kv_read=one)
    (a, b), stream = compiled(hardware(), [first, second])
    assert a.end_s == 2 and b.layer_end_s.tolist() == [5, 8] and b.stall_s == 4
    assert stream.links["link.h2d"].bytes == 2 * seconds(3.0)


def test_many_write_backs_queue_up():
    """Each takes 10 s and follows 1 s of compute: the last of 400 ends at 1 + 4000 s."""
    asked = Work.idle(2, kv_read=seconds(1.0), spill_host=seconds(10.0))
    records, stream = compiled(hardware(), [asked] * 200)
    assert records[-1].end_s == 400 and stream.links["link.d2h"].utilisation() == pytest.approx(399 / 400)
    stream.finish()
    assert stream.now == pytest.approx(4001) and stream.links["link.d2h"].transfers == 400


def test_long_runs_stay_equal():
    rng, model = np.random.default_rng(0), SHAPES["llama-3.1-8b"]
    assert model.layers == 32

    def some(size, share):
        return np.where(rng.random(32) < share, size * rng.random(32), 0.0)

    asked = [
        Work.idle(32, kv_read=some(8e5, 1), fetch_host=some(4e5, 0.5), fetch_host_copies=4, fetch_ssd=some(9e4, 0.1))
        for _ in range(100)
    ]
    for work in asked:
        work.spill_host, work.prefetch_host, work.prefetch_ssd = some(3e5, 0.5), some(3e6, 0.2), some(5e4, 0.1)
        work.awaits = rng.random(32) < 0.5
    assert_as_simpy(hardware(gpu__copy_slowdown=0.02, link__h2d__duplex=0.9, link__d2h__duplex=0.9), asked)


# --- refusals ------------------------------------------------------------------------------------------------


def test_unknown_overlap():
    with pytest.raises(ConfigError, match="overlap"):
        Stream(hardware(), shape(2), "sometimes")


def test_an_endless_iteration_is_an_error():
    with pytest.raises(ValueError, match="never ends"):
        end(hardware(link__h2d__latency="inf s"), fetch_host=1e-3)
