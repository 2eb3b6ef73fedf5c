"""Formats of tiers: bytes exactly, seconds by the stated model, errors against another way to compute them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvsim.cli.app import app
from kvsim.errors import ConfigError, TraceError
from kvsim.machine import closed
from kvsim.machine.hardware import Hardware
from kvsim.machine.precision import PLAIN, errors, hadamard, parse_format, positioned, recode_seconds
from kvsim.replay import Replay, prepare
from kvsim.simulate import run
from kvsim.trace.access import dense_trace
from kvsim.trace.synthetic import synthetic_trace
from tests.policies.test_readset import random_trace

MODEL = {"model": "llama-3.2-1b"}  # 16 layers of 8 KV heads of 64


@pytest.fixture(scope="module")
def trace():
    return synthetic_trace(requests=2, prompt=48, steps=32, layers=2, kv_heads=2, seed=5)


# -- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "element", "factor"),
    [
        ("kivi(bits=2, group=32)", 0.375, 5.33),
        ("kivi(bits=2, group=64)", 0.3125, 6.4),
        ("kivi(bits=2, group=128)", 0.28125, 7.11),
        ("kivi(bits=4, group=64)", 0.5625, 3.56),
        ("rotatekv(bits=4, group=64)", 0.5625, 3.56),
        ("int4", 0.5625, 3.56),
        ("int8(group=32)", 1.125, 1.78),
        ("fp16", 2.0, 1.0),
    ],
)
def test_bytes_per_element(text, element, factor):
    form = parse_format(text)
    assert form.element_bytes == element
    assert 1 / form.ratio(2.0) == pytest.approx(factor, abs=0.005)


def test_defaults_are_the_papers():
    kivi, rotate = parse_format("kivi"), parse_format("rotatekv")
    assert (kivi.bits, kivi.group, kivi.residual, kivi.kept) == (2, 32, 128, 128)
    assert (rotate.bits, rotate.sink, rotate.kept) == (2, 4, 4)
    assert [parse_format(f"rotatekv(bits={b})").levels for b in (2, 3, 4)] == [3, 8, 15]
    assert [parse_format(f"int{b}").levels for b in (2, 3, 4, 8)] == [3, 7, 15, 255]


@pytest.mark.parametrize(
    "text",
    [
        "int5", "int4(bits=2)", "fp8", "fp16(group=2)", "kivi(bits=5)", "kivi(group=0)", "kivi(group=1.5)",
        "kivi(residual=100)", "kivi(residual=0)", "rotatekv(heads=0)", "rotatekv(sink=-1)", "kivi(32)", "",
    ],
)  # fmt: skip
def test_formats_that_do_not_exist(text, trace):
    with pytest.raises(ConfigError):
        parse_format(text)
    with pytest.raises(ConfigError):
        prepare(trace, run_config(host_format=text, regime="offload"))


def run_config(**keys):
    from kvsim.config import run_config

    return run_config(MODEL | keys)


def test_groups_must_fit_the_heads(trace):
    with pytest.raises(ConfigError, match="groups of 128 channels do not fit heads of 64") as error:
        prepare(trace, run_config(gpu_format="int4(group=128)"))
    assert error.value.where == "gpu_format"


# -- errors ---------------------------------------------------------------------------------------------------------


def by_hand(x, bits, group):
    """A vector quantised group by group, in plain Python."""
    out = []
    for start in range(0, len(x), group):
        part = [float(v) for v in x[start : start + group]]
        low, step = np.float16(min(part)), np.float16((max(part) - min(part)) / (2**bits - 1))
        out += [float(low) + round((v - float(low)) / float(step)) * float(step) if step else float(low) for v in part]
    return out


def test_values_per_token_and_keys_per_channel():
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 1, 11, 4)).astype(np.float16)
    back_k, back_v = parse_format("kivi(bits=2, group=2, residual=4)").quantised(k, v)
    for channel in range(4):  # 11 tokens: two blocks of 4 are sealed, 3 wait
        np.testing.assert_allclose(back_k[0, :8, channel], by_hand(k[0, :8, channel].astype(float), 2, 2), atol=1e-6)
    np.testing.assert_array_equal(back_k[0, 8:], k[0, 8:])
    for token in range(7):  # all but the last 4
        np.testing.assert_allclose(back_v[0, token], by_hand(v[0, token].astype(float), 2, 2), atol=1e-6)
    np.testing.assert_array_equal(back_v[0, 7:], v[0, 7:])
    back_k, back_v = parse_format("int4(group=4)").quantised(k, v)
    for token in range(11):
        np.testing.assert_allclose(back_k[0, token], by_hand(k[0, token].astype(float), 4, 4), atol=1e-6)
    short = parse_format("kivi(bits=2, group=2, residual=16)").quantised(k, v)
    assert (short[0] == k).all() and (short[1] == v).all()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 4, 8]), st.sampled_from(["int", "kivi", "rotatekv"]))
def test_errors_stay_within_half_a_code(seed, bits, name):
    """Of a group's own range, and what FP16 scales lose; a rotation keeps lengths."""
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, 4, 16, 8)).astype(np.float16).astype(np.float32)
    text = f"int{bits}(group=8)" if name == "int" else f"{name}(bits={bits}, group=8"
    text += {"int": "", "kivi": ", residual=8)", "rotatekv": ", sink=2, heads=2)"}[name]
    form = parse_format(text)
    back_k, back_v = form.quantised(k, v)
    span = v.max(-1, keepdims=True) - v.min(-1, keepdims=True)
    assert (np.abs(v - back_v) <= span * (0.5 / form.levels + 2e-3) + 2e-3).all()
    norm = np.linalg.norm
    most = 2 * np.abs(k).max() * np.sqrt(k.shape[-1] * 2)  # of a rotated channel's span
    assert norm(k - back_k, axis=-1).max() <= np.sqrt(16) * most * (0.5 / form.levels + 2e-3) + 1e-2
    if name == "rotatekv":
        assert (back_k[:, :2] == k[:, :2]).all() and (back_v[:, :2] == v[:, :2]).all()


