"""Compute terms and model shapes."""

from __future__ import annotations

import numpy as np
import pytest

from kvsim.errors import ConfigError
from kvsim.machine import SHAPES, Hardware, Work, shape_from_config, shape_from_geometry
from kvsim.machine.compute import gemm_seconds, head_seconds, layer_seconds
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


def test_gemm_is_weights_or_flop():
    weights = 2e8 / GPU.weight_bandwidth
    assert gemm_seconds(GPU, 1e8, 1) == pytest.approx(weights + GPU.kernel_time)
    assert gemm_seconds(GPU, 1e8, 4096) == pytest.approx(2 * 4096e8 / GPU.gemm_flops + GPU.kernel_time)


def test_decode_layer_is_the_sum_of_its_terms():
    kv = np.array([33.5e6, 0.0])
    found = layer_seconds(GPU, LLAMA, 1, 1, False, kv)
    fixed = (4 + GPU.small_kernels) * GPU.kernel_time + GPU.attention_fixed + GPU.attention_per_sequence
    traffic = LLAMA.token_traffic / GPU.weight_bandwidth
    assert found[1] == pytest.approx(fixed + traffic + LLAMA.layer_bytes / GPU.weight_bandwidth)
    assert found[0] - found[1] == pytest.approx(33.5e6 / GPU.kv_bandwidth)
    thrice = layer_seconds(GPU, LLAMA, 1, 1, False, kv, kv_multiplier=3.0)
    assert thrice[0] - found[0] == pytest.approx(2 * 33.5e6 / GPU.kv_bandwidth)


def test_prefill_grows_with_the_square_of_the_prompt_and_counts_a_cached_prefix():
    def attention(queries, context, sequences=1):
        kv = np.array([context * sequences * LLAMA.kv_token_bytes])
        with_keys = layer_seconds(GPU, LLAMA, queries * sequences, sequences, True, kv)[0]
        rows = 4 * LLAMA.heads * LLAMA.head_dim * queries * sequences / GPU.attention_flops
        linear = layer_seconds(GPU, LLAMA, queries * sequences, sequences, False, 0 * kv)[0]
        return with_keys - linear - rows * GPU.attention_row_keys

    flop = 4 * LLAMA.heads * LLAMA.head_dim / GPU.attention_flops
    assert attention(8192, 8192) == pytest.approx(flop * 8192**2 / 2, rel=1e-6)
    assert attention(8192, 8192, 3) == pytest.approx(3 * flop * 8192**2 / 2, rel=1e-6)
    assert attention(1024, 8192) == pytest.approx(flop * (1024 * 7168 + 1024**2 / 2), rel=1e-6)
    assert attention(4096, 0) == pytest.approx(flop * 4096**2 / 2, rel=1e-6)  # reads nothing but its own keys


def test_fitted_h100_is_near_what_was_expected_of_it():
    """Design leads for an 8B layer at one sequence of 8,192 tokens: 203 us."""
    layer = layer_seconds(GPU, LLAMA, 1, 1, False, np.array([8192 * LLAMA.kv_token_bytes]))[0]
    assert layer == pytest.approx(203e-6, rel=0.08)


def test_head():
    expected = 1.0507e9 / GPU.weight_bandwidth + GPU.kernel_time + GPU.step_sync
    assert head_seconds(GPU, LLAMA, 1) == pytest.approx(expected, rel=1e-3)


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
