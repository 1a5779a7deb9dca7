"""Answers benchmarks with the engine that a configuration names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from launchers.run.assemble import generator, hf_path, serve
from pipeline.config.errors import ConfigError
from pipeline.config.load import PACKAGED
from pipeline.config.schema import RunConfig
from pipeline.data import DataError
from pipeline.data.questions import Question
from pipeline.data.sources import to_prompt
from pipeline.data.tokenizer import load_tokenizer
from pipeline.evaluation.benchmark_run import DECODINGS, Settings, answer, figures, read_answers
from pipeline.evaluation.benchmarks import load_questions
from pipeline.rewards.stage import VerifierStage
from pipeline.rewards.verifier import inline
from pipeline.rollout.environment import environment_problems
from pipeline.types import Prompt

PASS_KS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Shard:
    """Questions ``index``, ``index + count``, ... of every benchmark."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``"2/8"``: the third of eight. Raises ``ValueError``."""
        index, _, count = text.partition("/")
        shard = cls(int(index), int(count))
        if not 0 <= shard.index < shard.count:
            raise ValueError(text)
        return shard


def answer_benchmarks(
    names: Sequence[str],
    config: RunConfig,
    run: Path | None,
    data: Path | None,
    out: Path,
    decoding: str,
    samples: int | None,
    shard: Shard,
    progress: Callable[[str, int, int], None],
) -> None:
    """Answer what is missing under ``out``; ``progress(name, done, all)`` is told after every batch.

    Each answer is an episode where the configuration has an environment. All questions are read before an engine
    starts. Raises ``ConfigError``, ``DataError`` and what ``serve`` raises.
    """
    if problems := list(environment_problems(config)):
        raise ConfigError.of(problems)
    temperature, top_p, default = DECODINGS[decoding]
    tokenizer = load_tokenizer(hf_path(config))
    plain = replace(config.data, examples=[], system_prompt="", verifier="auto")  # those belong to the training task
    prompts: dict[str, list[Prompt]] = {}
    for name in names:
        questions = load_questions(name, data)[shard.index :: shard.count]
        _check_judge(name, questions, config)
        prompts[name] = [to_prompt(question, plain, tokenizer) for question in questions]
        _check_lengths(name, prompts[name], config.rollout.max_prompt_tokens)
    with ExitStack() as stack:
        verifier = VerifierStage(plain, tokenizer)
        stack.callback(verifier.close)
        engine, step = serve(config, run, stack)
        settings = Settings(
            model=config.model.hf_path,
            step=step,
            temperature=temperature,
            top_p=top_p,
            samples=samples or default,
            max_new_tokens=config.rollout.max_new_tokens,
            seed=config.seed,
            environment=f"{config.data.environment.name} {config.data.environment.id}".rstrip(),
        )
        generate = generator(replace(config, data=plain), tokenizer, engine, stack)
        for name, asked in prompts.items():
            file = out / name / f"responses-{shard.index}-of-{shard.count}.jsonl"
            count = len(asked)
            told = partial(_told, progress, name, count)
            answer(asked, settings, file, generate, verifier, plain, told)


def _told(progress: Callable[[str, int, int], None], name: str, of: int, done: int) -> None:
    progress(name, done, of)


def _check_lengths(name: str, prompts: Sequence[Prompt], limit: int) -> None:
    longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
    if longest > limit:
        raise DataError(
            f"{name}: its longest question has {longest} tokens, rollout.max_prompt_tokens is {limit}: "
            f"raise it to {longest}; no question of a benchmark may be left out"
        )


def _check_judge(name: str, questions: Sequence[Question], config: RunConfig) -> None:
    """Raise ``DataError`` where the tools would have to judge what takes a process of its own."""
    apart = sorted({question.verifier for question in questions if not inline(question.verifier)})
    if apart and config.data.environment.name == "tools":
        raise DataError(
            f"{name}: its grader {', '.join(apart)} cannot judge within an episode (data.environment.name=tools): "
            "set data.environment.name=single, or use an environment of your own"
        )


def results(out: Path) -> list[dict[str, Any]]:
    """The figures of every benchmark answered under ``out``. Raises ``DataError``."""
    found = []
    for folder in sorted(path for path in out.iterdir() if path.is_dir()) if out.is_dir() else []:
        if not any(file.stat().st_size for file in folder.glob("responses-*.jsonl")):
            continue  # not begun
        settings, lines = read_answers(folder)
        if lines:
            ks = [k for k in PASS_KS if k <= settings.samples]
            found.append({"benchmark": folder.name, **vars(settings), **figures(lines, ks)})
    if not found:
        raise DataError(f"{out} holds no answered benchmark: run `isentrope benchmark run --out {out}` first")
    return found


def published(benchmark: str) -> list[dict[str, Any]]:
    """What papers report on it, or their averages for ``""``."""
    entries = yaml.safe_load((PACKAGED / "benchmark" / "published.yaml").read_text())
    return [entry for entry in entries if entry.get("benchmark", "") == benchmark]
