"""A stand-in for Transformer Engine's FusedAdam, which needs a GPU, and megatron-core made to believe that it has the
real one.

It keeps what ``transformer_engine/pytorch/optimizers/fused_adam.py`` (2.x) documents and checkpoints trip over: one
integer ``step`` in each parameter group, there from the first update on and never in a group without parameters;
``exp_avg`` and ``exp_avg_sq`` alone as a parameter's state; a ``load_state_dict`` that makes new tensors and knows no
other name.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

STATES = ("exp_avg", "exp_avg_sq")


class FusedAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay in float32."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, adam_w_mode=True, **others):
        assert adam_w_mode
        assert not any(others.values()), others
        super().__init__(
            params, {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps} | {"weight_decay": weight_decay}
        )

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            unknown = set(saved) - set(STATES)
            if unknown:
                raise KeyError(min(unknown))
            self.state[parameters[index]] = {name: value.float().clone() for name, value in saved.items()}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            even = [1 - beta ** group["step"] for beta in (first, second)]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update({name: torch.zeros_like(parameter) for name in STATES})
                if parameter.grad is None:
                    continue
                state["exp_avg"].lerp_(parameter.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
                width = (state["exp_avg_sq"].sqrt() / math.sqrt(even[1])).add_(group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(state["exp_avg"], width, value=-group["lr"] / even[0])


@contextmanager
def installed() -> Iterator[None]:
    """Within, megatron-core builds its optimizers with the stand-in, as it does where Transformer Engine imports."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    with (
        mock.patch.multiple(optimizer, Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False),
        mock.patch.multiple(distrib_optimizer, Adam=FusedAdam, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True),
    ):
        yield
