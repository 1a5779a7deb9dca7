"""What the loop draws with where a run has an environment: every request is played as episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.rollout.engine import Finished
from pipeline.rollout.episodes import Episodes, Stream
from pipeline.rollout.rollouts import Rollouts
from pipeline.types import GenerateRequest


class EpisodeRollouts(Rollouts):
    """``Rollouts`` whose requests are episodes; what it draws itself are their turns."""

    def __init__(self, *given: Any, episodes: Callable[[Stream], Episodes], **more: Any) -> None:
        """``episodes``: makes what plays them, from what draws single answers. The rest is as of ``Rollouts``."""
        super().__init__(*given, **more)
        self._episodes = episodes(super().stream)

    def stream(self, requests: Sequence[GenerateRequest]) -> Iterator[Finished]:
        """Every group as its episodes end."""
        return self._episodes.stream(requests)

    def close(self) -> None:
        """End what plays. Idempotent."""
        self._episodes.close()
