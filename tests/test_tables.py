"""Tables and files for others: every character that a paper would take over."""

from __future__ import annotations

import csv
import io
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedsim.core.errors import ConfigError
from fedsim.runs import compare, metrics, tables
from fedsim.runs.collection import collect
from tests import run_dirs

FAA = metrics.HEADLINE


def long(*rows: tuple[object, ...], by: tuple[str, ...] = ("method", "alpha")) -> pd.DataFrame:
    """(levels…, metric, n, mean, std)"""
    return pd.DataFrame([(*row, 0.0, 0.0) for row in rows], columns=[*by, *compare.SUMMARY])


TWO = long(
    ("lorm", 0.5, FAA, 3, 59.24, 1.41), ("lorm", 0.5, "forgetting", 3, 12.2, 1.8),
    ("lorm", 0.1, FAA, 3, 40.2, 1.8), ("lorm", 0.1, "forgetting", 3, 18.0, 3.6),
    ("fed_avg", 0.1, FAA, 2, 36.4, 2.7), ("fed_avg", 0.1, "forgetting", 1, -0.04, math.nan),
)  # fmt: skip


def test_markdown() -> None:
    assert tables.to_markdown(TWO, levels={"alpha": (0.1, 0.5)}) == (
        "| method | FAA ↑, alpha = 0.1 | forgetting ↓, alpha = 0.1 | FAA ↑, alpha = 0.5 | forgetting ↓, alpha = 0.5 |\n"
        "|---|---:|---:|---:|---:|\n"
        "| lorm | **40.2 ± 1.8** | 18.0 ± 3.6 | 59.2 ± 1.4 | 12.2 ± 1.8 |\n"
        "| fed_avg | 36.4 ± 2.7 (n=2) | **0.0** (n=1) | – | – |\n"
        "\n"
        "Mean ± standard deviation over 3 runs unless said otherwise; best in bold; FAA: final average accuracy.\n"
    )


def test_latex() -> None:
    assert tables.to_latex(TWO, rows="method", digits=2, levels={"alpha": (0.1, 0.5)}) == (
        "% Mean ± standard deviation over 3 runs unless said otherwise; best in bold; FAA: final average accuracy.\n"
        "\\begin{tabular}{lrrrr}\n"
        "\\toprule\n"
        " & \\multicolumn{2}{c}{alpha = 0.1} & \\multicolumn{2}{c}{alpha = 0.5} \\\\\n"
        "\\cmidrule(lr){2-3}\\cmidrule(lr){4-5}\n"
        "method & FAA $\\uparrow$ & forgetting $\\downarrow$ & FAA $\\uparrow$ & forgetting $\\downarrow$ \\\\\n"
        "\\midrule\n"
        "lorm & $\\mathbf{40.20 \\pm 1.80}$ & $18.00 \\pm 3.60$ & $59.24 \\pm 1.41$ & $12.20 \\pm 1.80$ \\\\\n"
        "fed\\_avg & $36.40 \\pm 2.70$ (n=2) & $\\mathbf{-0.04}$ (n=1) & -- & -- \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
    )


def test_the_other_factor_may_go_down() -> None:
    lines = tables.to_markdown(TWO[TWO["metric"] == FAA], rows="alpha").splitlines()
    assert lines[0] == "| alpha | FAA ↑, method = lorm | FAA ↑, method = fed_avg |"
    assert lines[2:4] == ["| 0.5 | **59.2 ± 1.4** | – |", "| 0.1 | 40.2 ± 1.8 | 36.4 ± 2.7 (n=2) |"]
    with pytest.raises(ConfigError, match=r"rows: 'metod' is no factor of these runs\. Did you mean 'method'"):
        tables.to_markdown(TWO, rows="metod")


def test_one_factor_and_none() -> None:
    lines = tables.to_markdown(long(("lorm", FAA, 3, 60.0, 1.0), by=("method",))).splitlines()
    assert lines[0] == "| method | FAA ↑ |"
    assert lines[2] == "| lorm | 60.0 ± 1.0 |"  # nothing to be better than
    lines = tables.to_latex(long((FAA, 1, 60.0, math.nan), by=())).splitlines()
    assert lines[0] == "% Mean ± standard deviation over 1 run; FAA: final average accuracy."
    assert lines[3:6] == [" & FAA $\\uparrow$ \\\\", "\\midrule", "all runs & $60.0$ \\\\"]


def test_what_prints_alike_is_equally_good() -> None:
    rows = [("a", FAA, 3, 60.04, 1.0), ("b", FAA, 3, 59.96, 1.0), ("c", FAA, 3, 59.9, 1.0)]
    lines = tables.to_markdown(long(*rows, by=("method",))).splitlines()
    assert lines[2:5] == ["| a | **60.0 ± 1.0** |", "| b | **60.0 ± 1.0** |", "| c | 59.9 ± 1.0 |"]
    lines = tables.to_markdown(long(*rows, by=("method",)), digits=2).splitlines()
    assert [line.count("**") for line in lines[2:5]] == [2, 0, 0]


