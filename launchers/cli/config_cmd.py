"""``isentrope config``: shows and checks a configuration without running it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import typer

from launchers.cli.arguments import CONFIG, JSON, OVERRIDES
from launchers.cli.terminal import say

app = typer.Typer(help="Show or validate a configuration.", no_args_is_help=True)


@app.command()
def show(config: Path | None = CONFIG, overrides: list[str] = OVERRIDES, as_json: bool = JSON) -> None:
    """Print the resolved configuration, every key with its meaning. Keys and types are checked, the rules are not.

    Example:

      isentrope config show --config quickstart.yaml entropy.band.high=0.35
    """
    from pipeline.config.load import document, load_config

    resolved = load_config(config, overrides, check=False)
    say(json.dumps(asdict(resolved)) if as_json else document(resolved), nl=as_json)


@app.command()
def validate(config: Path | None = CONFIG, overrides: list[str] = OVERRIDES, as_json: bool = JSON) -> None:
    """Check keys, values and combinations, then open what the run would read: packages, model, tokenizer, data.

    Exit code 2 and the list of problems if there are any. What only a GPU can tell is left to the run itself.

    Example:

      isentrope config validate --config quickstart.yaml learner.optimizer.lr=1e-4
    """
    from pipeline.config.load import config_hash, load_config
    from pipeline.monitoring.alerts.rules import rules_of

    resolved = load_config(config, overrides)
    rules_of(resolved)
    from launchers.run.inputs import check_inputs  # torch: only once the configuration is known to be good

    check_inputs(resolved)
    if as_json:
        say(json.dumps({"valid": True, "name": resolved.name, "config_hash": config_hash(resolved)}))
    else:
        say(f"valid: {resolved.name}, hash {config_hash(resolved)[:12]}")
