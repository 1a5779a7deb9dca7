"""Each rule, broken in one way: the error names the key, the value and a remedy."""

import json

import pytest

from pipeline.config.errors import ConfigError
from pipeline.config.key import Range
from pipeline.config.keys import leaf_keys
from pipeline.config.load import load_config
from pipeline.model.fp8 import quantization_config
from tests.tiny_folder import LLAMA, hf_config


def test_the_defaults_are_valid(problems):
    assert problems() == ()


PARTIAL = ["rollout.staleness=2", "rollout.partial=true"]
BROKEN = {
    "batch arithmetic": (["learner.updates_per_step=3"], "learner.updates_per_step", "16 prompts x 16 samples"),
    "too many replicas": (
        ["learner.updates_per_step=64", "learner.data_parallel_size=8"],
        "learner.data_parallel_size",
        "4 per",
    ),
    "idle engines": (["rollout.engines=17"], "rollout.engines", "more engines than prompts"),
    "colocated on the CPU": (
        ["rollout.placement=colocated"],
        "rollout.placement",
        "the native engine computes on the CPU",
    ),
    "colocated with too few": (
        ["rollout.placement=colocated", "rollout.engine=sglang", "rollout.engines=2", "rollout.tensor_parallel_size=2"],
        "rollout.engines",
        "need 4 GPUs, the learner they are colocated with has 1",
    ),
    "inline": (["runtime=inline", "learner.tensor_model_parallel_size=2"], "runtime", "TP 2 x CP 1 x PP 1 x DP 1 = 2"),
    "inline CP": (["runtime=inline", "learner.context_parallel_size=2"], "runtime", "CP 2"),
    "sequence parallel": (["learner.sequence_parallel=true"], "learner.sequence_parallel", "no tensor-parallel ranks"),
    "VPP": (
        ["learner.virtual_pipeline_model_parallel_size=2"],
        "learner.virtual_pipeline_model_parallel_size",
        "one stage",
    ),
    "uneven": (
        ["learner.num_layers_in_last_pipeline_stage=2"],
        "learner.num_layers_in_last_pipeline_stage",
        "one stage",
    ),
    "uneven VPP": (
        [
            "learner.pipeline_model_parallel_size=2",
            "learner.virtual_pipeline_model_parallel_size=2",
            "learner.num_layers_in_first_pipeline_stage=2",
            "learner.num_layers_in_last_pipeline_stage=4",
        ],
        "learner.virtual_pipeline_model_parallel_size",
        "two stages",
    ),
    "uneven layers": (
        ["learner.pipeline_model_parallel_size=3", "learner.num_layers_in_first_pipeline_stage=1"],
        "learner.num_layers_in_first_pipeline_stage",
        "6 layers cannot be divided over 3 stages, of which first 1 and last None",
    ),
    "uneven layers of the last stage": (
        ["learner.pipeline_model_parallel_size=3", "learner.num_layers_in_last_pipeline_stage=3"],
        "learner.num_layers_in_last_pipeline_stage",
        "6 layers cannot be divided over 3 stages, of which first None and last 3",
    ),
    "VPP layers": (
        ["learner.pipeline_model_parallel_size=2", "learner.virtual_pipeline_model_parallel_size=2"],
        "learner.virtual_pipeline_model_parallel_size",
        "stages of [3] layers cannot be divided into vpp=2 chunks",
    ),
    "EP ranks": (
        ["learner.expert_tensor_parallel_size=2"],
        "learner.expert_model_parallel_size",
        "EP 1 x expert-TP 2 does not divide the 1 ranks",
    ),
    "EP dense": (
        ["learner.expert_model_parallel_size=2", "learner.data_parallel_size=2"],
        "learner.expert_model_parallel_size",
        "no experts",
    ),
    "gather": (
        ["learner.optimizer.overlap_param_gather=true", "learner.optimizer.overlap_grad_reduce=true"],
        "learner.optimizer.overlap_param_gather",
        "distributed optimizer",
    ),
    "recompute": (
        ["learner.recompute_granularity=selective", "learner.recompute_num_layers=2"],
        "learner.recompute_num_layers",
        "no effect with learner.recompute_granularity=selective",
    ),
    "native TP": (["rollout.tensor_parallel_size=2"], "rollout.tensor_parallel_size", "native"),
    "native transport": (["rollout.weight_transport=disk"], "rollout.weight_transport", "no server to carry them to"),
    "transport": (
        ["rollout.engine=sglang", "rollout.weight_transport=tensor"],
        "rollout.weight_transport",
        "not one of plan, d",
    ),
    "no time": (["rollout.weight_sync_timeout_s=0"], "rollout.weight_sync_timeout_s", "out of range"),
    "betas": (["learner.optimizer.betas=[0.9]"], "learner.optimizer.betas", "two numbers"),
    "warm-up": (
        ["learner.optimizer.lr_schedule=cosine", "learner.optimizer.warmup_steps=100"],
        "learner.optimizer.warmup_steps",
        "none of the 100 steps for the cosine",
    ),
    "token budget": (
        ["learner.max_tokens_per_micro_batch=2047"],
        "learner.max_tokens_per_micro_batch",
        "max_prompt_tokens 1024 + max_new_tokens 1024 = 2048 tokens",
    ),
    "packing without a budget": (["learner.packing=true"], "learner.packing", "packed sequences of any length"),
    "KV cache": (
        ["rollout.engine=sglang", "rollout.sglang.max_total_tokens=2053"],
        "rollout.sglang.max_total_tokens",
        "2048 tokens, and 6 that SGLang keeps free",
    ),
    "repeated readings without seeds": (
        ["rollout.engine=sglang", "entropy.repeated_prompts=32"],
        "entropy.repeated_prompts",
        "only in deterministic inference",
    ),
    "band of nothing": (["entropy.band_of=repeated"], "entropy.band_of", "no prompts are repeated"),
    "band of readings that the law does not see": (
        ["entropy.band_of=repeated", "entropy.repeated_prompts=8", "entropy.controller=scope"],
        "entropy.band_of",
        "controller=scope acts on the step's own rows",
    ),
    "min_lr": (["learner.optimizer.min_lr=1"], "learner.optimizer.min_lr", "above"),
    "countdown task": (["data.source.task=pm"], "data.source.task", "countdown"),
    "countdown digits": (["data.source.task=cd6"], "data.source.task", "countdown"),
    "gym size": (
        ["data.source.kind=reasoning_gym", "data.source.task=chain_sum", "data.source.size=15"],
        "data.source.size",
        "rollout.prompts_per_step = 16",
    ),
    "own verifier": (["data.verifier='a/b:f'"], "data.verifier", "module:function"),
    "own verifier's function": (["data.verifier='a.b:'"], "data.verifier", "module:function"),
    "gym task": (["data.source.kind=reasoning_gym", "data.source.task=a b"], "data.source.task", "reasoning-gym"),
    "jsonl": (["data.source.kind=jsonl", "data.source.path=none.jsonl"], "data.source.path", "no such file"),
    "params": (["data.source.params.a=1"], "data.source.params", "no effect"),
    "system prompt": (["data.system_prompt=hi"], "data.system_prompt", "no effect"),
    "template file": ([f"data.chat_template_file={__file__}"], "data.chat_template_file", "no effect"),
    "template kwargs": (["data.chat_template_kwargs.thinking=false"], "data.chat_template_kwargs", "no effect"),
    "no template file": (
        ["data.chat_template=true", "data.chat_template_file=none.jinja"],
        "data.chat_template_file",
        "no such file",
    ),
    "empty stop": (["rollout.stop=['']"], "rollout.stop", "ends every response"),
    "stop id": (["rollout.stop_token_ids=[3, 9999999]"], "rollout.stop_token_ids", "vocabulary"),
    "band above ln of the vocabulary": (
        ["entropy.band.low=20", "entropy.band.high=30"],
        "entropy.band.low",
        "no policy over",
    ),
    "upper edge above ln of the vocabulary": (["entropy.band.high=30"], "entropy.band.high", "no policy over"),
    "last edges above ln of the vocabulary": (
        ["entropy.band.schedule=linear", "entropy.band.end_low=20", "entropy.band.end_high=30"],
        "entropy.band.end_low",
        "no policy over",
    ),
    "point above ln of the vocabulary": (
        ["entropy.band.schedule=piecewise", "entropy.band.points=[[5, 0.1, 0.2], [9, 0.2, 30]]"],
        "entropy.band.points",
        "no policy over",
    ),
    "examples": (["data.examples=[[q, a]]"], "data.examples", "no effect"),
    "example": (["data.chat_template=true", "data.examples=[[q]]"], "data.examples", "not a pair"),
    "k above samples": (["evaluation.k=[1, 64]"], "evaluation.k", "between 1 and 32"),
    "k below 1": (["evaluation.k=[0]"], "evaluation.k", "between 1 and 32"),
    "held out": (["data.held_out=0"], "data.held_out", "no prompt"),
    "evaluation beside the training on its GPUs": (
        ["rollout.placement=colocated", "rollout.engine=sglang", "evaluation.beside_training=true"],
        "evaluation.beside_training",
        "cannot draw while it trains",
    ),
    "evaluation beside no training": (
        ["evaluation.beside_training=true", "evaluation.at_start=false"],
        "evaluation.beside_training",
        "nothing trains beside the evaluation at the end",
    ),
    "tis low": (
        ["objective.correction.kind=tis", "objective.correction.low=0.5"],
        "objective.correction.low",
        "large weights only",
    ),
    "dual clip": (["objective.dual_clip=0.5"], "objective.dual_clip", "clip every"),
    "band": (["entropy.band.low=0.4"], "entropy.band.low", "not below entropy.band.high (0.33)"),
    "band end": (["entropy.band.schedule=linear"], "entropy.band.end_low", "linear schedule ends"),
    "band schedule": (["entropy.band.end_low=0.1"], "entropy.band.schedule", "no effect"),
    "idle hold": (
        ["entropy.band.hold_steps=5"],
        "entropy.band.schedule",
        "hold_steps and schedule_steps have no effect",
    ),
    "long hold": (
        [
            "entropy.band.schedule=linear",
            "entropy.band.end_low=0.1",
            "entropy.band.end_high=0.2",
            "entropy.band.hold_steps=100",
        ],
        "entropy.band.hold_steps",
        "never move within steps=100",
    ),
    "auto without evaluations": (
        ["entropy.band.schedule=auto", "evaluation.every=0", "steps=240"],
        "entropy.band.schedule",
        "and evaluation.every is 0",
    ),
    "auto with few evaluations": (
        ["entropy.band.schedule=auto", "evaluation.every=20"],
        "entropy.band.schedule",
        "by 5 evaluations or more between the first step and the last; evaluation.every=20 makes 4 within steps=100",
    ),
    "auto of a k that none measures": (
        ["entropy.band.schedule=auto", "evaluation.every=10", "entropy.band.auto_k=8"],
        "entropy.band.auto_k",
        "no evaluation measures that pass@k",
    ),
    "auto without control": (
        ["entropy.band.schedule=auto", "evaluation.every=10", "entropy.controller=none"],
        "entropy.band.schedule",
        "steers to no band",
    ),
    "auto with entrocraft": (
        ["entropy.band.schedule=auto", "evaluation.every=10", "objective.token_shaping=[entrocraft]"],
        "entropy.band.schedule",
        "entrocraft needs a band from the start",
    ),
    "no points": (["entropy.band.schedule=piecewise"], "entropy.band.points", "needs points"),
    "idle points": (["entropy.band.points=[[0, 0.1, 0.2]]"], "entropy.band.points", "no effect"),
    "bad point": (
        ["entropy.band.schedule=piecewise", "entropy.band.points=[[0, 0.2, 0.1]]"],
        "entropy.band.points",
        "not [step",
    ),
    "order": (
        ["entropy.band.schedule=piecewise", "entropy.band.points=[[5, 0.1, 0.2], [0, 0.1, 0.2]]"],
        "entropy.band.points",
        "do not increase",
    ),
    "late points": (
        ["entropy.band.schedule=piecewise", "entropy.band.points=[[100, 0.1, 0.2]]"],
        "entropy.band.points",
        "never move within steps=100",
    ),
    "limits": (["entropy.command_min=2", "entropy.command_max=1"], "entropy.command_min", "leave no room"),
    "limits beside the actuator's own": (["entropy.command_min=7"], "entropy.command_min", "[7, 6]"),
    "a limit that is 0": (
        ["entropy.actuator=high_prob", "entropy.command_min=0.5"],
        "entropy.command_min",
        "limits [0.5, 0] leave no room",
    ),
    "fc does not cool": (["entropy.actuator=fc", "entropy.command_max=1"], "entropy.command_min", "[1, 1]"),
    "T range": (["entropy.command_min=1.1", "entropy.command_max=1.5"], "entropy.command_min", "does not contain 1"),
    "T below 0": (
        ["entropy.actuator=resample", "entropy.command_min=-1"],
        "entropy.command_min",
        "is not above 0",
    ),
    "rest": (
        ["entropy.actuator=tok", "entropy.command_min=1", "entropy.command_max=3"],
        "entropy.command_min",
        "does nothing at a command of 0",
    ),
    "sign": (
        ["entropy.actuator=tok", "entropy.command_min=-1", "entropy.command_max=1"],
        "entropy.command_min",
        "takes no negative",
    ),
    "clip_cov": (["entropy.actuator=clip_cov", "entropy.command_max=2"], "entropy.command_max", "share"),
    "scope": (["entropy.controller=scope", "entropy.actuator=tok"], "entropy.actuator", "commands a temperature"),
    "bang_bang": (
        ["entropy.controller=bang_bang", "entropy.actuator=clip_cov"],
        "entropy.actuator",
        "commands a temperature",
    ),
    "a constant command at rest": (
        ["entropy.controller=constant", "entropy.actuator=fc", "entropy.command=1"],
        "entropy.command",
        "fc would do nothing",
    ),
    "ki alone": (["entropy.pi.ki=0.1"], "entropy.pi.ki", "no effect"),
    "kp alone": (["entropy.pi.kp=2"], "entropy.pi.ki", "never learns the drift"),
    "split range": (["entropy.pi.split_range=true"], "entropy.pi.split_range", "second rollout"),
    "auxiliary": (
        ["entropy.actuator=resample", "entropy.auxiliary_prompts=17"],
        "entropy.auxiliary_prompts",
        "more than",
    ),
    "auxiliary most": (
        ["entropy.actuator=resample", "entropy.auxiliary_max_prompts=2"],
        "entropy.auxiliary_max_prompts",
        "not between",
    ),
    "name": (["name=a/b"], "name", "folder name"),
    "TP heads": (["learner.tensor_model_parallel_size=3"], "learner.tensor_model_parallel_size", "8 attention heads"),
    "PP layers": (
        ["learner.pipeline_model_parallel_size=4"],
        "learner.pipeline_model_parallel_size",
        "6 layers cannot be divided over 4 stages",
    ),
    "engine TP": (
        ["rollout.engine=sglang", "rollout.tensor_parallel_size=3"],
        "rollout.tensor_parallel_size",
        "8 attention",
    ),
    "idle partial rollouts": (["rollout.partial=true"], "rollout.partial", "no effect with rollout.staleness=0"),
    "stop texts across an update": ([*PARTIAL, "rollout.stop=[END]"], "rollout.stop", "would go unseen"),
    "repeated prompts of several versions": (
        [*PARTIAL, "entropy.repeated_prompts=8"],
        "entropy.repeated_prompts",
        "would not repeat",
    ),
    "idle deterministic schedule": (
        ["rollout.staleness=1", "rollout.deterministic=true"],
        "rollout.deterministic",
        "no effect without rollout.partial",
    ),
    "deterministic schedule, other seeds": (
        [*PARTIAL, "rollout.deterministic=true", "rollout.engine=sglang"],
        "rollout.deterministic",
        "only in deterministic inference",
    ),
    "deterministic schedule, further rounds": (
        [*PARTIAL, "rollout.deterministic=true", "rollout.sampling_rounds=2"],
        "rollout.sampling_rounds",
        "a matter of time",
    ),
    "positions": (["rollout.max_new_tokens=4000"], "rollout.max_new_tokens", "4096 positions"),
    "positions that SGLang never fills": (
        ["rollout.engine=sglang", "rollout.max_new_tokens=3067"],
        "rollout.max_new_tokens",
        "4091 tokens, and 6 that SGLang keeps free, but the model has 4096 positions",
    ),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_rule(refused, rule):
    refused(*BROKEN[rule])


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.verifier=my_package.rewards:score"],
        ["data.source.task=cd5"],
        ["entropy.band.schedule=auto", "evaluation.every=19"],
        ["entropy.band.schedule=piecewise", "entropy.band.points=[[99, 0.1, 0.2], [100, 0.3, 0.4]]"],
        ["learner.optimizer.lr_schedule=cosine", "learner.optimizer.warmup_steps=99"],
        ["learner.optimizer.warmup_steps=200"],
        ["rollout.engine=sglang", "rollout.sglang.max_total_tokens=2054"],
        ["rollout.engine=sglang", "rollout.max_new_tokens=3066"],  # of 4,096 positions the prompt has 1,024
        ["rollout.max_new_tokens=3072"],
        [
            "rollout.engine=sglang",
            "rollout.sglang.extra_args=[--enable-deterministic-inference]",
            "entropy.repeated_prompts=32",
        ],
        [*PARTIAL, "rollout.deterministic=true"],
        [*PARTIAL, "rollout.engine=sglang", "rollout.stop_token_ids=[5]", "rollout.sampling_rounds=2"],
        ["rollout.engine=sglang", "rollout.sglang.max_total_tokens=0"],
        ["rollout.sglang.max_total_tokens=1"],
        ["data.source.kind=reasoning_gym", "data.source.task=chain_sum", "data.source.size=16"],
        [f"seed={2**63 - 1}"],
        ["learner.sequence_parallel=true", "learner.tensor_model_parallel_size=8"],  # 4 key-value heads
        [
            "learner.pipeline_model_parallel_size=2",
            "learner.num_layers_in_first_pipeline_stage=2",
            "learner.virtual_pipeline_model_parallel_size=2",
        ],
        [
            "learner.optimizer.distributed=true",
            "learner.optimizer.overlap_grad_reduce=true",
            "learner.optimizer.overlap_param_gather=true",
        ],
        ["learner.recompute_granularity=full", "learner.recompute_method=block", "learner.context_parallel_size=2"],
    ],
    ids=lambda overrides: overrides[-1],
)
def test_what_the_rules_let_pass(problems, overrides):
    assert problems(*overrides) == ()


