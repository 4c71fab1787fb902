"""Tuning: what is tried, who goes on, and what the winners' files say."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from fedsim import cli
from fedsim.core.config import load
from fedsim.core.errors import ConfigError, DataError, FedsimError
from fedsim.runs.metrics import METRICS
from fedsim.sweeps import tune
from fedsim.sweeps.tune import Tuning
from tests import run_dirs
from tests.tiny import TINY, tiny

METHODS: Mapping[str, Any] = {"avg": {}, "fair": {"server.aggregator": "fairavg"}}
NO_SCORES = (
    "gap_to_joint",
    "intransigence",
    "bytes_up",
    "seconds",
    "peak_memory",
    "final_accuracy",
    "learning_curve",
    "accuracy",
)
LR = {"client.lr": [0.1, 0.2, 0.3, 0.4]}


def written(folder: Path, **changes: Any) -> Path:
    """A tuning of the tiny run."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    said = {"keys": LR, "seeds": [5, 6, 7], "into": str(folder / "best"), **changes.pop("tune", {})}
    sweep = {"base": "tiny.yaml", "list": {"method": dict(METHODS)}, "output": str(folder / "runs"), **changes, "tune": said}
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))
    return path


def told(tuning: Tuning, better: Mapping[str, float]) -> dict[str, float]:
    """A score of every run, from the configuration's quality alone; a configuration that is not named fails."""
    found = {}
    for one in tuning.candidates:
        for seed, run in one.runs.items():
            if one.setting in better:
                found[run.entry.identity] = better[one.setting] + 0.01 * seed
    return found


def settings(tuning: Tuning, number: int, scores: Mapping[str, float], variant: str) -> list[str]:
    return [one.setting for one in tuning.rung(number, scores) if one.variant == variant]


def test_half_go_on_after_every_seed(tmp_path: Path) -> None:
    tuning = tune.read(written(tmp_path))
    scores = told(tuning, {"client.lr=0.1": 10, "client.lr=0.2": 40, "client.lr=0.3": 30, "client.lr=0.4": 20})
    for variant in METHODS:
        assert len(settings(tuning, 0, {}, variant)) == 4
        assert settings(tuning, 1, scores, variant) == ["client.lr=0.2", "client.lr=0.3"]
        assert settings(tuning, 2, scores, variant) == []  # one is left alone, and nothing is to be found out any more
    winner = tuning.winners(scores)["fair"]
    assert (winner.candidate.setting, winner.tried, winner.seeds) == ("client.lr=0.2", 4, [5, 6])
    assert winner.score == pytest.approx(40 + 0.01 * 5.5)
    assert (tuning.options.numbers(4), tuning.options.runs(4), tuning.options.runs(1)) == ([4, 2, 1], 6, 0)


def test_where_less_is_better_the_least_wins(tmp_path: Path) -> None:
    tuning = tune.read(written(tmp_path, tune={"metric": "forgetting", "seeds": [5]}))
    scores = told(tuning, {"client.lr=0.1": 10, "client.lr=0.2": 4, "client.lr=0.3": 30, "client.lr=0.4": 20})
    assert tuning.winners(scores)["avg"].candidate.setting == "client.lr=0.2"


def test_who_fails_is_out_and_a_variant_may_be_lost(tmp_path: Path) -> None:
    tuning = tune.read(written(tmp_path))
    scores = told(tuning, {"client.lr=0.4": 20})
    assert settings(tuning, 1, scores, "avg") == []
    assert tuning.winners(scores)["avg"].candidate.setting == "client.lr=0.4"
    assert tuning.winners({}) == {}


def test_equal_scores_the_first_wins(tmp_path: Path) -> None:
    tuning = tune.read(written(tmp_path))
    scores = told(tuning, dict.fromkeys(("client.lr=0.1", "client.lr=0.2", "client.lr=0.3", "client.lr=0.4"), 50.0))
    assert tuning.winners(scores)["avg"].candidate.setting == "client.lr=0.1"


