"""From the rewards of a step to advantages, one file each: ``objective.advantage`` names one
(``pipeline.registry``).
"""
