"""The ``isentrope`` command: one file for each group of subcommands."""
