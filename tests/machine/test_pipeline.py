"""One iteration: closed forms, a plain SimPy twin, laws, and what it costs."""

from __future__ import annotations

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.errors import ConfigError
from kvsim.machine import SHAPES, Hardware, Machine, Work, closed
from kvsim.machine.fit import LINEAR
from tests.machine.helpers import hardware, seconds, shape, step, steps

LAYERS = 8
times = st.floats(0, 5e-3).map(lambda x: round(x, 6))
few = st.lists(times, min_size=4, max_size=4).map(np.array)


def work(compute, fetch=0.0, layers=LAYERS, **more) -> Work:
    return Work.idle(layers, kv_read=seconds(compute), fetch_host=seconds(fetch), **more)


def balanced(record) -> bool:
    parts = record.compute_s + record.stall_s + record.submit_s + record.queued_s
    return record.end_s - record.start_s == pytest.approx(parts, rel=1e-9, abs=1e-15)


# --- closed forms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fetch", [0.2e-3, 1e-3, 3e-3])
@pytest.mark.parametrize("depth", [2, 3, 8])
def test_prefetch_known_at_start(fetch, depth):
    record = step(hardware(gpu__staging_layers=depth), work(1e-3, fetch, known="start"))
    assert record.end_s == pytest.approx(closed.prefetched_step(LAYERS, 1e-3, fetch), rel=1e-12)


@pytest.mark.parametrize("fetch", [0.2e-3, 1e-3, 3e-3])
def test_on_demand(fetch):
    record = step(hardware(), work(1e-3, fetch))
    assert record.end_s == pytest.approx(closed.on_demand_step(LAYERS, 1e-3, fetch), rel=1e-12)
    assert record.stall_s == pytest.approx(LAYERS * fetch)


def test_one_staging_buffer_is_serial():
    record = step(hardware(gpu__staging_layers=1), work(1e-3, 2e-3, known="start"))
    assert record.end_s == pytest.approx(LAYERS * 3e-3)


def test_submit_bound():
    record = step(hardware(cpu__layer_submit=600e-6), work(190e-6))
    assert record.end_s == pytest.approx(closed.submit_bound_step(LAYERS, 190e-6, 600e-6), rel=1e-12)
    assert record.submit_s == pytest.approx(LAYERS * 600e-6 - (LAYERS - 1) * 190e-6)


def test_knee_is_where_the_step_leaves_the_resident_level():
    kv, compute, latency = 4e6, 1e-3, 10e-6
    hw = hardware(link__h2d__latency=latency)
    at = closed.knee(compute, latency, 1e9, kv)
    resident = step(hw, work(compute)).end_s

    def over(resident_fraction):
        fetched = Work.idle(64, kv_read=seconds(compute), fetch_host=(1 - resident_fraction) * kv, known="start")
        return step(hw, fetched).end_s / (64 * compute)

    assert resident == pytest.approx(LAYERS * compute)
    assert over(at) == pytest.approx(1.0, abs=0.02)
    assert over(at + 0.05) == pytest.approx(1.0, abs=0.02)
    assert over(at - 0.05) > 1.1


@pytest.mark.parametrize("buffered", [0, 2, 5, 8])
@pytest.mark.parametrize("load", [0.5e-3, 1.5e-3, 4e-3])
def test_stall_of_a_layer_wise_preload(load, buffered):
    fetch = np.where(np.arange(LAYERS) < buffered, 0.0, load)
    record = step(hardware(gpu__staging_layers=LAYERS), work(1e-3, fetch, known="start"))
    expected = closed.preload_stall(LAYERS, load, 1e-3, buffered) if buffered < LAYERS else 0.0
    assert record.stall_s == pytest.approx(expected, abs=1e-12)


def test_step_and_none():
    compute, fetch = 1e-3, 1.5e-3
    assert step(hardware(), work(compute, fetch), "step").end_s == pytest.approx(LAYERS * max(compute, fetch))
    assert step(hardware(), work(compute, fetch), "none").end_s == pytest.approx(LAYERS * (compute + fetch))