@pytest.mark.parametrize("seed", [2**63, 10**400])
def test_seeds_have_63_bits(problems, seed):
    (problem,) = problems(f"seed={seed}")
    assert (problem.key, problem.value, problem.problem) == ("seed", seed, "out of range")


CHOICES = {name: tuple(key.choices) for name, key in leaf_keys().items() if key.choices}
RANGES = {name: key.range for name, key in leaf_keys().items() if key.range}


@pytest.mark.parametrize("key", CHOICES)
def test_a_mistyped_word_is_corrected(problems, key):
    for word in CHOICES[key]:
        slip = word[:-1] + "~"
        a_list = isinstance(leaf_keys()[key].default, list)
        (problem,) = problems(f"{key}=[{slip}]" if a_list else f"{key}={slip}")
        assert (problem.key, problem.value) == (key, slip)
        assert word in problem.problem


@pytest.mark.parametrize(("typed", "meant"), [("reweigth", "reweight"), ("resampel", "resample")])
def test_the_nearest_word_is_suggested(problems, typed, meant):
    (problem,) = problems(f"entropy.actuator={typed}")
    assert problem.remedy == f"did you mean '{meant}'?"


def test_numbers_below_their_ranges(problems):
    """All at once: rules on single values report every problem together."""
    below = {name: key.range.low - 1 for name, key in leaf_keys().items() if key.type in (int, float)}
    below |= {key: int(value) for key, value in below.items() if leaf_keys()[key].type is int}
    found = problems(*(f"{key}={value}" for key, value in below.items()))
    out_of_range = [p for p in found if p.problem == "out of range"]
    assert {p.key: p.value for p in out_of_range} == below
    assert all(str(RANGES[p.key]) in p.remedy for p in out_of_range)


