"""How many workers this machine can hold, each of them a process with torch and the model of its own."""

from __future__ import annotations

from fedsim.core import hardware
from fedsim.core.errors import PoolError
from fedsim.core.work import WorkSpec

PROCESS = 350e6  # bytes that Python, torch and Ray take of a worker alone (measured: 330 MB beside what processes share)
CROWD = 4  # threads per core from which on they only stand in each other's way: starting them alone takes minutes


def by_memory(spec: WorkSpec) -> int:
    """As many as free memory holds, one at least. The data are shared, and what training itself takes is not counted."""
    free = hardware.free_memory()
    return max(1, int(free / _bytes_each(spec))) if free else 10**6


def require_room(spec: WorkSpec, workers: int) -> None:
    """Raise PoolError, before any process is started, for more workers than this machine can hold."""
    threads, cores, free = spec.config.runtime.threads, hardware.cores(), hardware.free_memory()
    most = min(by_memory(spec), max(1, CROWD * cores // threads))
    if workers > most:
        need = f"{workers * threads} cores and at least {workers * _bytes_each(spec) / 1e9:.1f} GB"
        there = f"{cores} core{'s' * (cores > 1)}" + (f" and {free / 1e9:.1f} GB free" if free else "")
        raise PoolError(
            f"runtime.workers={workers} would need {need}, and this machine has {there}: set it to auto, or to {most} at most"
        )


def _bytes_each(spec: WorkSpec) -> float:
    on_cpu = spec.config.runtime.device == "cpu"
    return PROCESS + (spec.weights if on_cpu else 0)
