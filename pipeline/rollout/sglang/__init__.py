"""An engine that launches, feeds and supervises an SGLang server."""
