"""What a result file says about the machine that it was measured on, and how it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedsim.runs.environment import environment


def write(name: str, results: dict[str, Any]) -> Path:
    """`<name>.json` beside this file: the machine, then what was measured."""
    seen = environment()
    machine = {key: seen[key] for key in ("cpu", "cores", "platform", "python", "fedsim", "packages")}
    path = Path(__file__).with_name(f"{name}.json")
    path.write_text(json.dumps({"machine": machine, **results}, indent=1) + "\n", encoding="utf-8")
    return path
