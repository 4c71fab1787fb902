"""Frozen pretrained encoders, through Hugging Face transformers.

Sources: the embedded `omniglot-vit`, a hub id, a local folder, a `.safetensors` file of a ViT with timm names, or random
weights of a given architecture. Whatever does not fit exactly is refused: a layer that silently stays random ruins a study.
"""

# b samples, L tokens, D width

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core import config as configs
from fedsim.core import hub
from fedsim.core.config import ModelConfig, RuntimeConfig
from fedsim.core.errors import ModelError
from fedsim.core.messages import Tensors
from fedsim.models import families, kernels, layers, resolution, timm_names, vit

# transformers is imported where it is used: it takes a second, which `fedsim --help` should not pay

OMNIGLOT_VIT = Path(__file__).resolve().parent.parent / "assets" / "omniglot_vit"
IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
PREPROCESSOR = "preprocessor_config.json"
USUAL_SIDE = 224  # of images, where neither the config nor the preprocessor says
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
RANDOM_WEIGHTS_SEED = 0  # one set of random weights for all processes and seeds: only the architecture is the user's choice


@dataclass(frozen=True)
class Backbone:
    """A frozen encoder and what its inputs look like.

    width: D; kind: image | text; pooling: cls | mean | last | pooler (the encoder's own, as published); first_patch, last_patch:
    the patches are the tokens [first_patch, last_patch); image_size: (height, width); mean, std: per channel in 0..1;
    tokenizer_source: hub id or folder of the tokenizer that belongs to it; half: all weights and activations are bfloat16;
    features are not; lean: the last block may leave out tokens that no feature needs; by_encoder: features are the encoder's
    `pooler_output`. The image fields mean nothing for text.
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
    last_patch: int | None = None
    by_encoder: bool = False

    def image_features(self, pixels: Tensor, lean: bool = False) -> Tensor:
        """Normalised (b, C, H, W) -> (b, D): the class token, the mean over patches or places, or what the encoder makes of
        them. `lean`: see `Model.features`."""
        options = {"first": 1} if lean and self.lean else {}
        out: Any = self.encoder(pixel_values=pixels.bfloat16() if self.half else pixels, **options)
        if self.by_encoder:
            return self._of_width(_single(out.pooler_output).flatten(1))
        states: Tensor = out.last_hidden_state  # (b, L, D), (b, D, H, W), or (b, L, S, D) of an adapter with sources
        if states.dim() == 4 and states.shape[1] == self.width:
            return self._of_width(_single(states).mean(dim=(2, 3)))
        return self._of_width(
            _single(states[:, 0]) if self.pooling == "cls" else _single(states[:, self.first_patch : self.last_patch]).mean(dim=1)
        )

    def _of_width(self, features_bD: Tensor) -> Tensor:
        width = features_bD.shape[-1]
        if width != self.width:
            raise ModelError(f"a {type(self.encoder).__name__} as backbone gives {width} features, its config says {self.width}")
        return features_bD

    @cached_property
    def positions(self) -> int | None:
        """Tokens that a text may have; None where the architecture sets no bound. RoBERTa and its kin count positions from
        behind the padding's, so that they can use fewer than they have."""
        for name, module in self.encoder.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
                return module.num_embeddings - module.padding_idx - 1
        longest = getattr(self.encoder.config, "max_position_embeddings", None)
        return longest if isinstance(longest, int) and longest > 0 else None

    @cached_property
    def vocabulary(self) -> int | None:
        """Token ids that the encoder knows, from 0 on; None if it does not say."""
        try:
            table: Any = self.encoder.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            table = None
        return table.num_embeddings if isinstance(table, nn.Embedding) else None

    @staticmethod
    def used_tokens(inputs: Tensors) -> int:
        """Columns of a batch of texts up to the last one that is in a mask."""
        if "attention_mask" not in inputs:
            return inputs["input_ids"].shape[1]
        mask_bL = inputs["attention_mask"]
        return max(1, int((mask_bL.any(dim=0) * torch.arange(1, mask_bL.shape[1] + 1, device=mask_bL.device)).max()))

    def text_features(self, inputs: Tensors) -> Tensor:
        """`input_ids` and `attention_mask` (b, L) -> (b, D): the first token, the last or the mean of those in the mask.

        Columns at the end that hold nothing but padding are not computed. Raises ModelError for texts that are too long.
        """
        if "input_ids" not in inputs:
            raise ModelError(f"the backbone takes text, but the data hold {', '.join(inputs)}: choose an image backbone")
        ids_bL = inputs["input_ids"]
        mask_bL = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(ids_bL)
        used = self.used_tokens(inputs)
        ids_bL, mask_bL = ids_bL[:, :used], mask_bL[:, :used]  # most texts are far shorter than the longest one allowed
        longest = self.positions
        if longest is not None and used > longest:
            raise ModelError(f"texts of {used} tokens do not fit a backbone of {longest} positions: lower data.max_length")
        out: Any = self.encoder(input_ids=ids_bL, attention_mask=mask_bL)
        if self.by_encoder:
            return self._of_width(_single(out.pooler_output))
        return self._of_width(self._pooled(_single(out.last_hidden_state), mask_bL))

    def _pooled(self, tokens_bLD: Tensor, mask_bL: Tensor) -> Tensor:
        if self.pooling == "cls":
            return tokens_bLD[:, 0]
        if self.pooling == "last":
            last_b = (mask_bL * torch.arange(mask_bL.shape[1], device=mask_bL.device)).argmax(dim=1)
            return tokens_bLD[torch.arange(len(last_b), device=last_b.device), last_b]
        weight_bL1 = mask_bL.unsqueeze(-1).to(tokens_bLD.dtype)
        return (tokens_bLD * weight_bL1).sum(dim=1) / weight_bL1.sum(dim=1).clamp(min=1)


