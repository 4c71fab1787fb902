"""Pages in headless Chromium, Debian's or the one that CHROMIUM names; without one, tests that ask for it are skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = (
    os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
WAIT = 30_000  # milliseconds


@dataclass
class Opened:
    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def marks(self, figure: str, kind: str = "symbol") -> int:
        """Marks of a chart, legends and axes left out."""
        return self.page.locator(f"#figure-{figure} .mark-{kind}.role-mark").locator("path, line, text").count()

    def texts(self, figure: str) -> list[str]:
        return self.page.locator(f"#figure-{figure} .mark-text.role-mark text").all_text_contents()

    def settle(self) -> None:
        self.page.wait_for_selector("body[data-drawn=yes]", timeout=WAIT)

    def colour(self, selector: str = "body", of: str = "backgroundColor") -> str:
        return str(self.page.evaluate("([s, p]) => getComputedStyle(document.querySelector(s))[p]", [selector, of]))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium, or set CHROMIUM to its path")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def visit(browser: Browser) -> Callable[..., Any]:
    @contextmanager
    def visited(path: Path, width: int = 1280, **options: Any) -> Iterator[Opened]:
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        opened = Opened(page)
        page.on("request", lambda request: opened.requests.append(request.url))
        page.on("console", lambda message: opened.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        page.goto(path.as_uri())
        opened.settle()
        yield opened
        page.close()

    return visited
