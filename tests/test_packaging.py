"""What a user installs: files, versions, entry points; and the arrows between packages."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from packaging.requirements import Requirement
from packaging.version import Version

import fedsim
from fedsim import cli
from tests.report.factory import fake_run
from tests.tiny import tiny

ROOT = Path(fedsim.__file__).resolve().parents[1]
EXTRAS = ("report", "notebook", "flower", "huggingface", "test", "docs", "dev")


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.fixture(scope="module")
def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def requirements(parser: configparser.ConfigParser) -> list[Requirement]:
    texts = [parser["options"]["install_requires"], *(parser["options.extras_require"][extra] for extra in EXTRAS)]
    return [Requirement(line) for text in texts for line in text.splitlines() if line.strip()]


def pin_of(pins: list[Requirement], name: str, python: str) -> Version | None:
    """The version that is pinned for a Python on Linux; None if it is not."""
    environment = {
        "python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "platform_machine": "x86_64",
        "platform_python_implementation": "CPython", "implementation_name": "cpython", "extra": "",
    }  # fmt: skip
    found = [p for p in pins if p.name == name and (p.marker is None or p.marker.evaluate(environment))]
    assert len(found) <= 1, f"{name} is pinned twice for Python {python}"
    return Version(str(found[0].specifier).removeprefix("==")) if found else None


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_every_requirement_is_pinned_within_its_bounds(
    setup_cfg: configparser.ConfigParser, pins: list[Requirement], python: str
) -> None:
    for requirement in requirements(setup_cfg):
        version = pin_of(pins, requirement.name.lower(), python)
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            assert version is not None, requirement
            assert version in requirement.specifier, requirement


def test_pins_are_plain(pins: list[Requirement]) -> None:
    for pin in pins:
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)), f"{pin}: one version, no local build"
        assert pin.url is None


def test_constraints_name_no_host() -> None:
    assert "://" not in (ROOT / "constraints.txt").read_text()


def test_this_environment_is_the_pinned_one(pins: list[Requirement], setup_cfg: configparser.ConfigParser) -> None:
    from importlib.metadata import version

    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    for requirement in requirements(setup_cfg)[:9]:
        assert Version(version(requirement.name)).public == str(pin_of(pins, requirement.name, python)), requirement


def test_pyproject_does_not_hide_setup_cfg() -> None:
    """A [tool.pytest...] or [tool.mypy] table there would silently switch off the one in setup.cfg."""
    text = (ROOT / "pyproject.toml").read_text()
    assert not re.search(r"^\[(tool\.(pytest|mypy|importlinter)|project)", text, re.MULTILINE)


def test_wheel_holds_packages_data_and_command(tmp_path: Path) -> None:
    """Built from a copy, so that nothing is left in the source tree."""
    source = tmp_path / "source"
    files = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True)
    if files.returncode != 0:
        pytest.skip("not a git work tree")
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    program = "from setuptools import build_meta; build_meta.build_wheel('out'); build_meta.build_sdist('out')"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel = next((source / "out").glob("*.whl"))
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        "fedsim/py.typed", "clients/py.typed", "server/py.typed", "fedsim/assets/omniglot/omniglot_28.npz",
        "fedsim/assets/omniglot/LICENSE", "fedsim/assets/omniglot_vit/model.safetensors",
        "fedsim/assets/omniglot_vit/config.json", "fedsim/assets/fashion_mnist/fashion_mnist_28.npz",
        "fedsim/assets/fashion_mnist/LICENSE",
    }  # fmt: skip
    for package in ("fedsim", "clients", "server"):
        wanted |= {p.relative_to(ROOT).as_posix() for p in (ROOT / package).rglob("*.py")}
    assert wanted <= held, wanted - held
    assert {name.split("/")[0] for name in held if "-" not in name.split("/")[0]} == {"fedsim", "clients", "server"}
    shipped = {name.partition("share/fedsim/")[2] for name in held}
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.yaml")} <= shipped
    info = f"fedsim-{fedsim.__version__}.dist-info"
    assert "fedsim = fedsim.cli:main" in zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()
    metadata = zipfile.ZipFile(wheel).read(f"{info}/METADATA").decode()
    assert "Requires-Python: >=3.10" in metadata
    assert "License-Expression: MIT" in metadata
    assert all(f"Provides-Extra: {extra}" in metadata for extra in EXTRAS)
    assert wheel.stat().st_size < 10e6
    with tarfile.open(next((source / "out").glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    configs = {p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.yaml")}
    assert {*wanted, *configs, "setup.cfg", "pyproject.toml", "README.md", "constraints.txt"} <= packed
    assert not any(name.startswith(("tests/", "experiments/")) for name in packed)


def test_a_run_needs_no_package_of_the_report(setup_cfg: configparser.ConfigParser) -> None:
    core, report = (
        {Requirement(line).name for line in text.splitlines() if line.strip()}
        for text in (setup_cfg["options"]["install_requires"], setup_cfg["options.extras_require"]["report"])
    )
    assert not core & {*report, "ipywidgets"}
    assert {"altair", "pandas", "scipy", "pyarrow", "matplotlib", "vl-convert-python"} == report


@pytest.mark.parametrize(
    ("words", "package", "what"),
    [
        (["report", "RUN"], "altair", "fedsim report"),
        (["results", "RUN"], "pandas", "a frame of runs"),
        (["results", "RUN"], "scipy", "statistics over runs"),
        (["results", "RUN", "--parquet", "runs.parquet"], "pyarrow", "a Parquet file"),
        (["partition", "quickstart", "--picture", "split.png"], "matplotlib", "a picture"),
    ],
)
def test_a_package_that_is_missing_is_asked_for_in_one_line(
    words: list[str],
    package: str,
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run = fake_run(tiny(), 20.0, tmp_path / "run")
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main([str(run) if word == "RUN" else word for word in words]) == 2
    want = f"fedsim: error: {what} needs the package '{package}', which is not installed: pip install 'fedsim[report]'"
    assert capsys.readouterr().err.strip() == want


def test_import_arrows_point_down() -> None:
    """Siblings do not import each other, and each framework stays in its file."""
    pytest.importorskip("importlinter", reason="part of the dev extra; `make check` runs it too")
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_citation_names_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["version"], cited["license"]) == (fedsim.__version__, "MIT")
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
