"""A ledger: what is counted against numpy, what a server sees of the methods that are known, and the page in a browser."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedsim import cli
from fedsim.core import config as configs
from fedsim.core import presets
from fedsim.core.errors import ConfigError, DataError
from fedsim.report import ledger
from fedsim.report.ledger import charts, methods, study
from fedsim.report.ledger.rows import Ledger, agreement
from fedsim.report.ledger.study import ANY
from tests.report.browsing import Opened
from tests.report.factory import METHODS, fake_sweep
from tests.report.test_page import HOSTILE, Elements

LEVELS = {"ncm": 60.0, "ranpac": 70.0, "fedavg": 30.0, "lorm": 50.0, "er": 65.0, "joint": 80.0}
MEGABYTES = {"ncm": 0.5, "ranpac": 8.0, "fedavg": 100.0, "lorm": 150.0, "er": 60.0, "joint": 0.2}
COST = {"seconds": 50.0, "stored_mean": 2e6, "peak_memory": 5e8}


def table(path: Path, names: dict[str, str] | None = None, seeds: int = 3, joint: str = "joint") -> pd.DataFrame:
    """A CSV as `fedsim results` writes it, of six methods on two splits; the joint run has none."""
    rows = []
    for k, (method, level) in enumerate(LEVELS.items()):
        for alpha in (0.1, 0.5) if method != joint else (np.nan,):
            for seed in range(seeds):
                accuracy = level + (0 if np.isnan(alpha) else 10 * alpha) + [0.0, 1.5, 4.0][seed] * (1 + k / 10)
                curve = {f"learning_curve_{i}": accuracy + 10 - 5 * i for i in range(3)}
                final = {f"final_accuracy_{i}": accuracy + i - 1 for i in range(3)}
                rows.append(
                    {
                        "run": f"{method}{alpha}{seed}", "method": (names or {}).get(method, method),
                        "partition.name": "joint" if np.isnan(alpha) else "dirichlet", "seed": seed,
                        "dirichlet_alpha": alpha, "partition_hash": f"{alpha} {seed}", "chance": 10.0,
                        "final_average_accuracy": accuracy, "average_incremental_accuracy": accuracy + 5, "forgetting": 20.0,
                        "final_average_accuracy_task_incremental": accuracy + 8, "client_accuracy_min": accuracy - 9,
                        "bytes_up": 4e5 * MEGABYTES[method], "bytes_down": 6e5 * MEGABYTES[method], **COST, **curve, **final,
                    }
                )  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.to_csv(path, index=False)
    return frame


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ledger")


@pytest.fixture(scope="module")
def counted(folder: Path) -> tuple[Ledger, pd.DataFrame]:
    frame = table(folder / "fashion.csv")
    return Ledger.of(ledger.read([folder / "fashion.csv"])), frame


# ---------------------------------------------------------------- what is counted


def test_processor_seconds_stand_for_seconds_where_every_setting_has_some(tmp_path: Path) -> None:
    """Those of the wall depend on what else the machine does. The two are never mixed on a page."""
    frame = table(tmp_path / "all.csv").assign(processor_seconds=20.0)
    frame.to_csv(tmp_path / "all.csv", index=False)
    one, setting = frame.copy(), frame.copy()
    one.loc[0, "processor_seconds"] = np.nan
    setting.loc[(setting.method == "er") & (setting.dirichlet_alpha == 0.1), "processor_seconds"] = np.nan
    one.to_csv(tmp_path / "one.csv", index=False)
    setting.to_csv(tmp_path / "setting.csv", index=False)
    found = Ledger.of(ledger.read([tmp_path / f"{name}.csv" for name in ("all", "one", "setting")]))
    assert {(s.stream, s.means["seconds"].mean) for s in found.settings} == {("all", 20.0), ("one", 20.0), ("setting", 50.0)}
    assert sorted(s.means["seconds"].n for s in found.settings if s.stream == "one") == [2, *[3] * 10]


def test_means_and_differences_are_those_of_the_runs(counted: tuple[Ledger, pd.DataFrame]) -> None:
    found, frame = counted
    er = next(s for s in found.settings if (s.method, s.split) == ("er", "0.1"))
    of = {
        name: frame[(frame.method == name) & (frame.dirichlet_alpha == 0.1)].final_average_accuracy.to_numpy() for name in LEVELS
    }
    mean = er.means["final_average_accuracy"]
    assert (mean.n, mean.mean, mean.std) == (3, pytest.approx(of["er"].mean()), pytest.approx(of["er"].std(ddof=1)))
    half = 4.302652729911275 * of["er"].std(ddof=1) / np.sqrt(3)  # Student's t, two degrees of freedom, 97.5 %
    assert (mean.low, mean.high) == pytest.approx((mean.mean - half, mean.mean + half))
    for baseline in ("fedavg", "ranpac"):
        d = of["er"] - of[baseline]
        half = 4.302652729911275 * d.std(ddof=1) / np.sqrt(3)
        told = er.differences[baseline]
        assert (told.n, told.mean, told.low, told.high) == pytest.approx((3, d.mean(), d.mean() - half, d.mean() + half))
    assert "fedavg" not in next(s for s in found.settings if s.method == "fedavg").differences
    assert [m.mean for m in er.curve] == pytest.approx([of["er"].mean() + 10 - 5 * i for i in range(3)])
    assert [m.mean for m in er.final] == pytest.approx([of["er"].mean() + i - 1 for i in range(3)])


def test_bounds_of_every_split_and_the_headroom(counted: tuple[Ledger, pd.DataFrame]) -> None:
    """A joint run, to which no split applies, bounds them all."""
    found, frame = counted
    assert found.splits == {"fashion": ["0.1", "0.5"]}
    level = frame.groupby(["method", frame.dirichlet_alpha.fillna(-1)]).final_average_accuracy.mean()
    for alpha in (0.1, 0.5):
        bounds = found.bounds["fashion", f"{alpha:g}"]
        want = (10.0, level["ncm", alpha], level["ranpac", alpha], level["joint", -1])
        assert (bounds.chance, bounds.ncm, bounds.ranpac, bounds.joint) == pytest.approx(want)
        assert bounds.headroom == pytest.approx(level["joint", -1] - level["ncm", alpha])
    assert [s.method for s in found.shown("fashion", "0.1")] == ["joint", "ranpac", "er", "ncm", "lorm", "fedavg"]
    assert [s.split for s in found.shown("fashion", "0.5")].count(ANY) == 1


def test_headroom_is_over_samples_where_tasks_are_of_unequal_sizes(tmp_path: Path) -> None:
    """A joint run has one task, whose accuracy is over all test samples: so is the one of ncm that it is held against."""
    frame = table(tmp_path / "equal.csv")
    alone = frame["method"] == "joint"
    frame["final_average_accuracy_micro"] = frame["final_average_accuracy"]
    frame.to_csv(tmp_path / "equal.csv", index=False)
    frame.loc[~alone, "final_average_accuracy_micro"] -= 3.0
    frame.to_csv(tmp_path / "unequal.csv", index=False)
    found = Ledger.of(ledger.read([tmp_path / "equal.csv", tmp_path / "unequal.csv"]))
    equal, unequal = (found.bounds[stream, "0.5"] for stream in ("equal", "unequal"))
    assert equal.headroom is not None and unequal.headroom is not None
    assert unequal.headroom == pytest.approx(equal.headroom + 3.0)
    assert (unequal.joint, unequal.ncm, unequal.joint_micro) == (None, equal.ncm, equal.joint)
    text = ledger.write(ledger.read([tmp_path / "unequal.csv"]), tmp_path / "l.html").path.read_text(encoding="utf-8")
    assert text.count("<small>over all test samples</small>") == 2 * 3  # on each split: the method's row, its bound, the headroom


def test_the_order_of_methods_over_seeds(counted: tuple[Ledger, pd.DataFrame]) -> None:
    """Of five methods two neighbours change places from seed 0 to 1: 1 of 10 pairs. Seed 2 has the order of seed 0, and one
    method less: 1 of 6 pairs against seed 1."""
    found, _ = counted
    assert set(found.agreement) == {("fashion", "0.1"), ("fashion", "0.5")}
    assert [*found.agreement.values()] == pytest.approx([1.0, 1.0])
    orders = {0: [10.0, 20.0, 30.0, 40.0, 50.0], 1: [20.0, 10.0, 30.0, 40.0, 50.0], 2: [1.0, 2.0, 3.0, 4.0]}
    rows = [(f"m{i}", seed, value) for seed, values in orders.items() for i, value in enumerate(values)]
    frame = pd.DataFrame(rows, columns=["method", "seed", "final_average_accuracy"])
    assert agreement(frame) == pytest.approx((8 / 10 + 1 + 4 / 6) / 3)
    assert np.isnan(agreement(frame[frame.seed == 0])) and np.isnan(agreement(frame[frame.method == "m0"]))


def test_a_stream_without_headroom_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEVELS, "joint", 63.0)
    table(folder / "little.csv")
    path = ledger.write(ledger.read([folder / "little.csv"]), folder / "little.html").path
    assert "<b>little, α = 0.1</b> says little about methods: joint training is 2.9 points above" in path.read_text(
        encoding="utf-8"
    )


def test_runs_themselves_give_the_same_as_their_table(tmp_path: Path) -> None:
    runs = fake_sweep(
        tmp_path / "runs", METHODS, alphas=(0.1, 0.5), seeds=(0, 1), tasks=3, clients=4, rounds=1, classes=2, iid=False
    )
    assert cli.main(["results", str(runs), "--csv", str(tmp_path / "runs.csv")]) == 0
    of_runs, of_table = (Ledger.of(ledger.read([path])) for path in (runs, tmp_path / "runs.csv"))
    for one, other in zip(of_runs.settings, of_table.settings, strict=True):
        assert (one.method, one.split, one.seeds) == (other.method, other.split, other.seeds)
        np.testing.assert_allclose(list(one.means["bytes_up"]), list(other.means["bytes_up"]))
        np.testing.assert_allclose([list(m) for m in one.curve], [list(m) for m in other.curve])
        assert len(one.curve) == 3
    assert [(m.name, m.sees, [p.name for p in m.parts]) for m in of_runs.methods] == [
        ("fairavg", ("sums of updates",), ["fairavg"]),
        ("fedavg", ("sums of updates",), ["fedavg"]),
        ("lorm", ("sums of updates", "other statistics"), ["lorm", "regmean"]),
        ("variance_weighted", ("sums of updates", "class statistics"), ["variance_weighted"]),
    ]


def test_an_interval_of_differences_ends_where_accuracies_do(tmp_path: Path) -> None:
    """Student's t of two pairs is wide."""
    frame = table(tmp_path / "two.csv", seeds=2)
    of_er = (frame["method"] == "er") & (frame["seed"] == 1)
    frame.loc[of_er, "final_average_accuracy"] -= 20.0
    frame.to_csv(tmp_path / "two.csv", index=False)
    text = ledger.write(ledger.read([tmp_path / "two.csv"]), tmp_path / "l.html").path.read_text(encoding="utf-8")
    assert "<small>−100.0 to +100.0</small>" in text
    assert not re.search(r"[−+]1[0-9]{2}\.[1-9]", text.replace("+100.0", ""))


