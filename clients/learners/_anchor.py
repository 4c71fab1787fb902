"""A pull towards what the last task ended with, the stronger the more a number mattered: what EWC and SI have in common."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.core.contracts import OWN, ClientWork, Context, LocalState
from fedsim.core.messages import Tensors
from fedsim.core.tensors import without_prefix

IMPORTANCE = "importance/"
NEEDS: Mapping[str, str] = {
    "one module goes on": "holds every number near where the last task left it, but {consolidator} starts a task with another "
    "module: use consolidator: none"
}


def told(anchor: Tensors, importance: Tensors) -> Tensors:
    """What clients are told: the importance, and the anchor under the tensors' own names: it is what the task began with, which a
    client of its first round has already."""
    return {**{n: anchor[n] for n in importance}, **{IMPORTANCE + n: t.float() for n, t in importance.items()}}


def begin(work: ClientWork, context: Context) -> LocalState:
    """Anchor and importance of the tensors that are trained; none in a first task."""
    importance = without_prefix(context[OWN], IMPORTANCE)
    return {"importance": {n: importance[n] for n in work.trained if n in importance}, "anchor": context[OWN]}


def penalty(state: LocalState, params: Tensors) -> Tensor | None:
    """Σ F (θ − θ*)² over all numbers of the tensors that have an importance F; None where there are none."""
    terms = [(f * (params[n] - state["anchor"][n]).square()).sum() for n, f in state["importance"].items()]
    return torch.stack(terms).sum() if terms else None


def pull(state: LocalState, name: str, value: Tensor) -> Tensor | float:
    """Its gradient by one tensor, 2 F (θ − θ*)."""
    importance: Mapping[str, Tensor] = state["importance"]
    return 2 * importance[name] * (value - state["anchor"][name]) if name in importance else 0.0
