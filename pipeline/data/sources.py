"""From a data configuration to tokenized training and held-out prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from pipeline.config.load import resolve_path
from pipeline.config.schema import DataConfig, RunConfig
from pipeline.data import DataError
from pipeline.data.countdown import countdown_task
from pipeline.data.environment_rows import environment_questions
from pipeline.data.gym import generate_questions
from pipeline.data.jsonl import Fault, examine_jsonl, read_jsonl
from pipeline.data.questions import Question
from pipeline.data.tokenizer import Message, Tokenizer
from pipeline.rewards.verifier import check_verifier
from pipeline.types import Prompt


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their source. No id occurs twice."""

    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    dropped_too_long: int  # prompts of more than ``rollout.max_prompt_tokens`` tokens


def load_prompts(config: DataConfig, tokenizer: Tokenizer, *, max_prompt_tokens: int) -> PromptSet:
    """Read or generate the prompts of ``config.source``, tokenize them and set the held-out ones apart.

    Which prompts are held out depends on their ids alone, so a growing file never moves one from one side to the other;
    the countdown task has its own fixed split. Raises ``DataError`` (bad source, no prompt left) and
    ``UnknownVerifierError``.
    """
    if config.verifier != "auto":
        check_verifier(config.verifier, config.verifier_folder)
    questions = read_questions(config)
    fixed = {question.id: question.held_out for question in questions if question.held_out is not None}
    prompts = (to_prompt(question, config, tokenizer) for question in questions)
    return set_apart(prompts, config, max_prompt_tokens, fixed)


def set_apart(
    prompts: Iterable[Prompt], config: DataConfig, max_prompt_tokens: int, fixed: Mapping[str, bool] | None = None
) -> PromptSet:
    """Divide tokenized prompts into training and held-out ones, and drop those that are too long.

    ``fixed`` has the side of prompts (id -> held out) whose source divides them itself. Raises ``DataError`` where no
    training prompt is left.
    """
    train: list[Prompt] = []
    held_out: list[Prompt] = []
    dropped = 0
    for prompt in prompts:
        if len(prompt.token_ids) > max_prompt_tokens:
            dropped += 1
            continue
        apart = fixed[prompt.id] if fixed and prompt.id in fixed else _held_out(prompt.id, config.held_out)
        (held_out if apart else train).append(prompt)
    if not train:
        raise DataError(
            f"data.source.kind={config.source.kind}: no training prompt is left: {len(held_out)} are held out "
            f"(data.held_out={config.held_out}) and {dropped} exceed rollout.max_prompt_tokens={max_prompt_tokens}"
        )
    return PromptSet(tuple(train), tuple(held_out), dropped)


def check_prompts(prompts: PromptSet, config: RunConfig) -> None:
    """Raise ``DataError`` where the run that ``config`` describes could not be done on ``prompts``.

    A step never holds a prompt twice, and an evaluation and a repeated reading need held-out prompts.
    """
    per_step, evaluation = config.rollout.prompts_per_step, config.evaluation
    if per_step > len(prompts.train):
        raise DataError(
            f"rollout.prompts_per_step={per_step} exceeds the {len(prompts.train)} training prompts "
            f"({len(prompts.held_out)} are held out, {prompts.dropped_too_long} exceed rollout.max_prompt_tokens): "
            "lower it or add prompts (a step never holds a prompt twice)"
        )
    wanted = {"every": evaluation.every, "at_start": evaluation.at_start, "at_end": evaluation.at_end}
    if any(wanted.values()) and not prompts.held_out:
        settings = ", ".join(f"evaluation.{name}={value}" for name, value in wanted.items() if value)
        raise DataError(
            f"data.held_out={config.data.held_out} leaves no held-out prompt of {len(prompts.train)}, but {settings}: "
            "raise data.held_out or add prompts, or set evaluation.every=0, at_start=false and at_end=false"
        )
    if config.entropy.repeated_prompts > len(prompts.held_out):
        raise DataError(
            f"entropy.repeated_prompts={config.entropy.repeated_prompts} exceeds the {len(prompts.held_out)} "
            f"held-out prompts (data.held_out={config.data.held_out}): lower it, or raise data.held_out"
        )