@given(few, few, st.floats(0, 2e-3))
@settings(max_examples=30, deadline=None)
def test_lumped_steps_keep_the_submit_recurrence(compute, fetch, submit):
    hw = hardware(cpu__layer_submit=submit)
    resident = step(hw, work(compute, layers=4))
    for overlap in ("step", "none"):
        lumped = step(hw, work(compute, layers=4), overlap)
        assert np.allclose(lumped.layer_end_s, resident.layer_end_s, rtol=1e-9, atol=1e-15)
        both = step(hw, work(compute, fetch, 4), overlap)
        assert both.end_s >= max(lumped.end_s, fetch.sum()) * (1 - 1e-9)
        assert balanced(both)
    assert both.end_s <= (lumped.end_s + fetch.sum()) * (1 + 1e-9)


def test_unknown_overlap():
    with pytest.raises(ConfigError, match="overlap"):
        Machine(simpy.Environment(), hardware(), shape(2), "sometimes")


# --- the registered predictions, from the constants they were made with -----------------------------------

LEADS = {
    "gpu.weight_bandwidth": "2.6TB/s", "gpu.kv_bandwidth": "2.2TB/s", "gpu.attention_fixed": "20us",
    "gpu.kernel_time": 0, "gpu.attention_per_sequence": 0, "gpu.step_sync": 0, "gpu.copy_slowdown": 0,
    "link.h2d.bandwidth": "50GB/s", "link.h2d.latency": "10us", "link.h2d.per_copy": 0, "link.h2d.submit": 0,
    "cpu.layer_submit": 0, "gpu.staging_layers": 2, **{f"gpu.{loss}": 0 for loss in LINEAR},
}  # fmt: skip
H200 = {"gpu.weight_bandwidth": "3.7TB/s", "gpu.kv_bandwidth": "3.1TB/s"}
REGISTERED = [
    ("llama-3.2-1b", 8192, {}, 74, (1.4, 1.8, 3.1, 4.5, 5.8), 0.81, 7.0),
    ("llama-3.1-8b", 8192, {}, 203, (6.9, 7.1, 11.7, 17.0, 22.4), 0.71, 29.4),
    ("llama-3.1-8b", 32768, {}, 249, (8.4, 22.4, 43.9, 65.4, 86.9), 0.91, 98.2),
    ("qwen2.5-7b", 8192, {}, 207, (6.2, 6.3, 6.4, 8.0, 10.3), 0.41, 16.0),
    ("qwen2.5-7b", 32768, {}, 230, (6.9, 10.3, 19.7, 29.1, 38.5), 0.84, 46.1),
    ("llama-3.1-8b", 8192, H200, 149, (5.0, 6.1, 11.5, 16.9, 22.2), 0.79, 27.2),
]


@pytest.mark.parametrize(("name", "context", "gpu", "compute", "table", "knee", "offloaded"), REGISTERED)
def test_registered_predictions(name, context, gpu, compute, table, knee, offloaded):
    hw, model = Hardware.load("h100-pcie5").with_overrides({**LEADS, **gpu}), SHAPES[name]
    kv = model.kv_token_bytes * context
    for resident, expected in zip((1, 0.75, 0.5, 0.25, 0), table, strict=True):
        env = simpy.Environment()
        machine = Machine(env, hw, model)
        asked = Work.idle(model.layers, kv_read=kv, fetch_host=(1 - resident) * kv, known="start")
        record = env.run(env.process(machine.iterate(asked)))
        assert record.end_s * 1e3 == pytest.approx(expected, abs=0.055)
    layer = machine.compute_seconds(asked)[0]
    assert layer * 1e6 == pytest.approx(compute, abs=0.6)
    assert closed.knee(layer, 10e-6, 50e9, kv) == pytest.approx(knee, abs=0.006)
    head = record.end_s - record.layer_end_s[-1]
    whole = closed.offloaded_cache_step(model.layers, layer, 10e-6 + kv / 50e9, kv / 50e9, 2 * kv / hw.gpu.kv_bandwidth)
    assert (whole + head) * 1e3 == pytest.approx(offloaded, abs=0.2)


# --- a twin made of plain SimPy processes and resources ---------------------------------------------------


