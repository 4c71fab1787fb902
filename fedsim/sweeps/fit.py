"""Which keys of a sweep apply to a run.

`set`, an axis or an override may name an option that the plug-in of some variant does not have: a rank for prompts, an α for a
joint run. There it is left out, and said to be. Plug-ins are those that the run has in the end, whatever sets them, so that the
order in which keys are given does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from fedsim.core import config as configs
from fedsim.core import plugins
from fedsim.core.config import PLUGIN_KEYS, SERVER_PLUGIN_KEYS, SimConfig, name_key
from fedsim.core.errors import PluginError
from fedsim.runs.collection import label_text
from fedsim.runs.known import Label

Layer: TypeAlias = Mapping[str, Any]
Place: TypeAlias = tuple[str, ...]
ABSENT: Any = object()
PLACES: Mapping[Place, str] = {
    **{(key,): kind for key, kind in PLUGIN_KEYS.items()},
    **{("server", key): kind for key, kind in SERVER_PLUGIN_KEYS.items()},
}
PARTITION = ("partition",)


@dataclass(frozen=True)
class Fitted:
    """A run as it is composed.

    as_given: its layers with all that was given; layers: with what applies. changes: the last of the layers, as given.
    gone_files, gone: per variant what it extends, and per change, whether nothing of it applies.
    offered: dotted keys that are given to plug-ins; dropped: those that do not apply.
    """

    as_given: Sequence[Layer]
    layers: Sequence[Layer]
    changes: Sequence[Layer]
    gone_files: Sequence[bool]
    gone: Sequence[bool]
    offered: frozenset[str]
    dropped: frozenset[str]


def fit(base: Sequence[Layer], extended: Sequence[Sequence[Layer]], changes: Sequence[Layer]) -> Fitted:
    """What a run is made of: its base, what each variant extends, and what `set`, axes and overrides change (the later wins).

    Options that a plug-in lacks are left out of `changes`, unless they stand beside its name: then they are errors.
    Where a variant or a change chooses one client that holds all (`Partition.whole`), no other partition applies.
    """
    files = [layer for group in extended for layer in group]
    start, end = _names([*base, *files]), _names([*base, *files, *changes])
    whole = [layer for layer in (*files, *changes) if _is_whole(layer)]
    if whole:
        end[PARTITION] = _name_of(whole[-1]["partition"], "partitions")
    other = [
        {"partition"} & {k for x in group for k in x} if whole and not any(map(_is_whole, group)) else set() for group in extended
    ]
    dropped = [_unfit(layer, end) for layer in changes]
    fewer = [[_without(layer, keys) for layer in group] for group, keys in zip(extended, other, strict=True)]
    kept = [_without(layer, keys) for layer, keys in zip(changes, dropped, strict=True)]
    first: dict[str, Any] = {}  # plug-ins before options: what `set` says of a rank holds for the adapter that a variant names
    for place, kind in PLACES.items():
        if end[place] != start[place] and end[place] is not None:
            first = configs.merge(first, _put(place, {name_key(kind): end[place]}))
    return Fitted(
        as_given=[*base, *files, first, *changes],
        layers=[*base, *(layer for group in fewer for layer in group), first, *kept],
        changes=changes,
        gone_files=[not any(group) for group in fewer],
        gone=[not layer for layer in kept],
        offered=frozenset().union(*map(_offers, changes), *({"partition"} & layer.keys() for layer in files)),
        dropped=frozenset().union(*dropped, *other),
    )


def notes(runs: Sequence[tuple[Mapping[str, Label], Fitted]]) -> tuple[str, ...]:
    """What does not apply to which runs, a line for every key: "adapter.rank does not apply to method=hgp"."""
    lines = []
    for key in dict.fromkeys(key for _, fitted in runs for key in sorted(fitted.dropped)):
        given = [(labels, key in fitted.dropped) for labels, fitted in runs if key in fitted.offered | fitted.dropped]
        lines.append(f"{key} does not apply to {_which(given)}")
    return tuple(lines)


def _which(runs: Sequence[tuple[Mapping[str, Label], bool]]) -> str:
    """The runs that are marked, by the levels of one axis if that tells them from the others, else by all their labels."""
    for axis in runs[0][0]:
        inside = dict.fromkeys(labels[axis] for labels, marked in runs if marked)
        outside = {labels[axis] for labels, marked in runs if not marked}
        if axis != "seed" and not inside.keys() & outside:
            return f"{axis}={', '.join(map(str, inside))}"
    settings = [{axis: level for axis, level in labels.items() if axis != "seed"} for labels, marked in runs if marked]
    return "; ".join(dict.fromkeys(map(label_text, settings)))


def _names(layers: Sequence[Layer]) -> dict[Place, str | None]:
    """Place -> name of the plug-in in the end; None where there is none, or several."""
    default = SimConfig()
    found: dict[Place, str | None] = {}
    for place, kind in PLACES.items():
        name = _name_of(getattr(default.server, place[1]) if len(place) > 1 else getattr(default, place[0]), kind)
        for section in (_at(layer, place) for layer in layers):
            if not isinstance(section, Mapping) or name_key(kind) in section:
                name = name if section is ABSENT else _name_of(section, kind)
        found[place] = name
    return found


def _name_of(section: Any, kind: str) -> str | None:
    name = section.get(name_key(kind)) if isinstance(section, Mapping) else section
    return name if isinstance(name, str) else None


def _is_whole(layer: Layer) -> bool:
    """Whether it chooses a partition that leaves nothing to split."""
    cls = _class("partitions", _name_of(layer.get("partition"), "partitions"))
    return cls is not None and bool(cls.whole)


def _unfit(layer: Layer, names: Mapping[Place, str | None]) -> set[str]:
    """Dotted keys of a layer that the run's plug-ins do not have."""
    found = set[str]()
    for place, kind in PLACES.items():
        section, cls = _at(layer, place), _class(kind, names[place])
        if section is ABSENT or section is None:
            continue
        if kind == "partitions" and cls is not None and cls.whole and not _is_whole(layer):
            found |= set(_keys(place, section, kind)) | ({".".join(place)} if _name_of(section, kind) else set())
        elif isinstance(section, Mapping) and name_key(kind) not in section and (names[place] is None or cls is not None):
            known = set() if cls is None else {f.name for f in fields(cls) if f.init}
            found |= {key for key in _keys(place, section, kind) if key.rpartition(".")[2] not in known}
    return found


