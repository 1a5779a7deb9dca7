"""Environments of two libraries, the real ones: ``verifiers``, and ``openenv`` with a server on the loopback."""

import asyncio
import importlib.util
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config.load import PACKAGED
from pipeline.config.schema import RunConfig
from pipeline.data import DataError, environment_rows
from pipeline.data.sources import load_prompts, read_questions
from pipeline.data.tokenizer import load_tokenizer
from pipeline.rollout.environment import environment_problems
from pipeline.rollout.episodes import Episodes
from pipeline.types import GenerateRequest, SampleGroup
from tests.chat_folder import write_chat_folder
from tests.scripted_model import Script

PM4 = PACKAGED / "model/pm4-100k"
VERIFIERS = """
import verifiers as vf
from datasets import Dataset

def check(answer: str) -> str:
    '''Says whether an answer is right.

    Args:
        answer: The answer to check.
    '''
    if answer == "7":
        raise KeyError("inside")
    return "right" if answer == "42" else "wrong"

def ends_well(completion, answer):
    return 1.0 if answer in completion[-1]["content"] else 0.25

def load_environment(judged=None, group=False):
    def of_group(completions):
        return [0.0 for _ in completions]

    rows = [{"question": f"What is {n}?", "answer": "42"} for n in ("the answer", "6 * 7")]
    reward = of_group if group else ends_well if judged is None else lambda completion: float(judged)
    return vf.ToolEnv(
        dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:1]), tools=[check],
        rubric=vf.Rubric(funcs=[reward]), system_prompt="You help.", max_turns=4,
    )
"""


def call(answer):
    return f'<tool_call>\n{{"name": "check", "arguments": {{"answer": "{answer}"}}}}\n</tool_call><|im_end|>'


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs the extra {package}")


def config(folder, template="", **environment):
    run = RunConfig()
    run.model.hf_path = str(write_chat_folder(folder / "model", template) if template else PM4)
    run.data.chat_template = bool(template)
    run.data.verifier_folder = str(folder)
    run.data.source.kind = "environment"
    run.rollout.max_prompt_tokens = run.rollout.max_new_tokens = 64
    for key, value in ({"max_turns": 3, "max_tokens": 2000, "concurrency": 2} | environment).items():
        setattr(run.data.environment, key, value)
    return run


def played(run, prompts, stream):
    """The one sample of each prompt."""
    episodes = Episodes(run, load_tokenizer(run.model.hf_path), stream)
    try:
        asked = [GenerateRequest(prompt, (number,), 1.0, 64) for number, prompt in enumerate(prompts)]
        return [group.samples[0] for group in episodes.generate(asked)]
    finally:
        episodes.close()


def scripted(run, **answers) -> Iterator:
    """A model that answers a conversation which has a word in it with that word's answers, one after the other."""
    tokenizer = load_tokenizer(run.model.hf_path)
    scripts = {word: Script(tokenizer, *said) for word, said in answers.items()}

    def stream(requests):
        for number, request in enumerate(requests):
            (text,) = tokenizer.decode_batch([np.array(request.prompt.token_ids)])
            script = next(script for word, script in scripts.items() if word in text)
            yield [(number, SampleGroup(request.prompt, (asyncio.run(script(request)),), request.role))]

    return stream


def prompts_of(run):
    return load_prompts(run.data, load_tokenizer(run.model.hf_path), max_prompt_tokens=64)


@needs("verifiers")
def test_an_environment_of_verifiers_brings_its_problems_tools_and_rewards(tmp_path):
    (tmp_path / "vf_check.py").write_text(VERIFIERS)
    run = config(tmp_path, "qwen3", name="verifiers", id="vf-check")
    assert not list(environment_problems(run))
    prompts = prompts_of(run)
    assert [prompt.id for prompt in prompts.train] == ["vf-check/0", "vf-check/1"]
    assert [prompt.id for prompt in prompts.held_out] == ["vf-check/eval/0"]
    assert [message["role"] for message in prompts.train[0].messages] == ["system", "user"]
    stream = scripted(
        run,
        **{
            "the answer?": [call("41"), call("42"), "The answer is 42.<|im_end|>"],
            "6 * 7?": [call("7"), "<|im_end|>"],  # a tool that raises, then an empty answer
        },
    )
    won, empty = played(run, prompts.train, stream)
    assert (won.stop_reason, won.reward, len(won.turns)) == ("done", 1.0, 3), won.verifier_error
    said = load_tokenizer(run.model.hf_path).decode_batch([won.token_ids])[0]
    assert re.findall(r"<tool_response>\n(\w+)", said) == ["wrong", "right"]
    assert not won.drawn[0]
    assert (empty.stop_reason, empty.reward, empty.verifier_error) == ("done", 0.0, "")


