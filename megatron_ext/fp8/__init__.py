"""FP8 in the learner: quantisers in torch, their emulation in a model's linear layers, Transformer Engine's own.

``blocks`` (walking a matrix in blocks) -> ``quantise`` (one rounding rule per recipe) -> ``emulate``; beside them ``transformer_engine``, what
is asked of it and when that is refused. ``weights.fp8``, the checkpoints' rule, stands on ``blocks`` too.
"""