def test_a_difference_of_fewer_pairs_than_seeds_says_so(tmp_path: Path) -> None:
    """FedAvg lacks two seeds at one split and one at the other; the closed form that it is held against has all."""
    frame = table(tmp_path / "few.csv")
    lost = (frame["method"] == "fedavg") & (frame["seed"] > np.where(frame["dirichlet_alpha"] == 0.1, 0, 1))
    frame[~lost].to_csv(tmp_path / "few.csv", index=False)
    text = ledger.write(ledger.read([tmp_path / "few.csv"]), tmp_path / "l.html").path.read_text(encoding="utf-8")
    others = len({*LEVELS} - {"fedavg", "joint"})
    assert text.count("<small>of 1 pair</small>") == text.count("<small>of 2 pairs</small>") == others


def test_what_is_shown_first_is_the_split_with_most_methods(tmp_path: Path) -> None:
    frame = table(tmp_path / "all.csv")
    fewer = frame[~((frame["method"] == "er") & (frame["dirichlet_alpha"] == 0.1))]
    fewer.to_csv(tmp_path / "fewer.csv", index=False)
    found = Ledger.of(ledger.read([tmp_path / name for name in ("all.csv", "fewer.csv")]))
    assert {stream: found.usual(stream) for stream in found.splits} == {"all": "0.1", "fewer": "0.5"}


