"""Episodes over HTTP with real engines: the log-probs of what was drawn are those of another computation of the model.

That is transformers' for the native engine, and the learner's in a run that trains on episodes of an SGLang server. The
model is random: what it draws is no text that a tokenizer would have written so. Any token that was guessed from its
text, or put into the wrong place, shows.
"""

import asyncio
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline.data.tokenizer import load_tokenizer
from pipeline.rollout.native.engine import NativeEngine
from pipeline.rollout.recording.recording import Limits, Recording
from pipeline.rollout.recording.template import ConversationTemplate
from tests.chat_folder import write_chat_folder
from tests.integration.forks import isentrope
from tests.scripted_model import CHECK, NO_PROMPT, text_of, user
from tests.tiny_folder import write_folder

openai = pytest.importorskip("openai")
pytest.importorskip("aiohttp")
pytestmark = pytest.mark.xdist_group("sglang")
EPISODES, TURNS = 6, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = write_chat_folder(tmp_path_factory.mktemp("chat") / "model", "qwen3")
    config = json.loads((path / "config.json").read_text())
    keep = {name: config[name] for name in ("vocab_size", "eos_token_id", "pad_token_id")}
    return write_folder(path, "llama", **keep, max_position_embeddings=2048)[0]


async def play(client):
    """An agent that goes on whatever the model says."""
    messages = [user("What is 6 * 7?")]
    for _ in range(TURNS):
        answer = await client.chat.completions.create(model="policy", messages=messages, tools=[CHECK])
        messages += [answer.choices[0].message, user("That is wrong: try again.")]


def test_drawn_tokens_are_trained_on_as_they_were_drawn(folder):
    from pipeline.rollout.recording.endpoint import Endpoint

    engine = NativeEngine()
    engine.start(folder)
    template = ConversationTemplate(load_tokenizer(folder))
    endpoint = Endpoint("policy")
    url = endpoint.start()

    async def draw(request):
        (group,) = await asyncio.to_thread(engine.generate, [request])
        return group.samples[0]

    limits = Limits(max_new_tokens=24, max_tokens=1024, max_turns=TURNS)
    records = [
        Recording(NO_PROMPT, template, draw, seed=seed, temperature=1.0 + 0.2 * (seed % 2), limits=limits)
        for seed in range(EPISODES)
    ]

    async def together():
        clients = [openai.AsyncOpenAI(base_url=url, api_key=endpoint.open(record)) for record in records]
        await asyncio.gather(*map(play, clients))
        for client in clients:
            await client.close()

    asyncio.run(together())
    endpoint.close()
    model = LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    rewritten = 0
    for record in records:
        sample = record.sample("done")
        assert (len(sample.turns), record.dropped) == (TURNS, (0, 0))
        tokens = torch.from_numpy(sample.token_ids)[None]
        with torch.inference_mode():
            logits = model(tokens).logits[0, :-1] / sample.temperature
        expected = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].numpy()
        drawn = sample.drawn[1:]
        np.testing.assert_allclose(sample.log_probs[1:][drawn], expected[drawn], atol=1e-4)
        for turn in sample.turns:
            ids = sample.token_ids[turn.start : turn.end]
            rewritten += list(template.tokenizer.encode_rendered(text_of(template, ids))) != ids.tolist()
    assert rewritten > EPISODES, "tokens guessed from the text would have been others"


AGENT = """
MESSAGES = [{"role": "user", "content": "What is 6 * 7?"}, {"role": "user", "content": "That is wrong: try again."}]
CHECK = CHECK_TOOL

async def run(client, prompt, meta):
    messages, said = MESSAGES[:1], ""
    for _ in range(TURNS):
        stop = "e" if len(messages) == 1 else None
        answer = await client.chat.completions.create(
            model="policy", messages=messages, tools=[CHECK], stop=stop, logprobs=True
        )
        tokens = [each.token for each in answer.choices[0].logprobs.content]
        assert not stop or not any(stop in token for token in tokens[:-1]), tokens
        said += answer.choices[0].message.content or ""
        messages += [answer.choices[0].message, MESSAGES[1]]
    return float(len(said) % 2)
"""
RUN = """
steps: 2
runtime: inline
model: {hf_path: MODEL}
learner: {tensor_model_parallel_size: 1, micro_batch_size: 4, optimizer: {lr: 1.0e-3}}
rollout:
  engine: sglang
  sglang: {max_total_tokens: 16384, dtype: float32}
  prompts_per_step: 2
  samples_per_prompt: 4
  max_prompt_tokens: 256
  max_new_tokens: 24
data:
  chat_template: true
  environment: {name: function, id: "agent:run", max_turns: TURNS, max_tokens: 1024, concurrency: 2}
evaluation: {every: 0, at_start: false, at_end: false}
checkpoint: {every: 0}
monitoring: {progress: false}
"""


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs the sglang extra")
def test_a_run_trains_on_episodes_of_a_server(folder, tmp_path):
    (tmp_path / "agent.py").write_text(AGENT.replace("TURNS", str(TURNS)).replace("CHECK_TOOL", repr(CHECK)))
    (tmp_path / "run.yaml").write_text(RUN.replace("TURNS", str(TURNS)).replace("MODEL", str(folder)))
    done = isentrope("train", "--config", "run.yaml", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    events = [json.loads(line) for line in Path(tmp_path / "run/events.jsonl").read_text().splitlines()]
    first, second = [event for event in events if event["kind"] == "step"]
    for step in (first, second):
        assert (step["episodes"]["turns"], step["episodes"]["done"]) == (TURNS, 1.0)
        assert step["episodes"]["given_tokens"] > 50, "the learner reads more than the model drew"
        assert step["metrics"]["mismatch_max"] < 1e-4, "the second step's server has the learner's new weights"
        assert step["prefix_cache"]["share"] > 0.5, "what was read for one answer is in the cache for the next"
