"""The page in a real browser: headless Chromium, Debian's or the one that CHROMIUM names. Without one these tests are skipped.

The charts are drawn, nothing is fetched, the page answers, and a screenshot looks like a report.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim import report
from fedsim.report import theme
from fedsim.runs.collection import collect
from tests.report.browsing import WAIT, Opened
from tests.report.factory import METHODS, fake_run, fake_sweep
from tests.report.test_page import hostile_sweep
from tests.tiny import tiny

pytestmark = pytest.mark.processes  # some ask for the browser by name only
MARKS = ".mark-symbol path, .mark-rect path, .mark-line path, .mark-rule line"


@pytest.fixture(scope="module")
def sweep_page(sweep_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(collect([sweep_folder]), tmp_path_factory.mktemp("page") / "sweep.html").path


@pytest.fixture(scope="module")
def shown(visit: Callable[..., Any], sweep_page: Path) -> Iterator[Opened]:
    """The sweep's page, open for all tests that do not mind what the others did to it."""
    with visit(sweep_page, color_scheme="light") as opened:
        yield opened


@pytest.fixture(scope="module")
def run_shown(visit: Callable[..., Any], run_page: Path) -> Iterator[Opened]:
    """The same of a single run, in light colours."""
    with visit(run_page, color_scheme="light") as opened:
        yield opened


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return report.write(collect([fake_run(tiny(output=folder), 20.0)]), folder / "run.html").path


# ---------------------------------------------------------------- drawn, and alone


@pytest.mark.parametrize(
    ("which", "path", "charts", "marks"), [("shown", "sweep_page", 14, (9, 12)), ("run_shown", "run_page", 10, (2, 6))]
)
def test_charts_are_drawn_and_nothing_is_fetched(
    request: pytest.FixtureRequest, which: str, path: str, charts: int, marks: tuple[int, int]
) -> None:
    opened: Opened = request.getfixturevalue(which)
    assert opened.requests == [request.getfixturevalue(path).as_uri()]
    assert opened.complaints == []
    cards = opened.page.locator(".chart").all()
    assert len(cards) == charts
    for card in cards:
        assert card.locator("svg").count() == 1
        assert card.locator(MARKS).count() > 0
    assert (opened.marks("by_task"), opened.marks("run_matrix", "rect")) == marks


def test_a_screenshot_looks_like_a_report(shown: Opened, tmp_path: Path) -> None:
    from PIL import Image

    shown.page.locator("#figure-heterogeneity").screenshot(path=tmp_path / "chart.png")
    seen = np.asarray(Image.open(tmp_path / "chart.png").convert("RGB")).reshape(-1, 3)
    for name in ("c1", "c2", "c3"):  # three series, in their colours
        colour = [int(theme.LIGHT[name][i : i + 2], 16) for i in (1, 3, 5)]
        assert int((np.abs(seen.astype(int) - colour).max(axis=1) <= 2).sum()) > 300, name
    background = (seen == 255).all(axis=1).mean()
    assert 0.8 < background < 0.99
    boxes = [card.bounding_box() for card in shown.page.locator(".card").all()]
    charts = [card.bounding_box() for card in shown.page.locator(".chart svg").all()]
    assert all(box["height"] > 150 for box in boxes)
    assert all(c["x"] >= b["x"] and c["x"] + c["width"] <= b["x"] + b["width"] for b, c in zip(boxes, charts, strict=True))


def test_the_page_fits_a_phone(visit: Callable[..., Any], sweep_page: Path) -> None:
    width = 390
    with visit(sweep_page, width=width) as opened:
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        widest = max(box["x"] + box["width"] for svg in opened.page.locator(".chart svg").all() if (box := svg.bounding_box()))
        assert widest <= width
        assert opened.complaints == []


# ---------------------------------------------------------------- looks


def test_light_and_dark(run_shown: Opened) -> None:
    light, dark = "rgb(246, 247, 249)", "rgb(15, 17, 21)"
    assert run_shown.colour() == light
    label = run_shown.colour("#figure-by_task .role-axis-label text", "fill")
    run_shown.page.click("#theme")
    assert run_shown.colour() == dark
    assert run_shown.colour("#figure-by_task .role-axis-label text", "fill") != label  # charts turn dark with the page
    run_shown.page.click("#theme")
    assert run_shown.colour() == light
    run_shown.page.evaluate("delete document.documentElement.dataset.theme")
    run_shown.page.emulate_media(color_scheme="dark")
    assert run_shown.colour() == dark  # as the system says
    run_shown.page.emulate_media(media="print")
    assert run_shown.colour() == "rgb(255, 255, 255)"


