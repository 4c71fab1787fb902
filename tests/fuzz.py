"""Fuzzers of the config door and of `simulation.prepare`: python -m tests.fuzz --cases 100000

A case of the door is a few keys (known, misspelt, dotted, twice) with values of every kind, right and wrong, given as a mapping
from Python, as overrides or as a YAML file on top of a config that is right. The outcome must be

- a config in which every given value is found again, the same in any order of the keys, and the same when written and read; or
- one line of a FedsimError.

A case of `prepare` is a config that passes the door, on tiny data and tiny random backbones: it is prepared, or one line says why
not. No other exception, no warning.
"""

from __future__ import annotations

import argparse
import base64
import collections
import dataclasses
import datetime
import json
import math
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from fedsim.core import config as configs
from fedsim.core import plugins
from fedsim.core.config import SimConfig
from fedsim.core.errors import FedsimError
from fedsim.simulation import prepare
from tests.tiny import TINY, VIT

Outcome = SimConfig | str
KINDS = configs.PLUGIN_KEYS | {f"server.{key}": kind for key, kind in configs.SERVER_PLUGIN_KEYS.items()}
del KINDS["server.channel"]  # a list of sections
RESOLVED = {"runtime.device", "runtime.kernels", "runtime.fused", "runtime.precision"}  # "auto", or what the machine cannot do
PLUGINS = {kind: {name: plugins.load(kind, name) for name in plugins.names(kind)} for kind in {*KINDS.values()}}
FIELDS = {
    **{f.name: f for f in dataclasses.fields(SimConfig) if f.name not in configs.SECTIONS},
    **{f"{name}.{f.name}": f for name, cls in configs.SECTIONS.items() for f in dataclasses.fields(cls)},
}
CHOICES = {  # words that are right somewhere
    "runtime.pool": ["serial", "ray", "flower"], "runtime.device": ["cpu", "auto"], "runtime.kernels": ["auto", "torch"],
    "runtime.precision": ["fp32", "bf16"], "runtime.fused": ["auto", True, False], "runtime.workers": ["auto", 1, 3],
    "stream.name": ["class_incremental", "task_incremental", "domain_incremental"], "stream.order": ["given",
    "shuffle", [2, 0, 1]],
    "transform.augment": ["none", "flip", "crop", "crop_flip", "affine"], "transform.interpolation": ["bilinear", "nearest"],
    "transform.mean": [None, [0.5], [0.5, 0.5, 0.5]], "transform.std": [None, [0.5], [0.0]], "model.pooling": ["cls",
    "mean", "auto"],
    "client.optimizer": ["sgd", "adam", "AdamW", "lbfgs", "sparseadam", "rprop"],
    "client.optimizer_options": [{"betas": [0.9, 0.99]}],
    "client.schedule": [None, "cosineannealinglr", "linearlr"], "client.schedule_options": [{}, {"T_max": "steps"}],
    "client.learners": [[], ["proximal"], [{"name": "proximal", "mu": 0.5}], ["square"]], "trackers": [[], ["tensorboard"]],
    "server.on_client_failure": ["fail", "skip"], "server.evaluate": ["round", "task"], "server.without": [[], [0], [1, 2]],
    "server.channel": [[], ["topk"], [{"name": "topk", "share": 0.5}, "quantise"],
    [{"name": "clip_noise", "clip": 1.0, "noise": 0.5}]],
    "stream.group": [None, "domain"], "model.backbone": ["random", "omniglot-vit"], "model.config": [VIT, None],
}  # fmt: skip
ODD_TEXTS = [
    "", " ", "a\nb", "a\u2028b", "a\x85b", "\x1b[1m", "\0", "${seed}", "${nothing}", "${", "${oc.env:HOME}",
    "${oc.env:NOT_THERE}", "???",
    "~/x", "~", "./x", "../x", "../../x.py", "*", "a #b", "#", "1e-3", "007", "1_000", "12:30", "inf", "nan", ".inf", "-",
    "true", "null",
    "no", "\ud800", "Ünïcode 🙂", "a: b", "[1", "{", "'", '"', "&a", "!!x", "@", "%", "<<", "=", "x" * 300, "python:a.B",
    "a..b", ".", "..",
]  # fmt: skip
ODD_NUMBERS = [
    math.inf,
    -math.inf,
    math.nan,
    0,
    -1,
    1,
    2,
    3,
    0.5,
    1.0,
    1e-3,
    -0.0,
    1e308,
    5e-324,
    2**53 + 1,
    2**63,
    -(2**63),
    10**400,
]
PLAIN_TEXT = re.compile(r"[\w./~][\w./~ #=-]*")  # a value that an override may hold as it stands

texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=12))
numbers = st.one_of(st.sampled_from(ODD_NUMBERS), st.integers(), st.floats())
leaves: SearchStrategy[Any] = st.one_of(st.none(), st.booleans(), numbers, texts)
foreign: SearchStrategy[Any] = st.sampled_from(
    [b"x", datetime.date(2024, 1, 2), datetime.datetime(2024, 1, 2, 3), {1}, frozenset(), object(), 1j, np.float32(0.5),
    np.int64(3),
     np.array([1.0]), Path("a/b"), range(3), {1: 2}, {None: 1}, {True: 1}, {0.5: 1}, (1, 2), type, SimConfig]
)  # fmt: skip
wild: SearchStrategy[Any] = st.recursive(
    leaves, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)), max_leaves=5
)


@dataclasses.dataclass(frozen=True)
class Case:
    """form: mapping | override | yaml; pairs: dotted keys and their values, for an override the text of it."""

    form: str
    pairs: tuple[tuple[str, Any], ...]


def mostly(draw: DrawFn) -> bool:
    return draw(st.integers(0, 9)) != 5


@st.composite
def plugin_sections(draw: DrawFn, kind: str) -> Any:
    """A plug-in by name, or with some of its options, right and wrong."""
    key = "source" if kind == "sources" else "name"
    name = draw(st.sampled_from(sorted(PLUGINS[kind])) if mostly(draw) else texts)
    if name not in PLUGINS[kind]:
        return draw(st.sampled_from([name, {key: name}]))
    cls = PLUGINS[kind][name]
    known = [f for f in dataclasses.fields(cls) if f.init] if dataclasses.is_dataclass(cls) else []
    chosen = draw(st.lists(st.sampled_from(known), max_size=3, unique_by=lambda f: f.name)) if known else []
    section = {key: name} | {f.name: draw(values_of(f)) for f in chosen}
    if not mostly(draw):
        section[draw(misspelt(chosen[0].name if chosen else "name"))] = draw(leaves)
    return name if len(section) == 1 and draw(st.booleans()) else section


@st.composite
def misspelt(draw: DrawFn, key: str) -> str:
    place = draw(st.integers(0, len(key)))
    return key[:place] + draw(st.sampled_from(["", "x", ".", " ", "\n", "é"])) + key[place + 1 :]


@st.composite
def values_of(draw: DrawFn, field: dataclasses.Field[Any], key: str = "") -> Any:
    """A value of a field: nine times of ten one that is right somewhere."""
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    right = list(CHOICES.get(key, [] if default is dataclasses.MISSING else [default]))
    hint = str(field.type)
    if "int" in hint or "float" in hint:
        right += [1, 2, 5, 0, -1, 2**45] if "int" in hint else [0.1, 0.5, 1, 0.0, -0.5, 1e-30, 1e30]
    right += [True, False] if hint == "bool" else []
    if right and mostly(draw):
        return draw(st.sampled_from(right))
    return draw(st.one_of(leaves, wild))


@st.composite
def keys_and_values(draw: DrawFn) -> tuple[str, Any]:
    key = draw(st.sampled_from(sorted(FIELDS)))
    if key in KINDS:
        section = draw(plugin_sections(KINDS[key]) if mostly(draw) else wild)
        if key == "server.aggregator" and not mostly(draw):
            section = [
                {"match": draw(st.sampled_from(["head.*", "*", 3, None])), **section} if isinstance(section, dict) else section
            ]
        if isinstance(section, dict) and section and draw(st.booleans()):
            name = draw(st.sampled_from(sorted(section, key=str)))
            return f"{key}.{name}", section[name]
        return key, section
    value = draw(values_of(FIELDS[key], key))
    if draw(st.integers(0, 19)) == 7:
        key = draw(misspelt(key))
    if draw(st.integers(0, 19)) == 7:
        value = draw(foreign)
    return key, value


@st.composite
def cases(draw: DrawFn) -> Case:
    form = draw(st.sampled_from(["mapping", "override", "yaml"]))
    one_each = (lambda pair: pair[0]) if draw(st.integers(0, 3)) else None
    pairs = draw(st.lists(keys_and_values(), min_size=1, max_size=5, unique_by=one_each))
    return Case(form, tuple(pairs))


# ---------------------------------------------------------------- giving them


class NotSaid(Exception):
    """A value that this form has no text for."""


