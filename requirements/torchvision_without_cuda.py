"""Lets `import torchvision` work beside a torch without CUDA; `make` copies it into such an environment.

SGLang needs torchvision, PyPI's is a CUDA build, and its compiled library does not load there. Its
``_meta_registrations.py`` registers fake kernels for the operators ``nms`` and ``qnms`` all the same, which
only that library declares: the import fails, and with it transformers' import of nearly every model. The
file torchvision_without_cuda.pth has every Python of the environment import this module, which declares the two.
Versions: torchvision 0.28.0 with torch 2.13.0+cpu. Can go when PyPI's torchvision can be imported there.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing itself, but sees when torchvision is about to need the operators."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> None:
        """Declare those that are missing: torchvision has tried to load its library by now."""
        if name != "torchvision._meta_registrations":
            return
        sys.meta_path.remove(self)
        import torch

        for operator in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, operator):
                torch.library.define(
                    f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


sys.meta_path.insert(0, DeclareOperators())