def test_every_number_has_a_range():
    assert not [name for name, key in leaf_keys().items() if key.type in (int, float) and not key.range]


def test_no_help_says_again_what_the_key_says():
    """Choices are listed from the key, and a range is no part of the prose."""
    assert not [name for name, key in leaf_keys().items() if " | " in key.help]


@pytest.mark.parametrize(
    ("override", "least", "most"),
    [
        ("steps=1e25", "at least 1", "at most 1000000000"),
        ("rollout.samples_per_prompt=1e12", "at least 2", "at most 65536"),
        ("learner.optimizer.betas=[0.9, 1.0]", "at least 0", "below 1"),
        ("entropy.band.points=[[0, .nan, 1]]", "give a finite number", ""),
    ],
)
def test_numbers_above_what_any_machine_could_do_and_inside_lists(problems, override, least, most):
    (problem,) = problems(override)
    assert problem.key == override.partition("=")[0]
    assert least in problem.remedy
    assert most in problem.remedy


def test_the_type_of_a_key_is_the_type_of_its_constraints():
    for name, key in leaf_keys().items():
        words, numbers = "text" in key.type_name, "number" in key.type_name or "integer" in key.type_name
        assert words or not (key.choices or key.form), name
        assert numbers or not (key.range or key.unit), name


@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_numbers_are_finite(problems, value):
    (problem,) = problems(f"learner.optimizer.lr={value}")
    assert problem.problem == "not a finite number"


