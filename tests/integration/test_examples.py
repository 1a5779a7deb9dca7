"""Every example runs as its page says, at smoke size."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from launchers import api
from pipeline.ports import free_port
from pipeline.rewards.verifiers.countdown import Verifier
from pipeline.types import Prompt

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SMOKE = ["steps=2", "rollout.prompts_per_step=4", "evaluation.prompts=4", "evaluation.samples=16"]
INLINE = ["runtime=inline", "learner.tensor_model_parallel_size=1"]
BY_HAND = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def run(folder: Path, *words: str, **more: str) -> str:
    done = subprocess.run(words, cwd=folder, env=BY_HAND | more, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the example of a reward of one's own."""
    folder = tmp_path_factory.mktemp("own")
    config = EXAMPLES / "own_reward/own_reward.yaml"
    run(folder, "isentrope", "train", "--config", str(config), "run_dir=own", *SMOKE)
    return folder / "own"


@pytest.mark.xdist_group("sglang")  # with test_convert_and_serve: the run is made once
def test_own_reward(trained):
    steps = [event for event in api.events(trained) if event["kind"] == "step"]
    assert len(steps) == 2
    assert all(0 < step["reward"] <= 1 for step in steps)
    assert all(step["verifier_errors"] == 0 for step in steps)


def test_own_reward_is_right_where_countdown_is(monkeypatch):
    """And half where the digits alone are wrong."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "own_reward"))
    score = importlib.import_module("reward").score
    lines = map(json.loads, (EXAMPLES / "own_reward/questions.jsonl").read_text().splitlines())
    line = next(line for line in lines if line["answer"] == "1115,02")
    prompt = Prompt(line["id"], (), line["prompt"], line["answer"], "", {"operators": "+-"})
    for text, reward in (("5-1-1-1", 1.0), ("9-7+1-1", 0.5), ("5-1-1+1", 0.0), ("5-1-1", 0.0), ("5-1-1-1-0", 0.0)):
        assert score(prompt, text) == reward
        assert (Verifier().score(prompt, text) == 1) == (reward == 1)


def stop_reasons(run_dir):
    return [event["episodes"] for event in api.events(run_dir) if event["kind"] == "step"]


def test_check_tool(tmp_path):
    run(
        tmp_path,
        "isentrope",
        "train",
        "--config",
        str(EXAMPLES / "check_tool/check_tool.yaml"),
        "run_dir=t",
        *SMOKE,
        *INLINE,
    )
    told = stop_reasons(tmp_path / "t")
    assert len(told) == 2
    assert all(1 < step["turns"] < 3 and step["done"] + step["turn_limit"] == pytest.approx(1) for step in told)
    assert all(step["given_tokens"] == pytest.approx(2 * (step["turns"] - 1)) for step in told)  # a reply has two


@pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="needs the episodes extra")
def test_own_environment(tmp_path):
    config = EXAMPLES / "own_environment/own_environment.yaml"
    run(tmp_path, "isentrope", "train", "--config", str(config), "run_dir=own", "rollout.samples_per_prompt=4", *SMOKE)
    told = stop_reasons(tmp_path / "own")
    assert all(1 < step["turns"] < 3 and step["done"] == 1 for step in told)


def test_chat_data(tmp_path):
    config, data = EXAMPLES / "chat_data/chat_data.yaml", EXAMPLES / "chat_data/conversations.jsonl"
    checked = json.loads(run(tmp_path, "isentrope", "data", "check", str(data), "--config", str(config), "--json"))
    assert checked["example"]["prompt"] == "1111,00="
    run(tmp_path, "isentrope", "train", "--config", str(config), "run_dir=chat", *SMOKE, *INLINE)
    assert (tmp_path / "chat/report.html").is_file()


def test_two_bands(tmp_path):
    run(tmp_path, str(EXAMPLES / "two_bands/compare.sh"), *SMOKE, *INLINE, OUT="bands")
    assert "high" in (tmp_path / "bands/report.html").read_text()


def test_from_python(tmp_path):
    said = run(tmp_path, sys.executable, str(EXAMPLES / "python_api.py"), *SMOKE, "run_dir=py")
    assert re.search(r"entropy went from 0\.\d+ to 0\.\d+", said)
    assert (tmp_path / "py/hugging_face/model.safetensors").is_file()
    columns = api.table(tmp_path / "py")
    assert {len(column) for column in columns.values()} == {2}
    assert api.summary(tmp_path / "py")["steps"] == 2


def commands(page: str) -> list[list[str]]:
    """The words of those of our first own run."""
    text = (ROOT / page).read_text().partition("our first own run\n")[2]
    lines = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)[:2]).splitlines()
    return [line.partition("#")[0].split() for line in lines]


def test_the_commands_of_the_first_own_run(tmp_path):
    """In a copy of what they touch; fewer steps, and the browser's page is not opened."""
    (activate, *told) = commands("docs/first_run.md")
    assert (activate[0], len(told)) == ("source", 7)
    assert commands("README.md") == [activate, *told[:-1], told[-1][:-1]], "the same, but --verify at the end"
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    shutil.copytree(ROOT / "configs/model/pm4-100k", tmp_path / "configs/model/pm4-100k")
    script = "\n".join(map(shlex.join, told)).replace("steps=60", " ".join(SMOKE)).replace("--web", "--once")
    run(tmp_path, "bash", "-euc", script)
    assert (tmp_path / "runs/my/report.html").is_file()
    assert (tmp_path / "models/my/model.safetensors").is_file()


@pytest.mark.xdist_group("sglang")
@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs the sglang extra")
def test_convert_and_serve(trained, tmp_path):
    """The server answers with the converted weights."""
    from pipeline.rollout.sglang import cpu

    port = str(free_port())
    script = [str(EXAMPLES / "serve/convert_and_serve.sh"), str(trained), str(tmp_path / "folder"), "--port", port]
    on_cpu = [*cpu.ARGUMENTS, "--attention-backend", cpu.ATTENTION_BACKEND, "--dtype", "float32"]
    on_cpu += ["--skip-tokenizer-init"]  # pm4's tokenizer knows digits only, and the warm-up sends words
    more = BY_HAND | cpu.environment(1, str(ROOT))
    server = subprocess.Popen([*script, *on_cpu, "--max-total-tokens", "4096"], env=more, start_new_session=True)
    try:
        deadline, ids = time.monotonic() + 240, []
        while not ids and time.monotonic() < deadline:
            assert server.poll() is None
            try:
                asked = {"input_ids": [1, 1, 1, 5, 14, 0, 2, 13], "sampling_params": {"max_new_tokens": 4}}
                ids = httpx.post(f"http://localhost:{port}/generate", json=asked, timeout=60).json()["output_ids"]
            except httpx.ConnectError:
                time.sleep(1)
        assert len(ids) > 0
    finally:
        os.killpg(server.pid, signal.SIGKILL)
