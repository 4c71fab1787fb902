"""What the laws of every kind of plug-in are made of, and how a plug-in is held against them.

A file `fedsim/laws/<kind>.py` for every kind has a tuple `LAWS`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any, Generic, TypeVar

import torch

from fedsim.core import config as configs
from fedsim.core import plugins
from fedsim.core.defaults import torch_defaults
from fedsim.core.errors import ConfigError, FedsimError, nearest

P = TypeVar("P")
Play = TypeVar("Play", bound=Callable[..., Any])


class LawBroken(Exception):
    """A plug-in broke a law; the message says where, with numbers."""


@dataclass(frozen=True)
class Law(Generic[P]):
    """A named property of the plug-ins of a kind. `check` raises LawBroken; None as its result means that the law holds."""

    name: str
    statement: str
    check: Callable[[P], None]


@dataclass(frozen=True)
class LawResult:
    """What became of one law. `exempt` is the plug-in's own reason for not keeping it (then it is not tried)."""

    name: str
    statement: str
    ok: bool
    exempt: str | None = None
    explanation: str = ""


def once(play: Play) -> Play:
    """What is played of a plug-in, called with the same words, is played once for all laws. Of the latest plug-in only."""
    latest: list[Any] = [None]
    known: dict[Any, Any] = {}

    @functools.wraps(play)
    def kept(plugin: Any, *how: Any) -> Any:
        if latest[0] is not plugin:
            latest[0] = plugin
            known.clear()
        if how not in known:
            known[how] = play(plugin, *how)
        return known[how]

    return kept  # type: ignore[return-value]


def laws_of(kind: str) -> tuple[Law[Any], ...]:
    """The laws of a kind of plug-ins."""
    found: tuple[Law[Any], ...] = importlib.import_module(f"fedsim.laws.{kind}").LAWS
    return found


def check(kind: str, plugin: Any) -> list[LawResult]:
    """Hold a plug-in against every law of its kind."""
    return hold(plugin, laws_of(kind))


def check_named(kind: str, name: str, options: Mapping[str, Any] | None = None) -> list[LawResult]:
    """Hold a plug-in that is found by name against the laws: with these options, or else with all of its own examples.

    A law is kept if it is kept with all of them; the explanation says with which options it is not.
    """
    key = configs.name_key(kind)
    several = plugins.load(kind, name).examples if options is None else (options,)
    found: dict[str, LawResult] = {}
    for chosen in several:
        plugin = _made(kind, {key: name, **chosen})
        for result in check(kind, plugin):
            before = found.get(result.name)
            if result.explanation and options is None and chosen:
                told = ", ".join(f"{k}={v}" for k, v in chosen.items())
                result = replace(result, explanation=f"with {told}: {result.explanation}")
            if before is None or (before.ok, before.exempt is None) > (result.ok, result.exempt is None):
                found[result.name] = result
    return list(found.values())


def strangers(kind: str, name: str) -> list[str]:
    """A line for every public method of a plug-in that nobody calls: its contract has none, its other methods do not name it."""
    found, contract = plugins.load(kind, name), plugins.KINDS[kind].contract
    known = [n for n in dir(contract) if not n.startswith("_")]
    methods = {n: value for n, value in vars(found).items() if inspect.isfunction(value)}
    named = {word for n, value in methods.items() for word in _names_in(value.__code__) if word != n}
    own = [n for n in methods if not n.startswith("_") and n not in dir(contract) and n not in named]
    return [f"'{n}' is no method of {contract.__name__}: fedsim never calls it.{nearest(n, known)}" for n in own]


def _names_in(code: CodeType) -> set[str]:
    """Names of attributes and globals that a function speaks of, and so the functions inside it."""
    inner = (_names_in(part) for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*inner)


def _made(kind: str, section: Mapping[str, Any]) -> Any:
    """A plug-in with its options; a pool has none, it is made with a run's work by whoever plays it."""
    if kind != "pools":
        return configs.build(kind, configs.expand(kind, section, "check"))
    name, *odd = section.values()
    if odd:
        raise ConfigError(f"pool {name} has no options here: what a pool is told lies in the section runtime of a run")
    return plugins.load(kind, name)


def hold(plugin: Any, laws: Sequence[Law[Any]]) -> list[LawResult]:
    """A plug-in against some laws. An exemption from a law that there is not is a broken one."""
    with torch_defaults(torch.get_num_threads()):
        results = [_judged(law, plugin) for law in laws]
    known = [law.name for law in laws]
    for name in plugin.exempt:
        if name not in known:
            explanation = f"exempt names the law '{name}', which there is not; laws: {', '.join(known)}"
            results.append(LawResult(name, "an exemption names a law", False, None, explanation))
    return results


def _judged(law: Law[Any], plugin: Any) -> LawResult:
    if law.name in plugin.exempt:
        return LawResult(law.name, law.statement, True, plugin.exempt[law.name])
    try:
        law.check(plugin)
    except LawBroken as e:
        return LawResult(law.name, law.statement, False, None, str(e))
    except Exception as e:  # a user's plug-in may raise anything: it is reported, not passed on
        frame = traceback.extract_tb(e.__traceback__)[-1]
        where = "" if isinstance(e, FedsimError) else f" ({frame.filename}, line {frame.lineno})"
        return LawResult(law.name, law.statement, False, None, f"raised {type(e).__name__}: {e}{where}")
    return LawResult(law.name, law.statement, True)
