import json

import pytest

from tests.command_line import answer, call

LINES = (
    {"id": "a", "prompt": "1111,00=", "answer": "1111,00", "verifier": "countdown"},
    {"id": "b", "prompt": "1111,00=", "answer": "1111,00", "verifier": "countdown"},
    {"id": "c", "prompt": "1" * 14 + "=", "answer": "3", "verifier": "exact"},
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def test_check_counts_in_the_tokens_of_a_configuration(file, capsys):
    found = answer(capsys, "data", "check", str(file), "--config", "quickstart.yaml")
    assert found["questions"] == 3
    assert found["verifiers"] == {"countdown": 2, "exact": 1}
    assert found["lengths"] == pytest.approx({"least": 8, "median": 8, "p95": 14.3, "longest": 15})
    assert found["too_long"] == {"c": 15}
    assert found["duplicates"] == [["a", "b"]]
    assert found["example"] == {"id": "a", "prompt": "1111,00=", "answer": "1111,00", "verifier": "countdown"}


def test_check_says_it_in_words(file, capsys):
    code, out, _ = call(capsys, "data", "check", str(file), "--config", "quickstart.yaml")
    assert code == 0
    assert "3 questions; verifiers: 2 x countdown, 1 x exact" in out
    assert "dropped, since longer than rollout.max_prompt_tokens=8: 1\n  c: 15 tokens" in out
    assert "questions asked more than once: 1\n  a, b" in out


def test_check_without_a_configuration_reads_the_lines_alone(file, capsys):
    found = answer(capsys, "data", "check", str(file))
    assert (found["questions"], found["lengths"], found["too_long"]) == (3, {}, {})


def test_check_of_a_configuration_reads_its_own_source(capsys):
    found = answer(capsys, "data", "check", "--config", "quickstart.yaml")
    assert (found["questions"], found["duplicates"]) == (2835, [])


def test_bad_lines_end_it_with_2(file, capsys):
    file.write_text(file.read_text() + '{"id": "d"}\n')
    code, _, err = call(capsys, "data", "check", str(file))
    assert code == 2
    assert f"{file}:4: 'answer' is missing" in err
    code, _, err = call(capsys, "data", "check")
    assert (code, "give a FILE, a --config, or both" in err) == (2, True)


def test_grade_says_what_a_verifier_found(tmp_path, capsys):
    path = tmp_path / "responses.jsonl"
    lines = [
        {"verifier": "math", "answer": "12", "response": r"so \boxed{12}", "why": "left alone"},
        {"verifier": "math", "answer": "12", "response": r"so \boxed{"},
        {"verifier": "choice", "answer": "B", "response": "The answer is (B)."},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    code, out, _ = call(capsys, "data", "grade", str(path), "--json")
    assert code == 0
    found = [json.loads(line) for line in out.splitlines()]
    assert [(each["line"], each["reward"], each["extracted"], each["error"]) for each in found] == [
        (1, 1.0, "12", ""),
        (2, 0.0, None, ""),
        (3, 1.0, "B", ""),
    ]
    assert "1  reward 1  extracted '12'" in call(capsys, "data", "grade", str(path))[1]


def test_grade_refuses_by_file_and_line(tmp_path, capsys):
    path = tmp_path / "responses.jsonl"
    good = json.dumps({"verifier": "exact", "answer": "1", "response": "1"})
    path.write_text(
        f"{good}\n{{\n{good.replace(chr(34) + '1' + chr(34), 'null', 1)}\n{good.replace('exact', 'exat')}\n"
    )
    code, _, err = call(capsys, "data", "grade", str(path))
    assert code == 2
    assert f"{path}:2: not JSON" in err
    assert f"{path}:3: answer None" in err
    assert f"{path}:4: unknown verifier 'exat'" in err
    assert call(capsys, "data", "grade", str(tmp_path / "none.jsonl"))[0] == 2
