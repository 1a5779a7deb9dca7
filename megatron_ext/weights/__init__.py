"""From Hugging Face tensors to Megatron shards and back."""
