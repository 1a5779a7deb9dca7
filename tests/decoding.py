"""What the native decoder says of given tokens, and which tensors of a model FP8 stores: for tests that compare."""

import torch

from pipeline.model import fp8_layout


@torch.inference_mode()
def token_log_probs(decoder, tokens, temperature=1.0):
    """Log-probability of every token but the first given those before it.

    ``tokens`` is int64 ``[rows, length]``; the result float32 ``[rows, length - 1]``, at ``temperature``.
    """
    hidden, _ = decoder.prefill(tokens)
    log_probs = (decoder.logits(hidden[:, :-1]) / temperature).log_softmax(-1)
    return log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def quantised_names(rows):
    """Hugging Face names of the tensors that go out in FP8."""
    return frozenset(source.name for row in rows if fp8_layout.quantised(row) for source in row.sources)
