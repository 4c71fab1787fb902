"""Runs that are known by their rows in a table: they count like those that lie there, to the last bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsim import report
from fedsim.core.errors import ConfigError, DataError, RunDirError
from fedsim.core.home import ROOT
from fedsim.runs import compare, known, tables
from fedsim.runs.collection import Entry, SweepRecord, collect
from fedsim.runs.metrics import HEADLINE
from tests import run_dirs
from tests.run_dirs import method, write_run
from tests.tiny import tiny


def table(path: Path, *folders: Path) -> Path:
    """What `fedsim results` writes of these."""
    path.write_text(tables.to_csv(collect(folders).frame()))
    return path


def cut(folder: Path, record: SweepRecord, keep: Callable[[int], bool]) -> Path:
    """The folder without the runs at some places."""
    for i, entry in enumerate(record.runs):
        if not keep(i):
            shutil.rmtree(folder / entry.folder)
    return folder


@pytest.mark.parametrize(
    "keep", [lambda i: i % 2 == 0, lambda i: i < 3, lambda i: i > 10, lambda i: False], ids=["half", "first", "last", "none"]
)
def test_part_of_a_sweep_and_a_table_of_the_rest(tmp_path: Path, keep: Callable[[int], bool]) -> None:
    """Its table, statistics and differences are those of all runs in one folder, to the last digit."""
    record = run_dirs.write_sweep(tmp_path / "all")
    whole = collect([tmp_path / "all"])
    shutil.copytree(tmp_path / "all", tmp_path / "a")
    shutil.copytree(tmp_path / "all", tmp_path / "b")
    rest = table(tmp_path / "rest.csv", cut(tmp_path / "b", record, lambda i: not keep(i)))
    found = collect([cut(tmp_path / "a", record, keep), rest])
    assert (found.absent, found.others, found.factors, found.unlike) == ((), 0, whole.factors, whole.unlike)
    assert (len(found.runs), len(found.members)) == (sum(map(keep, range(12))), 12)
    assert tables.to_csv(found.frame()) == tables.to_csv(whole.frame())
    by = [*whole.factors]
    for count in (
        lambda f: compare.summary(f, by, [HEADLINE, "bytes_up"]),
        lambda f: compare.paired(f, by, {"method": "fedavg"}, [HEADLINE]),
    ):
        assert count(found.frame()).to_csv() == count(whole.frame()).to_csv()
    assert str(found).splitlines()[0] == "<Collection 'study', 12 runs>"


def test_a_table_alone(tmp_path: Path) -> None:
    """Without any run: the axes are those that the table's sweep named, then keys of configs that tell more runs apart."""
    run_dirs.write_sweep(tmp_path / "all")
    whole = collect([tmp_path / "all"])
    found = collect([table(tmp_path / "results.csv", tmp_path / "all")])
    assert found.factors == {"alpha": (0.1, 0.5), "method": ("fedavg", "lorm")}
    assert (found.folder, found.sweep, len(found.known)) == ("results", None, 12)
    ours, theirs = (sorted(tables.to_csv(frame[[*whole.frame()]]).splitlines()) for frame in (found.frame(), whole.frame()))
    assert ours == theirs


def test_keys_tell_runs_apart_where_no_sweep_named_any(tmp_path: Path) -> None:
    for rule in ("lorm", "fedavg"):
        for seed in (0, 1):
            write_run(tmp_path / "runs", method(rule, seed))
    found = collect([table(tmp_path / "results.csv", tmp_path / "runs")])
    assert found.factors == {"server.aggregator.name": ("fedavg", "lorm")}
    assert found.frame()["seed"].tolist() == [0, 1, 0, 1]


def test_a_run_that_lies_there_is_read(tmp_path: Path) -> None:
    """Whatever a table says of it."""
    record = run_dirs.write_sweep(tmp_path / "all", seeds=1, alphas=(0.5,))
    frame = collect([tmp_path / "all"]).frame()
    path = tmp_path / "other.csv"
    path.write_text(tables.to_csv(frame.assign(**{HEADLINE: 99.0})))
    assert collect([tmp_path / "all", path]).frame()[HEADLINE].tolist() == frame[HEADLINE].tolist()
    shutil.rmtree(tmp_path / "all" / record.runs[0].folder)
    assert collect([tmp_path / "all", path]).frame()[HEADLINE].tolist() == [99.0, frame[HEADLINE].iloc[1]]


def test_rows_of_other_sweeps_are_others(tmp_path: Path) -> None:
    run_dirs.write_sweep(tmp_path / "all", seeds=2)
    wide = table(tmp_path / "wide.csv", tmp_path / "all")
    run_dirs.write_sweep(tmp_path / "small", seeds=1)
    found = collect([tmp_path / "small", wide])
    assert (len(found.members), len(found.known), found.others) == (4, 0, 4)


def test_a_failed_run_that_a_table_knows_is_not_absent(tmp_path: Path) -> None:
    record = run_dirs.write_sweep(tmp_path / "all", seeds=1)
    rows = table(tmp_path / "rows.csv", tmp_path / "all")
    (tmp_path / "all" / record.runs[0].folder / "rounds.csv").unlink()
    shutil.rmtree(tmp_path / "all" / record.runs[1].folder)
    found = collect([tmp_path / "all", rows])
    assert (found.absent, len(found.known)) == ((), 2)


