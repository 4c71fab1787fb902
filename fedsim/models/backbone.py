"""Frozen pretrained encoders, through Hugging Face transformers.

Sources: the embedded `omniglot-vit`, a hub id, a local folder, a `.safetensors` file of a ViT with timm names, or random
weights of a given architecture. Whatever does not fit exactly is refused: a layer that silently stays random ruins a study.
"""

# b samples, L tokens, D width

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core.config import ModelConfig
from fedsim.core.errors import ModelError
from fedsim.core.messages import Tensors

# transformers is imported where it is used: it takes a second, which `fedsim --help` should not pay

OMNIGLOT_VIT = Path(__file__).resolve().parent.parent / "assets" / "omniglot_vit"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TIMM_HEAD_DIM = 64  # channels per attention head of every timm ViT of this layout
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
RANDOM_WEIGHTS_SEED = 0  # one set of random weights for all processes and seeds: only the architecture is the user's choice


@dataclass(frozen=True)
class Backbone:
    """A frozen encoder and what its inputs look like.

    width: D; kind: image | text; pooling: cls | mean; image_size: (height, width); mean, std: per channel in 0..1;
    tokenizer_source: hub id or folder of the tokenizer that belongs to it. Image fields mean nothing for text.
    """

    encoder: nn.Module
    width: int
    kind: str
    pooling: str
    image_size: tuple[int, int] = (0, 0)
    num_channels: int = 0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    tokenizer_source: str | None = None

    def image_features(self, pixels: Tensor) -> Tensor:
        """Normalised (b, C, H, W) -> (b, D): the class token, or the mean over the patches."""
        tokens_bLD: Tensor = self.encoder(pixel_values=pixels).last_hidden_state
        return tokens_bLD[:, 0] if self.pooling == "cls" else tokens_bLD[:, 1:].mean(dim=1)

    def text_features(self, inputs: Tensors) -> Tensor:
        """`input_ids` and `attention_mask` (b, L) -> (b, D): the first token, or the mean over the tokens in the mask."""
        if "input_ids" not in inputs:
            raise ModelError(f"the backbone takes text, but the data hold {', '.join(inputs)}: choose an image backbone")
        ids_bL = inputs["input_ids"]
        mask_bL = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(ids_bL)
        longest = getattr(self.encoder.config, "max_position_embeddings", None)
        if longest is not None and ids_bL.shape[1] > longest:
            raise ModelError(f"texts of {ids_bL.shape[1]} tokens do not fit a backbone of {longest} positions: lower data.max_length")
        tokens_bLD: Tensor = self.encoder(input_ids=ids_bL, attention_mask=mask_bL).last_hidden_state
        if self.pooling == "cls":
            return tokens_bLD[:, 0]
        weight_bL1 = mask_bL.unsqueeze(-1).to(tokens_bLD.dtype)
        return (tokens_bLD * weight_bL1).sum(dim=1) / weight_bL1.sum(dim=1).clamp(min=1)


def load(config: ModelConfig) -> Backbone:
    """The frozen backbone of a config, float32 on the CPU, in evaluation mode.

    Raises ModelError (one line) for a folder or file that is missing or damaged, and for weights that do not fit.
    """
    with _unseeded(), _quiet():
        if config.backbone == "random":
            encoder, scales = _random(config.config), ((0.5,), (0.5,))
        elif config.backbone.endswith(".safetensors"):
            encoder, scales = _from_timm(Path(config.backbone))
        else:
            encoder, scales = _from_pretrained(_source(config))
    encoder.eval().requires_grad_(False)
    return _described(encoder, config, *scales)


def tokenizer_name(config: ModelConfig) -> str | None:
    """Hub id or folder of the backbone's tokenizer, without loading weights; None where there is none."""
    if config.backbone in ("random", "omniglot-vit") or config.backbone.endswith(".safetensors"):
        return None
    folder = Path(config.backbone)
    if folder.is_dir() and not any((folder / f).is_file() for f in TOKENIZER_FILES):
        return None
    return config.backbone


