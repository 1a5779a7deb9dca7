"""The problems that an environment brings with it: a ``verifiers`` dataset, or the seeds of an OpenEnv server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pipeline.config.schema import DataConfig
from pipeline.data import DataError
from pipeline.data.questions import Question
from pipeline.rewards.own_function import own_function


def environment_questions(data: DataConfig) -> list[Question]:
    """The problems of ``data.environment``, in its order. Raises ``DataError`` where it has none of its own."""
    name = data.environment.name
    if name == "verifiers":
        return list(_verifiers_questions(data))
    if name == "openenv":
        seeds = range(data.source.seed, data.source.seed + data.source.size)
        return [Question(f"openenv/{seed}", "", "exact", text=str(seed), meta={"seed": seed}) for seed in seeds]
    raise DataError(
        f"data.source.kind=environment: data.environment.name={name} brings no problems of its own: use verifiers or "
        "openenv, or another source"
    )


def verifiers_environment(data: DataConfig) -> Any:
    """The ``verifiers.Environment`` that ``data.environment.id`` names; loaded once in a process.

    Its package, or a module beside the configuration, has ``load_environment``, as the library asks for. Raises
    ``DataError``.
    """
    given = data.environment
    return _loaded(given.id, data.verifier_folder, json.dumps(given.params, sort_keys=True, default=str))


@cache
def _loaded(name: str, folder: str, params: str) -> Any:
    try:
        import datasets
        import verifiers
    except ImportError as error:
        raise DataError(f"data.environment.name=verifiers: {error}: pip install 'isentrope[verifiers]'") from error
    datasets.disable_progress_bars()  # every process would draw its own
    module = name.replace("-", "_").rpartition("/")[2]  # as the library has it
    named = json.loads(params)
    own_function(f"{module}:load_environment", folder, f"environment {name!r}", (), named)
    try:
        return verifiers.load_environment(name, **named)
    except Exception as error:  # whatever its own code raises
        raise DataError(f"data.environment.id={name!r} cannot be loaded: {error}") from error


def _verifiers_questions(data: DataConfig) -> Iterator[Question]:
    """Rows to train on, then the environment's own rows for evaluation, which are held out; without these by id."""
    environment = verifiers_environment(data)
    try:
        rows, apart = environment.build_dataset(), environment.build_eval_dataset()
    except Exception as error:  # whatever its own code raises
        raise DataError(f"data.environment.id={data.environment.id!r}: its rows cannot be built: {error}") from error
    if rows is None:
        raise DataError(f"data.environment.id={data.environment.id!r} has no rows to train on: use another source")
    for number, row in enumerate(rows):
        yield _question(row, f"{data.environment.id}/{number}", data, held_out=None if apart is None else False)
    for number, row in enumerate(apart or ()):
        yield _question(row, f"{data.environment.id}/eval/{number}", data, held_out=True)


def _question(row: Mapping[str, Any], name: str, data: DataConfig, *, held_out: bool | None) -> Question:
    """A row; a model without a chat template is asked for what its messages say."""
    rest = {key: value for key, value in row.items() if key not in ("prompt", "answer")}
    given = row["prompt"]
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    messages = [{key: value for key, value in message.items() if value is not None} for message in given]
    if not all(isinstance(message.get("content", ""), str) for message in messages):
        raise DataError(f"row {name} of data.environment.id has more than text: the model reads text only")
    asked: dict[str, Any] = {"messages": tuple(messages)}
    if not data.chat_template:  # as the library's own client does
        asked = {"text": "\n\n".join(message.get("content", "") for message in messages)}
    return Question(name, row.get("answer", ""), "exact", meta=rest, held_out=held_out, **asked)
