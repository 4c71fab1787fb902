"""Plug-ins that repair the head after a round: one per file, the file name is the name."""
