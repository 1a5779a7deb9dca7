"""Keys that other trainers call otherwise are answered with what to write."""

import re

import pytest

from pipeline.config.errors import ConfigError
from pipeline.config.keys import schema_keys
from pipeline.config.load import load_config
from pipeline.config.synonyms import MEANT


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("temperature=0.7", "drawn at T=1"),
        ("rollout.top_p=0.9", "untruncated policy"),
        ("stop=[x]", "rollout.stop"),
        ("learner.lr=1e-6", "learner.optimizer.lr"),
        ("batch_size=256", "rollout.prompts_per_step and rollout.samples_per_prompt"),
        ("kl=0.01", "objective.kl_coef"),
        ("entropy.target_entropy=0.3", "entropy.band.low and entropy.band.high"),
    ],
)
def test_near_synonyms_say_what_to_write(given, written):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [given], check=False)
    (problem,) = caught.value.problems
    assert problem.key == given.partition("=")[0]
    assert written in problem.remedy
    assert "did you mean" not in problem.remedy


def test_every_key_that_an_answer_names_exists():
    named = {key for text in MEANT.values() for key in re.findall(r"\b[a-z]\w*(?:\.\w+)+", text)}
    named -= {"module.function", "e.g"}
    assert named
    assert named <= set(schema_keys())


def test_a_section_given_a_value_names_a_key_of_it():
    with pytest.raises(ConfigError, match=r"give a section of keys, e\.g\. model\.hf_path"):
        load_config(None, ["model=Qwen3-4B"], check=False)
