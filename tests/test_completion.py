"""What a shell is offered when it completes a word of fedsim's, and that it need not wait for torch."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fedsim
from fedsim import cli
from fedsim.cli import completion
from fedsim.core import outline, plugins
from fedsim.core.config import PLUGIN_KEYS, SERVER_PLUGIN_KEYS, SimConfig

ROOT = Path(fedsim.__file__).parents[1]


def flat(values: Any, before: str = "") -> set[str]:
    """Dotted names of the fields of a config, but for what lies in a plug-in's section."""
    found = set()
    for f in dataclasses.fields(values):
        inner, name = getattr(values, f.name), f"{before}{f.name}"
        found |= flat(inner, f"{name}.") if dataclasses.is_dataclass(inner) else {name}
    return found


def test_the_keys_read_off_the_source_are_those_of_a_config() -> None:
    assert set(outline.keys()) == flat(SimConfig())
    server = {f"server.{key}": kind for key, kind in SERVER_PLUGIN_KEYS.items()}
    assert outline.plugin_keys() == {**PLUGIN_KEYS, **server, "runtime.pool": "pools"}


@pytest.mark.parametrize("kind", [*PLUGIN_KEYS.values(), *SERVER_PLUGIN_KEYS.values()])
def test_the_options_read_off_the_source_are_those_of_the_plug_ins(kind: str) -> None:
    told = {f.name for name in plugins.names(kind) for f in dataclasses.fields(plugins.load(kind, name)) if f.init}
    assert set(outline.options(kind)) == told


@pytest.mark.parametrize(
    ("word", "offered"),
    [
        ("client.l", {"client.lr=", "client.learners="}),
        ("client.lr", {"client.lr="}),
        ("client.lr=", set()),
        ("see", {"seed="}),
        ("stream.no", {"stream.noise."}),
        ("stream.noise.", {"stream.noise.kind=", "stream.noise.share="}),
        ("stream.noise.kind=", {"stream.noise.kind=symmetric", "stream.noise.kind=asymmetric"}),
        ("part", {"partition=", "partition."}),
        ("partition.al", {"partition.alpha="}),
        ("server.agg", {"server.aggregator=", "server.aggregator."}),
        ("server.aggregator=lor", {"server.aggregator=lorm", "server.aggregator=lora_fair"}),
        ("runtime.pool=", {f"runtime.pool={name}" for name in plugins.names("pools")}),
        ("runtime.cache=", {"runtime.cache=true", "runtime.cache=false"}),
        ("server.keep=", {"server.keep=null", "server.keep=tasks"}),
        ("clint.", set()),
    ],
)
def test_keys_and_values(word: str, offered: set[str]) -> None:
    assert {one for one in completion.overrides(word) if one.startswith(word)} == offered


def completed(line: str, folder: Path) -> tuple[list[str], str]:
    """What a shell that completes this line is given, and the modules of torch's kind that were imported for it."""
    out = folder / "offered"
    asked = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SHELL": "bash", "COMP_LINE": line,
        "COMP_POINT": str(len(line.encode())), "COMP_TYPE": "9", "_ARGCOMPLETE_STDOUT_FILENAME": str(out),
        "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n",
    }  # fmt: skip
    program = (  # argcomplete ends the process by itself
        "import os, sys, argcomplete\nreal = argcomplete.autocomplete\n"
        "heavy = {'torch', 'numpy', 'ray', 'yaml', 'rich'}\n"
        "def told(code):\n    print(*(heavy & set(sys.modules)), flush=True)\n    os._exit(code)\n"
        "argcomplete.autocomplete = lambda parser, **more: real(parser, exit_method=told, **more)\n"
        "from fedsim.cli import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **asked}, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [word.strip() for word in out.read_text().split("\n")], done.stdout.strip()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("fedsim ", set(cli.COMMANDS)),
        ("fedsim run lor", {"lorm", "lora_fair", "lorm_variance_weighted"}),
        ("fedsim run quick", {"quickstart"}),
        ("fedsim run min", {"mine.yaml"}),
        ("fedsim run lorm --res", {"--resume"}),
        ("fedsim run lorm server.consolidator=reg", {"server.consolidator=regmean"}),
        ("fedsim sweep ", {"mine.yaml"}),
        ("fedsim list lea", {"learners"}),
        ("fedsim new stu", {"study"}),
        ("fedsim completion ", set(completion.SHELLS)),
    ],
)
def test_what_a_shell_is_offered(line: str, offered: set[str], tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    (tmp_path / "mine.yaml").touch()
    words, heavy = completed(line, tmp_path)
    assert {word for word in words if word} == offered
    assert heavy == ""


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_script_of_a_shell_names_the_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("argcomplete")
    assert cli.main(["completion", shell]) == 0
    assert "fedsim" in capsys.readouterr().out


def test_without_the_package_it_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert cli.main(["completion", "bash"]) == 2
    assert capsys.readouterr().err.strip().endswith("is not installed: pip install argcomplete")
