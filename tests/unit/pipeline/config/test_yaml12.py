"""What a configuration's text means: the rules of YAML 1.2, and that nothing ends in a library's words."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from launchers.slurm.cluster import load_cluster
from pipeline.config.errors import ConfigError
from pipeline.config.keys import leaf_keys
from pipeline.config.load import document, load_config, to_yaml
from pipeline.config.schema import RunConfig
from pipeline.config.yaml12 import Dumper, UnreadableError, compose, value_of

CLUSTER = "account: 0123\npartition: 1e3\nscratch: /s\nwalltime: 12:00:00\nqos: on\n"


def load(*overrides):
    return load_config(None, ["model.hf_path=x", *overrides], check=False)


def problem_of(*overrides):
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("-0", 0),
        ("0o17", 15),
        ("0x1F", 31),
        ("1e3", 1000.0),
        ("1.10", 1.1),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("12:00:00", "12:00:00"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("on", "on"),
        ("NO", "NO"),
        ("2026-11-28", "2026-11-28"),
        ("<<", "<<"),
        ("=", "="),
        ("true", True),
        ("~", None),
        ("", None),
    ],
)
def test_scalars(text, value):
    assert repr(value_of(compose(text))) == repr(value)


def test_a_text_key_keeps_what_was_written():
    assert load("name=007").name == "007"
    assert load("name=1e3").name == "1e3"
    assert load("rollout.sglang.extra_args=[--port, 010, '0x1F']").rollout.sglang.extra_args == [
        "--port",
        "010",
        "0x1F",
    ]
    assert load("steps=010").steps == 10
    assert problem_of("steps='010'").problem == "wrong type"
    assert problem_of("steps=1_0").problem == "wrong type"
    assert problem_of("monitoring.progress=off").remedy == "give true or false"


def test_a_cluster_file_keeps_what_was_written(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(
        CLUSTER
        + "sbatch: {time: 12:00:00, nice: 0100, hold: true}\nenv: {A: 010, C: 1e3, E: null, F: 1.10, G: true, H: }\n"
    )
    cluster = load_cluster(path, ["env.X=010", "env.Y=null", "sbatch={switches: 0o1}"])
    assert (cluster.account, cluster.partition, cluster.walltime, cluster.qos) == ("0123", "1e3", "12:00:00", "on")
    assert cluster.sbatch == {"time": "12:00:00", "nice": "0100", "hold": True, "switches": "0o1"}
    texts = {"A": "010", "C": "1e3", "E": "null", "F": "1.10", "G": "true", "H": ""}
    assert cluster.env == texts | {"X": "010", "Y": "null"}


@pytest.mark.parametrize("value", ["12:00:00", "007", "1e3", "0o17", "on", "null", "1.10", " a", "a: b", "# x", "é"])
def test_texts_come_back_as_they_were(value, tmp_path):
    config = load(f"data.system_prompt={yaml.dump(value, Dumper=Dumper).removesuffix('...' + chr(10))}")
    config.data.source.params = {"x": value}
    for write in (to_yaml, document):
        (tmp_path / "c.yaml").write_text(write(config))
        assert load_config(tmp_path / "c.yaml", check=False) == config


@pytest.mark.parametrize(
    ("text", "said", "remedy"),
    [
        ("a:\n\tb: 1\n", "line 2 has a tab", "indent with spaces"),
        ("a: 1\n\tb: 1\n", "line 2 has a tab", "indent with spaces"),
        ("steps:\t\t1\n", "line 1 has a tab", "indent with spaces"),
        ("steps: [1\n", "line 2, column 1", "mend it"),
        ("'': 1\n", "an empty key", "write key: value"),
        (
            "a: !!python/name:os.system x\n",
            "line 1, column 4: the tag tag:yaml.org,2002:python/name:os.system",
            "remove it",
        ),
        ("a: !!int x\n", "not what its tag says", "remove the tag"),
        ("? [a]\n: 1\n", "a key that is no text", "write key: value"),
        ("a: *b\n", "undefined alias", "mend it"),
        ("a: &a [*a]\n", "more than 64 levels", "remove some"),
        ("a: \x00\n", "holds the character '\\x00'", "remove it"),
        (f"steps: {'9' * 5000}\n", "a number of 5000 digits", "shorter"),
        ("[" * 900, "more than 64 levels", "remove some"),
        ("{a: " * 900, "more than 64 levels", "remove some"),
        ("- " * 900, "more than 64 levels", "remove some"),
        ("a: 1\n---\nb: 2\n", "line 2", "mend it"),
    ],
)
def test_what_cannot_be_read(tmp_path, text, said, remedy):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (problem,) = caught.value.problems
    assert said in problem.problem
    assert remedy in problem.remedy


def test_aliases_that_multiply_are_refused():
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(UnreadableError, match="more than 100000 entries"):
        compose("\n".join(lines))


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="it is not UTF-8"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("override", "key", "said"),
    [
        ("name=${", "name", "begins a reference"),
        ("name='${'", "name", "begins a reference"),
        (f"name={'${' * 300}", "name", "begins a reference"),
        ("name=${name}", "name", "leads nowhere"),
        ("name=${no.where}", "name", "leads nowhere"),
        ("name=${oc.env:HOME}", "name", "from outside the configuration"),
        ("data.source.params={a: '${oc.env:HOME}'}", "data.source.params.a", "from outside the configuration"),
        ("monitoring.sinks=['${ oc.env:HOME }']", "monitoring.sinks", "from outside the configuration"),
        ("name=${no_resolver:1}", "name", "from outside the configuration"),
        ("seed=${name}", "seed", "leads nowhere"),
    ],
)
def test_references_that_are_none(override, key, said):
    problem = problem_of(override)
    assert (problem.key, problem.source) == (key, "command line")
    assert said in problem.problem
    assert problem.remedy


KEYS = st.sampled_from([*leaf_keys(), "defaults", "data.source.params.a", "nowhere", "", "a[", "..", "rollout", "$"])
SCALARS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["${", "${seed}", "${name}", "~", "1e999", ".nan", "[", "{}", "'", "12:00", "9" * 40, "\t", "${a:b}"]
    ),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


def refused_or_read(path: Path | None, overrides: list[str], check: bool = True) -> None:
    problems = ()
    try:
        config = load_config(path, overrides, check=check)
    except ConfigError as error:
        problems = error.problems
    assert problems or isinstance(config, RunConfig)
    assert all(problem.key and problem.problem and problem.remedy for problem in problems)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(st.text(max_size=60) | st.text("[]{}:,-&*!|>'\"%@` \n\t#?=<~0aé$", max_size=40))
@example("\ufeffname: x")
@example("name: \x85")
@example("%YAML 9.9\n---\nname: x")
@example("!<x> a")
@example("? ")
def test_any_text_is_a_configuration_or_refused(tmp_path, text):
    path = tmp_path / "fuzz.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    refused_or_read(path, [])


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(KEYS, VALUES, max_size=4), st.booleans())
def test_any_values_are_a_configuration_or_refused(values, check):
    dumped = [
        f"{key}={yaml.safe_dump(value, allow_unicode=True).removesuffix('...' + chr(10))}"
        for key, value in values.items()
    ]
    refused_or_read(None, ["model.hf_path=model/pm4-100k", *dumped], check)


@settings(deadline=None, max_examples=100)
@given(KEYS, st.text(max_size=20))
def test_any_override_is_a_configuration_or_refused(key, text):
    refused_or_read(None, ["model.hf_path=model/pm4-100k", f"{key}={text}"])