def load(config: ModelConfig) -> Backbone:
    """The frozen backbone of a config, float32 on the CPU, in evaluation mode.

    Raises ModelError (one line) for a folder or file that is missing or damaged, for weights that do not fit, and for an image
    size or a pooling that the architecture has not.
    """
    encoder, preprocessor = _plain_vit(config.backbone) or _by_transformers(config)
    if config.image_size is not None:
        with _unseeded():
            encoder = resolution.changed(encoder, config.image_size)
    layers.as_linear(encoder)
    encoder.eval().requires_grad_(False)
    return _described(encoder, config, preprocessor)


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


def _described(encoder: Any, config: ModelConfig, preprocessor: Mapping[str, Any]) -> Backbone:
    """What architecture and family say about inputs and outputs."""
    layout, name = encoder.config, f"'{config.backbone}' ({type(encoder).__name__})"
    if encoder.main_input_name == "input_ids":
        pooling = _text_pooling(layout, config.pooling, name)
        width: Any = getattr(layout, families.of(layout).width, None)
        if isinstance(width, int):
            own = pooling == families.POOLER
            return Backbone(encoder, width, "text", pooling, tokenizer_source=tokenizer_name(config), by_encoder=own)
    elif encoder.main_input_name == "pixel_values" and (hasattr(layout, "image_size") or _classifies_images(layout)):
        side: Any = getattr(layout, "image_size", None) or config.image_size or _side(preprocessor)
        size = (side, side) if isinstance(side, int) else (side[0], side[1])
        channels = getattr(layout, "num_channels", 3)
        pooling, class_token = _image_pooling(encoder, config.pooling, name)
        mean, std = _normalisation(preprocessor)
        before, after = families.extra_tokens(layout)
        return Backbone(
            encoder,
            _width(encoder, channels, size),
            "image",
            pooling,
            by_encoder=pooling in (families.POOLER, families.of(layout).normed),
            first_patch=class_token + before,
            last_patch=-after or None,
            image_size=size,
            num_channels=channels,
            mean=mean,
            std=std,
        )
    raise ModelError(f"model.backbone {name} is no encoder of images or text")


def _text_pooling(layout: Any, chosen: str, name: str) -> str:
    causal = families.is_causal(layout)
    if chosen == "cls" and causal:
        raise ModelError(f"model.pooling is cls, but {name} is a causal model, whose first token sees no other: use last or mean")
    if chosen != "auto":
        return chosen
    return families.of(layout).published(layout) or ("last" if causal else "mean")


def _image_pooling(encoder: Any, chosen: str, name: str) -> tuple[str, bool]:
    """The pooling, and whether there is a class token."""
    class_token = any(n.endswith(("cls_token", "class_embedding")) for n, _ in encoder.named_parameters())
    if chosen == "cls" and not class_token:
        raise ModelError(f"model.pooling is cls, but {name} has no class token: use mean")
    if chosen == "last":
        raise ModelError(f"model.pooling is last, which is for text, but {name} takes images: use auto, cls or mean")
    published = families.of(encoder.config).published(encoder.config)
    return (published or ("cls" if class_token else "mean")) if chosen == "auto" else chosen, class_token


