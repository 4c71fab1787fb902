"""Skeletons are plug-ins that keep the laws, and become a user's own under a name of his."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim import cli, laws
from fedsim.cli import new
from fedsim.core import plugins
from fedsim.runs import environment
from fedsim.sweeps.plan import expand

PLUGINS = [kind for kind in new.kinds() if kind != "study"]


@pytest.mark.parametrize("kind", PLUGINS)
def test_a_skeleton_keeps_the_laws(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"my_{kind}.py"
    assert cli.main(["new", kind, str(path)]) == 0
    assert new.NAME not in path.read_text()
    (family,) = plugins.kinds_of(str(path))
    results = laws.check_named(family, str(path))
    assert len(results) > 3
    assert [(r.name, r.explanation) for r in results if not r.ok or r.exempt] == []


def test_there_is_a_skeleton_of_all_that_a_method_is_made_of() -> None:
    """Pools and trackers are about machines and tools, not about methods."""
    known = {plugins.singular(kind).removesuffix(" rule") for kind in plugins.KINDS} - {"pool", "tracker"}
    assert {*PLUGINS} == known


def test_a_study_is_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "study", "my_study.yaml"]) == 0
    assert len(expand("my_study.yaml").runs) == 12


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["lerner", "x.py"], "no skeleton of 'lerner'. Did you mean 'learner'?"),
        (["learner", "x.yaml"], "x.yaml must be a plain name that ends with .py, e.g. my_learner.py"),
        (["learner", "my-method.py"], "my-method.py must be a plain name"),
        (["learner", "there.py"], "there.py is there already"),
        (["learner", "nowhere/x.py"], "nowhere/x.py cannot be written: No such file or directory"),
    ],
)
def test_what_cannot_be_written(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.py").write_text("mine")
    assert cli.main(["new", *words]) == 2
    assert told in capsys.readouterr().err
    assert (tmp_path / "there.py").read_text() == "mine" and len([*tmp_path.iterdir()]) == 1


def test_doctor_names_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["doctor"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {"fedsim", "presets", "python", "machine", "runtime", "packages", "flower"} <= set(lines)
    assert "torch " in lines["packages"] and "pytest" not in "".join(lines.values())
    has = environment.version
    monkeypatch.setattr(environment, "version", lambda package: None if package in ("flwr", "ray") else has(package))
    assert cli.main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "flwr not installed: pip install 'fedsim[flower]'" in told and "Missing: ray." in told