def test_a_rotation_spreads_an_outlier_channel():
    """One channel a hundred times the others: in the rotated basis two bits keep what they lose in the plain one."""
    rng = np.random.default_rng(1)
    k = rng.normal(size=(4, 64, 32)).astype(np.float32)
    k[..., 5] *= 100
    q = rng.normal(size=32).astype(np.float32)
    q[5] = 0  # what the outlier hides
    wrong = {
        text: float(np.abs((k - parse_format(text).quantised(k, k)[0]) @ q).mean())
        for text in ("int2(group=32)", "rotatekv(bits=2, group=32, sink=0)", "kivi(bits=2, group=32, residual=32)")
    }
    assert wrong["kivi(bits=2, group=32, residual=32)"] < wrong["int2(group=32)"]
    turn = hadamard(128)
    np.testing.assert_allclose(turn @ turn.T, np.eye(128), atol=1e-5)
    flat = k.swapaxes(0, 1).reshape(64, 128)
    assert np.abs(flat @ turn).max() < np.abs(flat).max() / 2


def test_rotatekv_works_before_the_position_rotation():
    rng = np.random.default_rng(2)
    k = rng.normal(size=(2, 12, 16)).astype(np.float32)
    angles = np.arange(12)[:, None] * (1 / 10 ** np.arange(6))  # 12 of 16 dimensions are rotated
    there = positioned(k, angles)
    np.testing.assert_allclose(there[0, 3, [1, 7]] @ [1, 1j], k[0, 3, [1, 7]] @ [1, 1j] * np.exp(0.3j), rtol=1e-5)
    np.testing.assert_allclose(positioned(there, -angles), k, atol=1e-5)
    form = parse_format("rotatekv(bits=4, group=16, sink=2, heads=2)")
    before = positioned(form.quantised(k, k)[0], angles)
    np.testing.assert_allclose(form.quantised(there, k, angles)[0], before, atol=1e-3)
    assert np.abs(form.quantised(there, k)[0] - before).max() > 0.05  # after it, the codes are others
    source = random_trace(heads=2, dim=8).sources[0]
    plain = errors(dense_trace([source]), parse_format("rotatekv(group=8)"))
    source.inv_freq = np.array([1.0, 0.1, 0.01, 0.001])
    assert (errors(dense_trace([source]), parse_format("rotatekv(group=8)"))["logit"] != plain["logit"]).all()


