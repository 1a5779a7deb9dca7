"""Keeps a run alive, on Slurm or not: attempts, stalls, stacks, signals and the monitoring process beside it."""
