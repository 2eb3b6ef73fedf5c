"""What a measured row should have taken, by hand: machines of round constants."""

import numpy as np
import pytest

from kvsim.errors import ConfigError
from kvsim.machine import Hardware
from kvsim.machine.closed import offloaded_cache_step, on_demand_step, prefetched_step
from kvsim.validate.cases import case_of, cases
from kvsim.validate.predict import Peaks, as_performed, calibrated_max, peaks, predict, roofline, simulate, work_of
from tests.machine.helpers import hardware

LAYERS = 4
SHAPE = {
    "layers": LAYERS, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate": 128, "vocab": 100,
    "value_bytes": 2,
}  # fmt: skip
TOKEN = 2 * 2 * 16 * 2  # bytes of keys and values in one layer
CONTEXT = 16_000
MS = 1e-3
COMPUTE = CONTEXT * TOKEN / 1e9  # seconds of a layer at 1 GB/s: 2.048 ms
PAGE = 16 * TOKEN / 1e9  # seconds of a page on a link of 1 GB/s: 2.048 us


def row(impl="executor", key="gpu/offload/x", phase="offload", device=None, **params):
    """A row of one sequence; `pages`: fetched in each layer."""
    pages = params.pop("pages", 0)
    given = {
        "impl": impl, "model": "toy", "shape": SHAPE, "sequences": 1, "context": CONTEXT, "page": 16, "tier": "host",
        "method": "runs", "known": "start", "depth": 2, "resident": 0.5, "clustered": True,
        "fetched_pages": [pages] * LAYERS, "copies": [1.0 if pages else 0.0] * LAYERS, "plan": None,
    }  # fmt: skip
    key = key if device is None else f"{device}/{key.partition('/')[2]}"
    return {"key": key, "phase": phase, "kind": "executor", "params": given | params, "ms": [1.0, 2.0, 3.0], "t": 0.0}


def case(**params):
    return case_of(row(**params))


def test_a_resident_step_is_the_sum_of_its_layers():
    found = predict(case(), hardware())
    assert found.seconds == pytest.approx(LAYERS * COMPUTE)
    assert (found.stall_s, found.submit_s) == pytest.approx((0, 0))
    assert found.layer_end_s == pytest.approx(COMPUTE * np.arange(1, LAYERS + 1))


@pytest.mark.parametrize("pages", [100, 2000])  # less and more than a layer computes
def test_fetches_known_from_the_start_hide_behind_compute(pages):
    found = predict(case(pages=pages), hardware())
    assert found.seconds == pytest.approx(prefetched_step(LAYERS, COMPUTE, pages * PAGE))
    assert found.stall_s == pytest.approx(found.seconds - LAYERS * COMPUTE)


def test_what_is_known_layer_by_layer_is_waited_for():
    found = predict(case(pages=100, known="layer", depth=1), hardware())
    assert found.seconds == pytest.approx(on_demand_step(LAYERS, COMPUTE, 100 * PAGE))


def test_the_rows_depth_replaces_the_hardwares():
    one, deep = (predict(case(pages=500, depth=d), hardware(gpu__staging_layers=7)).seconds for d in (1, 4))
    assert one == pytest.approx(on_demand_step(LAYERS, COMPUTE, 500 * PAGE))  # one buffer, free when its layer ends
    assert deep == pytest.approx(prefetched_step(LAYERS, COMPUTE, 500 * PAGE))


def test_every_copy_costs_the_engine_and_the_submit_thread():
    fixed = {"link__h2d__per_copy": 10e-6, "link__h2d__submit": 5e-6, "link__h2d__latency": 1e-4}
    found = predict(case(pages=3000, copies=[30.0] * LAYERS), hardware(**fixed))
    fetch = 3000 * PAGE + 30 * 10e-6 + 1e-4
    assert found.seconds == pytest.approx(prefetched_step(LAYERS, COMPUTE, fetch) + 30 * 5e-6)


def test_pages_of_the_ssd_are_read_before_they_are_copied():
    given = {"ssd_pages": [1000.0] * LAYERS, "tier": "ssd", "copies": [1.0] * LAYERS}
    slow = hardware(ssd__read_bandwidth=5e8, ssd__read_iops=10**9, ssd__read_latency=0)
    found = predict(case(pages=1000, **given), slow)
    first = 3 * 1000 * PAGE  # one block: read at half the link's speed, then copied
    assert found.layer_end_s[0] == pytest.approx(first + COMPUTE)


