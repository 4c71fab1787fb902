"""Links of pages that a repository shows too: what lies outside `docs` becomes a page of the site."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cfg": "ini", ".toml": "toml", ".sh": "bash", ".json": "json"}
PICTURES = (".svg", ".png", ".jpg")
LINK = re.compile(r"(?P<open>!?\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\()(?P<target>[^()\s]+)\)")
FENCE = re.compile(r"^( *)(`{3,}|~{3,})")


def chunks(text: str) -> Iterator[tuple[bool, str]]:
    """A text in its order: (whether it is a block of code, the lines)."""
    lines, fence = list[str](), ""
    for line in text.splitlines(keepends=True):
        found = FENCE.match(line)
        if found and not fence:
            yield False, "".join(lines)
            lines, fence = [line], found[2]
        elif found and found[2].startswith(fence):
            yield True, "".join([*lines, line])
            lines, fence = [], ""
        else:
            lines.append(line)
    yield bool(fence), "".join(lines)


class BrokenLink(Exception):
    """A link to a file that is not there."""


@dataclass
class Site:
    """The pages of the site as far as they are known. source: the folder of Markdown that Sphinx will read.

    made: pages that are generated; shown: files that have a page which shows them as they are.
    ready: pages that are HTML already, where they go to.
    page_of: files that have a page of their own, another one.
    """

    source: Path
    page_of: dict[Path, str] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    shown: list[Path] = field(default_factory=list)
    ready: dict[str, Path] = field(default_factory=dict)

    def write(self, page: str, text: str, origin: Path) -> None:
        """A page (a path without suffix) whose links are relative to the file that it is made from."""
        path = self.source / f"{page}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.relinked(text, origin, page), encoding="utf-8")

    def relinked(self, text: str, origin: Path, page: str) -> str:
        """The same text with every relative link as it must be on the page; code is left alone."""
        return "".join(
            part if is_code else LINK.sub(lambda m: self._link(m, origin, page), part) for is_code, part in chunks(text)
        )

    def _link(self, found: re.Match[str], origin: Path, page: str) -> str:
        """One link; to a page that is HTML already, as HTML, since Sphinx would offer it as a download."""
        target = self._target(found["target"], origin, page)
        if target.endswith(".html") and not re.match(r"[a-z]+:", target):
            return f'<a href="{target}">{found["text"]}</a>'
        return f"{found['open']}{target})"

    def _target(self, target: str, origin: Path, page: str) -> str:
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            return target
        name, _, anchor = target.partition("#")
        as_it_is = name.endswith("?source")
        file = (origin.parent / name.removesuffix("?source")).resolve()
        made = file.is_relative_to(DOCS) and file.relative_to(DOCS).with_suffix("").as_posix() in self.made
        if not (file.exists() or made):
            raise BrokenLink(f"{origin.relative_to(ROOT)}: no {target}")
        if not file.is_relative_to(ROOT):
            raise BrokenLink(f"{origin.relative_to(ROOT)}: {target} leads out of the repository")
        there = self.source / self.place(file, as_it_is)
        said = os.path.relpath(there, (self.source / page).parent)
        return said + (f"#{anchor}" if anchor else "")

    def place(self, file: Path, as_it_is: bool = False) -> str:
        """Where a file of the repository is in the site; it is shown there if it has no page yet, or as the text that it is."""
        if file in self.page_of and not as_it_is:
            return f"{self.page_of[file]}.md"
        if file.is_relative_to(DOCS) and file.suffix == ".md":
            return file.relative_to(DOCS).as_posix()
        told = file.relative_to(ROOT).as_posix()
        if file.suffix == ".html":
            self.ready[f"repository/{told}"] = file
            return f"repository/{told}"
        if file.suffix in PICTURES:
            picture = self.source / "repository" / told
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(file.read_bytes())
            return f"repository/{told}"
        page = f"repository/{told.removesuffix('.md')}"
        if file not in self.shown:
            self.shown.append(file)
            self._show(file, page)
        return f"{page}.md"

    def _show(self, file: Path, page: str) -> None:
        """A page of the file itself: Markdown as Markdown, a folder as a list of links, all else as text."""
        told = file.relative_to(ROOT).as_posix()
        if file.suffix == ".md":
            self.write(page, file.read_text(encoding="utf-8"), file)
            return
        head = f"---\norphan: true\nnosearch: true\n---\n\n# {told}\n\n"
        if file.is_dir():
            files = sorted(f for f in file.iterdir() if f.suffix in (*LANGUAGES, ".md", ".csv") and not f.name.startswith("_"))
            self.write(page, head + "".join(f"- [{f.name}]({f.name})\n" for f in files), file / "x")
            return
        text = file.read_text(encoding="utf-8")
        marks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        self.write(page, f"{head}{marks}{LANGUAGES.get(file.suffix, 'text')}\n{text}\n{marks}\n", file)
