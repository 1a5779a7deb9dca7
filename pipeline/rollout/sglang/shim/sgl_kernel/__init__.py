"""The shim of ``pipeline.rollout.sglang.cpu``: names that SGLang imports but never calls on CPU. Calling one raises."""

from collections.abc import Callable
from typing import Any, NoReturn


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU build; this call needs a GPU")

    missing.__name__ = name
    return missing
