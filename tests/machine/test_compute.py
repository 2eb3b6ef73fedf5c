"""Compute terms and model shapes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.errors import ConfigError
from kvsim.machine import SHAPES, Hardware, ModelShape, Work, shape_from_config, shape_from_geometry
from kvsim.machine.compute import (
    Matrix,
    decode_attention_seconds,
    gemm_seconds,
    gemm_times,
    head_seconds,
    layer_seconds,
    prefill_attention_seconds,
    prefill_times,
)
from kvsim.machine.fit import LINEAR
from kvsim.trace.access import Geometry

GPU = Hardware.load("h100-pcie5").gpu
LLAMA = SHAPES["llama-3.1-8b"]
CONFIG = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "torch_dtype": "bfloat16",
    "_name_or_path": "llama-3.1-8b",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layer_mb", "head_mb", "kv"),
    [("llama-3.2-1b", 121.6, 525, 2048), ("llama-3.1-8b", 436.2, 1051, 4096), ("qwen2.5-7b", 466.1, 1090, 2048)],
)
def test_sizes_of_known_shapes(name, layer_mb, head_mb, kv):
    shape = SHAPES[name]
    assert shape.layer_bytes / 1e6 == pytest.approx(layer_mb, abs=0.06)
    assert shape.hidden * shape.vocab * 2 / 1e6 == pytest.approx(head_mb, abs=0.6)
    assert shape.kv_token_bytes == kv


PLAIN = replace(GPU, **LINEAR)  # no losses: linear in bytes, FLOP and sequences


def test_gemm_is_weights_or_flop():
    weights = 2e8 / PLAIN.weight_bandwidth
    assert gemm_seconds(PLAIN, 1e8, 1) == pytest.approx(weights + PLAIN.kernel_time)
    assert gemm_seconds(PLAIN, 1e8, 4096) == pytest.approx(2 * 4096e8 / PLAIN.gemm_flops + PLAIN.kernel_time)


def test_a_matrix_is_its_number_of_parameters_and_knows_its_sides():
    up = LLAMA.gemms[2]
    assert (up, up.out, up.inp) == (28672 * 4096, 28672, 4096)
    assert sum(LLAMA.gemms) == 218_103_808
    assert gemm_seconds(GPU, up, 7) == float(gemm_times(GPU, 28672, 4096, 7))
    assert gemm_seconds(GPU, 4096.0**2, 7) == gemm_seconds(GPU, Matrix(4096, 4096), 7)


def test_losses_of_a_gemm_by_hand():
    """100 multiprocessors of 1 TFLOP/s each; 300 rows by 1,000 columns of 2,000 inputs, memory for free."""
    gpu = replace(PLAIN, sms=100, gemm_flops=1e14, weight_bandwidth=np.inf, kernel_time=0.0)
    assert gemm_times(gpu, 1000, 2000, 300) == pytest.approx(2 * 300 * 1000 * 2000 / 1e14)
    quantised = replace(gpu, gemm_wave=1.0)  # 64 x 64: 5 x 16 = 80 tiles, one round; larger tiles take one round too
    assert gemm_times(quantised, 1000, 2000, 300) == pytest.approx(2 * 64 * 64 * 2000 / 1e12)
    deep = replace(quantised, gemm_depth=500)
    assert gemm_times(deep, 1000, 2000, 300) == pytest.approx(2 * 64 * 64 * 2500 / 1e12)
    edged = replace(quantised, gemm_edge=64.0)  # small tiles take 1 + 64 * (1/32 - 3/256) = 2.25 times their FLOP
    assert gemm_times(edged, 1000, 2000, 300) == pytest.approx(2.25 * 2 * 64 * 64 * 2000 / 1e12)
    half = replace(quantised, gemm_wave=0.5)
    assert gemm_times(half, 1000, 2000, 300) == pytest.approx((2 * 64 * 64 * 2000 / 1e12 + 1.2e9 / 1e14) / 2)


def test_the_knee_of_a_gemm_is_smooth_and_local():
    gpu = replace(PLAIN, gemm_knee=0.5, kernel_time=0.0, weight_bandwidth=1e12, gemm_flops=1e14)
    rows = 100.0  # 2 bytes and 200 FLOP per parameter: both take as long
    assert gemm_times(gpu, 1e4, 1e4, rows) == pytest.approx(2**0.5 * 2e8 / 1e12)
    assert gemm_times(gpu, 1e4, 1e4, 1.0) == pytest.approx(2e8 / 1e12, rel=1e-4)
    assert gemm_times(gpu, 1e4, 1e4, 1e4) == pytest.approx(2e12 / 1e14, rel=1e-4)


def test_decode_layer_is_the_sum_of_its_terms():
    kv = np.array([33.5e6, 0.0])
    found = layer_seconds(PLAIN, LLAMA, 1, 1, False, kv)
    fixed = (4 + PLAIN.small_kernels) * PLAIN.kernel_time + PLAIN.attention_fixed + PLAIN.attention_per_sequence
    traffic = LLAMA.token_traffic / PLAIN.weight_bandwidth
    assert found[1] == pytest.approx(fixed + traffic + LLAMA.layer_bytes / PLAIN.weight_bandwidth)
    assert found[0] - found[1] == pytest.approx(33.5e6 / PLAIN.kv_bandwidth)
    thrice = layer_seconds(PLAIN, LLAMA, 1, 1, False, kv, kv_multiplier=3.0)
    assert thrice[0] - found[0] == pytest.approx(2 * 33.5e6 / PLAIN.kv_bandwidth)


def test_losses_of_decode_attention_by_hand():
    """100 multiprocessors; 8 KV heads of 500 bytes per key; 1 GB/s, so that a byte takes a nanosecond."""
    gpu = replace(PLAIN, sms=100, kv_bandwidth=1e9, attention_fixed=1.0, attention_per_sequence=0.0)

    def at(sequences, context, **losses):
        kv = sequences * 8 * 500 * context
        return float(decode_attention_seconds(replace(gpu, **losses), sequences, kv, 8, 500.0)) - 1.0

    assert at(4, 100) == pytest.approx(4 * 8 * 500 * 100 * 1e-9)
    assert at(1, 100, attention_batch=5.0) == at(1, 100) and at(2, 100, attention_batch=5.0) == at(2, 100) + 5.0
    assert at(12, 1, attention_wave=3.0) == pytest.approx(at(12, 1))  # 96 blocks: one round
    assert at(13, 1, attention_wave=3.0) == pytest.approx(at(13, 1) + 3.0)  # 104 blocks: one further round
    assert at(26, 1, attention_wave=3.0) == pytest.approx(at(26, 1) + 6.0)  # 208 blocks: two further rounds
    assert at(26, 30, attention_tile_keys=90) == pytest.approx(at(26, 30) + 2 * 100 * 60 * 500e-9)
    assert at(26, 90, attention_tile_keys=90) == pytest.approx(at(26, 90))
    reading = at(4, 100)
    assert at(4, 100, kv_ramp=reading) == pytest.approx(1.5 * reading)
    assert at(4, 10**9, kv_ramp=1.0) == pytest.approx(at(4, 10**9) + 1.0, rel=1e-3)  # what is lost, at most


def test_prefill_grows_with_the_square_of_the_prompt_and_counts_a_cached_prefix():
    def attention(queries, context, sequences=1):
        return float(prefill_attention_seconds(PLAIN, LLAMA, queries, sequences, context)) - PLAIN.prefill_fixed

    row = 4 * LLAMA.heads * LLAMA.head_dim / PLAIN.attention_flops
    more = PLAIN.attention_row_keys
    assert attention(8192, 8192) == pytest.approx(row * 8192 * (4096 + more), rel=1e-6)
    assert attention(8192, 8192, 3) == pytest.approx(3 * row * 8192 * (4096 + more), rel=1e-6)
    assert attention(1024, 8192) == pytest.approx(row * 1024 * (7168 + 512 + more), rel=1e-6)
    assert attention(4096, 0) == attention(4096, 4096)  # its own keys, at least


def test_losses_of_prefill_attention_by_hand():
    """100 multiprocessors, on which a tile of 64 rows takes a millisecond per key."""
    gpu = replace(PLAIN, sms=100, attention_flops=4 * 128 * 64 * 100 / 1e-3, attention_row_keys=0, prefill_tile_rows=64)
    gpu = replace(gpu, prefill_fixed=0.0)

    def at(heads, queries, context, sequences=1, kv_heads=None, **more):
        times = prefill_times(replace(gpu, **more), heads, kv_heads or heads, 128, sequences, queries, context)
        return float(times) * 1e3

    assert at(10, 64, 1000) == pytest.approx(1000)  # ten tiles: each walks all of its keys
    assert at(10, 16, 1000) == at(10, 64, 1000)  # a tile is a tile
    assert at(10, 64, 1000, prefill_split=1.0) == pytest.approx(1000 * 10 / 100 * 968 / 1000)
    assert at(100, 64, 1000) == pytest.approx(1000)
    assert at(101, 64, 10_064) == pytest.approx(1.01 * 10_032 + 0.99 * 10_032)  # one tile more: two rounds
    assert at(32, 16, 1000, kv_heads=8, sequences=25) == pytest.approx(2 * (1000 - 8))  # 4 heads of 16 rows: a tile
    causal = at(100, 640, 640)  # ten rounds of tiles that see 64 to 640 keys
    assert causal == pytest.approx(10 * 320)
    assert at(100, 640, 640, prefill_tail=0.5) == pytest.approx(causal + 0.5 * (640 - 64))
    assert at(100, 640, 640, attention_row_keys=30) == pytest.approx(10 * 350)
    assert at(100, 640, 640, prefill_score_dims=64) == pytest.approx(1.5 * causal)
    written = at(100, 640, 640, kv_heads=100, prefill_token=1e-6) - causal
    assert written == pytest.approx(640e-3 * (100 * 128 / 1024) ** (2 / 3))


sizes = st.integers(1, 4096)


@given(st.sampled_from(["h100-pcie5", "rtx4090-pcie4", "rtxpro6000-pcie5"]), sizes, sizes, sizes, st.data())
def test_more_work_never_takes_less_time(name, first, second, third, data):
    """Of the fitted machines, also far outside of what they were fitted to: times grow in every count."""
    gpu, more = Hardware.load(name).gpu, 1 + data.draw(st.integers(0, 300))

    def grows(times, *counts):
        for i in range(len(counts)):
            larger = [n + more if i == j else n for j, n in enumerate(counts)]
            assert 0 < times(*counts) <= times(*larger) * (1 + 1e-9), (i, counts)

    grows(lambda out, inp, rows: gemm_times(gpu, 8 * out, 8 * inp, rows), first, second, third)
    grows(lambda b, s: decode_attention_seconds(gpu, b, b * 8 * s * 512.0, 8), first, 100 * second)
    grows(lambda b, q, past: prefill_times(gpu, 32, 8, 128, b, q, past + q), first % 64 + 1, second, third)


def test_forms_take_arrays():
    gemm = gemm_times(GPU, np.array([4096, 8192]), 4096, np.array([[1], [64], [2048]]))
    assert gemm.shape == (3, 2) and gemm[2, 1] == gemm_times(GPU, 8192, 4096, 2048)
    decode = decode_attention_seconds(GPU, np.array([1, 64]), np.array([1e6, 1e9]), 8)
    assert decode[1] == decode_attention_seconds(GPU, 64, 1e9, 8)
    prefill = prefill_times(GPU, 32, 8, 128, np.array([1, 4]), 512, np.array([512, 4096]))
    assert prefill[1] == prefill_times(GPU, 32, 8, 128, 4, 512, 4096)


def test_free_reading_and_no_work():
    free = replace(GPU, kv_bandwidth=np.inf, weight_bandwidth=np.inf, gemm_flops=np.inf)
    assert gemm_seconds(free, 1e8, 64) == GPU.kernel_time
    assert decode_attention_seconds(free, 1, 1e9, 8) == pytest.approx(GPU.attention_fixed + GPU.attention_per_sequence)
    assert decode_attention_seconds(GPU, 0, np.zeros(2), 8) == pytest.approx(GPU.attention_fixed)


def test_fitted_h100_is_near_what_was_expected_of_it():
    """Design leads for an 8B layer at one sequence of 8,192 tokens: 203 us."""
    layer = layer_seconds(GPU, LLAMA, 1, 1, False, np.array([8192 * LLAMA.kv_token_bytes]))[0]
    assert layer == pytest.approx(203e-6, rel=0.08)


def test_head():
    expected = 1.0507e9 / PLAIN.weight_bandwidth + PLAIN.kernel_time + PLAIN.step_sync
    assert head_seconds(PLAIN, LLAMA, 1) == pytest.approx(expected, rel=1e-3)


def test_shape_from_a_config():
    assert shape_from_config(CONFIG) == LLAMA
    assert shape_from_config({"text_config": CONFIG, "_name_or_path": "llama-3.1-8b"}) == LLAMA
    gpt2 = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}
    shape = shape_from_config(gpt2)
    assert (shape.intermediate, shape.gated, shape.kv_heads, shape.head_dim) == (3072, False, 12, 64)
    assert shape_from_config({**CONFIG, "model_type": "new", "gated_mlp": False}).gated is False
    assert shape_from_config({**CONFIG, "dtype": "float32"}).value_bytes == 4.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"intermediate_size": "big"}, "intermediate_size"),
        ({"model_type": "mamba"}, "model_type"),
        ({"torch_dtype": "int4"}, "dtype"),
    ],
)
def test_configs_that_are_refused(change, says):
    with pytest.raises(ConfigError, match=says):
        shape_from_config({**CONFIG, **change})


def test_shape_from_a_geometry():
    geometry = Geometry(32, 8, 4, 128, 2.0, 4096, 14336, 128256, "llama-3.1-8b")
    assert shape_from_geometry(geometry) == LLAMA
    with pytest.raises(ConfigError, match="hidden"):
        shape_from_geometry(Geometry(2, 2))


def test_idle_work():
    work = Work.idle(3, kv_read=5.0, fetch_host=np.arange(3), known="start")
    assert work.kv_read.tolist() == [5, 5, 5] and work.fetch_host.tolist() == [0, 1, 2]
    assert (work.queries, work.known, work.spill_ssd.sum()) == (1, "start", 0)


def test_an_mlp_without_a_gate_has_one_matrix_less():
    """Hidden 8, two heads of four, an MLP of 32: two matrices of 8 x 32 instead of three, and two activations of 32."""
    gated, plain = (ModelShape("toy", 1, 8, 2, 2, 4, 32, 100, gated=gate) for gate in (True, False))
    assert sum(gated.gemms) - sum(plain.gemms) == 8 * 32
    assert gated.token_traffic - plain.token_traffic == 32 * 2
    assert plain.token_traffic == (8 * 8 + 2 * (2 + 2 * 2) * 4 + 2 * 32) * 2