def test_equal_means_over_seeds_the_first_wins_too(tmp_path: Path) -> None:
    """50 and 60 on one seed, 60 and 50 on the next: the order in between is of no account."""
    tuning = tune.read(written(tmp_path, tune={"seeds": [5, 6]}))
    scores = {}
    for one, of_seeds in zip(tuning.of("avg"), ((50.0, 60.0), (60.0, 50.0), (1.0, 99.0), (2.0, 99.0)), strict=True):
        scores |= {one.runs[seed].entry.identity: score for seed, score in zip((5, 6), of_seeds, strict=True)}
    winner = tuning.winners(scores)["avg"]
    assert (winner.candidate.setting, winner.score) == ("client.lr=0.1", 55.0)
    assert [one.setting for one in tuning.left("avg", 1, scores)] == ["client.lr=0.1", "client.lr=0.2"]


def test_every_metric_that_is_taken_is_one_that_runs_have() -> None:
    have = run_dirs.results(tiny(), [[90], [60, 70]]).metrics
    taken = []
    for name in METRICS:
        with suppress(ConfigError):
            taken.append(tune.TuneOptions(metric=name).metric)
    assert {"final_average_accuracy", "forgetting", "client_accuracy_min"} <= set(taken) <= have.keys()


def test_a_variant_has_keys_of_its_own_and_no_more_than_the_budget(tmp_path: Path) -> None:
    own = {"avg": {"client.learners": [[], [{"name": "proximal", "mu": 0.5}]]}, "fair": None}
    tuning = tune.read(written(tmp_path, tune={"own": own, "budget": 6}))
    again = tune.read(written(tmp_path, tune={"own": own, "budget": 6}))
    of_avg = [one.setting for one in tuning.of("avg")]
    assert len(of_avg) == 6 and of_avg == [one.setting for one in again.of("avg")]
    assert of_avg[0] == "client.lr=0.1 client.learners=[]"  # the first values of all are always tried
    assert 'client.lr=0.1 client.learners=[{"name": "proximal", "mu": 0.5}]' in {
        one.setting for one in tune.read(written(tmp_path, tune={"own": own})).of("avg")
    }
    assert [one.setting for one in tuning.of("fair")] == ["as it is"] and settings(tuning, 0, {}, "fair") == []
    assert tuning.winners({})["fair"].score is None


def test_a_winner_is_a_config(tmp_path: Path) -> None:
    own = {"avg": {"client.learners": [[], [{"name": "proximal", "mu": 0.5}]]}, "fair": None}
    tuning = tune.read(written(tmp_path, tune={"own": own, "keys": {"client.lr": [0.2]}, "seeds": [5]}))
    best = 'client.lr=0.2 client.learners=[{"name": "proximal", "mu": 0.5}]'
    files = tune.write(tuning, tuning.winners(told(tuning, {best: 60.0})))
    assert [path.name for path in files] == ["avg.yaml", "fair.yaml"]
    config = load(files[0])
    assert config.client.lr == 0.2 and config.client.learners == [{"name": "proximal", "mu": 0.5}]
    assert config.stream == load(tmp_path / "tiny.yaml").stream
    assert "best of 2 configurations on seed 5 of my.yaml: final_average_accuracy 60.05" in files[0].read_text()
    assert load(files[1]).server.aggregator["name"] == "fairavg" and "nothing was to be tuned" in files[1].read_text()


def test_winners_name_presets_by_their_names(tmp_path: Path) -> None:
    sweep = {"base": "fashion", "list": {"method": {"er": {"extends": "er"}}}, "tune": {"into": str(tmp_path / "best")}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    tuning = tune.read(tmp_path / "my.yaml")
    (path,) = tune.write(tuning, tuning.winners({}))
    assert yaml.safe_load(path.read_text()) == {"extends": ["fashion", "er"]}
    assert load(path).identity() == load(["fashion", "er"]).identity()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seeds": 3}, "'seeds' has no place in a tuning"),
        ({"grid": {"client.lr": [1.0]}}, "'grid' has no place in a tuning"),
        ({"list": {}}, "a tuning has one axis of variants"),
        ({"tune": {"own": {"avgg": {}}}}, "tune.own names 'avgg', which is no variant. Did you mean 'avg'"),
        ({"tune": {"own": {"avg": [1]}}}, "tune.own.avg must map keys to lists of values"),
        ({"tune": {"metric": "acuracy"}}, "metric 'acuracy' is none that is judged"),
        ({"tune": {"metric": "final_average_acuracy"}}, "Did you mean 'final_average_accuracy'"),
        *(({"tune": {"metric": name}}, f"metric '{name}' is none that is judged as one number of a run") for name in NO_SCORES),
        ({"tune": {"budget": 0}}, "budget must be at least 1"),
        ({"tune": {"keep": 0.0}}, r"keep must be in \(0, 1\]"),
        ({"tune": {"seeds": [1, 1]}}, "seeds must be a list of different seeds"),
        ({"tune": {"keys": {"client.lrr": [1.0]}}}, "method=avg client.lrr=1.0 seed=5: unknown key 'client.lrr'"),
        ({"tuned": {}}, "unknown key 'tuned'"),
    ],
)
def test_what_cannot_be_tuned(changes: Any, line: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, FedsimError), match=line):
        tune.read(written(tmp_path, **changes))