def test_print(visit: Callable[..., Any], sweep_page: Path) -> None:
    with visit(sweep_page) as opened:
        shown = opened.page.locator(".control, .tools, .card select")
        assert any(control.is_visible() for control in shown.all())
        before = opened.page.locator("#figure-heterogeneity svg").get_attribute("width")
        opened.page.emulate_media(media="print")
        assert not any(control.is_visible() for control in shown.all())
        assert opened.page.locator("#table tbody tr").count() == 9
        assert opened.page.evaluate("getComputedStyle(document.querySelector('.card')).breakInside") == "avoid"
        chart = opened.page.locator("#figure-heterogeneity svg")
        opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert before != "760" == chart.get_attribute("width")  # laid out for the sheet at once
        opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert chart.get_attribute("width") == before
        pdf = opened.page.pdf(format="A4")
        assert pdf.startswith(b"%PDF")
        assert 5 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 20
        assert opened.page.locator("#figure-heterogeneity svg").get_attribute("width") == before


# ---------------------------------------------------------------- answers


def test_tooltip(shown: Opened) -> None:
    shown.page.locator("#figure-heterogeneity .mark-symbol.role-mark path").last.hover()  # a mean; seeds come first
    shown.page.wait_for_selector("#vg-tooltip-element.visible", timeout=WAIT)
    told = shown.page.locator("#vg-tooltip-element").inner_text()
    assert "Final average accuracy (%)" in told and "95 % interval" in told and re.search(r"seeds\s+2", told)
    assert any(method in told for method in METHODS)


def test_another_run(shown: Opened) -> None:
    before, bubbles = shown.texts("run_matrix"), shown.marks("partition")
    number = shown.page.locator("#which option", has_text="fedavg, α = 0.1, seed 1").get_attribute("value")
    shown.page.select_option("#which", number)
    shown.settle()
    shown.page.wait_for_timeout(200)
    assert shown.texts("run_matrix") != before
    assert shown.marks("partition") != bubbles


def test_another_split_and_metric(visit: Callable[..., Any], sweep_page: Path) -> None:
    with visit(sweep_page) as opened:
        assert opened.page.locator("#figure-by_task .badge").inner_text() == "α = 0.5"
        before = opened.texts("matrices")
        opened.page.select_option("#split", "iid")
        opened.settle()
        assert opened.texts("matrices") != before
        assert opened.page.locator("#figure-by_task .badge").inner_text() == "iid"
        opened.page.select_option("#figure-heterogeneity select", "forgetting")
        opened.page.wait_for_selector("#figure-heterogeneity .role-axis-title text >> text=Forgetting (%)", timeout=WAIT)
        assert opened.complaints == []


def test_series_can_be_chosen(visit: Callable[..., Any], sweep_page: Path) -> None:
    with visit(sweep_page) as opened:
        opened.page.click("#series summary")
        opened.page.fill("#series input[type=search]", "lorm")
        opened.page.click("#series [data-pick=all]")
        opened.settle()
        assert opened.page.locator("#series summary").inner_text().startswith("1 of 3 series")
        assert (opened.marks("heterogeneity"), opened.marks("matrices", "rect")) == (3 + 3 * 2, 6)  # means, and their two seeds
        opened.page.click("#series [data-pick=none]")
        opened.settle()
        assert "Nothing to show" in opened.page.locator("#figure-heterogeneity .chart").inner_text()
        opened.page.fill("#series input[type=search]", "")
        opened.page.click("#series [data-pick=best]")
        opened.settle()
        assert opened.marks("heterogeneity") == 9 + 9 * 2
        opened.page.keyboard.press("Escape")
        assert not opened.page.locator("#series ul").is_visible()


