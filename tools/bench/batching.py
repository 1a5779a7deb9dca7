"""Measures what cutting rows into micro-batches saves: padding, balance over ranks, and CPU time of real updates.

    python tools/bench/batching.py                  # both tables
    python tools/bench/batching.py --no-updates --rows 16384 --ranks 64
    python tools/bench/batching.py --no-updates --json

Responses have log-normal lengths, cut off at a limit. The first table is arithmetic; "in turn" is what one does without
a schedule: row i to rank i mod ranks, in order. The second times ``MegatronLearner.update`` of a small model in one
process, in CPU seconds of this process, so that a busy machine matters little; repeats take turns and the least of each
counts.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_ext import topology
from megatron_ext.learner import MegatronLearner
from pipeline.batching import dealing
from pipeline.batching.dealing import Cut
from pipeline.config.schema import LearnerConfig, ModelConfig, ObjectiveConfig
from pipeline.model import architecture, layout
from pipeline.model.grid import Grid
from pipeline.ports import free_port
from pipeline.types import TrainBatch

PROMPT, MEDIAN, SIGMA, LIMIT, ROWS_AT_ONCE = 200, 1100, 0.8, 8192, 4
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
SMALL = 16  # the updates' rows are so many times shorter


def lengths(rows: int, seed: int = 0) -> list[int]:
    """Tokens of prompt and response."""
    draw = random.Random(seed)
    return [PROMPT + min(LIMIT, 1 + int(MEDIAN * draw.lognormvariate(0, SIGMA))) for _ in range(rows)]


def in_turn(tokens: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Rows dealt to the ranks in turn, each rank's packed in order until the budget is full."""
    dealt = []
    for rank in range(ranks):
        packs: list[list[int]] = [[]]
        for row in range(rank, len(tokens), ranks):
            if sum(tokens[i] for i in packs[-1]) + tokens[row] > budget:
                packs.append([])
            packs[-1].append(row)
        dealt.append(packs)
    return dealt


def arithmetic(rows: int, ranks: int) -> dict[str, dict[str, float]]:
    """How each way of cutting spends its positions, at the same largest micro-batch."""
    tokens = lengths(rows)
    longest = max(tokens)
    budget = ROWS_AT_ONCE * longest
    turns = [list(range(rank, rows, ranks)) for rank in range(ranks)]
    by_rows = [[own[i : i + ROWS_AT_ONCE] for i in range(0, len(own), ROWS_AT_ONCE)] for own in turns]
    grid, packed = Cut(max_tokens=budget), Cut(max_tokens=budget, packed=True)
    fixed = Cut(max_rows=ROWS_AT_ONCE)
    ways = {
        "rows in turn, as wide as the step": ([longest] * rows, by_rows, fixed),
        "rows in turn, as wide as the micro-batch": (tokens, by_rows, fixed),
        "packed in turn": (tokens, in_turn(tokens, ranks, budget), packed),
    }
    seconds = dict.fromkeys(ways, 0.0)
    for name, cut in {"micro_batch_size": fixed, "max_tokens_per_micro_batch": grid, "with packing": packed}.items():
        start = time.process_time()
        ways[name] = tokens, dealing.micro_batches(tokens, ranks, cut), cut
        seconds[name] = time.process_time() - start
    table = {}
    for name, (widths, dealt, cut) in ways.items():
        work = [[cut.positions([widths[row] for row in micro]) for micro in own] for own in dealt]
        busiest, total = max(map(sum, work)), sum(map(sum, work))
        table[name] = {
            "micro-batches per rank": max(map(len, work)),
            "largest, tokens": max(map(max, work)),
            "padding": round(1 - sum(tokens) / total, 4),
            "busiest rank / mean": round(busiest * ranks / total, 4),
            "useful share of the busiest rank's time": round(sum(tokens) / (ranks * busiest), 4),
            "CPU seconds to cut": round(seconds[name], 3),
        }
    return table


