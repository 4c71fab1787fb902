"""fedsim completion: the script by which a shell completes commands, options, presets, and keys of a config with their values."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedsim.core.errors import PluginError

SHELLS = ("bash", "zsh", "fish")
HELP = """Print the script that makes a shell complete fedsim's words with the Tab key: commands, options, presets, and keys with
their values (server.aggregator=lo<Tab>). To have it in every shell:

  bash   echo 'eval "$(fedsim completion bash)"' >> ~/.bashrc
  zsh    echo 'autoload -U compinit && compinit; eval "$(fedsim completion zsh)"' >> ~/.zshrc
  fish   fedsim completion fish > ~/.config/fish/completions/fedsim.fish
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `fedsim completion` takes."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.description = HELP
    command.add_argument("shell", choices=SHELLS, help="the shell that is to be told")


def run(args: argparse.Namespace) -> int:
    """fedsim completion: print the script."""
    sys.stdout.write(_argcomplete().shellcode(["fedsim"], shell=args.shell) + "\n")
    return 0


def answer(parser: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser]) -> None:
    """Where a shell asks (argcomplete's environment variables say so), print what a word may become and end; else nothing."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    for name, command in commands.items():
        for action in command._actions:
            if completer := COMPLETERS.get((name, action.dest)) or COMPLETERS.get(("", action.dest)):
                action.completer = completer  # type: ignore[attr-defined]
    _argcomplete().autocomplete(parser, always_complete_options=False)


def words(prefix: str) -> list[str]:
    """What may follow where a config stands: presets and YAML files, or keys and what they may be."""
    return overrides(prefix) if "=" in prefix or "." in prefix else [*_presets(), *_yaml_files(prefix), *overrides(prefix)]


def overrides(prefix: str) -> list[str]:
    """Keys of the section that is being written, and its values after the =."""
    from fedsim.core import outline

    found, kinds = outline.keys(), outline.plugin_keys()
    key, equals, _ = prefix.partition("=")
    if equals:
        return [f"{key}={word}" for word in found.get(key, ())]
    section = prefix.rpartition(".")[0]
    if section in kinds and kinds[section] != "pools":
        return [f"{section}.{option}=" for option in outline.options(kinds[section])]
    known = {f"{name}." for name, kind in kinds.items() if kind != "pools"}.union(f"{name}=" for name in found)
    return sorted({_cut(name, prefix.count(".") + 1) for name in known if name.startswith(prefix)})


def _cut(key: str, depth: int) -> str:
    """A key as far as it is being written, with the dot where there is more."""
    parts = key.split(".")
    return key if len(parts) <= depth else f"{'.'.join(parts[:depth])}."


def _presets() -> list[str]:
    from fedsim.core import presets

    return sorted({name for part in (presets.WHOLE, presets.STREAMS, presets.METHODS) for name in presets.names(part)})


def _yaml_files(prefix: str) -> list[str]:
    found: Iterable[str] = _argcomplete().completers.FilesCompleter(("yaml", "yml"))(prefix)
    return list(found)


def _kinds() -> list[str]:
    from fedsim.core import plugins

    return list(plugins.KINDS)


def _skeletons() -> list[str]:
    from fedsim.cli import new

    return list(new.kinds())


def _plugins(prefix: str) -> list[str]:
    from fedsim.core import plugins

    files: Iterable[str] = _argcomplete().completers.FilesCompleter(("py",))(prefix)
    return [*files, *(name for kind in plugins.KINDS for name in plugins.names(kind))]


# (command, argument) -> what completes it; without a command, wherever the argument stands
COMPLETERS: dict[tuple[str, str], Callable[..., list[str]]] = {
    ("", "configs"): lambda prefix, **_: words(prefix),
    ("", "overrides"): lambda prefix, **_: overrides(prefix),
    ("check", "overrides"): lambda prefix, **_: [],
    ("check", "plugin"): lambda prefix, **_: _plugins(prefix),
    ("list", "kind"): lambda prefix, **_: _kinds(),
    ("new", "kind"): lambda prefix, **_: _skeletons(),
    ("sweep", "sweep"): lambda prefix, **_: _yaml_files(prefix),
    ("tune", "tuning"): lambda prefix, **_: _yaml_files(prefix),
}


def _argcomplete() -> Any:
    try:
        return importlib.import_module("argcomplete")
    except ImportError as e:
        raise PluginError("completion needs the package 'argcomplete', which is not installed: pip install argcomplete") from e
