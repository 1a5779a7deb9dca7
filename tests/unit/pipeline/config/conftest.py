import json

import pytest

from pipeline.config.errors import ConfigError
from pipeline.config.load import load_config
from tests.tiny_folder import LLAMA


@pytest.fixture
def model(tmp_path):
    """A folder whose ``config.json`` the rules accept."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


@pytest.fixture
def problems(model):
    """Everything that is wrong with overrides of the defaults; ``changes`` to the model's ``config.json``."""

    def found(*overrides, **changes):
        if changes:
            (model / "config.json").write_text(json.dumps(LLAMA | changes))
        try:
            load_config(None, [f"model.hf_path={model}", *overrides])
        except ConfigError as error:
            return error.problems
        return ()

    return found


@pytest.fixture
def refused(problems):
    """That one problem alone is found, of ``key``, whose text has ``words``."""

    def check(overrides, key, words, **changes):
        (problem,) = problems(*overrides, **changes)
        assert problem.key == key
        assert words in problem.problem
        assert problem.remedy

    return check