def test_the_command_plays_what_is_missing_and_writes_the_winners(
    one_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, list={"method": {"avg": {}}}, tune={"keys": {"client.lr": [0.001, 0.1]}, "seeds": [5, 6]})
    words = ["tune", str(path), "--jobs", "1", "--csv", str(tmp_path / "tried.csv")]
    assert cli.main([*words, "--dry-run"]) == 0
    assert "2 runs at most, on seeds 5, 6: after each of them 50% go on" in capsys.readouterr().out
    assert cli.main(words) == 0
    rows = list(csv.DictReader((tmp_path / "tried.csv").read_text().splitlines()))
    assert [row["seed"] for row in rows] == ["5", "5"]
    first = {row["setting"]: float(row["final_average_accuracy"]) for row in rows}
    best = max(first, key=lambda setting: first[setting])
    assert load(tmp_path / "best" / "avg.yaml").client.lr == float(best.removeprefix("client.lr="))
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.json")}
    assert cli.main([*words, "--quiet"]) == 0
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.json")} and len(made) == 2


def test_what_a_table_tells_is_not_played_again(one_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tuning goes on where its run directories are not, and ends with the same winner and the same table."""
    path = written(tmp_path, list={"method": {"avg": {}}}, tune={"keys": {"client.lr": [0.001, 0.01, 0.1]}, "seeds": [5, 6]})
    tried, again = tmp_path / "tried.csv", tmp_path / "again.csv"
    assert cli.main(["tune", str(path), "--jobs", "1", "--csv", str(tried)]) == 0
    best = (tmp_path / "best" / "avg.yaml").read_text()
    lines = tried.read_text().splitlines(keepends=True)
    assert len(lines) == 6  # three on the first seed, two on the second
    (tmp_path / "part.csv").write_text("".join(lines[:3]))
    (tmp_path / "best" / "avg.yaml").unlink()
    words = ["tune", str(path), "--jobs", "1", "--output", str(tmp_path / "elsewhere"), "--csv", str(again)]
    capsys.readouterr()
    assert cli.main([*words, "--known", str(tmp_path / "part.csv")]) == 0
    assert "; 2 known by a table" in capsys.readouterr().out
    assert len(list((tmp_path / "elsewhere").glob("*/metrics.json"))) == 3
    assert (again.read_text(), (tmp_path / "best" / "avg.yaml").read_text()) == (tried.read_text(), best)


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ("seed,final_average_accuracy\n5,50.0\n", "has no column run: write it with fedsim tune or fedsim results, and --csv"),
        ("run,seed\n00,5\n", "has no column final_average_accuracy"),
        ("run,final_average_accuracy\n0123456789abcdef,50.0\n", "none of the tuning's runs is in"),
    ],
)
def test_a_table_that_tells_nothing(table: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(DataError, match=line):
        tune.told(tune.read(written(tmp_path)), [tmp_path / "t.csv"])


def test_what_all_variants_share_need_not_apply_to_each(tmp_path: Path) -> None:
    """A number of clients means nothing where one client holds everything; it must apply to some variant."""
    both = {"avg": {}, "joint": {"extends": "joint"}}
    tuning = tune.read(written(tmp_path, set={"partition.clients": 2}, list={"method": both}))
    counts = {one.variant: run.config.partition["clients"] for one in tuning.candidates for run in one.runs.values()}
    assert counts == {"avg": 2, "joint": 1}
    with pytest.raises(ConfigError, match=r"partition.clients must be 1 with joint"):
        tune.read(written(tmp_path, set={"partition.clients": 2}, list={"method": {"joint": {"extends": "joint"}}}))
