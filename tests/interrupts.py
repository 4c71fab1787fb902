"""Ctrl-C for the processes that a test starts."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heard_by_children() -> Iterator[None]:
    """What is started meanwhile hears Ctrl-C. A job in the background is deaf to it, as its children are."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
