"""`server.keep: tasks`: what was deployed after every task is there, and nothing else is another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.core.config import SimConfig
from fedsim.core.errors import ConfigError, FedsimError
from fedsim.core.events import TensorsKept
from fedsim.core.messages import EvalJob
from fedsim.core.work import seen_classes
from fedsim.finished import OpenedRun
from fedsim.runs.directory import RunDir
from fedsim.simulation import run
from server import checkpoint
from tests.tiny import final_state, learned, plain_vit, same_bits, stopping, tiny

KEEP = "server.keep=tasks"
TASKS = 3


def config(*overrides: str) -> SimConfig:
    return tiny(f"stream.tasks={TASKS}", "server.rounds=1", "server.aggregator=fedavg", *overrides, model=plain_vit())


def kept(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.glob("vectors/*/*.safetensors"))}


def test_a_task_s_model_gives_its_row_of_the_matrix_and_no_number_moves(tmp_path: Path) -> None:
    plain, keeping = (run(config(*words), output=tmp_path / str(len(words))) for words in ((), (KEEP,)))
    assert plain.path is not None and keeping.path is not None
    assert plain.config.identity() == keeping.config.identity(), "what is kept decides no number"
    states = [final_state(r.path, r.config) for r in (plain, keeping)]  # type: ignore[arg-type]
    assert same_bits(*map(learned, states))
    assert not kept(plain.path)
    assert list(kept(keeping.path)) == [f"vectors/task-{t}/deployed.safetensors" for t in range(TASKS)]
    found = OpenedRun(keeping.path)
    for task in range(TASKS):
        deployed, seen = found.deployed_after(task), seen_classes(found.manifest.task_classes, task)
        jobs = [EvalJob(t, 0, len(found.parts.spec.test_of(t)), deployed, seen) for t in range(task + 1)]
        right = [100 * r.correct / r.total for r in map(found.worker.evaluate, jobs)]
        np.testing.assert_array_equal(right, keeping.accuracy[task, : task + 1])
    assert same_bits(dict(found.deployed_after(TASKS - 1)), dict(found.deployed))
    with pytest.raises(
        FedsimError, match=r"did not keep the model that it had after task 1: run it again with server.keep=tasks"
    ):
        OpenedRun(plain.path).deployed_after(1)
    with pytest.raises(ConfigError, match="task 3 is not in the run, which has tasks 0 to 2"):
        found.deployed_after(TASKS)
    (keeping.path / "vectors" / "task-0" / "deployed.safetensors").write_bytes(b"cut")
    with pytest.raises(FedsimError, match=r"deployed\.safetensors is damaged"):
        found.deployed_after(0)


def test_a_run_that_was_stopped_keeps_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(config(KEEP), output=tmp_path / "whole").path
    with monkeypatch.context() as stopped:
        stopped.setattr(checkpoint, "save", stopping(after=3))  # a round and an end of task 0, a round of task 1
        with pytest.raises(KeyboardInterrupt):
            run(config(KEEP), output=tmp_path / "run")
    again = run(resume=tmp_path / "run").path
    assert whole is not None and again is not None
    assert kept(whole) == kept(again)


def test_the_kept_file_holds_the_module_and_the_head_alone(tmp_path: Path) -> None:
    """And tensors that share memory, as a consolidator may give them, are written too."""
    path = run(config(KEEP, "adapter=none", "server.consolidator=mean"), output=tmp_path / "run").path
    assert path is not None
    assert set(OpenedRun(path).deployed_after(0)) == {"head.weight", "head.bias"}
    one = torch.ones(3)
    RunDir.open(path).keep(TensorsKept(0, "deployed", {"a": one, "b": one}))
    assert set(OpenedRun(path).deployed_after(0)) == {"a", "b"}


def test_only_tasks_can_be_kept() -> None:
    with pytest.raises(ConfigError, match=r"server.keep 'rounds' is unknown. .*Choose from: null, tasks"):
        config("server.keep=rounds")
