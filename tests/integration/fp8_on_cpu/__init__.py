"""SGLang's FP8 linear layers on a CPU without AMX: its own parameters, loaders and updates, but plain arithmetic for
its kernels.

The server imports this package because ``SGLANG_EXTERNAL_MODEL_PACKAGE`` names it.
"""

import torch
from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod

from pipeline.model.fp8 import dequantise


def _apply(self, layer, x, bias=None):
    weight = dequantise(layer.weight, layer.weight_scale_inv, dtype=x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


Fp8LinearMethod.process_weights_after_loading = lambda self, layer: None
Fp8LinearMethod.apply = _apply
