"""Rollout engines behind one protocol, and the weight sync that feeds them."""