@pytest.mark.parametrize("known, depth", [("start", 1), ("start", 4), ("layer", 1)])
def test_without_write_backs_the_first_step_is_like_the_others(known, depth):
    machine, given = Hardware.load("h100-pcie5"), case(pages=700, copies=[30.0] * LAYERS, known=known, depth=depth)
    records = simulate(as_performed(given, machine), given.shape, [work_of(given)] * 3)
    later = [r.end_s - r.start_s for r in records]
    assert later == pytest.approx([predict(given, machine).seconds] * 3)


def test_write_backs_slow_the_fetches_of_later_steps():
    given = {"pages": 3000, "stored_pages": [3000.0] * LAYERS}
    free, slow = (predict(case(**given), hardware(link__h2d__duplex=d)).seconds for d in (1.0, 0.5))
    assert slow > 1.2 * free


def test_a_step_submitted_whole_has_no_gaps():
    gaps = hardware(gpu__layer_gap=1e-3, cpu__layer_submit=1e-4)
    found = predict(case(graph="step"), gaps)
    assert found.seconds == pytest.approx(LAYERS * COMPUTE + 1e-4 / LAYERS)
    assert predict(case(graph="layer"), gaps).seconds == pytest.approx(LAYERS * (COMPUTE + 1e-3) + 1e-4)


def test_a_frameworks_cache_is_rewritten_each_step_and_submitted_kernel_by_kernel():
    busy = predict(case(impl="hf-decode"), hardware(cpu__eager_submit=1e-3))
    assert busy.seconds == pytest.approx(LAYERS * 3 * COMPUTE + 1e-3)
    bound = predict(case(impl="hf-decode"), hardware(cpu__eager_submit=0.1))
    assert bound.seconds == pytest.approx(LAYERS * 0.1 + 3 * COMPUTE)


def test_on_a_cpu_submission_and_compute_are_one_thread():
    found = predict(case(impl="hf-decode", device="cpu-toy"), hardware(cpu__eager_submit=0.1))
    assert found.seconds == pytest.approx(LAYERS * (0.1 + 3 * COMPUTE))


def test_prefill_counts_its_pairs():
    machine = hardware(gpu__attention_flops=1e9, gpu__kv_bandwidth=1e18, cpu__eager_submit=0.0)
    found = predict(case(impl="hf-prefill", context=100, sequences=3), machine)
    assert found.seconds == pytest.approx(LAYERS * 4 * 4 * 16 * 3 * 100 * 50 / 1e9, rel=1e-6)


def test_the_offloaded_cache_is_its_closed_form():
    links = {"link__h2d__latency": 1e-3, "link__d2h__per_copy": 1e-3, "link__h2d__bandwidth": 2e9}
    found = predict(case(impl="hf-offloaded"), hardware(**links, cpu__eager_submit=2e-3))
    fetch, back = 1e-3 + COMPUTE / 2, 2e-3 + COMPUTE
    assert found.seconds == pytest.approx(offloaded_cache_step(LAYERS, COMPUTE, fetch, back, 2 * COMPUTE, 2e-3))
    assert found.seconds == pytest.approx(LAYERS * (4 * COMPUTE + 2e-3))
    assert found.compute_s + found.stall_s + found.submit_s == pytest.approx(found.seconds)
    bound = predict(case(impl="hf-offloaded"), hardware(cpu__eager_submit=1.0))
    assert bound.seconds == pytest.approx(LAYERS) and bound.submit_s == pytest.approx(LAYERS - LAYERS * 4 * COMPUTE)


