"""One HTML file that holds all that it shows: data, charts, and the libraries that draw them. Its content policy forbids to fetch
anything, and scripts are allowed by their hash, so that nothing else in the file can run.

A page is `page.html` with parts, a script of its own, and data; `shared.js` is what all pages do.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import math
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

from fedsim.core.home import __version__
from fedsim.report import theme
from fedsim.report.figures import vega_lite

if TYPE_CHECKING:
    import pandas as pd

ROUNDING = "whose speeds differ, and last bits, and with them accuracies by some tenths"  # of several processors


def written(name: str, parts: Mapping[str, str], data: Any) -> str:
    """The file of a page whose script is `<name>.js`. parts: HTML already, for the places of `page.html`; data: what the script
    reads."""
    scripts = {"bundle": _bundle(), "shared": _file("shared.js"), "script": _file(f"{name}.js")}
    frame = {
        "hashes": " ".join(f"'sha256-{_sha256(text)}'" for text in scripts.values()),
        "version": esc(__version__),
        "style": _style(_file("style.css")),
        "data": _json(data),
    }
    return Template(_file("page.html")).substitute({**frame, **scripts, **parts})


def esc(text: object) -> str:
    """For a place in HTML: text that comes from runs is never trusted."""
    return html.escape(str(text), quote=True)


def counted(found: Counter[str]) -> str:
    """How many of each, the most first: "A (2), not named (1)"."""
    return ", ".join(f"{name or 'not named'} ({n})" for name, n in found.most_common())


def file_name(title: str) -> str:
    """A title as part of a file's name."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in title)


def pack(frame: pd.DataFrame) -> dict[str, Any]:
    """Columns instead of rows; texts by number; numbers with five digits; null for what is undefined."""
    columns: dict[str, Any] = {}
    for name in frame.columns:
        values = frame[name].tolist()
        if values and isinstance(values[0], str):
            levels = list(dict.fromkeys(values))
            number = {level: i for i, level in enumerate(levels)}
            columns[str(name)] = {"levels": levels, "values": [number[v] for v in values]}
        else:
            columns[str(name)] = {"values": [_number(v) for v in values]}
    return {"length": len(frame), "columns": columns}


def _number(value: float) -> float | int | None:
    if isinstance(value, int):
        return value
    return None if math.isnan(value) or math.isinf(value) else float(f"{value:.5g}")


def _file(name: str) -> str:
    return (files("fedsim.report") / name).read_text(encoding="utf-8")


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, of the versions that Altair writes for."""
    import vl_convert

    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=vega_lite())
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _style(sheet: str) -> str:
    light, dark = theme.css(theme.LIGHT), theme.css(theme.DARK)
    colours = (
        f":root {{ {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root:not([data-theme='light']) {{ {dark} }} }}\n"
        f"@media screen {{ :root[data-theme='dark'] {{ {dark} color-scheme: dark; }} }}\n"
        "@media screen { :root[data-theme='light'] { color-scheme: light; } }\n"
        "@media print { :root { color-scheme: light; } }\n"
    )
    return colours + sheet.replace("$font", theme.FONT)


def _json(value: Any) -> str:
    """JSON that may stand in a script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
