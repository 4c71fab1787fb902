"""The config door: what is given is found again, or refused in one line; whatever the order, the form and the place of a key."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.core import config as configs
from fedsim.core import contracts, plugins
from fedsim.core.config import ClientConfig, load
from fedsim.core.errors import ConfigError, FedsimError, ModelError, PluginError, require_choice
from fedsim.simulation import prepare, run
from fedsim.sweeps.plan import expand
from server.aggregators.lorm import Aggregator as Lorm
from tests.tiny import TINY, tiny


def refused(*overrides: str, **sections: Any) -> str:
    with pytest.raises(FedsimError) as error:
        tiny(*overrides, **sections)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# ---------------------------------------------------------------- dotted keys

PAIRS = [("server.aggregator.name", "fedavg"), ("server.aggregator.decay", 0.5)]
FORMS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "file": lambda layer: {"base.yaml": layer},
    "file, half nested": lambda layer: {"base.yaml": {"server": {k.removeprefix("server."): v for k, v in layer.items()}}},
    "variant": lambda layer: {"sweep.yaml": {"base": "base.yaml", "list": {"method": {"a": layer}}}},
    "set": lambda layer: {"sweep.yaml": {"base": "base.yaml", "set": layer}},
    "zip": lambda layer: {"sweep.yaml": {"base": "base.yaml", "zip": {k: [v] for k, v in layer.items()}}},
    "base": lambda layer: {"sweep.yaml": {"base": layer}},
}


@pytest.mark.parametrize("pairs", [PAIRS, PAIRS[::-1]], ids=["name first", "option first"])
@pytest.mark.parametrize("form", ["mapping", "override", *FORMS])
def test_an_option_that_a_plugin_does_not_have_is_an_error_in_any_order(
    pairs: list[tuple[str, Any]], form: str, tmp_path: Path
) -> None:
    layer = dict(pairs)
    (tmp_path / "base.yaml").write_text("server: {aggregator: {name: lorm, decay: 0.25}}")
    for name, content in FORMS[form](layer).items() if form in FORMS else ():
        (tmp_path / name).write_text(json.dumps(content))

    def read() -> None:
        if form == "mapping":
            configs.compose([TINY, layer])
        elif (tmp_path / "sweep.yaml").exists():
            expand(tmp_path / "sweep.yaml")
        else:
            load(tmp_path / "base.yaml", [f"{k}={v}" for k, v in pairs] if form == "override" else [])

    with pytest.raises(ConfigError, match=r"unknown key 'server.aggregator.decay'"):
        read()


@pytest.mark.parametrize("keys", [*itertools.permutations(["server.aggregator", "server.aggregator.decay", "server.rounds"])])
def test_a_plugin_and_its_options_belong_together_in_any_order(keys: tuple[str, ...], tmp_path: Path) -> None:
    given = {"server.aggregator": "lorm", "server.aggregator.decay": 0.5, "server.rounds": 7}
    layer = {k: given[k] for k in keys}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({**TINY, "server": {"aggregator": "fedavg"}}))
    (tmp_path / "child.yaml").write_text(json.dumps({"extends": "config.yaml", **layer}))
    (tmp_path / "sweep.yaml").write_text(json.dumps({"base": "config.yaml", "list": {"method": {"a": layer}}}))
    for config in (
        load(path, [f"{k}={v}" for k, v in layer.items()]),
        load(tmp_path / "child.yaml"),
        configs.compose([{**TINY, "server": {"aggregator": "fedavg"}}, layer]),
        expand(tmp_path / "sweep.yaml").runs[0].config,
    ):
        assert config.server.aggregator["name"] == "lorm"
        assert (config.server.aggregator["decay"], config.server.rounds) == (0.5, 7)


def test_another_layer_that_renames_a_plugin_leaves_its_options_behind() -> None:
    config = configs.compose([TINY, {"server.aggregator": {"name": "lorm", "decay": 0.5}}, {"server.aggregator": "fedavg"}])
    assert "decay" not in config.server.aggregator


def test_a_key_that_is_given_twice(tmp_path: Path) -> None:
    for layer in ({"client.lr": 1, "client": {"lr": 2}}, {"client": {"lr": 2}, "client.lr": 1}):
        with pytest.raises(ConfigError, match=r"^client.lr is given twice, as \d and as \d: leave one out$"):
            configs.compose([TINY, layer])
    with pytest.raises(ConfigError, match=r"client\.lr is given twice"):
        configs.parse_overrides(["client.lr=1", "client.lr=2"])
    with pytest.raises(ConfigError, match=r"client.drift is given twice, as 1 and as True"):
        configs.nested({"client.drift": 1, "client": {"drift": True}})
    with pytest.raises(ConfigError, match=r"server.aggregator.name is given twice, as 'fedavg' and as 'lorm'"):
        configs.nested({"server.aggregator": "fedavg", "server": {"aggregator.name": "lorm"}})
    with pytest.raises(ConfigError, match=r"client is given twice"):
        configs.nested({"client": 3, "client.lr": 0.5})
    assert configs.compose([TINY, {"client.lr": 0.5, "client": {"lr": 0.5}}]).client.lr == 0.5
    path = tmp_path / "twice.yaml"
    path.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match=r"the key 'seed' is there twice \(line 2\)"):
        load(path)
    with pytest.raises(ConfigError, match=r"'client\.\.lr' has an empty part"):
        configs.nested({"client..lr": 1})


def test_a_section_with_nothing_in_it_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("client: {lr: 0.5}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nclient:\n  # lr: 0.25\n")
    assert load(tmp_path / "child.yaml").client.lr == 0.5
    for nothing in (0, False, "", []):
        assert refused(client=nothing).startswith("client must be a mapping of options")


# ---------------------------------------------------------------- numbers


@dataclasses.dataclass(frozen=True)
class Bounded:
    """As a plug-in of the user's own may look."""

    bound: float = dataclasses.field(default=math.inf, metadata=contracts.MAY_BE_INFINITE)
    rate: float = 0.5
    rates: list[float] = dataclasses.field(default_factory=list)
    anything: Any = None