def test_runs_of_several_processors_are_said(tmp_path: Path) -> None:
    frame = table(tmp_path / "one.csv")
    count = len(frame)
    frame.assign(processor=["<A>"] * (count - 2) + [None, "B"]).to_csv(tmp_path / "two.csv", index=False)
    text = ledger.write(ledger.read([tmp_path / name for name in ("one.csv", "two.csv")]), tmp_path / "l.html").path.read_text()
    told = "whose speeds differ, and last bits, and with them accuracies by some tenths"
    assert f"<b>two</b> has runs of several processors, {told}: &lt;A&gt; ({count - 2}), not named (1), B (1)." in text
    assert "<b>one</b> has runs" not in text


# ---------------------------------------------------------------- what is known of methods


def test_every_preset_has_one_family() -> None:
    import yaml

    path = Path(study.__file__).parent / "families.yaml"
    named = [method for family in yaml.safe_load(path.read_text(encoding="utf-8")).values() for method in family]
    assert sorted(named) == presets.names(presets.METHODS)
    assert study.families({"mine": ["er", "new"]})["er"] == "mine"


@pytest.mark.parametrize(
    ("preset", "seen"),
    [
        ("fedavg", [methods.SUMS]),
        ("krum", [methods.EACH]),
        ("hgp", [methods.EACH, methods.CLASSES]),  # Gaussians come one by one with a round's updates
        ("ccvr", [methods.SUMS, methods.CLASSES]),
        ("ncm", [methods.CLASSES]),  # nothing is trained
        ("ranpac", [methods.CLASSES, methods.STATISTICS]),
        ("ewc", [methods.SUMS, methods.STATISTICS]),
        ("scaffold", [methods.SUMS, methods.STATISTICS]),
        ("fedproto", [methods.SUMS, methods.CLASSES]),
        ("target", [methods.SUMS, methods.MADE]),
        ("er", [methods.SUMS]),  # a buffer is the client's own
        ("joint", []),
    ],
)
def test_what_the_server_sees(preset: str, seen: list[str]) -> None:
    assert list(methods.sees(configs.load(["omniglot", preset]))) == seen


