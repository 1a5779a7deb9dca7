"""``isentrope plan learner --build``: megatron-core's own modules of a rank against what the plans say it holds."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from launchers.plan.rehearsal import differences, kinds, sync_plan
from launchers.plan.work import from_config
from megatron_ext import rehearsal
from pipeline.config.schema import LearnerConfig, LoraConfig, RunConfig
from pipeline.model import architecture
from pipeline.model.grid import Place
from tests import command_line
from tests.distributed import tiny_models

# Layouts as (tp, cp, pp, dp, vpp, ep, expert tp), by the families that can be cut so.
DENSE = [
    (1, 1, 1, 1, 1, 1, 0),
    (2, 1, 2, 2, 1, 1, 0),
    (2, 2, 1, 2, 1, 1, 0),
    (4, 1, 2, 1, 2, 1, 0),
    (1, 1, 4, 3, 1, 1, 0),
]
SPARSE = [
    (1, 1, 1, 1, 1, 1, 0),
    (2, 1, 2, 2, 1, 4, 1),
    (2, 1, 1, 2, 1, 2, 2),
    (1, 1, 2, 4, 1, 2, 1),
    (4, 1, 2, 1, 1, 2, 2),
]
CASES = [(name, sizes) for name in ("llama", "llama_tied", "qwen2", "qwen3") for sizes in DENSE]
CASES += [(name, sizes) for name in ("qwen3_moe", "deepseek_v3", "deepseek_plain_query") for sizes in SPARSE]
CASES += [("glm4_moe", sizes) for sizes in SPARSE] + [
    (name, SPARSE[1]) for name in ("qwen2_moe", "qwen3_next", "mixtral")
]
CASES += [("qwen3_next", SPARSE[4]), ("qwen3_5_moe", SPARSE[4]), ("qwen3_5", DENSE[1])]
CASES += [("gpt_oss", sizes) for sizes in (SPARSE[0], SPARSE[1], SPARSE[3])]


def learner_of(sizes) -> LearnerConfig:
    tp, cp, pp, dp, vpp, ep, etp = sizes
    return LearnerConfig(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=dp,
        virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        sequence_parallel=tp > 1,
        packing=True,
        max_tokens_per_micro_batch=64,
    )


def model_of(name, folder):
    (folder / "config.json").write_text(json.dumps(tiny_models.config(name)))
    return architecture.read(folder)


def run_of(sizes, dtype="bf16", distributed=True) -> RunConfig:
    run = RunConfig()
    learner = learner_of(sizes)
    learner.optimizer.distributed = distributed
    return replace(run, learner=learner, model=replace(run.model, dtype=dtype))


def built_of(name, sizes, folder, dtype="bf16", distributed=True):
    """The work, the reshard plan, and a way to build a rank."""
    model, run = model_of(name, folder), run_of(sizes, dtype, distributed)
    work = from_config(model, run)
    return work, sync_plan(work, run), lambda rank: rehearsal.build(model, run.learner, dtype, rank)


@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_ranks_of_every_kind_are_built_as_planned(name, sizes, tmp_path):
    work, plan, build = built_of(name, sizes, tmp_path)
    for rank in kinds(work.grid):
        assert differences(work, plan, build(rank)) == []


@pytest.mark.parametrize(("name", "sizes"), [("qwen2", DENSE[1]), ("deepseek_v3", SPARSE[1])])
def test_every_rank_is_built_as_planned_without_a_distributed_optimizer(name, sizes, tmp_path):
    work, plan, build = built_of(name, sizes, tmp_path, "fp32", False)
    for rank in range(work.grid.world_size):
        assert differences(work, plan, build(rank)) == []


@pytest.mark.parametrize(
    ("name", "sizes", "targets", "distributed"),
    [
        ("qwen2", (2, 1, 2, 2, 1, 1, 0), ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], False),
        ("deepseek_v3", SPARSE[1], ["all-linear"], True),
    ],
)
def test_adapters_are_built_as_planned(tmp_path, name, sizes, targets, distributed):
    model, run = model_of(name, tmp_path), run_of(sizes, distributed=distributed)
    run.learner.lora = LoraConfig(rank=3, targets=targets)
    work = from_config(model, run)
    for rank in kinds(work.grid):
        built = rehearsal.build(model, run.learner, "bf16", rank)
        assert differences(work, sync_plan(work, run), built) == []
        assert built.gradients < built.parameters


def test_whatever_is_built_otherwise_is_said(tmp_path):
    work, plan, build = built_of("qwen3", DENSE[1], tmp_path)
    built = build(5)
    norm, matrix = "decoder.layers.2.input_layernorm.weight", "decoder.layers.2.mlp.linear_fc2.weight"

    def said(**changes):
        return {
            each["what"]: (each["planned"], each["built"])
            for each in differences(work, plan, replace(built, **changes))
        }

    assert said() == {}
    assert said(shapes=built.shapes | {"more.weight": (3,)}) == {"more.weight": (None, (3,))}
    lost = {name: shape for name, shape in built.shapes.items() if name != norm}
    assert said(shapes=lost)[norm] == ((32,), None)
    whole = said(shapes=built.shapes | {matrix: (32, 12)})
    assert whole[matrix] == ((32, 24), (32, 12))
    assert any("what a weight sync sends of model.layers.2." in what for what in said(shapes={}))
    for name in ("parameters", "gradients"):
        assert said(**{name: getattr(built, name) + 2}) == {
            f"bytes of {name}": (getattr(built, name), getattr(built, name) + 2)
        }
    assert "bytes of optimizer" in said(optimizer=2 * built.optimizer)
    assert said(place=replace(built.place, tp=0)) == {"tp rank": (1, 0)}


def test_a_rehearsal_leaves_torch_and_the_process_as_they_were(tmp_path):
    before = torch.cuda.current_device, torch.Tensor.type
    _, _, build = built_of("llama", DENSE[1], tmp_path)
    assert build(3).place == Place(tp=1, dp=1, pp=0, etp=1, ep=0, edp=1)
    assert (torch.cuda.current_device, torch.Tensor.type) == before
    assert not dist.is_initialized()
    assert torch.zeros(1).device.type == "cpu"
    with pytest.raises(ValueError, match="does not divide"):
        rehearsal.build(model_of("llama", tmp_path), learner_of((1, 1, 3, 1, 1, 1, 0)), "bf16", 0)
    assert not dist.is_initialized()


@pytest.mark.parametrize("words", [(), ("learner.precision.fp8=hybrid",)], ids=["bf16", "fp8"])
def test_the_32b_recipe_is_built_as_planned(capsys, words):
    result = command_line.answer(capsys, "plan", "learner", "--config", "recipe/qwen3-32b.yaml", "--build", *words)
    build = result["build"]
    assert build["differences"] == []
    assert [rank["rank"] for rank in build["ranks"]] == [0, 7, 8, 15, 16, 23, 24, 31]
    assert build["ranks"][-1]["parameters_bytes"] == 4290004992
    assert max(rank["seconds"] for rank in build["ranks"]) < 60


def test_a_difference_is_told_and_ends_with_1(capsys, monkeypatch):
    build = rehearsal.build
    monkeypatch.setattr(rehearsal, "build", lambda *args: replace(build(*args), gradients=12))
    code, out, _ = command_line.call(capsys, "plan", "learner", "--config", "quickstart.yaml", "--build")
    assert code == 1
    assert "NOT AS PLANNED: 2 differences" in out
    assert "rank 0, bytes of gradients: planned" in out


def test_a_layout_that_cannot_be_built_is_refused_with_key_and_remedy(capsys):
    words = ("--config", "recipe/qwen3-32b.yaml", "--build", "learner.pipeline_model_parallel_size=5")
    code, out, err = command_line.call(capsys, "plan", "learner", *words)
    assert (code, out) == (2, "")
    assert "learner.pipeline_model_parallel_size" in err
    assert "choose a divisor" in err
