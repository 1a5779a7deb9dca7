import json

import pytest

from launchers.run.benchmark import Shard, published, results
from pipeline.data import DataError
from tests.command_line import answer, call


def test_list_names_size_source_and_licence(capsys):
    rows = {row["name"]: row for row in answer(capsys, "benchmark", "list")}
    assert rows["math500"]["questions"] == 500
    assert rows["supergpqa"]["licence"] == "ODC-BY"
    assert rows["gpqa_diamond"]["grader"] == "choice"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["aime24"], "--config FILE or --run RUN"),
        (["aime24", "--config", "recipe/pm4.yaml", "--offline"], "is not shipped"),
        (["aime2", "--config", "recipe/pm4.yaml"], "did you mean 'aime25'"),
        (["sample_math", "--config", "recipe/pm4.yaml", "--shard", "4/4"], "--shard 4/4"),
        (["sample_math", "--config", "recipe/pm4.yaml", "--decoding", "beam"], "avg or pass"),
        (
            ["sample_math", "--config", "recipe/pm4.yaml", "--set", "data.environment.id=x"],
            "has no effect with data.environment.name=single",
        ),
        (["sample_math", "--config", "recipe/pm4_check.yaml"], "math cannot judge within an episode"),
        (["sample_math", "--config", "recipe/pm4.yaml"], "cannot encode"),  # its tokenizer knows digits only
    ],
)
def test_bad_input_is_one_line_before_any_work(words, said, capsys):
    code, out, err = call(capsys, "benchmark", "run", *words)
    assert (code, out) == (2, "")
    assert said in " ".join(err.replace("│", " ").split())


def test_results_join_shards(tmp_path):
    settings = {
        "model": "m",
        "step": 0,
        "temperature": 1.0,
        "top_p": 1.0,
        "samples": 2,
        "max_new_tokens": 8,
        "seed": 0,
        "environment": "single",
    }
    right = {"text": "\\boxed{A}", "correct": True, "tokens": 3, "finish_reason": "stop", "verifier_error": ""}
    wrong = right | {"text": "\\boxed{B}", "correct": False, "finish_reason": "length"}
    (tmp_path / "arc_challenge").mkdir()
    for shard, samples in enumerate(([right, wrong], [wrong, wrong])):
        line = {"id": f"arc_challenge/{shard}", "verifier": "choice", "answer": "A", "samples": samples}
        path = tmp_path / "arc_challenge" / f"responses-{shard}-of-2.jsonl"
        path.write_text(json.dumps(settings) + "\n" + json.dumps(line) + "\n")
    (tmp_path / "aime24").mkdir()  # not begun
    (tmp_path / "aime24" / "responses-0-of-2.jsonl").touch()
    (found,) = results(tmp_path)
    assert (found["benchmark"], found["questions"], found["avg"]["value"]) == ("arc_challenge", 2, 0.25)
    assert found["pass_at_k"]["2"]["value"] == 0.5
    assert found["truncated"] == 0.75


def test_nothing_answered(tmp_path):
    with pytest.raises(DataError, match="isentrope benchmark run"):
        results(tmp_path / "none")


def test_published_figures_are_data():
    assert {entry["results"]["KL-Cov"] for entry in published("aime24")} == {36.8}
    assert {entry["model"] for entry in published("")} == {"Qwen2.5-Math-7B", "Qwen2.5-7B", "Qwen3-4B", "Qwen2.5-32B"}


def test_shards_are_parsed():
    assert Shard.parse("2/8") == Shard(2, 8)
