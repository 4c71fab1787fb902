"""Who takes part in a round."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from fedsim.core import rng
from fedsim.core.config import SimConfig
from fedsim.core.contracts import IntArray
from fedsim.core.errors import ConfigError


def num_sampled(num_clients: int, participation: float) -> int:
    """round(participation × clients). Raises ConfigError when that is nobody."""
    count = round(participation * num_clients)
    if count < 1:
        raise ConfigError(
            f"server.participation {participation} of {num_clients} clients selects nobody: "
            f"it must be at least {1 / num_clients:g}"
        )
    return count


def draw(seed: int, task: int, round: int, num_clients: int, participation: float, without: Collection[int] = ()) -> list[int]:
    """Client ids of a round, ascending: drawn afresh every round, uniformly without replacement; those who never take part
    (`without`) are left out of what was drawn, so that all others take part when they would have anyway.

    Raises ConfigError when that leaves nobody.
    """
    count = num_sampled(num_clients, participation)
    if count == num_clients:
        drawn = list(range(num_clients))
    else:
        chosen = rng.stream(seed, "participants", task, round).choice(num_clients, count, replace=False, shuffle=False)
        drawn = sorted(int(c) for c in chosen)
    left = [c for c in drawn if c not in without]
    if not left:
        raise ConfigError(
            f"task {task}, round {round}: server.without leaves nobody of the clients that were drawn: raise server.participation"
        )
    return left


def taking_part(config: SimConfig, task: int, round: int, num_clients: int, in_pass: bool = False) -> list[int]:
    """Client ids of a round, or of a pass for statistics at a task's start (round 0) or end (the number of rounds), ascending:
    drawn with `server.participation`, in a pass all where `server.pass_participation` says so; never those of `server.without`.
    """
    server = config.server
    share = 1.0 if in_pass and server.pass_participation == "all" else server.participation
    return draw(config.seed, task, round, num_clients, share, server.without)


def longest_first(clients: Sequence[int], sizes: IntArray) -> list[int]:
    """The clients by the samples that they hold, most first, then by id: the last to finish are short, and nobody waits long.

    sizes: samples of every registered client. The order is a part of the bits of a sum, so it knows nothing of workers.
    """
    chosen = np.asarray(clients)
    return [int(c) for c in chosen[np.lexsort((chosen, -sizes[chosen]))]]
