"""What the driver spends on one step's answers, from the engines' replies to the ranks' shares, without a model.

    python -m tools.bench.driver --rows 2048 --mean 5000 --longest 31700 --json driver.json

Simulated engines, processes of their own as in a run, write replies as SGLang does (lengths log-normal, cut off at the
longest) and parse them; the driver receives the samples, has them decoded and judged, and makes the batch. CPU seconds
by phase, of the driver with all its threads:

    decode   samples from the engines, and their text
    verify   judging: the texts to worker processes and the verdicts back (the verifier itself is trivial)
    build    the flat batch
    pack     rows dealt to data-parallel ranks (in a run rank 0 deals), taken by each rank, packed into micro-batches
    ship     each share pickled and copied, as into Ray's shared memory

``engines`` are the CPU seconds in which the engines' processes turned JSON into arrays, ``rss_gib`` is the driver's
peak.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import pickle
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from pipeline.batching import dealing
from pipeline.config.schema import DataConfig, RunConfig
from pipeline.data.tokenizer import Tokenizer, load_tokenizer
from pipeline.rewards.stage import VerifierStage
from pipeline.rollout.sglang import replies
from pipeline.step.batch import build_batch
from pipeline.types import ControlDecision, GenerateRequest, Prompt, SampleGroup, TrainBatch, shares
from pipeline.units import GIB

VOCABULARY, PROMPT, SAMPLES, SIGMA = 32_000, 200, 16, 0.8
RANKS, BUDGET = 16, 32_768  # data-parallel ranks; tokens of a micro-batch
ROWS_AT_ONCE = 256  # of one engine's call
VERIFIER = "tools.bench.driver:judge"
DECISION = ControlDecision(1.0, 1.0, 0, "off", "")


def judge(prompt: Prompt, text: str) -> float:
    """Right or wrong at random."""
    return float(len(text) % 2)


def lengths(rows: int, mean: int, longest: int) -> list[int]:
    """Tokens of each answer: heavy-tailed, of this mean but for the cut."""
    draw = random.Random(0)
    middle = math.log(mean) - SIGMA**2 / 2
    return [max(1, min(longest, round(draw.lognormvariate(middle, SIGMA)))) for _ in range(rows)]


def reply(length: int, draw: np.random.Generator) -> dict[str, Any]:
    """What SGLang answers for one sample."""
    tokens, log_probs = draw.integers(0, VOCABULARY, length).tolist(), (-draw.exponential(1.0, length)).tolist()
    entries = [[log_prob, token, None] for log_prob, token in zip(log_probs, tokens, strict=True)]
    meta = {"finish_reason": {"type": "stop"}, "weight_version": "0", "output_token_logprobs": entries}
    return {"text": "", "output_ids": tokens, "meta_info": meta}


def engine(counts: Sequence[int], first: int) -> tuple[float, bytes]:
    """One engine's call for these answers, ``SAMPLES`` to a prompt: seconds of parsing, and the pickled groups."""
    draw = np.random.default_rng(first)
    bodies = [json.dumps(reply(count, draw), separators=(",", ":")).encode() for count in counts]
    prompt_tokens = tuple(draw.integers(0, VOCABULARY, PROMPT).tolist())
    seeds = range(first, first + len(counts))
    groups = [seeds[start : start + SAMPLES] for start in range(0, len(seeds), SAMPLES)]
    requests = [
        GenerateRequest(Prompt(str(own[0]), prompt_tokens, "", 1, VERIFIER), tuple(own), 1.0, max(counts))
        for own in groups
    ]
    start = time.process_time()
    rows = [(request, seed) for request in requests for seed in request.seeds]
    samples = iter([replies.sample(body, *row) for body, row in zip(bodies, rows, strict=True)])
    seconds = time.process_time() - start
    drawn = [SampleGroup(r.prompt, tuple(next(samples) for _ in r.seeds), r.role) for r in requests]
    return seconds, pickle.dumps(drawn, protocol=5)


