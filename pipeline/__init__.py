"""What a training step is, on no particular hardware."""
