"""Event log, progress, reports."""
