"""FP8 in the learner: quantisers in torch, their emulation in a model's linear layers, Transformer Engine's own.

``quantise`` (one rounding rule per recipe, over ``pipeline.model.blocks``) -> ``emulate``; beside them
``transformer_engine``, what is asked of Transformer Engine and when it is refused. ``weights.fp8`` is the checkpoints'
rule.
"""
