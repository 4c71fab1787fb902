"""A config in the words of a notebook: data and models as objects, a method and a stream by their names.

from fedsim import run
results = run(data=(images, labels), clients=10, alpha=0.5, method="lorm", tasks=5)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fedsim.core import config as configs
from fedsim.core import presets
from fedsim.core.config import RuntimeConfig, SimConfig, text
from fedsim.core.errors import ConfigError, did_you_mean

SHORT = {  # a word of `experiment` -> the key that it sets
    "clients": "partition.clients",
    "alpha": "partition.alpha",
    "tasks": "stream.tasks",
    "rounds": "server.rounds",
    "epochs": "client.epochs",
    "lr": "client.lr",
    "seed": "seed",
    "name": "name",
}
OF_DATA = ("test", "test_share", "class_names")  # that go with `data`
WORDS = ("data", *OF_DATA, "model", "processor", "method", "stream", "overrides", *SHORT)


def experiment(
    *,
    data: Any = None,
    test: Any = None,
    test_share: float = 0.2,
    class_names: Sequence[str] | None = None,
    model: Any = None,
    processor: Any = None,
    method: str | Path | Sequence[str | Path] | None = None,
    stream: Any = None,
    overrides: Sequence[str] = (),
    **keys: Any,
) -> SimConfig:
    """The config of a run.

    data: (images, labels) or (texts, labels), see `fedsim.data.arrays.section`; without `test`, the share `test_share` of every
        class is held out for testing. They are kept as a file in the folder `data` of `runtime.output`, a byte per value of an
        image; the config names it. Or a data section, such as {"source": "fashion_mnist"}.
    model: `model.backbone`, a section, or a PreTrainedModel with its `processor` (a tokenizer or an image processor), which are
        kept in the folder `models` of `runtime.output`.
    method: a preset such as "lorm", or a file; several add up. stream: one too; without it and data, a method is on the Omniglot
        stream. A mapping is the section `stream`.
    keys: clients, alpha, tasks, rounds, epochs, lr, seed, name; sections, such as client={"epochs": 2}; dotted keys,
        as **{"client.batch_size": 8}. overrides: as on the command line, the last word.
    Raises ConfigError, PluginError, DataError or StorageError, one line each.
    """
    for word, value in {"test": test, "class_names": class_names}.items():
        if value is not None and (data is None or isinstance(data, Mapping)):
            raise ConfigError(f"{word} goes with data=(images, labels), or (texts, labels)")
    own = _own(keys)
    folder = Path(_output(own, overrides)).expanduser()
    told: dict[str, Any] = {}
    if data is not None:
        told["data"] = data if isinstance(data, Mapping) else _kept_data(data, folder, test, test_share, class_names)
    if processor is not None and (model is None or isinstance(model, str | Path | Mapping)):
        raise ConfigError("processor goes with a model object: a backbone that is named has its own")
    if model is not None:
        told["model"] = _model(model, processor, folder)
    if isinstance(stream, Mapping):
        told["stream"] = stream
    words = _words(stream, method, data)
    layers: Sequence[Mapping[str, Any]] = [layer for path in words for layer in configs.read_layers(path)]
    if len(words) > 1:
        layers = configs.on_a_stream(layers, [told])
    name = "-".join(Path(path).stem for path in words) or "run"
    return configs.compose([{"name": name, **_usual()}, *layers, _plain({**told, **own}), configs.parse_overrides(overrides)])


def _usual() -> dict[str, Any]:
    """The plug-ins of a config that names none, so that their options can be given alone."""
    usual = SimConfig()
    server = {key: value for key in configs.SERVER_PLUGIN_KEYS if (value := getattr(usual.server, key))}
    return {**{key: getattr(usual, key) for key in configs.PLUGIN_KEYS}, "server": server}


def _own(keys: Mapping[str, Any]) -> dict[str, Any]:
    """What was given by short words, sections and dotted keys, as one layer. Raises ConfigError for a word that there is not."""
    sections = [f.name for f in fields(SimConfig)]
    layer: dict[str, Any] = {}
    for key, value in keys.items():
        if key.split(".")[0] not in (*sections, *SHORT):
            raise ConfigError(f"unknown word '{key}'.{did_you_mean(key, (*WORDS, *sections))}")
        if value is not None:
            dotted = SHORT.get(key, key)
            if dotted in layer:
                short = next(word for word, meant in SHORT.items() if meant == dotted)
                raise ConfigError(f"{dotted} is there twice: {short} means the same")
            layer[dotted] = value
    return layer


def _plain(layer: Mapping[str, Any]) -> dict[str, Any]:
    anchored: dict[str, Any] = configs.anchored(text.plain(layer, ""), Path.cwd())
    return configs.nested(anchored)


def _output(own: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """`runtime.output`, in which arrays and models are kept too."""
    told = configs.merge(
        _plain({k: v for k, v in own.items() if k.split(".")[0] == "runtime"}), configs.parse_overrides(overrides)
    )
    runtime = told.get("runtime") or {}
    return str(runtime.get("output", RuntimeConfig().output)) if isinstance(runtime, Mapping) else RuntimeConfig().output


def _kept_data(data: Any, folder: Path, test: Any, test_share: float, class_names: Sequence[str] | None) -> dict[str, Any]:
    from fedsim.data import arrays

    return arrays.section(data, folder / "data", test, test_share, class_names)


def _model(model: Any, processor: Any, folder: Path) -> Any:
    if isinstance(model, Mapping):
        return model
    if isinstance(model, str | Path):
        return {"backbone": str(model)}
    from fedsim.models import kept

    return {"backbone": kept.backbone(model, processor, folder / "models")}


def _words(stream: Any, method: Any, data: Any) -> list[Path]:
    """The files of stream and method, in this order."""
    streams = [] if isinstance(stream, Mapping) else _listed(stream)
    words = [*streams, *_listed(method)]
    if not all(isinstance(word, str | Path) for word in words):
        raise ConfigError(f"method and stream must be names of presets or files, got {words!r}")
    whole = not streams and len(words) == 1 and data is None
    return presets.located(words, Path.cwd(), whole=whole) if words else []


def _listed(words: Any) -> list[Any]:
    return [] if words is None else list(words) if isinstance(words, list | tuple) else [words]
