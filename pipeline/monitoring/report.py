"""Writes one self-contained HTML page about one or several runs: first the entropy in its band, then what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.load import to_yaml
from pipeline.disk import replacing, telling
from pipeline.monitoring.charts import CHARTS, svg, write_png
from pipeline.monitoring.differences import config_differences, result_differences
from pipeline.monitoring.law_card import law_card
from pipeline.monitoring.naming import counted
from pipeline.monitoring.page import document, html_list, html_table
from pipeline.monitoring.samples import read_samples
from pipeline.monitoring.summary import COMPARED, RunHistory, by_method, cost_sentences, named, read_run, summarize_run
from pipeline.monitoring.table import write_csv

PHASES = ("sample", "verify", "batch", "train", "sync", "other", "total", "evaluation")
COLUMNS = {
    "title": "run",
    "seed": "seed",
    "steps": "steps",
    "final_entropy": "final entropy",
    "time_in_band": "time in band",
    "rms_error": "RMS error",
    "settling_step": "settled at step",
    "pass_at_1": "pass@1",
    "pass_at_16": "pass@16",
    "distinct_correct": "distinct correct",
    "status": "status",
}
MISMATCH = {
    "mismatch_mean": "mean |d|",
    "mismatch_p99": "99th percentile",
    "mismatch_max": "largest",
    "mismatch_kl": "KL(engine || learner)",
    "correction_weight": "mean weight",
    "correction_outside": "truncated or masked",
    "correction_ess": "effective samples",
}
PERCENT = ("time_in_band", "rms_error")
COUNTS = ("steps", "settling_step")
SHOWN_SAMPLES = 6
HAPPENED = ("restart", "alert", "fault", "stall", "end")
SHOWN_EVENTS = 100  # the newest of a run

CSS = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 1rem; }
.wide { grid-column: 1 / -1; } .good { color: var(--good); font-weight: 600; }
.card { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .3rem 1rem; max-width: 62rem; }
.card dt { color: var(--muted); font-weight: 600; } .card dd { margin: 0; }
.given { opacity: .55; font-style: italic; }
pre { background: var(--card); padding: .8rem; overflow-x: auto; font-size: 12.5px; } summary { cursor: pointer; }
"""


def build_report(
    run_dirs: Sequence[Path], out_html: Path, png: Path | None = None, csv: Path | None = None
) -> dict[str, Any]:
    """Write the page (and the same pictures as one PNG, the steps as CSV); works on runs that are still running.

    Returns ``{"runs": [summary of each run], "methods": {name: means over its runs}, "cost": [sentences], "law_cards":
    {title of a run under control: its rows}}``. Raises ``EventLogError`` or ``ConfigError`` where a folder holds no
    readable run, ``DiskFullError`` where there is no room for a file; nothing is left of that one.
    """
    runs = named([read_run(Path(run_dir)) for run_dir in run_dirs])
    summaries = [summarize_run(run) for run in runs]
    cards = {run.title: card for run in runs if (card := law_card(run, runs))}
    cost = cost_sentences(runs, summaries)
    result = {"runs": summaries, "methods": by_method(summaries), "cost": cost, "law_cards": cards}
    page = _page(runs, result)
    with telling(out_html.parent, "write the report again"):
        out_html.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out_html) as partial:
            partial.write_text(page, encoding="utf-8")
        if png is not None:
            write_png(runs, png)
        if csv is not None:
            write_csv(runs, csv)
    return result


def _page(runs: Sequence[RunHistory], result: Mapping[str, Any]) -> str:
    names = ", ".join(dict.fromkeys(run.label for run in runs))
    charts = "".join(
        f'<figure class="{"wide" if name == "entropy" else ""}">{svg(name, runs)}</figure>' for name in CHARTS
    )
    sections = [
        f"<h1>Policy entropy in its band: {escape(names)}</h1>",
        html_list(_verdict(run, summary) for run, summary in zip(runs, result["runs"], strict=True)),
        f'<div class="charts">{charts}</div>',
        _figures(result),
        _differences(runs, result["runs"]),
        "<h2>What it costs</h2>" + _cost(result["cost"]),
        _law_cards(result["law_cards"]),
        "<h2>Engine against learner</h2>" + _mismatch(result["runs"]),
        "<h2>Seconds by phase</h2>" + _seconds(result["runs"]),
        _happened(runs),
        _samples(runs),
        *(_configuration(run) for run in runs),
    ]
    return document(f"isentrope report: {names}", "".join(sections), CSS)