def numeric_fields() -> list[tuple[str, str]]:
    """(kind, section.field) of every float of every section and plug-in."""
    found = []
    for name, cls in configs.SECTIONS.items():
        found += [("", f"{name}.{f.name}") for f in dataclasses.fields(cls) if "float" in str(f.type)]
    for kind in plugins.KINDS:
        for name in plugins.names(kind):
            cls = plugins.load(kind, name)
            if dataclasses.is_dataclass(cls):
                found += [(kind, f"{name}.{f.name}") for f in dataclasses.fields(cls) if "float" in str(f.type)]
    return found


@pytest.mark.parametrize("word", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("kind", "key"), numeric_fields(), ids=lambda v: v)
def test_every_number_of_every_section_and_plugin_is_finite(kind: str, key: str, word: str) -> None:
    section, name = key.split(".")
    cls = plugins.load(kind, section) if kind else configs.SECTIONS[section]
    number: Any = [float(word)] if "list" in str(next(f.type for f in dataclasses.fields(cls) if f.name == name)) else float(word)
    needed = {
        f.name: "x" for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING and f.name != name
    }
    with pytest.raises(ConfigError, match=rf"^here.{name}(.0)? must be a finite number, got {word}$"):
        configs.typed(cls, {**needed, name: number}, "here")


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("client.lr=inf", "client.lr"),
        ("client.lr=.inf", "client.lr"),
        ("client.weight_decay=Infinity", "client.weight_decay"),
        ("client.clip_norm=-.inf", "client.clip_norm"),
        ("client.optimizer_options={betas: [0.9, .nan]}", "client.optimizer_options.betas.1"),
        ("client.schedule_options={a: {b: [.inf]}}", "client.schedule_options.a.b.0"),
        ("adapter.alpha=inf", "adapter.alpha"),
        ("adapter={name: vpt, init_std: .nan}", "adapter.init_std"),
        ("server.aggregator={name: lorm, ridge: inf}", "server.aggregator.ridge"),
        ("server.aggregator=[{match: '*', name: lorm, ridge: inf}]", "server.aggregator.0.ridge"),
        ("runtime.gpus_per_worker=1e999", "runtime.gpus_per_worker"),
        ("transform.mean=[.inf]", "transform.mean.0"),
    ],
)
def test_numbers_that_are_none(override: str, where: str) -> None:
    assert refused(override).startswith(f"{where} must be a finite number, got ")


