"""Prompts: sources, tokenizer, cursor."""
