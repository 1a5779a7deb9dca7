"""Advantages and weights of single tokens, one file each: ``objective.token_shaping`` names them
(``pipeline.registry``).
"""