def test_a_field_says_that_infinity_means_something() -> None:
    assert configs.typed(Bounded, {"bound": math.inf}, "").bound == math.inf
    for wrong, where in (
        ({"rate": math.nan}, "rate"), ({"rates": [0.5, math.inf]}, "rates.1"), ({"anything": {"a": [math.nan]}}, "anything.a.0"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"^here.{where} must be a finite number"):
            configs.typed(Bounded, wrong, "here")


def test_a_plugin_of_the_users_own_is_checked_too(tmp_path: Path) -> None:
    source = "from dataclasses import dataclass\nfrom server.aggregators import fedavg\n\n\n@dataclass(frozen=True)\n"
    path = tmp_path / "mine.py"
    path.write_text(source + "class Aggregator(fedavg.Aggregator):\n    beta: float = 0.5\n    more: list = ()\n")
    assert "server.aggregator.beta must be a finite number, got nan" in refused(f"server.aggregator={{name: {path}, beta: .nan}}")
    path.write_text(source + "class Aggregator(fedavg.Aggregator):\n    beta: float = float('inf')\n")
    assert "server.aggregator.beta must be a finite number, got inf" in refused(f"server.aggregator={path}")
    path.write_text(source + "class Aggregator(fedavg.Aggregator):\n    def __post_init__(self): raise ValueError('a\\nb')\n")
    assert refused(f"server.aggregator={path}") == "server.aggregator: ValueError: a b"


def test_objects_from_python_are_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"aggregator.ridge must be a finite number, got inf"):
        run(tiny(), aggregator=Lorm(ridge=math.inf))
    with pytest.raises(ConfigError, match=r"client.lr must be a finite number, got inf"):
        prepare(dataclasses.replace(tiny(), client=ClientConfig(lr=math.inf)))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("client.epochs", True, "client.epochs must be a whole number, got True"),
        ("client.epochs", 1.0, "client.epochs must be a whole number, got 1.0"),
        ("client.epochs", "two", "client.epochs must be a whole number, got 'two'"),
        ("client.epochs", None, "client.epochs must be a whole number, got None"),
        ("client.epochs", [1], r"client.epochs must be a whole number, got [1]"),
        ("client.epochs", 10**400, "client.epochs must lie between -2**63 and 2**63 - 1, got a number of 1329 bits"),
        ("client.lr", True, "client.lr must be a number, got True"),
        ("client.lr", 2**53 + 1, "client.lr must be a number, got 9007199254740993"),
        ("client.lr", "fast", "client.lr must be a number, got 'fast'"),
        ("server.drift", 5, "server.drift must be true or false, got 5"),
        ("server.drift", "maybe", "server.drift must be true or false, got 'maybe'"),
        ("name", 1.0, "name must be a word (in quotes, if it looks like something else), got 1.0"),
        ("name", True, "name must be a word (in quotes, if it looks like something else), got True"),
        ("name", b"x", "name must be a word, a number, a list or a mapping, got bytes: b'x'"),
        ("name", "a\0b", "name holds a null character: 'a\\x00b'"),
        ("seed", datetime.date(2024, 1, 1), "seed must be a word, a number, a list or a mapping, got date: "),
        ("server.without", [[1]], "server.without.0 must be a whole number, got [1]"),
        ("server.without", 1, "server.without must be a list, got 1"),
        ("transform.std", [[1]], "transform.std.0 must be a number, got [1]"),
        ("data", [[1]], "data must be the name of one of the sources, or a mapping with the key 'source', got [[1]]"),
        ("model.config", {"a": {1.5: 2}}, "a key of model.config.a must be a word, got 1.5: put it in quotes"),
        ("adapter.rank", "???", "adapter.rank must be given, got ???"),
        ("name", "${nothing}", "name: Interpolation key 'nothing' not found"),
        ("name", "${", "holds an interpolation"),
        ("model.backbone", "a\nb", "model.config is for backbone 'random' only: leave it out, or set that, got 'a\\nb'"),
        ("client.optimizer", "a\u2028b", None),
        ("transform.augment", "a\nb", "transform.augment 'a\\nb' is unknown. Choose from: none, flip, crop, crop_flip, affine."),
    ],
)
def test_values_of_the_wrong_kind(key: str, value: Any, said: str | None) -> None:
    layers: list[Mapping[str, Any]] = [TINY, {key: value}]
    if said is None:
        assert configs.compose(layers).client.optimizer == value
        return
    with pytest.raises(ConfigError) as error:
        configs.compose(layers)
    assert said in str(error.value) or said == "holds an interpolation"
    assert len(str(error.value).splitlines()) == 1


def test_a_list_that_holds_itself() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert "holds itself" in refused(model={"config": {"a": endless}})


def test_what_is_taken_though_it_is_written_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LR", "1e-3")
    monkeypatch.setenv("EPOCHS", "003")
    config = tiny("client.lr=${oc.env:LR}", "client.epochs=${oc.env:EPOCHS}", "name=2024", "server.drift=off", "seed=1_0")
    assert (config.client.lr, config.client.epochs, config.name, config.server.drift, config.seed) == (1e-3, 3, "2024", False, 10)
    config = configs.compose([TINY, {"client.lr": np.float64(0.5), "seed": np.int64(3), "runtime.output": Path("a/b")}])
    assert (config.client.lr, config.seed, config.runtime.output) == (0.5, 3, "a/b")
    assert isinstance(config.client.lr, float) and type(config.seed) is int


