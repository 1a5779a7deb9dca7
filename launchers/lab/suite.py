"""A suite: one task, one budget, and the methods that are compared on it.

Suites are YAML files in ``configs/lab/``, checked as strictly as a run's configuration.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from pipeline.config.check import key_problems
from pipeline.config.errors import ConfigError, Problem
from pipeline.config.key import COUNT, NOT_NEGATIVE, Range, key
from pipeline.config.load import COMMAND_LINE, PACKAGED, config_hash, load, load_config
from pipeline.config.schema import RunConfig

WEIGHTS = "hf"  # in the folder of a run that others start from: its last model
# Keys that the laboratory gives every run itself, after all overrides, and what to do instead.
GIVEN = {
    "seed": "take it out: the runs' seeds are 0, 1, ..., as many as `seeds` of the suite or --seeds says",
    "name": "take it out: a run has the name of its method or variant",
    "run_dir": "take it out: the runs' folders are made below --out",
}


@dataclass
class SuiteConfig:
    """One comparison: its task, budget, seeds and methods."""

    title: str = key("", "heading of the report")
    base: str = key(MISSING, "recipe that every run starts from", path="read")
    overrides: list[str] = key([], "key=value of every run; a method's own come after them")
    methods: list[str] = key([], "names of methods, see `isentrope lab methods`, or of variants")
    variants: dict[str, Any] = key(
        {}, "methods of this suite alone: a name, and a list of a method and its further key=value"
    )
    baseline: str = key("grpo", "the method that the others are measured against: its tokens are the budget")
    first: str = key("", "suite that is run before this one: its runs are what `after` names")
    after: dict[str, str] = key(
        {},
        "methods that start where another has ended: a method here, and the one of `first` whose last model it takes",
    )
    reach: float = key(0.0, "pass@1 whose first step the table shows; 0: none", range=Range(0, 1))
    stopped_at: list[int] = key(
        [], "when the baseline is shown as if it had been stopped there", range=COUNT, unit="steps"
    )
    mean_of_last: int = key(
        1,
        "evaluations whose mean is a run's pass@k and distinct answers, the last ones within the budget; 1: no mean, "
        "they are interpolated to the budget",
        range=COUNT,
    )
    seeds: int = key(3, "runs of each method, with seeds 0, 1, ...", range=COUNT, unit="runs")
    minutes_per_run: float = key(
        0.0,
        "what one run took on one core of ours; `lab run` says what that makes in all; 0: not measured",
        range=NOT_NEGATIVE,
    )


@dataclass(frozen=True)
class Cell:
    """One run of the comparison: one method with one seed."""

    method: str
    seed: int
    config: RunConfig
    start: Cell | None = None  # the run whose last model it starts from


def load_suite(name: str, known: Mapping[str, Sequence[str]]) -> SuiteConfig:
    """The suite of a YAML file, or the packaged one called ``name``.

    ``known``: overrides of every method that can be run.

    Raises ``ConfigError``.
    """
    packaged = PACKAGED / "lab" / f"{name}.yaml"
    return load(SuiteConfig, packaged if packaged.is_file() else Path(name), [], lambda s: list(_problems(s, known)))


def chosen(
    suite: SuiteConfig, methods: Sequence[str], seeds: int | None, known: Mapping[str, Sequence[str]]
) -> SuiteConfig:
    """The suite with other methods, each once (the baseline always among them), or another number of seeds.

    Raises ``ConfigError``.
    """
    wanted = replace(
        suite, methods=list(dict.fromkeys(methods or suite.methods)), seeds=suite.seeds if seeds is None else seeds
    )
    if suite.baseline not in wanted.methods:
        wanted.methods.insert(0, suite.baseline)
    problems = list(_problems(wanted, known))
    if problems:
        raise ConfigError.of(problems)
    return wanted


def with_variants(suite: SuiteConfig, known: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Overrides of every method and of every variant of the (checked) suite."""
    return {**known, **{name: [*known[first], *more] for name, (first, *more) in suite.variants.items()}}


