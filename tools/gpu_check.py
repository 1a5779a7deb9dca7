"""Runs every check that needs a GPU, in one call, and prints one table: `python -m tools.gpu_check`.

    python -m tools.gpu_check --json runs/gpu_check.json          # all of it, 15 minutes on one H100, unmeasured
    python -m tools.gpu_check --only resume packed               # some of it

In this order, so that a quarter of an hour on one GPU tells the most; the table is written after every part, so a run
that is cut off leaves what it found:

- environment: chip, torch, CUDA, Triton, megatron-core, Transformer Engine
- resume: train with the distributed optimizer (Transformer Engine's FusedAdam), save, kill, restore in a new process,
  go on
- weights: one update of an SGLang server by each weight path, log-probs of its samples against the learner's
- packed: a step of packed rows in FP8 against the same in bf16
- colocated: release and resume of a server on the learner's GPU, three times
- tests: tests/gpu, among them the reference quantisers against Transformer Engine's bit for bit, and the Triton kernels
  against float64
- kernels: seconds and memory of the log-prob kernels against their peers and the time that reading and writing the
  logits takes
- linear: Transformer Engine's linear layer in bf16 and under each FP8 recipe, forward and backward, against float32
- learner: updates of a 1B-parameter Qwen3-shaped model in bf16 and under each FP8 recipe: tokens/s, memory, loss

Needs one CUDA GPU; what is not installed fails by name. Exit code 1 if anything failed. Not yet run on a GPU; resume,
weights, packed (FP8 emulated) and colocated were run on a CPU with a small model (28 November 2026).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
# Largest relative error of y, dx and dw against float32 on normal numbers: bf16's 8 bits; e4m3's 4, e5m2's 3 in the
# gradient.
LIMITS = {"bf16": 0.01, "fp8": 0.1}
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
ROWS, TOKENS, PROMPT, STEPS = 16, 2048, 256, 4  # per update of the learner


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    part: str
    what: str
    found: str
    ok: bool
    figures: dict[str, float]


def row(part: str, what: str, ok: bool, **figures: float) -> Row:
    """A line whose text is its figures."""
    return Row(part, what, ", ".join(f"{name} {value:.4g}" for name, value in figures.items()), ok, figures)


def environment() -> Iterator[Row]:
    """Versions, and that Transformer Engine imports."""
    yield Row("environment", "chip", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}", True, {})
    for package in ("torch", "triton", "megatron-core", "transformer-engine"):
        try:
            yield Row("environment", package, importlib.metadata.version(package), True, {})
        except importlib.metadata.PackageNotFoundError:
            yield Row("environment", package, "not installed", False, {})
    import transformer_engine.pytorch  # noqa: F401 (its libraries load)


def resume() -> Iterator[Row]:
    """What a run that was killed after a save goes on with, against what it would have gone on with."""
    with tempfile.TemporaryDirectory() as name:
        folder = _model(Path(name))
        killed, resumed = folder / "killed.json", folder / "resumed.json"
        codes = [_in_process(_train_until_killed, folder, killed), _in_process(_train_on, folder, resumed)]
        if codes != [-signal.SIGKILL, 0] or not resumed.exists():
            yield Row("resume", "train, save, kill, restore", f"ended with {codes}", False, {})
            return
        expected, found = (json.loads(path.read_text()) for path in (killed, resumed))
        apart = [abs(a - b) for a, b in zip(expected, found, strict=True)]
        yield row("resume", "losses after the save", not any(apart), first=apart[0], second=apart[1])


def _in_process(function: Callable[..., None], *arguments: Path) -> int | None:
    """Exit code of ``function`` in a process of its own, with attention that computes the same each time."""
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    del os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"]
    return process.exitcode


def _train_until_killed(folder: Path, losses: Path) -> None:
    made = _learner(folder, distributed=True)
    for step in (0, 1):
        made.update(_batch(step), step)
    written = made.save(folder / "checkpoint")()
    (folder / "files.json").write_bytes(msgspec.json.encode(written))
    losses.write_text(json.dumps([made.update(_batch(step), step).loss for step in (2, 3)]))
    os.kill(os.getpid(), signal.SIGKILL)


def _train_on(folder: Path, losses: Path) -> None:
    made = _learner(folder, distributed=True)
    from pipeline.fingerprints import Fingerprint

    written = msgspec.json.decode((folder / "files.json").read_bytes(), type=dict[str, Fingerprint])
    made.restore(folder / "checkpoint", written)
    losses.write_text(json.dumps([made.update(_batch(step), step).loss for step in (2, 3)]))
    made.close()


def weights() -> Iterator[Row]:
    """One update of a server beside the learner by each of ``rollout.weight_transport``."""
    for transport in ("plan", "disk"):
        with _engine_beside_learner(weight_transport=transport) as (made, engine):
            yield _pushed("weights", transport, made, engine, 1)


def colocated() -> Iterator[Row]:
    """The server leaves its memory to an update of the learner and comes back with the new weights."""
    with _engine_beside_learner(placement="colocated") as (made, engine):
        for version in (1, 2, 3):
            before = torch.cuda.mem_get_info()[0]
            engine[0].release()
            freed = (torch.cuda.mem_get_info()[0] - before) / 2**30
            found = _pushed("colocated", f"round {version}", made, engine, version)
            yield row("colocated", found.what, found.ok and freed > 1, **found.figures, **{"released GiB": freed})


@contextmanager
def _engine_beside_learner(**rollout: Any) -> Iterator[tuple[Any, Any]]:
    from pipeline.config.schema import RolloutConfig, SglangConfig
    from pipeline.model.grid import Grid
    from pipeline.reshard.engine_grid import EngineGrid, Placement
    from pipeline.reshard.order import PlanInputs
    from pipeline.rollout.sglang.engine import SglangEngine
    from pipeline.rollout.weight_sync import WeightSync

    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = _model(Path(name))
        settings = RolloutConfig(engine="sglang", sglang=SglangConfig(mem_fraction_static=0.3), **rollout)
        engine = SglangEngine(settings, index=0, log_dir=folder / "logs", seed=1)
        stack.callback(engine.close)
        engine.start(folder)
        made = _learner(folder)
        stack.callback(made.close)
        inputs = PlanInputs(str(folder), Grid(), EngineGrid(), Placement.consecutive(1, 1, False), 512 << 20, "bf16")
        # One GPU holds both, which NCCL refuses.
        yield made, (engine, WeightSync(made, engine, inputs, 600.0, backend="gloo", probe=True))


def _pushed(part: str, what: str, made: Any, engine_and_sync: Any, version: int) -> Row:
    """An update, its weights pushed, and how far the server's log-probs are from the learner's; bf16 on both sides."""
    from pipeline.types import GenerateRequest, Prompt

    engine, sync = engine_and_sync
    made.update(_batch(version), version)
    start = time.perf_counter()
    sync.push(version)
    seconds = time.perf_counter() - start
    prompt = tuple(range(100, 100 + PROMPT))
    (group,) = engine.generate([GenerateRequest(Prompt("p", prompt, "", None, "exact"), tuple(range(8)), 1.0, 128)])
    apart = []
    for sample in group.samples:
        tokens = torch.tensor([[*prompt, *map(int, sample.token_ids)]])
        column = torch.arange(1, tokens.shape[1])
        said = made.log_probs(_rows(tokens, (column >= len(prompt))[None], torch.tensor([tokens.shape[1]]), version))
        apart.append((said - torch.as_tensor(sample.log_probs)).abs().mean())
    mean = float(torch.stack(apart).mean())
    return row(part, what, mean < 0.05, seconds=seconds, **{"mean difference, nats": mean})


def packed() -> Iterator[Row]:
    """Rows of uneven length joined to sequences, in bf16 and in FP8: by the default recipe where the chip runs it."""
    from megatron_ext.fp8.transformer_engine import chip_problem
    from pipeline.config.schema import PrecisionConfig

    chip = torch.cuda.get_device_capability(), torch.version.cuda
    recipes = (PrecisionConfig().fp8_recipe, *RECIPES)
    recipe = next((name for name in recipes if not chip_problem(name, *chip)), None)
    with tempfile.TemporaryDirectory() as name:
        folder = _model(Path(name))
        cut = {"packing": True, "max_tokens_per_micro_batch": 2 * TOKENS}
        for label, precision in (("bf16", {}), (recipe, {"fp8": "hybrid", "fp8_recipe": recipe})):
            if label is None:
                yield Row("packed", "FP8", "refused: no recipe runs on this chip", True, {})
                continue
            made = _learner(folder, PrecisionConfig(**precision), **cut)
            stats = [made.update(_batch(step, uneven=True), step) for step in range(2)]
            made.close()
            figures = {"loss": stats[0].loss, "entropy": stats[0].entropy.mean, "gradient norm": stats[0].grad_norm}
            if label == "bf16":
                expected = figures
            close = abs(figures["entropy"] - expected["entropy"]) < 0.05
            yield row("packed", label, close, **figures, seconds=stats[1].seconds)


def tests() -> Iterator[Row]:
    """tests/gpu, a line per file."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        sys.stderr.write(done.stdout[-8000:] + done.stderr[-2000:])
        if not report.exists():
            yield Row("tests", "tests/gpu", f"pytest ended with {done.returncode} and no report", False, {})
            return
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    for name in sorted({case.attrib["classname"] for case in cases}):
        mine = [case for case in cases if case.attrib["classname"] == name]
        failed = sum(case.find("failure") is not None or case.find("error") is not None for case in mine)
        skipped = sum(case.find("skipped") is not None for case in mine)
        counts = {"passed": len(mine) - failed - skipped, "failed": failed, "skipped": skipped}
        yield row("tests", name.rpartition(".")[2], not failed and counts["passed"] > 0, **counts)


