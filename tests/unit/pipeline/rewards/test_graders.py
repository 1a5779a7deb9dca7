"""What verifiers say of known responses: ``graders.jsonl``, and further spellings of the same kinds."""

import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.config.schema import DataConfig
from pipeline.data.jsonl import read_jsonl
from pipeline.rewards.answers import canonical_answer, final_answer, grouped_answers
from pipeline.rewards.mathematics import certainly_equal_to_itself, equal, parse
from pipeline.rewards.notation import plain_latex
from pipeline.rewards.pool import VerifierPool
from pipeline.rewards.verifier import make_verifier
from pipeline.types import Prompt
from tests.calls import counted

CASES = [json.loads(line) for line in (Path(__file__).parent / "graders.jsonl").read_text().splitlines()]

EQUAL = [
    ("1,000", "1000"),
    ("1{,}000", r"1\,000"),
    (r"\$1,\!000,\!000.50", "1 000 000.5"),
    (r"5\text{ cm}", "5 cm"),
    (r"5\,\mathrm{cm}^2", "5"),
    ("12 square inches", "12"),
    (r"15\text{ miles per hour}", "15 mph"),
    (r"90^{\circ}", "90°"),
    (r"0.1\overline{6}", "1/6"),
    (r"-1\frac12", "-1.5"),
    ("1 1/2", "1.5"),
    ("-1.5E-6", "-0.0000015"),
    ("6.02e23", r"6.02\times10^{23}"),
    ("x=5", "5"),
    (r"\frac12", "0.5"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty, 2) \cup (3, \infty)"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("1 and 2", "2, 1"),
    ("(1,000, 2,000)", "(1000, 2000)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
    (r"\text{Tuesday}", "tuesday"),
    ("x**(2*(3+1))", "x^8"),
    ("2*sqrt(3)", r"2\sqrt3"),
    ("5 EUR", "€5"),
    ("2\\pi r", "2πr"),
    ("f(x)=x^2", "x^2"),
    (r"\frac{0}{7}\sqrt{2}", "0"),
]
UNEQUAL = [
    ("2t", "2"),
    ("1e-7", "0"),
    ("1e-7", "2e-7"),
    ("listen", "silent"),
    ("(1,2)", "(2,1)"),
    ("1,000", "1"),
    (r"0.\overline{3}", "0.3"),
    (r"1\frac12", "1/2"),
    ("5 cm", "6 cm"),
    ("(100,200)", "100200"),
    ("[0,1]", "(0,1)"),
    ("3 PM", "3 AM"),
    ("12_8", "12"),
    ("2^10", "2^1"),
]
EXTRACTED = [
    ("**Answer:** 34", "34"),
    ("**Answer: 34**\n\nHope it helps", "34"),
    ("Final Answer: $34$", "34"),
    (r"Answer: \boxed{34}", "34"),
    ("Answer:", None),
    ("The answer is: **34**.", "34"),
    (r"the final answer is $\frac12$.", r"\frac12"),
    ("the answer is 5 because 2 + 3", "5"),
    (r"\boxed{1} then <answer>2</answer>", "2"),
    (r"<answer>\boxed{3}</answer>", "3"),
    (r"<answer>1</answer> \boxed{2}", "2"),
    (r"\fbox{7}", "7"),
    (r"\boxed\text{7}", r"\text{7}"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"<think>\boxed{5}", None),
    (r"<think>\boxed{5}</think>", None),
    (r"\boxed{12", None),
    (r"so \boxed{3}. Answer: \boxed{12", None),
    ("no idea", None),
    ("", None),
]


def score(verifier, answer, text):
    return make_verifier(verifier).score(Prompt("q", (1,), "", answer, verifier, {}), text)


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case['why'][:30]}" for i, case in enumerate(CASES, 1)])
def test_known_responses(case):
    assert score(case["verifier"], case["answer"], case["response"]) == case["reward"]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_answers_are_right_and_one_group(one, other):
    for reference in (one, other):
        for said in (one, other):
            assert score("math", reference, rf"\boxed{{{said}}}") == 1
    texts = [rf"\boxed{{{said}}}" for said in (one, other)]
    assert canonical_answer("math", texts[0]) == canonical_answer("math", texts[1])


@pytest.mark.parametrize(("reference", "said"), UNEQUAL)
def test_a_part_of_the_reference_is_wrong(reference, said):
    assert score("math", reference, rf"\boxed{{{said}}}") == 0


@pytest.mark.parametrize(("text", "answer"), EXTRACTED)
def test_the_answer_a_response_commits_itself_to(text, answer):
    assert final_answer(text) == answer


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{:,}", "{:_}", "{}.0", "{:.6e}", "{}", "{} apples", r"\${:,}"]))
def test_integers_in_any_notation(value, notation):
    text = notation.format(value).replace("_", " ")
    expected = float(text) if "e+" in text else value
    assert score("math", str(expected), rf"\boxed{{{text}}}") == 1