def test_every_preset_is_told_of(counted: tuple[Ledger, pd.DataFrame]) -> None:
    """Parts with what they compute, a recipe, and something that the server sees."""
    for name in presets.names(presets.METHODS):
        method = methods.known(name, counted[0].study)
        assert method.family != methods.OWN, name
        assert method.comment, name
        assert method.parts and all(part.text and part.source for part in method.parts), name
        assert method.recipes["the preset"] == (presets.folder() / f"methods/{name}.yaml").read_text(encoding="utf-8")
        assert method.sees or name == "joint", name


def test_recipes_that_were_run_come_first(tmp_path: Path) -> None:
    table(tmp_path / "fashion.csv")
    (tmp_path / "best" / "fashion").mkdir(parents=True)
    (tmp_path / "best/fashion/er.yaml").write_text("extends: er\nclient: {lr: 3.0e-3, learners: [scaffold]}\n")
    (tmp_path / "ledger.yaml").write_text(
        "results: {fashion: fashion.csv}\nrecipes: best/{stream}/{method}.yaml\n"
        "remarks: {er: Said of er.}\noutput: out/page.html\n"
    )
    found = ledger.read([tmp_path / "ledger.yaml"])
    er, lorm = methods.known("er", found), methods.known("lorm", found)
    assert list(er.recipes) == ["fashion, as it was run", "the preset"]
    assert [part.name for part in er.parts] == ["scaffold"]  # of what was run
    assert er.command == f"fedsim run fashion {os.path.relpath(tmp_path / 'best/fashion/er.yaml')}"
    assert (er.remark, lorm.command, list(lorm.recipes)) == ("Said of er.", "fedsim run fashion lorm", ["the preset"])
    assert found.output == tmp_path / "out/page.html"


