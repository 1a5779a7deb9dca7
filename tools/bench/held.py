"""Compares three ways to hold running answers at a weight update, on a real SGLang server.

    python -m tools.bench.held --json held.json
    python -m tools.bench.held --model models/SmolLM2-135M-Instruct

``ask_again`` is what ``rollout.partial`` does: the answers are ended, and asked again with their tokens behind the
prompt. ``retract`` and ``in_place`` are SGLang's own, modes of ``/pause_generation``: the server keeps the requests;
``retract`` reads their tokens again with the new weights, ``in_place`` goes on with the keys and values that the old
weights made. The new weights are those after one step of Adam: REINFORCE on answers of the old ones, rewards random.

Figures, medians over rounds: ``hold_s``, from the order until no answer is under way; ``resume_s`` and
``resume_cpu_s``, from the end of the update until every answer has a new token (by the clock; CPU seconds of server and
client); ``read`` tokens of prompts and answers that the server computed for that, and ``cached``, those that it knew
from its cache. ``held`` tokens were there. The update itself, the same for all, is not in them. ``before`` and
``after`` compare the log-probs that the server told with a forward pass of the weights that its spans name, over the
tokens on either side of the update: mean and largest difference, in nats. ``exact_spans``: answers whose span of the
old weights ends at the token at which they stood.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.schema import SGLANG_KEEPS_FREE, RolloutConfig, SglangConfig
from pipeline.rollout.sglang.engine import SglangEngine
from tools.bench.overlap import computed_s, write_model

MODES = ("ask_again", "retract", "in_place")
_BATCH = re.compile(r"Prefill batch.*?#new-token: (\d+), #cached-token: (\d+)")
_LONGEST_S = 900.0
_SETTLED_S = 0.3  # in which the last tokens before a pause have arrived


@dataclass
class Answer:
    """One answer while it is drawn."""

    prompt: list[int]
    seed: int
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)  # version, start, end
    stood_at: int = 0  # tokens, at the update


class Server:
    """A server and its log."""

    def __init__(self, engine: SglangEngine, log: Path) -> None:
        self.url, self.log = engine._running.url, log

    async def post(self, path: str, **body: object) -> None:
        """POST; raises unless all is well."""
        async with self.session.post(self.url + path, json=body) as response:
            said = await response.text()
            if response.status != 200 or '"success":false' in said:
                raise SystemExit(f"{path}: {response.status} {said[:300]}")

    async def load(self, folder: Path, version: int, *, flush: bool) -> None:
        """Take the weights of a folder."""
        given = {"model_path": str(folder), "weight_version": str(version), "flush_cache": flush}
        await self.post("/update_weights_from_disk", load_format="auto", **given)

    async def draw(self, answer: Answer, most: int) -> None:
        """Stream what is left of an answer of ``most`` tokens."""
        begun = list(answer.tokens), list(answer.log_probs), list(answer.spans)
        parameters = {"max_new_tokens": most - len(begun[0]), "ignore_eos": True, "sampling_seed": answer.seed}
        asked = {"input_ids": answer.prompt + begun[0], "sampling_params": parameters | {"temperature": 1.0}}
        asked |= {"stream": True, "return_logprob": True}
        async with self.session.post(self.url + "/generate", json=asked) as response:
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                meta = json.loads(line[6:])["meta_info"]  # of all that the request has so far
                drawn = meta["output_token_logprobs"]
                answer.tokens = begun[0] + [entry[1] for entry in drawn]
                answer.log_probs = begun[1] + [entry[0] for entry in drawn]
                at = len(begun[0])
                given = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": 0}]
                spans = [(int(each["version"]), at + each["start"], at + each["end"]) for each in given]
                answer.spans = begun[2] + spans

    def read(self) -> tuple[int, int]:
        """Tokens that the server has read since it began: computed, and known from the cache."""
        found = [(int(new), int(cached)) for new, cached in _BATCH.findall(self.log.read_text())]
        return sum(new for new, _ in found), sum(cached for _, cached in found)


async def until(reached: Sequence[tuple[Answer, int]]) -> None:
    """Wait until every answer has more tokens than that. Raises ``TimeoutError`` where the server stands still."""
    async with asyncio.timeout(_LONGEST_S):
        while any(len(answer.tokens) <= count for answer, count in reached):
            await asyncio.sleep(0.002)


async def round_of(
    server: Server, mode: str, answers: list[Answer], folders: tuple[Path, Path], tokens: int
) -> dict[str, float]:
    """Draw the answers, and change the weights when each has half of its tokens."""
    await server.post("/pause_generation", mode="retract")  # else a flush just after the last reply may end the server
    await server.load(folders[0], 1, flush=True)
    await server.post("/continue_generation")
    running = [asyncio.create_task(server.draw(answer, tokens)) for answer in answers]
    await until([(answer, tokens // 2) for answer in answers])
    begun = time.monotonic()
    if mode == "ask_again":
        await server.post("/abort_request", abort_all=True)
        await asyncio.gather(*running)
    await server.post("/pause_generation", mode="in_place" if mode == "in_place" else "retract")
    hold_s = time.monotonic() - begun
    await asyncio.sleep(_SETTLED_S)
    for answer in answers:
        answer.stood_at = len(answer.tokens)
    await server.load(folders[1], 2, flush=mode != "in_place")
    begun, cpu_s, read = time.monotonic(), computed_s(os.getpid()), server.read()
    await server.post("/continue_generation")
    if mode == "ask_again":
        running = [asyncio.create_task(server.draw(answer, tokens)) for answer in answers if answer.stood_at < tokens]
    await until([(answer, min(answer.stood_at, tokens - 1)) for answer in answers])
    resume_s, resume_cpu_s = time.monotonic() - begun, computed_s(os.getpid()) - cpu_s
    await asyncio.gather(*running)
    new, cached = (after - before for after, before in zip(server.read(), read, strict=True))
    held = sum(answer.stood_at for answer in answers)
    return {"hold_s": hold_s, "resume_s": resume_s, "resume_cpu_s": resume_cpu_s} | {
        "read": new,
        "cached": cached,
        "held": held,
    }


def log_probs(model: Any, answer: Answer) -> torch.Tensor:
    """Of every token of an answer, by one forward pass."""
    row = torch.tensor([answer.prompt + answer.tokens])
    logits = model(row).logits[0, len(answer.prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, row[0, len(answer.prompt) :, None])[:, 0]


def updated(model: Any, answers: Sequence[Answer], lr: float, folder: Path) -> None:
    """Write the weights after one step of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for i, answer in enumerate(answers):
        (log_probs(model, answer).mean() * (1 if i % 2 else -1) / len(answers)).backward()
    optimizer.step()
    model.save_pretrained(folder)