@needs("verifiers")
def test_one_that_lies_or_asks_too_often_ends_its_own_episode(tmp_path):
    (tmp_path / "vf_lies.py").write_text(VERIFIERS)
    run = config(tmp_path, "qwen3", name="verifiers", id="vf_lies", params={"judged": "nan"})
    prompts = prompts_of(run).train
    stream = scripted(run, **{"the answer?": ["42<|im_end|>"], "6 * 7?": [call("41")] * 3})
    lied, asked = played(run, prompts, stream)
    assert (lied.stop_reason, "reward nan" in lied.verifier_error) == ("environment_error", True)
    assert (asked.stop_reason, asked.reward, asked.verifier_error) == ("turn_limit", 0.0, "")


@needs("verifiers")
@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({"id": ""}, "data.environment.id", "which environment?"),
        ({"id": "vf_nowhere"}, "data.environment.id", "module 'vf_nowhere' is not found"),
        ({"params": {"judge": 1}}, "data.environment.id", "is called with (judge)"),
        ({"params": {"group": True}}, "data.environment.id", "judges whole groups"),
        ({"template": ""}, "data.chat_template", "the environment has tools"),
        ({"template": "smollm2"}, "data.environment.name", "shows the model no tools"),
    ],
)
def test_a_verifiers_environment_that_cannot_be_played_is_refused(tmp_path, monkeypatch, changes, key, said):
    monkeypatch.delitem(sys.modules, "vf_bad", raising=False)
    (tmp_path / "vf_bad.py").write_text(VERIFIERS)
    run = config(tmp_path, **{"template": "qwen3", "name": "verifiers", "id": "vf_bad", **changes})
    (problem,) = environment_problems(run)
    assert (problem.key, said in problem.problem) == (key, True), problem


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("12=", "12="),
        ([{"role": "system", "content": "Help.", "name": None}, {"role": "user", "content": "12="}], "Help.\n\n12="),
        ([{"role": "user", "content": [{"type": "image_url"}]}], None),
    ],
)
def test_rows_are_text(tmp_path, monkeypatch, prompt, text):
    rows = [{"prompt": prompt, "answer": "12", "info": {"n": 1}, "example_id": 3}]
    built = SimpleNamespace(build_dataset=lambda: rows, build_eval_dataset=lambda: None)
    monkeypatch.setattr(environment_rows, "verifiers_environment", lambda data: built)
    run = config(tmp_path, name="verifiers", id="own")
    if text is None:
        with pytest.raises(DataError, match="the model reads text only"):
            read_questions(run.data)
        return
    (question,) = read_questions(run.data)
    assert (question.text, question.answer, question.held_out) == (text, "12", None)
    assert question.meta == {"info": {"n": 1}, "example_id": 3}


def game():
    """The message must be the number that ``reset`` was given; any other is told ``-=``, three times."""
    from openenv.core.env_server import Action, Environment, Observation, State

    class Said(Action):
        message: str

    class Shown(Observation):
        text: str

    class Game(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed=None, episode_id=None, **given):
            self.seed, self.steps = seed, 0
            return Shown(text=f"{seed}=")

        def step(self, action, timeout_s=None, **given):
            self.steps += 1
            if self.seed == 13:
                raise ValueError("unlucky")
            right = action.message == str(self.seed)
            reward = 0.5 if right else 2.0 if self.seed == 14 else 0.0
            return Shown(text="-=", reward=reward, done=right or self.seed == 14)

        @property
        def state(self):
            return State(episode_id="", step_count=self.steps)

    return Game, Said, Shown


def game_of_calls(strange=False):
    """The number that ``reset`` was given is found by calls of a tool, which fails for 0. Seed 13 shows nothing."""
    from openenv.core.env_server import Environment, Observation, State
    from openenv.core.env_server import mcp_types as mcp

    class Shown(Observation):
        text: str

    schema = {"type": "string"} if strange else {"type": "object", "properties": {"answer": {"type": "string"}}}

    class Game(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed=None, episode_id=None, **given):
            self.seed = seed
            return Observation() if seed == 13 else Shown(text=f"Guess {seed}.")

        def step(self, action, timeout_s=None, **given):
            if isinstance(action, mcp.ListToolsAction):
                return mcp.ListToolsObservation(tools=[mcp.Tool(name="check", description="", input_schema=schema)])
            answer = action.arguments["answer"]
            if answer == "0":
                failed = mcp.ToolError(error_type="execution_error", message="no zero")
                return mcp.CallToolObservation(tool_name="check", error=failed)
            right = answer == str(self.seed)
            said = "right" if right else "wrong"
            result = {"content": [{"type": "text", "text": said}], "data": None}
            return mcp.CallToolObservation(tool_name="check", result=result, reward=float(right), done=right)

        @property
        def state(self):
            return State(episode_id="")

    return Game, mcp.CallToolAction, mcp.CallToolObservation


