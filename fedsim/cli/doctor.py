"""fedsim doctor: what is installed here, what this machine can do, and what is missing for which extra."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Mapping

from fedsim.cli.printing import console, human_bytes, line_printer
from fedsim.core.home import ROOT


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `fedsim doctor` takes: nothing."""


def run(args: argparse.Namespace) -> int:
    """fedsim doctor: line by line; exit code 1 if a package is missing that every run needs."""
    from fedsim.runs.environment import version

    print_line = line_printer(console())
    wanted = requirements()
    missing = [name for name in wanted.get("", ()) if version(name) is None]
    for head, text in (*_machine(), *_packages(wanted)):
        print_line(f"{head:<13}{text}")
    if missing:
        print_line(f"Missing: {', '.join(missing)}. Install fedsim anew: pip install --constraint constraints.txt --editable .")
    return 1 if missing else 0


def _machine() -> Iterator[tuple[str, str]]:
    """Where fedsim lies and what runs it."""
    from fedsim.core import hardware, presets
    from fedsim.runs.environment import environment, version_of

    told = environment()
    yield "fedsim", f"{version_of(told)} in {ROOT}"
    yield "presets", f"{len(presets.names(presets.METHODS))} methods, {len(presets.names(presets.STREAMS))} streams"
    yield "python", f"{told['python']} on {told['platform']}"
    free = hardware.free_memory()
    memory = "" if free is None else f", {human_bytes(free)} of memory free"
    yield "machine", f"{told['cpu']}, {hardware.cores()} of {told['cores']} cores for this process{memory}"
    yield from _devices()
    folder = os.environ.get("FEDSIM_DATA")
    yield "FEDSIM_DATA", "not set: streams on your own files need it" if folder is None else _folder(folder)


def _devices() -> Iterator[tuple[str, str]]:
    """What can train, and what the defaults of `runtime` become here."""
    import torch

    from fedsim.core import hardware
    from fedsim.core.config import RuntimeConfig, resolve_device, resolve_fused

    for kind in ("cuda", "xpu"):
        for index in range(getattr(torch, kind).device_count()):
            yield f"{kind}:{index}", getattr(torch, kind).get_device_name(index)
    device = resolve_device("auto")
    fused = "clients train together" if resolve_fused("auto", device, RuntimeConfig().pool) else "one client after the other"
    kernels, half = hardware.best_kernels(device), "faster" if hardware.has_bf16(device) else "no faster, so fp32 is used"
    yield "runtime", f"device {device}, {fused}, kernels {kernels}, bf16 {half}"


def _packages(wanted: Mapping[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Versions, of the packages of every run and of each extra; what is missing, and how to get it."""
    from fedsim.runs.environment import version

    for extra, names in wanted.items():
        found = {name: version(name) for name in names}
        there = ", ".join(f"{name} {number}" for name, number in found.items() if number is not None)
        lacking = [name for name, number in found.items() if number is None]
        hint = f"{', '.join(lacking)} not installed: pip install 'fedsim[{extra}]'" if lacking and extra else ""
        yield extra or "packages", "; ".join(part for part in (there, hint) if part)


def requirements() -> dict[str, list[str]]:
    """Names of packages by extra, as this fedsim was installed with; "" for those of every run. Developers' are left out."""
    from importlib import metadata

    found: dict[str, list[str]] = {"": []}
    try:
        lines = metadata.requires("fedsim") or []
    except metadata.PackageNotFoundError:
        lines = []
    for line in lines:
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"""extra == ["']([\w-]+)["']""", line)
        if name and (extra is None or extra[1] not in ("test", "docs", "dev")):
            found.setdefault("" if extra is None else extra[1], []).append(name[0])
    return found


def _folder(folder: str) -> str:
    return folder if os.path.isdir(folder) else f"{folder}, which is no folder"
