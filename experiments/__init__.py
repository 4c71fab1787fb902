"""Studies run with fedsim: one folder each; nothing imports this package."""
