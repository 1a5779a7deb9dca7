"""``isentrope data``: inspects a data file before a run uses it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launchers.cli.arguments import CONFIG, JSON, USAGE_ERROR
from launchers.cli.terminal import say

if TYPE_CHECKING:
    from pipeline.config.schema import RunConfig
    from pipeline.data.check import DataReport

app = typer.Typer(help="Data files: what a run would make of them.", no_args_is_help=True)
SHOWN, FAULTS_SHOWN = 5, 100  # prompts of a kind, and reasons why lines cannot be used, that are named
_FILE = typer.Argument(None, metavar="[FILE]", help="JSONL file; default: the data source of --config.")
_SET = typer.Option([], "--set", metavar="KEY=VALUE", help="Overrides of the configuration.")


@app.command("check")
def check(
    file: Path | None = _FILE, config: Path | None = CONFIG, overrides: list[str] = _SET, as_json: bool = JSON
) -> None:
    """Read a data file as training would: one rendered prompt, token lengths, what is dropped and why, duplicates.

    Lines that cannot be used, among them those with a reference that no response could match, are listed by file and
    line; there is then exit code 2. With --config, prompts are rendered by its tokenizer and chat template and counted
    in tokens, and verifiers of your own are looked for in its folder.

    Examples:

      isentrope data check math.jsonl --set data.verifier=math

      isentrope data check math.jsonl --config my.yaml \\
        --set data.system_prompt="Answer in a box."
    """
    from pipeline.config.load import load_config, override, resolve_path

    if file is None and config is None:
        raise typer.BadParameter("give a FILE, a --config, or both")
    if file is not None:
        path = str(file.absolute())
        overrides = [*overrides, "data.source.kind=jsonl", override("data.source.path", path)]
    if config is None:
        unread = override("model.hf_path", ".")  # without a configuration, no model is looked at
        settings, tokenizer = load_config(None, [unread, *overrides], check=False), None
    else:
        from pipeline.data.tokenizer import load_tokenizer

        settings = load_config(config, overrides)
        tokenizer = load_tokenizer(resolve_path(settings.model.hf_path))
    from pipeline.data.check import check_data

    report = check_data(settings, tokenizer)
    if as_json:
        say(json.dumps(asdict(report)))
    else:
        say("\n".join(_lines(report, settings)))
    if report.faults or report.not_rendered:
        raise typer.Exit(USAGE_ERROR)


@app.command("grade")
def grade(
    file: Path = typer.Argument(metavar="FILE", help="JSONL file."),
    config: Path | None = CONFIG,
    overrides: list[str] = _SET,
    as_json: bool = JSON,
) -> None:
    """Say what verifiers say of responses: reward, the answer that was found in the response, errors.

    Every line of FILE holds "verifier", "answer" (the reference) and "response"; "meta" where the verifier needs it.
    With --json, one JSON object a line. Lines that are malformed and references that no response could match are
    reported by file and line, with exit code 2. With --config, its time limits hold, and verifiers of your own are
    looked for in its folder.

    Example:

      isentrope data grade responses.jsonl --json
    """
    from pipeline.config.load import load_config
    from pipeline.config.schema import DataConfig
    from pipeline.rewards.grade import grade_file

    settings = load_config(config, overrides).data if config else DataConfig()
    for found in grade_file(file, settings):
        if as_json:
            say(json.dumps(asdict(found)))
        else:
            error = f"  error: {found.error}" if found.error else ""
            say(f"{found.line:>5}  reward {found.reward:g}  extracted {found.extracted!r}{error}")


def _lines(report: DataReport, settings: RunConfig) -> Iterator[str]:
    from pipeline.data.jsonl import described

    limit, path = settings.rollout.max_prompt_tokens, settings.data.source.path
    if report.faults:
        yield f"lines that cannot be used: {len(report.faults)}; mend or remove:"
        yield from described(path, report.faults, FAULTS_SHOWN)
    if report.not_rendered:
        yield f"prompts that the model cannot take: {len(report.not_rendered)}"
        yield from _some((f"  {problem}" for problem in report.not_rendered.values()), FAULTS_SHOWN)
    yield f"{report.questions} questions; verifiers: " + ", ".join(f"{n} x {v}" for v, n in report.verifiers.items())
    if report.lengths:
        yield "prompt tokens: " + ", ".join(f"{name} {length:g}" for name, length in report.lengths.items())
        yield f"dropped, since longer than rollout.max_prompt_tokens={limit}: {len(report.too_long)}"
        yield from _some(f"  {name}: {length} tokens" for name, length in report.too_long.items())
    yield f"questions asked more than once: {len(report.duplicates)}"
    yield from _some("  " + ", ".join(same) for same in report.duplicates)
    if not report.example:
        return
    example = report.example
    yield f"the first ({example['id']}, answer {example['answer']!r}, verifier {example['verifier']}):"
    yield str(example["prompt"])


def _some(lines: Iterable[str], shown: int = SHOWN) -> list[str]:
    found = list(lines)
    more = [f"  ... and {len(found) - shown} more"] if len(found) > shown else []
    return found[:shown] + more
