"""The file without a browser: whole, closed to the network, safe against what runs are called, and open about what is missing."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedsim import cli, report
from fedsim.report import document, page
from fedsim.runs import metrics
from fedsim.runs.collection import Entry, SweepRecord, collect
from fedsim.runs.metrics import Metric
from fedsim.simulation import run
from tests.report.factory import ENVIRONMENT, METHODS, fake_run, fake_sweep
from tests.tiny import tiny

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\"'&{{metric}}"


class Elements(HTMLParser):
    """Tags with their attributes, and the text of every element by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.found if name == tag]


def data_of(text: str) -> Any:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)[1])  # type: ignore[index]


def written(folder: Path, **options: Any) -> str:
    report.write(collect([folder], **options), folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(sweep_folder: Path) -> str:
    return written(sweep_folder)


# ---------------------------------------------------------------- one file


def test_nothing_can_be_fetched(text: str) -> None:
    elements = Elements(text)
    policy = next(m["content"] for m in elements.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    hashes = " ".join([r"'sha256-[\w+/=]{44}'"] * 3)
    assert re.fullmatch(hashes, rules["script-src"])  # neither unsafe-inline nor unsafe-eval
    assert "http" not in policy
    assert not [a for _, a in elements.found if "src" in a]
    assert all(str(a["href"]).startswith("#") for _, a in elements.found if "href" in a)


def test_ids_are_unique_and_links_lead_somewhere(text: str) -> None:
    elements = Elements(text)
    ids = [str(a["id"]) for _, a in elements.found if "id" in a]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for a in elements.all("a")} <= set(ids)


def test_what_a_screen_reader_needs(text: str) -> None:
    elements = Elements(text)
    assert elements.all("html")[0]["lang"] == "en"
    assert [tag for tag, _ in elements.found if tag in ("h1", "h2")] == ["h1"] + ["h2"] * 7
    charts = [a for a in elements.all("div") if a.get("class") == "chart"]
    assert len(charts) == 14
    assert all(a["role"] == "img" and len(str(a["aria-label"])) > 30 for a in charts)
    assert all(a.get("scope") in ("col", "row") for a in elements.all("th"))
    assert all(a.get("aria-label") or a.get("id") in ("split", "which") for a in elements.all("select") if "hidden" not in a)


def test_the_page_is_the_same_every_time(sweep_folder: Path, text: str) -> None:
    assert written(sweep_folder) == text


def test_runs_of_one_split_share_its_rows(text: str) -> None:
    figures = {f["name"]: f for f in data_of(text)["figures"]}
    assert len(figures["partition"]["rows"]) == 6  # 3 splits × 2 seeds, of 18 runs
    assert len(figures["partition"]["rowsAt"]) == 18
    assert len(figures["run_matrix"]["specs"]) == 1


def test_packed_rows_come_back() -> None:
    import pandas as pd

    frame = pd.DataFrame({"a": ["x", "y", "x"], "b": [1, 2, 3], "c": [1 / 3, float("nan"), float("inf")]})
    packed = document.pack(frame)
    assert packed["columns"]["a"] == {"levels": ["x", "y"], "values": [0, 1, 0]}
    assert packed["columns"]["b"] == {"values": [1, 2, 3]}
    assert packed["columns"]["c"] == {"values": [0.33333, None, None]}
    assert document.pack(frame[:0])["length"] == 0


# ---------------------------------------------------------------- the table


def test_the_table_holds_every_setting_with_the_best_in_bold(text: str, study: Any) -> None:
    table = text[text.index('<section id="table">') : text.index('<section id="runs">')]
    rows = re.findall(r"<tr>(<th scope=\"row\".*?)</tr>", table)
    assert len(rows) == 9
    final = study.settings[study.settings["metric"] == "final_average_accuracy"]
    for row in rows:
        name, split = re.findall(r">([^<]+)</t[hd]>", row)[:2]
        split = split.removeprefix("α = ")
        mean = final[(final["series"] == name) & (final["split"] == split)].iloc[0]
        assert f">{mean['mean']:.1f} ± {mean['std']:.1f}<small>" in row.replace("−", "-")
        best = final[final["split"] == split]["mean"].max() == mean["mean"]
        first = re.search(r"<td[^>]*>[\d.]+ ±", row)
        assert first is not None and ("class=best" in first[0]) == best


@pytest.mark.parametrize(
    ("better", "means", "best"),
    [("higher", [1.0, 3.04], "3.0"), ("lower", [-1.0, 3.0], "-1.0"), ("none", [1.0, 2.0], None), ("higher", [2.0], None)],
)
def test_best_is_what_looks_best(better: Any, means: list[float], best: str | None) -> None:
    metric = Metric("m", "M", better=better)
    assert page._best(metric, [{"mean": m} for m in means] + [None]) == best


def test_intervals_end_where_the_metric_does() -> None:
    of_two = {"mean": 50.0, "std": 56.6, "low": -458.2, "high": 558.2, "n": 2}
    assert "<small>0.0 to 100.0</small>" in page._cell(of_two, 2, metrics.of("final_average_accuracy"), None)
    assert "<small>−100.0 to 100.0</small>" in page._cell(of_two, 2, metrics.of("forgetting"), None)


# ---------------------------------------------------------------- notices and runs


def test_absent_and_other_runs_are_said_on_top(tmp_path: Path) -> None:
    folder = fake_sweep(tmp_path, {m: METHODS[m] for m in ("lorm", "fedavg")}, (0.1,), (0, 1, 2), tasks=2, iid=False)
    paths = sorted(p for p in folder.iterdir() if (p / "status.json").exists())
    shutil.rmtree(paths[0])
    (paths[1] / "rounds.csv").write_text("task\nx\n")
    fake_run(tiny("seed=7", output=folder), 1.0)
    notice = re.search(r'<section class="notice".*?</section>', written(folder), flags=re.DOTALL)
    assert notice is not None
    assert "2 runs not shown" in notice[0]
    assert "not run yet: start the sweep again" in notice[0]
    assert "rounds.csv is damaged" in notice[0]
    assert "1 other finished run in the folder" in notice[0]


def test_seeds_of_unequal_number(tmp_path: Path) -> None:
    for seed in range(3):
        for alpha in (0.1, 1.0):
            if (seed, alpha) != (2, 1.0):
                fake_run(tiny(f"seed={seed}", f"partition.alpha={alpha}", output=tmp_path), 1.0)
    assert "Most settings have 3, these have not:</p><ul><li>tiny, α = 1: 2</li></ul>" in written(tmp_path)


def test_a_sound_sweep_has_no_notice(text: str) -> None:
    assert 'class="notice"' not in text.replace('<noscript><p class="notice">', "")


def test_runs_of_several_states_of_the_code_are_said(tmp_path: Path) -> None:
    paths = [fake_run(tiny(f"seed={seed}", output=tmp_path), 1.0) for seed in (0, 1)]
    (paths[0] / "environment.json").write_text(json.dumps(ENVIRONMENT | {"git": {"commit": "f" * 40, "dirty": True}}))
    text = written(tmp_path)
    assert "The runs come from different states of the code" in text
    assert "commit ffffffffffff with changes (1)" in text
    assert "different processors" not in text


def test_runs_of_several_processors_are_said(tmp_path: Path) -> None:
    paths = [fake_run(tiny(f"seed={seed}", output=tmp_path), 1.0) for seed in (0, 1, 2)]
    (paths[0] / "environment.json").write_text(json.dumps(ENVIRONMENT | {"processor": "<Another>"}))
    assert "some tenths: A processor, AVX2 (2), &lt;Another&gt; (1)." in written(tmp_path)


def test_every_run_says_how_it_was_made(sweep_folder: Path, text: str) -> None:
    runs = text[text.index('<section id="runs">') :]
    assert runs.count('<details class="run">') == 18
    assert runs.count("fedsim run sweep.yaml &#x27;name=a b&#x27;") == 18  # as a shell takes it
    assert "Python 3.11.2, torch 2.13.0<" in runs
    assert "commit 0123456789ab" in runs
    assert "A processor, AVX2, 4 cores, Linux" in runs
    config = next(p / "config.yaml" for p in sorted(sweep_folder.iterdir()) if (p / "config.yaml").exists())
    assert document.esc(config.read_text()) in runs


def test_real_runs(run_dirs: Path) -> None:
    for seed in (0, 1):
        run(tiny(f"seed={seed}", output=run_dirs))
    text = written(run_dirs)
    assert {f["name"] for f in data_of(text)["figures"]} >= {"by_task", "by_round", "drift", "partition", "bytes", "run_matrix"}
    assert "seed 1" in text


# ---------------------------------------------------------------- hostile names


def hostile_sweep(folder: Path) -> Path:
    entries = []
    for method in ("lorm", "fedavg"):
        for alpha in (0.1, 1.0):
            config = tiny(f"server.aggregator={method}", f"partition.alpha={alpha}", output=folder)
            path = fake_run(config, 10.0, folder / config.identity()[:16], names=[HOSTILE, "b"])
            (path / "environment.json").write_text(json.dumps(ENVIRONMENT | {"command": ["fedsim", HOSTILE], "cpu": HOSTILE}))
            entries.append(
                Entry(config.identity(), {"method": HOSTILE if method == "lorm" else method, "alpha": alpha, "seed": 0})
            )
    entries.append(Entry("0" * 64, {"method": HOSTILE, "alpha": 0.1, "seed": 1}))
    axes = {"method": [HOSTILE, "fedavg"], "alpha": [0.1, 1.0], "seed": [0, 1]}
    SweepRecord("hostile", axes, tuple(entries)).save(folder)
    return folder


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    text = written(hostile_sweep(tmp_path))
    assert "window.hacked = 1" in text
    elements = Elements(text)
    assert (len(elements.all("script")), len(elements.all("img"))) == (4, 0)
    assert not [a for _, a in elements.found if any(name.startswith("on") for name in a)]
    assert HOSTILE in {s["text"] for s in data_of(text)["series"]}


# ---------------------------------------------------------------- the command


def test_command(sweep_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(sweep_folder)]) == 0
    out = capsys.readouterr().out
    assert re.fullmatch(r"\S*/report\.html: 1\.\d MB, 14 charts of 18 runs\n", out)
    assert (sweep_folder / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / out.split(":")[0]).resolve() == (sweep_folder / "report.html").resolve()
    assert not (tmp_path / "report.html").exists()
    run_dirs = sorted(str(p) for p in sweep_folder.iterdir() if (p / "status.json").exists())[:2]
    assert cli.main(["report", *run_dirs]) == 0
    assert capsys.readouterr().out.startswith("report.html: ") and (tmp_path / "report.html").exists()


def test_command_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fake_sweep(tmp_path / "runs", {"lorm": METHODS["lorm"]}, (0.1,), (0, 1), tasks=1, iid=False)
    shutil.rmtree(next(p for p in sorted(folder.iterdir()) if (p / "status.json").exists()))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "runs", "--output", "a/b.html", "--figures", "figs", "--format", "png"]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("a/b.html: ") and first.endswith(" figures in figs") and "of 1 run;" in first
    assert (second, third.endswith("not run yet: start the sweep again")) == ("1 run not shown:", True)
    assert all(path.suffix == ".png" for path in (tmp_path / "figs").iterdir())


def test_command_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no finished run in" in capsys.readouterr().err


def test_command_on_a_full_or_forbidden_place(sweep_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["report", str(sweep_folder), "--output", str(tmp_path / "file" / "r.html")]) == 1
    assert "could not be written" in capsys.readouterr().err
