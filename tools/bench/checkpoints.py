"""How long a checkpoint takes, and how long training waits for it, on 1, 2 and 4 data-parallel ranks of one machine.

    python -m tools.bench.checkpoints

A Qwen3 of 61 million parameters in float32 under the distributed optimizer: 16 bytes a parameter on the disk, where a
parameter and its original are kept apart. "stall": until training may go on; "written": until all is on the disk;
"check": the ranks compare checksums, the files in the page cache; "load": that and all else of a resume. In
brackets what the busiest rank computed, which depends less on what else the machine does.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext import snapshot, topology
from megatron_ext.learner import MegatronLearner
from pipeline.config.schema import LearnerConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from pipeline.model.grid import grid_of
from tools.bench import layouts

CASES = {"1 rank": 1, "2 ranks": 2, "4 ranks": 4}
MODEL = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 26000,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def bench(name: str) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        return layouts.run(name, CASES[name], measure, folder)


def measure(rank: int, folder: str, world: int, port: int, out: Any) -> None:
    """Save and restore on one rank of ``world``; rank 0 tells the seconds of the slowest."""
    torch.set_num_threads(1)
    learner = LearnerConfig(data_parallel_size=world, optimizer=OptimizerConfig(distributed=True))
    placed = topology.initialize(rank, ("127.0.0.1", port), grid_of(learner), seed=0)
    made = MegatronLearner(
        learner, ModelConfig(hf_path=folder), ObjectiveConfig(), total_steps=1, seed=0, topology=placed
    )
    (directory := Path(folder) / "checkpoint").mkdir(exist_ok=True)
    clock = _Clock()
    write = made.save(directory)
    clock("stall, s")
    own = write()
    clock("written, s", since="stall, s")
    everyones: list[Any] = [None] * world
    dist.all_gather_object(everyones, own)
    files = {name: found for one in everyones for name, found in one.items()}
    clock.restart()
    snapshot.check(directory, files, placed)
    clock("check, s")
    made.restore(directory, files)
    clock("load, s")
    if rank == 0:
        size = sum(found.bytes for found in files.values())
        most = max(sum(found.bytes for found in one.values()) for one in everyones)
        sizes = {"GiB": f"{size / 2**30:.2f}", "GiB of one rank": f"{most / 2**30:.2f}"}
        out.put(sizes | {name: f"{wall:.1f} ({cpu:.2f})" for name, (wall, cpu) in clock.found.items()})
    made.close()


class _Clock:
    """Seconds of phases by the clock, each until the slowest rank is through, and those that the busiest computed."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}
        self.restart()

    def restart(self) -> None:
        """A phase begins."""
        dist.barrier()
        self._since = time.perf_counter(), time.process_time()

    def __call__(self, name: str, since: str = "") -> None:
        """A phase ends, and the next begins; with ``since`` it is counted from where that phase began."""
        computed = torch.tensor(time.process_time() - self._since[1])
        dist.all_reduce(computed, op=dist.ReduceOp.MAX)
        before = self.found.get(since, (0.0, 0.0))
        self.found[name] = time.perf_counter() - self._since[0] + before[0], float(computed) + before[1]
        self.restart()


def main() -> None:
    """Every case, then print."""
    layouts.main(layouts.parser(__doc__), CASES, bench)


if __name__ == "__main__":
    main()
