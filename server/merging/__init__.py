"""Plug-ins: one per file, the file name is the name. Pure maths: they know no clients and no tasks."""
