"""Keeps a run alive, on Slurm or not: new attempts, stall detection, stack traces, signals, monitoring process."""
