"""Operations and seconds by hand."""

import pytest

from launchers.plan.speed import Machine, forward, matrices, speed

ONE_ROW = (
    "learner.micro_batch_size=1",
    "rollout.prompts_per_step=1",
    "rollout.samples_per_prompt=2",
    "rollout.max_prompt_tokens=1",
    "rollout.max_new_tokens=1000",
)
LAYER = 5120 * (8192 + 2 * 1024) + 8192 * 5120 + 3 * 5120 * 25600
MACHINE = Machine(tflops=1000.0, utilization=0.5)


def once(work):
    return [forward(work, stage, matrices(work, stage), work.rows, work.length) for stage in range(work.grid.pp)]


def test_forward_pass_of_qwen3_32b(plan):
    (found,) = once(plan("qwen3-32b", *ONE_ROW))
    assert found.linear == 2 * 1000 * 64 * LAYER
    # Queries times keys and probabilities times values, half of each: 2 x 2 x 1000^2 x 8192 / 2 per layer.
    assert found.attention == 64 * 2 * 1000**2 * 8192
    assert found.output == 2 * 1000 * 151936 * 5120
    assert found.fp8 == found.experts == 0


def test_prompt_tokens_have_no_logits(plan):
    (found,) = once(plan("qwen3-32b", *ONE_ROW[:3], "rollout.max_prompt_tokens=501", "rollout.max_new_tokens=500"))
    assert found.output == 2 * 500 * 151936 * 5120
    assert found.linear == 2 * 1000 * 64 * LAYER


def test_a_token_meets_its_chosen_experts_only(plan):
    (found,) = once(plan("qwen3-30b-a3b", *ONE_ROW))
    expert, router = 3 * 2048 * 768, 2048 * 128
    attention = 2048 * (32 + 2 * 4) * 128 + 32 * 128 * 2048
    assert found.experts == pytest.approx(2 * 1000 * 48 * 8 * expert)
    assert found.linear == pytest.approx(2 * 1000 * 48 * (8 * expert + router + attention))


def test_stages_divide_the_work(plan):
    (whole,) = once(plan("qwen3-32b", *ONE_ROW))
    stages = once(plan("qwen3-32b", *ONE_ROW, "learner.pipeline_model_parallel_size=4"))
    assert sum(each.total for each in stages) == pytest.approx(whole.total)
    assert [each.output > 0 for each in stages] == [False, False, False, True]


@pytest.mark.parametrize(
    ("keys", "linear", "attention", "output"),
    [
        (("learner.log_prob_kernel=torch",), 3, 3, 3),
        (("learner.log_prob_kernel=fused",), 3, 3, 4),
        (("learner.log_prob_kernel=torch", "learner.recompute_granularity=selective"), 3, 4, 3),
        (("learner.log_prob_kernel=torch", "learner.recompute_granularity=full"), 4, 4, 3),
        (
            (
                "learner.log_prob_kernel=torch",
                "learner.recompute_granularity=full",
                "learner.recompute_method=block",
                "learner.recompute_num_layers=16",
            ),
            3.25,
            3.25,
            3,
        ),
        (
            ("learner.log_prob_kernel=torch", "objective.kl_coef=0.1"),
            4,
            4,
            4,
        ),  # one forward pass more, of the reference
    ],
)
def test_a_step_on_one_gpu(plan, keys, linear, attention, output):
    work = plan("qwen3-32b", *ONE_ROW, *keys)
    (passed,) = once(work)
    found = speed(work, MACHINE)
    assert found.model_flops == pytest.approx(2 * 3 * passed.total)
    executed = 2 * (linear * passed.linear + attention * passed.attention + output * passed.output)
    assert found.executed_flops == pytest.approx(executed)
    assert found.seconds == pytest.approx(executed / 500e12)
    assert found.mfu == pytest.approx(found.model_flops / found.seconds / 1000e12)
    assert found.tokens_per_second == pytest.approx(2000 / found.seconds)


