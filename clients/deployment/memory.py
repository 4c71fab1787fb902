"""What a node's client remembers from round to round. It stays in a folder on the node; the server keeps a receipt for it.

The receipt lies in the run's store in the place of the memory, and is committed and taken back with it. So a server that took an
update for lost, or was killed and does a round again, finds the memory that it knows of: a memory is deleted only once a job of a
later round has asked for another one.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedsim.core.errors import ClientFailed
from fedsim.core.files import storage_errors, write_atomic
from fedsim.core.messages import POSITIONS, RECEIPT, ClientJob, ClientUpdate, Tensors

STAGE = "memory"


class NodeMemory:
    """Memories of one client in one run, a file each: `<task>.<round>.<number>.safetensors`, by the job that made them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def given(self, job: ClientJob) -> ClientJob:
        """The job with the memory that its receipt stands for. Raises ClientFailed when that is not here, or damaged."""
        if RECEIPT not in job.memory:
            return job
        number = int(job.memory[RECEIPT][0])
        files = dict(self._files())
        path = next((p for p, key in files.items() if key[2] == number), None)
        if path is None:
            why = f"what this client remembers is not in {self.folder}: join with the --memory folder of the node that had it"
            raise ClientFailed(job.client_id, job.task, job.round, STAGE, why)
        try:
            memory = load(path.read_bytes())
        except (OSError, SafetensorError) as e:
            raise ClientFailed(job.client_id, job.task, job.round, STAGE, f"{path} cannot be read: {e}") from e
        for old, (task, round, _) in files.items():
            if old != path and (task, round) < (job.task, job.round):
                old.unlink(missing_ok=True)
        return replace(job, memory=dict(sorted(memory.items())))

    def kept(self, job: ClientJob, update: ClientUpdate) -> ClientUpdate:
        """The update with a receipt for what the client remembers from now on. Raises StorageError when it cannot be written."""
        if update.memory is None or not (job.plan.review or (job.plan.train and update.num_samples)):
            return replace(update, memory=None)
        if not update.memory:
            return update
        number = secrets.randbits(62)
        path = self.folder / f"{job.task}.{job.round}.{number}.safetensors"
        with storage_errors(path):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save({name: t.detach().cpu().contiguous() for name, t in update.memory.items()}))
        return replace(update, memory=receipt(number, update.memory))

    def forget(self) -> None:
        """Delete all of it: the run is over."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> Iterator[tuple[Path, tuple[int, int, int]]]:
        for path in self.folder.glob("*.*.*.safetensors"):
            task, round, number, _ = path.name.split(".")
            yield path, (int(task), int(round), int(number))


def receipt(number: int, memory: Tensors) -> dict[str, Tensor]:
    """What the server keeps for a memory that stays here."""
    positions = sum(t.numel() for n, t in memory.items() if n.endswith(POSITIONS))
    other = sum(t.nbytes for n, t in memory.items() if not n.endswith(POSITIONS))
    return {RECEIPT: torch.tensor([number, other, positions])}
