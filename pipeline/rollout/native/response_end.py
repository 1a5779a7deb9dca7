"""When a response is over: at a token that ends it, or where its text holds a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.data.tokenizer import Tokenizer, most_tokens


@dataclass(frozen=True)
class ResponseEnd:
    """What ends responses. Texts, those of all and a response's own, need a ``tokenizer``."""

    token_ids: tuple[int, ...]
    texts: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None

    def reached(
        self, tokens: torch.Tensor, rows: torch.Tensor, last: torch.Tensor, own: Sequence[tuple[str, ...]]
    ) -> torch.Tensor:
        """Whether each of ``rows`` of ``tokens`` ends with its token number ``last``, bool ``[rows]``.

        ``tokens`` is int64 ``[all rows, n]``, ``rows`` and ``last`` int64 ``[rows]``; ``own`` has the stop texts of
        each of all rows.
        """
        over = torch.isin(tokens[rows, last], torch.tensor(self.token_ids, dtype=torch.int64))
        if self.tokenizer is None or not (self.texts or any(own)):
            return over
        stops = [(*self.texts, *own[row]) for row in rows.tolist()]
        places = zip(stops, rows.tolist(), last.tolist(), strict=True)
        newest = [tokens[row, max(0, n + 1 - most_tokens(texts)) : n + 1].numpy() for texts, row, n in places]
        decoded = zip(stops, self.tokenizer.decode_batch(newest), strict=True)
        return over | torch.tensor([any(text in words for text in texts) for texts, words in decoded])
