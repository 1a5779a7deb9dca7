"""Measures a training step whose samples are drawn beside the training, with a real SGLang server.

    python -m tools.bench.overlap --json overlap.json --runs runs/overlap

Three runs of the same loop: in turns (``rollout.staleness=0``), one step ahead (1), and two with responses held at a
weight update (2 and ``rollout.partial``; without it, two ahead wait for a step's longest as one does). The server and
its processes are held to one core, the learner with the loop and the client to another. The model is a Llama with
random weights, of a size at which sampling and training take about as long; its answers end at random, so that a step's
longest is several times its mean. Seconds are medians over steps, without the first ones and the last.

``sample_s`` and ``train_s`` are those of the run in turns, ``turns_s`` is its step, ``step_s`` the step one ahead, and
``ratio_to_max`` is ``step_s / max(sample_s, train_s)``. Where other work on the machine comes and goes,
``ratio_to_own_max`` tells more: the median of each step over the longer of its own drawing and training;
``turns_ratio`` is the same in turns. ``waiting_step_s`` is ``step_s``, whose weights wait for the longest response, and
``partial_step_s`` the step of the run that holds it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from pipeline.config.load import PACKAGED, load_config
from pipeline.config.schema import RunConfig
from pipeline.model import architecture, layout
from pipeline.monitoring.events import read_events
from pipeline.monitoring.recorder import Recorder

TOKENIZER = PACKAGED / "model" / "pm4-100k"
NOT_COUNTED = 3  # first steps: allocations, connections, and what is drawn before anything is trained
SPREAD, LOGIT = 1.5, 2.0  # standard deviations: of the logit that ends an answer, and of every other

WORDS = (
    "runtime=inline",
    "learner.tensor_model_parallel_size=1",
    "rollout.engine=sglang",
    "rollout.sglang.max_total_tokens=16384",
    "entropy.controller=none",
    "evaluation.every=0",
    "evaluation.at_start=false",
    "evaluation.at_end=false",
    "monitoring.progress=false",
    "monitoring.samples_per_step=0",
    "checkpoint.every=0",
)


RUNS = {
    "turns": ["rollout.staleness=0"],
    "ahead": ["rollout.staleness=1"],
    "partial": ["rollout.staleness=2", "rollout.partial=true"],
}


def write_model(folder: Path, hidden: int, layers: int, positions: int) -> None:
    """A Llama with random weights and the tokenizer of pm4; ``positions``: prompt and answer, in tokens."""
    shutil.copytree(TOKENIZER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    config |= {"head_dim": hidden // config["num_attention_heads"], "max_position_embeddings": positions}
    (folder / "config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in layout.tensor_shapes(architecture.read(folder)).items():
        tensors[name] = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=draw) / shape[-1] ** 0.5
    tensors["lm_head.weight"] *= LOGIT
    tensors["lm_head.weight"][config["eos_token_id"]] *= SPREAD / LOGIT
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pin(learner: int, server: int) -> None:
    """Hold this process to one core and those that it started to another, thread by thread."""
    own = os.getpid()
    for process in family(own):
        for thread in Path(f"/proc/{process}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {learner if process == own else server})


def family(process: int) -> list[int]:
    """A process and all that descend from it."""
    found = [process]
    for each in found:  # grows meanwhile
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found


def computed_s(process: int) -> float:
    """Seconds for which a process and its descendants, those that live, have computed."""
    ticks = 0
    for each in family(process):
        with suppress(OSError):  # it has just ended
            ticks += sum(map(int, Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def train(config: RunConfig, cores: Sequence[int]) -> None:
    """One run, in this process."""
    from launchers.run import assemble  # imports megatron

    torch.set_num_threads(1)
    with ExitStack() as stack:
        recorder = stack.enter_context(Recorder(Path(config.run_dir), config))
        loop = assemble.build_loop(config, recorder, stack)
        pin(*cores)
        loop.learner.load(Path(config.model.hf_path))
        recorder.start(0)
        loop.run(lambda: False)
        recorder.finish(completed=True)


def steps_of(config: RunConfig, cores: Sequence[int]) -> list[dict[str, Any]]:
    """The ``step`` events of one run, in a process of its own. Raises ``SystemExit`` when it fails."""
    process = multiprocessing.get_context("spawn").Process(target=train, args=(config, cores))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the run in {config.run_dir} failed")
    events = read_events(Path(config.run_dir) / "events.jsonl")
    steps = [event for event in events if event["kind"] == "step"]
    return steps[NOT_COUNTED:-1] or steps


def median(steps: Sequence[Mapping[str, Any]], *names: str) -> float:
    """Of the sum of a step's seconds by these names."""
    return round(float(np.median([sum(step["seconds"][name] for name in names) for step in steps])), 4)


def compared(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The figures, from the steps of the runs ``turns``, ``ahead`` and ``partial``."""
    turns, ahead = runs["turns"], runs["ahead"]
    sample_s, train_s, step_s = median(turns, "sample", "verify"), median(turns, "train"), median(ahead, "total")
    return {
        "sample_s": sample_s,
        "train_s": train_s,
        "turns_s": median(turns, "total"),
        "step_s": step_s,
        "ratio_to_max": round(step_s / max(sample_s, train_s), 3),
        "ratio_to_own_max": own_ratio(ahead),
        "turns_ratio": own_ratio(turns),
        "waiting_step_s": step_s,
        "partial_step_s": median(runs["partial"], "total"),
        "seconds": {
            name: {phase: median(steps, phase) for phase in ("drawing", "train", "sync", "sample", "total")}
            for name, steps in runs.items()
        },
        "idle": {name: {who: mean(steps, "idle", who) for who in steps[0]["idle"]} for name, steps in runs.items()},
        "age": {name: mean(steps, "ages", "mean") for name, steps in runs.items()},
        "response_tokens": round(float(np.mean([step["response_length"] for step in turns])), 1),
    }


def own_ratio(steps: Sequence[Mapping[str, Any]]) -> float:
    """Median of each step's seconds over the longer of its drawing and training."""
    seconds = [step["seconds"] for step in steps]
    return round(float(np.median([each["total"] / max(each["drawing"], each["train"]) for each in seconds])), 3)


def mean(steps: Sequence[Mapping[str, Any]], group: str, name: str) -> float:
    """Of a figure over steps."""
    return round(float(np.mean([step[group][name] for step in steps])), 3)


def main() -> None:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--new-tokens", type=int, default=192, help="of an answer, at most")
    parser.add_argument("--cores", type=int, nargs=2, help="of the learner and of the server; default: the first two")
    parser.add_argument("--runs", type=Path, help="keep the folders of the runs here")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    usable = sorted(os.sched_getaffinity(0))
    cores = arguments.cores or [usable[0], usable[-1]]
    words = [
        *WORDS,
        f"steps={arguments.steps}",
        f"rollout.prompts_per_step={arguments.prompts}",
        f"rollout.samples_per_prompt={arguments.samples}",
        f"rollout.max_new_tokens={arguments.new_tokens}",
    ]
    with TemporaryDirectory() as scratch:
        runs = arguments.runs or Path(scratch)
        model = Path(scratch) / "model"
        write_model(model, arguments.hidden, arguments.layers, arguments.new_tokens + 16)
        found = {}
        for name, own in RUNS.items():
            given = [f"model.hf_path={model}", f"run_dir={(runs / name).resolve()}", *own]
            found[name] = steps_of(load_config(Path("recipe/pm4.yaml"), [*words, *given]), cores)
    figures = vars(arguments) | {"cores": cores, "json": None, "runs": None} | compared(found)
    text = json.dumps({name: value for name, value in figures.items() if value is not None}, indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
