"""The loop reads like the algorithm: a step fits a screen, and everything in it has a name. Checkpoints are written
beside it.
"""

import ast
import threading
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline import fingerprints
from pipeline.checkpoints import CheckpointStore
from pipeline.config.load import load_config
from pipeline.evaluation.beside import DrawnBeside
from pipeline.loop import TrainingLoop
from pipeline.types import Prompt, Role, Sample, SampleGroup, WeightSpan

NO_EVALUATION = [f"evaluation.{key}" for key in ("at_start=false", "at_end=false", "every=0")]
ROOT = Path(__file__).resolve().parents[3]
SCREEN = 40  # lines


def starred(node: ast.AST) -> bool:
    """Whether a call is handed an unpacked sequence or mapping."""
    return isinstance(node, ast.Call) and (
        any(isinstance(argument, ast.Starred) for argument in node.args)
        or any(keyword.arg is None for keyword in node.keywords)
    )


def test_train_step_fits_a_screen():
    tree = ast.parse((ROOT / "pipeline/loop.py").read_text())
    (step,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "train_step"]
    assert step.end_lineno - step.lineno + 1 <= SCREEN


@pytest.mark.parametrize("module", ["loop", "step/queue", "step/draw"])
def test_arguments_are_named_not_unpacked(module):
    tree = ast.parse((ROOT / f"pipeline/{module}.py").read_text())
    assert [node.lineno for node in ast.walk(tree) if starred(node)] == []


class Slow:
    """A learner that copies its state at once and writes it when it is allowed to; it counts its updates."""

    def __init__(self) -> None:
        self.updates, self.allowed, self.error = 0, threading.Event(), None

    def save(self, folder):
        copied = str(self.updates).encode()

        def write():
            self.allowed.wait()
            if self.error is not None:
                raise self.error
            return {"updates": fingerprints.write(folder / "updates", copied)}

        return write


class Log:
    """A recorder of what happens, in order."""

    def __init__(self) -> None:
        self.said = []

    def begin(self, activity):
        self.said.append(activity)

    def snapshot(self, step):
        self.said.append(f"snapshot {step}")

    def checkpoint(self, saved):
        self.said.append(f"checkpoint {saved.step}")


def run_of(root, steps, every, at_step):
    """A loop whose steps do nothing but count, and call ``at_step(step, learner)``."""
    learner, nothing = Slow(), SimpleNamespace(state_dict=dict)
    loop = TrainingLoop(
        config=load_config("quickstart.yaml", [f"steps={steps}", f"checkpoint.every={every}", *NO_EVALUATION]),
        rollouts=SimpleNamespace(push=lambda step: None),
        learner=learner,
        verifier=None,
        cursor=nothing,
        queue=SimpleNamespace(state_dict=lambda: ([], {})),
        band=None,
        controller=nothing,
        held_out=(),
        recorder=Log(),
        checkpoints=CheckpointStore(root, keep_last=9),
        decision=SimpleNamespace(),
        drawn_beside=DrawnBeside(None),
    )

    def step():
        loop.recorder.said.append(f"step {loop.step}")
        at_step(loop.step, learner)
        learner.updates += 1
        loop.step += 1

    loop.train_step = step
    return loop


def saved_updates(root):
    return {path.name: int((path / "learner/updates").read_text()) for path in sorted(root.glob("step-*"))}


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path):
    """It is recorded when it is complete, and holds what was there when it was begun."""
    loop = run_of(tmp_path, 5, 2, lambda step, learner: learner.allowed.set() if step == 3 else None)
    loop.run(lambda: False)
    said = [word for word in loop.recorder.said if word != "checkpoint"]
    begun, complete = said.index("snapshot 2"), said.index("checkpoint 2")
    assert said[begun + 1 : begun + 3] == ["step 2", "step 3"], "the checkpoint was not waited for"
    assert complete < said.index("snapshot 4"), "one at a time"
    assert said[-2:] == ["snapshot 5", "checkpoint 5"], "the end waits for it"
    assert saved_updates(tmp_path) == {"step-00000002": 2, "step-00000004": 4, "step-00000005": 5}


def test_a_request_to_stop_waits_for_the_checkpoint_in_the_making_and_makes_one(tmp_path):
    stop = threading.Event()

    def at_step(step, learner):
        if step == 2:
            stop.set()
            threading.Timer(0.05, learner.allowed.set).start()

    loop = run_of(tmp_path, 9, 2, at_step)
    loop.run(stop.is_set)
    assert saved_updates(tmp_path) == {"step-00000002": 2, "step-00000003": 3}
    assert [word for word in loop.recorder.said if word.startswith("checkpoint ")] == ["checkpoint 2", "checkpoint 3"]


def test_what_kept_a_checkpoint_from_being_written_ends_the_run_after_the_step_in_progress(tmp_path):
    def at_step(step, learner):
        if step == 3:
            learner.error = RuntimeError("rank 1: No space left on device")
            learner.allowed.set()
            wait([loop.checkpoints._writing])

    loop = run_of(tmp_path, 9, 2, at_step)
    with pytest.raises(RuntimeError, match="rank 1: No space left"):
        loop.run(lambda: False)
    assert [word for word in loop.recorder.said if word.startswith("step")] == [f"step {n}" for n in range(4)]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_completes_the_checkpoint_in_the_making(tmp_path):
    def at_step(step, learner):
        if step == 2:
            threading.Timer(0.05, learner.allowed.set).start()
            raise FloatingPointError("loss is nan")

    with pytest.raises(FloatingPointError, match="nan"):
        run_of(tmp_path, 9, 2, at_step).run(lambda: False)
    assert saved_updates(tmp_path) == {"step-00000002": 2}


