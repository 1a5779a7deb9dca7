"""Measures conversion speed in GB/s, both directions, against a plain copy of the same bytes on the same disk.

    python tools/bench/conversion.py  # a synthetic Llama of about 400 MB
    python tools/bench/conversion.py --model runs/models/smollm2-135m-instruct --repeat 5
    python tools/bench/conversion.py --bridge-python .venv-bridge/bin/python  # beside megatron-bridge (make bridge-env)

All outputs are flushed to the disk (fsync), the copy's too; sources are in the page cache. Repeats take turns, so that
a busy machine slows all alike, megatron-bridge too (in one process, its imports not counted); the table has the median
of each and the medians of the per-turn ratios: to the copy, and how many times faster than megatron-bridge in the same
direction.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_ext.weights import convert
from pipeline.model import architecture, layout
from pipeline.model.grid import Grid

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


def synthetic(folder: Path, megabytes: int) -> Path:
    """A Llama-shaped folder of random bf16 weights, as large as asked for by its number of layers."""
    rows = {layers: _rows(layers) for layers in (1, 2)}
    sizes = {layers: 2 * sum(torch.Size(s.shape).numel() for r in of for s in r.sources) for layers, of in rows.items()}
    layers = 2 * max(1, round((megabytes * 1e6 - sizes[1]) / (sizes[2] - sizes[1]) / 2))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": layers}))
    sources = {source.name: source.shape for row in _rows(layers) for source in row.sources}
    tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in sources.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _rows(layers: int) -> list[layout.Row]:
    model = architecture.parse(LLAMA | {"num_hidden_layers": layers})
    return [row for row in layout.rows(model) if row.exported]


def copy(folder: Path, out: Path) -> None:
    """The weights' files, copied and flushed."""
    out.mkdir()
    for file in folder.glob("*.safetensors"):
        shutil.copyfile(file, out / file.name)
        descriptor = os.open(out / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class Bridge:
    """megatron-bridge with one folder, in a process of its own environment; what it says goes to ``log``."""

    def __init__(self, python: Path, folder: Path, log: Path) -> None:
        self._log = log
        words = [str(word) for word in (python, ROOT / "tools/bench/bridge.py", "convert", folder)]
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                words,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, task: str, *paths: Path) -> None:
        """Have one conversion done: ``there OUT`` or ``back CHECKPOINT OUT``."""
        print(json.dumps([task, *map(str, paths)]), file=self._process.stdin, flush=True)
        assert self._process.stdout is not None
        if "done" not in map(str.strip, iter(self._process.stdout.readline, "")):
            raise SystemExit(f"megatron-bridge failed:\n{self._log.read_text()[-2000:]}")

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def measure(folder: Path, work: Path, repeat: int, workers: int, bridge: Bridge | None) -> dict[str, dict[str, float]]:
    """Time every task turn by turn: GB/s, and the ratio to the copy and to megatron-bridge of the same turn."""
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    tasks: dict[str, Callable[[Path], object]] = {"file copy": lambda out: copy(folder, out)}
    groups = architecture.read(folder).kv_heads
    tp = next(tp for tp in range(2, groups + 1) if groups % tp == 0)
    for label, grid in {"": Grid(), f" TP{tp} PP2": Grid(tp=tp, pp=2)}.items():
        made = work / f"source{label}"
        tasks[f"hf to megatron{label}"] = lambda out, grid=grid: convert.hf_to_megatron(
            folder, out, grid, workers=workers
        )
        tasks[f"megatron to hf{label}"] = lambda out, made=made: convert.megatron_to_hf(
            made, folder, out, workers=workers
        )
        convert.hf_to_megatron(folder, made, grid, workers=workers)
    if bridge:
        bridge.ask("there", work / "bridge")
        tasks["megatron-bridge, hf to megatron"] = lambda out: bridge.ask("there", out)
        tasks["megatron-bridge, megatron to hf"] = lambda out: bridge.ask("back", work / "bridge", out)
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeat + 1):
        for name, task in tasks.items():
            out = work / "out"
            os.sync()
            start = time.perf_counter()
            task(out)
            seconds[name].append(time.perf_counter() - start)
            shutil.rmtree(out)
    measured = {name: values[1:] for name, values in seconds.items()}  # the first turn warms up

    def ratio(name: str, other: str) -> float:
        return round(statistics.median(b / a for a, b in zip(measured[name], measured[other], strict=True)), 3)

    results = {}
    for name, values in measured.items():
        results[name] = {
            "gb_per_s": round(nbytes / statistics.median(values) / 1e9, 3),
            "of_file_copy": ratio(name, "file copy"),
        }
        rival = f"megatron-bridge, {name.partition(' TP')[0]}"
        if rival in measured:
            results[name]["times_megatron_bridge"] = ratio(name, rival)
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, action="append", default=[], help="Hugging Face folder, besides the synthetic one"
    )
    parser.add_argument("--megabytes", type=int, default=400, help="size of the synthetic folder; 0: none")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()), help="where to write: the disk to measure"
    )
    parser.add_argument("--bridge-python", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as root:
        folders = list(arguments.model)
        if arguments.megabytes:
            folders.append(synthetic(Path(root) / f"llama-{arguments.megabytes}mb", arguments.megabytes))
        for folder in folders:
            work = Path(root) / f"work-{folder.name}"
            work.mkdir()
            python = arguments.bridge_python
            bridge = Bridge(python, folder, Path(root) / "bridge.log") if python else None
            results[folder.name] = measure(folder, work, arguments.repeat, arguments.workers, bridge)
            if bridge:
                bridge.close()
            shutil.rmtree(work)
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    print("| model | task | GB/s | of file copy | times megatron-bridge |\n|---|---|---|---|---|")
    for model, tasks in results.items():
        for name, row in tasks.items():
            rival = row.get("times_megatron_bridge", "-")
            print(f"| {model} | {name} | {row['gb_per_s']} | {row['of_file_copy']} | {rival} |")


if __name__ == "__main__":
    main()
