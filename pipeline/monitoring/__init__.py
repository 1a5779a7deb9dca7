"""Everything that shows how a run goes: event log, progress, alerts, sinks, reports, web page."""
