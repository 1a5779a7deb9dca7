"""One answer to one prompt, judged by the prompt's verifier: no tools, no turns, nothing between the engines and the
step.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.errors import Problem
from pipeline.config.schema import RunConfig

APART = False


def problems(config: RunConfig) -> Iterator[Problem]:
    """An environment that is not there needs no settings."""
    given = config.data.environment
    if given.id or given.params:
        yield Problem(
            "data.environment.id" if given.id else "data.environment.params",
            given.id or given.params,
            "has no effect with data.environment.name=single",
            "remove it, or name the environment it is meant for, e.g. data.environment.name=function",
        )