def flow(value: Any) -> str:
    """A value as YAML on one line, written without the library that reads it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float):
        return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(value), repr(value))
    if isinstance(value, str):
        inner = "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value)
        return f'"{inner}"'
    if isinstance(value, int | datetime.date):
        return str(value) if not isinstance(value, int) or abs(value) < 10**4000 else "9" * 5000
    if isinstance(value, bytes):
        return f"!!binary {base64.b64encode(value).decode()}"
    if isinstance(value, set | frozenset):
        return "!!set {" + ", ".join(map(flow, value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(k)}: {flow(v)}" for k, v in value.items()) + "}"
    raise NotSaid(type(value).__name__)


def as_mapping(pairs: tuple[tuple[str, Any], ...], where: Path) -> Callable[[], SimConfig]:
    layer: dict[str, Any] = {}
    for key, value in pairs:
        if key in layer:
            raise NotSaid("a mapping holds a key once")
        layer[key] = value
    return lambda: configs.compose([TINY, layer])


def as_overrides(pairs: tuple[tuple[str, Any], ...], where: Path) -> Callable[[], SimConfig]:
    if any(isinstance(v, bytes | set | frozenset) for _, v in pairs):
        raise NotSaid("a tag is a part of the word in an override")
    bare = [isinstance(v, str) and PLAIN_TEXT.fullmatch(v) for _, v in pairs]
    given = [f"{k}={v if plain else flow(v)}" for (k, v), plain in zip(pairs, bare, strict=True)]
    return lambda: configs.compose([TINY, configs.parse_overrides(given)])


def as_yaml(pairs: tuple[tuple[str, Any], ...], where: Path) -> Callable[[], SimConfig]:
    lines = [f"{flow(k)}: {flow(v)}" for k, v in pairs]
    (where / "case.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lambda: configs.compose([TINY, *configs.read_layers(where / "case.yaml")])


FORMS = {"mapping": as_mapping, "override": as_overrides, "yaml": as_yaml}


def outcome(call: Callable[[], Any]) -> Any:
    """What it gives, or the line that it says. All else that it raises, and any warning but the one of bf16, passes through."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=r"runtime\.precision is bf16")
        try:
            return call()
        except FedsimError as e:
            line = str(e)
    assert line and line.isprintable(), f"an error that is no line: {line!r}"
    line.encode()  # a terminal can print it
    return line


# ---------------------------------------------------------------- the oracle


