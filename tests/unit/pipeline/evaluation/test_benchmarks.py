"""Benchmarks: rows to questions, sizes, resuming, shards, figures; the engine is scripted."""

import json
from typing import ClassVar

import numpy as np
import pytest

from pipeline.config.schema import DataConfig
from pipeline.data import DataError
from pipeline.evaluation import benchmarks
from pipeline.evaluation.benchmark_run import Settings, answer, figures, read_answers
from pipeline.evaluation.benchmarks import BENCHMARKS, load_questions
from pipeline.rewards.answers import canonical_answer
from pipeline.rewards.stage import VerifierFailedError, VerifierStage
from pipeline.types import Prompt, Role, Sample, SampleGroup, WeightSpan

SETTINGS = Settings("model", 0, 0.6, 0.95, 4, 8, 7, "single")
ROWS = {
    "aime24": {"id": 60, "problem": "What is 2+3?", "answer": "5"},
    "math500": {"problem": "What is 2+3?", "answer": "5", "subject": "Algebra"},
    "olympiadbench": {"question": "What is 2+3?", "final_answer": ["5"]},
    "gpqa_diamond": {"Question": "Q?", "Correct Answer": "r", **{f"Incorrect Answer {i}": f"w{i}" for i in (1, 2, 3)}},
    "mmlu_pro": {"question": "Q?", "options": ["w", "r"], "answer": "B", "answer_index": 1},
    "arc_challenge": {"question": "Q?", "choices": {"text": ["w", "r"], "label": ["1", "2"]}, "answerKey": "2"},
    "supergpqa": {"question": "Q?", "options": ["w", "r"], "answer": "r", "answer_letter": "B"},
}


def write_rows(folder, name, row, count):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(count)))


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_a_question(name, tmp_path):
    size = BENCHMARKS[name].size
    write_rows(tmp_path, name, ROWS[name], size)
    questions = load_questions(name, tmp_path)
    assert len(questions) == size
    assert questions[1].id == f"{name}/1"
    question = questions[0]
    assert "\\boxed{}" in question.text
    if BENCHMARKS[name].verifier == "math":
        assert question.answer == "5"
        assert question.text.startswith("What is 2+3?")
    else:
        assert f"{question.answer}. r" in question.text


def test_the_right_answer_of_gpqa_is_not_always_the_first(tmp_path):
    rows = [ROWS["gpqa_diamond"] | {"Question": f"Question {i}?"} for i in range(198)]
    (tmp_path / "gpqa_diamond.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    letters = [q.answer for q in load_questions("gpqa_diamond", tmp_path)]
    assert all(30 < letters.count(letter) < 70 for letter in "ABCD")
    assert letters == [q.answer for q in load_questions("gpqa_diamond", tmp_path)]


def test_sizes_are_those_of_the_papers():
    sizes = {name: found.size for name, found in BENCHMARKS.items() if found.dataset}
    assert sizes == {
        "aime24": 30,
        "aime25": 30,
        "hmmt25": 30,
        "amc23": 40,
        "math500": 500,
        "minerva": 272,
        "olympiadbench": 674,
        "gpqa_diamond": 198,
        "mmlu_pro": 12032,
        "arc_challenge": 1172,
        "supergpqa": 26529,
    }


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("aime24", '{"problem": "p", "answer": "1"}\n', "has 1 rows, AIME 2024 has 30"),
        ("aime24", '{"problem": "p"}\n', "row 0: not a question of aime24: the row has none of the fields answer"),
        ("aime24", "{\n", "aime24.jsonl:1: not JSON"),
        ("arc_challenge", '{"question": "q", "choices": {"text": [], "label": []}, "answerKey": "A"}\n', "row 0"),
        ("aime24", None, "isentrope benchmark fetch aime24"),
        ("aime23", None, "did you mean 'aime2"),
    ],
)
def test_bad_data_is_named(name, rows, said, tmp_path):
    if rows is not None:
        (tmp_path / f"{name}.jsonl").write_text(rows)
    with pytest.raises(DataError, match=said):
        load_questions(name, tmp_path)


@pytest.mark.parametrize("name", ["sample_math", "sample_choice"])
def test_the_shipped_samples_grade_their_own_answers(name, tmp_path):
    """Each reference answer in a box is judged right by the benchmark's own grader, and another is not."""
    questions = load_questions(name, None)
    assert benchmarks.fetch(name, tmp_path).name == f"{name}.jsonl"
    stage = VerifierStage(DataConfig(verifier_timeout_s=60), Words())
    prompts = [Prompt(q.id, (1,), q.text, q.answer, q.verifier) for q in questions]
    texts = [[f"so \\boxed{{{q.answer}}}.", "so \\boxed{Z}"] for q in questions]
    groups = stage.verify([Scripted(lines).group(prompt) for prompt, lines in zip(prompts, texts, strict=True)])
    stage.close()
    assert [[sample.correct for sample in group.samples] for group in groups] == [[True, False]] * len(questions)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("so \\boxed{C}", "C"),
        ("so \\boxed{\\text{(D)}}", "D"),
        ("B. is wrong, the answer is (A).", "A"),
        ("The answer is: B", "B"),
        ("the answer is a number", ""),
        ("first \\boxed{A}, then \\boxed{B. Paris}", "B"),
        ("no idea", ""),
    ],
)
def test_the_letter_that_was_chosen(text, letter):
    assert canonical_answer("choice", text) == letter


