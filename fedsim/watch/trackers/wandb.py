"""Weights & Biases. Offline unless told otherwise: `wandb sync <run directory>/wandb/offline-run-*` uploads it later."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedsim.core import contracts, plugins
from fedsim.core.errors import require_choice

if TYPE_CHECKING:
    import wandb

MODES = ("offline", "online", "disabled")
EXIT_CODES: Mapping[contracts.Outcome, int] = {"finished": 0, "failed": 1, "interrupted": 255}  # 255: what wandb gives a Ctrl-C


@dataclass(frozen=True)
class Tracker(contracts.Tracker):
    """A run in a project of Weights & Biases.

    mode: offline (files only, no network) | online | disabled. dir: where its folder `wandb` lies; null: the run directory.
    project, entity, group, tags: as there.
    A run that is gone on in is the same run there; offline it has one folder per part, which `wandb sync` puts together.
    The settings of the tool itself (WANDB_API_KEY, WANDB_BASE_URL, ...) hold; its error reports are off unless
    WANDB_ERROR_REPORTING is set.
    """

    mode: str = "offline"
    project: str = "fedsim"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    dir: str | None = None

    def __post_init__(self) -> None:
        require_choice("mode", self.mode, MODES)

    def check(self) -> None:
        _no_error_reports()
        plugins.require("wandb", "tracker 'wandb'")

    def open(self, run: contracts.TrackedRun) -> Recording:
        _no_error_reports()
        import wandb

        folder = self.dir or str(run.path)
        os.makedirs(folder, exist_ok=True)  # else it writes to the system's folder for temporary files
        opened = wandb.init(
            mode=self.mode,  # type: ignore[arg-type]
            project=self.project,
            entity=self.entity,
            group=self.group,
            tags=self.tags,
            dir=folder,
            name=run.name,
            id=run.id,
            resume="allow",
            config=dict(run.config) | {"identity": run.identity},
            allow_val_change=True,  # a run may go on elsewhere, with other workers
            # a run of the caller's own stays as it is; the terminal belongs to the run; online it says where to look
            settings=wandb.Settings(reinit="create_new", console="off", silent=self.mode != "online"),
        )
        opened.define_metric("*", step_metric="round")
        return Recording(opened)


@dataclass(frozen=True)
class Recording:
    """A run as wandb has it; `round` is the x axis, so that its own step may count on."""

    run: wandb.Run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"round": step, **values})

    def close(self, outcome: contracts.Outcome) -> None:
        self.run.finish(exit_code=EXIT_CODES[outcome])


def _no_error_reports() -> None:
    """Without this an offline run still looks up a host, to report errors to. Read when wandb is imported and when it starts."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