def test_a_recipe_on_a_stream_that_is_no_preset_is_run_by_itself(tmp_path: Path) -> None:
    """As what `fedsim tune` writes, it says its stream; a method without one has no command there."""
    for name in ("fashion", "tuned"):
        table(tmp_path / f"{name}.csv")
    (tmp_path / "best" / "tuned").mkdir(parents=True)
    (tmp_path / "best/tuned/er.yaml").write_text("extends: [fashion, er]\nclient: {lr: 1.0e-3}\n")
    (tmp_path / "ledger.yaml").write_text(
        "results: {fashion: fashion.csv, tuned: tuned.csv}\nrecipes: best/{stream}/{method}.yaml\n"
    )
    found = ledger.read([tmp_path / "ledger.yaml"])
    path = os.path.relpath(tmp_path / "best/tuned/er.yaml")
    assert methods.known("er", found).command == f"fedsim run fashion er\nfedsim run {path}"
    assert methods.known("lorm", found).command == "fedsim run fashion lorm"


def test_a_run_that_stands_in_two_tables_counts_once(tmp_path: Path) -> None:
    """A tuned method that stays its preset, say."""
    whole, few = table(tmp_path / "fashion.csv"), table(tmp_path / "tuned.csv", seeds=1)
    assert len(few) < len(whole) == Ledger.of(ledger.read([tmp_path / "fashion.csv", tmp_path / "tuned.csv"])).runs


def test_published_figures_stand_with_their_source(folder: Path, counted: object) -> None:
    head = "stream,method,beta,figure,source,tag\n"
    lines = "cifar100_vit,paper_lorm,0.05,82.76,A paper,read\ncub_vit,joint,,86.04,A paper,read\n"
    (folder / "published.csv").write_text(head + lines)
    (folder / "published.yaml").write_text("results: {fashion: fashion.csv}\npublished: published.csv\noutput: published.html\n")
    text = ledger.write(ledger.read([folder / "published.yaml"])).path.read_text(encoding="utf-8")
    assert "<code>fedsim run cifar100_vit paper_lorm partition.alpha=0.05</code>" in text
    assert text.count(">not run here</td>") == 2
    assert text.count(">A paper (read)</td>") == 2
    (folder / "published.csv").write_text(f"{head}cifar100_vit,paper_lorm,0.05,82.76,,read\n")
    with pytest.raises(DataError, match=r"published\.csv, line 2: source is empty"):
        ledger.read([folder / "published.yaml"])


def test_families_look_different() -> None:
    many = [f"family {i}" for i in range(40)]
    assert len(set(charts.looks(many).values())) == 40


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("title: x\n", "results names no table"),
        ("results: {a: fashion.csv}\nbounds: {ncm: ncn}\n", "no run is of the method 'ncn'. Did you mean 'ncm'"),
        ("results: {a: fashion.csv}\nbounds: {nmc: ncm}\n", "unknown key 'bounds.nmc'. Did you mean 'ncm'"),
        ("results: {a: fashion.csv}\nbaselines: [fedavgg]\n", "no run is of the method 'fedavgg'. Did you mean 'fedavg'"),
        ("results: {a: fashion.csv}\nstreams: {b: x}\n", "streams.b is in no results"),
        ("results: {a: fashion.csv}\ntitel: x\n", "unknown key 'titel'"),
    ],
)
def test_a_yaml_that_is_wrong_says_where(folder: Path, counted: object, yaml: str, said: str) -> None:
    (folder / "wrong.yaml").write_text(yaml)
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        ledger.read([folder / "wrong.yaml"])


