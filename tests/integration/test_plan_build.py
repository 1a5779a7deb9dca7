"""The largest shipped learner, 128 ranks, built on this machine as the plan says (20 s of CPU)."""

from tests import command_line


def test_the_235b_recipe_is_built_as_planned(capsys):
    build = command_line.answer(capsys, "plan", "learner", "--config", "recipe/qwen3-235b-a22b.yaml", "--build")[
        "build"
    ]
    assert build["differences"] == []
    ranks = build["ranks"]
    assert [rank["rank"] for rank in ranks] == [end for stage in range(8) for end in (16 * stage, 16 * stage + 15)]
    assert max(rank["seconds"] for rank in ranks) < 60
