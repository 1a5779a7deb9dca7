"""A stand-in for a learner's ranks, threads of this process, that sends given weights by the plan."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import torch
from torch.distributed import TCPStore

from pipeline.model import architecture
from pipeline.model.grid import Grid
from pipeline.model.layout import rows
from pipeline.reshard.engine_grid import EngineGrid, Placement
from pipeline.reshard.execute import LearnerShards, QuantisedShards
from pipeline.reshard.order import PlanInputs
from pipeline.reshard.participant import Participant
from pipeline.rollout.native.decoder import Decoder
from pipeline.rollout.weight_sync import WeightSync
from tests.decoding import token_log_probs


def local_parameters(model, learner, rank, full):
    """A learner rank's Megatron parameters, cut from whole tensors here and not by the code under test."""
    parameters = {}
    for row in rows(model, learner):
        part = row.part(learner, rank)
        if part is None:
            continue
        parameters[row.parameter] = shard = torch.zeros(row.local_shape(part[0]), dtype=full[row.sources[0].name].dtype)
        for cut in row.slices(*part):
            source = full[row.sources[cut.source].name].narrow(row.dim, cut.source_start, cut.length)
            shard.narrow(row.dim, cut.start, cut.length).copy_(source)
    return parameters


class Source:
    """The part of a learner that a push needs: ``meeting_point``, ``send``, and ``log_probs`` for the probe.

    ``weights(version)``: whole Hugging Face tensors of each version. ``before_send``: called once in every send.
    """

    def __init__(
        self, folder, weights, engines=None, learner=None, *, dtype="fp32", bucket_bytes=1 << 16, colocated=False
    ):
        self.weights, self.learner = weights, learner or Grid()
        self.model = architecture.read(folder)
        engines = engines or EngineGrid()
        placement = Placement.consecutive(self.learner.world_size, engines.world_size, colocated)
        self.inputs = PlanInputs(str(folder), self.learner, engines, placement, bucket_bytes, dtype)
        self.ranks = [Participant() for _ in range(self.learner.world_size)]
        self.before_send = lambda: None
        self.sent = []  # orders

    def sync(self, engines, timeout_s=60.0, **options):
        """What pushes from here into ``engines``, one engine or a pool."""
        return WeightSync(self, engines, self.inputs, timeout_s, **options)

    @cached_property
    def store(self):
        return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def meeting_point(self, *, one_machine):
        return "127.0.0.1", self.store.port

    def send(self, order):
        self.sent.append(order)
        self.before_send()
        full = self.weights(order.version)

        def rank_sends(rank):
            shards = LearnerShards(
                rows(self.model, self.learner),
                self.learner,
                rank,
                local_parameters(self.model, self.learner, rank, full),
            )
            reader = QuantisedShards(shards) if order.inputs.dtype.startswith("fp8") else shards
            return self.ranks[rank].send(order, rank, reader)

        with ThreadPoolExecutor(len(self.ranks)) as threads:
            return list(threads.map(rank_sends, range(len(self.ranks))))

    def log_probs(self, batch):
        """Of the weights that the next ``send`` takes; set ``next_version`` first where that matters."""
        decoder = Decoder(self.model, self.weights(self.next_version))
        return token_log_probs(decoder, batch.tokens[None].long())[0]

    next_version = 1

    def empty_cache(self):
        """Nothing to give back."""
