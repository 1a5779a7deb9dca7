"""Logits of a checkpoint in a real Megatron model against those of its Hugging Face folder in transformers."""

from __future__ import annotations

import socket
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_ext import lora, models, topology
from pipeline.config.schema import LearnerConfig
from pipeline.model.architecture import Architecture
from pipeline.model.grid import Grid
from pipeline.model.lora import recorded

_TOKENS = 16


def difference(checkpoint: Path, hf: Path, model: Architecture, dtype: torch.dtype) -> float:
    """Largest absolute difference of log-probabilities of one random prompt; both models compute in float32.

    Parameters of both are first rounded to ``dtype``, the narrower type of the two: what a cast loses is no difference.
    Adapters are added to the weights that they are of before.

    Starts and ends a process group of this process alone.
    """
    tokens = torch.randint(0, model.vocab, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = _megatron(checkpoint, model, tokens, dtype), _transformers(hf, tokens, dtype)
    return float((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max())


def _megatron(checkpoint: Path, model: Architecture, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = server.getsockname()
    alone = topology.initialize(0, address, Grid(), seed=0)
    try:
        options = LearnerConfig(transformer_impl="local", lora=recorded(checkpoint))
        gpt = models.build(model, alone, options=options).eval()
        # Not the layers' extra states: latent attention's down-projections have some at TP 1 alone.
        state = {name: part for name, part in gpt.sharded_state_dict().items() if not isinstance(part, ShardedObject)}
        gpt.load_state_dict(dist_checkpointing.load(state, str(checkpoint)), strict=False)
        parameters, adapters = models.global_parameters(gpt), lora.find([gpt])
        for name, weight in lora.Merged(parameters, adapters).items():
            parameters[name].copy_(weight)
        _round(gpt, dtype)
        with lora.without(adapters.values()):
            return gpt(tokens.to(alone.device), None, None)[..., : model.vocab].float().cpu()
    finally:
        topology.shutdown()


def _transformers(hf: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager")
    _round(model, dtype)
    return model(tokens).logits


def _round(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
