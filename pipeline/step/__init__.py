"""What one step draws and trains on: requests, samples, what waits for later steps, and the rows of the update."""
