"""How many workers this machine can hold, each of them a process with torch and the model of its own."""

from __future__ import annotations

from fedsim.core import hardware
from fedsim.core.contracts import WorkSpec
from fedsim.core.errors import PoolError

PROCESS = 350e6  # bytes that Python, torch and Ray take of a worker alone (measured: 330 MB beside what processes share)
CROWD = 4  # threads per core from which on they only stand in each other's way: starting them alone takes minutes


def by_memory(spec: WorkSpec) -> int:
    """As many as free memory holds, one at least. The data are shared, and what training itself takes is not counted."""
    free = hardware.free_memory()
    return max(1, int(free / _bytes_each(spec))) if free else 10**6


def require_room(spec: WorkSpec, workers: int) -> None:
    """Raise PoolError, before any process is started, for more workers than this machine can hold."""
    threads, cores, most = spec.config.runtime.threads, hardware.cores(), by_memory(spec)
    fits = min(most, max(1, CROWD * cores // threads))
    if workers > max(1, fits):
        free = hardware.free_memory()
        memory = f"{free / 1e9:.1f} GB free" if free else "memory unknown"
        raise PoolError(
            f"runtime.workers={workers} of {threads} thread{'s' * (threads > 1)} would take {workers * threads} cores and at least "
            f"{workers * _bytes_each(spec) / 1e9:.1f} GB, and this machine has {cores} cores and {memory}: "
            f"set it to auto, or to {max(1, min(most, cores // threads))} (at most {fits})"
        )


def _bytes_each(spec: WorkSpec) -> float:
    on_cpu = spec.config.runtime.device == "cpu"
    return PROCESS + (spec.weights if on_cpu else 0)