def test_the_simpler_models_by_hand():
    c = case(pages=2000)
    machine = hardware(gpu__kernel_time=1e-6, link__h2d__bandwidth=2e9, link__h2d__per_copy=1.0)
    fetched = LAYERS * 2000 * 16 * TOKEN
    assert calibrated_max(c, machine) == pytest.approx(max(LAYERS * (COMPUTE + 4e-6) + 1e-6, fetched / 2e9))
    shape = c.shape
    assert roofline(c, Peaks(1e9, 1e18, 1e9, 1e9, "")) == pytest.approx(
        max(shape.read_bytes + LAYERS * c.kv_bytes, fetched) / 1e9
    )
    flop = 2 * (LAYERS * sum(shape.gemms) + 64 * 100) + 4 * LAYERS * 4 * 16 * CONTEXT
    assert roofline(c, Peaks(1e18, 1e9, 1e18, 1e18, "")) == pytest.approx(flop / 1e9)
    ssd = case(pages=2000, ssd_pages=[1000] * LAYERS)
    assert roofline(ssd, Peaks(1e18, 1e18, 1e18, 1e9, "")) == pytest.approx(fetched / 2 / 1e9)


def test_peaks_are_the_datasheets_or_the_best_that_was_measured():
    sheet = peaks("nvidia-h100-80gb-hbm3", [], Hardware.load("h100-pcie5"))
    assert (sheet.memory, sheet.flops, sheet.link) == (3.35e12, 989e12, 64e9) and "datasheet" in sheet.source

    def calibrated(kind, ms, **params):
        return {"key": f"cpu-x/calibrate/{kind}/{ms}", "phase": "calibrate", "kind": kind, "params": params, "ms": [ms]}

    rows = [
        calibrated("memory", 2.0, bytes=1e6), calibrated("memory", 1.0, bytes=2e6),
        calibrated("gemm", 1.0, out=10, inp=10, rows=5, value_bytes=4),
        calibrated("copy", 1.0, path="h2d-pinned", bytes=3e6), calibrated("copy", 0.1, path="d2h-pinned", bytes=3e6),
        {**calibrated("ssd", 1.0, rw="read"), "gb_per_s": 0.5},
    ]  # fmt: skip
    best = peaks("cpu-x", rows, Hardware.load("h100-pcie5"))
    assert (best.memory, best.flops, best.link, best.ssd) == pytest.approx((2e9, 1e6, 3e9, 0.5e9))
    assert "not a datasheet" in best.source


def test_samples_and_what_they_say_of_themselves():
    c = case()
    assert c.median_s == pytest.approx(2 * MS) and c.spread_s == pytest.approx((1.2 * MS, 2.8 * MS))
    assert c.noise == pytest.approx(0.8) and c.device == "gpu" and not c.in_line and not c.moves


@pytest.mark.parametrize(
    "broken",
    [
        {"shape": None}, {"shape": SHAPE | {"experts": 8}}, {"shape": SHAPE | {"layers": 0}}, {"impl": "other"},
        {"sequences": 0}, {"sequences": "1"}, {"context": None}, {"page": True}, {"method": "batch"},
        {"known": "later"}, {"fetched_pages": [1.0]}, {"copies": [-1.0] * LAYERS}, {"model": 3},
        {"copies": None}, {"fetched_pages": None},
    ],
)  # fmt: skip
def test_rows_that_do_not_say_what_was_done_are_named(broken):
    name = next(iter(broken))
    with pytest.raises(ConfigError, match=f'parameter "{name}"') as found:
        case(**broken)
    assert found.value.where == 'the row "gpu/offload/x"' and found.value.hint


def test_layer_ends_must_be_those_of_the_model():
    with pytest.raises(ConfigError, match="layer_ms of 2 layers"):
        case_of(row() | {"layer_ms": [1.0, 2.0]})


def test_only_steps_that_were_measured_are_cases():
    failed = {k: v for k, v in row(key="gpu/offload/y").items() if k != "ms"} | {"error": "out of memory"}
    other = row(key="gpu/calibrate/z", phase="calibrate")
    assert [c.key for c in cases([row(), failed, other])] == ["gpu/offload/x"]


def test_copies_are_shared_out_by_tier():
    given = case(pages=10, ssd_pages=[4.0] * LAYERS, copies=[5.0] * LAYERS)
    work = work_of(given)
    assert work.fetch_host_copies == pytest.approx(3.0) and work.fetch_ssd_copies == pytest.approx(2.0)
    assert work.fetch_host + work.fetch_ssd == pytest.approx(10 * 16 * TOKEN)
