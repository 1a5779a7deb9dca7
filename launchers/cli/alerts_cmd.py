"""``isentrope alerts``: lists alert rules, replays them over recorded runs, and tests whether alerts arrive."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from launchers.cli.arguments import CONFIG, JSON
from launchers.cli.terminal import say
from pipeline.config.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config.schema import RunConfig
    from pipeline.monitoring.alerts.replay import Replay
    from pipeline.monitoring.alerts.rules import Rule

app = typer.Typer(help="Show, test and deliver alerts.", no_args_is_help=True)
RULES = typer.Option(
    None, "--rules", metavar="DIR", help="Folder of rules beside the shipped ones (monitoring.alerts.rules)."
)


@app.command("list")
def list_rules(config: Path | None = CONFIG, rules: Path | None = RULES, as_json: bool = JSON) -> None:
    """Print every rule: severity, condition, message and remedy. A rule is a file; copy one and change it.

    Example:

      isentrope alerts list --rules my_rules
    """
    from pipeline.config.load import load_config
    from pipeline.config.schema import RunConfig
    from pipeline.monitoring.alerts.rules import load_rules

    alerts = load_config(config, check=False).monitoring.alerts if config else RunConfig().monitoring.alerts
    found = load_rules(replace(alerts, rules=str(rules)) if rules else alerts)
    rows = [_row(rule) for rule in sorted(found, key=lambda rule: rule.name)]
    if as_json:
        say(json.dumps(rows))
        return
    for row in rows:
        say(f"{row['rule']} ({row['severity']})\n  raised:  {row['condition']}\n  remedy:  {row['remedy']}")
        say(f"  file:    {row['file']}\n")


@app.command("test")
def try_rules(
    runs: list[Path] = typer.Argument(None, metavar="RUN...", help="Run folders."),
    rules: Path | None = RULES,
    deliver: bool = typer.Option(False, "--deliver", help="Send one test alert through every channel of --config."),
    config: Path | None = CONFIG,
    as_json: bool = JSON,
) -> None:
    """Replay recorded runs through the rules and print which would have been raised when; nobody is told.

    Examples:

      isentrope alerts test runs/quickstart/grpo runs/quickstart/pi --rules mine

      isentrope alerts test --deliver --config mine.yaml
    """
    from pipeline.config.load import load_config

    if deliver == bool(runs) or deliver != bool(config):
        raise typer.BadParameter("give run folders, or --deliver with --config FILE")
    if config is not None:
        _deliver(load_config(config, check=False))
        return
    from pipeline.monitoring.alerts.replay import replay_run

    found = {str(run): replay_run(run, str(rules) if rules else "") for run in runs}
    if as_json:
        say(json.dumps([_result(run, replay) for run, replay in found.items()]))
        return
    for run, replay in found.items():
        _print(run, replay)


def _row(rule: Rule) -> Mapping[str, str]:
    config = rule.config
    return {
        "rule": rule.name,
        "severity": config.severity,
        "condition": rule.describe(),
        "message": config.message,
        "remedy": config.remedy,
        "file": str(rule.source),
    }


def _result(run: str, replay: Replay) -> dict[str, Any]:
    return {"run": run, "alerts": [firing.to_dict() for firing in replay.firings], "blind": replay.blind}


def _print(run: str, replay: Replay) -> None:
    say(f"{run}: {len(replay.firings) or 'no'} alert{'' if len(replay.firings) == 1 else 's'}")
    for firing in replay.firings:
        until = f"to {firing.end.step}" if firing.end else "to the end"
        say(f"  step {firing.begin.step} {until}: {firing.begin.rule} ({firing.begin.severity}): {firing.begin.reason}")
    for line in replay.blind:
        say(f"  not judged: {line}")


def _deliver(config: RunConfig) -> None:
    """Each channel tries once. Exits with 1 if one fails."""
    from pipeline.monitoring.sinks.alert_delivery import DeliveryError, channels, delivery_problems, describe  # HTTP

    problems, found = delivery_problems(config), channels(config)
    if problems:
        raise ConfigError.of(problems)
    if not found:
        remedy = "set monitoring.alerts.webhook_file, mail or slurm_comment"
        raise ConfigError("monitoring.alerts", None, "no channel is configured", remedy)
    event = {
        "rule": "test",
        "severity": "info",
        "state": "begin",
        "step": 0,
        "time": time.time(),
        "reason": "this is a test, nothing is wrong",
    }
    failed = False
    for name, build in found.items():
        try:
            build().send(*describe(event, config.name))
        except (OSError, DeliveryError) as error:
            failed = True
            say(f"{name}: not delivered: {error}", err=True)
        else:
            say(f"{name}: delivered")
    if failed:
        raise typer.Exit(1)