def _verdict(run: RunHistory, summary: Mapping[str, Any]) -> str:
    """One sentence: did this run hold its band?"""
    name = (
        f"<b>{escape(run.title)}</b> (seed {run.config.seed}, {summary['steps']} of {run.config.steps} steps, "
        f"{summary['status']})"
    )
    end = f"final entropy {_number(summary['final_entropy'])}"
    if run.is_baseline:
        return f"{name}: no control, {end}."
    if summary["entry_step"] is None:
        return f"{name}: never entered its band, {end}." + _saturation(run, summary)
    share = f'<span class="good">{summary["time_in_band"]:.0%}</span>'
    return (
        f"{name}: in the band for {share} of the steps since it first entered it (step {summary['entry_step']}), "
        f"RMS error {summary['rms_error']:.1%}, {end}." + _saturation(run, summary)
    )


def _saturation(run: RunHistory, summary: Mapping[str, Any]) -> str:
    if summary["saturation"] == 0:
        return ""
    step = int(np.flatnonzero(run.series.in_state("saturated"))[-1])
    event = run.series.event(step) or {"reason": ""}
    share = f"{summary['saturation']:.0%}"
    return f" The command was at its limit in {share} of the steps, last at step {step}: {escape(event['reason'])}."


def _figures(result: Mapping[str, Any]) -> str:
    rows = [[_cell(name, run[name]) for name in COLUMNS] for run in result["runs"]]
    table = html_table(list(COLUMNS.values()), rows)
    several = {name: figures for name, figures in result["methods"].items() if figures["runs"] > 1}
    if several:
        means = [
            [escape(name), str(figures["runs"]), *(_spread(figure, figures) for figure in COMPARED)]
            for name, figures in several.items()
        ]
        table += "<h2>Mean and standard deviation over seeds</h2>"
        table += html_table(["method", "runs", *(COLUMNS[figure] for figure in COMPARED)], means)
    note = (
        "Final entropy: mean of the last 20 steps, nats per token at T=1. Time in band and RMS error: "
        "filtered entropy (EMA 0.8), from its first step in the band on, the error relative to the band's geometric "
        "middle. Settled: first step from which it stays 20 steps. pass@k: last evaluation on held-out prompts."
    )
    return f'<h2>Figures</h2>{table}<p class="muted">{note}</p>'


def _cost(sentences: Sequence[str]) -> str:
    if not sentences:
        return '<p class="muted">No evaluated run without control to compare with.</p>'
    return html_list(escape(sentence) for sentence in sentences)


def _law_cards(cards: Mapping[str, Mapping[str, str]]) -> str:
    """For each run under control, what a reader needs to check the claim that its entropy was held."""
    blocks = []
    for title, rows in cards.items():
        lines = (f"<dt>{escape(name)}</dt><dd>{escape(answer)}</dd>" for name, answer in rows.items())
        blocks.append(f'<h3>{escape(title)}</h3><dl class="card">{"".join(lines)}</dl>')
    return f"<h2>The law card</h2>{''.join(blocks)}" if blocks else ""


def _seconds(summaries: Sequence[Mapping[str, Any]]) -> str:
    rows = [[escape(run["title"]), *(f"{run['seconds'].get(phase, 0.0):.1f}" for phase in PHASES)] for run in summaries]
    return html_table(["run", *PHASES], rows)


def _mismatch(summaries: Sequence[Mapping[str, Any]]) -> str:
    rows = [[escape(run["title"]), *(_small(run["mismatch"][name]) for name in MISMATCH)] for run in summaries]
    note = (
        "d: log-probability of the same token at the same weights, learner's less engine's, nats; means over steps, "
        "the largest of all. Weights: of objective.correction, where it is on."
    )
    return html_table(["run", *MISMATCH.values()], rows) + f'<p class="muted">{note}</p>'


def _differences(runs: Sequence[RunHistory], summaries: Sequence[Mapping[str, Any]]) -> str:
    """What the runs were told to do differently, and what came of it; nothing for a single run."""
    if len(runs) < 2:
        return ""
    header = ["", *(run.title for run in runs)]
    keys = [[escape(key), *map(escape, values)] for key, values in config_differences([r.config for r in runs]).items()]
    told = html_table(header, keys) if keys else '<p class="muted">None: the configurations are the same.</p>'
    results = [
        [escape(COLUMNS[name]), *(_cell(name, value) + _change(name, change) for value, change in cells)]
        for name, cells in result_differences(summaries).items()
    ]
    note = "In parentheses: the change against the first run."
    return (
        f"<h2>Differences in configuration</h2>{told}"
        f'<h2>Differences in results</h2>{html_table(header, results)}<p class="muted">{note}</p>'
    )


