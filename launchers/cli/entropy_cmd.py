"""``isentrope entropy``: measures how entropy responds to updates and commands, and computes controller gains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from launchers.cli.arguments import CONFIG, JSON, OVERRIDES, either
from launchers.cli.terminal import say

if TYPE_CHECKING:
    from pipeline.config.schema import RunConfig
    from pipeline.entropy.calibrate import Calibration
    from pipeline.entropy.target import Measured
    from pipeline.monitoring.summary import RunHistory

app = typer.Typer(
    name="entropy", help="Measure what moves a model's entropy; calibrate its controller.", no_args_is_help=True
)
RUN = typer.Option(None, "--run", metavar="RUN", help="Run folder: start from its newest checkpoint.")
TEMPERATURES = typer.Option([0.6, 0.8, 1.0, 1.2, 1.5], "--temperatures", "-t", help="Once per temperature.")


@app.command("probe")
def probe(
    config: Path | None = CONFIG,
    overrides: list[str] = OVERRIDES,
    run: Path | None = RUN,
    temperatures: list[float] = TEMPERATURES,
    repeats: int = typer.Option(8, "--repeats", min=1, help="Measurements of each, with prompts of their own."),
    prompts: int = typer.Option(24, "--prompts", min=1, help="Prompts drawn for one update."),
    step_size: float = typer.Option(0.01, "--step-size", help="Of the plain gradient step."),
    as_json: bool = JSON,
) -> None:
    """Measure how one update on correct, or on incorrect, samples of a temperature changes the entropy.

    Nothing is written: the model and the run stay as they are.

    Examples:

      isentrope entropy probe --run runs/pi-20260101-120000 --repeats 16

      isentrope entropy probe --config quickstart.yaml -t 0.8 -t 1.2
    """
    either(config, run)
    resolved = _resolved(config, run, overrides)
    if min(temperatures) <= 0:
        raise typer.BadParameter(f"--temperatures {min(temperatures):g}: must be above 0")
    from launchers.lab import instruments as entropy_lab  # torch, Ray: only once the command line is known to be good

    found = entropy_lab.probe(
        resolved, run, temperatures, repeats, prompts, step_size, lambda line: say(line, err=True)
    )
    slopes = {sign: found.slope(sign) for sign in ("positives", "negatives")}
    if as_json:
        _print_json(asdict(found) | {"slopes": slopes, "step_size": step_size})
        return
    say(f"entropy {found.entropy:.4g} nats per token, {found.correct:.0%} correct")
    say("T       dH of positives (x 1e-3)   dH of negatives (x 1e-3)")
    for temperature in temperatures:
        cells = [
            f"{1e3 * e.change:+8.2f} +- {1e3 * e.error:.2f}" for e in found.effects if e.temperature == temperature
        ]
        say(f"{temperature:<8g}" + "".join(f"{cell:<27}" for cell in cells))
    for sign, expected in (("positives", "above"), ("negatives", "below")):
        say(f"slope over ln T of {sign}: {slopes[sign]:+.3g} (SCOPE-RL: {expected} 0)")


@app.command("calibrate")
def calibrate(
    run: Path | None = typer.Argument(
        None, metavar="[RUN]", help="Run folder: its event log, or its checkpoint with --excite."
    ),
    config: Path | None = CONFIG,
    overrides: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Override, e.g. runtime=inline."),
    steps: int = typer.Option(
        0, "--excite", min=0, help="Train so many steps with a command that switches between two levels."
    ),
    as_json: bool = JSON,
) -> None:
    """Identify the plant a controller steers (gain, drift, delay, noise) and say which gains to use.

    RUN alone reads the event log of a run, finished or not, whose controller moved its command. --excite N trains N
    steps from the model of --config, or from the newest checkpoint of RUN, in a folder that is thrown away.

    `reweight` acts through right answers: from a model that has few of them it needs more steps.

    Examples:

      isentrope entropy calibrate runs/pi-20260101-120000

      isentrope entropy calibrate --config quickstart.yaml --excite 80 \\
        --set entropy.actuator=entropy_bonus
    """
    if (run is None) == (config is None):
        raise typer.BadParameter("give either RUN or --config FILE")
    if run is None and not steps:
        raise typer.BadParameter("--config needs --excite STEPS: a model alone has no history to learn from")
    resolved = _resolved(config, run, overrides)
    from pipeline.entropy.calibrate import calibration
    from pipeline.entropy.identify import IdentificationError
    from pipeline.monitoring.plant_data import record_of

    try:
        if steps:
            from launchers.lab import instruments as entropy_lab

            record = entropy_lab.excite(resolved, run, steps)
        else:
            from pipeline.monitoring.summary import read_run

            assert run is not None
            record = record_of(read_run(run))
        found = calibration(resolved.entropy, [record])
    except IdentificationError as error:
        say(str(error), err=True)
        raise typer.Exit(1) from error
    if as_json:
        _print_json(asdict(found))
    else:
        _say_calibration(found)


def _say_calibration(found: Calibration) -> None:
    """The plant, what holds the entropy, how the gains would track, and the overrides that set them."""
    plant = found.plant
    say(f"from {plant.steps} steps, 95 % intervals; u in the unit of {found.actuator} (ln T for temperatures)")
    say(f"gain     {plant.gain:+.4g} of ln H per u and step  {_interval(plant.gain_interval)}")
    say(f"drift    {plant.drift:+.4g} of ln H per step        {_interval(plant.drift_interval)}")
    say(f"delay    {plant.delay} steps, momentum included  [{plant.delay_interval[0]}, {plant.delay_interval[1]}]")
    say(f"noise    {plant.sensor_noise:.3g} of a reading, {plant.process_noise:.3g} per step of the policy (ln H)")
    say(f"command that holds the entropy: {found.rest_command:.3g}, limits {found.limits[0]:g} to {found.limits[1]:g}")
    if not found.reachable:
        say("it lies outside the limits: the band cannot be held here with this actuator")
    say("predicted tracking (simulated):")
    for name, figures in found.predictions.items():
        say(
            f"  {name:<9} kp {figures.kp:.3g} ki {figures.ki:.3g}: in band {figures.time_in_band:.0%}, "
            f"RMS {figures.rms:.1%}, settling {figures.settling:.0f} steps, overshoot {figures.overshoot:.0%}, "
            f"mean |du| {figures.variation:.3g}"
        )
    say("use: " + " ".join(found.overrides))


@app.command("target")
def target(
    run: Path = typer.Argument(..., metavar="RUN", help="Run folder of a run with entropy.controller=none."),
    k: int = typer.Option(16, "--k", min=1, help="Answers that you will draw for a question: the k of pass@k."),
    as_json: bool = JSON,
) -> None:
    """Recommend a band: the lowest entropy at which a run without control still kept its pass@k.

    It reads pass@k on held-out prompts, so it needs evaluations on the way, e.g. evaluation.every=20.

    Examples:

      isentrope train --config quickstart.yaml entropy.controller=none \\
        evaluation.every=20 name=grpo

      isentrope entropy target runs/grpo-20260101-120000 --k 16
    """
    from pipeline.entropy.target import annealed, known, recommend, slower
    from pipeline.monitoring.summary import read_run
    from pipeline.monitoring.target_data import measured

    history = read_run(run)
    if not history.is_baseline:
        controller = history.config.entropy.controller
        raise typer.BadParameter(
            f"RUN {run}: entropy.controller={controller} held its entropy; a band is read from the fall of a run "
            "with entropy.controller=none"
        )
    evaluated, singles = measured(history, k), measured(history, 1)
    points = known(evaluated)
    try:
        found = recommend(points, k)
    except ValueError as error:
        remedy = _unknown_entropies(evaluated) or _more_evaluations(history, k)
        raise typer.BadParameter(f"RUN {run}: {error}; {remedy}") from error
    if not found.best:
        raise typer.BadParameter(
            f"RUN {run}: pass@{k} is 0 in every evaluation, so there is nothing to keep: give it easier questions, or "
            "look at its samples (`isentrope data grade`)"
        )
    if not found.entropy:
        raise typer.BadParameter(
            f"RUN {run}: its entropy is 0 at step {found.step}, the last that kept pass@{k}, so there is none to hold: "
            "train one from a model whose answers differ"
        )
    schedule, slowly = annealed(found, singles, history.config.steps), slower(singles)
    if as_json:
        state = {"status": history.status, "steps": history.steps, "pays": found.pays}
        _print_json(
            {"run": str(run), **state, **asdict(found), "points": points, "schedule": schedule, "slower": slowly}
        )
        return
    for line in found.evidence(points):
        say(line)
    say(found.verdict())
    if history.status != "completed":
        say(f"the run is {history.status}: this is of {history.steps} of its {history.config.steps} steps")
    word = "use:" if found.pays else "to hold it all the same:"
    say(f"{word} entropy.band.low={found.low:.3g} entropy.band.high={found.high:.3g}")
    if schedule is not None:
        say(
            f"pass@1 gained {schedule.gain:.3f} more on the way to H={schedule.entropy:.3g}: hold this band for the "
            "first half, then lower it, and most of both is kept (docs/lab.md, Hold, then anneal)"
        )
        say("or:  " + " ".join(schedule.overrides))
    if slowly is not None:
        say(
            f"pass@1 stood still from step {slowly.since} on ({slowly.gain:+.3f}, within noise), with "
            f"{slowly.left:.0%} of the start's entropy left: exploration may be what is lacking. On such a task of "
            "ours a band that was lowered over the whole run ended with more pass@1 and pass@k (docs/lab.md, Where "
            "exploration is lacking)"
        )
        say("or:  " + " ".join(slowly.overrides))


@app.command("law")
def law(
    runs: list[Path] = typer.Argument(..., metavar="RUN...", help="Run folders, finished or still running."),
    as_json: bool = JSON,
) -> None:
    """Fit R = -a exp(H) + b to a run's reward and entropy, and say how well its first 15 % predicted the rest.

    Example:

      isentrope entropy law runs/quickstart/grpo runs/quickstart/pi
    """
    from pipeline.entropy.reward_law import fit_reward_law
    from pipeline.monitoring.summary import read_run

    results = []
    for folder in runs:
        history = read_run(folder)
        try:
            fit = fit_reward_law(history.column("entropy/mean").tolist(), history.column("reward/mean").tolist())
        except ValueError as error:
            say(f"{folder}: {error}", err=True)
            raise typer.Exit(1) from error
        results.append({"run": str(folder), "controlled": not history.is_baseline, **asdict(fit)})
    if as_json:
        _print_json(results)
        return
    for result in results:
        low, high = result["ceiling_interval"]
        say(f"{result['run']}: R = -{result['a']:.3f} exp(H) + {result['b']:.3f}, residual {result['residual']:.3f}")
        say(
            f"  fitted for H from {result['entropies'][0]:.3g} to {result['entropies'][1]:.3g}; "
            f"{result['points']} points"
        )
        say(f"  ceiling at H = 0: {result['ceiling']:.3f} [{low:.3f}, {high:.3f}]")
        say(
            f"  the first 15 % of the steps miss the rest by {result['early_error']:.3f} (RMS); their ceiling: "
            f"{result['early_ceiling']:.3f}"
        )
        if result["controlled"]:
            say("  a controller was acting: the law is known for runs without one, choose no target by it")


def _unknown_entropies(evaluated: Sequence[Measured]) -> str:
    """What to do about a run with enough evaluations, but without the entropies beside them; empty: it is another."""
    from pipeline.config.schema import EVALUATIONS_FOR_A_BAND

    good = [point for point in evaluated if math.isfinite(point.value)]
    lost = sum(not math.isfinite(point.entropy) for point in good)
    if len(good) < EVALUATIONS_FOR_A_BAND:
        return ""
    return (
        f"beside {lost} of its {len(good)} evaluations every step's entropy is null (not a number, or of no tokens): "
        "see what broke there, and train one whose entropies are numbers"
    )


def _more_evaluations(history: RunHistory, k: int) -> str:
    """What to do about a run with too few evaluations of pass@``k``."""
    measured = {int(each) for event in history.evaluations for each in event["pass_at_k"]}
    if measured and k not in measured:
        known = ", ".join(map(str, sorted(measured)))
        remedy = f"give --k one of these, or train one with evaluation.k=[{k}]"
        if k > history.config.evaluation.samples:
            remedy += f" and evaluation.samples={k} or more (it had {history.config.evaluation.samples})"
        return f"its evaluations measured pass@k for k = {known}: {remedy}"
    if history.status == "unfinished":
        return (
            f"{history.steps} of its {history.config.steps} steps are done: ask again later, or train one with "
            f"evaluation.every={max(1, history.config.steps // 12)}"
        )
    return f"train one with evaluation.every={max(1, history.config.steps // 12)}"


def _resolved(config: Path | None, run: Path | None, overrides: list[str]) -> RunConfig:
    from pipeline.config.load import load_config

    return load_config(run / "config.yaml" if run else config, overrides)


def _interval(bounds: tuple[float, float]) -> str:
    return f"[{bounds[0]:+.4g}, {bounds[1]:+.4g}]"


def _print_json(value: Any) -> None:
    from pipeline.monitoring.events import to_json

    say(to_json(value))
