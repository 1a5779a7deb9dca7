"""``isentrope evaluate``: computes pass@k and related figures of a model or a run on held-out prompts."""

from __future__ import annotations

from pathlib import Path

import typer

from launchers.cli.arguments import CONFIG, JSON, OVERRIDES, either, print_result


def evaluate(
    config: Path | None = CONFIG,
    overrides: list[str] = OVERRIDES,
    run: Path | None = typer.Option(None, "--run", metavar="RUN", help="Run folder: evaluate its newest checkpoint."),
    as_json: bool = JSON,
) -> None:
    """Measure pass@k, avg@k, maj@k and distinct correct answers on held-out prompts.

    Examples:

      isentrope evaluate --config configs/quickstart.yaml evaluation.samples=64

      isentrope evaluate --run runs/pi-20260101-120000 --json
    """
    from pipeline.config.load import load_config

    either(config, run)
    resolved = load_config(run / "config.yaml" if run else config, overrides)
    from launchers.run import assemble  # torch, Ray: only once the configuration is known to be good

    print_result(assemble.evaluate(resolved, run), as_json)
