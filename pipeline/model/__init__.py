"""What a model is, read once from its Hugging Face folder: architecture, layout, rank grid, files, FP8 blocks."""
