"""Plug-ins are found by name: the file name is the plug-in's name, and its class is named after the contract.

    lorm                      server/aggregators/lorm.py
    ./my_rule.py              a file of the user's own
    my_package.rules.robust   a dotted module name
No registry: a table filled by decorators is empty in a worker process, an import by name is not.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from fedsim.core.errors import PluginError, did_you_mean, one_line

USER_FILE = "fedsim_user_"  # how modules of files of the user's own are called


@dataclass(frozen=True)
class Kind:
    """A family of plug-ins: where the files lie, and the name of their class, which is that of its contract."""

    package: str
    class_name: str

    @property
    def contract(self) -> type[Any]:
        """Found by name, as plug-ins are: configs are read by who needs no contract, and contracts speak of configs."""
        found: type[Any] = getattr(importlib.import_module("fedsim.core.contracts"), self.class_name)
        return found


KINDS = {
    "aggregators": Kind("server.aggregators", "Aggregator"),
    "consolidators": Kind("server.consolidators", "Consolidator"),
    "calibrators": Kind("server.calibrators", "Calibrator"),
    "merging": Kind("server.merging", "Merging"),
    "adapters": Kind("fedsim.models.adapters", "Adapter"),
    "heads": Kind("fedsim.models.heads", "Head"),
    "sources": Kind("fedsim.data.sources", "Source"),
    "partitions": Kind("fedsim.data.partitions", "Partition"),
    "learners": Kind("clients.learners", "Learner"),
    "statistics": Kind("clients.statistics", "Statistic"),
    "channels": Kind("clients.channels", "Channel"),
    "pools": Kind("clients.pools", "Pool"),
    "trackers": Kind("fedsim.watch.trackers", "Tracker"),
}
BY_NAME = ("learners", "channels")  # kinds whose memory and draws go by the plug-in's short name


def singular(kind: str) -> str:
    """What one plug-in of a kind is called: aggregator, merging rule."""
    return "merging rule" if kind == "merging" else kind.removesuffix("s")


def names(kind: str) -> list[str]:
    """Names of the plug-ins of a kind that come with fedsim, without importing them."""
    package = importlib.import_module(KINDS[kind].package)
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def load(kind: str, name: str) -> type[Any]:
    """The class of a plug-in. Raises PluginError that says what is known, or what is wrong with the user's file."""
    what = KINDS[kind]
    module = _module(kind, name)
    found = getattr(module, what.class_name, None)
    if found is None or found is what.contract:
        raise PluginError(f"{name} defines no class named {what.class_name}: {singular(kind)} plug-ins are found by that name")
    if not (isinstance(found, type) and issubclass(found, what.contract)):
        raise PluginError(f"{name}: class {what.class_name} must derive from fedsim.core.contracts.{what.class_name}")
    if is_dataclass(what.contract) and not ("__dataclass_params__" in vars(found) and vars(found)["__dataclass_params__"].frozen):
        raise PluginError(f"{name}: class {what.class_name} must be decorated with @dataclass(frozen=True)")
    abstract = sorted(getattr(found, "__abstractmethods__", ()))
    if abstract:
        raise PluginError(f"{name}: class {what.class_name} lacks the method{'s' * (len(abstract) > 1)} {', '.join(abstract)}")
    _require_signatures(name, found, what)
    return found


@cache
def _require_signatures(name: str, found: type[Any], what: Kind) -> None:
    """Raise PluginError for a method that cannot be called as its contract's is, and for one in the place of a property."""
    for member, promised in vars(what.contract).items():
        own, see = inspect.getattr_static(found, member), f"see fedsim.core.contracts.{what.class_name}"
        if member.startswith("_") or own is promised or not inspect.isfunction(own):
            continue
        if isinstance(promised, property):
            raise PluginError(f"{name}: its {member} must be a property, with @property above it, {see}")
        if inspect.isfunction(promised) and not _takes(own, promised):
            names = list(inspect.signature(promised).parameters)[1:]
            raise PluginError(f"{name}: its {member} must take ({', '.join(names)}), {see}")


def _takes(own: Callable[..., Any], promised: Callable[..., Any]) -> bool:
    """Whether it can be called with all that is promised: by position, or what has a default by name."""
    asked = inspect.signature(promised).parameters.values()
    by_name = dict.fromkeys(p.name for p in asked if p.kind is p.KEYWORD_ONLY)
    defaults = dict.fromkeys(p.name for p in asked if p.default is not p.empty)
    positional = [p for p in asked if p.name not in by_name]
    ways = (positional, by_name), ([p for p in positional if p.name not in defaults], by_name | defaults)
    for args, kwargs in ways:
        try:
            inspect.signature(own).bind(*args, **kwargs)
        except TypeError:
            continue
        return True
    return False


