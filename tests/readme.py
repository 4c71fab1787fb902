"""Code of the README, so that tests run what users read."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def median_rule() -> str:
    """The README's aggregator in a dozen lines."""
    return README.read_text().partition("<!-- median -->\n```python\n")[2].partition("```")[0]


def sweep_yaml() -> str:
    """The README's sweep."""
    return README.read_text().partition("<!-- sweep -->\n```yaml\n")[2].partition("```")[0]
