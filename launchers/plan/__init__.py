"""Predicts what a run costs, from its configuration alone: bytes per GPU, operations, seconds.

No megatron, no torch here.

Parameters follow from the layout table (``pipeline.model.layout.rows``), activations from what each layer keeps for its
backward pass (``activations``), how many micro-batches are under way from the pipeline schedule (``schedule``).
"""
