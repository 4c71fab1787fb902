"""A step of training for tests of learners, from its parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fedsim.core.contracts import Step


def step_of(**known: Any) -> Step:
    """A step of which a learner sees these parts; the others are empty. All rows are the client's own."""
    rows = len(known.get("labels", torch.zeros(0)))
    empty: dict[str, Any] = {
        "inputs": {}, "positions": np.arange(rows), "labels": torch.zeros(0), "features": torch.zeros(rows, 1),
        "logits": torch.zeros(rows, 2), "params": {}, "start": {}, "classes": (0, 1), "seen": known.get("classes", (0, 1)),
        "own": slice(0, rows), "rehearsed": slice(rows, rows), "replayed": slice(rows, rows), "again": slice(rows, rows),
        "synthetic": slice(rows, rows),
        "draw": torch.Generator(), "model": None, "head": None, "outputs": None,
    }  # fmt: skip
    return Step(**empty | known)