def _described(encoder: nn.Module, config: ModelConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> Backbone:
    layout = encoder.config
    width = getattr(layout, "hidden_size", None)
    main_input = getattr(encoder, "main_input_name", None)
    if not isinstance(width, int) or main_input not in ("pixel_values", "input_ids"):
        raise ModelError(f"backbone '{config.backbone}' is a {type(encoder).__name__}, which is no encoder of images or text")
    text = main_input == "input_ids"
    pooling = config.pooling if config.pooling != "auto" else "mean" if text else "cls"
    if text:
        return Backbone(encoder, width, "text", pooling, tokenizer_source=tokenizer_name(config))
    side = layout.image_size
    height, across = (side, side) if isinstance(side, int) else side
    return Backbone(encoder, width, "image", pooling, (int(height), int(across)), int(layout.num_channels), mean, std)


# ---------------------------------------------------------------- transformers


def _source(config: ModelConfig) -> str:
    name = config.backbone
    if name == "omniglot-vit":
        return str(OMNIGLOT_VIT)
    if name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().is_dir():
        raise ModelError(f"no folder {name}: model.backbone must be a folder with config.json and model.safetensors, or a hub id")
    return str(Path(name).expanduser()) if name.startswith("~") else name


def _from_pretrained(name: str) -> tuple[nn.Module, tuple[tuple[float, ...], tuple[float, ...]]]:
    from transformers import AutoConfig

    folder = Path(name).is_dir()
    common = {"local_files_only": folder, "trust_remote_code": False}
    try:
        layout = AutoConfig.from_pretrained(name, **common)
        cls = _encoder_class(layout)
        encoder, info = cls.from_pretrained(
            name, config=layout, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **_no_pooler(cls), **common
        )
        scales = _normalisation(name, folder)
    except ModelError:
        raise
    except Exception as e:  # OSError, SafetensorError, JSON and pickle errors, hub errors: all mean that it cannot be read
        where = f"folder {name}" if folder else f"'{name}', which is neither a folder nor a hub id that can be reached"
        raise ModelError(f"the backbone cannot be loaded from {where}: {_one_line(e)}") from e
    _refuse_misfits(name, info)
    return encoder, scales


def _encoder_class(layout: Any) -> Any:
    """The bare encoder of an architecture."""
    from transformers import AutoModel

    if type(layout) not in AutoModel._model_mapping:
        raise ModelError(f"transformers has no encoder for the architecture '{layout.model_type}'")
    return AutoModel._model_mapping[type(layout)]


def _no_pooler(cls: Any) -> dict[str, bool]:
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(cls.__init__).parameters else {}


def _refuse_misfits(name: str, info: Mapping[str, Any]) -> None:
    """transformers fills what a file lacks with random numbers; the pooler is the one part that is never used."""
    missing = sorted(k for k in info["missing_keys"] if "pooler" not in k)
    if missing:
        raise ModelError(f"the weights in {name} do not fit its config.json: {len(missing)} tensor(s) are missing, the first is '{missing[0]}'")
    mismatched = sorted(k for k in info["mismatched_keys"] if "pooler" not in str(k))
    if mismatched:
        key, got, want = mismatched[0] if isinstance(mismatched[0], tuple) else (mismatched[0], "?", "?")
        raise ModelError(f"the weights in {name} do not fit its config.json: '{key}' has shape {list(got)}, expected {list(want)}")


def _normalisation(name: str, folder: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of preprocessor_config.json, (0.5, 0.5) if there is none."""
    from transformers.utils import cached_file

    options: dict[str, Any] = {"local_files_only": folder, "_raise_exceptions_for_missing_entries": False}
    file = cached_file(name, "preprocessor_config.json", **options)
    if file is None:
        return (0.5,), (0.5,)
    plain = json.loads(Path(file).read_text())
    if not plain.get("do_normalize", True):
        return (0.0,), (1.0,)
    mean, std = plain.get("image_mean", [0.5]), plain.get("image_std", [0.5])
    return tuple(map(float, mean)), tuple(map(float, std))


def _random(config: Mapping[str, Any]) -> nn.Module:
    from transformers import AutoConfig

    try:
        layout = AutoConfig.for_model(**config)
        cls = _encoder_class(layout)
        torch.default_generator.manual_seed(RANDOM_WEIGHTS_SEED)
        encoder: nn.Module = cls(layout, **_no_pooler(cls)).to(torch.float32)
    except ModelError:
        raise
    except Exception as e:
        raise ModelError(f"model.config describes no encoder that can be built: {_one_line(e)}") from e
    return encoder


# ---------------------------------------------------------------- timm


def _from_timm(file: Path) -> tuple[nn.Module, tuple[tuple[float, ...], tuple[float, ...]]]:
    raise ModelError(f"{file}: not yet")


# ---------------------------------------------------------------- keeping quiet


@contextmanager
def _unseeded() -> Iterator[None]:
    """Leave the global generator as it was: building a network draws from it even when weights are loaded over."""
    with torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and reports of transformers: what matters in them is checked here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