def test_ranges_by_hand():
    half_open = Range(0, 1, open_high=True)
    assert 0 in half_open
    assert 1 not in half_open
    assert 0 not in Range(0, open_low=True)
    assert str(half_open) == "at least 0 and below 1"
    assert str(Range(1)) == "at least 1"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "no such folder"),
        ({}, "no config.json"),
        ({"config.json": "{"}, "not JSON"),
        ({"config.json": '{"model_type": "gpt2"}'}, "'gpt2' is not supported"),
        ({"config.json": "[]"}, "not a JSON object"),
        ({"config.json": '{"model_type": "llama"}'}, "architectures None is not supported"),
    ],
)
def test_model_folders_that_cannot_be_used(problems, tmp_path, files, words):
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    (problem,) = problems(f"model.hf_path={folder}")
    assert (problem.key, problem.value) == ("model.hf_path", str(folder))
    assert words in problem.problem


def test_every_refusal_of_the_model_is_a_problem(model, problems):
    """What is refused: tests/unit/pipeline/model/test_architecture.py."""
    (model / "config.json").write_text(json.dumps(LLAMA | {"hidden_act": "gelu", "mlp_bias": True}))
    found = problems()
    assert [problem.key for problem in found] == ["model.hf_path"] * 2
    for problem, words in zip(found, ("hidden_act='gelu'", "mlp_bias=True"), strict=True):
        assert words in problem.problem
        assert problem.remedy