def test_a_click_on_the_legend_brings_a_series_forward(shown: Opened) -> None:
    faint = shown.page.locator("#figure-by_task .mark-symbol.role-mark path[opacity='0.12']")
    assert faint.count() == 0
    shown.page.locator("#figure-by_task .role-legend-label text").first.click()
    shown.page.wait_for_selector("#figure-by_task .mark-symbol.role-mark path[opacity='0.12']", timeout=WAIT)
    assert faint.count() == 6


def test_many_series_begin_with_the_best(visit: Callable[..., Any], tmp_path: Path) -> None:
    more = {"client.lr": (0.1, 0.2, 0.3)}
    folder = fake_sweep(tmp_path, METHODS, (0.1,), (0,), tasks=2, clients=3, rounds=1, classes=3, iid=False, more=more)
    with visit(report.write(collect([folder]), tmp_path / "r.html").path) as opened:
        assert opened.page.locator("#series summary").inner_text().startswith("8 of 12 series")
        assert opened.marks("settings") == 8
        assert opened.page.locator("#table tbody tr").count() == 12
        assert opened.complaints == []


def test_the_table_sorts(shown: Opened) -> None:
    def column(number: int) -> list[float]:
        cells = shown.page.locator(f"#table tbody tr > :nth-child({number})").all()
        return [float(cell.get_attribute("data-value")) for cell in cells]

    head = shown.page.locator("#table th button", has_text="Forgetting")
    head.click()  # less is better, so it comes first
    assert column(6) == sorted(column(6))
    assert shown.page.locator("#table th[aria-sort]").get_attribute("aria-sort") == "ascending"
    head.click()
    assert column(6) == sorted(column(6), reverse=True)
    shown.page.locator("#table th button", has_text="Final average accuracy").first.click()
    assert column(4) == sorted(column(4), reverse=True)
    shown.page.locator("#table th button", has_text="split").click()
    assert (
        shown.page.locator("#table tbody tr td:nth-child(2)").all_inner_texts() == ["α = 0.1"] * 3 + ["α = 0.5"] * 3 + ["iid"] * 3
    )


def test_runs_are_found_and_copied(shown: Opened) -> None:
    shown.page.fill("#search", "fedavg, α = 0.1, Seed 1")
    assert shown.page.locator("details.run:visible").count() == 1
    shown.page.locator("details.run:visible summary").click()
    shown.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    shown.page.locator("details.run:visible button").first.click()
    shown.page.wait_for_selector("details.run button >> text=Copied", timeout=WAIT)
    assert shown.page.evaluate("navigator.clipboard.readText()") == "fedsim run sweep.yaml 'name=a b'"


def test_charts_can_be_saved(shown: Opened) -> None:
    shown.page.emulate_media(color_scheme="dark")

    def saved(figure: str, kind: str) -> tuple[str, bytes]:
        with shown.page.expect_download() as download:
            shown.page.click(f"#figure-{figure} [data-save={kind}]")
        return download.value.suggested_filename, Path(download.value.path()).read_bytes()

    name, svg = saved("by_task", "svg")
    assert name == "heterogeneity-by_task-0.5.svg"
    assert b"var(--" not in svg and theme.LIGHT["c1"].encode() in svg  # a paper is light
    assert saved("heterogeneity", "png")[1].startswith(b"\x89PNG")
    name, text = saved("by_task", "csv")
    rows = list(csv.DictReader(io.StringIO(text.decode())))
    assert (name, len(rows), {row["split"] for row in rows}) == ("heterogeneity-by_task-0.5.csv", 9, {"0.5"})
    assert shown.complaints == []
    shown.page.emulate_media(color_scheme="light")


def test_hostile_names_do_nothing(visit: Callable[..., Any], tmp_path: Path) -> None:
    path = report.write(collect([hostile_sweep(tmp_path)]), tmp_path / "hostile.html").path
    with visit(path) as opened:
        opened.page.locator("#figure-heterogeneity .mark-symbol.role-mark path").first.hover()
        opened.page.wait_for_selector("#vg-tooltip-element.visible", timeout=WAIT)
        assert opened.page.evaluate("window.hacked") is None
        assert opened.page.locator("img").count() == 0
        assert opened.requests == [path.as_uri()]
        assert opened.complaints == []
        assert "window.hacked = 1" in opened.page.locator("#table").inner_text()