def cells(suite: SuiteConfig, known: Mapping[str, Sequence[str]], out: Path) -> list[Cell]:
    """Every run of the suite, seeds outermost, so that a matrix broken off early compares all methods on few seeds.

    A run's folder carries the hash of its configuration: what has been computed once is never computed again, and what
    has changed never taken for it. Raises ``ConfigError`` where a method does not go with the task.
    """
    first = load_suite(suite.first, known) if suite.first else None
    here = with_variants(suite, known)

    def start(method: str, seed: int) -> Cell | None:
        if first is None or method not in suite.after:
            return None
        return _cell(first, suite.after[method], seed, with_variants(first, known), out)

    return [
        _cell(suite, method, seed, here, out, start(method, seed))
        for seed in range(suite.seeds)
        for method in suite.methods
    ]


def with_starts(cells: Sequence[Cell]) -> list[Cell]:
    """The cells and the runs that they start from, each once; of each seed first what others start from."""
    starts = [cell.start for cell in cells if cell.start]
    ordered = sorted([*starts, *cells], key=lambda cell: cell.seed)
    return list({cell.config.run_dir: cell for cell in ordered}.values())


def _cell(
    suite: SuiteConfig,
    method: str,
    seed: int,
    known: Mapping[str, Sequence[str]],
    out: Path,
    start: Cell | None = None,
) -> Cell:
    overrides = [*suite.overrides, *known[method], f"seed={seed}", f"name={method}"]
    try:
        config = load_config(Path(suite.base), overrides)
    except ConfigError as error:
        raise ConfigError.of([_said_by(problem, method) for problem in error.problems]) from error
    if start is not None:  # the hash has what was run before, and not where it lies
        config = _from(config, Path(start.config.run_dir).name)
    folder = out / f"{method}-s{seed}-{config_hash(config)[:10]}"
    if start is not None:
        config = _from(config, start.config.run_dir)
    return Cell(method, seed, replace(config, run_dir=str(folder.resolve())), start)


def _said_by(problem: Problem, method: str) -> Problem:
    return replace(problem, source=f"suite, method {method}") if problem.source == COMMAND_LINE else problem


def _from(config: RunConfig, run: str) -> RunConfig:
    return replace(config, model=replace(config.model, hf_path=f"{run}/{WEIGHTS}"))


def _problems(suite: SuiteConfig, known: Mapping[str, Sequence[str]]) -> Iterator[Problem]:
    yield from key_problems(suite)
    yield from _given("overrides", suite.overrides)
    for name, words in suite.variants.items():
        place = f"variants.{name}"
        if name in known:
            yield Problem(place, words, "is the name of a method", "call the variant something else")
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            yield Problem(place, words, "is not a list of texts", "write [<method>, key=value, ...]")
        elif words[0] not in known:
            yield _unknown(place, words[0], known)
        else:
            yield from _given(place, words[1:])
    for name in [*suite.methods, suite.baseline]:
        if name not in known and name not in suite.variants:
            yield _unknown("methods", name, [*known, *suite.variants])
    yield from _start_problems(suite, known)
    if not suite.methods:
        yield Problem("methods", [], "there is nothing to compare", "name some, e.g. [grpo, isentrope_reweight]")


def _given(place: str, overrides: Sequence[str]) -> Iterator[Problem]:
    """Overrides that would have no effect: a variant with one of them would be a copy under another name."""
    for word in overrides:
        if remedy := GIVEN.get(word.partition("=")[0].strip()):
            yield Problem(place, word, "has no effect: the laboratory gives every run its own", remedy)


def _start_problems(suite: SuiteConfig, known: Mapping[str, Sequence[str]]) -> Iterator[Problem]:
    if suite.after and not suite.first:
        yield Problem(
            "first", "", "is empty, and `after` needs it", "name the suite whose runs come first, e.g. anneal"
        )
        return
    before = with_variants(load_suite(suite.first, known), known) if suite.after else {}
    for method, start in suite.after.items():
        if method not in known and method not in suite.variants:
            yield _unknown(f"after.{method}", method, [*known, *suite.variants])
        if start not in before:
            yield _unknown(f"after.{method}", start, before)


def _unknown(place: str, name: str, known: Iterable[str]) -> Problem:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    remedy = f"did you mean {near!r}? `isentrope lab methods` lists those that can be run"
    return Problem(place, name, "is not a method that can be run", remedy)
