"""Heads: one file each, named like the plug-in."""
