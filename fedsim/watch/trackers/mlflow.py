"""MLflow: one run per run directory, by default in a folder `mlruns` beside it, where runs can be compared. Needs no server."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim.core import contracts, plugins

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

RUN_TAG, IDENTITY_TAG = "fedsim.run", "fedsim.identity"
STATUS: Mapping[contracts.Outcome, str] = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
LONGEST_PARAM = 6000  # characters, MLflow's limit
MOST_PARAMS = 100  # per request, MLflow's limit


@dataclass(frozen=True)
class Tracker(contracts.Tracker):
    """A run in an experiment of MLflow.

    tracking_uri: a folder, or what MLflow takes (http://..., sqlite:///...; ${oc.env:MLFLOW_TRACKING_URI} for the shell's);
    null: the folder `mlruns` beside the run directory, which `MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri` shows.
    experiment: its name there. tags: of the run, {name: value}.
    A run that is gone on in is the same run there. MLflow's telemetry is off unless MLFLOW_DISABLE_TELEMETRY is set.
    """

    tracking_uri: str | None = None
    experiment: str = "fedsim"
    tags: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        _settings()
        plugins.require("mlflow", "tracker 'mlflow'")

    def open(self, run: contracts.TrackedRun) -> Recording:
        _settings()
        from filelock import FileLock
        from mlflow.tracking import MlflowClient

        uri = str(run.path.parent / "mlruns") if self.tracking_uri is None else self.tracking_uri
        with FileLock(run.path.parent / ".mlflow.lock"):  # runs of a sweep that start at once share one new experiment
            client = MlflowClient(Path(uri).as_uri() if os.path.isabs(uri) else uri)
            found = client.get_experiment_by_name(self.experiment)
            experiment = client.create_experiment(self.experiment) if found is None else found.experiment_id
        known = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{run.id}'", max_results=1)
        if known:
            client.update_run(known[0].info.run_id, status="RUNNING")
            return Recording(client, known[0].info.run_id)
        tags = {**self.tags, RUN_TAG: run.id, IDENTITY_TAG: run.identity}
        created = client.create_run(experiment, run_name=run.name, tags=tags)
        _log_params(client, created, run.options())
        return Recording(client, created.info.run_id)


@dataclass(frozen=True)
class Recording:
    """A run as MLflow has it."""

    client: MlflowClient
    run_id: str

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, [Metric(_name(name), value, now, step) for name, value in values.items()])

    def close(self, outcome: contracts.Outcome) -> None:
        self.client.set_terminated(self.run_id, STATUS[outcome])


def _log_params(client: MlflowClient, run: Run, options: Mapping[str, object]) -> None:
    from mlflow.entities import Param

    params = [Param(_name(name), str(value)[:LONGEST_PARAM]) for name, value in options.items()]
    for start in range(0, len(params), MOST_PARAMS):
        client.log_batch(run.info.run_id, params=params[start : start + MOST_PARAMS])


def _name(name: str) -> str:
    """The characters that MLflow allows in a name."""
    return re.sub(r"[^\w\-. /]", "_", name)


def _settings() -> None:
    """What the environment does not say yet. A folder has to be allowed: a data base, which MLflow prefers, needs more packages.
    The run waits while a server that is gone is tried again: a quarter of a minute, where MLflow itself takes four."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
