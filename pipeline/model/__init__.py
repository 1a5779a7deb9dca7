"""What a model is, read once from its Hugging Face folder: architecture, parameter layout, rank grid, files and FP8 blocks."""
