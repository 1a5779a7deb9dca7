"""Checks that an SGLang server holds the weights that were sent.

By the server's own bytes where it tells them, else by its log-probs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus

import numpy as np
import torch

from pipeline.model import fp8
from pipeline.model.architecture import Architecture
from pipeline.rollout.engine import EngineError
from pipeline.rollout.native.decoder import Decoder, computes, token_log_probs
from pipeline.rollout.sglang.server import SglangServer
from pipeline.rollout.transport import Deadline
from pipeline.units import GIB

logger = logging.getLogger(__name__)

_READ_BACK_TENSORS = 4  # per update; another handful at each version
_READ_BACK_ROWS = 64
_COMPARED_BYTES = GIB  # larger models are not recomputed here to verify an update
_COMPARED_TOKENS = 16
_LOG_PROB_TOLERANCE = {torch.float32: 0.02}  # nats, mean over the tokens that are compared
_LOG_PROB_TOLERANCE_16_BIT = 0.2  # SGLang also computes in 16 bits; a random 2-layer model showed 0.03
_LOG_PROB_TOLERANCE_FP8 = 0.5  # it rounds activations to FP8, too; not measured on a GPU yet


class UpdateVerifier:
    """Verifies one update after another on one server.

    ``expect`` is told of every tensor; ``check`` asks the paused server. Llama-like models answer /get_weights_by_name
    with the first rank's rows; Qwen models do not. Where it does not tell everything, our own decoder recomputes
    log-probs on the tensors that were sent, for models small enough.
    """

    def __init__(
        self,
        name: str,
        server: SglangServer,
        model: Architecture,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        dtype: torch.dtype,
        ranks: int,
    ) -> None:
        """``name``: the engine's, in messages.

        ``dtype``: what the server computes in. ``ranks``: its tensor parallelism.
        """
        self._server, self._dtype = server, dtype
        self._names = sorted(shapes)
        self._reads_back = _tells_rows(model) and self._read_back("model.norm.weight", None) is not None
        self._compared: Architecture | None = None
        self._expected: dict[str, torch.Tensor] = {}  # rows to read back
        self._arrived: dict[str, torch.Tensor] = {}  # everything, for the comparison of log-probs
        if self._reads_back and ranks == 1:
            return
        size = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
        if size <= _COMPARED_BYTES and computes(model):
            self._compared = model
        elif not self._reads_back:
            logger.warning(
                "%s: SGLang cannot read back weights of this model, which is too large or too new to recompute here; "
                "updates are verified by checksum on arrival, by SGLang's own answer and by version only. "
                "Watch mismatch_mean.",
                name,
            )

    def reset(self) -> None:
        """Forget what was expected."""
        self._expected, self._arrived = {}, {}

    def expect(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep of these tensors what ``check`` will compare."""
        if self._reads_back:
            first = version * _READ_BACK_TENSORS
            chosen = {self._names[(first + i) % len(self._names)] for i in range(_READ_BACK_TENSORS)}
            self._expected |= {
                n: t[:_READ_BACK_ROWS].to("cpu", self._dtype, copy=True)
                for n, t in tensors.items()
                if n in chosen and t.dtype != fp8.CODES  # the server may keep codes in another form
            }
        if self._compared is not None:
            self._arrived |= {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

    def check(self, version: int, deadline: Deadline) -> None:
        """Raise ``EngineError`` unless the server holds what was expected, as ``version``. It stays paused.

        For that comparison it is let go for a moment. Requests that wait on it go on meanwhile; their tokens carry
        ``version``, and the engine hands them out only if that commits.
        """
        label = self._server.get("/model_info", timeout_s=deadline.remaining_s())["weight_version"]
        if label != str(version):
            raise EngineError(f"the server says its weights are version {label!r}")
        for name, expected in self._expected.items():
            actual = self._read_back(name, deadline)
            if actual is None:
                raise EngineError(f"{name!r} cannot be read back")
            # The server pads its vocabulary and, on a CPU, its MLP; a TP rank holds a part only.
            common = tuple(slice(min(sizes)) for sizes in zip(actual.shape, expected.shape, strict=True))
            if not torch.equal(actual[common], expected[common].float()):
                raise EngineError(f"{name!r} reads back differently from what was sent")
        if self._compared is not None:
            self._server.post("/continue_generation", timeout_s=deadline.remaining_s())
            mode = "abort"  # a sample begun on wrong weights must not go on when a later update brings the same version
            try:
                self._check_log_probs(self._compared, deadline)
                mode = "retract"
            finally:
                self._server.post("/pause_generation", mode=mode, timeout_s=deadline.remaining_s())

    def _check_log_probs(self, model: Architecture, deadline: Deadline) -> None:
        arrived = {name: tensor.to(self._dtype) for name, tensor in fp8.values(self._arrived).items()}
        decoder = Decoder(model, arrived)
        tokens = torch.randint(model.vocab, (1, _COMPARED_TOKENS), generator=torch.Generator().manual_seed(0))
        ours = token_log_probs(decoder, tokens)[0].numpy()
        theirs = server_log_probs(self._server, tokens[0].tolist(), timeout_s=deadline.remaining_s())
        difference = float(np.abs(theirs - ours).mean())
        tolerance = _LOG_PROB_TOLERANCE.get(self._dtype, _LOG_PROB_TOLERANCE_16_BIT)
        if arrived.keys() != self._arrived.keys():  # some came with scales
            tolerance = _LOG_PROB_TOLERANCE_FP8
        if not difference <= tolerance:
            raise EngineError(f"log-probs differ by {difference:.3f} nats from those of the weights that were sent")

    def _read_back(self, name: str, deadline: Deadline | None) -> torch.Tensor | None:
        """The first rows of a parameter as the server holds it, float32; None where the model class cannot tell."""
        timeout_s = deadline.remaining_s() if deadline else None
        response = self._server.send(
            "/get_weights_by_name", name=name, truncate_size=_READ_BACK_ROWS, timeout_s=timeout_s
        )
        return torch.tensor(response.json()) if response.status_code == HTTPStatus.OK else None


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


def _tells_rows(model: Architecture) -> bool:
    """Whether the server's own rows can be compared.

    SGLang cuts q, k and v out of the fused tensor with ``hidden_size / heads`` rows a head, whatever ``head_dim`` says.
    """
    return model.head_dim == model.hidden // model.heads
