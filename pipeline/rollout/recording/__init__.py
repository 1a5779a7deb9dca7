"""Records episodes: a client talks in OpenAI's format, and the exact token ids of what was said are kept."""
