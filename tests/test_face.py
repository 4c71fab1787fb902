"""The public face: `from fedsim import …` gives what users write with, and imports it then, not before."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import fedsim


def modules_after(program: str) -> set[str]:
    """All modules that a fresh process has loaded after a program."""
    shown = program + "\nimport sys\nprint(*sys.modules)\n"
    root = Path(fedsim.__file__).parents[1]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", shown], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_fedsim_alone_costs_nothing() -> None:
    loaded = modules_after("import fedsim\nassert fedsim.__version__\nassert 'run' in dir(fedsim)")
    assert not loaded & {"torch", "ray", "numpy", "yaml", "rich"}
    assert {m for m in loaded if m.startswith("fedsim")} == {"fedsim", "fedsim.core", "fedsim.core.home"}


def test_reading_a_config_needs_no_run() -> None:
    """torch says what devices there are; nothing else that a run needs is there."""
    loaded = modules_after("from fedsim import load")
    assert not loaded & {
        "ray",
        "transformers",
        "pandas",
        "fedsim.simulation",
        "fedsim.runs.results",
        "server.loop",
        "clients.local",
    }
    assert not loaded & {"fedsim.core.contracts"}


def typed() -> dict[str, str]:
    """Name -> module, as type checkers see it."""
    tree = ast.parse(Path(fedsim.__file__).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    imports = [n for n in block.body if isinstance(n, ast.ImportFrom)]
    return {alias.name: str(n.module) for n in imports for alias in n.names}


@pytest.mark.parametrize("name", [n for n in fedsim.__all__ if n != "__version__"])
def test_a_name_is_what_type_checkers_take_it_for(name: str) -> None:
    assert getattr(fedsim, name) is getattr(import_module(typed()[name]), name)


def test_type_checkers_know_every_name() -> None:
    assert {*typed(), "__version__"} == set(fedsim.__all__)


def test_every_plug_ins_contract_is_there() -> None:
    from fedsim.core.plugins import KINDS

    assert {kind.class_name for kind in KINDS.values()} <= set(fedsim.__all__)


def test_packages_come_when_they_are_asked_for() -> None:
    modules_after("import fedsim\nassert fedsim.report.write and fedsim.sweeps and fedsim.unlearning")


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ImportError, match="cannot import name 'Agregator' from 'fedsim'"):
        from fedsim import Agregator  # noqa: F401


def test_a_rule_that_derives_from_the_face_is_a_plug_in(tmp_path: Path) -> None:
    from fedsim.core import plugins

    (tmp_path / "half.py").write_text(
        "from dataclasses import dataclass\nimport fedsim\n\n\n@dataclass(frozen=True)\nclass Aggregator(fedsim.Aggregator):\n"
        "    def combine(self, state, params, updates, draw):\n        return state, params\n"
    )
    rule = plugins.load("aggregators", str(tmp_path / "half.py"))
    assert issubclass(rule, fedsim.Aggregator)
