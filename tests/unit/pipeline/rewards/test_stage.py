import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.schema import DataConfig
from pipeline.rewards.pool import VerifierPool
from pipeline.rewards.stage import VerifierFailedError, VerifierStage, stop_if_none_was_judged
from pipeline.rewards.verifier import UnknownVerifierError
from pipeline.types import Prompt, Role, Sample, SampleGroup, WeightSpan

SYMBOLS = "0123456789+-*=,$"
OWN = """
import ctypes, os, time

def judge(prompt, text):
    if text == "6": time.sleep(60)
    if text == "1": raise KeyError("one\\nand more")
    if text == "2": os._exit(3)
    if text == "3": ctypes.string_at(0)
    if text == "4": return 7.0
    if text == "5": return float("nan")
    if text == "9": return "1.0"
    if text == "+": raise KeyboardInterrupt
    return 0.25 if text == "7" else 1.0

class Odd(Exception):
    def __init__(self, a, b): super().__init__(a)

class Mute(Exception):
    def __str__(self): raise RuntimeError("no words")

def mute(prompt, text):
    raise Mute

def slow(prompt, text):
    time.sleep(int(text[0]) / 10)
    return 1.0

def forking(prompt, text):
    import subprocess
    one = subprocess.Popen(["sleep", "1000"])
    two = os.fork() or time.sleep(1000)
    with open(prompt.answer, "a") as file: file.write(f"{one.pid} {two} ")
    time.sleep(60 if text == "6" else 0)
    return 1.0

def odd(prompt, text):
    if text == "1": raise Odd(1, 2)
    return os.getpid() / 1e9
"""


class Characters:
    def decode_batch(self, sequences):
        return ["".join(SYMBOLS[i] for i in ids if i != 15) for ids in sequences]


def sample(text, finish_reason="stop"):
    ids = np.array([SYMBOLS.index(c) for c in text])
    return Sample(ids, np.zeros(len(ids), np.float32), 1.0, 0, Role.MAIN, finish_reason, (WeightSpan(0, 0, len(ids)),))


def group(verifier, answer, texts, finish_reason="stop", **meta):
    asked = Prompt(f"q-{answer}", (1,), "", answer, verifier, meta)
    return SampleGroup(asked, tuple(sample(text, finish_reason) for text in texts), Role.MAIN)


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_judge.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def stage():
    stage = VerifierStage(DataConfig(verifier_timeout_s=60, verifier_workers=1), Characters())
    yield stage
    stage.close()


def verdicts(group):
    return [(s.text, s.reward, s.correct, s.verifier_error) for s in group.samples]


def test_inline_verdicts(stage):
    groups = stage.verify(
        [
            group("countdown", "1234,24", ["4*3*2*1$", "4+3+2+1$"]),
            group("exact", "12", ["12$", "$"]),
            group("countdown", "no answer", ["1$"]),
            group("exact", "12", ["12"], finish_reason="abort"),
        ]
    )
    assert verdicts(groups[0]) == [("4*3*2*1", 1.0, True, ""), ("4+3+2+1", 0.0, False, "")]
    assert verdicts(groups[1]) == [("12", 1.0, True, ""), ("", 0.0, False, "")]
    ((_, reward, correct, error),) = verdicts(groups[2])
    assert (reward, correct) == (0.0, False)
    assert error.startswith("ValueError: ")
    assert verdicts(groups[3]) == [("12", 0.0, False, "aborted before it was finished")]


def test_judging_again_clears_an_old_verdict(stage):
    (first,) = stage.verify([group("exact", "12", ["12"], finish_reason="abort")])
    (second,) = stage.verify([replace(first, samples=tuple(replace(s, finish_reason="stop") for s in first.samples))])
    assert verdicts(second) == [("12", 1.0, True, "")]


def test_math_and_reasoning_gym_run_apart(stage):
    entry = {"question": "1 + 1 =", "answer": "2", "metadata": {}}
    groups = stage.verify(
        [
            group("math", "12", ["12", "3*4", "13", "12"]),
            group("reasoning_gym", "2", ["2", "3"], dataset="chain_sum", params={}, entry=entry),
            group("reasoning_gym", "3", ["2"]),
        ]
    )
    assert [s.correct for s in groups[0].samples] == [True, True, False, True]
    assert [s.correct for s in groups[1].samples] == [True, False]
    ((_, reward, correct, error),) = verdicts(groups[2])
    assert (reward, correct) == (0.0, False)
    assert error.startswith("KeyError: 'dataset' (reasoning_gym.py, line ")


