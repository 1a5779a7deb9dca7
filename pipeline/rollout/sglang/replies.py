"""Reads what SGLang's ``/generate`` answers, token by token into arrays: JSON lists would take 136 bytes a token."""

from __future__ import annotations

import base64
from dataclasses import replace
from operator import attrgetter

import msgspec
import numpy as np

from pipeline.model import routing
from pipeline.model.architecture import Architecture
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
    # Read by itself, so that only one sample's tokens are objects.
    output_token_logprobs: msgspec.Raw = msgspec.Raw(b"[]")
    cached_tokens: int = 0  # of the prompt
    routed_experts: str | None = None  # base64 of int32 [tokens - 1, layers, top_k]


class _Reply(msgspec.Struct):
    meta_info: _Meta


_REPLY = msgspec.json.Decoder(_Reply, strict=False)  # versions come as text
_TOKENS = msgspec.json.Decoder(list[_Token] | None)


def sample(body: bytes, request: GenerateRequest, seed: int, model: Architecture | None = None) -> Sample:
    """What the reply's ``body`` says was drawn for ``request`` under ``seed``; with its routes, if ``model`` has any.

    Raises ``EngineError`` where the server reports an error, or does not answer in SGLang's form.
    """
    try:
        meta = _REPLY.decode(body).meta_info
        drawn = _sample(request, seed, meta)
        return drawn if model is None else replace(drawn, routes=_routes(meta, model))
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
        cached_tokens=meta.cached_tokens,
    )


def _routes(meta: _Meta, model: Architecture) -> np.ndarray | None:
    """From SGLang's record of every layer (``srt/state_capturer/routed_experts.py``, 0.5.21).

    An aborted request need not have one. Raises ``ValueError`` where it is missing or not of this model's layers.
    """
    if meta.routed_experts is None:
        if meta.finish_reason.type == "abort":
            return None
        raise ValueError("no routed_experts in it: the server records none")
    assert model.moe is not None
    recorded = np.frombuffer(base64.b64decode(meta.routed_experts), np.int32)
    return routing.of_all_layers(recorded.reshape(-1, model.layers, model.moe.top_k), model)


def aborted(request: GenerateRequest, seed: int, version: int) -> Sample:
    """What the server says of a request that it aborts in its queue."""
    return _sample(request, seed, _Meta(_Reason("abort"), version))
