"""Weights of a learner of several ranks into several engines under Ray: every rank sends its share of the plan."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from launchers.run.assemble import plan_inputs, start_engines, start_learner, weight_sync
from pipeline.config.schema import LearnerConfig, ModelConfig, RolloutConfig, RunConfig
from pipeline.rollout.native.engine import NativeEngine
from pipeline.types import GenerateRequest, Prompt
from tests.distributed.megatron_ranks import batch
from tests.tiny_folder import write_folder

# Matrices of up to 1 MiB, of which a bucket holds a few, and an embedding that is larger than a bucket.
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 32, "vocab_size": 4096}
REQUESTS = [GenerateRequest(Prompt(str(i), (5, 6, i), "", None, "exact"), (1, 2, 3), 1.0, 6) for i in range(4)]


@pytest.fixture
def parts(tmp_path):
    """A learner of PP 2 x DP 2 and two engines, which were started with other weights than the learner's."""
    start, _ = write_folder(tmp_path / "start", "llama", **SIZES)
    trained, _ = write_folder(tmp_path / "trained", "llama", seed=1, **SIZES)
    layout = LearnerConfig(pipeline_model_parallel_size=2, data_parallel_size=2, bucket_mib=1, micro_batch_size=4)
    config = RunConfig(model=ModelConfig(hf_path=str(start)), learner=layout, rollout=RolloutConfig(engines=2))
    with ExitStack() as stack:
        learner = start_learner(config, stack)
        engines = start_engines(config, tmp_path / "logs", stack)
        learner.load(trained)
        yield learner, engines, trained, weight_sync(config, plan_inputs(config), learner, engines)


def drawn(groups):
    samples = [sample for group in groups for sample in group.samples]
    return [s.token_ids.tolist() for s in samples], np.concatenate([s.log_probs for s in samples])


def test_every_rank_s_share_reaches_every_engine(parts):
    learner, engines, trained, sync = parts
    for version in (1, 2, 3):
        sync.push(version)
    plan = sync._inputs.plan()
    assert plan.buckets > 2
    assert (plan.traffic()[:, 0, :, :4].sum((0, 1)) > 0).all()  # bytes sent by each of the four ranks
    alone = NativeEngine()
    alone.start(trained)
    (tokens, log_probs), (expected, exact) = drawn(engines.generate(REQUESTS)), drawn(alone.generate(REQUESTS))
    assert tokens == expected
    np.testing.assert_allclose(
        log_probs, exact, atol=1e-5
    )  # each engine has a part of the batch, which rounds otherwise

    rows = batch(8, 2, vocab=4096)
    learner.update(rows, 3)
    sync.push(4)
    groups = engines.generate(REQUESTS)
    assert drawn(groups)[0] != expected
    for group in groups:
        for sample in group.samples:
            tokens = torch.tensor([[*group.prompt.token_ids, *sample.token_ids.tolist()]])
            columns = torch.arange(1, tokens.shape[1]) >= len(group.prompt.token_ids)
            shape = {"rows": 1, "auxiliary": 0, "vocab": 4096, "seq": tokens.shape[1]}
            learnt = learner.log_probs(
                batch(**shape, tokens=tokens, loss_mask=columns[None], lengths=torch.tensor([tokens.shape[1]]))
            )
            np.testing.assert_allclose(sample.log_probs, learnt.numpy(), atol=1e-4)