def test_no_rotation_of_other_sizes():
    with pytest.raises(ConfigError, match="no rotation of 12 channels"):
        hadamard(12)


def test_errors_of_a_trace():
    """Against a second computation; more bits, less error; full precision, none."""
    trace = random_trace(layers=2, heads=2, group=2, prompt=20, steps=12, dim=8)
    form = parse_format("int2(group=8)")
    found = errors(trace, form)
    q, k, v = (np.asarray(x, float) for x in trace.sources[0]._vectors)
    for layer, head in np.ndindex(2, 2):
        wrong, value = [], []
        for token in range(32):
            off = k[layer, head, token] - np.array(by_hand(k[layer, head, token], 2, 8))
            wrong += [float(q[layer, 2 * head + g, -1] @ off) / np.sqrt(8) for g in range(2)]
            gone = v[layer, head, token] - np.array(by_hand(v[layer, head, token], 2, 8))
            value.append(np.linalg.norm(gone) / np.linalg.norm(v[layer, head, token]))
        assert found["logit"][layer, head] == pytest.approx(np.sqrt(np.mean(np.square(wrong))), rel=1e-4)
        assert found["value"][layer, head] == pytest.approx(np.mean(value), rel=1e-4)
    finer = errors(trace, parse_format("int8(group=8)"))
    assert all((finer[name] < found[name] / 20).all() for name in found)
    assert all((x == 0).all() for x in errors(trace, PLAIN).values())


def test_errors_need_vectors(trace):
    with pytest.raises(TraceError, match="no q, k and v"):
        errors(trace, PLAIN)


# -- what a run makes of it -----------------------------------------------------------------------------------------


def test_default_is_what_was_there_before(trace):
    plain = run(trace, policy="lru", budget="30%", regime="offload", **MODEL)
    named = run(trace, policy="lru", budget="30%", regime="offload", host_format="fp16", gpu_format="fp16", **MODEL)
    for name, table in plain.tables.items():
        for column, values in table.items():
            np.testing.assert_array_equal(values, named.tables[name][column])
    assert not any("quantised" in note for note in plain.manifest["notes"])


def test_links_move_fewer_bytes_and_the_gpu_decodes(trace):
    """The same pages move; bytes by the ratio; compute gains both forms' bytes over the GPU's bandwidth."""
    keys = {"policy": "lru", "budget": "30%", "regime": "offload", "page_size": 4, "requests": [0], **MODEL}
    keys["constants"] = {"gpu.copy_slowdown": 0.0, "link.h2d.bandwidth": "1GB/s"}  # no disturbing, some waiting
    plain, low = run(trace, **keys), run(trace, host_format="int4", **keys)
    ratio = 0.5625 / 2
    a, b = plain.tables["steps"], low.tables["steps"]
    for name in ("fetched_host_bytes", "spilled_host_bytes"):
        assert b[name] == pytest.approx(a[name] * ratio) and a[name].sum() > 0
    for name in ("resident_bytes", "held_bytes", "read_bytes", "attended"):
        assert (a[name] == b[name]).all()
    moved = a["fetched_host_bytes"] + a["spilled_host_bytes"]
    bandwidth = Hardware.load("h100-pcie5").gpu.kv_bandwidth
    assert b["compute_s"] - a["compute_s"] == pytest.approx(moved * (1 + ratio) / bandwidth, rel=1e-6, abs=1e-12)
    bytes_ = {name: r.tables["links"]["bytes"].sum() for name, r in (("plain", plain), ("low", low))}
    assert bytes_["low"] == pytest.approx(bytes_["plain"] * ratio)
    assert b["stall_s"].sum() < a["stall_s"].sum()
    assert any("quantised on host" in note for note in low.manifest["notes"])


