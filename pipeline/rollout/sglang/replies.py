"""Reads what SGLang's ``/generate`` answers, token by token into arrays: JSON lists would take 136 bytes a token."""

from __future__ import annotations

from operator import attrgetter

import msgspec
import numpy as np

from pipeline.rollout.engine import EngineError
from pipeline.types import GenerateRequest, Sample, WeightSpan


class _Token(msgspec.Struct, array_like=True, gc=False):
    log_prob: float | None  # null where it is no number
    id: int


class _Reason(msgspec.Struct):
    type: str
    status_code: int | None = None
    message: str | None = None


class _Span(msgspec.Struct):
    version: int
    start: int
    end: int


class _Meta(msgspec.Struct):
    finish_reason: _Reason
    weight_version: int = -1  # said where no spans are
    weight_versions: list[_Span] | None = None
    output_token_logprobs: msgspec.Raw = msgspec.Raw(
        b"[]"
    )  # read by itself, so that only one sample's tokens are objects


class _Reply(msgspec.Struct):
    meta_info: _Meta


_REPLY = msgspec.json.Decoder(_Reply, strict=False)  # versions come as text
_TOKENS = msgspec.json.Decoder(list[_Token] | None)


def sample(body: bytes, request: GenerateRequest, seed: int) -> Sample:
    """What the reply's ``body`` says was drawn for ``request`` under ``seed``.

    Raises ``EngineError`` where the server reports an error, or does not answer in SGLang's form.
    """
    try:
        return _sample(request, seed, _REPLY.decode(body).meta_info)
    except (msgspec.DecodeError, ValueError) as error:
        raise EngineError(
            f"/generate answered in another form than SGLang's for prompt {request.prompt.id!r}: {error}"
        ) from error


def _sample(request: GenerateRequest, seed: int, meta: _Meta) -> Sample:
    reason = meta.finish_reason
    if reason.type == "abort" and reason.status_code:  # an error of the server, not our abort()
        raise EngineError(f"prompt {request.prompt.id!r}: {reason.message}")
    tokens = _TOKENS.decode(meta.output_token_logprobs) or []
    # 0.5.21 reports spans; before, one version per response, which pausing by retraction keeps true only when idle.
    spans = meta.weight_versions or [_Span(meta.weight_version, 0, len(tokens))]
    return Sample(
        token_ids=np.fromiter(map(attrgetter("id"), tokens), np.int64, len(tokens)),
        log_probs=np.array(list(map(attrgetter("log_prob"), tokens)), np.float32),
        temperature=request.temperature,
        seed=seed,
        role=request.role,
        finish_reason=reason.type,
        weight_versions=tuple(WeightSpan(span.version, span.start, span.end) for span in spans),
    )


def aborted(request: GenerateRequest, seed: int, version: int) -> Sample:
    """What the server says of a request that it aborts in its queue."""
    return _sample(request, seed, _Meta(_Reason("abort"), version))
