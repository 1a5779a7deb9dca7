"""Cuts the rows of a step into mini-batches and micro-batches, and deals them to data-parallel ranks."""
