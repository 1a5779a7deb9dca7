"""What a model answers: one file each, see ``pipeline.rollout.environment`` for the contract."""