def twin(compute, fetch, known, depth, submit, copy_submit):
    """End of every layer: one process per layer and fetch, one resource per thing."""
    env, layers = simpy.Environment(), len(compute)
    cpu, link = simpy.Resource(env, 1), simpy.Resource(env, 1)
    listed, arrived, launched, done = ([env.event() for _ in range(layers)] for _ in range(4))

    def hold(resource, seconds):
        with resource.request() as request:
            yield request
            yield env.timeout(seconds)

    def thread():
        ahead, given = (depth if known == "start" else 1), 0
        for layer in range(layers):
            while given < min(layers, layer + ahead):
                if fetch[given] and known == "layer" and given:
                    yield done[given - 1]
                if fetch[given]:
                    yield from hold(cpu, copy_submit)
                listed[given].succeed()
                given += 1
            yield from hold(cpu, submit)
            launched[layer].succeed()

    def copies():
        for layer in range(layers):
            yield listed[layer]
            if layer >= depth:
                yield done[layer - depth]
            if fetch[layer]:
                yield from hold(link, fetch[layer])
            arrived[layer].succeed()

    def stream():
        for layer in range(layers):
            yield launched[layer] & arrived[layer]
            yield env.timeout(compute[layer])
            done[layer].succeed()
            ends.append(env.now)

    ends: list[float] = []
    for process in (thread, copies, stream):
        env.process(process())
    env.run()
    return ends


@given(few, few, st.sampled_from(["start", "layer"]), st.integers(1, 4), times, times)
@settings(max_examples=80, deadline=None)
def test_equals_plain_simpy(compute, fetch, known, depth, submit, copy_submit):
    hw = hardware(gpu__staging_layers=depth, cpu__layer_submit=submit, link__h2d__submit=copy_submit)
    record = step(hw, work(compute, fetch, 4, known=known))
    assert np.allclose(
        record.layer_end_s, twin(compute, fetch, known, depth, submit, copy_submit), rtol=1e-9, atol=1e-15
    )
    assert balanced(record)


# --- laws -------------------------------------------------------------------------------------------------


def busy_work(compute, host, ssd, out, known):
    moved = {
        "fetch_host": seconds(host),
        "fetch_ssd": seconds(ssd),
        "spill_host": seconds(out),
        "spill_ssd": seconds(out),
    }
    return Work.idle(4, kv_read=seconds(compute), known=known, fetch_ssd_copies=4, **moved)


@given(few, few, few, few, st.sampled_from(["start", "layer"]), st.sampled_from(["layer", "step", "none"]))
@settings(max_examples=60, deadline=None)
def test_twice_the_bandwidth_is_never_slower(compute, host, ssd, out, known, overlap):
    slow = hardware(link__h2d__latency=1e-5, cpu__layer_submit=1e-4)
    fast = slow.with_overrides({f"link.{way}.bandwidth": 2e9 for way in ("h2d", "d2h")})
    works = [busy_work(compute, host, ssd, out, known)] * 2
    ends = [steps(hw, works, overlap)[0][-1].end_s for hw in (slow, fast)]
    assert ends[1] <= ends[0] * (1 + 1e-9)


@given(few, few, few, st.sampled_from(["start", "layer"]))
@settings(max_examples=40, deadline=None)
def test_conservation_with_every_slowdown(compute, host, out, known):
    """Busy time, bytes and the parts of a step add up whatever slows down whom."""
    hw = hardware(gpu__copy_slowdown=0.1, link__h2d__duplex=0.8, link__d2h__duplex=0.7)
    records, machine = steps(hw, [busy_work(compute, host, 0 * host, out, known)] * 2)
    assert all(balanced(r) for r in records)
    for name, moved in (("link.h2d", host), ("link.d2h", out)):
        link = machine.links[name]
        assert link.bytes == pytest.approx(2 * seconds(moved).sum())
        assert link.busy_s >= 2 * moved.sum() * (1 - 1e-9)
        assert link.busy_s <= 2 * moved.sum() / 0.7 * (1 + 1e-9)
        assert 0 <= link.utilisation(machine.env.now or 1.0) <= 1 + 1e-9
    undisturbed = 2 * compute.sum()
    assert undisturbed * (1 - 1e-9) <= sum(r.compute_s for r in records) <= undisturbed * 1.1 * (1 + 1e-9)


