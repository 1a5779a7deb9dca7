"""The configuration of a run: typed, strict, and composed from files and overrides."""
