"""Verifiers: from a response to a reward in [0, 1]."""
