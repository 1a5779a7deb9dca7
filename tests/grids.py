"""Ragged batches from grids that tests write down by hand, and back."""

from __future__ import annotations

import torch

from pipeline.types import PER_TARGET, TrainBatch


def ragged(tokens: torch.Tensor, lengths: torch.Tensor, loss_mask: torch.Tensor, **fields) -> TrainBatch:
    """``tokens`` ``[rows, seq]``, ``loss_mask`` ``[rows, seq - 1]`` as is what there is of each target, which may be
    flat already.
    """
    columns = torch.arange(tokens.shape[1])
    inside = columns < lengths[:, None]
    first = torch.zeros(len(tokens), 1, dtype=torch.bool)
    assert not (loss_mask & ~inside[:, 1:]).any()
    for name in PER_TARGET & fields.keys():
        if fields[name] is not None and fields[name].dim() == 2:
            fields[name] = fields[name][loss_mask]
    return TrainBatch(
        tokens=tokens[inside].int(),
        loss_mask=torch.cat([first, loss_mask], dim=1)[inside],
        lengths=lengths,
        targets=loss_mask.sum(1),
        **fields,
    )


def distinct(sizes: list[tuple[int, int]]) -> TrainBatch:
    """Rows of so many prompt and response tokens; every entry is one of a kind, so that a misplaced one shows."""
    prompts, targets = (torch.tensor(numbers) for numbers in zip(*sizes, strict=True))
    rows, per_target = torch.arange(float(len(sizes))), torch.arange(float(targets.sum()))
    kinds = torch.tensor([False, True]).repeat(len(sizes))
    return TrainBatch(
        tokens=torch.arange(int((prompts + targets).sum()), dtype=torch.int32),
        loss_mask=kinds.repeat_interleave(torch.stack([prompts, targets], dim=1).flatten()),
        lengths=prompts + targets,
        targets=targets,
        weights=rows,
        advantages=rows + 0.1,
        auxiliary=rows > 2,
        correct=rows > 3,
        temperatures=rows + 0.2,
        behavior_log_probs=-per_target,
        old_log_probs=-per_target - 0.5,
        positive_weights=rows + 0.3,
        routes=torch.arange(4 * int((prompts + targets).sum()), dtype=torch.int32).to(torch.uint16).view(-1, 2, 2),
    )


def rows_of(flat: torch.Tensor, counts: torch.Tensor) -> list[list]:
    """The entries of each row."""
    return [row.tolist() for row in flat.split(counts.tolist())]


def grid_of(flat: torch.Tensor, batch: TrainBatch, fill: float = 0) -> torch.Tensor:
    """``[rows, seq - 1]`` of what there is of each target, ``fill`` elsewhere."""
    grid = torch.full((batch.rows, int(batch.lengths.max()) - 1), fill, dtype=flat.dtype)
    return grid.masked_scatter(mask_of(batch), flat)


def mask_of(batch: TrainBatch) -> torch.Tensor:
    """Bool ``[rows, seq - 1]``: the targets."""
    return _padded(batch.loss_mask, batch)[:, 1:]


def tokens_of(batch: TrainBatch) -> torch.Tensor:
    """Int64 ``[rows, seq]``, 0 behind each row."""
    return _padded(batch.tokens.long(), batch)


def _padded(flat: torch.Tensor, batch: TrainBatch) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(flat.split(batch.lengths.tolist()), batch_first=True)
