"""Surrogate losses of the policy, one file each: ``objective.loss`` names one (``pipeline.registry``)."""