def kinds_of(name: str) -> list[str]:
    """The kinds of which a name stands for a plug-in: a file may define several classes, and two kinds may have one name.

    Raises PluginError if there is none."""
    if is_path(name) or "." in name:
        module = _module("aggregators", name)  # the kind matters for bare names only
        found = [kind for kind, what in KINDS.items() if _defines(module, what)]
        classes = ", ".join(what.class_name for what in KINDS.values())
        if not found:
            raise PluginError(f"{name} defines no plug-in: its class is named like its contract, one of {classes}")
        return found
    found = [kind for kind in KINDS if name in names(kind)]
    if not found:
        raise PluginError(f"there is no plug-in '{name}'.{did_you_mean(name, {n for kind in KINDS for n in names(kind)})}")
    return found


def _defines(module: ModuleType, what: Kind) -> bool:
    """Whether a class of that name is there and none that was imported to derive from or to use."""
    found = getattr(module, what.class_name, None)
    return isinstance(found, type) and found is not what.contract and found.__module__ == module.__name__


def require(package: str, who: str, extra: str | None = None) -> None:
    """Import a package of an extra (default: of the same name). Raises PluginError that says how to install it."""
    try:
        importlib.import_module(package)
    except Exception as e:
        if isinstance(e, ModuleNotFoundError) and e.name == package:
            raise PluginError(
                f"{who} needs the package '{package}', which is not installed: pip install 'fedsim[{extra or package}]'"
            ) from e
        raise PluginError(f"{who}: the package '{package}' does not load: {type(e).__name__}: {e}") from e


def is_path(name: str) -> bool:
    """Whether a plug-in is named by the path of its file."""
    return name.endswith(".py")


def short_name(name: str) -> str:
    """The last part of a plug-in's name, without folders and packages."""
    return Path(name).stem if is_path(name) else name.rpartition(".")[2]


def is_own(kind: str, name: str) -> bool:
    """Whether a plug-in is the user's own, a file or a module, not one of fedsim's."""
    return name.removeprefix(f"{KINDS[kind].package}.") not in names(kind)


def fingerprint(name: str) -> str:
    """What a plug-in does, as far as its name says: the hash of the content of a user's file, else the name itself."""
    return hashlib.sha256(Path(name).read_bytes()).hexdigest() if is_path(name) else name


def _module(kind: str, name: str) -> ModuleType:
    package = KINDS[kind].package
    if is_path(name):
        return _module_from_file(Path(name).resolve())
    dotted = name if "." in name else f"{package}.{name}"
    if not all(part.isidentifier() for part in dotted.split(".")):
        hint = did_you_mean(name, names(kind))
        raise PluginError(f"'{name}' names no {singular(kind)}, no file that ends in .py, and no dotted module.{hint}")
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError as e:
        if e.name is None or not (dotted == e.name or dotted.startswith(e.name + ".")):
            raise PluginError(f"{singular(kind)} '{name}' needs the package '{e.name}', which is not installed") from e
        if "." in name:
            raise PluginError(f"no module '{name}' for {KINDS[kind].class_name}: is it on PYTHONPATH?") from e
        raise PluginError(f"unknown {singular(kind)} '{name}'.{did_you_mean(name, names(kind))}") from e
    except (Exception, SystemExit) as e:  # a script that ends itself is no plug-in
        raise PluginError(f"{singular(kind)} '{name}' does not load: {one_line(e)}") from e


def _module_from_file(path: Path) -> ModuleType:
    try:
        source = path.read_bytes()
    except (OSError, ValueError) as e:  # ValueError: a null character
        what = "no file" if isinstance(e, FileNotFoundError) else f"{one_line(e)}:"
        raise PluginError(f"{what} {path}: a plug-in named by path is looked for beside the YAML that names it") from e
    # the source is part of the name: a file that was edited is another module, in a long session too
    name = f"{USER_FILE}{path.stem}_{hashlib.sha256(str(path).encode() + source).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        exec(compile(source, path, "exec"), module.__dict__)  # past the bytecode cache, which trusts the file's second
    except (Exception, SystemExit) as e:  # a script that ends itself is no plug-in
        del sys.modules[name]
        raise PluginError(f"{path} does not load: {one_line(e)}") from e
    return module