@torch.no_grad()
def agreement(models: Sequence[Any], answers: Sequence[Answer]) -> dict[str, Any]:
    """How far the log-probs are from those of the versions that the spans name."""
    apart: dict[str, list[np.ndarray]] = {"before": [], "after": []}
    exact = 0
    for answer in answers:
        exact += [(version, end) for version, _, end in answer.spans][:1] == [(1, answer.stood_at)]
        known = [log_probs(model, answer).numpy() for model in models]
        for version, start, end in answer.spans:
            part = slice(start, end)
            apart["before" if version == 1 else "after"].append(
                np.abs(known[version - 1][part] - np.array(answer.log_probs[part]))
            )
        assert all(left[2] == right[1] for left, right in pairwise(answer.spans))
    found = {side: np.concatenate(parts) for side, parts in apart.items() if parts}
    told = {side: {"mean": float(all_.mean()), "max": float(all_.max())} for side, all_ in found.items()}
    return told | {"exact_spans": exact}


async def measure(server: Server, folder: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All modes, one after the other in every round."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    first = model.config.bos_token_id or 0
    once = aiohttp.TCPConnector(limit=0, force_close=True)  # else the server may close what is about to be used again
    async with aiohttp.ClientSession(
        connector=once, timeout=aiohttp.ClientTimeout(), read_bufsize=2**24
    ) as server.session:
        await server.load(folder, 1, flush=True)
        prompts = [Answer([first], seed) for seed in range(arguments.groups)]  # what the model itself says first
        await asyncio.gather(*(server.draw(prompt, arguments.prompt) for prompt in prompts))
        of_groups = [([first, *prompt.tokens], seed) for prompt in prompts for seed in range(arguments.samples)]
        fresh = [Answer(prompt, seed) for prompt, seed in of_groups]
        await asyncio.gather(*(server.draw(answer, arguments.tokens // 4) for answer in fresh))
        updated(model, fresh, arguments.lr, scratch / "after")
        models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), model]
        shutil.copytree(
            folder, scratch / "after", ignore=lambda _, names: os.listdir(scratch / "after"), dirs_exist_ok=True
        )
        rounds: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
        drawn: dict[str, list[Answer]] = {mode: [] for mode in MODES}
        for _ in range(arguments.rounds):
            for mode in MODES:
                answers = [Answer(prompt, seed) for prompt, seed in of_groups]
                rounds[mode].append(
                    await round_of(server, mode, answers, (folder, scratch / "after"), arguments.tokens)
                )
                drawn[mode] += answers
    return {
        mode: {name: round(float(np.median([each[name] for each in rounds[mode]])), 3) for name in rounds[mode][0]}
        | agreement(models, drawn[mode])
        for mode in MODES
    }


def main() -> None:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder; default: a Llama of 3.4 million random parameters")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8, help="of each group")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer; the weights change after half of them")
    parser.add_argument("--lr", type=float, default=1e-5, help="of the update")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        scratch = Path(name)
        folder = arguments.model or scratch / "model"
        if arguments.model is None:
            write_model(folder, 256, 4, 1 + arguments.prompt + arguments.tokens + SGLANG_KEEPS_FREE)
        given = SglangConfig(dtype="float32", max_total_tokens=32768, extra_args=["--log-level", "info"])
        config = RolloutConfig(engine="sglang", max_new_tokens=arguments.tokens, sglang=given)
        engine = SglangEngine(config, index=0, log_dir=scratch, seed=0)
        engine.start(folder.resolve())
        try:
            found = asyncio.run(measure(Server(engine, scratch / "sglang-0.log"), folder.resolve(), scratch, arguments))
        finally:
            engine.close()
    text = json.dumps(vars(arguments) | {"model": folder.name, "json": None} | found, indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