def test_key_value_heads_and_ranks_divide_one_another(model, problems):
    heads = {"num_attention_heads": 12, "head_dim": 8, "intermediate_size": 192}
    (model / "config.json").write_text(json.dumps(LLAMA | heads))
    (problem,) = problems("learner.tensor_model_parallel_size=3")
    assert "4 key-value heads" in problem.problem
    assert problems("learner.tensor_model_parallel_size=4") == ()


EXPERTS = ["rollout.engine=sglang", "rollout.max_prompt_tokens=16", "rollout.max_new_tokens=16"]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_experts(model, problems, family):
    """What a model with experts asks beyond a dense one's rules."""
    (model / "config.json").write_text(json.dumps(hf_config(family)))
    assert problems(*EXPERTS) == ()
    layout = ["learner.tensor_model_parallel_size=2", "learner.expert_model_parallel_size=2"]
    layout.append("learner.expert_tensor_parallel_size=1")
    assert problems(*EXPERTS, *layout, "learner.sequence_parallel=true") == ()
    asked = {
        "learner.sequence_parallel": layout,
        "learner.expert_model_parallel_size": [
            "learner.expert_model_parallel_size=3",
            "learner.data_parallel_size=3",
        ],
        "learner.expert_tensor_parallel_size": [
            "learner.expert_tensor_parallel_size=5",
            "learner.data_parallel_size=5",
        ],
    }
    for key, overrides in asked.items():
        (problem,) = problems(*EXPERTS, *overrides)
        assert problem.key == key
    assert problems(*EXPERTS, "rollout.engine=native") == ()
    assert problems(*EXPERTS, "rollout.engine=native", "learner.routing_replay=routes") == ()


