"""Measures by emulation what FP8 does to a real model's log-probs, entropy and gradient.

Run it with `python tools/bench/fp8_effect.py`.

    python tools/make_smollm2.py                       # the model's folder, once
    python tools/bench/fp8_effect.py --json runs/fp8_effect.json

Questions of the SmolLM2 recipe (no examples, no system prompt, so that answers have some length), answered by the
in-process engine at T=1; then each recipe's model reads the same tokens. Against the float32 model, over the response
tokens: |difference of log-probs| (mean, 99th percentile, largest), KL(float32 || FP8), mean difference of entropies;
and the gradient of sum(+-log-prob), signs by turns from row to row, over all weights of the linear layers: its cosine
to and its length relative to float32's. `bf16` is the same model in bfloat16, FP8 off. Activations and sums of the FP8
rows are float32, so that FP8 alone is seen. `delayed` sees the batch twice first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from megatron_ext import models, topology
from megatron_ext.weights import hf
from pipeline.config.load import load_config
from pipeline.config.schema import LearnerConfig, PrecisionConfig
from pipeline.data.sources import load_prompts
from pipeline.data.tokenizer import load_tokenizer
from pipeline.model import architecture, layout
from pipeline.model.grid import Grid
from pipeline.ports import free_port
from pipeline.rollout.native.engine import NativeEngine
from pipeline.types import GenerateRequest

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
ROWS: dict[str, tuple[str, PrecisionConfig]] = {
    "bf16": ("bf16", PrecisionConfig()),
    **{
        f"{recipe}, {fp8}": ("fp32", PrecisionConfig(fp8=fp8, fp8_recipe=recipe, emulate=True))
        for recipe in RECIPES
        for fp8 in ("hybrid", "e4m3")
    },
    "blockwise, hybrid, first and last layer bf16": (
        "fp32",
        PrecisionConfig(fp8="hybrid", fp8_recipe="blockwise", emulate=True, first_last_layers_bf16=True),
    ),
}
COLUMNS = ("dlogp mean", "p99", "max", "KL", "dH mean", "gradient cosine", "gradient length")


def responses(
    recipe: Path, folder: Path, prompts: int, samples: int, new_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``[rows, seq]`` and the mask ``[rows, seq - 1]`` of the response tokens among ``tokens[:, 1:]``."""
    overrides = [f"model.hf_path={folder}", "data.examples=[]", "data.system_prompt=''"]
    config = load_config(recipe, overrides)
    tokenizer = load_tokenizer(folder)
    questions = load_prompts(config.data, tokenizer, max_prompt_tokens=config.rollout.max_prompt_tokens).train[:prompts]
    engine = NativeEngine()
    engine.start(folder)
    requests = [
        GenerateRequest(prompt, tuple(range(samples * i, samples * (i + 1))), 1.0, new_tokens)
        for i, prompt in enumerate(questions)
    ]
    rows = [
        (request.prompt.token_ids, sample.token_ids)
        for request, group in zip(requests, engine.generate(requests), strict=True)
        for sample in group.samples
    ]
    length = max(len(question) + len(answer) for question, answer in rows)
    tokens = torch.full((len(rows), length), tokenizer.pad_token_id)
    mask = torch.zeros(len(rows), length - 1, dtype=torch.bool)
    for row, (question, answer) in enumerate(rows):
        end = len(question) + len(answer)
        tokens[row, :end] = torch.from_numpy(np.concatenate([question, answer]))
        mask[row, len(question) - 1 : end - 1] = True
    return tokens, mask


