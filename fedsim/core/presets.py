"""Presets by name: the configs that come with fedsim, wherever it is installed.

A word without a suffix, such as `lorm`, is a preset; anything else is a file. A word by itself is a whole run: a method on the
stream of the quickstart, or a stream with FedAvg's defaults. Several words are parts, a stream and a method: `fashion lorm`;
where none of them says what the data are, they stand on the quickstart's stream too (`config.layers.on_a_stream`).
`reproduction` holds streams and methods as papers run them, whose weights and data are the user's.
"""

from __future__ import annotations

import itertools
import re
import sysconfig
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

from fedsim.core.errors import ConfigError, nearest
from fedsim.core.home import ROOT

WHOLE, STREAMS, METHODS, REPRODUCTION = "", "streams", "methods", "reproduction"  # folders
SUFFIX = ".yaml"
STREAM = "omniglot"  # of the quickstart


@cache
def folder() -> Path:
    """Where they lie: beside the packages in a checkout, else where pip put them."""
    if (Path(ROOT) / "setup.cfg").is_file():  # another package may be named configs
        return Path(ROOT) / "configs"
    inside = Path("share", "fedsim", "configs")
    try:
        shipped = [f for f in metadata.files("fedsim") or () if f.parts[-4:] == (*inside.parts, f"quickstart{SUFFIX}")]
    except metadata.PackageNotFoundError:
        shipped = []
    told = [Path(str(f.locate())).resolve().parent for f in shipped]
    places = [*told, Path(ROOT) / inside, Path(sysconfig.get_path("data")) / inside]  # the second: pip install --target
    return next((place for place in places if place.is_dir()), places[-1])


def names(part: str) -> list[str]:
    """The presets of a folder."""
    return sorted(path.stem for path in (folder() / part).glob(f"*{SUFFIX}"))


def located(words: Sequence[str | Path], beside: Path, whole: bool = True) -> list[Path]:
    """The files that words mean, paths being relative to a folder. Raises ConfigError for a preset that there is not.

    whole: a word by itself may be a whole run; without, as in a sweep's variants, all are parts.
    """
    parts = (STREAMS, METHODS, REPRODUCTION) if len(words) > 1 or not whole else (WHOLE, STREAMS, METHODS, REPRODUCTION)
    unknown = (word for word in map(str, words) if not (folder() / f"{word}{SUFFIX}").is_file())  # said first
    found = {word: _located(word, beside, parts) for word in dict.fromkeys([*unknown, *map(str, words)])}
    return [found[str(word)] for word in words]


def _located(word: str, beside: Path, parts: Sequence[str]) -> Path:
    path = beside / Path(word).expanduser()
    if not _is_name(word) or path.is_file():
        return path
    for part in parts:
        if (found := folder() / part / f"{word}{SUFFIX}").is_file():
            return found
    known = [name for part in parts for name in names(part)]
    if (folder() / f"{word}{SUFFIX}").is_file():
        what = "a stream and a method, and cannot be one of several parts"
        raise ConfigError(f"'{word}' is a whole run, {what}: name its stream ({STREAM}) in its place, or it alone")
    raise ConfigError(f"no config file and no preset '{word}'.{nearest(word, known)} `fedsim run` lists them.")


def _is_name(word: str) -> bool:
    return re.fullmatch(r"[\w-]+(/[\w-]+)?", word) is not None


def comment(path: Path) -> str:
    """The first sentence of the comment on top of a YAML."""
    lines = path.read_text(encoding="utf-8").splitlines()
    told = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return re.split(r"(?<=\.) ", " ".join(line.lstrip("# ").rstrip() for line in told))[0]


def described(part: str) -> Mapping[str, str]:
    """The presets of a folder, with a line each."""
    return {name: comment(folder() / part / f"{name}{SUFFIX}") for name in names(part)}
