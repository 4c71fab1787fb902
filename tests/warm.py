"""A Ray pool whose worker processes serve one pool after the other: starting one takes longer than a tiny run."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import ray

from clients.pools import ray as ray_pool

PATIENCE_S = 60.0  # for what a worker still does of a run that was broken off

idle: list[Any] = []  # actors


class Pool(ray_pool.Pool):
    """Every pool's workers are made anew, in processes that are there already."""

    def _new_slot(self) -> Any:
        if self._needs != {"CPU": 1.0, "GPU": 0.0} or not idle:
            return super()._new_slot()
        actor = idle.pop()
        actor.__ray_call__.remote(_renewal(), self.worker, [self._spec_ref])
        return ray_pool._Slot(actor, actor.pid.remote(), actor.load.remote())

    def close(self) -> None:
        for slot in [slot for slot in self._slots if self._needs == {"CPU": 1.0, "GPU": 0.0}]:
            with suppress(ray.exceptions.RayError):  # one that has died is none that can serve again
                ray.get(slot.actor.pid.remote(), timeout=PATIENCE_S)
                self._slots.remove(slot)
                idle.append(slot.actor)
        super().close()


def end() -> None:
    """No more workers that wait."""
    while idle:
        ray.kill(idle.pop())


def _renewal() -> Any:
    """Made in a function so that it travels by value."""

    def renew(actor: Any, worker: str, spec_ref: list[Any]) -> None:
        actor.named, actor.spec_ref, actor.worker, actor.broadcast = worker, spec_ref, None, (0, None, None)

    return renew