def _change(name: str, change: float | None) -> str:
    if change is None:
        return ""
    if name in PERCENT:
        return f" ({change:+.1%})"
    return f" ({change:+.0f})" if name in COUNTS else f" ({change:+.3f})"


def _happened(runs: Sequence[RunHistory]) -> str:
    """Restarts, alerts, faults, stalls and the end, run by run."""
    blocks = []
    for run in runs:
        marks = [mark for mark in run.series.marks() if mark["kind"] in HAPPENED]
        left_out = len(marks) - SHOWN_EVENTS
        lines = [f"{left_out} earlier ones are in the event log"] if left_out > 0 else []
        damaged, damage = run.series.damage
        lines += [escape(f"{counted(damaged, 'damaged line')} of the log skipped: {damage}")] if damaged else []
        lines += [
            f"step {mark['step']}: {mark['kind']}, {mark['severity']}: {escape(mark['text'])}"
            for mark in marks[-SHOWN_EVENTS:]
        ]
        blocks.append(f"<h3>{escape(run.title)}</h3>" + (html_list(lines) if lines else "<p>Nothing.</p>"))
    return "<h2>What happened</h2>" + "".join(blocks)


def _samples(runs: Sequence[RunHistory]) -> str:
    """Rollouts of the newest step of each run."""
    blocks = []
    for run in runs:
        files = sorted((run.run_dir / "samples").glob("step-*.jsonl"))
        rows = [_sample_row(sample) for sample in (read_samples(files[-1])[:SHOWN_SAMPLES] if files else [])]
        if rows:
            header = ["prompt", "response", "extracted", "reward", "role", "T", "entropy"]
            blocks.append(f"<h3>{escape(run.title)}, step {int(files[-1].stem[5:])}</h3>" + html_table(header, rows))
    return f"<details><summary>Samples of the last step</summary>{''.join(blocks)}</details>" if blocks else ""


def _sample_row(sample: Mapping[str, Any]) -> list[str]:
    texts = [escape(str(sample.get(name) or "")[-200:]) for name in ("prompt", "response", "extracted")]
    if sample.get("turns"):
        texts[1] = _conversation(sample)
    entropies = [value for value in sample.get("entropies", []) if value is not None]  # nine steps of ten have none
    entropy = sum(entropies) / len(entropies) if entropies else None  # nats per token
    figures = [_number(sample["temperature"]), _number(entropy)]
    return [*texts, _number(sample["reward"]), escape(sample["role"]), *figures]


def _conversation(sample: Mapping[str, Any]) -> str:
    """The turns of an episode, what the model did not draw set apart, and why the episode ended."""
    starts = {
        first: f"{number}, tool call" if ended == "tool_calls" else str(number)
        for number, (first, _, ended) in enumerate(sample["turns"], 1)
    }
    drawn = [value is not None for value in sample["log_probs"]]
    parts = []
    for at, (piece, own) in enumerate(zip(sample["pieces"], drawn, strict=False)):
        parts.append(f"<b>[{starts[at]}]</b> " if at in starts else "")
        parts.append(escape(piece) if own else f'<span class="given">{escape(piece)}</span>')
    return f"{''.join(parts)} <i>{escape(sample.get('stop_reason', ''))}</i>"


def _configuration(run: RunHistory) -> str:
    starts = run.of_kind("run_start") + run.of_kind("resume")
    used = starts[-1].get("versions", {}) if starts else {}
    versions = ", ".join(f"{name} {version}" for name, version in used.items())
    text = escape(to_yaml(run.config))
    return (
        f"<details><summary>Configuration and versions of {escape(run.title)}</summary>"
        f"<p>{escape(versions)}</p><pre>{text}</pre></details>"
    )


def _cell(name: str, value: Any) -> str:
    if isinstance(value, float) and name in PERCENT:
        return f"{value:.1%}"
    return _number(value)


def _spread(figure: str, figures: Mapping[str, Any]) -> str:
    value, deviation = figures[figure], figures[figure + "_sd"]
    return _cell(figure, value) + (f" ± {_cell(figure, deviation)}" if deviation is not None else "")


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else escape(str(value))
