"""The memory estimate against the bytes of real learners, counted."""

import estimate_ranks
import megatron_ranks as ranks
import pytest
import tiny_models
import torch

from launchers.plan import memory
from launchers.plan.work import ITEM_SIZES, Work
from pipeline.config.schema import LearnerConfig, LoraConfig, OptimizerConfig
from pipeline.model import architecture
from pipeline.model.grid import grid_of

WIDE = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "vocab_size": 402,
    "max_position_embeddings": 256,
}
ADAM = {"lr": 1e-3}
SHARED = ADAM | {"distributed": True}
CASES = {
    "llama": ("llama", 1, 1, 1, {}),
    "llama, bf16": ("llama", 1, 1, 1, {"dtype": "bf16"}),
    "qwen3, bf16, TP2": ("qwen3", 2, 2, 1, {"dtype": "bf16"}),
    "qwen3, bf16, TP2, sequence parallel, adapters": (
        "qwen3",
        2,
        2,
        1,
        {"dtype": "bf16", "sequence_parallel": True, "lora": LoraConfig(rank=4)},
    ),
    "latent attention and experts, TP2, EP2, adapters": (
        "deepseek_v3",
        2,
        2,
        1,
        {"sequence_parallel": True, "sizes": {"ep": 2, "etp": 1}, "lora": LoraConfig(rank=4)},
    ),
    "qwen2, TP2": ("qwen2", 2, 2, 1, {}),
    "qwen3, PP2, 3 micro-batches": ("qwen3", 2, 1, 2, {"micro_batch_size": 2}),
    "qwen3, DP2, distributed optimizer": ("qwen3", 2, 1, 1, {"optimizer": SHARED}),
    "llama, bf16, DP2, distributed optimizer": ("llama", 2, 1, 1, {"dtype": "bf16", "optimizer": SHARED}),
    "experts": ("qwen3_moe", 1, 1, 1, {}),
    "experts, EP2, distributed optimizer": ("qwen3_moe", 2, 1, 1, {"sizes": {"ep": 2}, "optimizer": SHARED}),
    "llama, full recomputation": ("llama", 1, 1, 1, {"recompute_granularity": "full"}),
    "qwen3, bf16, full recomputation by twos": (
        "qwen3",
        1,
        1,
        1,
        {"dtype": "bf16", "recompute_granularity": "full", "recompute_num_layers": 2},
    ),
    "qwen3, PP2, one layer of two recomputed": (
        "qwen3",
        2,
        1,
        2,
        {"micro_batch_size": 2, "recompute_granularity": "full", "recompute_method": "block"},
    ),
    "llama, bf16, selective recomputation": (
        "llama",
        1,
        1,
        1,
        {"dtype": "bf16", "recompute_granularity": "selective"},
    ),
    "qwen3, selective recomputation": ("qwen3", 1, 1, 1, {"recompute_granularity": "selective"}),
    "llama, TP2, sequence parallel": ("llama", 2, 2, 1, {"sequence_parallel": True}),
    "qwen3, TP2, sequence parallel, full recomputation": (
        "qwen3",
        2,
        2,
        1,
        {"sequence_parallel": True, "recompute_granularity": "full"},
    ),
    "llama, PP2, VPP2": ("llama", 2, 1, 2, {"sizes": {"vpp": 2}, "micro_batch_size": 1}),
    "llama, PP2, one and three layers": ("llama", 2, 1, 2, {"sizes": {"first": 1}, "micro_batch_size": 2}),
    "llama, CP2": ("llama", 2, 1, 1, {"cp": 2}),
    "qwen3, bf16, CP2": ("qwen3", 2, 1, 1, {"cp": 2, "dtype": "bf16"}),
    "experts, TP2, EP2, ETP1": ("qwen3_moe", 2, 2, 1, {"sequence_parallel": True, "sizes": {"ep": 2, "etp": 1}}),
    "sinks, windows and biases": ("gpt_oss", 1, 1, 1, {}),
    "sinks, windows and biases, bf16, CP2": ("gpt_oss", 2, 1, 1, {"cp": 2, "dtype": "bf16"}),
    "latent attention, TP2": ("deepseek_v3", 2, 2, 1, {"sequence_parallel": True}),
    "latent attention": ("deepseek_v3", 1, 1, 1, {}),
    "llama, TP2, logits never whole": ("llama", 2, 2, 1, {"log_prob_kernel": "fused"}),
    "qwen3, bf16, logits never whole": ("qwen3", 1, 1, 1, {"log_prob_kernel": "fused", "dtype": "bf16"}),
}
ROWS, SEQ = 6, 49
TOLERANCES = {"parameters": 1e-9, "gradients": 1e-9, "optimizer": 0.005, "saved": 0.01}


@pytest.mark.parametrize("case", CASES)
def test_estimate_equals_counted_bytes(gang, tmp_path, case):
    name, world, tp, pp, config = CASES[case]
    model = tiny_models.config(name, **WIDE)
    folder = tiny_models.write(tmp_path / "model", model)
    whole = {"lengths": torch.full((ROWS,), SEQ), "loss_mask": (torch.arange(1, SEQ) >= 4).expand(ROWS, -1).clone()}
    rows = ranks.batch(rows=ROWS, auxiliary=0, vocab=402, seq=SEQ, **whole)  # what is planned for: rows of full length
    config = {"micro_batch_size": ROWS, "optimizer": ADAM, "log_prob_kernel": "torch"} | config
    found = gang.run(estimate_ranks.counted, world, str(folder), tp, pp, rows, config)
    work = _work(folder, world, tp, pp, rows, config)
    for stage in memory.stages(work):
        here = found[stage.stage * world // pp : (stage.stage + 1) * world // pp]
        counted = {part: max(each[part] for each in here) for part in here[0]}
        estimate = {part: stage.parts[part] for part in ("parameters", "gradients", "optimizer")}
        estimate["saved"] = max(moment.saved for moment in memory.moments(work, stage.stage))
        for part, tolerance in TOLERANCES.items():
            print(f"{case}, stage {stage.stage}, {part}: {estimate[part]:.0f} of {counted[part]} bytes")
            if part == "saved" and "lora" in config:  # frozen norms keep less, which is not planned for
                assert counted[part] <= estimate[part] < 1.25 * counted[part]
                continue
            assert estimate[part] == pytest.approx(counted[part], rel=tolerance), part


def _work(folder, world, tp, pp, rows, config):
    cp, sizes = config.get("cp", 1), {"tp": tp, "pp": pp, **config.get("sizes", {})}
    dp = world // (tp * pp * cp)
    given = {key: value for key, value in config.items() if key in LearnerConfig.__dataclass_fields__}
    learner = LearnerConfig(
        data_parallel_size=dp,
        context_parallel_size=cp,
        transformer_impl="local",
        **{ranks.SIZES[name]: size for name, size in sizes.items()},
        **given | {"optimizer": OptimizerConfig(**config["optimizer"])},
    )
    each = min(config["micro_batch_size"], rows.rows // dp)
    return Work(
        model=architecture.read(folder),
        learner=learner,
        grid=grid_of(learner),
        itemsize=ITEM_SIZES[config.get("dtype", "fp32")],
        rows=each,
        length=SEQ - 1,
        targets=each * int(rows.targets[0]),
        micro_batches=rows.rows // dp // each,
        step_rows=ROWS,
    )
