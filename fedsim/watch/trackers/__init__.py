"""Where a run's numbers are shown beside its run directory: one tool per file, each an extra of the same name."""
