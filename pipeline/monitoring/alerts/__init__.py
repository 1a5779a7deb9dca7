"""Alerts: rules in small files (configs/alerts/) that are checked on every event of a run."""
