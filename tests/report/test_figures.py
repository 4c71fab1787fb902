"""The charts: only those that the runs can fill, valid Vega-Lite, the right number of marks, colours that can be told apart."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim import report
from fedsim.core.errors import ConfigError
from fedsim.core.events import Row
from fedsim.report import theme
from fedsim.report.data import Series, Study
from fedsim.report.figures import Drawing, convert, drawings, figures
from fedsim.runs.collection import collect
from fedsim.runs.directory import RunDir
from tests.report.factory import fake_run, invent, split_of
from tests.run_dirs import write_run
from tests.tiny import tiny

ALL = {
    "heterogeneity", "by_task", "by_round", "forgetting_plasticity", "forgetting", "matrices", "cost_accuracy", "bytes",
    "seconds", "drift", "run_tasks", "client_accuracy", "run_matrix", "partition",
}  # fmt: skip
OF_ONE_RUN = ALL - {"heterogeneity", "forgetting_plasticity", "matrices", "cost_accuracy"}


@pytest.fixture(scope="module")
def drawn(study: Study) -> dict[str, Drawing]:
    return {d.name: d for d in drawings(study, figures(study))}


class Pictures(dict[str, str]):
    """Every drawing as SVG, made when it is asked for."""

    def __init__(self, drawn: dict[str, Drawing]) -> None:
        super().__init__()
        self._drawn = drawn

    def __missing__(self, name: str) -> str:
        self[name] = svg(self._drawn[name])
        return self[name]


@pytest.fixture(scope="module")
def pictures(drawn: dict[str, Drawing]) -> Pictures:
    return Pictures(drawn)


def svg(drawing: Drawing) -> str:
    return convert(drawing, "svg").decode()


def marks(text: str, kind: str) -> int:
    """Items of one kind of mark, axes and legends left out."""
    groups = re.findall(rf'<g class="mark-{kind} role-mark[^>]*>(.*?)</g>', text, flags=re.DOTALL)
    return sum(group.count("<path") + group.count("<line") + group.count("<text") for group in groups)


# ---------------------------------------------------------------- which there are


def test_a_sweep_has_every_chart(study: Study) -> None:
    found = figures(study)
    assert {f.name for f in found} == ALL
    assert all(len(f.rows) == (len(study.runs) if f.per_run else 1) for f in found)


def names_of(path: Path) -> set[str]:
    found = figures(Study.of(collect([path])))
    assert all(any(len(rows) for rows in f.rows) for f in found)
    return {f.name for f in found}


def test_one_run_has_no_empty_charts(run_dirs: Path) -> None:
    assert names_of(fake_run(tiny(output=run_dirs), 10.0)) == OF_ONE_RUN


def test_one_split_is_shown_by_dots(run_dirs: Path) -> None:
    for rule in ("lorm", "fedavg"):
        fake_run(tiny(f"server.aggregator={rule}", output=run_dirs), 10.0)
    assert names_of(run_dirs) == ALL - {"heterogeneity"} | {"settings"}


def test_one_task_has_nothing_to_forget(run_dirs: Path) -> None:
    left = OF_ONE_RUN - {"by_task", "forgetting", "run_tasks", "run_matrix"}
    assert names_of(fake_run(tiny("stream.tasks=1", output=run_dirs), 10.0)) == left


def test_evaluated_at_the_tasks_ends_only_there_are_no_rounds(run_dirs: Path) -> None:
    config = tiny(output=run_dirs)
    path = fake_run(config, 10.0)
    results = invent(config, 10.0, split_of(config, 10))
    ends = tuple(row for row in results.rows if row.stage == "task_end")
    replace(results, rows=ends).write_end(RunDir.read(path))
    assert names_of(path) == OF_ONE_RUN - {"by_round"}


def test_a_run_that_says_little_is_shown_as_it_is(run_dirs: Path) -> None:
    config = tiny(output=run_dirs)
    path = fake_run(config, 10.0)
    results = invent(config, 10.0, split_of(config, 10))
    for name in ("partition.csv", "environment.json", "manifest.json"):
        (path / name).unlink()
    empty = {"bytes": {"down": {}, "up": {}}, "seconds": {}, "client_rounds": 0}
    rows = (Row(0, 2, "task_end", 0, 0, 0, 0),)  # a task without test samples
    (path / "partition.csv").write_text("task,client,class_row,class_name,samples\n")
    replace(results, rows=rows, drifts=(), classes=(), costs=empty).write_end(RunDir.read(path))
    assert names_of(path) == set()
    assert report.write(collect([path]), run_dirs / "report.html").charts == 0


def test_many_clients_have_a_histogram_of_sizes(run_dirs: Path) -> None:
    config = tiny(output=run_dirs, partition={"name": "dirichlet", "alpha": 1.0, "clients": 60})
    path = fake_run(config, 10.0, classes=6)
    study = Study.of(collect([path]))
    found = {f.name: f for f in figures(study)}
    assert set(found) == OF_ONE_RUN | {"client_sizes"}
    assert "The first 50 of 60 clients" in found["partition"].note
    (sizes,) = (d for d in drawings(study, list(found.values())) if d.name == "client_sizes")
    assert marks(svg(sizes), "rect") > 3


# ---------------------------------------------------------------- what they draw


def test_every_figure_becomes_a_file(drawn: dict[str, Drawing], pictures: Pictures) -> None:
    for name in drawn:
        text = pictures[name]
        assert "var(--" not in text and "{{" not in text and "NaN" not in text
        assert sum(marks(text, kind) for kind in ("symbol", "rect", "line", "rule")) > 0, name


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("heterogeneity-final_average_accuracy", "symbol", 27),  # 3 series × 3 splits × (mean and 2 seeds)
        ("heterogeneity-forgetting", "rule", 9),
        ("by_task-0.1", "symbol", 9),  # 3 series × 3 tasks
        ("by_round-iid", "symbol", 27),  # × 3 evaluations
        ("forgetting-0.5", "symbol", 6),
        ("forgetting_plasticity-0.5", "symbol", 3),
        ("forgetting_plasticity-0.5", "rule", 6),
        ("cost_accuracy-0.5-bytes_up", "symbol", 3),
        ("matrices-0.1", "rect", 18),  # 3 series × 6 cells
        ("matrices-0.1", "text", 18),
        ("bytes-0.1", "rect", 15),  # 3 series × (2 kinds down + 3 up)
        ("seconds-0.1", "rect", 12),
        ("drift-0.1-cosine-head", "symbol", 18),
        ("run_matrix-0.1", "rect", 12),
        ("client_accuracy-0.1", "symbol", 5),
    ],
)
def test_number_of_marks(pictures: Pictures, name: str, kind: str, count: int) -> None:
    assert marks(pictures[name], kind) == count


def test_a_bubble_per_client_and_class(study: Study, drawn: dict[str, Drawing], pictures: Pictures) -> None:
    rows = drawn["partition-0.1"].spec["datasets"]["rows"]
    first = next(run.results for run in study.runs if run.labels == {"method": "variance_weighted", "alpha": 0.1, "seed": 0})
    assert {(row["client"], row["column"], row["samples"]) for row in rows} == {
        (h.client, h.class_row, h.samples) for h in first.holdings
    }
    assert marks(pictures["partition-0.1"], "symbol") == len(rows)


@pytest.mark.parametrize("seeds", [2, 4])
def test_accuracy_stays_between_0_and_100(run_dirs: Path, seeds: int) -> None:
    """Runs far apart: the 95 % interval of two is −586 to 686 %, which set the axes; two are shown as they are."""
    for seed in range(seeds):
        for rule in ("lorm", "fedavg"):
            accuracy = ((100,), (100, 0 if seed % 2 else 100))
            write_run(run_dirs, tiny(f"server.aggregator={rule}", f"seed={seed}"), accuracy, split="s" * 64)
    study = Study.of(collect([run_dirs]))
    row = study.settings[study.settings["metric"] == "final_average_accuracy"].iloc[0]
    assert row["low"] < 30 and row["high"] > 100
    found = {d.name: d for d in drawings(study, figures(study))}
    for name in ("settings-final_average_accuracy", "by_task"):
        labels = re.findall(r'<g class="mark-text role-axis-label".*?</g>', svg(found[name]), flags=re.DOTALL)
        ticks = [float(t.replace("−", "-")) for t in re.findall(r">([−\d.]+)</text>", "".join(labels))]
        assert ticks and min(ticks) >= 0 and max(ticks) <= 100
    shown = (50.0, 100.0) if seeds == 2 else (row["low"], 100.0)
    assert (row["from"], row["to"]) == pytest.approx(shown)
    assert marks(svg(found["settings-final_average_accuracy"]), "symbol") == (2 + 2 * 2 if seeds == 2 else 2)


def test_matrices_of_every_series(run_dirs: Path) -> None:
    for rank in range(1, 11):
        write_run(run_dirs, tiny(f"adapter.rank={rank}"))
    study = Study.of(collect([run_dirs]))
    assert study.title == "tiny"
    found = {d.name: d for d in drawings(study, figures(study))}
    assert marks(svg(found["matrices"]), "rect") == 10 * 3


def test_the_title_is_the_studys_name(tmp_path: Path) -> None:
    for rank in (1, 2):
        write_run(tmp_path / "ranks", tiny(f"adapter.rank={rank}", f"name=r{rank}"))
    assert Study.of(collect([tmp_path / "ranks"])).title == "ranks"
    paths = [path for path in (tmp_path / "ranks").iterdir() if path.is_dir()]
    assert Study.of(collect(paths)).title == "2 runs"


def test_one_seed_draws_no_intervals(run_dirs: Path) -> None:
    for rule in ("lorm", "fedavg"):
        fake_run(tiny(f"server.aggregator={rule}", output=run_dirs), 10.0)
    study = Study.of(collect([run_dirs]))
    found = {d.name: d for d in drawings(study, figures(study))}
    text = svg(found["settings-final_average_accuracy"])
    assert (marks(text, "rule"), marks(text, "symbol")) == (0, 2)


@pytest.mark.parametrize("format", ["svg", "png", "pdf"])
def test_files_of_each_format(run_dirs: Path, tmp_path: Path, format: str) -> None:
    collection = collect([fake_run(tiny("stream.tasks=1", output=run_dirs), 10.0)])
    written = report.write(collection, tmp_path / "r.html", tmp_path / "deep" / "figures", format)
    start = {"svg": b"<svg", "png": b"\x89PNG", "pdf": b"%PDF"}[format]
    assert written.files and all(path.suffix == f".{format}" and path.read_bytes().startswith(start) for path in written.files)
    assert {path.name for path in (tmp_path / "deep" / "figures").iterdir()} == {path.name for path in written.files}


def test_another_format(run_dirs: Path, tmp_path: Path) -> None:
    collection = collect([fake_run(tiny(output=run_dirs), 10.0)])
    with pytest.raises(ConfigError, match=r"no figures as 'svgg'. Did you mean 'svg'?"):
        report.write(collection, tmp_path / "r.html", tmp_path, "svgg")
    assert not (tmp_path / "r.html").exists()


# ---------------------------------------------------------------- colours

# Machado et al. 2009, severity 1, on linear sRGB
VISION = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour: str) -> Any:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def oklab(rgb: Any) -> Any:
    """Ottosson 2020."""
    to_cone = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(to_lab) @ np.cbrt(np.array(to_cone) @ np.clip(rgb, 0, 1))


def contrast(a: str, b: str) -> float:
    """WCAG 2."""
    dark, light = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colours", [theme.LIGHT, theme.DARK], ids=["light", "dark"])
@pytest.mark.parametrize("vision", VISION)
def test_series_can_be_told_apart(colours: dict[str, str], vision: str) -> None:
    seen = [oklab(np.array(VISION[vision]) @ linear(colours[f"c{i}"])) for i in range(1, 9)]
    assert min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2)) >= 0.09


@pytest.mark.parametrize("colours", [theme.LIGHT, theme.DARK], ids=["light", "dark"])
def test_text_and_marks_stand_out(colours: dict[str, str]) -> None:
    for background in ("surface", "page"):
        assert contrast(colours["ink"], colours[background]) >= 7
        assert contrast(colours["soft"], colours[background]) >= 4.5
        assert contrast(colours["accent"], colours[background]) >= 4.5
    assert contrast(colours["ink"], colours["notice"]) >= 7
    for name in [*(f"c{i}" for i in range(1, 9)), *(f"k{i}" for i in range(1, 13))]:
        assert contrast(colours[name], colours["surface"]) >= 2.2, name


def test_beyond_eight_methods_the_others_share_a_colour() -> None:
    from fedsim.report.charts import colours_of

    colours = colours_of([Series(f"m{i}", f"m{i}", "", {}, i) for i in range(10)])
    assert len(set(colours.values())) == 9
    assert colours["m8"] == colours["m9"] == theme.OTHER


def test_unknown_custom_properties_are_left_alone() -> None:
    assert theme.resolve({"a": "var(--ink)", "b": "var(--mine)"}) == {"a": theme.LIGHT["ink"], "b": "var(--mine)"}
