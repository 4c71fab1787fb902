"""Clients removed from a finished run: `finished` opens it, `remove` takes them out, `measure` says how well that went."""
