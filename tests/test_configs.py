"""Every YAML that we ship loads, and runs a tiny round of what it describes."""

from __future__ import annotations

import dataclasses
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from fedsim import suitable
from fedsim.core import config as configs
from fedsim.core import presets
from fedsim.core.config import SimConfig, load
from fedsim.core.errors import ConfigError
from fedsim.simulation import prepare_data, run
from fedsim.sweeps.plan import expand
from tests.tiny import TINY, VIT

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("experiments/**/*.yaml")])
LEDGER = ROOT / "experiments" / "ledger"  # all methods once more, and their tuning: see test_ledger_study.py
SWEEPS = [path for path in FILES if "base" in configs.read_yaml(path) and path.parent != LEDGER]
PRESETS, METHODS, STREAMS = (sorted((ROOT / "configs" / part).glob("*.yaml")) for part in (".", "methods", "streams"))
DEEP = {**VIT, "num_hidden_layers": 6}  # as many blocks as the embedded backbone has, which methods may name
OF_A_STREAM = {"data", "stream", "partition", "model", "transform"}
OF_A_METHOD = {"adapter", "server.aggregator", "server.consolidator", "server.calibrator", "client.optimizer", "client.lr"}
MANY, FEW = {"images", "batch", "width"}, 4  # options of generators that take their time


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_every_method_runs_a_tiny_round(path: Path, tmp_path: Path) -> None:
    tiny_round(load(path), tmp_path)


@pytest.mark.parametrize("path", STREAMS, ids=lambda p: p.stem)
def test_every_stream_runs_a_tiny_round(path: Path, tmp_path: Path) -> None:
    tiny_round(load([path, ROOT / "configs/methods/lorm.yaml"]), tmp_path)


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_a_preset_is_a_stream_and_a_method(path: Path) -> None:
    """Nothing else: what it says is found in one of the two, and what each of them may say is its own."""
    stream, method = (ROOT / "configs" / file for file in configs.read_yaml(path)["extends"])
    assert set(configs.read_yaml(path)) == {"extends"}
    assert stream in STREAMS and method in METHODS
    assert load(path).identity() == load([stream, method]).identity()


def test_every_method_is_a_preset_too() -> None:
    """Of its own name, on the stream of all others: a method's bare name is a whole run, comparable with theirs."""
    named = {path.stem: configs.read_yaml(path)["extends"] for path in PRESETS}
    assert {method.stem for method in METHODS} <= set(named)
    assert all(f"methods/{method.stem}.yaml" in named[method.stem] for method in METHODS)


def test_every_method_takes_a_stream_of_as_many_tasks_as_the_data_have() -> None:
    """`stream.tasks: null` is no number that a method's options could be set to."""
    for path in sorted((ROOT / "configs/methods").glob("*.yaml")):
        assert load([ROOT / "configs/streams/digits.yaml", path], ["stream.tasks=null"]).stream.tasks is None, path


def test_a_preset_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it is a whole run; several are a stream and a method; files of one's own may build on them."""
    monkeypatch.chdir(tmp_path)
    assert load("ties").identity() == load(ROOT / "configs/ties.yaml").identity()
    mixed = load([ROOT / "configs/streams/fashion.yaml", ROOT / "configs/methods/er.yaml"])
    assert load(["fashion", "er"]).to_dict() == mixed.to_dict()
    (tmp_path / "mine.yaml").write_text("extends: [fashion, er]\nseed: 3\n")
    assert load("mine.yaml") == dataclasses.replace(mixed, seed=3, name="mine")
    (tmp_path / "er").write_text("seed: 4\n")
    assert load(["fashion", "er"]).seed == 4  # a file that is there


def test_parts_without_data_stand_on_the_stream_of_the_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a method by itself does, whatever else is said beside it; a file that brings data of its own is left as it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "extra.yaml").write_text("client: {lr: 0.02}\n")
    alone = load("lorm", ["client.lr=0.02"])
    for words in (["lorm", "extra.yaml"], ["extra.yaml", "lorm", "extra.yaml"]):
        assert load(words).identity() == alone.identity()
    assert load(["fedavg", "lorm"]).stream == alone.stream
    (tmp_path / "own.yaml").write_text("data: {source: synthetic}\n")
    assert load(["own.yaml", "lorm"]).stream.classes_per_task is None
    (tmp_path / "sweep.yaml").write_text("base: [lorm, extra.yaml]\nseeds: 1\n")
    assert expand("sweep.yaml").runs[0].config.identity() == alone.identity()
    (tmp_path / "streams.yaml").write_text("base: [lorm, extra.yaml]\nlist: {on: {own: {extends: own.yaml}}}\nseeds: 1\n")
    assert expand("streams.yaml").runs[0].config.stream.classes_per_task is None


