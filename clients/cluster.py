"""Ray: start it on this machine or join a cluster, and what the cluster has."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fedsim.core.errors import PoolError

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_max_direct_call_object_size", str(1 << 20))  # updates of small modules go in the reply, not the store
os.environ.setdefault("RAY_free_objects_period_milliseconds", "20")  # Ray's second lets a round's sums pile up in the store

import ray

OTHERWISE = "runtime.pool=serial runs without Ray"


def start(address: str | None, cores: int, otherwise: str = OTHERWISE) -> None:
    """Join the cluster at `address`, or start Ray here with so many cores (or as many as there are, if that is more).

    Raises PoolError, which ends with what can be done `otherwise`.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        _knock(address, otherwise)
        try:
            with _signals_kept():
                ray.init(address=address, **quiet)
        except Exception as e:  # somebody is there, and refuses
            advice = "the same versions of Ray and Python? a token, as clusters of Ray >= 2.59 want: set RAY_AUTH_MODE=token"
            raise PoolError(f"cannot join the Ray cluster at '{address}': {last_line(e)} ({advice})") from e
        return
    wanted = max(os.cpu_count() or 1, cores)
    try:
        with _signals_kept():
            # "local": never a cluster that happens to be there
            ray.init(address="local", num_cpus=wanted, include_dashboard=False, **quiet)
    except Exception as e:
        raise PoolError(f"Ray does not start: {last_line(e)} ({otherwise})") from e


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray sets a handler of SIGTERM that aborts the process with a stack trace; what was there before stays."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def resources() -> dict[str, float]:
    """What the cluster has: {"CPU": 2.0, "GPU": ..., ...}."""
    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]


def free() -> dict[str, float]:
    """What of it nobody has reserved now."""
    return dict(ray.available_resources())  # type: ignore[no-untyped-call]


def room(needs: Mapping[str, float], *places: Mapping[str, float]) -> int:
    """How many that need this (each all of it in one place) these places have room for; some of the needs are above 0."""
    fits = [min(there.get(name, 0.0) / amount for name, amount in needs.items() if amount) for there in places]
    return sum(int(times + 1e-9) for times in fits)


def machines() -> list[dict[str, float]]:
    """What each machine of the cluster has."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def last_line(error: BaseException) -> str:
    """One line that says what an error of Ray is about."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def _knock(address: str, otherwise: str) -> None:
    """Ray itself waits for minutes before it says that nobody is at an address."""
    host, _, port = address.partition("://")[-1].rpartition(":") if "://" in address else address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as e:
            raise PoolError(f"no Ray cluster at '{address}': {last_line(e)} ({otherwise})") from e