@pytest.mark.parametrize(
    ("config", "key", "said"),
    [
        (hf_config("deepseek_v3"), "moe_router_bias_update_rate", ""),
        (hf_config("qwen3_moe"), "moe_router_bias_update_rate", "a qwen3_moe model has no biases of experts to move"),
        (LLAMA, "moe_router_bias_update_rate", "a llama model has no biases"),
        (hf_config("qwen3_moe"), "moe_z_loss_coeff", ""),
        (LLAMA, "moe_z_loss_coeff", "a llama model has no routers"),
    ],
)
def test_routers_are_balanced_where_there_are_any(model, problems, config, key, said):
    (model / "config.json").write_text(json.dumps(config))
    found = problems(*EXPERTS, f"learner.{key}=0.001")
    assert [(each.key, each.value, each.remedy) for each in found] == [(f"learner.{key}", 0.001, "set it to 0")] * bool(
        said
    )
    assert all(said in each.problem for each in found)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (hf_config("qwen3_moe"), ""),
        (hf_config("deepseek_v3"), ""),
        (LLAMA, "a llama model has no experts"),
        (hf_config("qwen3_moe", num_experts_per_tok=1), "a token has one expert"),
    ],
)
def test_routes_are_replayed_where_there_are_experts(model, problems, config, said):
    (model / "config.json").write_text(json.dumps(config))
    assert problems(*EXPERTS) == ()
    found = problems(*EXPERTS, "learner.routing_replay=routes")
    assert [(problem.key, problem.remedy) for problem in found] == [("learner.routing_replay", "set it to off")] * bool(
        said
    )
    assert all(said in problem.problem for problem in found)