def test_a_table_that_lacks_something_says_what(tmp_path: Path) -> None:
    frame = table(tmp_path / "a.csv")
    frame.drop(columns=["partition_hash", "dirichlet_alpha"]).to_csv(tmp_path / "b.csv")
    with pytest.raises(DataError, match=r"b\.csv has no column partition_hash, dirichlet_alpha: write it with fedsim results"):
        ledger.read([tmp_path / "b.csv"])
    with pytest.raises(DataError, match="cannot be read"):
        ledger.read([tmp_path / "c.csv"])
    pd.concat([frame, frame]).to_csv(tmp_path / "twice.csv")
    with pytest.raises(
        ConfigError, match=r"twice\.csv: ncm on the split 0\.1 holds 2 runs of seed 0 \(ncm0\.10, ncm0\.10\): leave one"
    ):
        ledger.read([tmp_path / "twice.csv"])
    frame.rename(columns={"method": "rule"}).to_csv(tmp_path / "rules.csv")  # an axis by another usual name
    assert set(ledger.read([tmp_path / "rules.csv"]).streams[0].frame["method"]) == {*LEVELS}
    (tmp_path / "x").mkdir()
    with pytest.raises(ConfigError, match="two streams would be called 'a'"):
        ledger.read([tmp_path / "a.csv", tmp_path / "x" / ".." / "a.csv"])


@pytest.mark.parametrize(("axis", "levels"), [("client.epochs", (1, 5)), ("partition.clients", (10, 100))])
def test_what_is_no_seed_is_never_averaged_over(tmp_path: Path, axis: str, levels: tuple[int, int]) -> None:
    """Neither where both settings have all seeds, nor where each has one of them."""
    frame = table(tmp_path / "a.csv", seeds=2)
    both = pd.concat([frame.assign(**{axis: level}) for level in levels])
    each = frame.assign(**{axis: [levels[seed] for seed in frame["seed"]]})
    for name, part in (("both", both), ("each", each)):
        part.insert(2, axis, part.pop(axis))
        part.to_csv(tmp_path / f"{name}.csv", index=False)
        said = (
            rf"{name}\.csv: ncm on the split 0\.1 has runs of several settings, with {axis} {levels[0]}, {levels[1]}: leave one"
        )
        with pytest.raises(ConfigError, match=said):
            ledger.read([tmp_path / f"{name}.csv"])


