"""The routers of a mixture of experts: they replay the engine's choices, and are watched and balanced.

Replay sends every token to the experts that the engine chose for it. Probabilities are the learner's own, of the
experts that are given, so a router has a gradient as ever (R3, arXiv 2510.11370). What routes are:
``pipeline.model.routing``. megatron-core's ``router_replay.py`` gives each router a queue of routes for passes that
come again; here the output of a pass carries them, so that they are at hand in its backward pass, whatever the
schedule, where layers may be computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from megatron_ext import context_parallel
from megatron_ext.inputs import ModelInputs
from megatron_ext.topology import Topology
from pipeline.model.architecture import Architecture


class _Tokens(NamedTuple):
    """What this rank's routers see of a micro-batch, in their order."""

    filled: torch.Tensor  # bool [tokens]: no padding
    routes: torch.Tensor | None  # [tokens, expert layers, top_k]; None: the routers choose


class Routing:
    """The routers of this rank's model chunks, and the micro-batch that they compute."""

    def __init__(self, chunks: Sequence[GPTModel], model: Architecture, topology: Topology) -> None:
        """Takes every router's choice of experts over; without routes it remains as it was."""
        self.tokens: _Tokens | None = None
        self._topology, self._sequence_parallel = topology, chunks[0].config.sequence_parallel
        self._layers = [layer for layer in range(model.layers) if model.is_moe(layer)]
        self._routers: dict[int, Any] = {}  # by column: place among the layers with experts
        for gpt in chunks:
            for layer in gpt.decoder.layers:
                if model.is_moe(layer.layer_number - 1):
                    self._take(layer.mlp.router, self._layers.index(layer.layer_number - 1))
        experts = model.moe.experts if model.moe else 0
        self._counts = torch.zeros(len(self._layers), experts, dtype=torch.int64, device=topology.device)

    def _take(self, router: torch.nn.Module, column: int) -> None:
        router.router_replay = _Choice(self, column)  # type: ignore[assignment]
        router.register_forward_hook(lambda _, __, said: self._count(column, said[1]))
        self._routers[column] = router

    def follow(self, given: ModelInputs, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What ``compute``, the forward pass of a model chunk, returns for ``given``, by its routes where it has any;
        its backward pass has them too.
        """
        if not self._layers:
            return compute()
        routes = None if given.routes is None else self._own(given.routes, given)
        tokens = self.tokens = _Tokens(self._own(given.filled.to(self._counts.device), given), routes)
        output = compute()
        self.tokens = None
        return _Output.apply(output, self, tokens)

    def _own(self, grid: torch.Tensor, given: ModelInputs) -> torch.Tensor:
        """Of ``[rows, seq, ...]`` what this rank's routers see, in their order: by place, then row."""
        own = context_parallel.shard(grid, given.own).transpose(0, 1)
        if self._sequence_parallel:
            own = own.chunk(self._topology.tp_size)[self._topology.tp_rank]
        return own.flatten(0, 1)

    def _count(self, column: int, chosen: torch.Tensor) -> None:
        """Add the experts that were ``chosen``, bool ``[tokens, experts]``; once a token, however often its layer is
        computed: without a gradient it is computed again, or not trained on.
        """
        if self.tokens is not None and torch.is_grad_enabled():
            self._counts[column] += (chosen & self.tokens.filled[:, None]).sum(0)

    def balance(self, rate: float) -> dict[str, float]:
        """What the routers did since this was last called, over all ranks; then moves the biases of their experts.

        ``router_load_<layer>``: the tokens of the expert that has most, over the mean of the layer's experts; the
        highest and the mean of all layers are ``router_load_max`` and ``router_load_mean``. Each bias moves by ``rate``
        toward balance (auxiliary-loss-free, arXiv 2408.15664); 0 leaves them alone.
        """
        if not self._layers:
            return {}
        counts = self._counts.clone()
        self._counts.zero_()
        if self._topology.world_size > 1:
            dist.all_reduce(counts)  # ranks that see the same tokens all do, so that proportions stay
        mean = counts.double().mean(1, keepdim=True)
        if rate:
            for column, router in self._routers.items():
                router.expert_bias += rate * (mean[column] - counts[column]).sign()
        load = (counts / mean).max(1).values.tolist()
        by_layer = {f"router_load_{layer}": value for layer, value in zip(self._layers, load, strict=True)}
        return by_layer | {"router_load_max": max(load), "router_load_mean": sum(load) / len(load)}


class _Choice:
    """What megatron-core's router asks for its experts, in place of its own ``RouterReplay``."""

    def __init__(self, routing: Routing, column: int) -> None:
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
        tokens = self._routing.tokens
        if tokens is None or tokens.routes is None:
            return values, chosen
        given = tokens.routes[:, self._column].to(chosen)
        chosen = torch.where(given.any(-1, keepdim=True), given, chosen)  # zeros: padding, or not known
        return scores.gather(1, chosen), chosen


class _Output(torch.autograd.Function):
    """A model chunk's output, where its backward pass begins: then its tokens are the routers' again."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, routing: Routing, tokens: _Tokens) -> torch.Tensor:
        ctx.routing, ctx.tokens = routing, tokens
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.routing.tokens = ctx.tokens
        return gradient, None, None