def linear() -> Iterator[Row]:
    """y, dx and dw of Transformer Engine's layer, 2048 tokens, 2048 to 4096 features."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    from megatron_ext.fp8.transformer_engine import chip_problem

    made = {
        "delayed": recipes.DelayedScaling,
        "tensorwise": recipes.Float8CurrentScaling,
        "blockwise": recipes.Float8BlockScaling,
        "mxfp8": recipes.MXFP8BlockScaling,
    }
    torch.manual_seed(0)
    x, g = (torch.randn(2048, size, device="cuda", dtype=torch.bfloat16) for size in (2048, 4096))
    weight = (torch.randn(4096, 2048, device="cuda") / 2048**0.5).bfloat16()
    exact = x.float() @ weight.float().T, g.float() @ weight.float(), g.float().T @ x.float()
    for name in ("bf16", *RECIPES):
        problem = name in made and chip_problem(name, torch.cuda.get_device_capability(), torch.version.cuda)
        if problem:
            yield Row("linear", name, f"refused: {problem}", True, {})
            continue
        layer = te.Linear(2048, 4096, bias=False, params_dtype=torch.bfloat16)
        layer.weight.data.copy_(weight)
        for _ in range(3):  # delayed scaling learns its scales
            leaf = x.clone().requires_grad_(True)
            layer.weight.grad = None
            with te.autocast(enabled=name in made, recipe=made[name]() if name in made else None):
                y = layer(leaf)
            y.backward(g)
        found = zip(("y", "dx", "dw"), (y, leaf.grad, layer.weight.grad), exact, strict=True)
        errors = {what: float((value.float() - true).norm() / true.norm()) for what, value, true in found}
        yield row("linear", name, max(errors.values()) < LIMITS["bf16" if name == "bf16" else "fp8"], **errors)


def kernels() -> Iterator[Row]:
    """The benchmark of the log-prob kernels; from logits within 1.5 of the floor."""
    from tools.bench import logprobs as bench

    for case in bench.CUDA_CASES:
        table = bench.run(case, "cuda", 7)
        floor = bench.floor(case, "cuda")
        bench.show(case, table, None if case.hidden else floor)
        for name, line in table.items():
            seconds = {part: line[part] for part in ("forward_s", "backward_s")}
            ratios = {} if case.hidden else {f"{part} / floor": seconds[part] / floor[part] for part in seconds}
            ours = "triton" in name and not case.hidden
            within = not ours or sum(seconds.values()) <= 1.5 * sum(floor.values())
            yield row("kernels", f"{case.name}: {name}", within, **seconds, **ratios, peak_U=line["peak_u"])


def learner() -> Iterator[Row]:
    """The same updates in bf16 and FP8: tokens/s over the last of them, memory, and how far the losses are apart."""
    from megatron_ext.fp8.transformer_engine import chip_problem
    from pipeline.config.schema import PrecisionConfig

    with tempfile.TemporaryDirectory() as name:
        folder = _model(Path(name))
        old = _log_probs(folder)
        reference = _train(folder, PrecisionConfig(), old)
        yield row("learner", "bf16", True, **_figures(reference, reference))
        for recipe in RECIPES:
            problem = chip_problem(recipe, torch.cuda.get_device_capability(), torch.version.cuda)
            if problem:
                yield Row("learner", recipe, f"refused: {problem}", True, {})
                continue
            found = _train(folder, PrecisionConfig(fp8="hybrid", fp8_recipe=recipe), old)
            figures = _figures(found, reference)
            yield row("learner", recipe, figures["largest loss difference"] < 0.05, **figures)


def _model(folder: Path) -> Path:
    """A Hugging Face folder of ``MODEL`` with random weights in bf16."""
    from safetensors.torch import save_file

    from pipeline.model import architecture, layout
    from pipeline.model.grid import Grid

    (folder / "config.json").write_text(json.dumps(MODEL))
    # An engine asks for a token that ends a response; it is seldom drawn.
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": MODEL["vocab_size"] - 1}))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for line in layout.rows(architecture.read(folder), Grid()):
        for source in line.sources:
            if len(source.shape) == 1:
                tensors[source.name] = torch.ones(source.shape, dtype=torch.bfloat16)
            else:
                values = torch.randn(source.shape, generator=generator, device=device) * 0.02
                tensors[source.name] = values.bfloat16().cpu()
    save_file(tensors, folder / "model.safetensors")
    return folder


def _learner(folder: Path, precision: Any = None, *, distributed: bool = False, **cut: Any) -> Any:
    from megatron_ext import topology
    from megatron_ext.learner import MegatronLearner
    from pipeline.config.schema import LearnerConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, PrecisionConfig
    from pipeline.model.grid import Grid
    from pipeline.ports import free_port

    optimizer = OptimizerConfig(lr=1e-5, distributed=distributed)
    made = MegatronLearner(
        LearnerConfig(**({"micro_batch_size": 2} | cut), precision=precision or PrecisionConfig(), optimizer=optimizer),
        ModelConfig(hf_path=str(folder), dtype="bf16"),
        ObjectiveConfig(),
        total_steps=STEPS,
        seed=0,
        topology=topology.initialize(0, ("127.0.0.1", free_port()), Grid(), seed=0),
    )
    made.load(folder)
    return made


def _log_probs(folder: Path) -> list[torch.Tensor]:
    """What the bf16 model says of every step's rows at the start: against it, losses differ where models do."""
    from pipeline.config.schema import PrecisionConfig

    made = _learner(folder, PrecisionConfig())
    found = [made.log_probs(_batch(step)) for step in range(STEPS)]
    made.close()
    return found


