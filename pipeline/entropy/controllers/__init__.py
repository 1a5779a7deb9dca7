"""The controllers, one file each.

Of every file: ``MADE_FOR``, the actuators whose commands it can set; ``build(config, actuator)``, its ``Loop`` or
``Hold`` from a checked ``entropy`` section; and, where the table has one, its ``METHOD``. The files import no torch.
"""
