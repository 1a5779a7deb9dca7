"""Python imports this at start-up because its folder is on PYTHONPATH. Shim 1 of ``pipeline.rollout.sglang.cpu``."""

import importlib.abc
import sys


class _DeclareOpsFirst(importlib.abc.MetaPathFinder):
    """Declares torchvision's operators at the moment torchvision is first imported, then steps aside."""

    def find_spec(self, name, path, target=None):  # type: ignore[no-untyped-def]
        """Never finds anything itself."""
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in ("nms", "qnms"):
                torch.library.define(
                    f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


sys.meta_path.insert(0, _DeclareOpsFirst())
