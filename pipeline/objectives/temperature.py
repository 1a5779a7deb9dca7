"""Who owns the temperature: the one rule, kept here.

- A *sample* owns the temperature it was drawn with; its ``log_probs`` are at that temperature and say so.
- The *loss* lives at T=1: ratio, KL, covariance and entropy use log-probs recomputed by the learner at T=1, never a
  sample's own (except where ``correction`` compares both, at T=1). The temperature shapes only which samples are drawn
  (and, for ``reweight`` and ``fc``, a detached weight).
- *Main* rows are drawn at exactly T=1, so that they alone may be compared with the learner (the mismatch metric and its
  correction), measure the entropy and carry the metrics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from pipeline.types import Role, SampleGroup

POLICY_TEMPERATURE = 1.0


def check_temperatures(groups: Iterable[SampleGroup]) -> None:
    """Raise ``ValueError`` on a main sample not drawn at T=1, or any sample drawn at a temperature that is not
    positive.
    """
    for group in groups:
        for sample in group.samples:
            if group.role is Role.MAIN and sample.temperature != POLICY_TEMPERATURE:
                raise ValueError(
                    f"prompt {group.prompt.id!r}: a main sample was drawn at T={sample.temperature}, must be 1: "
                    "tag samples of another temperature as auxiliary"
                )
            if not 0 < sample.temperature < math.inf:
                raise ValueError(
                    f"prompt {group.prompt.id!r}: sample drawn at T={sample.temperature}, must be positive"
                )
