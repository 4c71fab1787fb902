"""Pages that users read, README and documentation, cut into blocks, so that tests run what they show.

A comment on the line above a block says what it is:
    <!-- file: NAME -->             it is the file NAME; NAME from PAGE: that file of another page is needed as well
    <!-- runs -->                   it is run by a test, in small settings
    <!-- sweep -->, <!-- median --> a name by which other tests find it
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts))
MARK = re.compile(r"<!-- (.+) -->")


@dataclass(frozen=True)
class Block:
    """Code in a page."""

    language: str
    text: str
    marks: tuple[str, ...]

    def marked(self, word: str) -> list[str]:
        """What stands behind `word:` in its marks."""
        return [mark.partition(": ")[2] for mark in self.marks if mark.startswith(f"{word}: ")]


def blocks(page: Path) -> Iterator[Block]:
    """All blocks of a page in their order."""
    marks: list[str] = []
    inside: list[str] | None = None
    language = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if inside is not None and line == "```":
            yield Block(language, "\n".join(inside) + "\n", tuple(marks))
            marks, inside = [], None
        elif inside is not None:
            inside.append(line)
        elif line.startswith("```"):
            language, inside = line.removeprefix("```"), []
        elif found := MARK.fullmatch(line):
            marks.append(found[1])
        else:
            marks = []


def file_of(page: Path, name: str) -> str:
    """A file that a page shows."""
    return next(block.text for block in blocks(page) if name in block.marked("file"))


def named(page: Path, mark: str) -> str:
    """The block with this mark."""
    return next(block.text for block in blocks(page) if mark in block.marks)


def median_rule() -> str:
    """The tutorial's aggregator in a dozen lines."""
    return named(DOCS / "tutorials" / "rule.md", "median")


def sweep_yaml() -> str:
    """The tutorial's sweep."""
    return named(DOCS / "tutorials" / "study.md", "sweep")