def test_a_whole_run_is_no_part_and_an_empty_file_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["quickstart", "hgp"], ["lorm", "quickstart"]):
        with pytest.raises(ConfigError, match=r"^'quickstart' is a whole run, .* name its stream \(omniglot\) in its place"):
            load(words)
    with pytest.raises(ConfigError, match="no preset 'partition'"):
        load(["quickstart", "partition"])
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.yaml is empty: name a preset beside it"):
        load("empty.yaml")


def test_an_unknown_preset_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no config file and no preset 'lorn'. Did you mean 'lorm'\? `fedsim run` lists them"):
        load("lorn")
    with pytest.raises(ConfigError, match=r"no preset 'fashoin'. Did you mean 'fashion'"):
        load(["fashoin", "er"])
    (tmp_path / "mine.yaml").write_text("extends: quickstat\n")
    with pytest.raises(ConfigError, match=r"Did you mean 'quickstart'"):
        load("mine.yaml")


def test_presets_are_found_where_pip_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the packages lies no checkout then, and maybe a package of that name."""
    shipped = tmp_path / "share/fedsim/configs"
    shipped.mkdir(parents=True)
    (shipped / "quickstart.yaml").write_text("seed: 5\n")
    (tmp_path / "configs").mkdir()

    class Shipped(PurePosixPath):
        def locate(self) -> Path:
            return tmp_path / self

    monkeypatch.setattr(presets, "ROOT", str(tmp_path))
    monkeypatch.setattr(presets.metadata, "files", lambda name: [Shipped("share/fedsim/configs/quickstart.yaml")])
    presets.folder.cache_clear()
    try:
        assert load("quickstart").seed == 5
    finally:
        presets.folder.cache_clear()


def test_methods_say_nothing_of_data_and_streams_nothing_of_methods() -> None:
    """`joint` is a method that is about the stream and the split."""
    for path in METHODS:
        layers = configs.read_layers(path)
        said = set().union(*layers)
        assert not said & OF_A_STREAM or (path.stem == "joint" and said & OF_A_STREAM == {"stream", "partition"}), path
        assert set(flat(layers[0])) >= OF_A_METHOD, f"{path}: on another method, something of that would stay"
    for path in STREAMS:
        assert not set(flat(configs.read_yaml(path))) & OF_A_METHOD, path


def flat(layer: dict[str, Any]) -> set[str]:
    return {*layer, *(f"{key}.{sub}" for key, value in layer.items() if isinstance(value, dict) for sub in value)}


@pytest.mark.parametrize("stream", STREAMS, ids=lambda p: p.stem)
def test_any_method_goes_on_any_stream(stream: Path) -> None:
    """Data, backbone and order of tasks are the stream's; adapter and rules the method's."""
    own = load(stream)
    for method in METHODS:
        both = load([stream, method])
        suitable.require(both, configs.build_aggregator(both.server.aggregator))
        assert (both.data, both.model, both.transform) == (own.data, own.model, own.transform)
        assert both.name == f"{stream.stem}-{method.stem}"
        if method.stem != "joint":
            assert (both.stream, both.partition) == (own.stream, own.partition)


def test_joint_is_one_client_with_all_tasks_at_once_whatever_the_stream() -> None:
    for words in ([], ["stream.name=task_incremental"], ["stream.tasks=2", "stream.classes_per_task=7"]):
        files = [ROOT / "configs/streams/omniglot.yaml", ROOT / "configs/methods/joint.yaml"]
        manifest, _, _ = prepare_data(load(files, words))
        parts = prepare_data(load(files[0], words))[0]
        assert (manifest.num_clients, manifest.task_names) == (1, ("all tasks",))
        assert manifest.class_names == parts.class_names
        assert manifest.task_classes == (tuple(range(len(parts.class_names))),)
        assert sorted(manifest.shard_indices) == sorted(parts.shard_indices)
        assert sorted(manifest.test_indices) == sorted(parts.test_indices)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_sweep_runs_a_tiny_round(path: Path, tmp_path: Path) -> None:
    """Every variant of its axes once; of those that are a method's preset, which has a test of its own, the first."""
    presets = [
        (axis, label)
        for axis, variants in configs.read_yaml(path).get("list", {}).items()
        for label, sections in variants.items()
        if set(sections) == {"extends"} and (path.parent / sections["extends"]).resolve() in METHODS
    ]
    shown, played = set(presets[1:]), 0
    for planned in expand(path).runs:
        new = {(axis, label) for axis, label in planned.entry.labels.items() if axis != "seed"} - shown
        if new:
            tiny_round(planned.config, tmp_path)
            played += 1
        shown |= new
    assert played


