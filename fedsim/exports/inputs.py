"""Images and texts from outside, read as a run's own data are."""

# N samples, L tokens, H × W pixels, C channels

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core.config import SimConfig
from fedsim.core.errors import DataError, one_line
from fedsim.core.messages import Tensors
from fedsim.data.images import Decoder
from fedsim.data.sources import _common
from fedsim.data.tokenise import tokenise
from fedsim.models import pretrained
from fedsim.models.backbone import Backbone

Batch: TypeAlias = tuple[Sequence[int], Tensors]  # where its samples stand among all, and what the backbone is given of them
USUAL_TOKENS = 64  # of a text, where neither the data's options nor the backbone set a bound


class Reader:
    """Makes batches of whatever a user hands in."""

    def __init__(self, config: SimConfig, backbone: Backbone) -> None:
        self.config = config
        self.backbone = backbone
        self.kind = backbone.kind
        options: Mapping[str, Any] = config.data
        side = options.get("image_size") if options.get("source") == "huggingface" else None
        self._decoder = Decoder(side, options.get("background", "white"), "the images")
        told = options.get("max_length")
        self._tokens = told if isinstance(told, int) else backbone.positions if self.kind == "text" else None

    @property
    def says(self) -> str:
        """What it reads, in words."""
        if self.kind == "text":
            return f"texts of up to {self.most_tokens} tokens"
        channels, (height, width) = self.backbone.num_channels, self.backbone.image_size
        return f"{'grey images' if channels == 1 else 'images'}, resized to {height} × {width} pixels"

    def batches(self, inputs: Any, size: int) -> Iterator[Batch]:
        """At most `size` samples each, of one shape. Raises DataError for what is no image, or no text, of the right kind."""
        if isinstance(inputs, Mapping):
            yield from self._of_arrays(inputs, size)
        elif isinstance(inputs, np.ndarray | Tensor):
            self.require("image", f"an array of shape {tuple(inputs.shape)}")
            yield from self._of_images([*_pixels(inputs)], size)
        elif isinstance(inputs, str | os.PathLike):
            raise DataError(f"inputs must be a list of samples, got one {type(inputs).__name__}: put it in a list")
        elif self.kind == "text":
            yield from self._of_texts(list(inputs), size)
        else:
            yield from self._of_images(inputs, size)

    def image(self, path: Path) -> NDArray[np.uint8]:
        """The image of a file. Raises DataError for one that cannot be read, or does not fit the backbone."""
        from PIL import Image, ImageOps

        self.require("image", str(path))
        try:
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file)
                picture.load()
        except Exception as e:  # Pillow's own, of the operating system, of a format that is cut short
            raise DataError(f"{path} cannot be read as an image: {one_line(e)[:200]}") from e
        return self._fitting(self._decoder.array(picture, str(path)), str(path))

    def _of_images(self, images: Iterable[Any], size: int) -> Iterator[Batch]:
        """Images that have one shape go together."""
        numbered = enumerate(images)
        while several := list(itertools.islice(numbered, size)):
            by_shape: dict[tuple[int, ...], list[tuple[int, NDArray[np.uint8]]]] = {}
            for place, image in several:
                array = self._array(image, f"image {place}")
                by_shape.setdefault(array.shape, []).append((place, array))
            for alike in by_shape.values():
                stacked = torch.from_numpy(np.stack([array for _, array in alike]))
                yield [place for place, _ in alike], {"pixel_values": stacked}

    def _array(self, image: Any, where: str) -> NDArray[np.uint8]:
        if isinstance(image, str | os.PathLike):
            return self.image(Path(image))
        if isinstance(image, np.ndarray | Tensor):
            return self._fitting(_common.check_images(_pixels(image)[None], where)[0], where)
        if hasattr(image, "getchannel"):
            return self._fitting(self._decoder.array(image, where), where)
        raise DataError(f"{where} is a {type(image).__name__}: give arrays, Pillow's images or paths")

    def _fitting(self, image: NDArray[np.uint8], where: str) -> NDArray[np.uint8]:
        """With the backbone's channels: colours that are all the same are grey."""
        if self.backbone.num_channels == 1 and image.ndim == 3 and image.shape[-1] == 3:
            if np.ptp(image, axis=2).any():
                raise DataError(f"{where} has colours, but the model takes grey images: convert it (Pillow: .convert('L'))")
            return np.ascontiguousarray(image[..., 0])
        return image

    def _of_texts(self, texts: list[Any], size: int) -> Iterator[Batch]:
        self.require("text", "texts")
        if wrong := [i for i, text in enumerate(texts) if not isinstance(text, str)]:
            raise DataError(f"text {wrong[0]} is a {type(texts[wrong[0]]).__name__}, not a string")
        for start in range(0, len(texts), size):
            some = texts[start : start + size]
            arrays, _ = tokenise([some], pretrained.tokenizer_name(self.config.model), self.most_tokens)
            yield range(start, start + len(some)), {n: torch.from_numpy(a) for n, a in arrays[0].items()}

    def _of_arrays(self, inputs: Mapping[str, Any], size: int) -> Iterator[Batch]:
        """Arrays by the names that data sets have for them."""
        if "pixel_values" in inputs:
            yield from self.batches(inputs["pixel_values"], size)
            return
        self.require("text", ", ".join(inputs) or "nothing")
        tensors = {n: torch.as_tensor(a) for n, a in inputs.items()}
        if "input_ids" not in tensors:
            raise DataError(f"texts must be given as input_ids and attention_mask, got {', '.join(inputs)}")
        for start in range(0, len(tensors["input_ids"]), size):
            some = {n: t[start : start + size] for n, t in tensors.items()}
            yield range(start, start + len(some["input_ids"])), some

    @property
    def most_tokens(self) -> int:
        """Of a text; what is beyond is cut off."""
        return self._tokens or USUAL_TOKENS

    def require(self, kind: str, what: str) -> None:
        """Raise DataError unless the backbone reads inputs of this kind. what: they are, in words."""
        if kind != self.kind:
            reads, other = ("texts", "images") if self.kind == "text" else ("images", "texts")
            raise DataError(f"the model reads {reads} ({self.config.model.backbone}), and {what} is none: it cannot read {other}")


def images_in(folder: str | Path) -> list[Path]:
    """The image files in a folder and below, sorted by name. Raises DataError for one that is not there, or holds none."""
    found = Path(os.path.expanduser(folder))
    if not found.is_dir():
        raise DataError(f"{found} is {'a file' if found.exists() else 'not there'}: --images takes a folder of image files")
    from PIL import Image

    kinds = Image.registered_extensions()
    images = [p for p in sorted(found.rglob("*")) if p.suffix.lower() in kinds and p.is_file() and not p.name.startswith(".")]
    if not images:
        raise DataError(
            f"{found} holds no image files ({', '.join(sorted(p.name for p in found.iterdir())[:3]) or 'it is empty'})"
        )
    return images


def lines_of(file: str | Path) -> list[tuple[int, str]]:
    """The lines of a text file that hold anything, with their numbers from 1 on. Raises DataError for one that cannot be read."""
    found = Path(os.path.expanduser(file))
    try:
        text = found.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        why = "it is not UTF-8" if isinstance(e, UnicodeDecodeError) else e.strerror or str(e)
        raise DataError(f"{found} cannot be read as text: {why}") from e
    lines = [(i, line.rstrip("\r")) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise DataError(f"{found} holds no text: write one text on every line")
    return lines


def _pixels(images: Any) -> NDArray[Any]:
    array: NDArray[Any] = images.detach().cpu().numpy() if isinstance(images, Tensor) else images
    return array
