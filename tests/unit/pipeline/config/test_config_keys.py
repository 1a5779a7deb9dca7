"""Every key mistyped in turn: the error names the key that was meant."""

import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.errors import ConfigError
from pipeline.config.keys import leaf_keys, nearest_keys, schema_keys, typing_slips
from pipeline.config.load import load_config

FREE_FORM = "data.source.params"


def slips_of(key: str) -> list[str]:
    """Six ways to drop or change one letter of the key's last word that do not happen to spell another key."""
    section, dot, word = key.rpartition(".")
    draw = random.Random(key)
    dropped = [word[:i] + word[i + 1 :] for i in range(len(word)) if len(word) > 1]
    changed = [word[:i] + draw.choice(string.ascii_lowercase) + word[i + 1 :] for i in range(len(word))]
    slips = sorted({section + dot + slip for slip in (*dropped, *changed)} - set(schema_keys()))
    return draw.sample(slips, min(6, len(slips)))


@pytest.mark.parametrize("key", leaf_keys())
def test_a_mistyped_key_suggests_the_right_one(key):
    slips = slips_of(key)
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["model.hf_path=x", *(f"{slip}=1" for slip in slips)], check=False)
    assert [(p.key, p.value, p.problem) for p in caught.value.problems] == [(slip, 1, "unknown key") for slip in slips]
    assert [p.key for p in caught.value.problems if key not in p.remedy] == []


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lr", ["learner.optimizer.lr"]),
        ("learner.lr", ["learner.optimizer.lr"]),
        ("learnr", ["learner"]),
        ("entropy.pi.kx", ["entropy.pi.kp", "entropy.pi.ki"]),
        ("rollout.enigne", ["rollout.engine"]),
        ("wholly_different_thing", []),
    ],
)
def test_nearest_keys(typed, meant):
    assert nearest_keys(typed) == meant


@pytest.mark.parametrize(
    ("a", "b", "slips"),
    [
        ("", "abc", 3),
        ("band", "band", 0),
        ("band", "hand", 1),
        ("band", "bnad", 1),
        ("band", "bnd", 1),
        ("ab", "cba", 2),
    ],
)
def test_typing_slips_by_hand(a, b, slips):
    assert typing_slips(a, b) == slips


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_typing_slips_is_symmetric_and_bounded(a, b):
    assert typing_slips(a, b) == typing_slips(b, a)
    assert abs(len(a) - len(b)) <= typing_slips(a, b) <= max(len(a), len(b))
    assert (typing_slips(a, b) == 0) == (a == b)


def test_every_key_has_a_meaning():
    assert all(key.help for key in schema_keys().values())
    assert FREE_FORM in leaf_keys()
