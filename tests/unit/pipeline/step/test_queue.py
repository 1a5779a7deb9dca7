import json
from dataclasses import replace

import numpy as np
import torch

from pipeline.step.draw import StepSamples
from pipeline.step.queue import Drawn, _drawn, _plain
from pipeline.types import ControlDecision, Prompt, Role, Sample, SampleGroup, WeightSpan


def test_what_waits_survives_json_bit_for_bit():
    rng = np.random.default_rng(0)
    prompt = Prompt("q1", (1, 2, 3), "text", {"numbers": [1, 2]}, "countdown", {"level": 3})
    sample = Sample(
        rng.integers(0, 99, 5),
        rng.standard_normal(5).astype(np.float32),
        1.37,
        2**62 + 1,
        Role.AUXILIARY,
        "stop",
        (WeightSpan(4, 0, 3), WeightSpan(5, 3, 5)),
        "1+2",
        1 / 3,
        False,
        "slow",
    )
    main = replace(sample, role=Role.MAIN, temperature=1.0)
    decision = ControlDecision(1.37, 1.37, 4, "tracking", "H in band", 0.3, 0.31, 0.02)
    old = torch.from_numpy(rng.standard_normal((2, 7)).astype(np.float32))
    drawn = Drawn(
        4,
        decision,
        StepSamples(
            [SampleGroup(prompt, (main,), Role.MAIN)],
            [SampleGroup(prompt, (sample, sample), Role.AUXILIARY)],
            2,
            [SampleGroup(prompt, (replace(sample, role=Role.REPEATED),), Role.REPEATED)],
        ),
        old,
    )
    back = _drawn(json.loads(json.dumps(_plain(drawn))))
    assert torch.equal(back.old_log_probs, old)
    assert (back.version, back.decision, back.samples.stale) == (4, decision, 2)
    for before, after in zip(
        (*drawn.samples.main, *drawn.samples.auxiliary, *drawn.samples.repeated),
        (*back.samples.main, *back.samples.auxiliary, *back.samples.repeated),
        strict=True,
    ):
        assert after.prompt == before.prompt
        assert after.role is before.role
        for one, two in zip(before.samples, after.samples, strict=True):
            assert one.token_ids.dtype == two.token_ids.dtype
            assert one.log_probs.tobytes() == two.log_probs.tobytes()
            rest = [{k: v for k, v in vars(s).items() if k not in ("token_ids", "log_probs")} for s in (one, two)]
            assert rest[0] == rest[1]
            assert one.token_ids.tolist() == two.token_ids.tolist()
