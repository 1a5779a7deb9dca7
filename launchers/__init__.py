"""The top layer: command line, wiring of a run, Ray actors, supervision, Slurm, and plans of what a run costs."""