def test_the_host_holds_more_pages(trace):
    keys = {"regime": "offload", "page_size": 4, "host": "1MB", **MODEL}
    pages = [prepare(trace, run_config(host_format=f, **keys)).tier("host") for f in ("fp16", "int2(group=32)")]
    page = 4 * 16 * 2048.0  # tokens, layers, bytes of one
    assert pages == [int(1e6 / page), int(1e6 / (page * 0.1875))]


def test_an_ssd_of_its_own_format(trace):
    """Pages go to the host as they are and on to the SSD in two bits; fetched from there they are few bytes."""
    keys = {"policy": "fifo", "budget": "20%", "regime": "offload", "page_size": 4, "host": "2MB", "ssd": "1GB",
            "requests": [0], **MODEL}  # fmt: skip
    plain, low = run(trace, **keys), run(trace, ssd_format="int2(group=32)", **keys)
    a, b = plain.tables["steps"], low.tables["steps"]
    assert a["fetched_ssd_bytes"].sum() > 0 and a["spilled_ssd_bytes"].sum() > 0
    for name in ("fetched_ssd_bytes", "spilled_ssd_bytes"):
        assert b[name] == pytest.approx(a[name] * 0.1875)
    for name in ("fetched_host_bytes", "spilled_host_bytes"):
        assert (a[name] == b[name]).all()
    assert any("encoded anew by the CPU" in note for note in low.manifest["notes"])


def test_a_cache_that_attention_reads_in_place(trace):
    """KIVI on the GPU: the closed form of its bytes, while the context grows; recall as it was, attention faster."""
    keys = {"policy": "full", "budget": "100%", "page_size": 1, "requests": [0], **MODEL}
    plain, low = run(trace, **keys), run(trace, gpu_format="kivi(group=16, residual=32)", **keys)
    b = low.tables["steps"]
    for step, held, read in zip(b["step"], b["held_bytes"], b["read_bytes"], strict=True):
        tokens = 48 + step
        right = closed.quantised_bytes(tokens - 32, 2 * 16 * 8 * 64, 2, 16, 32, kept=32)
        assert held == pytest.approx(right)
        assert step == 0 or read == pytest.approx(right)
    assert low.summary["recall"] == plain.summary["recall"] == pytest.approx(1)
    assert low.tables["requests"]["peak_bytes"] == pytest.approx(b["held_bytes"].max())
    late = b["step"] > 0
    gain = plain.tables["steps"]["compute_s"][late] - b["compute_s"][late]
    assert (gain > 0).all() and (np.diff(gain) > 0).all()  # and the longer the context, the more


def test_a_byte_budget_holds_more_pages(trace):
    """64 tokens at full precision; with a window of 16 of them and 0.375 bytes for the others, 16 + 48 * 5.33."""
    keys = {"budget": f"{64 * 16 * 2048}B", "page_size": 1, **MODEL}
    request = trace.requests()[0]
    assert prepare(trace, run_config(**keys)).budget(request) == 64
    low = prepare(trace, run_config(gpu_format="kivi(bits=2, group=16, residual=16)", **keys))
    ratio = (0.25 + 4 / 16) / 2
    assert low.budget(request) == 16 + int(48 / ratio)
    assert low.stored(low.budget(request)) == 64
    assert low.stored(np.array([8, 16, 32])).tolist() == [8, 16, 20]
    assert low.stored(64, lanes=2) == 32 + 32 * ratio
    made = Replay(low, request).reserves()
    assert made["gpu"] == pytest.approx(low.stored(min(request.stride, 208 + 1)) * 16 * 2048)