def said_again(value: Any, found: Any, key: str, where: Path) -> bool:
    """Whether a resolved value is what was given."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Path | datetime.date):
        value = str(value)
    if isinstance(value, Mapping):
        if not isinstance(found, Mapping):
            return not value
        return all(said_again(v, at(found, str(k)), f"{key}.{k}", where) for k, v in value.items())
    if key in KINDS and isinstance(value, str) and isinstance(found, Mapping):
        found = found["source" if key == "data" else "name"]
    if key in ("client.learners", "trackers", "server.channel") and isinstance(value, list):
        return len(value) == len(found) and all(
            said_again({"name": v} if isinstance(v, str) else v, f, "", where) for v, f in zip(value, found, strict=True)
        )
    if isinstance(value, list | tuple):
        return (
            isinstance(found, list)
            and len(value) == len(found)
            and all(said_again(v, f, f"{key}.{i}", where) for i, (v, f) in enumerate(zip(value, found, strict=True)))
        )
    if value is None and key in configs.SECTIONS:
        return True
    if isinstance(value, str):
        if "${" in value or (key in RESOLVED and value in ("auto", "bf16")):
            return True
        if value.startswith(("./", "../", "~/")) or key in KINDS:
            return isinstance(found, str) and found.endswith(Path(value).name)
        return found in (value, value.strip()) or _same(_read(value), found)
    if isinstance(found, str):
        return type(value) is int and str(value) == found
    return _same(value, found)


def _same(value: Any, found: Any) -> bool:
    """1 is 1.0, and neither is true."""
    return bool(value == found) and isinstance(value, bool) is isinstance(found, bool)


def _read(text: str) -> Any:
    """A word that writes a number or a truth value out."""
    words = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False, "null": None, "": None, "~": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def at(found: Any, key: str) -> Any:
    """What lies under a dotted key; of a plug-in that is named by a word, the section."""
    for part in key.strip().split("."):
        found = found[part]
    return found


def check(case: Case, where: Path) -> Outcome:
    """Play a case. Raises AssertionError, or whatever the door let through."""
    try:
        call = FORMS[case.form](case.pairs, where)
    except (NotSaid, UnicodeEncodeError):
        return "not said"
    found = outcome(call)
    again = outcome(FORMS[case.form](case.pairs[::-1], where))
    assert isinstance(found, SimConfig) == isinstance(again, SimConfig), f"the order of the keys decides: {found} / {again}"
    if isinstance(found, str):
        return found
    assert found.to_dict() == again.to_dict(), "the order of the keys decides"
    plain = found.to_dict()
    for key, value in case.pairs:
        assert said_again(value, at(plain, key), key, where), f"{key}: {value!r} became {at(plain, key)!r}"
    if len(case.pairs) % 3:  # the slowest part
        return found
    (where / "again.yaml").write_text(found.to_yaml(), encoding="utf-8")
    again = outcome(lambda: configs.load(where / "again.yaml", begun=True))
    assert isinstance(again, SimConfig) and again.to_dict() == plain, f"written and read it is another: {again}"
    assert again.identity() == found.identity()
    return found


# ---------------------------------------------------------------- preparing


BERT = {**VIT, "model_type": "bert", "vocab_size": 64, "max_position_embeddings": 16}
FEW = {"source": "synthetic", "classes": 4, "train_per_class": 4, "test_per_class": 1}
DATA: list[tuple[dict[str, Any], dict[str, Any]]] = [  # and a backbone that takes them, or not
    (FEW, VIT), (FEW, VIT), ({**FEW, "domains": 2}, VIT), ({**FEW, "channels": 3, "image_size": 12}, {**VIT, "num_channels": 3}),
    ({**FEW, "kind": "tokens"}, BERT), ({**FEW, "kind": "tokens"}, BERT), (FEW, BERT),
]  # fmt: skip
SUITS: dict[str, Any] = {
    "stream.tasks": 2, "partition": {"name": "iid", "clients": 2, "min_samples": 1}, "adapter": {"name": "lora", "rank": 2},
    "head": {"name": "linear"},
    "server.aggregator": {"name": "fedavg"}, "server.consolidator": {"name": "none"}, "server.calibrator": None,
}  # fmt: skip
OTHERS = {  # by chance in their place
    "partition": [{"name": n, "clients": 3, "min_samples": 1} for n in ("dirichlet", "pathological", "quantity")],
    **{key: [{"name": n} for n in sorted(PLUGINS[kind])] for key, kind in KINDS.items() if key not in ("data", "partition")},
}
SIZES = re.compile(
    "draws|domains|classes|per_class|image_size|channels|length|vocab|_size|_layers|clients|^size$"
)  # bounded by the above


@st.composite
def small_runs(draw: DrawFn) -> dict[str, Any]:
    """A layer on top of TINY that describes a run of a few samples: one that suits, or suits not."""
    data, backbone = draw(st.sampled_from(DATA))
    layer = {**SUITS, "data": data, "model": {"backbone": "random", "config": backbone}}
    for key in draw(st.lists(st.sampled_from(sorted(OTHERS)), max_size=2, unique=True)):
        layer[key] = draw(st.sampled_from(OTHERS[key]))
    for key in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=5, unique=True)):
        if key.split(".")[0] in ("client", "stream", "transform", "server") and key not in KINDS:
            layer[key] = draw(values_of(FIELDS[key], key))
    for key in draw(st.lists(st.sampled_from(sorted(KINDS)), max_size=2, unique=True)):
        section = layer[key]
        if isinstance(section, dict):
            cls = PLUGINS[KINDS[key]][section["source" if key == "data" else "name"]]
            options = [f for f in dataclasses.fields(cls) if f.init and not SIZES.search(f.name)]
            for f in draw(st.lists(st.sampled_from(options), max_size=2, unique_by=lambda f: f.name)) if options else []:
                layer[key] = layer[key] | {f.name: draw(values_of(f))}
    return layer


def check_prepare(layer: Mapping[str, Any]) -> Any:
    """Prepare a run. The line that refuses it, or what is prepared."""
    config = outcome(lambda: configs.compose([TINY, layer]))
    return config if isinstance(config, str) else outcome(lambda: prepare(config))


# ---------------------------------------------------------------- the command


def play(what: str, cases_: int, first_seed: int, batch: int = 2000) -> bool:
    """Play so many cases, a batch for each seed; print what came of them. Whether all went well."""
    counts: collections.Counter[str] = collections.Counter()
    lines: collections.Counter[str] = collections.Counter()
    well, start = True, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:

        def one(case: Any) -> None:
            found = check(case, Path(folder)) if what == "door" else check_prepare(case)
            counts["not said" if found == "not said" else "refused in one line" if isinstance(found, str) else "taken"] += 1
            if isinstance(found, str):
                lines[re.sub(r"'.*?'|\d+", "…", found)[:60]] += 1

        for number in range(0, cases_, batch):
            drawn = given(cases() if what == "door" else small_runs())(one)
            bounded = settings(
                max_examples=min(batch, cases_ - number), deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )(drawn)  # fmt: skip
            try:
                seed(first_seed + number)(bounded)()
            except Exception:
                well = False
                traceback.print_exc()
            said = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
            seconds = f"{time.perf_counter() - start:.0f} s"
            sys.stdout.write(f"{what}: {sum(counts.values())} cases: {said}; {len(lines)} lines, {seconds}\n")
            sys.stdout.flush()
    return well


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="of the door")
    parser.add_argument("--prepare", type=int, default=2_000, help="of simulation.prepare")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    return 0 if all([play("door", args.cases, args.seed), play("prepare", args.prepare, args.seed)]) else 1


if __name__ == "__main__":
    sys.exit(main())
