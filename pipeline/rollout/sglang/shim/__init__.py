"""A folder for PYTHONPATH of the SGLang server process on CPU; see ``pipeline.rollout.sglang.cpu`` for what and why."""
