"""The actuators, one file each: ``ACTUATOR``, and its ``METHOD`` for the table.

The files import no torch. ``pipeline.objectives`` applies the commands to the loss.
"""
