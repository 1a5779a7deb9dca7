import itertools
import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.countdown import countdown_task
from pipeline.rewards.answers import canonical_answer, final_answer, tagged_answer
from pipeline.rewards.verifier import UnknownVerifierError, check_verifier, make_verifier
from pipeline.types import Prompt
from tests.solutions import solutions_of


def prompt(answer, verifier, **meta):
    return Prompt("q", (1,), "", answer, verifier, meta)


def score(verifier, answer, text, **meta):
    return make_verifier(verifier).score(prompt(answer, verifier, **meta), text)


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [("a b", " a\n b ", 1), ("a b", "ab", 0), (12, "12", 1), (["x", "y"], "y", 1), (["x", "y"], "z", 0), ("A", "a", 0)],
)
def test_exact(answer, text, reward):
    assert score("exact", answer, text) == reward


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("1234,24", "4*3*2*1", 1),
        ("1234,24", "1*2*3*4", 1),
        ("1234,24", "4*3*2", 0),
        ("1234,24", "4*3*2*1+", 0),
        ("1234,24", "4*3*2+1", 0),
        ("1234,15", "1+2+3+4", 0),
        ("1234,13", "1+2*3+4", 1),  # left to right: (1 + 2) * 3 + 4
        ("0123,06", "1+2+3+0", 1),
        ("1234,24", "4*3*2x1", 0),
        ("1234,24", "", 0),
        ("12,03", "1+²", 0),
    ],
)
def test_countdown(answer, text, reward):
    assert score("countdown", answer, text) == reward


def test_countdown_operators():
    assert score("countdown", "23,06", "2*3", operators="+-*") == 1
    assert score("countdown", "23,06", "2*3", operators="+-") == 0


def test_countdown_accepts_the_enumerated_solutions_and_nothing_else():
    task = countdown_task("pm3")
    rng = np.random.default_rng(0)
    verifier = make_verifier("countdown")
    for index in rng.choice(len(task), 40, replace=False):
        digits = task.problem(index)[:3]
        candidates = {
            "".join(itertools.chain(*zip(order, (*operators, ""), strict=True)))
            for order in itertools.permutations(digits)
            for operators in itertools.product("+-*", repeat=2)
        }
        asked = prompt(task.problem(index), "countdown", operators=task.operators)
        assert {text for text in candidates if verifier.score(asked, text)} == set(solutions_of(task, index))


@given(st.text(alphabet="0123456789+-*=,x ", max_size=12))
def test_countdown_never_raises_on_any_text(text):
    assert score("countdown", "1234,24", text) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("0.5", r"So it is \boxed{\frac{1}{2}}.", 1),
        (r"$\frac{1}{2}$", "0.5", 1),
        (r"\frac{1}{2}", "The answer is 1/2", 1),
        (r"3\sqrt{2}", r"\boxed{3\sqrt{2}}", 1),
        (r"3\sqrt{2}", r"\boxed{3}", 0),
        (3, r"\boxed{4}", 0),
        ("3", "no idea", 0),
    ],
)
def test_math(answer, text, reward):
    assert score("math", answer, text) == reward


def test_math_refuses_an_answer_that_is_not_mathematics():
    with pytest.raises(ValueError, match="no mathematical expression"):
        score("math", "", "3")


def test_unknown_verifier_names_the_nearest():
    with pytest.raises(UnknownVerifierError, match="unknown verifier 'exacct': nearest is 'exact'"):
        check_verifier("exacct")


def test_users_own_function(tmp_path, monkeypatch):
    (tmp_path / "own_verifier.py").write_text("def half(prompt, text):\n    return 0.5\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_verifier("own_verifier:half")
    assert score("own_verifier:half", "", "") == 0.5
    for name in ("own_verifier:whole", "own_verifier:number", "no_such_module:f", "own_verifier:"):
        with pytest.raises(UnknownVerifierError, match=name):
            make_verifier(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "no_such_module:f",
            "module 'no_such_module' is not found; tried .* \\(the working directory\\) and PYTHONPATH",
        ),
        ("own_verifier.rewards:f", "module 'own_verifier.rewards' is not found"),
        ("own_verifier:on", "module 'own_verifier' \\(.*own_verifier.py\\) has no function 'on': did you mean 'one'?"),
        ("own_verifier:number", "'number' is no function but int"),
        ("own_verifier:one", r"it takes \(text\), and is called with \(prompt, text\)"),
        ("needs_more:f", "module 'no_such_library' is not found, which 'needs_more' imports"),
        ("own_broken:f", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_users_own_function_is_refused_by_what_is_wrong(name, said, tmp_path, monkeypatch):
    """Modules are found in the working directory."""
    (tmp_path / "own_verifier.py").write_text("def one(text):\n    return 0.5\nnumber = 3\n")
    (tmp_path / "needs_more.py").write_text("import no_such_library\n")
    (tmp_path / "own_broken.py").write_text("1 / 0\n")
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("own_verifier", None)
    with pytest.raises(UnknownVerifierError, match=said):
        check_verifier(name)


def test_a_users_module_is_looked_for_beside_the_configuration_then_in_the_working_directory(tmp_path, monkeypatch):
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder, value in ((beside, 0.5), (here, 0.25)):
        folder.mkdir()
        (folder / "twice_there.py").write_text(f"def f(prompt, text):\n    return {value}\n")
    (beside / "json.py").write_text("def f(prompt, text):\n    import twice_there\n    return 0.75\n")
    (here / "only_here.py").write_text("def f(prompt, text):\n    return 0.125\n")
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(here)
    assert make_verifier("twice_there:f", str(beside)).score(prompt("", ""), "") == 0.5
    assert make_verifier("only_here:f", str(beside)).score(prompt("", ""), "") == 0.125
    with pytest.raises(UnknownVerifierError, match=rf"tried {beside} \(data.verifier_folder\), {here} \(the working"):
        check_verifier("nowhere:f", str(beside))
    with pytest.raises(UnknownVerifierError, match=f"json.py has the name of {json.__file__}, which is loaded: rename"):
        check_verifier("json:f", str(beside))


def test_a_module_that_ends_python_is_refused(tmp_path):
    (tmp_path / "own_exit.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(UnknownVerifierError, match="cannot be imported: SystemExit: 3"):
        check_verifier("own_exit:f", str(tmp_path))


def test_answers():
    assert tagged_answer("<answer>1</answer> no <answer> 2 </answer>.") == "2"
    assert tagged_answer(" 3 ") == "3"
    assert tagged_answer("</answer> 3 <answer>") == "</answer> 3 <answer>"
    assert final_answer(r"\boxed{1} then \boxed{\frac{1}{2}} end") == r"\frac{1}{2}"
    assert final_answer(r"\boxed{1") is None
    assert canonical_answer("math", r"\boxed{ \dfrac{1}{2} }") == canonical_answer(
        "math", r"$\boxed{\frac12}$".replace("12", "{1}{2}")
    )
    assert canonical_answer("math", "so 1,200 of them.") == "1200"
    assert canonical_answer("exact", " a \n b") == "a b"
    assert canonical_answer("reasoning_gym", "<answer>7</answer>") == "7"


@given(st.text(alphabet="{}\\boxed<answer>/ 1,.", max_size=60), st.sampled_from(["math", "reasoning_gym", "exact"]))
def test_canonical_answers_never_raise(text, verifier):
    assert isinstance(canonical_answer(verifier, text), str)
