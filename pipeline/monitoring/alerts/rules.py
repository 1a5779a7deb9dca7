"""Loads alert rules: one small YAML file each, checked as strictly as a run's configuration; the file names the rule.

Those of configs/alerts/ are shipped. A folder of the user's adds to them, and a file of the same name replaces a
shipped one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from pipeline.config.errors import ConfigError, Problem
from pipeline.config.load import PACKAGED, load, resolve_path
from pipeline.config.schema import AlertsConfig, RunConfig
from pipeline.monitoring.alerts.checks import problems_of
from pipeline.monitoring.alerts.schema import CLOCK, ConditionConfig, RuleConfig

SHIPPED = PACKAGED / "alerts"


@dataclass(frozen=True)
class Rule:
    """A checked rule and where it came from."""

    name: str
    config: RuleConfig
    source: Path

    def __deepcopy__(self, memo: dict[int, Any]) -> Rule:
        return self  # rules never change

    @cached_property
    def is_clock(self) -> bool:
        """Whether it is about time that passes, not about steps."""
        return self.config.when.metric.startswith(CLOCK)

    def describe(self) -> str:
        """The condition in words."""
        config = self.config
        words = _condition_in_words(config.when)
        if config.guard != ConditionConfig():
            words += f", while {_condition_in_words(config.guard)}"
        if config.steps > 1:
            words += f", {config.steps} steps in a row"
        if config.after == "entry":
            words += ", once in band" + (f" or after {config.settle} steps" if config.settle else "")
        elif config.settle:
            words += f", after the first {config.settle} steps"
        return words


def rules_of(config: RunConfig) -> tuple[Rule, ...]:
    """The rules that a run is watched by. Raises ``ConfigError``, as ``load_rules``."""
    return load_rules(config.monitoring.alerts)


def constants_of(config: RunConfig) -> dict[str, float]:
    """What rules may refer to of a run's configuration, by figure name."""
    every = config.checkpoint.every
    return {"checkpoint/every": float(every)} if every else {}


def load_rules(config: AlertsConfig) -> tuple[Rule, ...]:
    """Shipped rules and those of the user's folder, less the ones turned off.

    A rule comes after those in its ``unless``.

    Raises ``ConfigError`` with every problem of every file.
    """
    paths = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    if config.rules:
        paths |= {path.stem: path for path in _user_files(config.rules)}
    rules, problems = {}, []
    for name, path in sorted(paths.items()):
        try:
            rules[name] = _shipped(path) if path.is_relative_to(SHIPPED) else _read(path)
        except ConfigError as error:
            problems += [_from_file(problem, path) for problem in error.problems]
    problems += [_unknown_name("monitoring.alerts.off", name, paths, "") for name in config.off if name not in paths]
    for rule in rules.values():
        unknown = [name for name in rule.config.unless if name not in paths]
        problems += [_unknown_name("unless", name, paths, str(rule.source)) for name in unknown]
    if problems:
        raise ConfigError.of(problems)
    return _in_order({name: rule for name, rule in rules.items() if name not in config.off})


def _read(path: Path) -> Rule:
    return Rule(path.stem, load(RuleConfig, path, (), lambda rule: list(problems_of(rule))), path)


_shipped = lru_cache(_read)  # they never change; reading them all takes half a second


def _user_files(folder: str) -> list[Path]:
    where = resolve_path(folder)
    if not where.is_dir():
        raise ConfigError("monitoring.alerts.rules", folder, "no such folder", "give a folder of rules, *.yaml")
    strangers = sorted(path.name for path in where.iterdir() if path.suffix == ".yml")
    if strangers:
        raise ConfigError("monitoring.alerts.rules", folder, f"{strangers[0]} is not read", "name rules <rule>.yaml")
    return sorted(where.glob("*.yaml"))


def _in_order(rules: dict[str, Rule]) -> tuple[Rule, ...]:
    """Every rule after those it is silenced by."""
    ordered: dict[str, Rule] = {}
    while len(ordered) < len(rules):
        ready = [
            rule
            for name, rule in rules.items()
            if name not in ordered and all(other in ordered or other not in rules for other in rule.config.unless)
        ]
        if not ready:
            circle = sorted(set(rules) - set(ordered))
            source = str(rules[circle[0]].source)
            raise ConfigError("unless", circle, "these rules silence each other in a circle", "remove one", source)
        ordered |= {rule.name: rule for rule in ready}
    return tuple(ordered.values())


def _from_file(problem: Problem, path: Path) -> Problem:
    """The problem of a key that the file gives, or should."""
    return replace(problem, source=str(path)) if problem.source in ("", "default") else problem


def _unknown_name(where: str, name: str, names: Mapping[str, Any], source: str) -> Problem:
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    remedy = f"did you mean {nearest[0]}?" if nearest else "`isentrope alerts list` names every rule"
    return Problem(where, name, "no such rule", remedy, source)


def _condition_in_words(condition: ConditionConfig) -> str:
    if condition.event:
        return f"an event {condition.event}" + (f" in {condition.window} steps" if condition.window > 1 else "")
    if not condition.metric:
        words = [f"controller {condition.state}"] if condition.state else []
        words += [f'says "{condition.reason}"'] if condition.reason else []
        words += [f'does not say "{condition.without}"'] if condition.without else []
        return " and ".join(words)
    what = condition.metric + (f" (EMA {condition.smooth:g})" if condition.smooth else "")
    over = f"{condition.window} steps"
    what = {
        "value": what,
        "mean": f"mean of {what} over {over}",
        "rate": f"rate of {what} over {over}",
        "of_best": f"mean of {what} over {over} by its best",
        "of_first": f"mean of {what} over {over} by its first",
    }[condition.take]
    if condition.swings:
        return f"{what} swings {condition.swings} times across {condition.below} to {condition.above} in {over}"
    edges = [f"{word} {bound}" for word, bound in (("above", condition.above), ("below", condition.below)) if bound]
    return f"{what} {' or '.join(edges)}"
