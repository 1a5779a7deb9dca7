"""Wires a run: picks the concrete classes, starts the Ray actors and places them on nodes."""
