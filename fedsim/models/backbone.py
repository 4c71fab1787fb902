"""Frozen pretrained encoders, through Hugging Face transformers.

Sources: the embedded `omniglot-vit`, a hub id, a local folder, a `.safetensors` file of a ViT with timm names, or random
weights of a given architecture. Whatever does not fit exactly is refused: a layer that silently stays random ruins a study.
"""

# b samples, L tokens, D width

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import CRITICAL
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fedsim.core import config as configs
from fedsim.core.config import ModelConfig, RuntimeConfig
from fedsim.core.errors import ModelError
from fedsim.core.messages import Tensors
from fedsim.models import kernels, timm_names, vit

Scales: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, per channel or one for all

# transformers is imported where it is used: it takes a second, which `fedsim --help` should not pay

OMNIGLOT_VIT = Path(__file__).resolve().parent.parent / "assets" / "omniglot_vit"
HALF: Scales = (0.5,), (0.5,)
IMAGENET: Scales = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSOR = "preprocessor_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
RANDOM_WEIGHTS_SEED = 0  # one set of random weights for all processes and seeds: only the architecture is the user's choice


@dataclass(frozen=True)
class Backbone:
    """A frozen encoder and what its inputs look like.

    width: D; kind: image | text; pooling: cls | mean; first_patch: number of tokens before the patches (the class token);
    image_size: (height, width); mean, std: per channel in 0..1; tokenizer_source: hub id or folder of the tokenizer that
    belongs to it; half: all weights and activations are bfloat16; features are not; lean: the last block may leave out tokens
    that no feature needs. The image fields mean nothing for text.
    """

    encoder: nn.Module
    width: int
    kind: str
    pooling: str
    first_patch: int = 0
    image_size: tuple[int, int] = (0, 0)
    num_channels: int = 0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    tokenizer_source: str | None = None
    half: bool = False
    lean: bool = False

    def image_features(self, pixels: Tensor, lean: bool = False) -> Tensor:
        """Normalised (b, C, H, W) -> (b, D): the class token, or the mean over the patches. `lean`: see `Model.features`."""
        options = {"first": 1} if lean and self.lean else {}
        tokens_bLD: Tensor = self.encoder(pixel_values=pixels.bfloat16() if self.half else pixels, **options).last_hidden_state
        return _single(tokens_bLD[:, 0]) if self.pooling == "cls" else _single(tokens_bLD[:, self.first_patch :]).mean(dim=1)

    @staticmethod
    def used_tokens(inputs: Tensors) -> int:
        """Columns of a batch of texts up to the last one that is in a mask."""
        if "attention_mask" not in inputs:
            return inputs["input_ids"].shape[1]
        mask_bL = inputs["attention_mask"]
        return max(1, int((mask_bL.any(dim=0) * torch.arange(1, mask_bL.shape[1] + 1, device=mask_bL.device)).max()))

    def text_features(self, inputs: Tensors) -> Tensor:
        """`input_ids` and `attention_mask` (b, L) -> (b, D): the first token, or the mean over the tokens in the mask.

        Columns at the end that hold nothing but padding are not computed. Raises ModelError for texts that are too long.
        """
        if "input_ids" not in inputs:
            raise ModelError(f"the backbone takes text, but the data hold {', '.join(inputs)}: choose an image backbone")
        ids_bL = inputs["input_ids"]
        mask_bL = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(ids_bL)
        used = self.used_tokens(inputs)
        ids_bL, mask_bL = ids_bL[:, :used], mask_bL[:, :used]  # most texts are far shorter than the longest one allowed
        longest = getattr(self.encoder.config, "max_position_embeddings", None)
        if longest is not None and ids_bL.shape[1] > longest:
            raise ModelError(
                f"texts of {ids_bL.shape[1]} tokens do not fit a backbone of {longest} positions: lower data.max_length"
            )
        tokens_bLD: Tensor = _single(self.encoder(input_ids=ids_bL, attention_mask=mask_bL).last_hidden_state)
        if self.pooling == "cls":
            return tokens_bLD[:, 0]
        weight_bL1 = mask_bL.unsqueeze(-1).to(tokens_bLD.dtype)
        return (tokens_bLD * weight_bL1).sum(dim=1) / weight_bL1.sum(dim=1).clamp(min=1)


def load(config: ModelConfig) -> Backbone:
    """The frozen backbone of a config, float32 on the CPU, in evaluation mode.

    Raises ModelError (one line) for a folder or file that is missing or damaged, and for weights that do not fit.
    """
    encoder, scales = _plain_vit(config.backbone) or _by_transformers(config)
    encoder.eval().requires_grad_(False)
    return _described(encoder, config, scales)


def prepared(backbone: Backbone, runtime: RuntimeConfig, device: torch.device) -> Backbone:
    """The backbone on a device, in the precision and with the kernels of a run.

    In bf16 on the CPU the linear layers alone are in half precision, where it pays; on a GPU everything is.
    Raises ModelError where this torch lacks the kernels.
    """
    bf16 = runtime.precision == "bf16"
    if device.type == "cpu":
        name = configs.resolve_kernels(runtime.kernels, device.type)
        if bf16 or name != "torch":
            kernels.freeze(backbone.encoder, name, runtime.precision)
        lean = name != "torch" and _can_be_lean(backbone)
        return dataclasses.replace(backbone, lean=True) if lean else backbone
    backbone.encoder.to(device, torch.bfloat16 if bf16 else torch.float32)
    return dataclasses.replace(backbone, half=bf16, lean=_can_be_lean(backbone))


