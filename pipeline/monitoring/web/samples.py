"""Lists and finds the rollouts that a run keeps in ``samples/``, newest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.monitoring.samples import read_samples

FILES_PER_SEARCH = 2000  # a search that finds nothing in so many steps answers, and can be continued
EXCERPT = 240  # characters of a prompt's end and of a response's start in a listing


@dataclass(frozen=True)
class Query:
    """Which samples to list: those of steps below ``before`` that hold ``text`` and have ``role``.

    ``text`` in any case; ``role`` "" is any.
    """

    before: int
    text: str = ""
    role: str = ""
    limit: int = 40


def list_samples(run_dir: Path, query: Query) -> dict[str, Any]:
    """``{"samples": [...], "next": step}``: excerpts, newest first.

    To go on, ask again ``before`` next (None: that was all).
    """
    found: list[dict[str, Any]] = []
    steps = sorted((step for step in _steps(run_dir) if step < query.before), reverse=True)
    for step in steps[:FILES_PER_SEARCH]:
        found += [_excerpt(sample) for sample in _read(run_dir, step) if _matches(sample, query)]
        if len(found) >= query.limit:
            return {"samples": found, "next": step if step != steps[-1] else None}
    rest = steps[FILES_PER_SEARCH:]
    return {"samples": found, "next": rest[0] + 1 if rest else None}


def read_sample(run_dir: Path, step: int, index: int) -> dict[str, Any] | None:
    """One sample with its tokens, the seed as text (a browser's numbers have 53 bits); None if there is none."""
    found = next((sample for sample in _read(run_dir, step) if sample["index"] == index), None)
    return found and found | {"seed": str(found["seed"])}


def _steps(run_dir: Path) -> Iterator[int]:
    for path in (run_dir / "samples").glob("step-*.jsonl"):
        if path.stem[5:].isdigit():
            yield int(path.stem[5:])


def _read(run_dir: Path, step: int) -> list[dict[str, Any]]:
    return read_samples(run_dir / "samples" / f"step-{step:06d}.jsonl")


def _matches(sample: dict[str, Any], query: Query) -> bool:
    said = "".join(sample.get("pieces", ())) if sample.get("turns") else sample["response"]
    text = f"{sample['prompt']}\n{said}".casefold()
    return query.text.casefold() in text and query.role in ("", sample["role"])


def _excerpt(sample: dict[str, Any]) -> dict[str, Any]:
    shown = {name: sample[name] for name in ("step", "index", "reward", "role", "temperature", "tokens")}
    return shown | {"prompt": sample["prompt"][-EXCERPT:], "response": sample["response"][:EXCERPT]}