def test_what_equals_the_reference_is_one_answer():
    texts = [r"\boxed{50\%}", r"\boxed{50}", r"\boxed{49}"]
    first, second, third = grouped_answers("math", texts, [True, True, False])
    assert first == second != third


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("B.", "B", 1),
        (r"\text{(B)}", "(B)", 1),
        (["A", "B"], "the answer is B", 1),
        ("b", r"\boxed{b}", 1),
        ("B", "", 0),
    ],
)
def test_choice(answer, text, reward):
    assert score("choice", answer, text) == reward


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [(12.0, "12", 1), (1e-05, "0.00001", 1), ("12", "12.00", 1), ("<x>", "<x>", 1), ("7", "<think>5</think> 7", 1)],
)
def test_exact_numbers(answer, text, reward):
    assert score("exact", answer, text) == reward


@pytest.mark.parametrize(
    ("verifier", "answer"),
    [
        *(("math", answer) for answer in (None, {"value": 12}, True, "", " \n", [], [None], float("inf"), r"\$")),
        *(("choice", answer) for answer in (None, 1, "Z", "AB", "", [], ["B", 2])),
        *(("exact", answer) for answer in (None, {"value": 12}, False, "", [], [None])),
        *(("countdown", answer) for answer in (None, "12", 1234)),
    ],
)
def test_references_that_nothing_could_match_are_refused(verifier, answer):
    assert make_verifier(verifier).refusal(Prompt("q", (1,), "", answer, verifier, {}))


@pytest.mark.parametrize("case", CASES, ids=[f"{i}" for i in range(len(CASES))])
def test_references_of_the_known_responses_are_accepted(case):
    assert make_verifier(case["verifier"]).refusal(Prompt("q", (1,), "", case["answer"], case["verifier"], {})) == ""


PARTS = (
    *(
        "1",
        "2",
        "0",
        "10",
        "3.5",
        "x",
        "y",
        "e",
        "i",
        "n",
        "I",
        "S",
        "Q",
        "+",
        "-",
        "(",
        ")",
        "[",
        "]",
        ",",
        "/",
        "=",
        "!",
    ),
    *(
        r"\pi",
        r"\infty",
        r"\theta ",
        r"\sqrt{2}",
        r"\sqrt{x-x}",
        r"\sqrt{",
        r"\frac{",
        r"\frac{1}{2}",
        r"\frac{x+1}{3y}",
    ),
    *(r"\frac{1}{", "}", "{", "^2", "^{3}", "^{", "yes", r"\text{no}"),
)


@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=9).map("".join))
@settings(max_examples=150, deadline=None)
def test_what_is_accepted_without_the_library_it_accepts_too(latex):
    plain = plain_latex(latex)
    assume(plain and certainly_equal_to_itself(plain))
    assert equal(parse(plain), parse(plain))


@pytest.mark.parametrize(
    ("latex", "certain"),
    [
        *(
            (latex, True)
            for latex in (r"\frac{1-\sqrt{5}}{2}", r"[0,\infty)", "(1,2)", "(x+1)^2", r"\frac{3}{\sqrt{2}}")
        ),
        *((latex, True) for latex in (r"\text{Tuesday}", r"x^2+3x-5", r"\frac{\frac{1}{2}}{3}", r"2\sqrt{3}", r"4\pi")),
        *(
            (latex, False)
            for latex in (r"\frac{1}{0}", r"\frac{1}{x-x}", r"\infty-\infty", "0^{-1}", "10^{10^{10}}", "5!")
        ),
        *(
            (latex, False)
            for latex in (
                r"\frac{1}{\sqrt{x-x}}",
                "1=2",
                "1/0",
                r"\log(0)",
                r"\frac{x}{0y}",
                "9" * 200,
                "a" * 150 + "!",
            )
        ),
    ],
)
def test_what_is_accepted_without_the_library(latex, certain):
    assert certainly_equal_to_itself(plain_latex(latex)) == certain


def test_ten_thousand_latex_references_are_read_without_the_library(tmp_path, monkeypatch):
    """One by one through the library, they took a minute."""
    monkeypatch.setattr("pipeline.rewards.judge.VerifierPool", None)
    file = tmp_path / "many.jsonl"
    lines = (
        {"id": i, "prompt": "?", "answer": rf"\frac{{{i}}}{{7}}+\sqrt{{{i + 2}}}", "verifier": "math"}
        for i in range(10_000)
    )
    file.write_text("\n".join(map(json.dumps, lines)))
    read, calls = counted(read_jsonl, file, DataConfig())
    assert len(read) == 10_000
    assert 10_000 < calls < 300 * 10_000


def test_references_tried_together_are_told_apart():
    """One that takes too long costs its own line alone, not those that were tried with it."""
    pool = VerifierPool("math", "", workers=1, timeout=3)
    try:
        answers = [rf"\{{{i}, x\}}" for i in range(30)]
        answers[7] = "10^{10^{10}}"
        asked = [Prompt(f"q{i}", (1,), "", answer, "math", {}) for i, answer in enumerate(answers)]
        refused = {i: reason for i, reason in enumerate(pool.refusals(asked)) if reason}
        assert set(refused) <= {7}
    finally:
        pool.close()
