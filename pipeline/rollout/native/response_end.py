"""When a response is over: at a token that ends it, or where its text holds a stop text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class ResponseEnd:
    """What ends responses. ``texts`` need a ``tokenizer``."""

    token_ids: tuple[int, ...]
    texts: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None

    @property
    def _window(self) -> int:
        """Newest tokens of a response in which a stop text would be found.

        A text of n characters has at most 4 n bytes, hence tokens; one more, for some tokenizers strip the first blank.
        """
        return 4 * max(map(len, self.texts)) + 1 if self.texts else 1

    def reached(self, tokens: torch.Tensor, rows: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Whether each of ``rows`` of ``tokens`` ends with its token number ``last``, bool ``[rows]``.

        ``tokens`` is int64 ``[all rows, n]``, ``rows`` and ``last`` int64 ``[rows]``.
        """
        over = torch.isin(tokens[rows, last], torch.tensor(self.token_ids, dtype=torch.int64))
        if self.tokenizer is None:
            return over
        places = zip(rows.tolist(), last.tolist(), strict=True)
        newest = [tokens[row, max(0, n + 1 - self._window) : n + 1].numpy() for row, n in places]
        decoded = self.tokenizer.decode_batch(newest)
        return over | torch.tensor([any(text in words for text in self.texts) for words in decoded])
