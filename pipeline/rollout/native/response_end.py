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
    def window(self) -> int:
        """Newest tokens of a response that ``reached`` must see.

        A text of n characters has at most 4 n bytes, hence tokens; one more, for some tokenizers strip the first blank.
        """
        return 4 * max(map(len, self.texts)) + 1 if self.texts else 1

    def reached(self, newest: torch.Tensor) -> torch.Tensor:
        """Whether each response ends with its newest token, bool ``[rows]``.

        ``newest`` is int64 ``[rows, n]``: the last ``window`` tokens of each, fewer where there are no more.
        """
        over = torch.isin(newest[:, -1], torch.tensor(self.token_ids, dtype=torch.int64))
        if self.tokenizer is None:
            return over
        decoded = self.tokenizer.decode_batch(list(newest.numpy()))
        return over | torch.tensor([any(text in words for text in self.texts) for words in decoded])