@torch.no_grad()
def _width(encoder: Any, channels: int, size: tuple[int, int]) -> int:
    """Features of an encoder of images: by its config, or of one blank image."""
    width: Any = getattr(encoder.config, "hidden_size", None)
    if isinstance(width, int):
        return width
    states: Tensor = encoder(pixel_values=torch.zeros(1, channels, *size)).last_hidden_state
    return states.shape[1 if states.dim() == 4 else -1]


# ---------------------------------------------------------------- transformers


def _source(name: str) -> str:
    """The folder or hub id that a name stands for."""
    if name == "omniglot-vit":
        return str(OMNIGLOT_VIT)
    folder = Path(name).expanduser()
    if name.startswith(("/", "./", "../", "~")) and not folder.is_dir():
        raise ModelError(f"no folder {name}: model.backbone must be a folder with config.json and model.safetensors, or a hub id")
    return str(folder) if folder.is_dir() else name


def _plain_vit(name: str) -> tuple[nn.Module, Mapping[str, Any]] | None:
    """Encoder and preprocessor of a folder with a plain ViT, without transformers, which is slow to import; None for all else."""
    if name == "random" or name.endswith(".safetensors"):
        return None
    folder = Path(_source(name))
    encoder = vit.load(folder)
    try:
        return None if encoder is None else (encoder, _preprocessor(str(folder), folder=True))
    except (OSError, ValueError, TypeError, AttributeError):  # transformers' way ends in an error that says what is wrong
        return None


def _by_transformers(config: ModelConfig) -> tuple[nn.Module, Mapping[str, Any]]:
    """Encoder and preprocessor."""
    with _unseeded(), _quiet():
        if config.backbone == "random":
            return _random(config), {}
        if config.backbone.endswith(".safetensors"):
            encoder: Any = timm_names.load(Path(config.backbone).expanduser())
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
        cls = _encoder_class(layout)
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
        raise ModelError(f"the backbone cannot be loaded from {where}: {unreachable or _one_line(e)}") from e
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


def _encoder_class(layout: Any) -> Any:
    """The bare encoder of an architecture; of an encoder with a decoder, the encoder alone where there is a class for it."""
    from transformers import AutoModel, AutoModelForTextEncoding

    if type(layout) not in AutoModel._model_mapping:
        raise ModelError(f"transformers has no encoder for the architecture '{layout.model_type}'")
    alone = AutoModelForTextEncoding._model_mapping
    return (alone if layout.is_encoder_decoder and type(layout) in alone else AutoModel._model_mapping)[type(layout)]


def _encoder_of(model: Any) -> Any:
    """The encoder of a model with a decoder, all else as it is."""
    return model.get_encoder() if model.config.is_encoder_decoder and hasattr(model, "get_decoder") else model


def _classifies_images(layout: Any) -> bool:
    from transformers.models.auto import modeling_auto

    return layout.model_type in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES


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


def _preprocessor(name: str, folder: bool) -> Mapping[str, Any]:
    """What preprocessor_config.json holds, nothing if there is none."""
    file = Path(name) / PREPROCESSOR if folder else _cached_file(name, PREPROCESSOR)
    plain: Mapping[str, Any] = {} if file is None or not file.is_file() else json.loads(file.read_text(encoding="utf-8"))
    _normalisation(plain)
    return plain


def _normalisation(preprocessor: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, or one for all, of a preprocessor; 0.5 where it does not say."""
    if not preprocessor.get("do_normalize", True):
        return (0.0,), (1.0,)
    mean, std = (preprocessor.get(key, [0.5]) for key in ("image_mean", "image_std"))
    return tuple(map(float, mean)), tuple(map(float, std))


def _side(preprocessor: Mapping[str, Any]) -> int:
    """The side of images that a preprocessor makes."""
    told: Any = preprocessor.get("crop_size") or preprocessor.get("size")
    if isinstance(told, Mapping):
        told = told.get("height", told.get("shortest_edge"))
    return told if isinstance(told, int) else USUAL_SIDE


def _cached_file(name: str, file: str) -> Path | None:
    """A file of a hub repository, if it has such a one."""
    from transformers.utils.hub import cached_file

    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _random(config: ModelConfig) -> nn.Module:
    from transformers import AutoConfig

    try:
        layout = _layout(AutoConfig.for_model(**(config.config or {})), config.pooling)
        cls = _encoder_class(layout)
        torch.default_generator.manual_seed(RANDOM_WEIGHTS_SEED)
        encoder: nn.Module = _encoder_of(cls(layout, **families.pooler_option(cls, layout)).to(torch.float32))
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
