"""The rollouts that a run keeps in ``samples/``: which they are, what the learner says of them, and how they are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.tokenizer import Tokenizer
from pipeline.learner import Learner
from pipeline.monitoring.events import to_json
from pipeline.objectives.batch import rows_to_measure
from pipeline.types import Prompt, Sample, SampleGroup

MEASURED_EVERY = 10  # steps: a pass through a tiny model costs 5 % of its step, and monitoring may not take 1 %


@dataclass(frozen=True)
class KeptSample:
    """One rollout and, in the steps that measure it, the exact entropy of the policy at each of its tokens."""

    prompt: Prompt
    sample: Sample
    entropies: np.ndarray | None  # float32 [n], nats at T=1, of the policy that the step's update starts from

    def line(self, step: int, tokenizer: Tokenizer | None) -> str:
        """As a JSON line of ``samples/``. No ``pieces`` without a tokenizer."""
        sample = self.sample
        fields = {
            "step": step,
            "prompt_id": self.prompt.id,
            "prompt": self.prompt.text,
            "answer": self.prompt.answer,
            "response": sample.text,
            "reward": sample.reward,
            "role": str(sample.role),
            "temperature": sample.temperature,
            "tokens": len(sample.token_ids),
            "finish_reason": sample.finish_reason,
            "weight_versions": [[span.version, span.start, span.end] for span in sample.weight_versions],
            "verifier_error": sample.verifier_error,
            "seed": sample.seed,
            "pieces": tokenizer.pieces(sample.token_ids) if tokenizer else [],
            "log_probs": _rounded(sample.log_probs),
            **({} if self.entropies is None else {"entropies": _rounded(self.entropies)}),
        }
        return to_json(fields) + "\n"


def choose(
    main: Sequence[SampleGroup], auxiliary: Sequence[SampleGroup], count: int, step: int
) -> list[tuple[Prompt, Sample]]:
    """At most ``count`` rollouts, of groups spread evenly over all; which one of a group changes from step to step.

    Those without tokens (aborted ones) are left out.
    """
    groups = [group for group in (*main, *auxiliary) if group.samples]
    drawn = [(group.prompt, group.samples[step % len(group.samples)]) for group in groups]
    drawn = [(prompt, sample) for prompt, sample in drawn if len(sample.token_ids)]
    count = min(count, len(drawn))
    return [drawn[i * (len(drawn) - 1) // max(1, count - 1)] for i in range(count)]


def measure(chosen: Sequence[tuple[Prompt, Sample]], learner: Learner, step: int) -> list[KeptSample]:
    """Ask the learner for the entropies, every tenth step: one forward pass over these rows alone, as not all of them are trained on."""
    if not chosen or step % MEASURED_EVERY:
        return [KeptSample(*pair, None) for pair in chosen]
    batch = rows_to_measure(chosen)
    entropies = learner.statistics(batch)["entropy"]
    return [
        KeptSample(*pair, row[mask].numpy()) for pair, row, mask in zip(chosen, entropies, batch.loss_mask, strict=True)
    ]


def _rounded(values: np.ndarray) -> list[float]:
    return [round(value, 3) for value in values.tolist()]