def test_what_is_not_judged_has_no_best() -> None:
    got = tables.to_markdown(long(("a", "newest_share", 3, 60.0, 1.0), ("b", "newest_share", 3, 59.0, 1.0), by=("method",)))
    assert "**" not in got
    assert "best" not in got
    assert got.startswith("| method | newest share |")


def test_bytes_are_megabytes() -> None:
    got = tables.to_markdown(long(("a", "bytes_up", 3, 45_040_000.0, 0.0), ("b", "bytes_up", 3, 74e6, 0.0), by=("method",)))
    assert got.splitlines()[0] == "| method | bytes up in MB ↓ |"
    assert got.splitlines()[2] == "| a | **45.0 ± 0.0** |"


def test_metrics_with_the_task_known_say_so() -> None:
    assert tables.title("forgetting_task_incremental") == "forgetting (task known) ↓"
    assert tables.title("average_incremental_accuracy") == "AIA ↑"


HOSTILE = r"50% of_A & #1 {x} ~^\|<b>*_"


def test_latex_escapes() -> None:
    line = tables.to_latex(long((HOSTILE, FAA, 3, 60.0, 1.0), by=("method",))).splitlines()[-3]
    assert line == (r"50\% of\_A \& \#1 \{x\} \textasciitilde{}\textasciicircum{}\textbackslash{}|<b>*\_ & $60.0 \pm 1.0$ \\")


def test_markdown_escapes() -> None:
    """Every cell stays a cell, and every mark a character. Read back as GitHub does: split at |, then take back the \\."""
    line = tables.to_markdown(long((HOSTILE, FAA, 3, 60.0, 1.0), by=("method",))).splitlines()[2]
    cells = re.split(r"(?<!\\)\|", line)
    assert len(cells) == 4
    assert re.sub(r"\\([^A-Za-z0-9\s])", r"\1", cells[1].strip()).replace("&amp;", "&") == HOSTILE
    for mark in "*<|":
        assert f"\\{mark}" in line
    assert tables.to_markdown(long(("a\nb", FAA, 3, 60.0, 1.0), by=("method",))).splitlines()[2].startswith("| a b |")


def test_keys_that_are_not_there() -> None:
    rows = [("lorm", 0.1, FAA, 3, 60.0, 1.0), ("fedavg", None, FAA, 3, 59.0, 1.0)]
    lines = tables.to_markdown(long(*rows, by=("rule", "ridge"))).splitlines()
    assert lines[0] == "| rule | FAA ↑, ridge = 0.1 | FAA ↑ |"
    assert lines[3] == "| fedavg | – | 59.0 ± 1.0 |"


# ---------------------------------------------------------------- CSV and Parquet


def test_csv_is_stable_and_exact(tmp_path: Path) -> None:
    run_dirs.write_sweep(tmp_path / "a", seeds=2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    frame = collect([tmp_path / "a"]).frame()
    text = tables.to_csv(frame)
    assert tables.to_csv(collect([tmp_path / "b"]).frame()) == text
    records = list(csv.DictReader(io.StringIO(text)))
    assert list(records[0]) == [c for c in frame.columns if c != "path"]
    for name in ("final_average_accuracy", "forgetting", "alpha", "client_entropy"):
        assert [float(r[name]) for r in records] == frame[name].tolist()
    assert [r["path"] for r in csv.DictReader(io.StringIO(tables.to_csv(frame, path=True)))] == frame["path"].tolist()
    assert "\r" not in text


def test_csv_writes_a_float_as_the_shortest_text_that_gives_it_back() -> None:
    frame = pd.DataFrame({"a": [1 / 3, 1e-5, math.nan, math.inf], "b": [1, 2, 3, 4], "c": ["x", None, "y,z", None], "path": "p"})
    assert tables.to_csv(frame) == 'a,b,c\n0.3333333333333333,1,x\n1e-05,2,\n,3,"y,z"\ninf,4,\n'


def test_parquet_round_trip(tmp_path: Path) -> None:
    run_dirs.write_sweep(tmp_path, seeds=2)
    frame = collect([tmp_path]).frame()
    got = pd.read_parquet(io.BytesIO(tables.to_parquet(frame, path=True)))
    pd.testing.assert_frame_equal(got, frame, check_exact=True)
    assert "path" not in pd.read_parquet(io.BytesIO(tables.to_parquet(frame))).columns


def test_parquet_of_words_and_numbers() -> None:
    frame = pd.DataFrame({"alpha": pd.Series([0.1, "iid", None, 1.0], dtype=object), "path": "p"})
    got = pd.read_parquet(io.BytesIO(tables.to_parquet(frame)))["alpha"]
    assert got.tolist()[:2] + got.tolist()[3:] == ["0.1", "iid", "1"]
    assert got.isna().tolist() == [False, False, True, False]
    assert frame["alpha"].tolist()[0] == 0.1


def test_numbers() -> None:
    assert [tables.number(v, FAA, 1) for v in (-12.345, -0.04, 0.05, 1e3)] == ["−12.3", "0.0", "0.1", "1000.0"]
    assert tables.number(float(np.float64(59.95)), FAA, 0) == "60"
