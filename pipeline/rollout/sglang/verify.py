"""Checks that an SGLang server computes with the weights that were sent.

That every byte arrived is known already, by digests. This finds weights in the wrong place, which no digest can.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.reshard.order import Order
from pipeline.rollout.engine import EngineError
from pipeline.rollout.sglang.server import SglangServer
from pipeline.rollout.transport import Deadline

# Nats, mean over the tokens that are compared, by the type in which weights were sent.
_TOLERANCE = {
    "fp32": 0.02,
    "bf16": 0.2,  # SGLang also computes in 16 bits; a random 2-layer model showed 0.03
    "fp8": 0.5,  # it rounds activations to FP8, too; not measured on a GPU yet
}


def check(server: SglangServer, order: Order, deadline: Deadline) -> None:
    """Raise ``EngineError`` unless the paused server serves ``order``'s version and computes what its probe says.

    For the probe the server is let go for a moment. Requests that wait on it go on meanwhile; their tokens carry the
    version, and the engine hands them out only if that commits.
    """
    label = server.get("/model_info", timeout_s=deadline.remaining_s())["weight_version"]
    if label != str(order.version):
        raise EngineError(f"the server says its weights are version {label!r}")
    if order.probe is None:
        return
    server.post("/continue_generation", timeout_s=deadline.remaining_s())
    mode = "abort"  # a sample begun on wrong weights must not go on when a later update brings the same version
    try:
        theirs = server_log_probs(server, order.probe.tokens, timeout_s=deadline.remaining_s())
        difference = float(np.abs(theirs - np.array(order.probe.log_probs)).mean())
        if not difference <= _TOLERANCE[order.inputs.dtype]:
            raise EngineError(f"log-probs differ by {difference:.3f} nats from the learner's with the same weights")
        mode = "retract"
    finally:
        server.post("/pause_generation", mode=mode, timeout_s=deadline.remaining_s())


def server_log_probs(server: SglangServer, token_ids: Sequence[int], *, timeout_s: float | None = None) -> np.ndarray:
    """The server's T=1 log-probs of every token but the first, float32 ``[len - 1]``."""
    reply = server.post(
        "/generate",
        input_ids=list(token_ids),
        sampling_params={"temperature": 1.0, "max_new_tokens": 1},
        return_logprob=True,
        logprob_start_len=0,
        timeout_s=timeout_s,
    )
    return np.array([entry[0] for entry in reply["meta_info"]["input_token_logprobs"][1:]], dtype=np.float32)
