import pytest

from launchers.plan.work import Work, from_config
from pipeline.config.load import PACKAGED, load_config
from pipeline.model import architecture


@pytest.fixture(scope="session")
def plan():
    """A model of configs/model with ``key=value`` overrides, as what one rank is given."""

    def make(model: str, *overrides: str, **expected) -> Work:
        keys = ["model.hf_path=x", "model.dtype=bf16", *overrides]
        config = load_config(None, keys, check=False)
        return from_config(architecture.read(PACKAGED / "model" / model), config, **expected)

    return make
