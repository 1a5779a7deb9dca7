"""What one step draws and trains on."""