def test_adapters_work_and_leave_the_gradients_of_other_weights_out(plan):
    """Each layer: an A of rank 8 for every linear, and B for all columns that the fused ones make."""
    work = plan("qwen3-32b", *ONE_ROW, "learner.log_prob_kernel=torch", "learner.lora.rank=8")
    (passed,) = once(work)
    assert passed.linear == 2 * 1000 * 64 * LAYER
    layer = 3 * 8 * (5120 + 8192 + 2 * 1024) + 8 * (8192 + 5120) + 2 * 8 * (5120 + 2 * 25600) + 8 * (25600 + 5120)
    assert passed.adapters == 2 * 1000 * 64 * layer
    executed = 2 * (2 * passed.linear + 3 * passed.attention + 2 * passed.output + 3 * passed.adapters)
    assert speed(work, MACHINE).executed_flops == pytest.approx(executed)
    stages = once(plan("qwen3-32b", *ONE_ROW, "learner.lora.rank=8", "learner.pipeline_model_parallel_size=4"))
    assert sum(each.adapters for each in stages) == passed.adapters


def test_a_pipeline_waits_for_its_slowest_stage(plan):
    keys = (*ONE_ROW, "learner.pipeline_model_parallel_size=2", "learner.log_prob_kernel=torch")
    work = plan("qwen3-32b", *keys)
    first, last = (3 * each.total for each in once(work))
    found = speed(work, MACHINE)
    assert found.bubble == pytest.approx(1 / 3)  # two micro-batches on two stages
    assert found.seconds == pytest.approx(3 * last / 500e12)
    assert found.slowest_stage == pytest.approx(2 * last / (first + last))


def test_mini_batches_are_scored_first(plan):
    keys = (*ONE_ROW, "learner.log_prob_kernel=torch")
    alone, two = (speed(plan("qwen3-32b", *keys, f"learner.updates_per_step={n}"), MACHINE) for n in (1, 2))
    assert two.executed_flops == pytest.approx(alone.executed_flops * 4 / 3)
    assert two.model_flops == alone.model_flops


DECOUPLED = ("objective.old_log_probs=learner", "objective.correction.kind=tis")


@pytest.mark.parametrize(
    ("keys", "passes"),
    [
        (("entropy.controller=none",), 0),
        (("objective.kl_coef=0.1",), 1),
        (("learner.updates_per_step=2", "objective.loss=kl_cov"), 1),  # its statistics are old log-probs too
        (("objective.token_shaping=[stare]",), 1),
        (("objective.token_shaping=[rlrt]",), 2),  # and what the teacher says
        (("entropy.controller=pi", "entropy.actuator=clip_cov"), 1),
        (("entropy.controller=stare", "entropy.actuator=stare"), 1),
        (("rollout.staleness=2", "learner.updates_per_step=2"), 0),  # the engines tell the old ones
        (("rollout.staleness=2", "learner.updates_per_step=2", *DECOUPLED), 1),
        (("rollout.staleness=2", "objective.loss=htpo"), 1),  # which tokens it marks is of the weights that train
    ],
)
def test_forward_passes_beside_training(plan, keys, passes):
    """Those of ``pipeline.step.prepare``."""
    assert plan("qwen3-32b", "entropy.controller=none", *keys).passes == passes


def test_busiest_experts_and_fp8(plan):
    keys = (*ONE_ROW, "learner.data_parallel_size=2", "learner.log_prob_kernel=torch")
    keys += ("learner.expert_model_parallel_size=2",)
    even, uneven = (speed(plan("qwen3-30b-a3b", *keys, imbalance=factor), MACHINE) for factor in (1.0, 1.5))
    (passed,) = once(plan("qwen3-30b-a3b", *keys))
    assert uneven.seconds - even.seconds == pytest.approx(3 * 0.5 * passed.experts / 500e12)
    fp8 = speed(plan("qwen3-30b-a3b", *keys, "learner.precision.fp8=hybrid"), Machine(1000.0, 0.5, fp8_speedup=2.0))
    router = 2 * 1000 * 48 * 2048 * 128
    assert even.seconds - fp8.seconds == pytest.approx(3 * (passed.linear - router) / 2 / 500e12)
    assert fp8.model_flops == even.model_flops


def test_rows_shorter_than_the_longest(plan):
    keys = ("rollout.prompts_per_step=2", "rollout.samples_per_prompt=8", "rollout.max_prompt_tokens=1")
    keys += ("rollout.max_new_tokens=1000",)
    padded = speed(plan("qwen3-32b", *keys, "learner.micro_batch_size=4", mean_response=250), MACHINE)
    packed = speed(plan("qwen3-32b", *keys, "learner.max_tokens_per_micro_batch=1000", mean_response=250), MACHINE)
    assert packed.model_flops == padded.model_flops
    assert 3.5 < padded.seconds / packed.seconds < 4.5  # padding is three quarters of it