def test_keys_that_a_table_has_not_are_those_of_the_other_runs(tmp_path: Path) -> None:
    """A table has a column for the keys in which its runs differ; of the others it says nothing, which is no difference."""
    record = run_dirs.write_sweep(tmp_path / "all", seeds=2)
    whole = collect([tmp_path / "all"])
    of_lorm = [entry for entry in record.runs if entry.labels["method"] == "lorm"]
    shutil.copytree(tmp_path / "all", tmp_path / "b")
    rows = table(tmp_path / "rows.csv", cut(tmp_path / "b", record, lambda i: record.runs[i] in of_lorm))
    assert "server.aggregator.name" not in rows.read_text().splitlines()[0]
    found = collect([cut(tmp_path / "all", record, lambda i: record.runs[i] not in of_lorm), rows])
    assert found.unlike == whole.unlike == ("partition.alpha",)
    assert "server.aggregator.name" not in found.varying
    assert found.frame()[HEADLINE].tolist() == whole.frame()[HEADLINE].tolist()


def test_whole_numbers_that_a_table_has_as_floats_are_the_same(tmp_path: Path) -> None:
    """A key that some runs of a table do not have makes a column of floats: 100000.0 is no other value than 100000."""
    configs = [method("fedavg", 0), method("fedavg", 1), tiny("server.aggregator=fedavg", "seed=2", "partition=iid")]
    whole = [write_run(tmp_path / "all", config) for config in configs]
    rows = table(tmp_path / "rows.csv", whole[0], whole[2])
    assert "100000.0" in rows.read_text()
    entries = [Entry(config.identity(), {"seed": i}) for i, config in enumerate(configs[:2])]
    SweepRecord("s", {"seed": (0, 1)}, tuple(entries)).save(tmp_path / "here")
    write_run(tmp_path / "here", configs[1])
    found = collect([tmp_path / "here", rows])
    assert (len(found.runs), len(found.known), found.unlike, [*found.varying]) == (1, 1, (), ["seed"])


def test_a_hash_of_decimal_digits_stays_a_text(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"run,method,seed,partition_hash,{HEADLINE}\n0012345678901234,lorm,0,12345678901234e5,50.0\n")
    (row,) = known.read([path]).values()
    assert (row.run, row.split, row.seed, row.levels) == ("0012345678901234", "12345678901234e5", 0, {"method": "lorm"})
    assert row.metrics == {HEADLINE: 50.0}
    assert row.made == {"version": "", "processor": ""}


def test_what_made_a_run_stays_with_its_row(tmp_path: Path) -> None:
    """Beside runs at hand, and whatever the text looks like; an older table, which does not say, is read."""
    run_dirs.write_sweep(tmp_path / "all", seeds=1)
    frame = collect([tmp_path / "all"]).frame()
    assert set(frame["processor"]) != {""}
    path = tmp_path / "t.csv"
    path.write_text(tables.to_csv(frame.assign(version="0.9", processor="7e1")))
    told = collect([path]).frame()
    assert (set(told["version"]), set(told["processor"])) == ({"0.9"}, {"7e1"})
    path.write_text(tables.to_csv(frame.drop(columns=[*known.MADE])))
    assert set(collect([path]).frame()["processor"]) == {""}


@pytest.mark.parametrize("study", ["continual", "heterogeneity", "methods"])
def test_the_committed_tables_come_back(study: str) -> None:
    path = Path(ROOT, "experiments", study, "results.csv")
    lines = path.read_text().splitlines()
    frame = collect([path]).frame()[lines[0].split(",")]
    assert sorted(frame.to_csv(index=False, lineterminator="\n").splitlines()) == sorted(lines)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "gone.csv cannot be read: FileNotFoundError"),
        ("", "gone.csv is empty: write the table again"),
        ("method,accuracy\nlorm,50\n", f"has no column run, partition_hash, seed, {HEADLINE}: write it with fedsim results RUNS"),
        (f"run,method,seed,partition_hash,{HEADLINE}\nab,lorm,,cd,50\n", "a row has no seed: write it with fedsim results RUNS"),
        (f"run,method,seed,partition_hash,{HEADLINE}\nab,lorm,x,cd,50\n", "a row has no seed: write it with fedsim results RUNS"),
    ],
)
def test_what_is_no_table(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "gone.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        collect([tmp_path / "gone.csv"])


def test_a_table_beside_runs_of_no_sweep(tmp_path: Path) -> None:
    rows = table(tmp_path / "rows.csv", run_dirs.write_sweep(tmp_path / "all", seeds=1) and tmp_path / "all")
    write_run(tmp_path / "runs", tiny())
    for paths, words in (((tmp_path / "runs", rows), {}), ((tmp_path / "all", rows), {"everything": True})):
        with pytest.raises(RunDirError, match=r"rows\.csv beside .*: only the record of their sweep says .* or the table alone"):
            collect(paths, **words)


def test_a_report_draws_from_run_directories(tmp_path: Path) -> None:
    run_dirs.write_sweep(tmp_path / "all", seeds=1)
    found: Any = collect([table(tmp_path / "rows.csv", tmp_path / "all")])
    with pytest.raises(ConfigError, match=r"4 runs are known by their rows in .*rows\.csv only: a report draws from run"):
        report.write(found, tmp_path / "rows.csv" / "report.html")  # where the command would put it