def _train(folder: Path, precision: Any, old: list[torch.Tensor]) -> dict[str, Any]:
    """``STEPS`` updates on random rows: losses, entropies, seconds and the peak of memory."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    made = _learner(folder, precision)
    stats = [made.update(replace(_batch(step), old_log_probs=old[step]), step) for step in range(STEPS)]
    made.close()
    return {
        "losses": [each.loss for each in stats],
        "entropies": [each.entropy.mean for each in stats],
        "seconds": statistics.median(each.seconds for each in stats[1:]),
        "peak": torch.cuda.max_memory_allocated(),
    }


def _batch(seed: int, *, uneven: bool = False) -> Any:
    """Random rows: all of ``TOKENS``, or of anything from twice the prompt to that."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.full((ROWS,), TOKENS)
    if uneven:
        lengths[1:] = torch.randint(2 * PROMPT, TOKENS + 1, (ROWS - 1,), generator=generator)
    column = torch.arange(1, TOKENS)
    mask = (column >= PROMPT) & (column < lengths[:, None])
    return _rows(torch.randint(0, MODEL["vocab_size"], (ROWS, TOKENS), generator=generator), mask, lengths, seed)


def _rows(tokens: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor, seed: int) -> Any:
    """A batch of ``tokens`` ``[rows, seq]`` whose targets are those of ``mask`` ``[rows, seq - 1]``."""
    from pipeline.types import TrainBatch

    inside = torch.arange(tokens.shape[1]) < lengths[:, None]
    targets = mask.sum(1)
    return TrainBatch(
        tokens=tokens[inside].int(),
        loss_mask=torch.cat([torch.zeros(len(tokens), 1, dtype=torch.bool), mask], dim=1)[inside],
        lengths=lengths,
        targets=targets,
        weights=torch.full((len(tokens),), 1.0 / int(targets.sum())),
        advantages=torch.randn(len(tokens), generator=torch.Generator().manual_seed(seed)),
        auxiliary=torch.zeros(len(tokens), dtype=torch.bool),
        correct=torch.zeros(len(tokens), dtype=torch.bool),
        temperatures=torch.ones(len(tokens)),
        behavior_log_probs=torch.zeros(int(targets.sum())),
    )


