"""What the recording endpoint costs: scripted agents over HTTP, a stub in place of the engines.

    python -m tools.bench.episodes --agents 256 --turns 5 --json episodes.json

The agents are a process of their own, each an HTTP client that keeps its connection open, asks with a tool's schema and
sends the whole conversation every time. The stub answers at once with as many tokens as an answer has. So what is
measured is what a turn costs beside the engine: HTTP, JSON, the chat template, the tokens in between, the recording.
CPU seconds are those of the endpoint's process with all its threads. Every agent is one open socket on either side.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import aiohttp
import numpy as np

from pipeline.config.load import resolve_path
from pipeline.data.tokenizer import load_tokenizer
from pipeline.rollout.recording.endpoint import Endpoint
from pipeline.rollout.recording.recording import Limits, Recording
from pipeline.rollout.recording.template import ConversationTemplate
from pipeline.types import GenerateRequest, Prompt, Sample, WeightSpan
from tests.chat_folder import write_chat_folder

SHAPE = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
TOOL = {"type": "function", "function": {"name": "check", "description": "Checks an answer.", "parameters": SHAPE}}
QUESTION = "Which numbers make 24 with + and *? Think, then check your answer with the tool. " * 4
RESULT = "That is wrong: 3 * 7 is 21. Try other numbers, and say which you have tried. " * 4


class Stub:
    """``draw`` of a recording: ``length`` tokens, the end the last of them, at once."""

    def __init__(self, length: int, end: int, words: int) -> None:
        self._ids = np.array([*(words + number % 97 for number in range(length - 1)), end], np.int64)
        self._log_probs = np.full(length, -0.5, np.float32)

    async def __call__(self, request: GenerateRequest) -> Sample:
        """One answer."""
        spans = (WeightSpan(0, 0, len(self._ids)),)
        given = (request.temperature, request.seeds[0], request.role, "stop", spans)
        return Sample(self._ids, self._log_probs, *given)


async def agent(session: aiohttp.ClientSession, url: str, key: str, turns: int) -> list[float]:
    """Seconds that each turn of one episode took."""
    messages: list[dict[str, object]] = [{"role": "user", "content": QUESTION}]
    took = []
    for _ in range(turns):
        begun = time.perf_counter()
        body = {"model": "policy", "messages": messages, "tools": [TOOL]}
        headers = {"Authorization": f"Bearer {key}"}
        async with session.post(f"{url}/chat/completions", json=body, headers=headers) as response:
            answer = await response.json()
        took.append(time.perf_counter() - begun)
        messages += [answer["choices"][0]["message"], {"role": "user", "content": RESULT}]
    return took


def agents(url: str, keys: list[str], turns: int, told: Connection) -> None:
    """All agents, at the same time; a process of its own."""

    async def together() -> list[list[float]]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            return await asyncio.gather(*(agent(session, url, key, turns) for key in keys))

    told.send(asyncio.run(together()))


def cpu_seconds() -> float:
    """Of this process, all its threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(folder: Path, count: int, turns: int, length: int) -> dict[str, float]:
    """The figures of one round."""
    tokenizer = load_tokenizer(folder)
    template, stub = ConversationTemplate(tokenizer), Stub(length, tokenizer.eos_token_ids[0], 20)
    limits = Limits(length, 1 << 20, turns)
    records = [
        Recording(Prompt(str(seed), (), "", None, "exact"), template, stub, seed=seed, temperature=1.0, limits=limits)
        for seed in range(count)
    ]
    endpoint = Endpoint("policy")
    url = endpoint.start()
    keys = [endpoint.open(record) for record in records]
    template.opening([{"role": "user", "content": QUESTION}], [TOOL])  # once a run: transformers, the template compiled
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=agents, args=(url, keys, turns, there))
    process.start()
    used, begun = cpu_seconds(), time.perf_counter()
    took = np.array(here.recv())
    wall, used = time.perf_counter() - begun, cpu_seconds() - used
    process.join()
    endpoint.close()
    drawn = [record.sample("done").drawn_tokens for record in records]
    assert drawn == [turns * length] * count, "every answer was recorded"
    return {
        "agents": count,
        "turns": turns,
        "tokens": length,
        "cpu_ms_per_turn": round(1000 * used / (count * turns), 3),
        "wall_s": round(wall, 2),
        "turn_ms_median": round(1000 * float(np.median(took)), 1),
        "turn_ms_p99": round(1000 * float(np.quantile(took, 0.99)), 1),
    }


def main() -> None:
    """Parse the arguments, measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100, help="of each answer")
    parser.add_argument(
        "--model", default="", help="folder with a chat template that shows tools; default: a small one"
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = resolve_path(given.model) if given.model else write_chat_folder(Path(scratch) / "model", "qwen3")
        found = measure(Path(folder), given.agents, given.turns, given.tokens)
    print(json.dumps(found, indent=2))
    if given.json:
        given.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
