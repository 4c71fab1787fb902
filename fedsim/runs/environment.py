"""What a run notes about where it ran: versions, machine, git commit, command line."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from fedsim.core.home import ROOT, __version__

PACKAGES = ("torch", "transformers", "ray", "flwr", "numpy", "omegaconf", "safetensors")


def environment() -> dict[str, Any]:
    """Versions, machine, git commit of the source tree (None outside of one), command line."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        **_of_process(),
    }


@cache
def _of_process() -> dict[str, Any]:
    """What does not change while a process lives: it runs the code that it has loaded."""
    return {
        "fedsim": __version__,
        "git": _git_state(Path(ROOT)),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
    }


def version(package: str) -> str | None:
    """Of a package that is installed, else None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state(root: Path) -> dict[str, Any] | None:
    """Commit and whether files differ from it, if `root` is itself the top of a work tree."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, encoding="utf-8", check=True, timeout=10
        ).stdout.strip()

    if not (root / ".git").exists():
        return None
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
