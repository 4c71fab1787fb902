"""The documentation's own tools: links of pages, and docstrings as Markdown."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.site import reference
from docs.site.links import DOCS, ROOT, BrokenLink, Site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path, page_of={ROOT / "server/aggregators/lorm.py": "reference/aggregators/lorm"}, made={"reference/config"})


def test_links_lead_to_pages_of_the_site(site: Site) -> None:
    text = (
        "[a\nb](../start.md#install) [`c`](../../server/loop.py) [rule](../../server/aggregators/lorm.py) [d](#here) [e](https://x.org/y)\n"
        "[keys](../reference/config.md) ![picture](../../experiments/heterogeneity/accuracy.svg)\n"
        "```python\nx = f[0](../../server/loop.py)\n```\n"
    )
    made = site.relinked(text, DOCS / "guide" / "page.md", "guide/page")
    assert made == (
        "[a\nb](../start.md#install) [`c`](../repository/server/loop.py.md) [rule](../reference/aggregators/lorm.md) [d](#here) "
        "[e](https://x.org/y)\n[keys](../reference/config.md) ![picture](../repository/experiments/heterogeneity/accuracy.svg)\n"
        "```python\nx = f[0](../../server/loop.py)\n```\n"
    )
    shown = (site.source / "repository/server/loop.py.md").read_text()
    assert shown.startswith("---\norphan: true\n") and (ROOT / "server/loop.py").read_text() in shown
    assert (site.source / "repository/experiments/heterogeneity/accuracy.svg").is_file()


def test_the_plugins_own_page_shows_its_file(site: Site) -> None:
    made = site.relinked("[source](../server/aggregators/lorm.py?source)", DOCS / "index.md", "reference/aggregators/lorm")
    assert made == "[source](../../repository/server/aggregators/lorm.py.md)"


def test_a_page_that_is_html_stays_html(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "fedsim/report/page.html"
    html = page if page.exists() else next((ROOT / "fedsim").rglob("*.html"))
    told = html.relative_to(ROOT).as_posix()
    assert site.relinked(f"[the page](../{told})", DOCS / "start.md", "start") == f'<a href="repository/{told}">the page</a>'
    assert site.ready == {f"repository/{told}": html}


@pytest.mark.parametrize("target", ["nowhere.md", "../../outside.md", "reference/nothing.md"])
def test_a_broken_link_is_named(site: Site, target: str) -> None:
    with pytest.raises(BrokenLink, match=f"docs/start.md: .*{target}"):
        site.relinked(f"[x]({target})", DOCS / "start.md", "start")


def test_a_docstring_becomes_markdown() -> None:
    text = "Adds *x* to a_b, see `a_b`.\n\n    w = a * b\n\nHead:   W x\nrest\nof it"
    made = "Adds \\*x\\* to a\\_b, see `a_b`.\n\n```text\nw = a * b\n```\n\n```text\nHead:   W x\n```\n\nrest of it\n"
    assert "\n".join(reference.prose(text)) == made


def test_what_hangs_below_a_name_flows_with_it() -> None:
    text = "data: images\n    and labels\nseed: of draws\n\nAn equation\n    y = x"
    assert "\n".join(reference.prose(text)) == "data: images and labels\n\nseed: of draws\n\nAn equation\n\n```text\ny = x\n```\n"


def test_what_the_table_says_is_not_said_twice() -> None:
    text = "What it does.\n\nBefore. size: how many. rate: η. Raises ConfigError.\n\nBehind."
    assert reference.without_options(text, ["size", "rate"]) == "What it does.\n\nBefore.\nRaises ConfigError.\n\nBehind."
    assert reference.without_options(text, []) == text


def test_every_generated_page_leads_somewhere(site: Site) -> None:
    """Of all parts, keys, commands and names; Sphinx itself is needed for the rest (`make docs`)."""
    pages = reference.pages(site)
    site.made = {*pages}
    for page, (text, origin) in pages.items():
        site.relinked(text, origin, page)
    assert {"reference/config", "reference/commands", "reference/metrics", "reference/api"} <= {*pages}
    lorm, _ = pages["reference/aggregators/lorm"]
    assert "`decay`: float = `0.0`" in lorm and "Salami" in lorm and "`lorm`" in lorm.partition("## Presets")[2]
