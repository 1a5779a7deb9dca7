"""The native engine: a PyTorch decoder with a key-value cache in this process."""