def examine_questions(config: DataConfig) -> tuple[Sequence[Question], list[Fault]]:
    """The questions of ``config.source`` that can be used, in its order, and the lines of a file that cannot.

    Raises ``DataError`` where there is nothing to read.
    """
    if config.verifier != "auto":
        check_verifier(config.verifier, config.verifier_folder)
    if config.source.kind == "jsonl":
        return examine_jsonl(resolve_path(config.source.path), config)
    return read_questions(config), []


def read_questions(config: DataConfig) -> Sequence[Question]:
    """The questions of ``config.source``, in its order. Raises ``DataError``."""
    source = config.source
    if source.kind == "countdown":
        return _countdown_questions(source.task, config.held_out, easy_first=config.order == "source")
    if source.kind == "reasoning_gym":
        return generate_questions(source.task, source.size, source.params, source.seed)
    if source.kind == "jsonl":
        return read_jsonl(resolve_path(source.path), config)
    return environment_questions(config)


def _countdown_questions(name: str, share: float, *, easy_first: bool) -> list[Question]:
    """Every problem of a task, in its own order or those of few different digits first."""
    task = countdown_task(name)
    different = [len(set(digits)) if easy_first else 0 for digits in task.digits.tolist()]
    order = np.argsort(different, kind="stable").tolist()
    problems = [task.problem(index) for index in order]
    return [
        Question(
            id=f"{name}/{problem}",
            answer=problem,
            verifier="countdown",
            text=f"{problem}=",
            meta={"operators": task.operators},
            held_out=bool(apart),
        )
        for problem, apart in zip(problems, task.held_out(share)[order], strict=True)
    ]


def to_prompt(question: Question, config: DataConfig, tokenizer: Tokenizer) -> Prompt:
    """Tokenize: plain text as it is, a conversation (or any text with ``chat_template``) through the chat template.

    Raises ``DataError`` naming the prompt where it has no tokens, or the model cannot take them.
    """
    chat = bool(question.messages) or config.chat_template
    text = question.text
    messages: tuple[Message, ...] = ()
    try:
        if chat:
            messages = _conversation(question, config)
            text = tokenizer.render_chat(
                messages, template=template_text(config.chat_template_file), variables=config.chat_template_kwargs
            )
        token_ids = tokenizer.encode_rendered(text) if chat else tokenizer.encode(text)
    except DataError as error:
        raise DataError(f"prompt {question.id!r}: {error}") from error
    if not token_ids:
        raise DataError(f"prompt {question.id!r} has no tokens: {text!r}")
    verifier = question.verifier if config.verifier == "auto" else config.verifier
    return Prompt(question.id, token_ids, text, question.answer, verifier, question.meta, messages)


def _conversation(question: Question, config: DataConfig) -> tuple[Message, ...]:
    """The system message, the examples and the question."""
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    messages = question.messages or ({"role": "user", "content": question.text},)
    return (*system, *_example_turns(config), *messages)


@cache
def template_text(path: str) -> str:
    """The text of ``data.chat_template_file``; "" where none is named. Raises ``DataError``."""
    try:
        return resolve_path(path).read_text(encoding="utf-8") if path else ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template_file={path}: cannot be read ({error}): give a Jinja file") from error


def _example_turns(config: DataConfig) -> Iterator[Message]:
    for question, answer in config.examples:
        yield {"role": "user", "content": question}
        yield {"role": "assistant", "content": answer}


def _held_out(prompt_id: str, share: float) -> bool:
    """Whether the hash of the id, uniform in [0, 1), is below ``share``."""
    digest = hashlib.blake2b(f"held-out/{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64 < share
