"""What the tests of real SGLang servers share: models, requests, pushes and what a server's processes are."""

from pathlib import Path

import numpy as np
import torch

from pipeline.model.architecture import parse
from pipeline.reshard.engine_grid import EngineGrid
from pipeline.rollout.native.decoder import Decoder
from pipeline.types import GenerateRequest, Prompt, Role
from tests.decoding import token_log_probs
from tests.plan_source import Source
from tests.tiny_folder import hf_config, random_tensors

FAMILIES = ("llama", "qwen3_moe")
TOLERANCE = 0.02  # nats


def server_pid(engine):
    guard = engine._server._process.pid
    return int(Path(f"/proc/{guard}/task/{guard}/children").read_text().split()[0])


def process_group(group):
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            members.append(stat.parent.name)
    return members


def generate_request(tokens, count=4, temperature=1.0, new=12, role=Role.MAIN):
    seeds = tuple(range(count))
    return GenerateRequest(Prompt(str(tokens), tuple(tokens), "", None, "exact"), seeds, temperature, new, role)


def decoder_of(family, seed):
    return Decoder(parse(hf_config(family)), random_tensors(hf_config(family), seed))


def source(engine, family, seed=None, learner=None, colocated=False):
    """A learner of the model of a started engine, or of a pool's; version ``v`` are the tensors of seed ``v``, or of
    ``seed``.
    """
    every = getattr(engine, "_engines", (engine,))
    config = every[0]._config
    ranks = 1 if config.weight_transport == "disk" else config.tensor_parallel_size

    def tensors(version):
        return random_tensors(hf_config(family), version if seed is None else seed)

    return Source(every[0]._server._hf_path, tensors, EngineGrid(ranks, count=len(every)), learner, colocated=colocated)


def push(engine, family, version, seed=None):
    given = source(engine, family, seed=seed)
    given.next_version = version
    given.sync(engine, probe=True).push(version)


def assert_agrees(groups, decoder):
    """Log-probs of both engines for the same tokens, at the temperature of the draw."""
    for group in groups:
        for sample in group.samples:
            prompt = group.prompt.token_ids
            tokens = torch.tensor([[*prompt, *sample.token_ids.tolist()]])
            ours = token_log_probs(decoder, tokens, sample.temperature)[0, len(prompt) - 1 :]
            np.testing.assert_allclose(sample.log_probs, ours.numpy(), atol=TOLERANCE)


REQUESTS = [
    generate_request([5, 6, 7], 8),
    generate_request([9, 4, 20, 31, 8], 8, temperature=1.4, role=Role.AUXILIARY),
    generate_request([11], 3, temperature=0.7, new=1),
]
