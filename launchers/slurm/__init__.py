"""Runs as Slurm jobs, submitted through nemo-run."""
