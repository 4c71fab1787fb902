"""What becomes of the head between the merge of a round and its evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedsim.core import rng
from fedsim.core.messages import ClientUpdate, State, Tensors
from fedsim.core.tensors import with_prefix
from server.evaluation import seen_classes
from server.state import ServerState, Simulation


def calibrate(sim: Simulation, state: ServerState, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
    """The calibrator's new state, and the merged parameters with the head that it repaired."""
    assert sim.calibrator is not None
    draw = rng.torch_stream(sim.config.seed, "calibrate", state.task, state.round)
    seen = seen_classes(sim.task_classes, state.task)
    return sim.calibrator.calibrate(state.calibrator, params, updates, sim.task_classes[state.task], seen, draw)


def old_rows_restored(sim: Simulation, state: ServerState, params: Tensors) -> Tensors:
    """The parameters with the head's rows of old tasks' classes as they were before the round, bit for bit: weight decay and
    rounding move them, even if nobody trains them. As they are, unless the consolidator freezes heads."""
    current = set(sim.task_classes[state.task])
    rows = [c for c in seen_classes(sim.task_classes, state.task) if c not in current]
    if not sim.consolidator.freezes_heads or not rows:
        return params
    place = torch.tensor(rows)
    old = with_prefix(state.params, "head.")
    return {n: t.index_copy(0, place, old[n][place]) if n in old else t for n, t in params.items()}