@contextmanager
def openenv_server(*game):
    import uvicorn
    from openenv.core.env_server import create_fastapi_app

    app = create_fastapi_app(*game, max_concurrent_envs=8)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@needs("openenv")
def test_an_openenv_server_is_reset_and_stepped(tmp_path):
    shown = {"observation": "text"}
    with openenv_server(*game()) as address:
        run = config(tmp_path, name="openenv", id=address, params=shown)
        run.data.source.size, run.data.source.seed, run.data.held_out = 4, 12, 0.0
        assert not list(environment_problems(run))
        prompts = prompts_of(run).train
        assert [prompt.meta["seed"] for prompt in prompts] == [12, 13, 14, 15]
        stream = scripted(run, **{"12=": ["21$", "12$"], "13=": ["13$"], "14=": ["1$"], "15=": ["1$", "2$", "3$"]})
        won, failed, lied, lost = played(run, prompts, stream)
        assert (won.stop_reason, won.reward, len(won.turns)) == ("done", 0.5, 2), won.verifier_error
        assert load_tokenizer(PM4).pieces(won.token_ids) == list("12=21$-=12$")
        assert (failed.stop_reason, "unlucky" in failed.verifier_error) == ("environment_error", True)
        assert (lied.stop_reason, "reward 2.0 is outside" in lied.verifier_error) == ("environment_error", True)
        assert (lost.stop_reason, lost.reward, len(lost.turns)) == ("turn_limit", 0.0, 3)
        run.data.environment.params = {"answer": "code", "other": "x"}
        other, answer = environment_problems(run)
        assert other.key == "data.environment.params.other"
        assert (answer.key, "use one of message" in answer.remedy) == ("data.environment.params.answer", True)
    (gone,) = environment_problems(config(tmp_path, name="openenv", id=address))
    assert (gone.key, "no OpenEnv server answers" in gone.problem) == ("data.environment.id", True)


@needs("openenv")
def test_an_openenv_server_of_tools_is_called(tmp_path):
    with openenv_server(*game_of_calls()) as address:
        run = config(tmp_path, "qwen3", name="openenv", id=address)
        run.data.source.size, run.data.source.seed, run.data.held_out = 3, 12, 0.0
        run.data.environment.params = {"observation": "text"}
        assert not list(environment_problems(run))
        won, shown_nothing, gave_up = played(
            run,
            prompts_of(run).train,
            scripted(
                run,
                **{
                    "Guess 12": [call("0"), call("1").replace("<|im_end|>", "") + call("12")],
                    "user\n13": [call("13")],
                    "Guess 14": ["No.<|im_end|>"],
                },
            ),
        )
        assert (won.stop_reason, won.reward, len(won.turns)) == ("done", 1.0, 2), won.verifier_error
        said = load_tokenizer(run.model.hf_path).decode_batch([won.token_ids])[0]
        assert re.findall(r"<tool_response>\n(.*)", said) == ["error: no zero"]
        assert (shown_nothing.reward, shown_nothing.stop_reason) == (1.0, "done"), shown_nothing.verifier_error
        assert (gave_up.reward, gave_up.stop_reason, gave_up.verifier_error) == (0.0, "done", "")
        run.data.environment.params = {"answer": "message"}
        (answer,) = environment_problems(run)
        assert (answer.key, answer.remedy) == ("data.environment.params.answer", "remove it")
        (plain,) = environment_problems(config(tmp_path / "plain", name="openenv", id=address))
        assert plain.key == "data.chat_template"
        (mute,) = environment_problems(config(tmp_path / "mute", "smollm2", name="openenv", id=address))
        assert (mute.key, "shows the model no tools" in mute.problem) == ("data.environment.name", True)
    with openenv_server(*game_of_calls(strange=True)) as address:
        (schema,) = environment_problems(config(tmp_path / "schema", "qwen3", name="openenv", id=address))
        assert "parameters of check must be a JSON schema of type object" in schema.problem


@pytest.mark.parametrize("name", ["verifiers", "openenv"])
def test_a_missing_library_names_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    problems = list(environment_problems(config(tmp_path, name=name, id="x")))
    assert f"pip install 'isentrope[{name}]'" in [problem.remedy for problem in problems]


def test_an_environment_without_problems_of_its_own_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"data\.environment\.name=tools brings no problems"):
        read_questions(config(tmp_path, name="tools").data)
