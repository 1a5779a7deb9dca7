"""pass@k and friends on held-out prompts."""