class Reader:
    """The model under one of ``ROWS``: its distributions over the response tokens and its gradient."""

    def __init__(self, folder: Path, placed: topology.Topology, dtype: str, precision: PrecisionConfig) -> None:
        model = architecture.read(folder)
        self._vocab = model.vocab
        self._gpt = models.build(
            model, placed, dtype, options=LearnerConfig(transformer_impl="local", precision=precision)
        )
        parameters = models.global_parameters(self._gpt)
        hf.load(parameters, layout.rows(model, placed.grid), model, folder, placed)
        self._linear = [p for name, p in parameters.items() if ".linear_" in name and p.ndim == 2]
        self._passes = 2 if precision.fp8_recipe == "delayed" and precision.emulate else 0

    def read(self, tokens: torch.Tensor, mask: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the whole vocabulary ``[n, vocab]`` at the response tokens, and the gradient, flat; float32."""
        for _ in range(self._passes):
            self._backward(tokens, mask, batch)
        with torch.no_grad():
            parts = [self._log_probs(rows, where) for rows, where in _batches(tokens, mask, batch)]
        return torch.cat(parts), self._backward(tokens, mask, batch)

    def _backward(self, tokens: torch.Tensor, mask: torch.Tensor, batch: int) -> torch.Tensor:
        self._gpt.zero_grad()
        for first, (rows, where) in enumerate(_batches(tokens, mask, batch)):
            signs = 1 - 2 * ((first * batch + torch.arange(len(rows))) % 2)
            log_probs = self._log_probs(rows, where).gather(-1, rows[:, 1:][where][:, None])[:, 0]
            (-(log_probs * signs[:, None].expand(where.shape)[where]).sum() / mask.sum()).backward()
        return torch.cat([p.grad.float().flatten() for p in self._linear])

    def _log_probs(self, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        logits = self._gpt(rows[:, :-1], None, None)[where]
        return logits[:, : self._vocab].float().log_softmax(-1)


def _batches(tokens: torch.Tensor, mask: torch.Tensor, size: int):
    return zip(tokens.split(size), mask.split(size), strict=True)


def compare(found: tuple, exact: tuple, targets: torch.Tensor) -> dict[str, float]:
    """One line of the table."""
    (log_probs, gradient), (expected, direction) = found, exact
    gap = (log_probs - expected).gather(-1, targets[:, None])[:, 0].abs()
    kl = (expected.exp() * (expected - log_probs)).sum(-1)
    entropy = [-(values.exp() * values).sum(-1) for values in (log_probs, expected)]
    lengths = gradient.double().norm(), direction.double().norm()
    figures = (
        gap.mean(),
        gap.quantile(0.99),
        gap.max(),
        kl.mean(),
        (entropy[0] - entropy[1]).mean(),
        gradient.double() @ direction.double() / (lengths[0] * lengths[1]),
        lengths[0] / lengths[1],
    )
    return dict(zip(COLUMNS, map(float, figures), strict=True))


def main() -> None:
    """Draw the responses, read them under every recipe, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/models/smollm2-135m-instruct"))
    parser.add_argument("--config", type=Path, default=Path("recipe/smollm2_135m_cpu.yaml"), help="whose questions")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2, help="responses to each prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="length limit of a response")
    parser.add_argument("--batch", type=int, default=8, help="rows of one pass")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        sys.exit(f"{arguments.model}: no model folder. Remedy: python tools/make_smollm2.py, or --model FOLDER")
    tokens, mask = responses(
        arguments.config, arguments.model, arguments.prompts, arguments.samples, arguments.new_tokens
    )
    targets = tokens[:, 1:][mask]
    placed = topology.initialize(0, ("127.0.0.1", free_port()), Grid(), seed=0)
    exact = Reader(arguments.model, placed, "fp32", PrecisionConfig()).read(tokens, mask, arguments.batch)
    entropy = float(-(exact[0].exp() * exact[0]).sum(-1).mean())
    print(f"{len(tokens)} responses, {len(targets)} tokens, entropy {entropy:.4f} nats\n")
    print("| | " + " | ".join(COLUMNS) + " |\n|---|" + "---|" * len(COLUMNS))
    table = {}
    for name, (dtype, precision) in ROWS.items():
        found = Reader(arguments.model, placed, dtype, precision).read(tokens, mask, arguments.batch)
        table[name] = compare(found, exact, targets)
        print(f"| {name} | " + " | ".join(f"{value:.3g}" for value in table[name].values()) + " |", flush=True)
    topology.shutdown()
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"responses": len(tokens), "tokens": len(targets), "entropy": entropy, "rows": table}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
