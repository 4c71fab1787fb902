"""`fedsim.sweep` and `fedsim.tune`: from Python what the commands do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import fedsim
from fedsim.core.errors import ConfigError, RunDirError
from fedsim.runs.tables import to_csv
from fedsim.sweeps import job, launch
from fedsim.sweeps.launch import Begun, Ended
from fedsim.sweeps.plan import PlannedRun, SweepPlan
from tests.tiny import TINY, plain_vit, tiny

FAST = ("stream.tasks=1", "server.rounds=1", "data.classes=3")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the runs that are made; here, in place of Ray."""
    labels: list[str] = []

    def execute(plan: SweepPlan, runs: Sequence[PlannedRun]) -> Iterator[Any]:
        for run in runs:
            labels.append(run.label)
            yield Begun(run, 1)
            yield Ended(run, job.perform(run.config, plan.folder, run.entry, 1), 1)

    monkeypatch.setattr(launch, "execute", execute)
    return labels


def test_a_config_over_axes_is_what_the_same_yaml_gives(tmp_path: Path, made: list[str]) -> None:
    base = tiny(*FAST, model=plain_vit())
    axes: dict[str, Any] = {"grid": {"partition.alpha": [0.5, 5.0]}, "seeds": [3]}
    runs = fedsim.sweep(base=base, **axes, name="alphas", output=tmp_path)
    assert len(made) == 2 and len(runs.runs) == 2 and not runs.absent
    assert runs.sweep is not None and runs.sweep.name == "alphas"
    frame = runs.frame()
    assert sorted(zip(frame["partition.alpha"], frame["seed"], strict=True)) == [(0.5, 3), (5, 3)]
    (tmp_path / "alphas.yaml").write_text(json.dumps({"base": base.to_dict(), **axes}))
    assert set(fedsim.sweep(tmp_path / "alphas.yaml", output=tmp_path).frame()["run"]) == set(frame["run"])
    assert len(made) == 2, "what is there is not made again"


def test_runs_of_a_table_are_not_made_again(tmp_path: Path, made: list[str]) -> None:
    axes: dict[str, Any] = {"base": tiny(*FAST, model=plain_vit()), "name": "study"}
    first = fedsim.sweep(**axes, seeds=[3], output=tmp_path / "there")
    table = tmp_path / "table.csv"
    table.write_text(to_csv(first.frame()))
    both = fedsim.sweep(**axes, seeds=[3, 4], output=tmp_path / "here", known=[table])
    assert made == ["seed=3", "seed=4"]
    assert [(run.seed, run.metrics["final_average_accuracy"]) for run in both.known] == [
        (3, first.runs[0].metrics["final_average_accuracy"])
    ]
    assert [run.seed for run in both.runs] == [4]


def test_variants_may_be_a_list_of_presets(tmp_path: Path, made: list[str]) -> None:
    base = {**TINY, "model": plain_vit(), "stream": {"tasks": 1}}
    runs = fedsim.sweep(
        overrides=["server.rounds=1", "client.epochs=1", "adapter.rank=2"], base=base, list={"method": ["fedavg", "lorm"]},
        output=tmp_path,
    )  # fmt: skip
    assert {run.labels["method"]: run.results.config.server.aggregator["name"] for run in runs.runs} == {
        "fedavg": "fedavg",
        "lorm": "lorm",
    }


def test_nothing_is_shown_unless_asked_for(tmp_path: Path, made: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny(*FAST, model=plain_vit())
    runs = fedsim.sweep(base=base, output=tmp_path / "mine")
    assert runs.sweep is not None and runs.sweep.name == "mine", "the folder's name, where none is given"
    assert capsys.readouterr().out == ""
    fedsim.sweep(base=base, seeds=[7], output=tmp_path, progress=True)
    assert "[1/1] seed=7: accuracy" in capsys.readouterr().out


def test_a_run_that_fails_is_absent_with_its_reason(tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsim import simulation

    real = simulation.run

    def failing(config: Any, **more: Any) -> Any:
        if config.seed == 1:
            raise ConfigError("broken on purpose")
        return real(config, **more)

    monkeypatch.setattr(simulation, "run", failing)
    base = tiny(*FAST, model=plain_vit())
    runs = fedsim.sweep(base=base, seeds=2, output=tmp_path)
    assert [run.results.config.seed for run in runs.runs] == [0]
    assert [(one.what, "broken on purpose" in one.reason) for one in runs.absent] == [("seed=1", True)]
    with pytest.raises(RunDirError, match=r"none of its 1 runs is finished; the first: failed: .*broken on purpose"):
        fedsim.sweep(base=base, seeds=[1], output=tmp_path / "other")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"file": "a.yaml", "seeds": 2}, "give a sweep file or its keys, not both: a.yaml and seeds"),
        ({"grid": {"seed": [1]}}, "the sweep names no base"),
        ({"base": "fashion", "gird": {}}, "unknown key 'gird' in the sweep. Did you mean 'grid'?"),
        ({"base": "fashion", "list": {"method": ["lrom"]}}, "no config file and no preset 'lrom'. Did you mean 'lorm'?"),
        ({"base": "fashion", "name": "a/b"}, "name must be a plain word"),
        ({"base": "fashion", "name": "sweep"}, "name must be a plain word other than sweep"),
        ({"base": object()}, "base"),
    ],
)
def test_bad_input_is_one_line(asked: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as error:
        fedsim.sweep(**asked)
    assert said in str(error.value)


def test_tuning_gives_the_winners_and_writes_them(tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny(*FAST, model=plain_vit()).to_dict()))
    (tmp_path / "tuning.yaml").write_text(
        json.dumps(
            {
                "base": "./tiny.yaml",
                "list": {"method": {"mine": {}}},
                "tune": {"keys": {"client.lr": [1e-9, 1e-1]}, "seeds": [10], "into": str(tmp_path / "tuned")},
            }
        )
    )
    winners = fedsim.tune("tuning.yaml", output=tmp_path / "runs")
    assert len(made) == 2 and winners["mine"].tried == 2
    lr = winners["mine"].candidate.changes["client.lr"]
    assert fedsim.load(tmp_path / "tuned" / "mine.yaml").client.lr == lr