def tiny_round(config: SimConfig, tmp_path: Path) -> None:
    """Its rules, adapter and client on synthetic data and a random backbone of the same family."""
    plain = config.to_dict()
    text, by_domain = config.data["source"] == "text", config.stream.name == "domain_incremental"
    enough = max(2, configs.build_aggregator(plain["server"]["aggregator"]).least)
    learners = [{**one, **dict.fromkeys(MANY & {*one}, FEW)} for one in plain["client"]["learners"]]
    bert = {
        "model_type": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 500,
    }
    small: dict[str, Any] = {
        "data": {**TINY["data"], "train_per_class": 6, "kind": "tokens" if text else "image", "domains": 2 * by_domain},
        "stream": {**plain["stream"], "tasks": min(2, plain["stream"]["tasks"] or 2), "classes_per_task": None, "group": None},
        "partition": {**plain["partition"], "clients": min(enough, plain["partition"]["clients"]), "min_samples": 1},
        "model": {**TINY["model"], "config": bert if text else DEEP, "pooling": plain["model"]["pooling"]},
        "client": {
            **plain["client"],
            "epochs": 1,
            "learners": [{**one, **dict.fromkeys(MANY & {*one}, FEW)} for one in learners],
        },
        "server": {**plain["server"], "rounds": 1},
        "runtime": {**TINY["runtime"], "output": str(tmp_path)},
    }
    results = run(configs.from_dict({**plain, **small}))
    assert results.metrics["final_average_accuracy"] is not None


def test_a_resolved_config_is_a_config(tmp_path: Path) -> None:
    config = load(ROOT / "configs/quickstart.yaml", ["partition.alpha=0.1"])
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    again = load(tmp_path / "again.yaml")
    assert again.identity() == config.identity()
    assert again.partition["alpha"] == 0.1


def test_the_surface_of_the_design() -> None:
    """The keys that users and scripts rely on."""
    config: SimConfig = configs.from_dict(
        {
            "seed": 0,
            "data": {"source": "omniglot"},
            "stream": {"name": "class_incremental", "tasks": 5},
            "partition": {"name": "dirichlet", "alpha": 0.5, "clients": 10},
            "model": {"backbone": "omniglot-vit"},
            "adapter": {"name": "lora", "rank": 8, "targets": ["q_proj", "v_proj"]},
            "client": {"epochs": 2, "batch_size": 16, "optimizer": "adamw", "lr": 1.0e-3},
            "server": {
                "rounds": 3, "participation": 1.0, "aggregator": {"name": "lorm"},
                "consolidator": {"name": "regmean"}, "calibrator": None,
            },
            "runtime": {"pool": "ray", "workers": "auto", "device": "auto", "precision": "fp32", "fused": "auto"},
        }
    )  # fmt: skip
    assert config.server.aggregator["name"] == "lorm"


def test_another_plugin_keeps_what_its_contract_declares(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("partition: {name: dirichlet, alpha: 0.1, clients: 7}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\npartition: {name: iid}\n")
    config = load(tmp_path / "child.yaml")
    assert config.partition["name"] == "iid"
    assert config.partition["clients"] == 7
    assert "alpha" not in config.partition


def test_extends_overrides_and_paths(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("client: {lr: 0.5, epochs: 3}\nseed: 1\n")
    (tmp_path / "sub" / "child.yaml").write_text("extends: ../base.yaml\nclient: {lr: 0.25}\nserver: {aggregator: ./rule.py}\n")
    (tmp_path / "sub" / "rule.py").write_text((ROOT / "server/aggregators/fedavg.py").read_text())
    config = load(tmp_path / "sub" / "child.yaml", ["seed=4"])
    assert (config.client.lr, config.client.epochs, config.seed, config.name) == (0.25, 3, 4, "child")
    assert config.server.aggregator["name"] == str(tmp_path / "sub" / "rule.py")
    identity = config.identity()
    (tmp_path / "sub" / "rule.py").write_text((ROOT / "server/aggregators/fedavg.py").read_text() + "\n# changed\n")
    assert load(tmp_path / "sub" / "child.yaml", ["seed=4"]).identity() != identity


def test_a_yaml_number_with_an_exponent_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("client: {lr: 1e-3}\n")
    assert load(tmp_path / "c.yaml").client.lr == 0.001


def test_a_rule_from_python_cannot_be_loaded_again() -> None:
    with pytest.raises(ConfigError, match="Python object"):
        configs.from_dict({**TINY, "server": {"aggregator": {"name": "python:my.Rule"}}})


def test_a_plugin_is_built_anew_every_time() -> None:
    """Two runs in one process never share an object, though their configs share what was typed once."""
    section = {"name": "fedavg"}
    assert configs.build("aggregators", section) is not configs.build("aggregators", section)
