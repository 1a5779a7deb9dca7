"""The surrogate of the main rows: ``objective.loss`` names one of ``LOSSES``.

A surrogate is given what it may depend on, token by token, and answers with the loss of each token, before any weight, and with
which tokens its bounds reached. Auxiliary rows pass through it too, with a result that nobody uses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.config.schema import ObjectiveConfig
from pipeline.objectives.losses import ce_gppo, cispo, gspo, htpo, kl_cov, ppo
from pipeline.objectives.losses.inputs import Inputs

Surrogate = Callable[[Inputs, ObjectiveConfig], tuple[torch.Tensor, torch.Tensor]]

LOSSES: dict[str, Surrogate] = {
    "ppo": ppo.surrogate,
    "gspo": gspo.surrogate,
    "cispo": cispo.surrogate,
    "ce_gppo": ce_gppo.surrogate,
    "kl_cov": kl_cov.surrogate,
    "htpo": htpo.surrogate,
}


def surrogate(inputs: Inputs, objective: ObjectiveConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The configured surrogate: float32 ``[n]`` to be minimised, and bool ``[n]``. Raises ``ValueError`` on an unknown loss."""
    if objective.loss not in LOSSES:
        raise ValueError(f"objective.loss={objective.loss!r}: use one of {', '.join(LOSSES)}")
    return LOSSES[objective.loss](inputs, objective)
