"""A run's directory and results, and what is made of many: one frame, statistics over seeds, tables."""
