"""A user's own environment in processes of its own, with the real ``openai`` client."""

import asyncio
import importlib.util
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launchers.run.inputs import check_start
from pipeline.config.errors import ConfigError
from pipeline.config.load import PACKAGED
from pipeline.config.schema import RunConfig
from pipeline.data.tokenizer import load_tokenizer
from pipeline.rollout.environment import RewardError, environment_of, environment_problems
from pipeline.rollout.episodes import Episodes
from pipeline.rollout.native.engine import NativeEngine
from pipeline.types import GenerateRequest, Prompt
from tests.chat_folder import write_chat_folder

FOLDER = PACKAGED / "model/pm4-100k"
CODE = """
import os, time

async def run(client, prompt, meta):
    async def say(text):
        return (await client.completions.create(model="policy", prompt=text)).choices[0].text

    said = await say(prompt.text)
    do = meta["do"]
    if do == "raise":
        raise KeyError("inside")
    if do == "interrupt":
        raise KeyboardInterrupt  # as of a Ctrl-C that some library sends itself
    if do == "unknown":
        class Unknown(BaseException):
            pass
        raise Unknown("no Exception")
    if do == "ids":
        await client.completions.create(model="policy", prompt=[999])
    if do == "hang":
        os.system("sleep 61 &")  # goes with the process
        time.sleep(60)
    if do == "die":
        os._exit(3)
    if do == "endless":
        while True:
            said += await say(prompt.text + said)
    if do == "large":
        await say(prompt.text + "1" * 10_000_000)
    if do == "turns":
        await say(prompt.text + said + "$-=")
        return [0.25, 0.5]
    return meta.get("reward", 1.0)

def two(client, prompt):
    return 1.0
"""


def config(folder: Path, function="own:run", **environment):
    (folder / "own.py").write_text(CODE)
    run = RunConfig()
    run.model.hf_path = str(FOLDER)
    run.rollout.max_prompt_tokens = run.rollout.max_new_tokens = 8
    run.data.verifier_folder = str(folder)
    settings = {"name": "function", "id": function, "max_turns": 3, "max_tokens": 40, "concurrency": 4} | environment
    for key, value in settings.items():
        setattr(run.data.environment, key, value)
    return run


def asked(**meta):
    ids = tuple("0123456789+-*=,$".index(letter) for letter in "1234,10=")
    return GenerateRequest(Prompt(str(meta), ids, "1234,10=", "1234,10", "countdown", meta), (1,), 1.0, 8)


@pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="needs the episodes extra")
def test_whatever_it_does_ends_its_own_episode_alone(tmp_path):
    engine = NativeEngine()
    engine.start(FOLDER)
    cases = [
        ({"do": "raise"}, "environment_error", "KeyError: 'inside' (own.py, line 11)", 0.0),
        ({"do": "interrupt"}, "environment_error", "KeyboardInterrupt:  (own.py, line 13)", 0.0),
        ({"do": "unknown"}, "environment_error", "Unknown: no Exception (own.py, line 17)", 0.0),
        ({"do": "ids"}, "environment_error", "has id 999, beyond the model's vocabulary of 16", 0.0),
        ({"do": "hang"}, "timeout", "turn_timeout_s", 0.0),
        ({"do": "die"}, "environment_error", "process died (exit code 3)", 0.0),
        ({"do": "endless"}, "turn_limit", "", 0.0),
        ({"do": "large"}, "token_limit", "", 0.0),
        ({"do": "turns"}, "done", "", 0.75),
        ({"do": "", "reward": float("nan")}, "environment_error", "reward nan is outside [0, 1]", 0.0),
        (
            {"do": "", "reward": "1.0"},
            "environment_error",
            "own:run (own.py, line 4) returned '1.0' (str): return a number in",
            0.0,
        ),
        ({"do": ""}, "done", "", 1.0),
    ]
    episodes = Episodes(config(tmp_path, turn_timeout_s=15.0), load_tokenizer(FOLDER), engine.stream)
    started = time.monotonic()
    try:
        groups = episodes.generate([asked(**meta) for meta, *_ in cases])
    finally:
        episodes.close()
    assert time.monotonic() - started < 55
    for (_, stop_reason, error, reward), group in zip(cases, groups, strict=True):
        (sample,) = group.samples
        told = sample.stop_reason, sample.reward, sample.drawn_tokens > 0
        assert told == (stop_reason, reward, True), sample.verifier_error
        assert error in sample.verifier_error
        assert bool(error) == bool(sample.verifier_error)
        assert group.prompt.token_ids == ()
        assert not sample.drawn[0]  # the conversation is there from its first token on
    deadline = time.monotonic() + 30  # a guard kills what a dead process left, in its turn
    while "sleep 61" in os.popen("ps -eo args").read():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (plain,) = engine.generate([asked(do="")])
    first = groups[-1].samples[0]
    assert first.token_ids.tolist() == [*asked().prompt.token_ids, *plain.samples[0].token_ids.tolist()]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own", "write module:function"),
        ("nowhere:run", "module 'nowhere' is not found"),
        ("own:runs", "did you mean 'run'?"),
        ("own:two", "is called with (client, prompt, meta)"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused(tmp_path, monkeypatch, name, said):
    monkeypatch.delitem(sys.modules, "own", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package, find=importlib.util.find_spec: find("json"))
    (problem,) = environment_problems(config(tmp_path, name))
    assert problem.key == "data.environment.id"
    assert said in problem.problem


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=r"openai is not installed(.|\n)*isentrope\[episodes\]"):
        check_start(config(tmp_path))


@pytest.mark.parametrize(
    ("template", "said"), [("", "shows the model no tools"), ("chatml", "shows the model no tools")]
)
def test_a_model_that_cannot_be_given_tools_is_refused(tmp_path, template, said):
    run = config(tmp_path, "", name="tools")
    run.model.hf_path = str(write_chat_folder(tmp_path / "model", template))
    run.data.chat_template = True
    (problem,) = environment_problems(run)
    assert (problem.key, said in problem.problem) == ("data.environment.name", True)
    run.model.hf_path = str(write_chat_folder(tmp_path / "able", "qwen3"))
    assert not list(environment_problems(run))


def test_settings_that_no_environment_reads_are_refused(tmp_path):
    keys = {problem.key for problem in environment_problems(config(tmp_path, "own:run", name="single"))}
    assert keys == {"data.environment.id"}
    run = config(tmp_path, "own:run", name="tools", params={"replies": "-="})
    assert {p.key for p in environment_problems(run)} == {"data.environment.id", "data.environment.params.replies"}
    run = replace(run, data=replace(run.data, verifier="math"))
    assert "data.verifier" in {problem.key for problem in environment_problems(run)}


def test_a_function_that_is_not_async_is_named(tmp_path):
    (tmp_path / "not_async.py").write_text("def plain(client, prompt, meta):\n    return 1.0\n")
    data = config(tmp_path, function="not_async:plain").data
    said = r"not_async:plain \(not_async\.py, line 1\) returned 1\.0 \(float\): return what can be awaited, by 'async"
    with pytest.raises(RewardError, match=said):
        asyncio.run(environment_of(data).run(None, asked().prompt, data))