@pytest.mark.parametrize(
    ("family", "keys", "said"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}, "1 of 2 have none, the first is layer 1"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "1 of 2 have none, the first is layer 0"),
        ("qwen3_moe", {}, ""),
        ("deepseek_v3", {"first_k_dense_replace": 1}, ""),  # of which SGLang builds what config.json says
    ],
)
def test_sglang_builds_experts_in_every_layer_of_qwen3_moe(model, problems, family, keys, said):
    (model / "config.json").write_text(json.dumps(hf_config(family, num_hidden_layers=2, **keys)))
    found = problems(*EXPERTS)
    assert [(problem.key, problem.value) for problem in found] == ([("rollout.engine", "sglang")] if said else [])
    assert all(said in problem.problem and "experts in every layer" in problem.remedy for problem in found)


def test_delta_nets_are_not_cut_along_a_row(model, problems):
    (model / "config.json").write_text(json.dumps(hf_config("qwen3_next", max_position_embeddings=4096)))
    assert problems("rollout.engine=native") == ()
    (problem,) = problems("rollout.engine=native", "learner.context_parallel_size=2")
    assert (problem.key, problem.value) == ("learner.context_parallel_size", 2)
    assert "delta net" in problem.problem


def test_sglang_knows_no_sliding_window(model, problems):
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 512}
    (model / "config.json").write_text(json.dumps(LLAMA | mistral))
    assert problems("rollout.engine=native") == ()
    (problem,) = problems("rollout.engine=sglang")
    assert (problem.key, problem.remedy) == ("rollout.engine", "set rollout.engine=native")
    assert "not a sliding window of 512 tokens" in problem.problem


def test_experts_with_biases_are_whole_on_a_rank_and_their_engine_is_native(model, problems):
    (model / "config.json").write_text(json.dumps(hf_config("gpt_oss", max_position_embeddings=4096)))
    tp2 = ("learner.tensor_model_parallel_size=2", "learner.sequence_parallel=true")
    whole = "learner.expert_tensor_parallel_size=1"
    assert problems("rollout.engine=native", *tp2, whole) == ()
    (problem,) = problems("rollout.engine=native", *tp2)
    assert (problem.key, problem.remedy) == ("learner.expert_tensor_parallel_size", "set it to 1")
    (problem,) = problems("rollout.engine=sglang", *tp2, whole)
    assert (problem.key, problem.remedy) == ("rollout.engine", "set rollout.engine=native")
    assert "live updates of gpt_oss models" in problem.problem


RANKS = "rollout.tensor_parallel_size"
EXTRA = "rollout.sglang.extra_args"


@pytest.mark.parametrize(
    ("family", "keys", "key", "said"),
    [
        ("qwen3_next", [f"{RANKS}=2"], RANKS, "tp=2: SGLang divides the convolution of a delta net"),
        ("qwen3_next", [f"{RANKS}=2", "rollout.weight_transport=disk"], "", ""),
        ("qwen3_moe", [f"{RANKS}=4"], "", ""),
        ("qwen3_moe", [f"{EXTRA}=[--ep-size, 2]"], EXTRA, "ep=2 does not divide tp=1"),
        ("qwen3_moe", [f"{RANKS}=4", f"{EXTRA}=[--ep-size, two]"], EXTRA, "invalid int value: 'two'"),
        ("llama", [f"{RANKS}=2", f"{EXTRA}=[--ep-size=2]"], EXTRA, "ep=2: the model has no experts"),
    ],
)
def test_ranks_of_servers_that_cannot_take_slices_are_refused(model, problems, family, keys, key, said):
    (model / "config.json").write_text(json.dumps(hf_config(family, max_position_embeddings=4096)))
    found = problems("rollout.engine=sglang", *keys)
    assert [problem.key for problem in found] == ([key] if key else [])
    assert all(said in problem.problem and problem.remedy for problem in found)


