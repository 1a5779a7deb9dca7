"""Gives each of the runs that are shown together a name that no other has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def titles(runs: Sequence[tuple[str, int | None, Path]]) -> list[str]:
    """The title of each run, given by name, seed and folder.

    A title is the run's name; where another run has that too, with its seed; where that does not tell them apart
    either, with the end of its folder's path that no other has.
    """
    names = [name for name, _, _ in runs]
    seeded = [f"{name} s{seed}" for name, seed, _ in runs]
    folders = [folder.absolute().parts for _, _, folder in runs]
    return [
        name
        if names.count(name) == 1
        else with_seed
        if seeded.count(with_seed) == 1
        else f"{with_seed} ({_end_of(folder, folders)})"
        for name, with_seed, folder in zip(names, seeded, folders, strict=True)
    ]


def counted(number: int, thing: str) -> str:
    """1 step, 2 steps."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _end_of(folder: Sequence[str], folders: Sequence[Sequence[str]]) -> str:
    """The shortest end of a path that no other of the paths has; all of it where one stands there twice."""
    ends = (folder[-length:] for length in range(1, len(folder)))
    alone = (end for end in ends if sum(other[-len(end) :] == end for other in folders) == 1)
    return str(Path(*next(alone, folder)))
