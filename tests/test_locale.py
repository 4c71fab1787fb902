"""Files are UTF-8 wherever they are written and read; a terminal that knows ASCII only gets what it can show."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedsim.core import config as configs
from tests.tiny import TINY

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["Überß", "éàü", "漢字", "Ελλάς", "ясно", "🐦"]
SOURCES = [p for package in ("fedsim", "clients", "server") for p in sorted((ROOT / package).rglob("*.py"))]
ASCII_ONLY = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.processes
def test_names_beyond_ascii_in_a_locale_that_has_none(tmp_path: Path) -> None:
    """One process, since starting takes longest: run, read again, show, table, resume."""
    images, labels = np.random.default_rng(0).integers(0, 255, (72, 8, 8), dtype=np.uint8), np.tile(np.arange(6), 12)
    arrays = {f"{split}_{what}": a for split in ("train", "test") for what, a in (("images", images), ("labels", labels))}
    np.savez(tmp_path / "own.npz", class_names=np.array(NAMES), **arrays)
    data = {"source": "npz", "path": str(tmp_path / "own.npz")}
    config = configs.from_dict(TINY | {"data": data, "name": "Überß", "server": {"rounds": 1, "aggregator": "fedavg"}})
    (tmp_path / "own.yaml").write_text(config.to_yaml(), encoding="utf-8")
    program = f"""
import sys
from fedsim.cli import main
assert sys.stdout.encoding.lower() not in ("utf-8", "utf8"), sys.stdout.encoding
run = {str(tmp_path / "out")!r}
assert main(["run", {str(tmp_path / "own.yaml")!r}, "--output", run]) == 0
for words in (["run", "--resume", run], ["results", run], ["partition", {str(tmp_path / "own.yaml")!r}], ["list"]):
    assert main(words) == 0, words
"""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONIOENCODING" and not k.startswith("LC_")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=env | ASCII_ONLY, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode("ascii", "replace")
    assert b"FAA \\u2191" in done.stdout  # an arrow, for a terminal that has none
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert all(name in json.dumps(manifest, ensure_ascii=False) for name in NAMES)
    assert "漢字" in (tmp_path / "out" / "partition.csv").read_text(encoding="utf-8")
    assert "name: Überß" in (tmp_path / "out" / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_text_file_is_read_and_written_as_utf8(path: Path) -> None:
    bare = [node.lineno for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if _is_text_without_encoding(node)]
    assert not bare, f"lines {bare} of {path} leave the encoding to the locale"


def _is_text_without_encoding(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or any(k.arg in ("encoding", None) for k in node.keywords):
        return False
    if isinstance(node.func, ast.Attribute):
        of_subprocess = isinstance(node.func.value, ast.Name) and node.func.value.id == "subprocess"
        return node.func.attr in ("read_text", "write_text") or (of_subprocess and any(k.arg == "text" for k in node.keywords))
    mode = next((a.value for a in node.args[1:2] if isinstance(a, ast.Constant)), "r")
    return isinstance(node.func, ast.Name) and node.func.id == "open" and "b" not in str(mode)