def test_a_folder_of_fp8_codes_is_served_in_fp8(model, problems):
    sizes = {"head_dim": 64, "intermediate_size": 512, "num_key_value_heads": 8}
    config = LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]} | sizes
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config()}))
    assert problems("rollout.engine=native") == ()
    assert problems("rollout.engine=sglang", "rollout.weight_dtype=fp8") == ()
    (problem,) = problems("rollout.engine=sglang")
    assert problem.key == "rollout.weight_dtype"
    assert "the folder holds FP8 codes" in problem.problem


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"type": "dynamic", "factor": 4.0}, "rope_type dynamic with factor=4"),
        ({"type": "yarn", "factor": 4.0, "attention_factor": 1.5}, "attention_factor=1.5"),
        ({"type": "yarn", "factor": 4.0}, ""),
        (LONGROPE | {"factor": 8.0, "original_max_position_embeddings": 2048}, "attention_factor=1.128"),
        (LONGROPE | {"factor": 2.0, "original_max_position_embeddings": 2048}, ""),
    ],
)
def test_rotary_scalings_that_sglang_computes_otherwise(model, problems, rope, said):
    (model / "config.json").write_text(json.dumps(LLAMA | {"rope_scaling": rope}))
    room = ["rollout.max_prompt_tokens=1024", "rollout.max_new_tokens=1018"]
    assert problems(*room) == ()
    found = problems("rollout.engine=sglang", *room)
    assert [problem.key for problem in found] == (["rollout.engine"] if said else [])
    assert all(said in problem.problem for problem in found)


def test_longrope_serves_rows_of_its_original_length(model, problems):
    rope = LONGROPE | {"original_max_position_embeddings": 64}
    (model / "config.json").write_text(json.dumps(LLAMA | {"rope_scaling": rope}))
    lengths = ["rollout.max_prompt_tokens=32", "rollout.max_new_tokens=32"]
    assert problems(*lengths) == ()
    (problem,) = problems(*lengths[:1], "rollout.max_new_tokens=33")
    assert problem.key == "rollout.max_new_tokens"
    assert "64 positions for which longrope's short_factor holds" in problem.problem


QWEN3 = LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 64, "intermediate_size": 512}
FP8_ROLLOUTS = {
    "Llama": (LLAMA, [], "rollout.weight_dtype", "cannot update FP8 weights of model_type 'llama'"),
    "feed-forward": (QWEN3 | {"intermediate_size": 176}, [], "rollout.weight_dtype", "176 feed-forward rows"),
    "key-value rows of a rank": (
        QWEN3,
        ["rollout.tensor_parallel_size=4"],
        "rollout.weight_dtype",
        "64 key and value rows (tensor_parallel_size=4)",
    ),
    "activations": (QWEN3, ["rollout.sglang.dtype=float32"], "rollout.sglang.dtype", "16-bit activations"),
}


@pytest.mark.parametrize("case", FP8_ROLLOUTS)
def test_fp8_rollouts_that_sglang_cannot_serve(model, problems, case):
    config, overrides, key, words = FP8_ROLLOUTS[case]
    (model / "config.json").write_text(json.dumps(config))
    (problem, *_) = problems("rollout.engine=sglang", "rollout.weight_dtype=fp8", *overrides)
    assert problem.key == key
    assert words in problem.problem
    assert problem.remedy


def test_fp8_rollouts_that_run(model, problems):
    assert problems("rollout.weight_dtype=fp8") == ()  # the native engine takes any model
    (model / "config.json").write_text(json.dumps(QWEN3))
    sglang = ("rollout.engine=sglang", "rollout.weight_dtype=fp8", "rollout.tensor_parallel_size=2")
    assert problems(*sglang) == ()


def test_free_form_and_sectioned_values_say_where_they_came_from(problems):
    found = problems("data.source.params.a=1", "entropy.band={low: 0.4}")
    assert {p.key: p.source for p in found} == {
        "data.source.params": "command line",
        "entropy.band.low": "command line",
    }


def test_each_problem_says_where_its_value_came_from(model, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{hf_path: {model}}}\nsteps: 0\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["seed=-1"])
    assert [(p.key, p.source) for p in caught.value.problems] == [("seed", "command line"), ("steps", str(path))]
