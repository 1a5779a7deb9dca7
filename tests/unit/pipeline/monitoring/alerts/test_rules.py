"""Rule files: the shipped ones, a user's, and what is refused."""

from dataclasses import replace

import pytest

from pipeline.config.errors import ConfigError
from pipeline.config.schema import AlertsConfig
from pipeline.monitoring.alerts.bounds import Bound, parse_bound
from pipeline.monitoring.alerts.rules import SHIPPED, load_rules

GOOD = "severity: info\nmessage: H={entropy/mean:.3g}\nremedy: none\nwhen: {metric: entropy/mean, above: 1}\n"


def names(rules):
    return [rule.name for rule in rules]


def problems(tmp_path, text, name="mine"):
    (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_rules(AlertsConfig(rules=str(tmp_path)))
    assert all(problem.source == str(tmp_path / f"{name}.yaml") for problem in caught.value.problems)
    return [(problem.key, problem.problem, problem.remedy) for problem in caught.value.problems]


def test_every_shipped_file_is_a_rule_with_a_remedy():
    rules = load_rules(AlertsConfig())
    assert sorted(names(rules)) == sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    assert {"not_reachable", "exploding", "wrong_sign"} <= set(names(rules))
    for rule in rules:
        assert len(rule.config.remedy) > 30
        assert "nothing" not in rule.describe()


def test_a_rule_comes_after_those_that_silence_it():
    order = names(load_rules(AlertsConfig()))
    assert order.index("out_of_band") > order.index("entropy_collapse")
    assert order.index("saturated") > order.index("not_reachable")


def test_a_users_file_adds_a_rule_or_replaces_a_shipped_one(tmp_path):
    (tmp_path / "mine.yaml").write_text(GOOD)
    (tmp_path / "out_of_band.yaml").write_text("defaults: [alerts/out_of_band.yaml]\nsteps: 77\n")
    rules = {rule.name: rule for rule in load_rules(AlertsConfig(rules=str(tmp_path)))}
    shipped = {rule.name: rule for rule in load_rules(AlertsConfig())}
    assert set(rules) == {*shipped, "mine"}
    assert rules["out_of_band"].config == replace(shipped["out_of_band"].config, steps=77)
    assert rules["mine"].describe() == "entropy/mean above 1"


def test_rules_can_be_turned_off():
    rules = load_rules(AlertsConfig(off=["entropy_collapse", "stall"]))
    assert not {"entropy_collapse", "stall"} & set(names(rules))
    assert "out_of_band" in names(rules), "a rule that is silenced by one turned off"


@pytest.mark.parametrize(
    ("change", "key", "problem", "remedy"),
    [
        ("stepz: 3", "stepz", "unknown key", "did you mean steps?"),
        ("severity: critcal", "severity", "not one of info, warning, critical", "did you mean 'critical'?"),
        ("steps: 0", "steps", "out of range", "at least 1"),
        ("after: never", "after", "not one of start, entry", "choose one"),
        ("message: 'H={entropy/mean'", "message", "not a template", "write e.g."),
        ("when: {metric: entropy/mean}", "when", "a metric without a bound", "give above, below, or both"),
        ("when: {metric: entropy/mean, above: high}", "when.above", "'high' is no metric name", "write a number"),
        ("when: {metric: entropy/mean, above: 2 * 3}", "when.above", "'3' is no metric name", "write a number"),
        ("when: {metric: entropy/mean, above: 1, smooth: 1}", "when.smooth", "out of range", "below 1"),
        ("when: {metric: entropy/mean, above: 1, take: rate}", "when.window", "one step has no rate", "at least 2"),
        ("when: {metric: entropy/mean, above: 1, swings: 3}", "when.swings", "swings between what?", "above and below"),
        ("when: {metric: entropy/mean, above: 1, event: stall}", "when", "looks at metric and event", "give one"),
        ("when: {above: 1}", "when", "looks at nothing", "give one of metric"),
        ("when: {state: saturated, above: 1}", "when.above", "has an effect on a metric only", "remove it"),
        ("when: {state: saturated, window: 9}", "when.window", "has no effect on a state", "remove it"),
        ("when: {metric: since/step, above: 9}\nsteps: 4", "steps", "goes by time", "set steps to 1"),
        ("guard: {event: fault}", "guard.event", "a condition of its own", "in `when`"),
        ("unless: [stal]", "unless", "no such rule", "did you mean stall?"),
        ("unless: [mine]", "unless", "silence each other in a circle", "remove one"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, change, key, problem, remedy):
    keys = [line.partition(":")[0] for line in change.splitlines()]
    kept = "".join(line for line in GOOD.splitlines(keepends=True) if line.partition(":")[0] not in keys)
    (found,) = problems(tmp_path, kept + change + "\n")
    assert found[0] == key
    assert problem in found[1]
    assert remedy in found[2]


def test_a_rule_needs_severity_message_and_remedy(tmp_path):
    assert [key for key, _, _ in problems(tmp_path, "steps: 3\n")] == ["message", "remedy", "severity"]


def test_every_file_s_problems_are_told_at_once(tmp_path):
    (tmp_path / "a.yaml").write_text(GOOD + "stepz: 3\n")
    (tmp_path / "b.yaml").write_text("- no mapping\n")
    with pytest.raises(ConfigError) as caught:
        load_rules(AlertsConfig(rules=str(tmp_path), off=["stal"]))
    assert [problem.key for problem in caught.value.problems] == ["stepz", "config file", "monitoring.alerts.off"]


def test_a_folder_of_rules_must_be_one(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        load_rules(AlertsConfig(rules=str(tmp_path / "no")))
    (tmp_path / "mine.yml").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"mine\.yml is not read"):
        load_rules(AlertsConfig(rules=str(tmp_path)))


def test_bounds():
    assert parse_bound("") is None
    assert parse_bound("1e-4") == Bound(1e-4)
    assert parse_bound("entropy/band_high") == Bound(1.0, "entropy/band_high")
    assert parse_bound("1.5 * entropy/band_high") == Bound(1.5, "entropy/band_high")
    assert Bound(1.5, "a/b").value({"a/b": 2.0}) == 3.0
    assert Bound(1.5, "a/b").value({}) is None
    assert [str(parse_bound(text)) for text in ("5", "a/b", "2*a/b")] == ["5", "a/b", "2 * a/b"]
