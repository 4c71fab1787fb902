"""fedsim results: what is printed, which files are written, and what is said about runs that are not in them."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from fedsim import cli
from fedsim.runs import compare
from fedsim.runs.collection import collect
from tests import run_dirs
from tests.run_dirs import method, write_run
from tests.tiny import tiny

Printed = Callable[..., str]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full sweep: 2 methods × 2 α × 3 seeds."""
    folder = tmp_path_factory.mktemp("study")
    run_dirs.write_sweep(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one α and one seed."""
    folder = tmp_path_factory.mktemp("small")
    run_dirs.write_sweep(folder, seeds=1, alphas=(0.5,))
    return folder


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Printed:
    """What the command prints at a width; it must succeed."""

    def call(*words: object, width: int = 100) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        code = cli.main(["results", *map(str, words)])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return out

    return call


def row(text: str, *starts: str) -> str:
    """The first line with these words in front."""
    return next(line for line in text.splitlines() if line.split()[: len(starts)] == list(starts))


def test_the_table_holds_the_statistics(study: Path, printed: Printed) -> None:
    text = printed(study)
    frame = collect([study]).frame()
    values = frame.loc[(frame["method"] == "lorm") & (frame["alpha"] == 0.5), "final_average_accuracy"]
    long = compare.summary(frame, ["method", "alpha"], ["final_average_accuracy"])
    low, high = long.loc[(long["method"] == "lorm") & (long["alpha"] == 0.5), ["low", "high"]].iloc[0]
    assert text.startswith("study: 12 runs, 4 settings")
    assert f" 3  {values.mean():.1f} ± {values.std():.1f} [{low:.1f}, {high:.1f}]  " in row(text, "lorm", "0.5")
    assert [line.split()[:2] for line in text.splitlines()[4:8]] == [
        ["lorm", "0.1"],
        ["lorm", "0.5"],
        ["fedavg", "0.1"],
        ["fedavg", "0.5"],
    ]
    for silent in ("Not in the data", "unequal", "left out", "difference"):
        assert silent not in text


@pytest.mark.parametrize("width", [50, 80, 100, 160])
def test_tables_keep_to_the_width(study: Path, printed: Printed, width: int) -> None:
    text = printed(study, "--baseline", "method=fedavg", "--metrics", "faa,aia,bwt,forgetting,plasticity,bytes_up", width=width)
    tables = [line for line in text.splitlines() if line and not line.startswith(("Mean ±", "Differences run by run"))]
    assert max(map(len, tables)) <= width
    assert "…" not in text  # nothing is cut
    assert text.count("±") == 4 * 6 + 2 * 6 + 1


def test_paired_differences(study: Path, printed: Printed) -> None:
    text = printed(study, "--metrics", "faa", "--baseline", "method=fedavg", "--digits", 2)
    table = compare.paired(collect([study]).frame(), ["method", "alpha"], {"method": "fedavg"}, ["final_average_accuracy"])
    part = text.partition("FAA ↑: difference from method=fedavg")[2]
    for alpha, record in zip(("0.1", "0.5"), table.to_dict("records"), strict=True):
        line = row(part, "lorm", alpha)
        assert line.split()[2:] == [
            "3", f"+{record['difference']:.2f}", "±", f"{record['std']:.2f}", f"[{record['low']:.2f},", f"{record['high']:.2f}]",
            f"{record['p']:.3f}", f"{record['p_holm']:.3f}", "0.250", "3/3",
        ]  # fmt: skip
    assert "fedavg" not in part.partition("Differences run by run")[0].partition("\n")[2]
    assert "With 3 pairs sign-flip cannot go below 0.25." in text
    assert "unpaired" not in text


def test_an_interval_ends_where_the_metric_does(tmp_path: Path, printed: Printed) -> None:
    """Two seeds far apart: Student's interval of their mean would be −458 to 558, and of a difference as wide."""
    for seed, accuracy in enumerate((10, 90)):
        write_run(tmp_path, method("lorm", seed), ((accuracy,), (accuracy, accuracy)))
        write_run(tmp_path, method("fedavg", seed), ((50,), (50, 50 + seed)))
    text = printed(tmp_path, "--metrics", "faa", "--baseline", "server.aggregator.name=fedavg")
    means, differences = text.split("difference from")
    assert "50.0 ± 56.6 [0.0, 100.0]" in means and "[47.1, 53.4]" in means
    assert "[−100.0, 100.0]" in differences


def test_what_is_absent_is_said(study: Path, tmp_path: Path, printed: Printed) -> None:
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    record = collect([folder]).sweep
    assert record is not None
    gone = next(e for e in record.runs if e.labels == {"method": "fedavg", "alpha": 0.1, "seed": 2})
    harmed = next(e for e in record.runs if e.labels == {"method": "lorm", "alpha": 0.5, "seed": 0})
    shutil.rmtree(folder / gone.folder)
    (folder / harmed.folder / "rounds.csv").write_text("")
    write_run(folder, tiny("seed=9"))
    text = printed(folder, "--baseline", "method=fedavg", width=120)
    assert "study: 10 runs" in text
    assert "Seeds are unequal:\n  lorm" not in text
    assert "  method=lorm alpha=0.5 lacks seed 0\n  method=fedavg alpha=0.1 lacks seed 2\n" in text
    assert "Not in the data, 2 in all:\n  method=lorm alpha=0.5 seed=0: damaged, left out: " in text
    assert "  method=fedavg alpha=0.1 seed=2: not run yet: start the sweep again\n" in text
    assert text.endswith("1 other finished run lies there, left out (--all takes every run).\n")
    assert row(text, "fedavg", "0.1").split()[2] == "2"
    assert row(text.partition("difference from")[2], "lorm", "0.5").split()[2:4] == ["2", "1"]  # pairs, unpaired
    assert printed(folder, "--all").startswith("11 runs, 4 settings")


def test_many_absent_runs_are_counted(tmp_path: Path, printed: Printed) -> None:
    run_dirs.sweep(tmp_path, seeds=6)
    write_run(tmp_path, method("lorm", 0, 0.1))
    lines = printed(tmp_path).splitlines()
    start = lines.index("Not in the data, 23 in all:")
    assert len(lines[start + 1 :]) == 11
    assert lines[-1] == "  and 13 more"


def test_one_run(tmp_path: Path, printed: Printed) -> None:
    path = write_run(tmp_path, tiny())
    text = printed(path)
    assert text.splitlines()[0].strip() == "1 run, 1 setting"
    assert text.splitlines()[3].split() == ["1", "65.0", "77.5", "30.0"]


def test_several_sweeps_are_named(small: Path, tmp_path: Path, printed: Printed) -> None:
    folder = tmp_path / "study"
    shutil.copytree(small, folder)
    run_dirs.SweepRecord("smaller", {"seed": (0,)}, (run_dirs.Entry(method("lorm", 0).identity(), {"seed": 0}),)).save(folder)
    assert "The sweeps smaller, study lie there: all runs are taken (--sweep NAME takes those of one)." in printed(folder)
    text = printed(folder, "--sweep", "smaller")
    assert text.startswith("smaller: 1 run, 1 setting")
    assert "1 other finished run lies there" in text


def test_runs_of_one_seed_in_one_setting_are_noted(tmp_path: Path, printed: Printed) -> None:
    """Data in a file that was changed between two runs: the config cannot tell them apart."""
    entries = [run_dirs.Entry(tiny(f"client.lr={lr}").identity(), {"method": "lorm", "seed": 0}) for lr in (0.1, 0.2)]
    run_dirs.SweepRecord("s", {"method": ("lorm",), "seed": (0,)}, tuple(entries)).save(tmp_path)
    for lr in (0.1, 0.2):
        write_run(tmp_path, tiny(f"client.lr={lr}"))
    assert "method=lorm holds runs of the same seed, and their mean counts every one." in printed(tmp_path)


def test_a_table_says_in_its_head_that_its_rows_are_not_of_the_same_data(tmp_path: Path, small: Path, printed: Printed) -> None:
    for rule, classes in (("lorm", 6), ("fedavg", 8)):
        write_run(tmp_path, method(rule, 0, data={"classes": classes}))
    said = "Rows differ in their data or split: data.classes."
    assert printed(tmp_path).splitlines()[1].strip() == said
    assert printed(tmp_path, "--markdown", "-").startswith(f"{said}\n\n| ")
    assert printed(tmp_path, "--latex", "-").startswith(f"% {said}\n% Mean")
    assert "Rows differ" not in printed(small)


def test_splits_that_no_key_tells_apart_are_said(tmp_path: Path, printed: Printed) -> None:
    for rule, split in (("lorm", "a"), ("fedavg", "b")):
        write_run(tmp_path, method(rule, 0), split=split * 64)
    assert "Rows differ in their data or split: split." in printed(tmp_path).splitlines()[1]


def test_long_settings_have_one_column(tmp_path: Path, printed: Printed) -> None:
    for rule in ("lorm", "fedavg"):
        for alpha in (0.1, 0.5):
            write_run(tmp_path, method(rule, 0, alpha))
    text = printed(tmp_path, width=80)
    assert text.splitlines()[1].rstrip() == "Rows differ in their data or split: partition.alpha."
    assert text.splitlines()[2].split()[0] == "setting"
    joined = "".join(line[:30].strip() for line in text.splitlines())
    assert "server.aggregator.name=" in joined


def test_labels_are_no_markup(tmp_path: Path, printed: Printed) -> None:
    entry = run_dirs.Entry(tiny().identity(), {"method": "[red]x[/red]", "seed": 0})
    run_dirs.SweepRecord("s", {"method": ("[red]x[/red]",), "seed": (0,)}, (entry,)).save(tmp_path)
    write_run(tmp_path, tiny())
    assert "[red]x[/red]" in printed(tmp_path)


# ---------------------------------------------------------------- files


def test_files(small: Path, tmp_path: Path, printed: Printed) -> None:
    names = {kind: tmp_path / f"out.{kind}" for kind in ("csv", "parquet", "markdown", "latex")}
    text = printed(small, *(word for kind, path in names.items() for word in (f"--{kind}", path)), "--rows", "alpha")
    for kind, path in names.items():
        assert f"{kind}: {path}\n" in text
    records = list(csv.DictReader(io.StringIO(names["csv"].read_text())))
    assert (len(records), "path" in records[0]) == (2, False)
    assert len(pd.read_parquet(names["parquet"])) == 2
    assert names["markdown"].read_text().startswith("| alpha | FAA ↑, method = lorm | AIA ↑, method = lorm | forgetting ↓, ")
    assert names["latex"].read_text().splitlines()[3].startswith(" & \\multicolumn{3}{c}{method = lorm}")
    printed(small, "--csv", names["csv"], "--with-path")
    assert str(small) in names["csv"].read_text()


@pytest.mark.parametrize(
    ("kind", "start"), [("csv", "run,method,alpha,"), ("markdown", "| method | FAA ↑,"), ("latex", "% Mean ±")]
)
def test_a_dash_is_the_standard_output_and_nothing_else(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, start: str
) -> None:
    other = "markdown" if kind == "csv" else "csv"
    assert cli.main(["results", str(small), f"--{kind}", "-", f"--{other}", str(tmp_path / "other")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(start)
    assert "study:" not in out
    assert err == f"fedsim: {other}: {tmp_path / 'other'}\n"
    assert cli.main(["results", str(small), f"--{kind}", str(tmp_path / "file")]) == 0
    assert (tmp_path / "file").read_text() == out


def test_plain_when_piped(small: Path) -> None:
    words = [sys.executable, "-m", "fedsim.cli", "results", str(small)]
    done = subprocess.run(words, capture_output=True, check=True, cwd=Path(cli.__file__).parents[2], env={"COLUMNS": "100"})
    assert b"\x1b" not in done.stdout
    assert "lorm    0.5    1" in done.stdout.decode()


# ---------------------------------------------------------------- joint


def test_gap_to_joint(tmp_path: Path, printed: Printed) -> None:
    """FAA 90 of the joint run against 65: the gap is 25 points in every run."""
    for seed in (0, 1):
        write_run(tmp_path / "runs", tiny(f"seed={seed}"), ((90,), (60, 70)))
        write_run(tmp_path / "joint", tiny(f"seed={seed}", "server.rounds=9"), ((90,), (91, 89)))
    text = printed(tmp_path / "runs", "--joint", tmp_path / "joint", width=160)
    assert "gap to joint ↓" in text.splitlines()[1]
    assert "25.0 ± 0.0 [25.0, 25.0]" in text
    assert "10.0 ± 0.0 [10.0, 10.0]" in text  # intransigence: (91 − 90 + 89 − 70) / 2
    assert printed(tmp_path / "runs", "--joint", tmp_path / "joint", "--metrics", "gap").count("±") == 2


def test_a_joint_run_that_does_not_fit_is_said(tmp_path: Path, printed: Printed) -> None:
    write_run(tmp_path / "runs", tiny(), ((90,), (60, 70)))
    write_run(tmp_path / "joint", tiny("data.classes=12"), ((90,), (91, 89)))
    text = printed(tmp_path / "runs", "--joint", tmp_path / "joint")
    assert "gap to joint" not in text.partition("Mean ±")[0]
    assert "1 of 1 runs have no gap to joint: no joint run was tested on the same samples." in text


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--metrics", "final_average_acuracy"],
            "unknown metric 'final_average_acuracy'. Did you mean 'final_average_accuracy'?",
        ),
        (["--metrics", "method"], "unknown metric 'method'."),
        (["--metrics", "gap"], "metric 'gap' needs a joint run: give --joint PATH"),
        (["--metrics", ","], "--metrics names none"),
        (["--baseline", "fedavg"], "--baseline fedavg: it must look like FACTOR=LEVEL, e.g. method=fedavg"),
        (["--baseline", "metod=fedavg"], "'metod' is no factor of these runs. Did you mean 'method'?"),
        (["--baseline", "method=fedagv"], "no run has method=fedagv. Did you mean 'fedavg'?"),
        (["--baseline", "method=lorm", "--baseline", "method=fedavg"], "--baseline names method twice"),
        (["--rows", "metod", "--latex", "-"], "rows: 'metod' is no factor of these runs. Did you mean 'method'?"),
        (["--sweep", "studdy"], "no sweep 'studdy' in "),
        (["--sweep", "study", "--all"], "give one of the two"),
        (["--digits", "-1"], "--digits must not be negative, got -1"),
        (["--parquet", "-"], "Parquet is no text, name a file"),
        (["--csv", "-", "--latex", "-"], "only one of --csv, --markdown and --latex can go to the standard output"),
        (["--joint", "nowhere"], "no folder "),
    ],
)
def test_bad_input_is_one_line(small: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["results", str(small), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["results", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"fedsim: error: no finished run in {tmp_path}\n"
    assert cli.main(["results", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == f"fedsim: error: no folder {tmp_path / 'x'}\n"


def test_a_file_that_cannot_be_written(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["results", str(small), "--csv", str(tmp_path / "no" / "x.csv")]) == 1
    assert "x.csv could not be written: No such file or directory" in capsys.readouterr().err
