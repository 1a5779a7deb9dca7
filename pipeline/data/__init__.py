"""Prompts: sources, tokenizer, cursor."""


class DataError(ValueError):
    """A tokenizer, prompt file or task cannot be used; the message names what, its value and the remedy."""