def updates(rows: int, repeat: int) -> dict[str, dict[str, float]]:
    """Thousands of real tokens that an update of the small model takes in per CPU second."""
    tokens = [length // SMALL for length in lengths(rows)]
    longest = max(tokens)
    batch = _batch(tokens)
    by_rows: dict[str, Any] = {"micro_batch_size": ROWS_AT_ONCE}
    by_tokens: dict[str, Any] = {"max_tokens_per_micro_batch": ROWS_AT_ONCE * longest}
    ways = {
        "rows, as wide as the step": (by_rows, _widened(batch, longest)),
        "micro_batch_size": (by_rows, batch),
        "max_tokens_per_micro_batch": (by_tokens, batch),
        "with packing": (by_tokens | {"packing": True}, batch),
    }
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder))
        placed = topology.initialize(0, ("127.0.0.1", free_port()), Grid(), seed=0)
        runs = {name: (_learner(Path(folder), placed, config), given) for name, (config, given) in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        stats = {}
        for step in range(repeat + 1):
            for name, (learner, given) in runs.items():
                start = time.process_time()
                stats[name] = learner.update(given, step)
                seconds[name].append(time.process_time() - start)
        topology.shutdown()
    return {
        name: {
            "thousand tokens per CPU second": round(sum(tokens) / min(taken[1:]) / 1e3, 2),
            "tokens per micro-batch": round(stats[name].metrics["tokens_per_micro_batch"], 1),
            "loss": round(stats[name].loss, 6),
        }
        for name, taken in seconds.items()
    }


def _batch(tokens: Sequence[int]) -> TrainBatch:
    """Random rows of these lengths, the first few tokens of each the prompt; token-mean weights."""
    generator, rows, prompt = torch.Generator().manual_seed(0), len(tokens), PROMPT // SMALL
    lengths = torch.tensor(tokens)
    targets = lengths - prompt
    kinds = torch.tensor([False, True]).repeat(rows)
    return TrainBatch(
        tokens=torch.randint(0, LLAMA["vocab_size"], (sum(tokens),), generator=generator, dtype=torch.int32),
        loss_mask=kinds.repeat_interleave(torch.stack([lengths - targets, targets], dim=1).flatten()),
        lengths=lengths,
        targets=targets,
        weights=torch.full((rows,), 1.0 / int(targets.sum())),
        advantages=torch.randn(rows, generator=generator),
        auxiliary=torch.zeros(rows, dtype=torch.bool),
        correct=torch.zeros(rows, dtype=torch.bool),
        temperatures=torch.ones(rows),
        behavior_log_probs=torch.zeros(int(targets.sum())),
    )


def _widened(batch: TrainBatch, width: int) -> TrainBatch:
    """The same targets in rows of ``width`` tokens."""
    inside = torch.arange(width) < batch.lengths[:, None]
    tokens, mask = (
        flat.new_zeros(inside.shape).masked_scatter(inside, flat) for flat in (batch.tokens, batch.loss_mask)
    )
    lengths = torch.full_like(batch.lengths, width)
    return replace(batch, tokens=tokens.flatten(), loss_mask=mask.flatten(), lengths=lengths)


def _write(folder: Path) -> None:
    """A Hugging Face folder of small random weights."""
    (folder / "config.json").write_text(json.dumps(LLAMA))
    generator = torch.Generator().manual_seed(0)
    rows = [row for row in layout.rows(architecture.parse(LLAMA)) if row.exported]
    shapes = {source.name: source.shape for row in rows for source in row.sources}
    tensors = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")


def _learner(folder: Path, placed: topology.Topology, config: dict[str, Any]) -> MegatronLearner:
    model = ModelConfig(hf_path=str(folder))
    learner = MegatronLearner(
        LearnerConfig(**config), model, ObjectiveConfig(), total_steps=100, seed=0, topology=placed
    )
    learner.load(folder)
    return learner


def main() -> None:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--no-updates", action="store_true", help="only the arithmetic")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tables = {"cut": arithmetic(arguments.rows, arguments.ranks)}
    if not arguments.no_updates:
        tables["updates"] = updates(max(4, arguments.rows // 8), arguments.repeat)
    if arguments.json:
        print(json.dumps(tables, indent=1))
        return
    for table in tables.values():
        columns = list(next(iter(table.values())))
        print("| way | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
        for name, row in table.items():
            print(f"| {name} | " + " | ".join(str(row[column]) for column in columns) + " |")
        print()


if __name__ == "__main__":
    main()