def test_words_of_yaml_stay_what_they_are(tmp_path: Path) -> None:
    """12:30 is 750 in YAML 1.1, 007 seven, 1_000 a thousand and 2024-01-01 a date."""
    words = ["12:30", "007", "0x10", "1_000", "2024-01-01", "1e-3x", "a #b", "no.5", "=", "inf", "1.2.3"]
    config = configs.compose([TINY, {"stream.order": words, "name": "- a: b #c"}])
    (tmp_path / "a.yaml").write_text(config.to_yaml())
    again = load(tmp_path / "a.yaml")
    assert again.stream.order == words and again == config
    (tmp_path / "b.yaml").write_text("stream: {order: [12:30, 007, 0x10, 1_000, 2024-01-01]}\n")
    assert load(tmp_path / "b.yaml").stream.order == words[:5]


# ---------------------------------------------------------------- plug-in names


@pytest.mark.parametrize(
    "name",
    [
        "../x", "./x", "..", ".", "a..b", "", " ", "/", "x/y", "é!", "a\nb", "_common", "_grouped", "os", "os.path", "x\u2028",
        "~", "a" * 5000, "fedavg.", ".fedavg", "x.py", "/tmp", "/tmp/.py", "a" * 300 + ".py", "1", "-", "nothing.at.all",
        "python:x", "~nobody/x.py",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["aggregators", "sources", "adapters"])
def test_names_that_no_plugin_has(name: str, kind: str) -> None:
    with pytest.raises((PluginError, ConfigError)) as error:
        configs.expand(kind, name, "here")
    assert str(error.value).startswith("here") and len(str(error.value).splitlines()) == 1


def test_choices_are_said_once() -> None:
    with pytest.raises(ConfigError, match=r"^mode 'x' is unknown\. Choose from: on, off\.$"):
        require_choice("mode", "x", ("on", "off"))
    with pytest.raises(ConfigError, match=r"^mode 'onn' is unknown\. Did you mean 'on'\? Choose from: on, off\.$"):
        require_choice("mode", "onn", ("on", "off"))


def test_every_error_is_one_line() -> None:
    assert str(PluginError("a\nb\u2028c\x1b[1m")) == "a\\nb\\u2028c\\x1b[1m"
    assert str(ConfigError("Δ – 5 %")) == "Δ – 5 %"


# ---------------------------------------------------------------- overrides and paths


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a #b", "a #b"), ("#b", "#b"), ("'a #b'", "a #b"), ("a\nb", "a\nb"), ("a: b #c", None), ("[1] # c", None),
        ("'x' y", None), ("a=b", "a=b"), ("", None), ("{", None), ("*x", None), ("|", "|"), ("<<", "<<"), ("!!int 3", "!!int 3"),
    ],
)  # fmt: skip
def test_an_override_is_taken_whole_or_refused(text: str, value: str | None) -> None:
    if value is None:
        refused(f"runtime.output={text}")
    else:
        assert tiny(f"runtime.output={text}").runtime.output == value


def test_the_users_folder_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("client: {lr: 0.5}\n")
    (tmp_path / "child.yaml").write_text("extends: ~/base.yaml\nruntime: {output: ~/there}\n")
    rule = Path(plugins.load("aggregators", "fedavg").__module__.replace(".", "/") + ".py")
    (tmp_path / "rule.py").write_text((Path(__file__).resolve().parents[1] / rule).read_text())
    config = load("~/child.yaml", ["server.aggregator=~/rule.py", "manifest=~/m.json", "data={source: npz, path: ~/x.npz}"])
    assert (config.client.lr, config.runtime.output, config.manifest) == (0.5, f"{tmp_path}/there", f"{tmp_path}/m.json")
    assert config.server.aggregator["name"] == f"{tmp_path}/rule.py" and config.data["path"] == f"{tmp_path}/x.npz"
    assert configs.compose([TINY, {"runtime.output": "~/x"}]).runtime.output == f"{tmp_path}/x"
    (tmp_path / "sweep.yaml").write_text("base: ~/child.yaml\noutput: ~/sweeps\nlist: {a: {b: {extends: ~/base.yaml}}}\n")
    assert expand(tmp_path / "sweep.yaml").folder == tmp_path / "sweeps"
    assert not (tmp_path / "~").exists()


def test_an_adapter_beyond_memory_is_one_line() -> None:
    with pytest.raises(ModelError, match=r"^adapter vpt cannot be made: RuntimeError: "):
        prepare(tiny("server.aggregator=fedavg", "server.consolidator=none", "adapter={name: vpt, length: 4611686018427387904}"))


def test_half_a_character_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^manifest holds half a character"):
        configs.compose([TINY, {"manifest": "\ud800"}])