class Clock(Counter[str]):
    """CPU seconds of this process by phase."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what happens within for ``phase``."""
        start = time.process_time()
        yield
        self[phase] += time.process_time() - start


class TimedDecoder:
    """A tokenizer whose decoding counts for itself."""

    def __init__(self, tokenizer: Tokenizer, clock: Clock) -> None:
        self._tokenizer, self._clock = tokenizer, clock

    def decode_batch(self, sequences: Sequence[np.ndarray]) -> list[str]:
        """See ``Tokenizer``."""
        start = time.process_time()
        texts = self._tokenizer.decode_batch(sequences)
        seconds = time.process_time() - start
        self._clock["decode"] += seconds
        self._clock["verify"] -= seconds  # within which it is called
        return texts


def write_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level vocabulary of random words, as wide as a token of Qwen's is on average."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    letters = [letter for letter in alphabet if letter.isascii() and letter.isalpha()]
    draw, words = random.Random(0), dict.fromkeys(alphabet)
    while len(words) < VOCABULARY - 1:
        words["Ġ" * draw.randint(0, 1) + "".join(draw.choices(letters, k=draw.randint(1, 7)))] = None
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"vocab_size": VOCABULARY, "eos_token_id": VOCABULARY - 1}
    (folder / "config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def received(counts: Sequence[int], clock: Clock) -> Iterator[list[SampleGroup]]:
    """The groups of one call after the other."""
    calls = [(counts[first : first + ROWS_AT_ONCE], first) for first in range(0, len(counts), ROWS_AT_ONCE)]
    with multiprocessing.get_context("forkserver").Pool(1) as engines:
        waiting = engines.imap(_engine, calls)
        for _ in calls:
            with clock("decode"):
                seconds, pickled = next(waiting)
                groups = pickle.loads(pickled)
            clock["engines"] += seconds
            yield groups


def _engine(call: tuple[Sequence[int], int]) -> tuple[float, bytes]:
    return engine(*call)


def ship(batch: TrainBatch, clock: Clock) -> int:
    """Bytes of all shares, each made, pickled and copied."""
    cut, total = dealing.Cut(max_tokens=BUDGET, packed=True), 0
    with clock("pack"):
        dealt = dealing.deal(batch.lengths, batch.auxiliary, RANKS, cut, 1)
    made = shares(batch, dealt)
    for _ in dealt:
        with clock("pack"):
            share = next(made)
        with clock("ship"):
            buffers: list[pickle.PickleBuffer] = []
            small = pickle.dumps(share, protocol=5, buffer_callback=buffers.append)
            copies = [bytes(buffer.raw()) for buffer in buffers]
            total += len(small) + sum(map(len, copies))
    return total


def measure(rows: int, mean: int, longest: int) -> dict[str, Any]:
    """CPU seconds by phase, and the peak of memory."""
    clock, counts = Clock(), lengths(rows, mean, longest)
    config = RunConfig()
    config.rollout.max_new_tokens = longest
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_tokenizer(Path(folder))
    stage = VerifierStage(DataConfig(), TimedDecoder(tokenizer, clock))
    groups: list[SampleGroup] = []
    for drawn in received(counts, clock):
        with clock("verify"):
            groups += stage.verify(drawn)
    stage.close()
    with clock("build"):
        batch = build_batch(groups, [], DECISION, config)
    shipped = ship(batch, clock)
    seconds = {phase: round(clock[phase], 3) for phase in ("decode", "verify", "build", "pack", "ship")}
    return {
        "rows": rows,
        "tokens": sum(counts),
        "longest": max(counts),
        "cpu_seconds": seconds | {"total": round(sum(seconds.values()), 3)},
        "engines_cpu_seconds": round(clock["engines"], 3),
        "shipped_gib": round(shipped / GIB, 3),
        "rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 3),
    }


def main() -> None:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--mean", type=int, default=5000, help="tokens of an answer")
    parser.add_argument("--longest", type=int, default=31_700, help="tokens of an answer at most")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments.rows, arguments.mean, arguments.longest)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
