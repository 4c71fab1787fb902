"""What a round cost: bytes by direction and kind of object, and the clients' loss."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from fedsim.core.messages import ClientJob, ClientUpdate, bytes_down, bytes_up


def add_traffic(
    before: Mapping[str, Mapping[str, int]],
    jobs: Sequence[ClientJob],
    updates: Sequence[ClientUpdate],
    holders: Collection[int] = (),
) -> tuple[dict[str, dict[str, int]], tuple[int, ...]]:
    """The running totals plus one round's messages, and the clients that now hold this task's background.

    Down is counted per receiving client. The background changes only between tasks, so it is counted once per client and
    task: what a deployment sends, not what a simulator without client state copies.
    """
    total = {direction: dict(before.get(direction, {})) for direction in ("down", "up")}
    new = [job.client_id for job in jobs if job.plan.background and job.client_id not in set(holders)]
    if jobs:  # every client of a round receives the same
        for kind, count in bytes_down(jobs[0]).items():
            receivers = len(new) if kind == "background" else len(jobs)
            total["down"][kind] = total["down"].get(kind, 0) + count * receivers
    for update in updates:
        for kind, count in bytes_up(update).items():
            total["up"][kind] = total["up"].get(kind, 0) + count
    return total, (*holders, *new)


def mean_loss(updates: Sequence[ClientUpdate]) -> float:
    """Mean over clients, weighted by samples, of their last epoch's loss; NaN if nobody trained."""
    pairs = [(u.metrics["loss"], u.num_samples) for u in updates if "loss" in u.metrics]
    weight = sum(n for _, n in pairs)
    return sum(loss * n for loss, n in pairs) / weight if weight else math.nan
