"""The one place where randomness gets its seeds."""

from __future__ import annotations

import hashlib

from pipeline.types import Role


def sample_seed(run_seed: int, step: int, prompt_id: str, index: int, role: Role) -> int:
    """63-bit seed of one sample: independent of the number, order and kind of engines.

    Every (run, step, prompt, index, role) has its own; slime's deterministic mode, by contrast, repeats one list of
    seeds for every prompt and step.
    """
    key = f"{run_seed}/{step}/{role}/{index}/{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def sample_seeds(run_seed: int, step: int, prompt_id: str, count: int, role: Role) -> tuple[int, ...]:
    """Of samples 0 to ``count`` - 1 of a prompt: see ``sample_seed``."""
    return tuple(sample_seed(run_seed, step, prompt_id, index, role) for index in range(count))


def turn_seed(seed: int, turn: int) -> int:
    """63-bit seed of turn ``turn`` of the sample with seed ``seed``; turn 0 is drawn under the sample's own."""
    if turn == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/turn/{turn}".encode(), digest_size=8).digest(), "little") >> 1


def stream_seed(run_seed: int, stream: str) -> int:
    """32-bit seed of a named stream ("data", "dropout", "bootstrap", ...)."""
    return int.from_bytes(hashlib.blake2b(f"{run_seed}/{stream}".encode(), digest_size=4).digest(), "little")
