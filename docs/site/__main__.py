"""Builds the documentation: `python -m docs.site` (`make docs`) writes docs/_build/html, and fails on any warning.

What is written by hand lies in `docs`; the reference is made from docstrings, the schema and the commands' parsers. Links that
lead out of `docs` become pages of the site, so that nothing is left to a network.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from docs.site import reference
from docs.site.links import DOCS, ROOT, BrokenLink, Site

BUILD = DOCS / "_build"
DRAWING = re.compile(r"^!\[(?P<told>[^\]]*)\]\((?P<file>[\w/.-]+\.svg)\)$", re.MULTILINE)


def main() -> int:
    """Assemble the pages, and have Sphinx make HTML of them. 1 for a broken link, else Sphinx's exit code."""
    source = BUILD / "source"
    shutil.rmtree(BUILD, ignore_errors=True)
    source.mkdir(parents=True)
    site = Site(source)
    try:
        assemble(site)
    except BrokenLink as e:
        print(f"broken link: {e}", file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-j", "auto", "-c", str(DOCS / "site")]
    done = subprocess.run([*command, "-d", str(BUILD / "doctrees"), str(source), str(BUILD / "html")], cwd=ROOT)
    if done.returncode == 0:
        for place, file in site.ready.items():
            (BUILD / "html" / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, BUILD / "html" / place)
        print(f"{BUILD.relative_to(ROOT)}/html/index.html")
    return done.returncode


def assemble(site: Site) -> None:
    """Write all pages."""
    pages = reference.pages(site)
    site.made = {*pages}
    for page, (text, origin) in pages.items():
        site.write(page, text, origin)
    for file in sorted(DOCS.rglob("*.md")):
        if BUILD not in file.parents:
            text = DRAWING.sub(lambda m, file=file: _inline(m, file.parent), file.read_text(encoding="utf-8"))
            site.write(file.relative_to(DOCS).with_suffix("").as_posix(), text, file)


def _inline(found: re.Match[str], folder: Path) -> str:
    """A drawing of ours inside the page, where it takes the page's colours; other pictures stay pictures."""
    text = (folder / found["file"]).read_text(encoding="utf-8")
    if 'class="drawing"' not in text:
        return found[0]
    return f'```{{raw}} html\n<div class="drawing-frame">\n{text}\n</div>\n```'


if __name__ == "__main__":
    sys.exit(main())
