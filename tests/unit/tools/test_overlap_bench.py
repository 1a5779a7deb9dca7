"""What the overlap benchmark makes of the steps of its runs."""

import os
import subprocess
import sys

from tools.bench.overlap import compared, family


def step(sample, train, total, age=0.0):
    seconds = {"sample": sample, "verify": 0.0, "drawing": sample, "train": train, "sync": 0.1, "total": total}
    return {
        "seconds": seconds,
        "idle": {"engines": 1 - sample / total, "learner": 1 - train / total},
        "ages": {"mean": age},
        "response_length": 50.0,
    }


def test_a_step_is_compared_with_the_longer_of_its_parts():
    slow, fast = step(4.0, 8.0, 8.8, 1.0), step(2.0, 4.0, 4.2, 1.0)  # the machine was busy with something else
    partial = [step(2.0, 4.0, 4.1, 1.2)]
    found = compared({"turns": [step(2.0, 4.0, 6.2)] * 3, "ahead": [fast, slow, fast], "partial": partial})
    assert (found["sample_s"], found["train_s"], found["turns_s"], found["step_s"]) == (2.0, 4.0, 6.2, 4.2)
    assert (found["ratio_to_max"], found["ratio_to_own_max"], found["turns_ratio"]) == (1.05, 1.05, 1.55)
    assert (found["partial_step_s"], found["waiting_step_s"]) == (4.1, 4.2)
    assert found["age"] == {"turns": 0.0, "ahead": 1.0, "partial": 1.2}
    assert found["idle"]["turns"]["engines"] == 0.677


def test_a_family_has_the_children_of_children():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.readline()
        found = family(os.getpid())
        process.stdin.close()
    assert found[0] == os.getpid()
    assert process.pid in found
    assert len(family_below := found[found.index(process.pid) :]) >= 2, family_below
