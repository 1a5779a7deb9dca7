"""The command line as a user meets it: exit codes, messages, and what it does not import."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from launchers.cli import main
from tests.command_line import call

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _restore_hook(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def commands(command, *words):
    """Every command with its words, groups among them."""
    yield words, command
    for word, child in getattr(command, "commands", {}).items():
        yield from commands(child, *words, word)


COMMANDS = dict(commands(typer.main.get_command(main.app)))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example_that_can_be_pasted(capsys, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = call(capsys, *words, "--help")
    assert code == 0
    assert "Usage: isentrope" in out
    shown = [line.strip() for line in out.splitlines()]
    examples = [line.strip() for line in COMMANDS[words].help.splitlines() if line.startswith("  ")]
    assert examples or hasattr(COMMANDS[words], "commands")
    assert [line for line in examples if line not in shown] == []


def test_paragraphs_of_help_break_at_the_width_of_the_terminal_only(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    _, out, _ = call(capsys, "entropy", "calibrate", "--help")
    assert " --excite N trains N steps from the model of --config, or from the newest checkpoint of RUN, " in out


def test_version(capsys):
    code, out, _ = call(capsys, "--version")
    assert code == 0
    assert out.startswith("isentrope ")


@pytest.mark.parametrize(
    "words",
    [
        ["bogus"],
        ["train"],
        ["train", "--config", "a", "--resume", "b"],
        ["evaluate"],
        ["report"],
        ["train", "--no-such-option"],
        ["entropy", "calibrate"],
        ["entropy", "calibrate", "--config", "quickstart.yaml"],
        ["entropy", "probe"],
        ["entropy", "probe", "--config", "quickstart.yaml", "-t", "0"],
        ["entropy", "law"],
    ],
)
def test_usage_errors_exit_with_2(capsys, words):
    code, _, err = call(capsys, *words)
    assert code == 2
    assert "Usage" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", [["config", "validate"], ["config", "show"], ["train"], ["evaluate"]])
def test_configuration_errors_exit_with_2_before_any_work(capsys, command):
    code, _, err = call(capsys, *command, "--config", "recipe/pm4.yaml", "rollout.engnie=native")
    assert code == 2
    assert err.splitlines() == [
        "configuration error",
        "  rollout.engnie: 'native'   (command line)",
        "    problem: unknown key",
        "    remedy:  did you mean rollout.engine?",
    ]


def test_show_and_validate(capsys, tmp_path):
    code, out, _ = call(capsys, "config", "show", "--config", "quickstart.yaml", "steps=7")
    assert code == 0
    assert "steps: 7  # training steps" in out
    code, out, _ = call(capsys, "config", "show", "--config", "quickstart.yaml", "--json")
    assert json.loads(out)["entropy"]["band"]["low"] == 0.27
    code, out, _ = call(capsys, "config", "validate", "--config", "quickstart.yaml", "--json")
    assert code == 0
    assert json.loads(out)["valid"] is True


def isentrope(*words, cwd):
    command = [sys.executable, "-m", "launchers.cli.main", *words]
    return subprocess.run(
        command, cwd=cwd, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, check=False
    )


def test_failures_are_one_line_and_debug_shows_the_traceback(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"schema":1,"kind":"run_start","time":1,"step":0}\n')
    (tmp_path / "config.yaml").write_text("model: {hf_path: x}\n")
    words = ("report", str(tmp_path), "-o", "events.jsonl/report.html")  # below a file
    plain = isentrope(*words, cwd=tmp_path)
    assert plain.returncode == 1
    assert re.match(r"error: (FileExists|NotADirectory)Error: ", plain.stderr)
    assert "Traceback" not in plain.stderr
    debug = isentrope(*words, "--debug", cwd=tmp_path)
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr


@pytest.mark.parametrize("words", ["['--help']", "['config', 'show', '--config', 'quickstart.yaml']"])
def test_light_commands_import_nothing_heavy(tmp_path, words):
    code = (
        "import sys\nfrom launchers.cli.main import run\n"
        f"try:\n    run({words})\nexcept SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "print(sorted({'torch', 'ray', 'transformers', 'matplotlib', 'numpy', 'megatron'} & set(sys.modules)))"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_missing_package_names_the_extra_that_has_it(capsys):
    error = ModuleNotFoundError("No module named 'nemo_run.core'", name="nemo_run.core")
    main._one_line(ModuleNotFoundError, error, None)
    assert "pip install 'isentrope[launch]'" in capsys.readouterr().err
    main._one_line(ModuleNotFoundError, ModuleNotFoundError("No module named 'x'", name="x"), None)
    assert "--debug" in capsys.readouterr().err
