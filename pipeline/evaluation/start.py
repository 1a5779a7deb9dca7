"""Where a policy starts: its exact entropy, and lengths and grades of its responses, on the prompts of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.model import architecture, layout
from pipeline.model.folder import Folder
from pipeline.rewards.stage import VerifierStage
from pipeline.rollout.native.decoder import token_entropies
from pipeline.rollout.native.engine import NativeEngine
from pipeline.rollout.native.fallback import decoder_of
from pipeline.seeds import sample_seeds
from pipeline.types import GenerateRequest, Prompt, Role


@dataclass(frozen=True)
class Start:
    """What was measured, at T=1."""

    entropy: float  # nats per response token, exact over the vocabulary
    tokens: int  # response tokens measured
    mean_length: float  # tokens of a response
    truncated: float  # share of responses that ran into the limit
    graded: int  # responses that the verifier could judge
    right: int  # of these


def measure(
    folder: Path,
    prompts: Sequence[Prompt],
    verifier: VerifierStage,
    *,
    samples: int,
    max_new_tokens: int,
    seed: int = 0,
) -> Start:
    """Draw ``samples`` responses to each prompt with the native engine, on the CPU, measure their entropy, grade them.

    ``folder`` is a Hugging Face folder of a model that is served. Raises ``EngineError`` where the engine refuses it.
    """
    engine = NativeEngine()
    engine.start(folder)
    requests = [
        GenerateRequest(
            prompt, sample_seeds(seed, 0, prompt.id, samples, Role.EVALUATION), 1.0, max_new_tokens, Role.EVALUATION
        )
        for prompt in prompts
    ]
    groups = verifier.verify(engine.generate(requests))
    engine.close()
    model = architecture.read(folder)
    stored = Folder(folder, model)
    decoder = decoder_of(model, folder, {name: stored.tensor(name) for name in layout.tensor_shapes(model)})
    total, drawn = 0.0, [sample for group in groups for sample in group.samples]
    for group in groups:
        for sample in group.samples:
            row = torch.tensor([[*group.prompt.token_ids, *sample.token_ids.tolist()]])
            total += float(token_entropies(decoder, row)[0, len(group.prompt.token_ids) - 1 :].sum())
    tokens = sum(len(sample.token_ids) for sample in drawn)
    cut = sum(sample.finish_reason == "length" for sample in drawn)
    graded = [sample for sample in drawn if not sample.verifier_error]
    right = sum(sample.correct for sample in graded)
    return Start(total / tokens, tokens, tokens / len(drawn), cut / len(drawn), len(graded), right)
