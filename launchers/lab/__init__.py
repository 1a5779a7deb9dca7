"""The entropy laboratory: methods side by side, on the same task, the same data and the same budget."""
