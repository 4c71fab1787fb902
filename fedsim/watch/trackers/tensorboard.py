"""TensorBoard: event files in the run directory. `tensorboard --logdir runs` shows all runs, side by side."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.core import contracts, plugins
from fedsim.runs import metrics


@dataclass(frozen=True)
class Tracker(contracts.Tracker):
    """Event files in <run directory>/tensorboard, or in <dir>/<name of the run directory>; the config is in the HPARAMS tab.

    dir: where event files go; null: the run directory.
    Values are float32 there.
    """

    dir: str | None = None

    def check(self) -> None:
        plugins.require("tensorboard", "tracker 'tensorboard'")

    def open(self, run: contracts.TrackedRun) -> Recording:
        folder = run.path / "tensorboard" if self.dir is None else Path(self.dir) / run.name
        folder.mkdir(parents=True, exist_ok=True)
        return Recording(folder, run)


class Recording:
    """An event file. A run that is gone on in begins another one in the same folder, which TensorBoard reads as one run.

    Written here and now: the writers that come with TensorBoard and torch do it in a thread, where a full disk goes unheard.
    """

    def __init__(self, folder: Path, run: contracts.TrackedRun) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
        from torch.utils.tensorboard.summary import hparams

        new = not any(folder.glob("events.out.tfevents.*"))
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._writer: Any = RecordWriter(open(folder / name, "wb"))  # noqa: SIM115 (`close` does)
        self._write(file_version="brain.Event:2")
        compared = {f"metrics/{m.name}": 0.0 for m in metrics.shown("run")}  # only the names count
        experiment, start, self._end = hparams(run.options(), compared)  # type: ignore[no-untyped-call]
        for summary in (experiment, start) if new else ():
            self._write(summary=summary)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(summary=Summary(value=scalars), step=step)

    def close(self, outcome: contracts.Outcome) -> None:
        try:
            if outcome == "finished":
                self._write(summary=self._end)
        finally:
            self._writer.close()

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]

        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()
