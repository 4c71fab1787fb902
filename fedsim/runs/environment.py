"""What a run notes about where it ran, and what is told of it later: versions, machine, git commit, command line."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from fedsim.core.home import ROOT, __version__

FILE = "environment.json"  # in a run directory
PACKAGES = ("torch", "transformers", "ray", "flwr", "numpy", "omegaconf", "safetensors")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions, machine, git commit of the source tree (None outside of one), command line, and the `processor` whose last bits
    the numbers have: a device of torch by its name, the CPU with the instructions that torch's kernels use on it."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        **_of_process(),
        "processor": _processor(device),
    }


def noted(run: Path | None) -> Mapping[str, Any]:
    """What a run noted about itself; nothing where the file is not there or damaged."""
    try:
        found = json.loads((run / FILE).read_text(encoding="utf-8")) if run is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def version_of(noted: Mapping[str, Any], digits: int = 7) -> str:
    """Of fedsim, with the commit where it was a source tree: "0.8.0 commit 498561c", and " with changes" where files differed
    from it. Empty where it is not known."""
    git = noted.get("git")
    if not isinstance(git, dict) or "commit" not in git:
        return str(noted.get("fedsim", ""))
    return f"{noted.get('fedsim', '')} commit {str(git['commit'])[:digits]}{' with changes' if git.get('dirty') else ''}".strip()


def processor_of(noted: Mapping[str, Any]) -> str:
    """The processor, or all of them where a run went on elsewhere. Empty where it is not known."""
    parts = [noted, *(part for part in noted.get("resumed", ()) if isinstance(part, dict))]
    return " and ".join(dict.fromkeys(str(p) for part in parts if (p := part.get("processor") or part.get("cpu"))))


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


def _processor(device: str) -> str:
    import torch

    if device == "cpu":
        return f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
    try:
        return str(getattr(torch, torch.device(device).type).get_device_name(device))
    except (AttributeError, AssertionError, RuntimeError):  # one that torch has no names for, or that is not here
        return device


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
