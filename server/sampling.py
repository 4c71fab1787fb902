"""Who takes part in a round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedsim.core import rng
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


def draw(seed: int, task: int, round: int, num_clients: int, participation: float) -> list[int]:
    """Client ids of a round, ascending: drawn afresh every round, uniformly without replacement."""
    count = num_sampled(num_clients, participation)
    if count == num_clients:
        return list(range(num_clients))
    drawn = rng.stream(seed, "participants", task, round).choice(num_clients, count, replace=False, shuffle=False)
    return sorted(int(c) for c in drawn)


def longest_first(clients: Sequence[int], sizes: IntArray) -> list[int]:
    """The clients by the samples that they hold, most first, then by id: the last to finish are short, and nobody waits long.

    sizes: samples of every registered client. The order is a part of the bits of a sum, so it knows nothing of workers.
    """
    chosen = np.asarray(clients)
    return [int(c) for c in chosen[np.lexsort((chosen, -sizes[chosen]))]]