def test_splits_that_no_dirichlet_made_have_their_names(tmp_path: Path) -> None:
    frame = table(tmp_path / "a.csv")
    parts = [frame.assign(**{"partition.name": frame["partition.name"], "partition.classes_per_client": np.nan})]
    for count in (1, 2):
        part = frame[frame["dirichlet_alpha"] == 0.1].assign(dirichlet_alpha=np.nan)
        parts.append(part.assign(**{"partition.name": "pathological", "partition.classes_per_client": count}))
    mixed = pd.concat(parts)
    mixed.insert(3, "partition.classes_per_client", mixed.pop("partition.classes_per_client"))
    mixed.to_csv(tmp_path / "mixed.csv", index=False)
    found = Ledger.of(ledger.read([tmp_path / "mixed.csv"]))
    named = ["pathological classes_per_client=1", "pathological classes_per_client=2"]
    assert found.splits == {"mixed": ["0.1", "0.5", *named]}
    assert {s.method for s in found.settings if s.split == ANY} == {"joint"}
    assert {s.seeds for s in found.settings} == {3}
    silent = mixed.drop(columns=[c for c in mixed if c.startswith("partition.")])
    silent.to_csv(tmp_path / "silent.csv", index=False)
    with pytest.raises(
        DataError, match=r"silent\.csv: no column partition\.\* tells how the data of a run without an α, of joint,"
    ):
        ledger.read([tmp_path / "silent.csv"])
    alike = silent[silent["dirichlet_alpha"].isna()].drop_duplicates(["method", "seed"])
    alike.to_csv(tmp_path / "alike.csv", index=False)
    assert Ledger.of(ledger.read([tmp_path / "alike.csv"])).splits == {"alike": [study.ALIKE]}


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def page(folder: Path, counted: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    table(folder / "intents.csv", {"lorm": HOSTILE})
    return ledger.write(ledger.read([folder / "fashion.csv", folder / "intents.csv"]), folder / "ledger.html").path


def test_the_command_says_what_it_wrote(folder: Path, counted: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ledger", str(folder / "fashion.csv"), "--output", str(folder / "command.html")]) == 0
    assert "command.html: " in (said := capsys.readouterr().out)
    assert "6 methods, 33 runs" in said


def test_ids_links_and_names(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    elements = Elements(text)
    ids = [str(a["id"]) for _, a in elements.found if "id" in a]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for a in elements.all("a")} <= set(ids)
    assert (len(elements.all("script")), len(elements.all("img"))) == (4, 0)
    assert "window.hacked = 1</script>" not in text
    assert "http" not in next(str(a["content"]) for a in elements.all("meta") if "default-src" in str(a.get("content")))
    assert page.stat().st_size < 1_300_000


@pytest.fixture
def opened(visit: Callable[..., Any], page: Path) -> Iterator[Opened]:
    with visit(page, color_scheme="light") as found:
        yield found
        assert found.complaints == []
        assert found.requests == [page.as_uri()]
        assert found.page.evaluate("window.hacked") is None


def rows(opened: Opened) -> list[str]:
    return [
        name for row in opened.page.locator("#table tbody tr:visible").all() for name in [str(row.get_attribute("data-method"))]
    ]


def test_filters_sorting_and_charts(opened: Opened) -> None:
    page = opened.page
    assert rows(opened) == ["joint", "ranpac", "er", "ncm", "lorm", "fedavg"]
    assert page.locator("ul.bounds:visible").all_inner_texts()[0].split("\n")[:3] == [
        "fashion, α = 0.1:",
        "chance 10.0",
        "nearest class mean 62.8",
    ]
    assert [opened.marks(name) for name in ("ranking", "bytes", "seconds")] == [6, 5, 5]  # joint training is no point of a front
    # The front: of what costs less, nothing is as good. By brute force over the settings.
    cost, level = MEGABYTES, LEVELS
    others = [m for m in level if m != "joint"]
    best = {m for m in others if not any(cost[o] <= cost[m] and level[o] > level[m] for o in others)}
    assert set(opened.texts("bytes")) == best == {"ncm", "ranpac"}
    head = page.get_by_role("button", name="MB up")
    head.focus()
    page.keyboard.press("Enter")
    assert rows(opened) == ["joint", "ncm", "ranpac", "er", "fedavg", "lorm"]
    page.keyboard.press("Enter")
    assert rows(opened)[0] == "lorm"
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("MB up")
    page.select_option("#family", "rehearsal")
    opened.settle()
    assert rows(opened) == ["er"]
    assert opened.marks("ranking") == 1
    page.select_option("#family", "")
    page.select_option("#sees", methods.STATISTICS)
    opened.settle()
    assert rows(opened) == ["lorm", "ranpac"]
    page.select_option("#sees", "")
    page.fill("#search", "replay")
    assert rows(opened) == ["er"]
    assert page.locator("#count").inner_text() == "1 of 7 methods shown."
    assert page.locator("details.run:visible").count() == 1


def test_streams_splits_files_and_folds(opened: Opened) -> None:
    page = opened.page
    page.select_option("#stream", "intents")
    opened.settle()
    assert HOSTILE in rows(opened)
    page.select_option("#split", "0.5")
    opened.settle()
    assert page.locator("#figure-ranking .chosen").inner_text() == "intents, α = 0.5"
    with page.expect_download() as download:
        page.click("#csv")
    lines = list(csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"))))
    assert lines[0][:3] == ["Method", "Seeds", "Final average accuracy"]
    assert sorted(line[0] for line in lines[1:]) == sorted(rows(opened))
    page.click("#table tr:visible a:text-is('er')")
    page.wait_for_selector("#method-er[open] .chart svg")
    page.wait_for_selector("#method-er [data-kind=final] svg")
    for kind in ("curve", "final"):  # three tasks, two splits
        assert page.locator(f"#method-er [data-kind={kind}] .mark-symbol.role-mark path").count() == 6
    assert page.locator("#method-er pre").first.inner_text().strip()


def test_on_a_phone_and_in_the_dark(visit: Callable[..., Any], page: Path) -> None:
    with visit(page, width=390, color_scheme="dark") as opened:
        assert opened.page.evaluate("document.documentElement.scrollWidth") == 390
        assert opened.colour() == "rgb(15, 17, 21)"
        opened.page.locator("#method-er summary").click()
        opened.page.wait_for_selector("#method-er[open] .chart svg")
        assert opened.page.evaluate("document.documentElement.scrollWidth") == 390
        assert opened.complaints == []
