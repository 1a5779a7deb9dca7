"""The verifiers, one file each: a prompt's ``verifier`` names one (``pipeline.registry``)."""
