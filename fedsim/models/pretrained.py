"""Encoders from the embedded folder, a folder of the user's own, a hub id, a file with timm's names, or of random weights.

Whatever does not fit exactly is refused: a layer that silently stays random ruins a study.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsim.core import hub
from fedsim.core.config import ModelConfig, TransformConfig
from fedsim.core.errors import ModelError
from fedsim.models import families, timm_names, vit

# transformers is imported where it is used: it takes a second, which `fedsim --help` should not pay

OMNIGLOT_VIT = Path(__file__).resolve().parent.parent / "assets" / "omniglot_vit"
IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
SAFETENSORS = ".safetensors"  # the ending of a file with timm names
PREPROCESSOR = "preprocessor_config.json"
USUAL_SIDE = 224  # of images, where neither the config nor the preprocessor says
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
RANDOM_WEIGHTS_SEED = 0  # one set of random weights for all processes and seeds: only the architecture is the user's choice


def load(config: ModelConfig) -> tuple[nn.Module, Mapping[str, Any]]:
    """The encoder of a config, float32 on the CPU, and what its preprocessor_config.json holds.

    Raises ModelError (one line) for a folder or file that is missing or damaged, and for weights that do not fit.
    """
    return _plain_vit(config.backbone) or _by_transformers(config)


def tokenizer_name(config: ModelConfig) -> str | None:
    """Hub id or folder of the backbone's tokenizer, without loading weights; None where there is none."""
    if config.backbone in ("random", "omniglot-vit") or config.backbone.endswith(SAFETENSORS):
        return None
    source = _source(config.backbone)
    if Path(source).is_dir() and not any((Path(source) / f).is_file() for f in TOKENIZER_FILES):
        return None
    return source