def _can_be_lean(backbone: Backbone) -> bool:
    return isinstance(backbone.encoder, vit.ViT) and backbone.pooling == "cls"


def _single(x: Tensor) -> Tensor:
    """Half precision widened to float32."""
    return x.float() if x.dtype == torch.bfloat16 else x


def tokenizer_name(config: ModelConfig) -> str | None:
    """Hub id or folder of the backbone's tokenizer, without loading weights; None where there is none."""
    if config.backbone in ("random", "omniglot-vit") or config.backbone.endswith(".safetensors"):
        return None
    source = _source(config.backbone)
    if Path(source).is_dir() and not any((Path(source) / f).is_file() for f in TOKENIZER_FILES):
        return None
    return source


def _described(encoder: Any, config: ModelConfig, scales: Scales) -> Backbone:
    """What the architecture says about inputs and outputs."""
    layout, main_input = encoder.config, encoder.main_input_name
    width: Any = getattr(layout, "hidden_size", None)
    side: Any = getattr(layout, "image_size", None)
    if (
        not isinstance(width, int)
        or main_input not in ("pixel_values", "input_ids")
        or (main_input == "pixel_values" and side is None)
    ):
        raise ModelError(
            f"model.backbone '{config.backbone}' is a {type(encoder).__name__}, which is no encoder of images or text"
        )
    if main_input == "input_ids":
        pooling = "mean" if config.pooling == "auto" else config.pooling
        return Backbone(encoder, width, "text", pooling, tokenizer_source=tokenizer_name(config))
    class_token = any(n.endswith(("cls_token", "class_embedding")) for n, _ in encoder.named_parameters())
    if config.pooling == "cls" and not class_token:
        raise ModelError(f"model.pooling is cls, but '{config.backbone}' ({type(encoder).__name__}) has no class token: use mean")
    pooling = config.pooling if config.pooling != "auto" else "cls" if class_token else "mean"
    first_patch = class_token + getattr(layout, "num_register_tokens", 0)
    size = (side, side) if isinstance(side, int) else (side[0], side[1])
    return Backbone(encoder, width, "image", pooling, first_patch, size, layout.num_channels, *scales)


# ---------------------------------------------------------------- transformers


def _source(name: str) -> str:
    """The folder or hub id that a name stands for."""
    if name == "omniglot-vit":
        return str(OMNIGLOT_VIT)
    folder = Path(name).expanduser()
    if name.startswith(("/", "./", "../", "~")) and not folder.is_dir():
        raise ModelError(f"no folder {name}: model.backbone must be a folder with config.json and model.safetensors, or a hub id")
    return str(folder) if folder.is_dir() else name


def _plain_vit(name: str) -> tuple[nn.Module, Scales] | None:
    """The encoder of a folder with a plain ViT, without transformers' help, which is slow to import; None for all else."""
    if name == "random" or name.endswith(".safetensors"):
        return None
    folder = Path(_source(name))
    encoder = vit.load(folder)
    try:
        return None if encoder is None else (encoder, _normalisation(str(folder), folder=True))
    except (OSError, ValueError, TypeError, AttributeError):  # transformers' way ends in an error that says what is wrong
        return None


def _by_transformers(config: ModelConfig) -> tuple[nn.Module, Scales]:
    with _unseeded(), _quiet():
        if config.backbone == "random":
            return _random(config.config or {}), HALF
        if config.backbone.endswith(".safetensors"):
            encoder: Any = timm_names.load(Path(config.backbone).expanduser())
            return encoder, IMAGENET if encoder.config.num_channels == len(IMAGENET[0]) else HALF
        return _from_pretrained(_source(config.backbone))


def _from_pretrained(name: str) -> tuple[nn.Module, Scales]:
    from transformers import AutoConfig

    folder = Path(name).is_dir()
    common = {"local_files_only": folder, "trust_remote_code": False}
    try:
        layout = AutoConfig.from_pretrained(name, **common)
        cls = _encoder_class(layout)
        encoder, info = cls.from_pretrained(
            name,
            config=layout,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_no_pooler(cls),
            **common,
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
        raise ModelError(
            f"the weights in {name} do not fit its config.json: {len(missing)} tensor(s) are missing, the first is '{missing[0]}'"
        )
    mismatched = sorted(m for m in info["mismatched_keys"] if "pooler" not in m[0])
    if mismatched:
        key, got, want = mismatched[0]
        raise ModelError(
            f"the weights in {name} do not fit its config.json: '{key}' has shape {list(got)}, expected {list(want)}"
        )


def _normalisation(name: str, folder: bool) -> Scales:
    """(mean, std) of preprocessor_config.json, (0.5, 0.5) if there is none."""
    file = Path(name) / PREPROCESSOR if folder else _cached_file(name, PREPROCESSOR)
    if file is None or not file.is_file():
        return HALF
    plain = json.loads(file.read_text())
    if not plain.get("do_normalize", True):
        return (0.0,), (1.0,)
    mean, std = plain.get("image_mean", [0.5]), plain.get("image_std", [0.5])
    return tuple(map(float, mean)), tuple(map(float, std))


def _cached_file(name: str, file: str) -> Path | None:
    """A file of a hub repository, if it has such a one."""
    from transformers.utils.hub import cached_file

    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


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
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
