"""Rules for ``learner.lora``: what adapters cannot be combined with, and which models' layers can have them."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.errors import Problem
from pipeline.config.schema import ALL_LINEAR, LORA_MODULES, LoraConfig, RunConfig
from pipeline.model.architecture import Architecture
from pipeline.model.lora import available

_TOGETHER = (("gate_proj", "up_proj"), ("w1", "w3"))  # one tensor of an expert in transformers 5


def lora_problems(config: RunConfig) -> Iterator[Problem]:
    """Every rule on ``learner.lora`` alone, and beside other keys, that ``config`` breaks."""
    learner, lora, default = config.learner, config.learner.lora, LoraConfig()
    if not lora.rank:
        for name in ("alpha", "targets"):
            if (value := getattr(lora, name)) != getattr(default, name):
                problem = "has no effect while learner.lora.rank=0"
                yield Problem(f"learner.lora.{name}", value, problem, "set learner.lora.rank, e.g. to 32, or remove it")
        return
    if not lora.targets:
        yield Problem("learner.lora.targets", [], "no layer gets an adapter", f"give [{ALL_LINEAR}], or set rank to 0")
    if ALL_LINEAR in lora.targets and len(lora.targets) > 1:
        problem = f"{ALL_LINEAR} names the others already"
        yield Problem("learner.lora.targets", lora.targets, problem, f"give [{ALL_LINEAR}], or the others alone")
    named = [name for name in LORA_MODULES if name in lora.targets]
    if set(lora.targets) == set(named) and lora.targets != named:
        problem = "each layer is named once, in the order of the model: else equal adapters would seem to differ"
        yield Problem("learner.lora.targets", lora.targets, problem, f"give [{', '.join(named)}]")
    frozen = f"with learner.lora.rank={lora.rank}, which leaves the model's own weights as they are"
    if learner.precision.fp8 != "none":
        problem = f"FP8 is not built {frozen}"
        yield Problem("learner.precision.fp8", learner.precision.fp8, problem, "set it to none, or lora.rank to 0")
    if rate := learner.moe_router_bias_update_rate:
        problem = f"would move the router's biases {frozen}"
        yield Problem("learner.moe_router_bias_update_rate", rate, problem, "set it to 0, or lora.rank to 0")


def lora_model_problems(config: RunConfig, model: Architecture) -> Iterator[Problem]:
    """What the architecture of ``model`` does not allow."""
    lora = config.learner.lora
    if lora.rank > model.hidden:
        problem = f"no layer's matrix has a rank above the model's hidden size of {model.hidden}"
        yield Problem("learner.lora.rank", lora.rank, problem, f"give at most {model.hidden}, e.g. 32")
    possible = available(model)
    if lora.rank and (absent := [name for name in LORA_MODULES if name in lora.targets and name not in possible]):
        problem = f"a {model.family.name} model has no linear layer {', '.join(absent)} that can have an adapter"
        yield Problem("learner.lora.targets", lora.targets, problem, f"give names of [{', '.join(possible)}]")
    for pair in _TOGETHER if lora.rank and model.moe else ():
        if len(alone := set(pair) & set(lora.targets)) == 1:
            problem = f"{alone.pop()} alone: PEFT has {' and '.join(pair)} of experts as one"
            yield Problem("learner.lora.targets", lora.targets, problem, "name both, or neither")
