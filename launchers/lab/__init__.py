"""The entropy laboratory: compares methods on the same task, data and budget."""
