"""Measures a policy on held-out prompts and public benchmarks: pass@k, maj@k, distinct correct answers."""