def normalisation(preprocessor: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, or one for all, of a preprocessor; 0.5 where it does not say."""
    if not preprocessor.get("do_normalize", True):
        return (0.0,), (1.0,)
    mean, std = (preprocessor.get(key, [0.5]) for key in ("image_mean", "image_std"))
    return tuple(map(float, mean)), tuple(map(float, std))


def notes(config: ModelConfig, transform: TransformConfig) -> tuple[str, ...]:
    """What whoever reads the numbers has to know of how images are normalised."""
    if not config.backbone.endswith(SAFETENSORS) or (transform.mean is not None and transform.std is not None):
        return ()
    return (
        f"model.backbone {Path(config.backbone).name} does not say how its images were normalised: with three channels they are "
        "as DeiT's (ImageNet's mean and deviation). timm's augreg ViTs have transform.mean and transform.std [0.5, 0.5, 0.5]",
    )


def usual_side(preprocessor: Mapping[str, Any]) -> int:
    """The side of images that a preprocessor makes."""
    told: Any = preprocessor.get("crop_size") or preprocessor.get("size")
    if isinstance(told, Mapping):
        told = told.get("height", told.get("shortest_edge"))
    return told if isinstance(told, int) else USUAL_SIDE


def _source(name: str) -> str:
    """The folder or hub id that a name stands for."""
    if name == "omniglot-vit":
        return str(OMNIGLOT_VIT)
    folder = Path(os.path.expanduser(name))
    if name.startswith(("/", "./", "../", "~")) and not folder.is_dir():
        raise ModelError(f"no folder {name}: model.backbone must be a folder with config.json and model.safetensors, or a hub id")
    return str(folder) if folder.is_dir() else name


def _plain_vit(name: str) -> tuple[nn.Module, Mapping[str, Any]] | None:
    """Encoder and preprocessor of a folder with a plain ViT, without transformers, which is slow to import; None for all else."""
    if name == "random" or name.endswith(SAFETENSORS):
        return None
    folder = Path(_source(name))
    encoder = vit.load(folder)
    try:
        return None if encoder is None else (encoder, _preprocessor(str(folder), folder=True))
    except (OSError, ValueError, TypeError, AttributeError):  # transformers' way ends in an error that says what is wrong
        return None


def _by_transformers(config: ModelConfig) -> tuple[nn.Module, Mapping[str, Any]]:
    """Encoder and preprocessor."""
    with unseeded(), quiet():
        torch.default_generator.manual_seed(RANDOM_WEIGHTS_SEED)  # a pooler that a checkpoint lacks is the same everywhere, too
        if config.backbone == "random":
            return _random(config), {}
        if config.backbone.endswith(SAFETENSORS):
            encoder: Any = timm_names.load(Path(os.path.expanduser(config.backbone)))
            return encoder, IMAGENET if encoder.config.num_channels == 3 else {}
        name = _source(config.backbone)
        with nullcontext("") if Path(name).is_dir() else hub.reached() as unreachable:
            return _from_pretrained(name, config.pooling, unreachable)


def _from_pretrained(name: str, pooling: str, unreachable: str = "") -> tuple[nn.Module, Mapping[str, Any]]:
    from transformers import AutoConfig

    folder = Path(name).is_dir()
    common = {"local_files_only": folder, "trust_remote_code": False}
    try:
        layout = _layout(AutoConfig.from_pretrained(name, **common), pooling)
        cls = encoder_class(layout)
        encoder, info = cls.from_pretrained(
            name,
            config=layout,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **families.pooler_option(cls, layout),
            **common,
        )
        preprocessor = _preprocessor(name, folder)
    except ModelError:
        raise
    except Exception as e:  # OSError, SafetensorError, JSON and pickle errors, hub errors: all mean that it cannot be read
        where = f"folder {name}" if folder else f"'{name}', which is neither a folder nor a hub id that can be reached"
        raise ModelError(f"the backbone cannot be loaded from {where}: {unreachable or one_line(e)}") from e
    _refuse_misfits(name, info)
    return _encoder_of(encoder), preprocessor


def _layout(layout: Any, pooling: str) -> Any:
    """The config of the encoder in a checkpoint, without what features of this pooling do not pass."""
    family = families.of(layout)
    if family.part is not None:
        return _layout(getattr(layout, family.part), pooling)
    if family.plain:
        from transformers import ViTConfig

        known = ViTConfig().to_dict().keys() - {"model_type"}
        layout = ViTConfig(**{n: v for n, v in layout.to_dict().items() if n in known})
    if family.optional and family.only_if is not None and pooling != "auto":
        setattr(layout, family.only_if, False)
    if hasattr(layout, "use_cache"):
        layout.use_cache = False  # keys and values that are kept for a next token
    return layout


def encoder_class(layout: Any) -> Any:
    """The bare encoder of an architecture; of an encoder with a decoder, the encoder alone where there is a class for it."""
    from transformers import AutoModel, AutoModelForTextEncoding

    if type(layout) not in AutoModel._model_mapping:
        raise ModelError(f"transformers has no encoder for the architecture '{layout.model_type}'")
    alone = AutoModelForTextEncoding._model_mapping
    has_decoder = layout.is_encoder_decoder or hasattr(layout, "num_decoder_layers")  # T5's encoder alone says no to the first
    return (alone if has_decoder and type(layout) in alone else AutoModel._model_mapping)[type(layout)]


def _encoder_of(model: Any) -> Any:
    """The encoder of a model with a decoder, all else as it is."""
    return model.get_encoder() if model.config.is_encoder_decoder and hasattr(model, "get_decoder") else model


def _refuse_misfits(name: str, info: Mapping[str, Any]) -> None:
    """transformers fills what a file lacks with random numbers. A pooler may be missing: features pass through none, or through
    BEiT's, which is a norm and starts as one without weights."""
    missing = sorted(k for k in info["missing_keys"] if "pooler" not in k)
    if missing:
        raise ModelError(
            f"the weights in {name} do not fit its config.json: {len(missing)} tensor(s) are missing, the first is '{missing[0]}'"
        )
    mismatched = sorted(m for m in info["mismatched_keys"] if "pooler" not in m[0])
    if mismatched:
        key, got, want = mismatched[0]
        raise ModelError(
            f"the weights in {name} do not fit its config.json: '{key}' has shape {list(got)}, expected {list(want)}"
        )


def _preprocessor(name: str, folder: bool) -> Mapping[str, Any]:
    """What preprocessor_config.json holds, nothing if there is none."""
    file = Path(name) / PREPROCESSOR if folder else _cached_file(name, PREPROCESSOR)
    plain: Mapping[str, Any] = {} if file is None or not file.is_file() else json.loads(file.read_text(encoding="utf-8"))
    normalisation(plain)
    return plain


def _cached_file(name: str, file: str) -> Path | None:
    """A file of a hub repository, if it has such a one."""
    from transformers.utils.hub import cached_file

    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _random(config: ModelConfig) -> nn.Module:
    from transformers import AutoConfig

    try:
        layout = _layout(AutoConfig.for_model(**(config.config or {})), config.pooling)
        cls = encoder_class(layout)
        encoder: nn.Module = _encoder_of(cls(layout, **families.pooler_option(cls, layout)).to(torch.float32))
    except ModelError:
        raise
    except Exception as e:
        raise ModelError(f"model.config describes no encoder that can be built: {one_line(e)}") from e
    return encoder


# ---------------------------------------------------------------- keeping quiet


@contextmanager
def unseeded() -> Iterator[None]:
    """Leave the global generator as it was: building a network draws from it even when weights are loaded over."""
    with torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and reports of transformers: what matters in them is checked here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