class Engines:
    """Rollouts whose answers are of the version in force, or of ``version``; ``generate`` waits for ``allowed``."""

    def __init__(self, version=None):
        self.held, self.version, self.allowed, self.asked, self.aborted = 0, version, threading.Event(), [], False
        self.begun = threading.Event()

    def push(self, version):
        self.held = version

    def generate(self, requests):
        version = self.held if self.version is None else self.version
        self.asked.append({seed for request in requests for seed in request.seeds})
        self.begun.set()
        self.allowed.wait(10)
        return [SampleGroup(r.prompt, tuple(self.sample(s, version) for s in r.seeds), r.role) for r in requests]

    def sample(self, seed, version):
        tokens = np.zeros(3, np.int64)
        spans = (WeightSpan(version, 0, 3),)
        return Sample(tokens, np.zeros(3, np.float32), 1.0, seed, Role.EVALUATION, "stop", spans)

    def abort(self):
        self.aborted = True
        self.allowed.set()


def evaluating(root, engines):
    loop = run_of(root, 3, 0, lambda step, learner: learner.allowed.set())
    loop.config = load_config("quickstart.yaml", ["steps=3", "evaluation.beside_training=true", "checkpoint.every=0"])
    loop.held_out = [Prompt(str(i), (1,), "", None, "exact") for i in range(4)]
    loop.rollouts, loop.drawn_beside = engines, DrawnBeside(engines)
    loop.verifier = SimpleNamespace(verify=lambda groups: groups)
    loop.band = SimpleNamespace(watching=False, evaluated=lambda step, found: None)
    loop.recorder.evaluation = lambda step, found: loop.recorder.said.append(f"evaluation {step}")
    loop.recorder.fault = lambda said: loop.recorder.said.append(said)
    return loop


def test_an_evaluation_is_drawn_while_the_next_step_trains_and_its_weights_wait(tmp_path):
    engines = Engines()
    loop = evaluating(tmp_path, engines)
    loop.evaluate()
    assert engines.asked == [], "not yet: the next step draws first"
    loop.begin_evaluation()
    assert engines.begun.wait(10)
    settled = threading.Thread(target=loop.drawn_beside.settle)
    settled.start()
    settled.join(0.05)
    assert settled.is_alive(), "the weights wait for it"
    engines.allowed.set()
    settled.join(10)
    loop.rollouts.push(1)
    loop.step = 1
    loop.finish_evaluation()
    loop.finish_evaluation()
    assert loop.recorder.said == ["evaluation", "evaluation 0"]


def test_an_evaluation_never_mixes_versions(tmp_path):
    """An engine that was started again holds other weights: these are evaluated instead, and the log says so."""
    engines = Engines(version=1)
    engines.allowed.set()
    loop = evaluating(tmp_path, engines)
    loop.evaluate()
    loop.begin_evaluation()
    loop.drawn_beside.settle()
    loop.step = 1
    loop.finish_evaluation()
    assert loop.recorder.said == [
        "the evaluation of version 0 mixed versions: 1 is evaluated instead",
        "evaluation",
        "evaluation 1",
    ]
    assert engines.asked[0] != engines.asked[1], "the seeds are those of the step"


def go_on(root, steps, every, beside, stop_at=None):
    """Begin a run, or go on from its newest checkpoint; what its band was told of: versions, and the updates done."""
    engines, told = Engines(), []
    engines.allowed.set()
    loop = evaluating(root, engines)
    choices = [f"steps={steps}", f"evaluation.every={every}", f"evaluation.beside_training={beside}"]
    loop.config = load_config("quickstart.yaml", [*choices, "evaluation.at_start=false", "checkpoint.every=0"])
    loop.band.evaluated = lambda version, found: told.append([version, loop.step])
    loop.controller = SimpleNamespace(state_dict=lambda: {"told": told})
    count = loop.train_step

    def step():
        loop.begin_evaluation()
        loop.drawn_beside.settle()
        engines.push(loop.step + 1)
        count()

    loop.train_step = step
    if saved := loop.checkpoints.complete():
        state = saved[-1].state()
        loop.step, loop.evaluation_due = state["step"], state["evaluation_due"]
        told += state["controller"]["told"]
    loop.run(lambda: loop.step == stop_at)
    return told, loop.recorder.said


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(("every", "versions"), [(4, [4, 8]), (3, [3, 6, 9])], ids=["due at the end", "not due"])
def test_a_run_that_is_lengthened_tells_its_band_what_a_run_of_that_length_does(tmp_path, beside, every, versions):
    """Each evaluation that is due once, at the same step, and none that only ends a shorter run."""
    whole, _ = go_on(tmp_path / "whole", 12, every, beside)
    assert whole == [[version, version + beside] for version in versions]
    _, said = go_on(tmp_path / "short", 8, every, beside)
    assert said[-3:] == ["checkpoint 8", "evaluation", "evaluation 8"], "a failing evaluation loses no step"
    assert go_on(tmp_path / "short", 12, every, beside)[0] == whole


@pytest.mark.parametrize("beside", [False, True])
def test_an_evaluation_that_is_due_when_the_run_is_told_to_stop_is_made_as_if_it_had_not_stopped(tmp_path, beside):
    whole, _ = go_on(tmp_path / "whole", 12, 4, beside)
    go_on(tmp_path / "stopped", 12, 4, beside, stop_at=4)
    assert go_on(tmp_path / "stopped", 12, 4, beside)[0] == whole


def test_closing_ends_an_evaluation_that_is_being_drawn(tmp_path):
    engines = Engines()
    loop = evaluating(tmp_path, engines)
    loop.evaluate()
    loop.begin_evaluation()
    assert engines.begun.wait(10)
    loop.drawn_beside.close()
    loop.drawn_beside.close()
    assert engines.aborted