class Words:
    """A decoder whose token ids are positions in a shared list of texts."""

    texts: ClassVar[list[str]] = []

    def decode_batch(self, sequences):
        return [Words.texts[int(ids[0])] for ids in sequences]


class Scripted:
    """Answers every prompt with the same texts; counts what it was asked."""

    def __init__(self, texts):
        self.texts, self.asked = texts, []

    def group(self, prompt, seeds=None):
        ids = []
        for text in self.texts:
            Words.texts.append(text)
            ids.append(np.array([len(Words.texts) - 1]))
        zeros = np.zeros(1, np.float32)
        spans = (WeightSpan(0, 0, 1),)
        samples = tuple(Sample(i, zeros, 0.6, n, Role.EVALUATION, "stop", spans) for n, i in enumerate(ids))
        return SampleGroup(prompt, samples, Role.EVALUATION)

    def generate(self, requests):
        self.asked += [request.prompt.id for request in requests]
        assert all((r.temperature, r.top_p, len(r.seeds)) == (0.6, 0.95, 4) for r in requests)
        return [self.group(request.prompt) for request in requests]


def prompts_of(count):
    return [Prompt(f"x/{i}", (1,), "", "A" if i % 2 == 0 else "B", "choice") for i in range(count)]


def ask(prompts, file, engine, settings=SETTINGS, **data):
    told, config = [], DataConfig(**data)
    answer(prompts, settings, file, engine.generate, VerifierStage(config, Words()), config, told.append)
    return told


def test_answers_are_kept_and_the_rest_is_asked_again(tmp_path):
    file = tmp_path / "x" / "responses-0-of-1.jsonl"
    engine = Scripted(["\\boxed{A}", "\\boxed{A}", "\\boxed{A}", "\\boxed{B}"])
    assert ask(prompts_of(2), file, engine) == [0, 2]
    with file.open("a") as out:
        out.write('{"id": "x/2", "sam')  # a crash
    assert ask(prompts_of(4), file, engine) == [2, 4]
    assert engine.asked == ["x/0", "x/1", "x/2", "x/3"]
    settings, lines = read_answers(tmp_path / "x")
    assert settings == SETTINGS
    found = figures(lines, [1, 2, 4])
    assert found["avg"]["value"] == pytest.approx((0.75 + 0.25) / 2)
    assert found["pass_at_k"]["4"]["value"] == 1.0
    assert found["pass_at_k"]["2"]["value"] == pytest.approx((1 + 0.5) / 2)  # 1 - C(3,2)/C(4,2) where one is right
    assert found["maj_at_k"]["4"] == 0.5
    assert found["questions"] == 4


def test_shards_make_one_result(tmp_path):
    prompts = prompts_of(5)
    engine = Scripted(["\\boxed{A}"] * 4)
    for shard in (1, 0):
        ask(prompts[shard::2], tmp_path / f"responses-{shard}-of-2.jsonl", engine)
    _, lines = read_answers(tmp_path)
    assert [line["id"] for line in lines] == [f"x/{i}" for i in range(5)]


def test_other_settings_are_another_result(tmp_path):
    file = tmp_path / "responses-0-of-1.jsonl"
    engine = Scripted(["\\boxed{A}"] * 4)
    ask(prompts_of(1), file, engine)
    with pytest.raises(DataError, match=r"temperature 0.6, now 1.0"):
        ask(prompts_of(1), file, engine, Settings("model", 0, 1.0, 0.95, 4, 8, 7, "single"))


def test_a_batch_without_a_verdict_ends_and_is_asked_again(tmp_path, monkeypatch):
    file = tmp_path / "responses-0-of-1.jsonl"
    engine = Scripted(["\\boxed{A}"] * 4)
    with monkeypatch.context() as broken:
        broken.setattr("pipeline.rewards.verifiers.choice.Verifier.score", lambda self, prompt, text: 3.0)
        with pytest.raises(VerifierFailedError, match=r"could judge none of 4 responses.*reward 3.0 is outside"):
            ask(prompts_of(1), file, engine)
        assert ask(prompts_of(1), tmp_path / "marked.jsonl", engine, on_verifier_error="mark") == [0, 1]
    assert ask(prompts_of(1), file, engine) == [0, 1]
    assert engine.asked == ["x/0"] * 3


def test_nothing_answered_says_so(tmp_path):
    with pytest.raises(DataError, match="isentrope benchmark run"):
        read_answers(tmp_path)
    (tmp_path / "responses-1-of-2.jsonl").write_text('{"model": "mod')  # a shard that ended in its first line
    with pytest.raises(DataError, match="isentrope benchmark run"):
        read_answers(tmp_path)
    ask(prompts_of(1), tmp_path / "responses-0-of-2.jsonl", Scripted(["\\boxed{A}"] * 4))
    assert [line["id"] for line in read_answers(tmp_path)[1]] == ["x/0"]
