"""``isentrope lab``: the laboratory of entropy methods."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from launchers.cli.arguments import JSON
from pipeline.methods import EVIDENCE, METHODS

app = typer.Typer(help="Compare entropy methods on the same loop.", no_args_is_help=True)


@app.callback()
def lab() -> None:
    """Compare entropy methods on the same loop."""


@app.command(
    epilog='Example: isentrope lab methods --json | jq -r \'.[] | select(.name == "gspo") | .overrides | join(" ")\''
)
def methods(as_json: bool = JSON) -> None:
    """List the methods: what each does, its source, how well its rule is known, and the overrides that switch it on.

    Overrides are words for `isentrope train`, on top of any configuration; what is not offered says why.
    """
    if as_json:
        typer.echo(json.dumps([asdict(method) | {"offered": not method.missing} for method in METHODS.values()]))
        return
    for method in METHODS.values():
        typer.echo(f"{method.name}: {method.kind}, {method.source} ({method.evidence})")
        typer.echo(f"    {method.rule}")
        typer.echo(f"    {' '.join(method.overrides) or f'not offered: {method.missing}'}")
    typer.echo("; ".join(f"{name}: {meaning}" for name, meaning in EVIDENCE.items()))
