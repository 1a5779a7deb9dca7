"""Rollout engines behind one protocol, and weight sync to them."""
