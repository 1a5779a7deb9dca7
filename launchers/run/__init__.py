"""Wires a run: concrete classes, Ray actors and where they are placed."""
