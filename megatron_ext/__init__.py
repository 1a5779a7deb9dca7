"""Everything that touches megatron-core: topology, models, log-probs, learner, weights."""
