"""What the charts show, against numbers taken from the runs by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedsim.core.config import SimConfig
from fedsim.report import data
from fedsim.report.data import Study
from fedsim.runs.collection import Collection, Entry, SweepRecord, collect
from fedsim.runs.results import Results
from tests.report.factory import METHODS, fake_run, fake_sweep
from tests.tiny import tiny


def runs_of(study: Study, series: str, split: str) -> list[Results]:
    rows = zip(study.runs, study.frame["series"], study.frame["split"], strict=True)
    return [run.results for run, of, at in rows if (of, at) == (series, split)]


def row_of(frame: Any, **where: Any) -> Any:
    for name, value in where.items():
        frame = frame[frame[name] == value]
    assert len(frame) == 1
    return frame.iloc[0]


def interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    return float(low), float(high)


# ---------------------------------------------------------------- charts that compare


def test_the_sweep_of_the_tests_has_the_settings_that_were_asked_for(study: Study) -> None:
    assert study.splits == ("0.1", "0.5", "iid")
    assert study.factors == ("method",)
    assert [s.text for s in study.series] == ["variance_weighted", "lorm", "fedavg"]  # the best first
    assert study.split_title.startswith("Dirichlet α")
    assert study.title == "heterogeneity"
    assert study.common_tasks == ("0: alphabet 0", "1: alphabet 1", "2: alphabet 2")


def test_settings_are_means_over_seeds_with_t_intervals(study: Study) -> None:
    values = [r.metrics["forgetting"] for r in runs_of(study, "lorm", "0.5")]
    row = row_of(study.settings, series="lorm", split="0.5", metric="forgetting")
    assert (row["n"], row["mean"]) == (2, pytest.approx(np.mean(values)))
    assert (row["low"], row["high"]) == pytest.approx(interval(values))


def test_learning_curve(study: Study) -> None:
    curves = [[r.accuracy[i, : i + 1].mean() for i in range(3)] for r in runs_of(study, "fedavg", "iid")]
    for task in range(3):
        row = row_of(data.by_task(study), series="fedavg", split="iid", task=task)
        at = [curve[task] for curve in curves]
        assert (row["n"], row["mean"], row["name"]) == (2, pytest.approx(np.mean(at)), f"{task}: alphabet {task}")
        assert (row["low"], row["high"]) == pytest.approx(interval(at))


def test_forgetting_curve_ends_in_the_metric(study: Study) -> None:
    curve = data.forgetting_by_task(study)
    assert sorted(set(curve["task"])) == [1, 2]
    final = study.settings[study.settings["metric"] == "forgetting"]
    for series, split, mean in zip(final["series"], final["split"], final["mean"], strict=True):
        assert row_of(curve, series=series, split=split, task=2)["mean"] == pytest.approx(mean)
    first = [max(r.accuracy[0, 0], r.accuracy[1, 0]) - r.accuracy[1, 0] for r in runs_of(study, "lorm", "0.1")]
    assert row_of(curve, series="lorm", split="0.1", task=1)["mean"] == pytest.approx(np.mean(first))


def test_rounds_have_their_place_in_the_stream(study: Study) -> None:
    frame = data.by_round(study)
    of = frame[(frame["series"] == "lorm") & (frame["split"] == "0.1")]
    assert of["position"].tolist() == pytest.approx([t + k / 3 for t in range(3) for k in (1, 2, 3)])
    assert of["stage"].tolist() == ["round", "round", "task_end"] * 3
    assert of["mean"].iloc[-1] == pytest.approx(
        np.mean([r.metrics["final_average_accuracy"] for r in runs_of(study, "lorm", "0.1")])
    )
    middle = [r.frame() for r in runs_of(study, "lorm", "0.1")]
    by_hand = [f[(f.task == 1) & (f["round"] == 0) & (f.stage == "round")].accuracy.mean() for f in middle]
    assert of["mean"].iloc[3] == pytest.approx(np.mean(by_hand))


def test_matrices_are_means_over_seeds(study: Study) -> None:
    by_hand = np.mean([r.accuracy for r in runs_of(study, "lorm", "0.5")], axis=0)
    frame = data.matrices(study)
    of = frame[(frame["series"] == "lorm") & (frame["split"] == "0.5")]
    assert len(of) == 6
    assert of["mean"].tolist() == pytest.approx([by_hand[i, j] for i, j in zip(of["after"], of["tested"], strict=True)])


def test_trade_off_and_cost_put_two_metrics_side_by_side(study: Study) -> None:
    row = row_of(data.trade_off(study), series="lorm", split="iid")
    runs = runs_of(study, "lorm", "iid")
    assert (row["x"], row["y"]) == pytest.approx(
        tuple(np.mean([r.metrics[m] for r in runs]) for m in ("plasticity", "forgetting"))
    )
    cost = row_of(data.cost_accuracy(study), series="lorm", split="iid", cost="bytes")
    sent = [sum(kinds.values()) for kinds in runs[0].costs["bytes"].values()]
    assert cost["x"] == pytest.approx(sum(sent) / 1e6)
    assert cost["y"] == pytest.approx(np.mean([r.metrics["final_average_accuracy"] for r in runs]))


def test_costs_by_kind_add_up(study: Study) -> None:
    frame = data.costs(study)
    of = frame[(frame["series"] == "fedavg") & (frame["split"] == "0.1")]
    results = runs_of(study, "fedavg", "0.1")
    up = of[of["direction"] == "up"]
    assert dict(zip(up["kind"], up["amount"], strict=True)) == pytest.approx(
        {kind: count / 1e6 for kind, count in results[0].costs["bytes"]["up"].items()}
    )
    seconds = of[of["what"] == "seconds"]
    assert seconds["amount"].sum() == pytest.approx(np.mean([sum(r.costs["seconds"].values()) for r in results]))
    assert (frame["room"] >= frame.groupby(["what", "split", "series", "direction"])["amount"].transform("sum")).all()


def test_drift_is_the_mean_over_seeds_and_leaves_out_what_is_undefined(study: Study) -> None:
    frame = data.drift(study)
    values = [
        next(d for d in r.drifts if (d.task, d.round, d.group) == (1, 0, "head")).cosine for r in runs_of(study, "lorm", "0.1")
    ]
    row = row_of(frame, series="lorm", split="0.1", group="head", measure="cosine", task=1, round=0)
    assert row["mean"] == pytest.approx(np.mean([v for v in values if v is not None]))
    head = frame[(frame["group"] == "head") & (frame["measure"] == "relative_norm")]
    assert 0 not in set(head["task"])  # a new head is zero: its change has no relative length
    assert set(frame[frame["measure"] == "product_error"]["group"]) == {"adapter"}


# ---------------------------------------------------------------- one run


def test_run_frames_repeat_the_run(study: Study) -> None:
    results = study.runs[4].results
    matrices = data.run_matrices(study, 4)
    assert set(matrices["judged"]) == {"among all classes seen", "task told at test time"}
    told = matrices[matrices["judged"] == "task told at test time"]
    assert told["mean"].tolist() == [results.accuracy_task_incremental[i, j] for i in range(3) for j in range(i + 1)]
    rounds = data.run_rounds(study, 4)
    assert len(rounds) == len(results.rows)
    assert rounds["accuracy"].tolist()[-3:] == results.accuracy[-1].tolist()


def test_bubbles_hold_every_sample(study: Study) -> None:
    frame = data.bubbles(study, 0)
    assert frame["samples"].sum() == sum(h.samples for h in study.runs[0].results.holdings) == 60 * 12
    assert frame.groupby("column")["class_name"].nunique().max() == 1
    assert set(frame["task_name"]) == {"0: alphabet 0", "1: alphabet 1", "2: alphabet 2"}
    clients = data.clients(study, 0)
    assert clients["samples"].sum() == 60 * 12
    assert clients["accuracy"].tolist() == study.runs[0].results.client_accuracy.tolist()


def test_of_many_clients_fifty_are_shown_and_all_are_counted(run_dirs: Path) -> None:
    fake_run(many_clients(run_dirs), 10.0, classes=6)
    study = Study.of(collect([run_dirs]))
    assert data.bubbles(study, 0)["client"].max() == 49
    assert len(data.clients(study, 0)) == 60


def many_clients(folder: Path) -> SimConfig:
    return tiny(output=folder, partition={"name": "dirichlet", "alpha": 1.0, "clients": 60})


def test_names_of_tasks_are_a_comfort(run_dirs: Path) -> None:
    path = fake_run(tiny(output=run_dirs), 10.0, names=["Greek", "Braille"])
    assert Study.of(collect([path])).common_tasks == ("0: Greek", "1: Braille")
    (path / "manifest.json").write_text("{")
    assert Study.of(collect([path])).common_tasks == ("0", "1")


# ---------------------------------------------------------------- series and splits


def folder_of(folder: Path, *configs: SimConfig) -> Study:
    for config in configs:
        fake_run(config, 10.0)
    return Study.of(collect([folder]))


def test_without_a_sweep_keys_of_the_config_tell_series_apart(run_dirs: Path) -> None:
    study = folder_of(
        run_dirs,
        *(
            tiny(f"client.lr={lr}", f"server.aggregator={rule}", f"partition.alpha={alpha}", output=run_dirs)
            for lr in (0.1, 0.01)
            for rule in ("fedavg", "fairavg")
            for alpha in (0.1, 1.0)
        ),
    )
    assert study.factors == ("server.aggregator.name", "client.lr")
    assert {s.text for s in study.series} == {"fedavg, lr=0.1", "fedavg, lr=0.01", "fairavg, lr=0.1", "fairavg, lr=0.01"}
    assert study.splits == ("0.1", "1")
    assert set(study.frame.groupby(["series", "split"]).size()) == {1}


def test_presets_are_called_by_their_names(run_dirs: Path) -> None:
    study = folder_of(
        run_dirs,
        *(
            tiny(f"name={name}", f"seed={seed}", *overrides.split(), output=run_dirs)
            for name, (overrides, _) in METHODS.items()
            for seed in (0, 1)
        ),
    )
    assert study.factors == ("preset",)
    assert {s.text for s in study.series} == set(METHODS)
    assert set(study.frame.groupby("series").size()) == {2}


def test_names_that_do_not_decide_are_no_series(run_dirs: Path) -> None:
    study = folder_of(
        run_dirs,
        tiny("name=a", "client.lr=0.1", output=run_dirs),
        tiny("name=a", "client.lr=0.2", output=run_dirs),
        tiny("name=b", "client.lr=0.3", output=run_dirs),
    )
    assert study.factors == ("client.lr",)


def test_a_method_that_ran_on_one_split_each_is_still_a_method(run_dirs: Path) -> None:
    entries = []
    for method, alpha in (("lorm", 0.1), ("fedavg", 1.0)):
        config = tiny(f"server.aggregator={method}", f"partition.alpha={alpha}", output=run_dirs)
        fake_run(config, 10.0, run_dirs / config.identity()[:16])
        entries.append(Entry(config.identity(), {"rule": method, "level": alpha, "seed": 0}))
    SweepRecord("odd", {"rule": ["lorm", "fedavg"], "level": [0.1, 1.0], "seed": [0]}, tuple(entries)).save(run_dirs)
    study = Study.of(collect([run_dirs]))
    assert study.factors == ("rule",)
    assert {s.text for s in study.series} == {"lorm", "fedavg"}


def test_splits_without_an_alpha_come_last_and_are_named(run_dirs: Path) -> None:
    pathological = {"name": "pathological", "classes_per_client": 2, "clients": 3}
    study = folder_of(
        run_dirs,
        tiny(output=run_dirs, partition=pathological),
        tiny(output=run_dirs, partition={"name": "iid", "clients": 3}),
        tiny(output=run_dirs),
    )
    assert study.splits == ("0.5", "iid", "pathological classes_per_client=2")
    assert study.split_title == "Split of the data over clients"
    assert len(study.series) == 1


def test_words_for_heterogeneity_are_a_split_too(run_dirs: Path) -> None:
    entries = []
    for word, alpha in (("high", 0.1), ("low", 1.0)):
        for method in ("lorm", "fedavg"):
            config = tiny(f"server.aggregator={method}", f"partition.alpha={alpha}", output=run_dirs)
            fake_run(config, 10.0, run_dirs / config.identity()[:16])
            entries.append(Entry(config.identity(), {"rule": method, "mixture": word, "seed": 0}))
    axes = {"rule": ["lorm", "fedavg"], "mixture": ["high", "low"], "seed": [0]}
    SweepRecord("words", axes, tuple(entries)).save(run_dirs)
    study = Study.of(collect([run_dirs]))
    assert (study.factors, study.splits) == (("rule",), ("0.1", "1"))


def test_axes_of_one_level_say_nothing(tmp_path: Path) -> None:
    study = Study.of(collect([fake_sweep(tmp_path, {"lorm": METHODS["lorm"]}, alphas=(0.1,), seeds=(0, 1), iid=False, tasks=2)]))
    assert study.factors == ()
    assert [s.text for s in study.series] == ["tiny"]
    assert study.splits == ("0.1",)


def test_runs_of_unlike_length_meet_where_they_can(run_dirs: Path) -> None:
    study = folder_of(run_dirs, *(tiny(f"stream.tasks={t}", "data.classes=12", output=run_dirs) for t in (2, 3)))
    assert study.tasks == 3
    assert sorted(data.by_task(study).groupby("task").size()) == [1, 2, 2]


@pytest.mark.parametrize(
    ("level", "shown"),
    [(None, "–"), (True, "true"), (0.1, "0.1"), (1e-5, "1e-05"), (3, "3"), ("lorm", "lorm"), (math.inf, "inf")],
)
def test_levels_as_text(level: Any, shown: str) -> None:
    assert data.text(level) == shown


def test_collection_frame_and_runs_stay_in_step(study: Study, sweep: Collection) -> None:
    assert study.table["run"].tolist() == [run.results.config.identity()[:16] for run in study.runs]
    assert len(study.runs) == len(sweep.runs)
