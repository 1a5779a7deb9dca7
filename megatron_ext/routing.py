"""Routing replay: has the learner's routers send every token to the experts that the engine chose for it.

Probabilities are the learner's own, of the experts that are given, so a router has a gradient as ever (R3, arXiv
2510.11370). What routes are: ``pipeline.model.routing``. megatron-core's ``router_replay.py`` gives each router a queue
of routes for passes that come again; here the output of a pass carries them, so that they are at hand in its backward
pass, whatever the schedule, where layers may be computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_ext import context_parallel
from megatron_ext.inputs import ModelInputs
from megatron_ext.topology import Topology
from pipeline.model.architecture import Architecture


class Routing:
    """The routers of this rank's model chunks, and the routes of the micro-batch that they compute."""

    def __init__(self, chunks: Sequence[GPTModel], model: Architecture, topology: Topology) -> None:
        """Takes every router's choice of experts over; without routes it remains as it was."""
        self.routes: torch.Tensor | None = None  # [this rank's tokens, expert layers, top_k]; None: the routers choose
        self._topology, self._sequence_parallel = topology, chunks[0].config.sequence_parallel
        expert_layers = [layer for layer in range(model.layers) if model.is_moe(layer)]
        for gpt in chunks:
            for layer in gpt.decoder.layers:
                number = layer.layer_number - 1
                if model.is_moe(number):
                    layer.mlp.router.router_replay = _Choice(self, expert_layers.index(number))

    def follow(self, given: ModelInputs, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What ``compute``, the forward pass of a model chunk, returns by the routes of ``given``; its backward pass
        has them too.
        """
        routes = self.routes = self._own(given.routes)
        output = compute()
        self.routes = None
        return output if routes is None else _Output.apply(output, self, routes)

    def _own(self, routes: torch.Tensor | None) -> torch.Tensor | None:
        """Of ``[rows, seq, expert layers, top_k]`` what this rank's routers see, in their order: by place, then row."""
        if routes is None:
            return None
        own = context_parallel.shard(routes, self._topology).transpose(0, 1)
        if self._sequence_parallel:
            own = own.chunk(self._topology.tp_size)[self._topology.tp_rank]
        return own.flatten(0, 1)


class _Choice:
    """What megatron-core's router asks for its experts, in place of its own ``RouterReplay``."""

    def __init__(self, routing: Routing, column: int) -> None:
        """``column``: of the router's layer among those with experts."""
        self._routing, self._column = routing, column

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and numbers of every token's experts, ``[tokens, topk]`` each."""
        values, chosen = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        routes = self._routing.routes
        if routes is None:
            return values, chosen
        given = routes[:, self._column].to(chosen)
        chosen = torch.where(given.any(-1, keepdim=True), given, chosen)  # zeros: padding, or not known
        return scores.gather(1, chosen), chosen


class _Output(torch.autograd.Function):
    """A model chunk's output, where its backward pass begins: then its routes are the routers' again."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, routing: Routing, routes: torch.Tensor) -> torch.Tensor:
        ctx.routing, ctx.routes = routing, routes
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.routing.routes = ctx.routes
        return gradient, None, None
