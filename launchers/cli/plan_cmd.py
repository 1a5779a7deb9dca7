"""``isentrope plan``: predicts what a run costs before it starts; each subcommand has its own file."""

from __future__ import annotations

import typer

from launchers.cli import plan_learner_cmd, plan_run_cmd, plan_weights_cmd

app = typer.Typer(help="What something will cost, before it runs.", no_args_is_help=True)
app.command("weights")(plan_weights_cmd.weights)
app.command("learner")(plan_learner_cmd.learner)
app.command("run")(plan_run_cmd.run)
