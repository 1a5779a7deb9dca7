"""Alerts: rules as small files (configs/alerts/), watched over the events of a run as they come."""
