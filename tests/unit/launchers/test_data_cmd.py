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
    code, out, _ = call(capsys, "data", "check", str(file))
    assert code == 2
    assert f"{file}:4: 'answer' is missing" in out
    code, _, err = call(capsys, "data", "check")
    assert (code, "give a FILE, a --config, or both" in err) == (2, True)


def test_every_line_that_cannot_be_used_is_in_the_report(tmp_path, capsys):
    path = tmp_path / "questions.jsonl"
    good = json.dumps(LINES[0])
    bad = [json.dumps(LINES[0] | {"id": f"bad{i}", "answer": i}) for i in range(12)]
    path.write_text("\n".join([good, *bad, "{", good]))
    code, out, err = call(capsys, "data", "check", str(path), "--json")
    found = json.loads(out)
    assert (code, err, found["questions"]) == (2, "", 1)
    assert [fault["line"] for fault in found["faults"]] == list(range(2, 16))
    assert "must read digits,target" in found["faults"][0]["problem"]
    assert "duplicate id 'a', first on line 1" in found["faults"][-1]["problem"]
    code, out, _ = call(capsys, "data", "check", str(path))
    assert (code, "lines that cannot be used: 14; mend or remove:" in out) == (2, True)
    assert f"{path}:13: " in out
    path.write_text("\n".join(bad))
    assert call(capsys, "data", "check", str(path))[0] == 2  # nothing is left to show
    path.write_text("\n".join(json.dumps(LINES[0] | {"id": i, "answer": i}) for i in range(300)))
    assert "  ... and 200 more" in call(capsys, "data", "check", str(path))[1]


def test_a_reason_is_said_once_and_the_verifier_may_be_named_without_a_configuration(tmp_path, capsys):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "1=", "answer": "1"}) for _ in range(40)))
    code, out, _ = call(capsys, "data", "check", str(path))
    (told,) = (line for line in out.splitlines() if line.startswith("  "))
    assert code == 2
    assert told.startswith(f"  {path}:1: 'id' is missing: give each line a text or an integer")
    assert told.endswith(" (and 39 more lines, the last 40)")
    path.write_text("\n".join(json.dumps({"id": n, "prompt": "1=", "answer": "1"}) for n in range(40)))
    assert "'verifier' is missing" in call(capsys, "data", "check", str(path))[1]
    assert answer(capsys, "data", "check", str(path), "--set", "data.verifier=exact")["verifiers"] == {"exact": 40}


def test_prompts_that_the_model_cannot_take_are_in_the_report(file, capsys):
    file.write_text(file.read_text() + json.dumps(LINES[0] | {"id": "d", "prompt": "words"}) + "\n")
    code, out, _ = call(capsys, "data", "check", str(file), "--config", "quickstart.yaml", "--json")
    assert (code, list(json.loads(out)["not_rendered"])) == (2, ["d"])


@pytest.mark.parametrize(
    "name", ["a #b.jsonl", "a: b.jsonl", "[a].jsonl", "${a}.jsonl", "'.jsonl", "ä\U0001f600.jsonl", "~"]
)
def test_a_file_of_any_name_is_read(name, file, capsys, monkeypatch):
    odd = file.with_name(name)
    file.rename(odd)
    monkeypatch.chdir(odd.parent)
    for given in (str(odd), f"./{name}"):
        assert answer(capsys, "data", "check", given, "--config", "quickstart.yaml")["questions"] == 3
        assert answer(capsys, "data", "check", given)["questions"] == 3


def test_own_verifiers_are_found_beside_the_configuration(tmp_path, capsys):
    config = tmp_path / "configs" / "mine.yaml"
    config.parent.mkdir()
    (config.parent / "beside_config.py").write_text("def f(prompt, text):\n    return float(text)\n")
    line = {"verifier": "beside_config:f", "answer": "", "response": "0.5"}
    (tmp_path / "r.jsonl").write_text(json.dumps(line))
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": 1, "prompt": "1=", "answer": "", "verifier": line["verifier"]}))
    config.write_text("defaults: [quickstart.yaml]\ndata: {source: {kind: jsonl, path: ../q.jsonl}}\n")
    code, out, _ = call(capsys, "data", "grade", str(tmp_path / "r.jsonl"), "--config", str(config), "--json")
    assert (code, json.loads(out)["reward"]) == (0, 0.5)
    assert answer(capsys, "data", "check", "--config", str(config))["verifiers"] == {"beside_config:f": 1}
    code, _, err = call(
        capsys, "data", "check", str(tmp_path / "q.jsonl"), "--config", str(config), "--set", "data.verifier=nowhere:f"
    )
    assert (code, f"tried {config.parent} (data.verifier_folder), " in err) == (2, True)


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


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": 1, "prompt": "?", "verifier": "exact", "response": "", "answer": ' + "[" * 100_000, "too many levels"),
        ('{"id": 1, "prompt": "?", "verifier": "exact", "response": "", "answer": ' + "9" * 5000 + "}", "4300 digits"),
        (
            '{"id": 1, "prompt": "?", "verifier": "exact", "response": "", "answer": "1", "answer": "2"}',
            "'answer' occurs",
        ),
        ('{"id": 1, "prompt": "?", "verifier": "exact", "response": "", "answer": "\\ud800"}', "half a character"),
        ("{\x00}", "not JSON"),
        ("[1]", "must be a JSON object, not list"),
        ('{"id": 1, "prompt": "?", "verifier": ["exact"], "response": "", "answer": "1"}', "'verifier' must be a"),
    ],
    ids=range(7),
)
def test_a_line_that_is_no_object_is_named(line, said, tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    for command in ("check", "grade"):
        path.write_text(line.replace(', "response": ""', "") if command == "check" else line)
        code, out, err = call(capsys, "data", command, str(path))
        assert (code, f"{path}:1: " in out + err, said in out + err) == (2, True, True), out + err
