"""A run while it goes on: the live line, and the trackers that it is shown in."""
