"""Typed, strict, composed configuration."""
