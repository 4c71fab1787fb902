"""How a round's jobs are cut into messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedsim.core.messages import ClientJob

MOST = 8  # clients in a message: a bundle's updates are all in a worker's memory at once
PER_WORKER = 4  # bundles, so that nobody waits for long at the end of a round


def bundles(jobs: Sequence[ClientJob], workers: int) -> Iterator[tuple[int, Sequence[ClientJob]]]:
    """(place of the first job, jobs). The size moves no bit: see `sums.PairwiseSum`."""
    size = MOST
    while size > 1 and len(jobs) < size * PER_WORKER * workers:
        size //= 2
    for start in range(0, len(jobs), size):
        yield start, jobs[start : start + size]
