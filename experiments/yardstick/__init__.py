"""fedsim beside an independent plain loop."""
