"""The isentrope command."""