def _offers(layer: Layer) -> set[str]:
    return {key for place, kind in PLACES.items() for key in _keys(place, _at(layer, place), kind)}


def _keys(place: Place, section: Any, kind: str) -> list[str]:
    """Dotted keys that a section gives; the section itself where it is a plug-in's name alone."""
    where = ".".join(place)
    if isinstance(section, Mapping):
        return [f"{where}.{key}" for key in section if key != name_key(kind)] or [where]
    return [] if section is ABSENT or section is None else [where]


def _without(layer: Layer, keys: Set[str], path: str = "") -> dict[str, Any]:
    """The layer without these dotted keys, and without what is empty then."""
    out: dict[str, Any] = {}
    for key, value in layer.items():
        where = f"{path}{key}"
        if where in keys:
            continue
        rest = _without(value, keys, f"{where}.") if isinstance(value, Mapping) and keys else value
        if rest or not isinstance(rest, Mapping) or not value:
            out[key] = rest
    return out


def _class(kind: str, name: str | None) -> type[Any] | None:
    """None for a name that cannot be loaded: whoever composes the config says so."""
    try:
        return None if name is None else plugins.load(kind, name)
    except PluginError:
        return None


def _at(layer: Layer, place: Place) -> Any:
    found: Any = layer
    for key in place:
        found = found.get(key, ABSENT) if isinstance(found, Mapping) else ABSENT
    return found


def _put(place: Place, value: Any) -> dict[str, Any]:
    for key in reversed(place):
        value = {key: value}
    found: dict[str, Any] = value
    return found