def test_hanging_raising_and_crashing_calls_cost_only_their_own_sample(own):
    texts = ["0", "6", "1", "2", "3", "4", "5", "7", "8", "9", "+"]
    stage = VerifierStage(DataConfig(verifier_timeout_s=2.5, verifier_workers=1), Characters())
    (judged,) = stage.verify([group("own_judge:judge", "", texts)])
    stage.close()
    by_text = {s.text: s for s in judged.samples}
    assert {text: s.verifier_error for text, s in by_text.items()} == {
        "0": "",
        "6": "no verdict within 2.5 s",
        "1": "KeyError: 'one\\nand more' (own_judge.py, line 6)",
        "2": "verifier process died (exit code 3)",
        "3": "verifier process died (exit code -11)",
        "4": "reward 7.0 is outside [0, 1]",
        "5": "reward nan is outside [0, 1]",
        "7": "",
        "8": "",
        "9": "own_judge:judge (own_judge.py, line 4) returned '1.0' (str): return a number in [0, 1]",
        "+": "KeyboardInterrupt:  (own_judge.py, line 12)",
    }
    assert {text: s.reward for text, s in by_text.items() if s.reward} == {"0": 1.0, "7": 0.25, "8": 1.0}
    assert {s.text for s in judged.samples if s.correct} == {"0", "8"}


def test_an_exception_that_cannot_be_printed_costs_its_own_sample(stage, own):
    (judged,) = stage.verify([group("own_judge:mute", "", ["1"])])
    assert verdicts(judged) == [
        ("1", 0.0, False, "Mute: its text cannot be read (RuntimeError) (own_judge.py, line 22)")
    ]


def test_a_broken_pool_is_replaced(stage, own):
    (first,) = stage.verify([group("own_judge:odd", "", ["2"])])
    os.kill(round(first.samples[0].reward * 1e9), signal.SIGKILL)  # an idle worker dies, as by the out-of-memory killer
    time.sleep(0.3)
    (second,) = stage.verify([group("own_judge:odd", "", ["2", "1", "3"])])
    errors = [s.verifier_error for s in second.samples]
    assert (errors[0], errors[2]) == ("", "")
    assert errors[1] != ""  # an exception that cannot be sent between processes breaks the pool again


def test_what_exceeds_the_steps_budget_is_marked(own):
    """One process, seven calls of half a second: the second that is given is used up, then the rest has no verdict."""
    slow = VerifierStage(DataConfig(verifier_workers=1, verifier_budget_s=1.3), Characters())
    try:
        (judged,) = slow.verify([group("own_judge:slow", "", ["5", "5+", "5-", "5*", "5++", "5=", "5=="])])
        errors = [sample.verifier_error for sample in judged.samples]
        assert errors[0] == ""
        assert errors[-1].startswith(
            "no verdict: the 1.3 s for the step's responses were used up (data.verifier_budget_s)"
        )
        (late,) = slow.verify([group("own_judge:slow", "", ["0"])], more=True)  # a further group of the step
        assert late.samples[0].verifier_error.startswith("no verdict: ")
        (again,) = slow.verify([group("own_judge:slow", "", ["0"])])
        assert verdicts(again) == [("0", 1.0, True, "")]
    finally:
        slow.close()


def test_a_hundred_calls_that_hang_do_not_take_ten_minutes():
    pool = object.__new__(VerifierPool)
    pool.timeout, pool._workers = 5.0, 1
    assert pool.budget(100) == 55.0
    pool._workers = 16
    assert pool.budget(16_384) == pytest.approx(286)  # a quarter of a second each


def test_what_a_verifier_forked_ends_with_it(own, tmp_path):
    """After a call that hangs, and after the pool is closed."""
    forked = tmp_path / "forked"
    stage = VerifierStage(DataConfig(verifier_timeout_s=2.5, verifier_workers=1), Characters())
    stage.verify([group("own_judge:forking", str(forked), ["6"])])
    assert gone(forked) == 2
    stage.verify([group("own_judge:forking", str(forked), ["7"])])
    assert gone(forked, wait=0.5) == 2
    stage.close()
    assert gone(forked) == 4


def gone(forked, wait=10.0):
    """How many of the processes named in the file do not run, when all have ended or ``wait`` seconds are over."""
    pids, end = [int(pid) for pid in forked.read_text().split()], time.monotonic() + wait
    while (alive := sum(map(running, pids))) and time.monotonic() < end:
        time.sleep(0.05)
    return len(pids) - alive


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_unknown_names_stop_the_run(stage, own):
    with pytest.raises(UnknownVerifierError, match="'exat': nearest is 'exact'"):
        stage.verify([group("exat", "", ["1"])])
    with pytest.raises(UnknownVerifierError, match="has no function 'missing'"):
        stage.verify([group("own_judge:missing", "", ["1"])])
    assert stage.verify([]) == []


def test_a_step_without_a_verdict_ends_the_run_with_the_first_error_and_its_line(stage, own):
    none = stage.verify([group("own_judge:judge", "", ["1", "4"]), group("own_judge:judge", "", ["5"], "abort")])
    with pytest.raises(
        VerifierFailedError, match=r"'own_judge:judge' could judge none of 2 .* \(own_judge.py, line 6\)"
    ):
        stop_if_none_was_judged(none, DataConfig())
    stop_if_none_was_judged(none, DataConfig(on_verifier_error="mark"))
    stop_if_none_was_judged(stage.verify([group("own_judge:judge", "", ["1", "7"])]), DataConfig())
    stop_if_none_was_judged([], DataConfig())