def test_the_same_format_below_needs_no_decoding(trace):
    """What leaves a quantised cache arrives as it left; another format is read and written."""
    int4, int2 = parse_format("int4"), parse_format("int2(group=32)")
    assert recode_seconds(int4, int4, 1e9, 2.0, 1e12) == 0
    assert recode_seconds(int4, int2, 1e9, 2.0, 1e12) == pytest.approx((0.28125 + 0.1875) * 1e-3)
    assert recode_seconds(int4, PLAIN, 1e9, 2.0, 1e12) == recode_seconds(PLAIN, int4, 1e9, 2.0, 1e12)
    keys = {"policy": "lru", "budget": "30%", "regime": "offload", "page_size": 4, "requests": [0], **MODEL}
    same, other = (run(trace, gpu_format="int4", host_format=f, **keys) for f in ("int4", "int8"))
    assert same.tables["steps"]["compute_s"].sum() < other.tables["steps"]["compute_s"].sum()


def test_both_clocks_agree(trace, monkeypatch):
    """The compiled clock and SimPy, on quantised tiers."""
    from kvsim import simulate

    keys = {"policy": "lru", "budget": "30%", "regime": "offload", "gpu_format": "int8", "host_format": "int4", **MODEL}
    found = []
    for least in (0, 10**12):
        monkeypatch.setattr(simulate, "LOADING", least)
        monkeypatch.setattr(simulate, "COMPILING", least)
        found.append(run(trace, **keys).tables["steps"]["end_s"])
    assert (found[0] == found[1]).all()


def test_a_plan_moves_pages_as_they_are(tmp_path, trace):
    with pytest.raises(ConfigError, match="a tier is quantised"):
        run(
            trace, policy="lru", budget="30%", regime="offload", granularity="layer", requests=[0],
            host_format="int4", export_plan=tmp_path / "plan.parquet", **MODEL,
        )  # fmt: skip


# -- the command line -----------------------------------------------------------------------------------------------


def test_flags(tmp_path):
    called = CliRunner().invoke(app, ["run", "demo", "--host-format", "int4", "--gpu-format", "kivi", "--dry-run"])
    assert called.exit_code == 0, called.output
    assert 'host_format = "int4"' in called.output and 'gpu_format = "kivi"' in called.output


def test_quantise_command(tmp_path, monkeypatch):
    trace = random_trace(dim=32)
    monkeypatch.setattr("kvsim.cli.traces.open_named", lambda name: trace)
    called = CliRunner().invoke(app, ["trace", "quantise", "x", "--format", "int2(group=32)"])
    assert called.exit_code == 0, called.output
    found = errors(trace, parse_format("int2(group=32)"))
    assert "0.375 bytes per element, 5.33 times fewer" in called.output
    assert f"{found['logit'][0].mean():.4f}" in called.output and f"{found['value'][1].mean():.4f}" in called.output


def test_a_rotation_joins_as_many_heads_as_it_says():
    """Two heads whose rotation together has four values, each a code of two bits: one by one they have not."""
    codes = np.array([0, 1, 2, 3, 3, 0, 2, 1], np.float32)
    k = (codes @ hadamard(8)).reshape(2, 1, 4)
    apart, together = (
        parse_format(f"rotatekv(bits=2, group=4, sink=0, heads={heads})").quantised(k, k)[0] for heads in (1, 2)
    )
    np.testing.assert_allclose(together, k, atol=1e-5)
    assert np.abs(apart - k).max() > 0.1


def test_a_trace_whose_request_has_no_tokens_is_at_fault():
    trace = random_trace()
    trace.sources[0].vectors = lambda: iter(())
    with pytest.raises(TraceError, match="holds no tokens"):
        errors(trace, parse_format("int4(group=8)"))
