"""An engine in this process: a PyTorch decoder with a key-value cache."""
