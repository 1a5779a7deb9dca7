"""The top floor: command line, wiring, Ray actors."""
