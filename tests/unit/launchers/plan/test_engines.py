"""The roofline of decoding by hand."""

import pytest

from launchers.plan.engines import Gpu, kv_token_bytes, rollout, weights
from pipeline.config.load import PACKAGED, load_config
from pipeline.model import architecture

LAYER = 5120 * (8192 + 2 * 1024) + 8192 * 5120 + 3 * 5120 * 25600 + 2 * 5120 + 2 * 128  # of Qwen3-32B, with its norms
TABLE = 151936 * 5120  # embeddings, and as much again in the output layer
DENSE = 64 * LAYER + 5120 + TABLE
GPU = Gpu(gib=80.0, tflops=1000.0, memory_gb_s=1000.0)
KEYS = (
    "rollout.engine=sglang",
    "rollout.engines=2",
    "rollout.tensor_parallel_size=4",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=8",
    "rollout.max_prompt_tokens=24",
    "rollout.max_new_tokens=1000",
    "rollout.sglang.mem_fraction_static=0.8",
    "rollout.sglang.max_total_tokens=0",
    "entropy.controller=none",
)


def read(name):
    return architecture.read(PACKAGED / "model" / name)


def of(*overrides, name="qwen3-32b", gpu=GPU, free=80.0, mean=0):
    config = load_config(None, ["model.hf_path=x", "model.dtype=bf16", *KEYS, *overrides], check=False)
    return rollout(read(name), config, gpu, free, mean)


def test_qwen3_32b_on_four_gpus():
    found = of()
    assert found.weights_bytes == 2 * (DENSE + TABLE) / 4
    assert found.kv_token_bytes == 2 * 64 * 2 * 128 * 2  # keys and values, layers, 2 of 8 heads, head size, bytes
    assert found.kv_tokens == int((0.8 * 80 * 2**30 - 2 * (DENSE + TABLE) / 4) / 65536)
    assert (found.samples, found.concurrent) == (16, 16)
    # 1000 passes; each reads the weights, but not the embeddings, and 16 samples' keys and values of 24 + 500 tokens on
    # average.
    assert found.decode_seconds == pytest.approx(1000 * (2 * DENSE / 4 + 16 * 524 * 65536) / 0.6e12)
    # Two prompts of 24 tokens; of each token's attention to 12 before it, products with keys and with values.
    operations = 2 * DENSE + 2 * 64 * 64 * 256 * 12
    assert found.prefill_seconds == pytest.approx(48 * operations / (4 * 1000e12 * 0.45))
    assert found.seconds == found.prefill_seconds + found.decode_seconds


def test_a_small_cache_makes_samples_wait():
    found = of("rollout.sglang.max_total_tokens=3100")
    assert (found.kv_tokens, found.concurrent) == (3100, 3)
    assert found.decode_seconds == pytest.approx(16 / 3 * 1000 * (2 * DENSE / 4 + 3 * 524 * 65536) / 0.6e12)


def test_slow_arithmetic_governs_when_memory_is_fast():
    found = of(gpu=Gpu(tflops=1.0, memory_gb_s=1e6))
    operations = 2 * DENSE + 2 * 64 * 64 * 256 * 524
    assert found.decode_seconds == pytest.approx(1000 * 16 * operations / (4 * 1e12 * 0.45))


def test_a_stated_mean_response():
    assert of(mean=500).decode_seconds == pytest.approx(500 * (2 * DENSE / 4 + 16 * 274 * 65536) / 0.6e12)


def test_auxiliary_samples_count():
    more = ["entropy.controller=pi", "entropy.actuator=resample", "entropy.auxiliary_prompts=3"]
    assert of(*more, "entropy.auxiliary_samples=5").samples == 16 + 2 * 5


def test_weights_that_do_not_fit_leave_no_cache():
    assert of("rollout.sglang.mem_fraction_static=0.1").kv_tokens < 0


def test_a_pass_reads_the_experts_that_its_tokens_choose():
    config = load_config(None, ["model.hf_path=x", "model.dtype=bf16", *KEYS], check=False)
    held = weights(read("qwen3-30b-a3b"), config)
    assert held.experts == 2 * 48 * 128 * 3 * 2048 * 768
    one = ("rollout.engines=4", "rollout.sglang.max_total_tokens=1024")
    found = of(*one, name="qwen3-30b-a3b")
    kv = 2 * 48 * 1 * 128 * 2
    assert found.concurrent == 1
    assert found.decode_seconds == pytest.approx(8000 * ((held.dense + held.experts * 8 / 128) / 4 + 524 * kv) / 0.6e12)


def test_fp8_halves_the_matrices_of_the_layers():
    config = load_config(None, ["model.hf_path=x", "model.dtype=bf16", *KEYS, "rollout.weight_dtype=fp8"], check=False)
    norms = 64 * (2 * 5120 + 2 * 128) + 5120
    assert weights(read("qwen3-32b"), config).dense == 64 * LAYER - (norms - 5120) + 2 * (TABLE + norms)


@pytest.mark.parametrize(("tp", "heads"), [(1, 8), (8, 1), (16, 1)])
def test_heads_fewer_than_gpus_are_held_by_several(tp, heads):
    assert kv_token_bytes(read("qwen3-32b"), tp, 2) == 2 * 64 * heads * 128 * 2
