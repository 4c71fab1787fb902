"""Colours, shapes and type, for the page and for the figures alike.

Charts name a colour as the page's style sheet does, `var(--c1)`, so that a chart turns dark or goes to print with the page and is
never drawn anew; `resolve` puts the light colours in for files. Any two of the eight series colours are at least 0.09 apart in
Oklab, also as simulated for protan, deutan and tritan vision (Machado et al. 2009), light and dark; marks differ in shape, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

STEPS = 12  # of the ramp k1, k2, …, for what has an order


def _ramp(*anchors: str) -> dict[str, str]:
    """Colours between anchors, evenly spaced."""
    parts = [[int(anchor[i : i + 2], 16) for i in (1, 3, 5)] for anchor in anchors]
    colours = {}
    for step in range(STEPS):
        place = step * (len(anchors) - 1) / (STEPS - 1)
        left = min(int(place), len(anchors) - 2)
        mixed = [round(a + (b - a) * (place - left)) for a, b in zip(parts[left], parts[left + 1], strict=True)]
        colours[f"k{step + 1}"] = "#" + "".join(f"{c:02x}" for c in mixed)
    return colours


LIGHT: Mapping[str, str] = {
    **_ramp("#14304d", "#2a6396", "#3088a0", "#4d9a68", "#a08f1c"),
    "page": "#f6f7f9",
    "surface": "#ffffff",
    "ink": "#16191f",
    "soft": "#555d6b",
    "faint": "#8a92a0",
    "rule": "#e3e6eb",
    "axis": "#aab1bd",
    "accent": "#1e67a7",
    "notice": "#fff6e0",
    "notice-rule": "#d6a22e",
    "c1": "#1e67a7",
    "c2": "#d45e05",
    "c3": "#239878",
    "c4": "#f46ac2",
    "c5": "#d6a22e",
    "c6": "#12b0fe",
    "c7": "#8c005f",
    "c8": "#794e14",
    "other": "#98a0ad",
}
DARK: Mapping[str, str] = {
    **_ramp("#5673c9", "#4f9ad6", "#5cbfc4", "#8fd48f", "#efdc7c"),
    "page": "#0f1115",
    "surface": "#171a20",
    "ink": "#e8eaee",
    "soft": "#a9b0bc",
    "faint": "#7d8593",
    "rule": "#2a2f38",
    "axis": "#5a626f",
    "accent": "#66b4ff",
    "notice": "#2a2414",
    "notice-rule": "#b68a1e",
    "c1": "#1585fa",
    "c2": "#fe7502",
    "c3": "#7af8dc",
    "c4": "#c287a6",
    "c5": "#f2c668",
    "c6": "#66c0ff",
    "c7": "#bd3596",
    "c8": "#916738",
    "other": "#717a88",
}
SERIES = tuple(f"var(--c{i})" for i in range(1, 9))
OTHER = "var(--other)"
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [10, 5], [4, 4])
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"

CONFIG: Mapping[str, Any] = {
    "background": "transparent",
    "font": FONT,
    "padding": 4,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--soft)",
        "titleColor": "var(--soft)",
        "titleFontWeight": "normal",
        "titleFontSize": 12,
        "labelFontSize": 11,
        "gridColor": "var(--rule)",
        "domainColor": "var(--axis)",
        "tickColor": "var(--axis)",
        "titlePadding": 8,
        "labelOverlap": True,
    },
    "axisX": {"grid": False},
    "axisY": {"domain": False, "ticks": False},
    "header": {"labelColor": "var(--ink)", "titleColor": "var(--soft)", "labelFontSize": 11, "titleFontWeight": "normal"},
    "legend": {
        "labelColor": "var(--ink)",
        "titleColor": "var(--soft)",
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "labelLimit": 320,
        "orient": "top",
        "direction": "horizontal",
        "title": None,
        "symbolSize": 70,
        "columnPadding": 16,
    },
    "line": {"strokeWidth": 2, "strokeCap": "round", "strokeJoin": "round"},
    "point": {"filled": True, "size": 55, "opacity": 1},
    "text": {"color": "var(--ink)", "fontSize": 11},
    "rule": {"color": "var(--axis)"},
}


def resolve(spec: Mapping[str, Any], colours: Mapping[str, str] = LIGHT) -> dict[str, Any]:
    """The chart with the colours themselves, for files that no style sheet reaches."""
    text = re.sub(r"var\(--([\w-]+)\)", lambda m: colours.get(m[1], m[0]), json.dumps(spec))
    resolved: dict[str, Any] = json.loads(text)
    return resolved


def css(colours: Mapping[str, str]) -> str:
    """Custom properties of a style sheet."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())
