"""How a round's jobs are cut into messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedsim.core.messages import ClientJob
from fedsim.core.sums import BLOCK

PER_WORKER = 2  # blocks at least: with fewer, clients go one by one, so that nobody waits for long at a round's end
MANY = 1000  # clients from which on messages for each of them would keep the driver busier than the workers


def bundles(jobs: Sequence[ClientJob], workers: int, fused: bool) -> Iterator[tuple[int, Sequence[ClientJob]]]:
    """(place of the first job, jobs): blocks that are summed as one, or single clients.

    The choice moves no bit, unless clients are `fused`: who is trained together does, so then it knows nothing of workers.
    """
    size = BLOCK if fused or len(jobs) >= min(BLOCK * PER_WORKER * workers, MANY) else 1
    for start in range(0, len(jobs), size):
        yield start, jobs[start : start + size]