def _figures(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    from pipeline.units import GIB

    def apart(name: str) -> float:
        return max(abs(a - b) for a, b in zip(found[name], reference[name], strict=True))

    return {
        "tokens/s": ROWS * TOKENS / found["seconds"],
        "speed-up": reference["seconds"] / found["seconds"],
        "peak GiB": found["peak"] / GIB,
        "largest loss difference": apart("losses"),
        "largest entropy difference": apart("entropies"),
    }


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    part.__name__: part for part in (environment, resume, weights, packed, colocated, tests, kernels, linear, learner)
}


def examine(names: Sequence[str], json_path: Path | None) -> list[Row]:
    """The rows of these parts, in the order of ``PARTS``.

    ``json_path`` holds those of every part that is done, whatever comes after.
    """
    rows: list[Row] = []
    for name in (part for part in PARTS if part in names):
        try:
            for line in PARTS[name]():
                rows.append(line)
                print(f"{'ok    ' if line.ok else 'FAILED'} {line.part}: {line.what}: {line.found}", flush=True)
        except Exception as error:  # noqa: BLE001 (whatever it is, the other parts have something to say all the same)
            traceback.print_exc()
            rows.append(Row(name, "ended early", f"{type(error).__name__}: {error}", False, {}))
        if json_path:
            json_path.parent.mkdir(parents=True, exist_ok=True)
            json_path.write_text(json.dumps([asdict(line) for line in rows], indent=1) + "\n")
    return rows


def main() -> None:
    """Run the parts, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--json", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_check needs a CUDA GPU, and torch sees none here. What a CPU can prove: make test")
    rows = examine(arguments.only, arguments.json)
    print("\n| part | what | found | |\n|---|---|---|---|")
    for line in rows:
        print(f"| {line.part} | {line.what} | {line.found} | {'ok' if line.ok else 'FAILED'} |")
    sys.exit(0 if all(line.ok for line in rows) else 1)


if __name__ == "__main__":
    main()
