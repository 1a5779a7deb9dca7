"""Says where in an SGLang rank's own parameters each interval belongs that a ``Plan`` brings there. Pure data.

No sglang here.

The names are SGLang's (0.5.21, under ``sglang/srt/models``), as ``model.named_parameters()`` of a rank gives them:
query, key and value rows lie one after the other in ``qkv_proj``, gate and up rows in ``gate_up_proj``, an expert's in
``w13_weight`` and ``w2_weight`` at the number that the expert has on the rank, DeepSeek's two down projections in
``fused_qkv_a_proj_with_mqa``, and the inputs of Qwen3.5's delta nets in ``in_proj_qkvz`` and ``in_proj_ba``. Everything
else has its Hugging Face name. FP8 codes and their scales lie alike. Rows of the padded vocabulary that no token has
are not written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

from pipeline.model.fp8_layout import BLOCK, scale_name
from pipeline.reshard.plan import Plan

_Fused: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]
_FUSED: _Fused = (  # SGLang's layer, and the Hugging Face layers that it holds, in order
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("fused_qkv_a_proj_with_mqa", ("q_a_proj", "kv_a_proj_with_mqa")),
    ("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),  # Qwen3.5's delta nets
    ("in_proj_ba", ("in_proj_b", "in_proj_a")),
)
_PADDED = (".gate_up_proj.", ".w13_", ".down_proj.", ".w2_", "model.embed_tokens.", "lm_head.")
_FUSED_EXPERT: _Fused = (  # Mixtral's have names of their own
    ("w13", ("gate_proj", "up_proj")),
    ("w2", ("down_proj",)),
    ("w13", ("w1", "w3")),
    ("w2", ("w2",)),
)


@dataclass(frozen=True)
class Target:
    """Where the first entry that a rank has of a tensor lies: entry ``start`` of ``parameter[index]`` along ``dim``."""

    parameter: str  # SGLang's name
    index: tuple[int, ...]  # an expert's number on the rank; (): the parameter itself
    dim: int  # of ``parameter[index]``
    start: int

    @property
    def half(self) -> int | None:
        """Which half of ``parameter[index]``, along ``dim``: 0 gate, 1 up, also where SGLang pads both; else None."""
        joined = ".gate_up_proj." in self.parameter or ".w13_" in self.parameter
        return int(self.start > 0) if joined else None

    @property
    def padded(self) -> bool:
        """Whether SGLang may pad it along ``dim`` without harm: the vocabulary, and the feed-forward on a CPU."""
        return any(part in self.parameter for part in _PADDED)


@lru_cache(maxsize=2)  # asked for in every update
def targets(plan: Plan, process: int) -> Mapping[str, Target]:
    """The place of every tensor of which ``process``, an engine rank, needs something; by the plan's names.

    A tensor that is quantised after it arrived has a place for its codes and one, under ``scale_name``, for its scales.
    DeepSeek's attention keeps a copy of ``kv_b_proj`` that SGLang makes anew in the model's ``post_load_weights()``.
    """
    dims, lengths = {}, {}
    for index, span in plan.needs(process).items():
        tensor = plan.tensors[index]
        dims[tensor.name], lengths[tensor.name] = tensor.dim, len(span)
        if tensor.quantise == "after":
            name = scale_name(tensor.name)
            dims[name], lengths[name] = tensor.dim, -(-len(span) // BLOCK[tensor.dim])
    experts = plan.model.moe.experts // plan.engines.ep if plan.model.moe else 0
    found = {name: _target(name, dim, lengths, experts) for name, dim in dims.items()}
    if plan.model.delta:  # its layers have the modules of attention themselves
        found = {name: replace(at, parameter=at.parameter.replace(".self_attn.", ".")) for name, at in found.items()}
    return found


def _target(name: str, dim: int, lengths: Mapping[str, int], experts: int) -> Target:
    """``lengths``: entries of the rank's own, by tensor. ``experts``: on a rank."""
    path, _, leaf = name.rpartition(".")
    module, _, layer = path.rpartition(".")
    above, _, number = module.rpartition(".")
    expert = above.endswith(".experts")
    for fused, parts in _FUSED_EXPERT if expert else _FUSED:
        names = [f"{module}.{part}.{leaf}" for part in parts]
        # Latent attention without query compression has ``q_proj`` and ``kv_a_proj_with_mqa`` as they are.
        if layer in parts and all(part in lengths for part in names):
            start = sum(lengths[part] for part in names[: parts.index(layer)])
            if expert:
                return Target(f"{above}.{fused}_{leaf}", (int(number) % experts,), dim, start)
            return Target(f"{module}.{fused}.{leaf}", (), dim, start)
    return Target(name, (), dim, 0)