@given(st.lists(st.tuples(few, st.sampled_from([0.0, 0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_alone_takes_fewer_events_and_the_same_time(drawn):
    """Steps that move nothing are lumped when nobody else can come between; every layer ends when it did."""
    hw = hardware(cpu__layer_submit=1e-3, gpu__copy_slowdown=0.1, gpu__step_sync=2e-3)
    works = [
        busy_work(compute, compute[::-1] * fetch, 0 * compute, compute * out, "layer") for compute, fetch, out in drawn
    ]
    (one, busy), (other, lean) = (steps(hw, works, alone=alone) for alone in (False, True))
    for a, b in zip(one, other, strict=True):
        assert np.allclose(a.layer_end_s, b.layer_end_s, rtol=1e-9) and a.end_s == pytest.approx(b.end_s)
        assert a.compute_s == pytest.approx(b.compute_s) and a.submit_s == pytest.approx(b.submit_s, abs=1e-12)
    assert lean.events <= busy.events


def test_infinite_bandwidth_is_compute_only():
    ways = {f"link__{way}__bandwidth": "inf B/s" for way in ("h2d", "d2h")}
    drive = {"ssd__read_bandwidth": "inf B/s", "ssd__write_bandwidth": "inf B/s"}
    drive |= {"ssd__read_latency": 0, "ssd__write_latency": 0, "ssd__read_iops": 10**18, "ssd__write_iops": 10**18}
    compute = np.linspace(1e-3, 2e-3, 4)
    for known in ("start", "layer"):
        moving = busy_work(compute, compute, compute, compute, known)
        assert step(hardware(**ways, **drive), moving).end_s == pytest.approx(compute.sum(), rel=1e-9)


def test_nothing_to_move_issues_no_transfer():
    _, machine = steps(hardware(), [work(1e-3)] * 3)
    assert [(s.transfers, s.bytes, s.busy_s) for s in machine.links.values()] == [(0, 0, 0)] * 4


def test_policy_and_kv_multiplier_cost_compute():
    env = simpy.Environment()
    machine = Machine(env, hardware(), shape(4), kv_multiplier=3.0)
    record = env.run(env.process(machine.iterate(work(1e-3, layers=4, policy_s=4e-4))))
    assert record.end_s == pytest.approx(4 * 3e-3 + 4e-4)


# --- write-backs, SSD, kinds of host memory ---------------------------------------------------------------


def test_write_backs_are_not_waited_for():
    moving = work(1e-3, spill_host=seconds(50e-3))
    records, machine = steps(hardware(), [moving])
    assert records[0].end_s == pytest.approx(LAYERS * 1e-3)
    assert machine.links["link.d2h"].busy_s == pytest.approx(LAYERS * 50e-3)


def test_ssd_reads_and_copies_are_pipelined():
    """t_first + m / min(rate, beta), whichever is slower."""
    drive = {"ssd__read_bandwidth": 2e9, "ssd__read_latency": 1e-4, "ssd__queue_depth": 64}
    reading = Work.idle(1, fetch_ssd=100e6, fetch_ssd_copies=100)
    first = 1e-4 + 1e6 / 2e9
    assert step(hardware(**drive), reading).end_s == pytest.approx(first + 0.1, rel=1e-3)  # link 1 GB/s
    fast = hardware(**drive, link__h2d__bandwidth=10e9)
    assert step(fast, reading).end_s == pytest.approx(1e-4 + 0.05 + 1e6 / 10e9, rel=1e-3)


def test_the_cost_of_a_copy_is_hidden_behind_the_reads():
    """Only the last block's copy shows, and with slow copies only the first block's read."""
    drive = {"ssd__read_bandwidth": 2e9, "ssd__read_latency": 1e-4, "ssd__queue_depth": 64}
    reading = Work.idle(1, fetch_ssd=100e6, fetch_ssd_copies=100)
    quick = hardware(**drive, link__h2d__bandwidth=10e9, link__h2d__per_copy=1e-4)  # a block: read 500, copied 200 us
    assert step(quick, reading).end_s == pytest.approx(1e-4 + 0.05 + 200e-6, rel=1e-9)
    slow = hardware(**drive, link__h2d__bandwidth=10e9, link__h2d__per_copy=9e-4)  # a block: copied in 1 ms
    assert step(slow, reading).end_s == pytest.approx(1e-4 + 500e-6 + 0.1, rel=1e-9)


def test_prefetches_from_the_ssd_are_copied_on_block_by_block():
    """As what is fetched is: the next iteration finds them there after t_first + m / min(rate, beta)."""
    drive = {"ssd__read_bandwidth": 2e9, "ssd__read_latency": 1e-4, "ssd__queue_depth": 64}
    ahead = Work.idle(1, prefetch_ssd=100e6, prefetch_ssd_copies=100)
    wanted = Work.idle(1)
    wanted.awaits[:] = True
    records, _ = steps(hardware(**drive), [ahead, wanted])
    assert records[1].end_s == pytest.approx(1e-4 + 500e-6 + 0.1, rel=1e-9)


def test_pageable_copies_hold_the_submit_thread():
    pageable = {"host__copies": "pageable", "link__h2d__pageable_bandwidth": 1e9}
    record = step(hardware(**pageable, cpu__layer_submit=1e-3), work(1e-3, 4e-3, known="start"))
    assert record.end_s >= LAYERS * (4e-3 + 1e-3)  # the thread copies, then launches
    pinned = step(hardware(cpu__layer_submit=1e-3), work(1e-3, 4e-3, known="start"))
    assert pinned.end_s == pytest.approx(closed.prefetched_step(LAYERS, 1e-3, 4e-3))


def test_staged_pages_are_gathered_then_copied_once():
    staged = {
        "host__copies": "staged",
        "host__copy_threads": 4,
        "host__thread_bandwidth": 1e9,
        "host__bandwidth": "100GB/s",
    }
    many = work(0, 4e-3, layers=1, fetch_host_copies=1000)
    slow = hardware(link__h2d__per_copy=1e-5, link__h2d__submit=1e-5)
    assert step(slow, many).end_s == pytest.approx(4e-3 + 2000e-5)
    gathered = step(hardware(**staged, link__h2d__per_copy=1e-5, link__h2d__submit=1e-5), many)
    assert gathered.end_s == pytest.approx(1e-3 + 4e-3 + 2e-5)


# --- several users, and the price -------------------------------------------------------------------------


def test_two_users_share_stream_and_link():
    env = simpy.Environment()
    machine = Machine(env, hardware(), shape(LAYERS))
    records = []

    def user(asked):
        records.append((yield from machine.iterate(asked)))

    for _ in range(2):
        env.process(user(work(1e-3, 3e-3, known="start")))
    env.run()
    link = machine.links["link.h2d"]
    assert link.busy_s == pytest.approx(2 * LAYERS * 3e-3)
    assert link.waited_s > 0
    assert max(r.end_s for r in records) == pytest.approx(closed.prefetched_step(2 * LAYERS, 1e-3, 3e-3), rel=0.05)
    assert all(balanced(r) for r in records)
    assert sum(r.compute_s for r in records) == pytest.approx(2 * LAYERS * 1e-3)


def test_a_demand_overtakes_another_users_prefetch():
    def second_user_ends(known_of_first):
        env = simpy.Environment()
        machine = Machine(env, hardware(gpu__staging_layers=LAYERS), shape(LAYERS))
        env.process(machine.iterate(work(1e-3, 20e-3, known=known_of_first)))

        def late():
            yield env.timeout(1e-3)
            return (yield from machine.iterate(work(0, np.where(np.arange(LAYERS) == 0, 4e-3, 0.0))))

        return env.run(env.process(late())).end_s

    assert second_user_ends("start") == pytest.approx(2 * 2**20 / 1e9 + 4e-3)  # after the piece under way
    assert second_user_ends("layer") == pytest.approx(20e-3 + 4e-3)  # equals in order


class Counting(simpy.Environment):
    scheduled = 0

    def schedule(self, *args, **kwargs):
        self.scheduled += 1
        super().schedule(*args, **kwargs)


def test_events_are_few_and_pinned():
    hw, model = Hardware.load("h100-pcie5"), SHAPES["llama-3.1-8b"]
    moved = {"kv_read": 33.5e6, "fetch_host": 8e6, "fetch_host_copies": 8, "spill_host": 64e3}
    for more, pinned in (({}, 227), ({"fetch_ssd": 1e6, "fetch_ssd_copies": 16, "spill_ssd": 64e3}, 355)):
        env = Counting()
        machine = Machine(env, hw, model)
        env.process(machine.iterate(Work.idle(model.layers, **moved, **more)))
        env.run()
        assert machine.events == env.scheduled - 2  # but the process's own start and end
        assert machine.events == pinned <= 12 * model.layers


# --- prefetch and rebuild ---------------------------------------------------------------------------------


def test_a_late_prefetch_is_waited_for_by_its_layer():
    """Two layers of 1 s; 3 s of prefetch after each. On the link: 1 to 4 and 4 to 7. The next step's layers: 4, 7."""
    first, second = work(1.0, layers=2, prefetch_host=seconds(3.0)), work(1.0, layers=2)
    (a, b), machine = steps(hardware(), [first, second])
    assert a.end_s == pytest.approx(2) and a.stall_s == 0  # nobody waits in the step that sends for them
    assert b.layer_end_s == pytest.approx([5, 8]) and b.stall_s == pytest.approx(4)
    assert machine.links["link.h2d"].bytes == pytest.approx(2 * seconds(3.0)) and not machine.in_flight


def test_a_layer_that_reads_none_of_a_late_prefetch_goes_on():
    """As above, but the second step reads only what layer 1 was sent: layer 0 computes at once, layer 1 at 7."""
    first = work(1.0, layers=2, prefetch_host=seconds(3.0))
    second, third = work(1.0, layers=2, awaits=np.array([False, True])), work(1.0, layers=2, awaits=False)
    (a, b, c), machine = steps(hardware(), [first, second, third])
    assert a.end_s == pytest.approx(2)
    assert b.layer_end_s == pytest.approx([3, 8]) and b.stall_s == pytest.approx(4)
    assert c.end_s == pytest.approx(10) and c.stall_s == 0 and not machine.in_flight


def test_a_prefetch_in_time_costs_nothing():
    first, second = work(1.0, layers=4, prefetch_host=seconds(0.5)), work(1.0, layers=4)
    (a, b), _ = steps(hardware(), [first, second])
    assert (a.end_s, b.end_s) == (pytest.approx(4), pytest.approx(8)) and b.stall_s == 0


@pytest.mark.parametrize("overlap", ["step", "none"])
def test_lumped_steps_wait_for_the_step_before(overlap):
    first, second = work(1.0, layers=2, prefetch_host=seconds(3.0)), work(1.0, layers=2)
    (a, b), _ = steps(hardware(), [first, second], overlap)
    assert a.end_s == pytest.approx(2)
    assert b.end_s == pytest.approx({"step": 8, "none": 10}[overlap])


def test_a_demand_overtakes_a_prefetch():
    first = work(1.0, layers=1, prefetch_host=seconds(40.0))
    second = work(1.0, fetch=1.0, layers=1)
    (_, b), machine = steps(hardware(), [first, second])
    assert b.end_s == pytest.approx(1 + 40 + 1 + 1)  # the prefetch is its layer's too
    assert machine.links["link.h2d"].transfers == 2


def test_rebuilt_tokens_cost_the_layers_gemms():
    hw = Hardware.load("h100-pcie5").with_overrides({f"gpu.{loss}": 0 for loss in LINEAR})
    machine = Machine(simpy.Environment(), hw, SHAPES["llama-3.1-8b"])
    plain, more = Work.idle(32), Work.idle(32, rebuild=4096.0)
    flop = 2 * 4097 * sum(SHAPES["llama-3.1-8b"].gemms)
    extra = machine.compute_seconds(more) - machine.compute_seconds(plain)
    assert extra == pytest.approx(
        flop / hw.gpu.gemm_flops - machine.shape.layer_bytes / hw.gpu.weight_bandwidth, rel=1e-6
    )
