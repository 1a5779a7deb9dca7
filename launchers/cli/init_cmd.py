"""``isentrope init``: writes a first configuration for a model and a data file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launchers.cli.terminal import say
from pipeline.config.errors import ConfigError

if TYPE_CHECKING:
    from launchers.plan.propose import Facts
    from pipeline.config.schema import DataConfig
    from pipeline.data.tokenizer import Tokenizer
    from pipeline.evaluation.start import Start
    from pipeline.model.architecture import Architecture
    from pipeline.types import Prompt

MEASURED = 16  # prompts, with
SAMPLES = 4  # responses each, of at most
LONGEST = 256  # tokens
LARGEST = 1.5e9  # parameters that are measured unasked, on the CPU


def init(
    model: Path = typer.Argument(..., metavar="MODEL", help="Hugging Face folder of the model."),
    data: Path = typer.Argument(..., metavar="DATA", help="JSONL file: id, prompt or messages, answer a line."),
    out: Path = typer.Option(Path("my.yaml"), "--out", "-o", help="The configuration to write."),
    verifier: str = typer.Option("", "--verifier", help="What grades answers; default: what lines name, else math."),
    gpus: int = typer.Option(0, "--gpus", min=0, help="GPUs for learner and engines together; 0: train on the CPU."),
    gpu_gib: float = typer.Option(80.0, "--gpu-gib", min=1.0, help="Memory of one GPU, GiB."),
    measure: bool | None = typer.Option(
        None, "--measure/--no-measure", help="Draw responses on the CPU and measure the entropy; default: below 1.5B."
    ),
) -> None:
    """Write a commented configuration for a model and a data file, which validates as it is.

    Sizes come from both, the layout fits the GPUs named, and the band is proposed from the entropy that the model has
    on these data. Where few of its answers are right, the term that acts through right answers is averaged over all.

    Examples:

      isentrope init models/SmolLM2-135M math.jsonl

      isentrope init models/Qwen3-4B math.jsonl --gpus 8 -o qwen3.yaml
    """
    from launchers.plan import propose
    from pipeline.config.load import load_config
    from pipeline.data.sources import check_prompts, load_prompts, set_apart
    from pipeline.data.tokenizer import load_tokenizer

    if out.exists():
        raise ConfigError("--out", str(out), "this file exists", "choose another name, or remove it first")
    folder, sizes = _read(model)
    tokenizer = load_tokenizer(folder)
    chosen = _data(data, verifier, out, tokenizer)
    loaded = load_prompts(chosen, tokenizer, max_prompt_tokens=10**9)
    prompts = [*loaded.train, *loaded.held_out]
    facts = propose.Facts(
        model=sizes,
        folder=folder,
        data=data,
        prompts=len(prompts),
        longest=max(len(prompt.token_ids) for prompt in prompts),
        verifier=chosen.verifier,
        chat=chosen.chat_template,
        gpus=gpus,
        gpu_gib=gpu_gib,
        start=None,
    )
    if measure or (measure is None and facts.parameters <= LARGEST and sizes.moe is None and sizes.mla is None):
        facts = replace(facts, start=_measured(facts, prompts[:MEASURED], chosen, tokenizer))
    out.write_text(propose.text(facts, propose.keys(facts)))
    config = load_config(out)
    check_prompts(set_apart(prompts, config.data, config.rollout.max_prompt_tokens), config)
    band = config.entropy.band
    say(f"wrote {out}: {len(prompts)} prompts, band {band.low:g} to {band.high:g} nats per token")
    say(f"next: isentrope train --config {out}")


def _read(model: Path) -> tuple[Path, Architecture]:
    """The model's folder, and its sizes."""
    from pipeline.config.load import resolve_path
    from pipeline.model import architecture
    from pipeline.model.reading import ModelError

    folder = resolve_path(model)
    try:
        return folder, architecture.read(folder)
    except ModelError as error:
        raise ConfigError("MODEL", str(model), str(error), "give a Hugging Face folder that is served") from error


def _data(data: Path, verifier: str, out: Path, tokenizer: Tokenizer) -> DataConfig:
    """The section ``data`` of a run on this file."""
    from pipeline.config.schema import DataConfig

    chosen = DataConfig()
    chosen.source.kind, chosen.source.path = "jsonl", str(data.absolute())
    chosen.chat_template = tokenizer.has_template
    chosen.verifier = verifier or ("auto" if _names_verifiers(data) else "math")
    chosen.verifier_folder = str(out.absolute().parent)  # where a run from that file looks for modules
    return chosen


def _measured(facts: Facts, prompts: Sequence[Prompt], data: DataConfig, tokenizer: Tokenizer) -> Start:
    from pipeline.evaluation.start import measure
    from pipeline.rewards.stage import VerifierStage

    say(f"measuring the entropy of {len(prompts)} prompts x {SAMPLES} responses on the CPU", err=True)
    limit = min(LONGEST, facts.model.max_positions - facts.longest)
    with closing(VerifierStage(data, tokenizer)) as verifier:
        return measure(facts.folder, prompts, verifier, samples=SAMPLES, max_new_tokens=limit)


def _names_verifiers(data: Path) -> bool:
    """Whether the first line of a data file names its verifier; a bad one is reported by its reader, later."""
    try:
        with data.open(encoding="utf-8") as lines:
            first = json.loads(next(lines, "{}"))
    except (OSError, ValueError):
        return True
    return isinstance(first, dict) and "verifier" in first
