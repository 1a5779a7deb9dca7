"""Tools of ours, in this process: a calculator and a checker that says whether an answer is right.

A chat model is offered both as functions and ends the episode with an answer without a call; the prompt's verifier
judges that answer. A model without a chat template just answers: as long as the verifier says that an answer is wrong,
``params.reply`` (default ``-=``) follows it and the model answers again.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipeline.config.errors import Problem
from pipeline.config.schema import DataConfig, RunConfig
from pipeline.rewards.verifier import inline, make_verifier
from pipeline.rollout.environment import tool_problems
from pipeline.rollout.recording.recording import Recording
from pipeline.types import Prompt

APART = False
REPLY = "-="  # to a wrong answer of a model without a chat template
LONGEST = 200  # characters of an expression
DEEPEST = 32  # nested operations

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluates an arithmetic expression of numbers, + - * / and parentheses.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "For example (1 + 2) * 3."}},
            "required": ["expression"],
        },
    },
}
CHECK = {
    "type": "function",
    "function": {
        "name": "check",
        "description": "Says whether an answer is right or wrong.",
        "parameters": {
            "type": "object",
            "properties": {"answer": {"type": "string", "description": "The answer to check."}},
            "required": ["answer"],
        },
    },
}
_OPERATIONS: Mapping[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def problems(config: RunConfig) -> Iterator[Problem]:
    """What it knows of ``id`` and ``params``, and which verifiers may judge in this process."""
    data = config.data
    if data.environment.id:
        yield Problem("data.environment.id", data.environment.id, "the tools have no id", "remove it")
    for name, value in data.environment.params.items():
        if name != "reply" or not isinstance(value, str) or not value:
            remedy = "the one parameter is reply, the text that follows a wrong answer"
            yield Problem(f"data.environment.params.{name}", value, "not a parameter of the tools", remedy)
    if data.verifier != "auto" and not inline(data.verifier):
        yield Problem(
            "data.verifier",
            data.verifier,
            "cannot judge within an episode: it needs a process of its own",
            "use one of choice, countdown and exact, or your own environment (data.environment.name=function)",
        )
    if data.chat_template:
        yield from tool_problems(config, (CALCULATOR, CHECK))


async def run(recording: Recording, prompt: Prompt, data: DataConfig) -> object:
    """The reward of the last answer, as the prompt's verifier has it."""
    if prompt.messages:
        return await _with_functions(recording, prompt)
    reply = recording.encode(data.environment.params.get("reply", REPLY))
    said = prompt.token_ids
    while True:
        answer = await recording.complete(said)
        reward = score(prompt, answer.text)
        if reward == 1.0:
            return reward
        if recording.turns_left == 0:
            recording.ended = "turn_limit"
            return reward
        said = (*said, *answer.drawn.token_ids.tolist(), *reply)


async def _with_functions(recording: Recording, prompt: Prompt) -> float:
    messages: list[Any] = list(prompt.messages)
    while True:
        answer = await recording.chat(messages, (CALCULATOR, CHECK))
        if not answer.tool_calls:
            return score(prompt, answer.text)
        messages.append(answer.message)
        for call, name in zip(answer.tool_calls, answer.call_ids, strict=True):
            messages.append(
                {"role": "tool", "tool_call_id": name, "content": called(prompt, call.name, call.arguments)}
            )


def score(prompt: Prompt, text: str) -> float:
    """Reward in [0, 1] of an answer. Raises ``ValueError`` where the verifier cannot judge here."""
    if not inline(prompt.verifier):
        raise ValueError(f"verifier {prompt.verifier!r} needs a process of its own and cannot judge within an episode")
    return float(make_verifier(prompt.verifier).score(prompt, text))


def called(prompt: Prompt, name: str, arguments: Mapping[str, Any]) -> str:
    """What a tool answers; an error is an answer too, which the model may mend."""
    if name == "calculator":
        return calculated(str(arguments.get("expression", "")))
    if name == "check":
        return "right" if score(prompt, str(arguments.get("answer", ""))) == 1.0 else "wrong"
    return f"error: there is no tool {name!r}; use calculator or check"


def calculated(expression: str) -> str:
    """The value of an expression of numbers, + - * / and parentheses, without running any of it as code."""
    try:
        if len(expression) > LONGEST:
            raise ValueError(f"an expression has at most {LONGEST} characters")
        return f"{_value(ast.parse(expression.strip(), mode='eval').body, DEEPEST):.12g}"
    except (ArithmeticError, MemoryError, RecursionError, SyntaxError, ValueError) as error:
        return f"error: {error}"


def _value(node: ast.expr, depth: int) -> float:
    if not depth:
        raise ValueError("too many nested operations")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)  # type: ignore[arg-type]  # so says the line above
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left, depth - 1), _value(node.right, depth - 1))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.operand, depth - 1))
    raise ValueError("only numbers, + - * / and parentheses are known")
