"""Made-up data that can be learnt, for tests and for measuring speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedsim.core import contracts, rng
from fedsim.core.contracts import ArraySplit, Dataset, IntArray
from fedsim.core.errors import ConfigError
from fedsim.data.sources import _common

PIXEL_SIGMA = 24.0  # noise around a class's template, in grey levels
AT_ONCE = 1 << 14  # images
SIGNAL = 0.7  # share of tokens that come from the class's own words


@dataclass(frozen=True)
class Source(contracts.Source):
    """Gaussian clusters of images, or texts of class-specific tokens.

    kind: image | tokens.
    image: pixel_values = clip(template_c + offset_d + N(0, 24²)), uint8, template_c uniform in 64..191 per pixel,
        offset_d one shift in -48..48 per pixel and domain; shape (N, S, S), or (N, S, S, channels) when channels is 3.
    tokens: each token is, with probability 0.7, one of the class's own 4 tokens, else any of the vocabulary; lengths
        vary from half of `length` to all of it; id 0 is padding.
    domains: 0 for none; otherwise every class has `*_per_class` samples in every domain.
    classes: how many. train_per_class, test_per_class: samples of each. image_size: S; channels: 1 or 3. length: of a text, at
        most; vocab: numbers of tokens. seed: of what is drawn.
    Grouping: "half" (the first and the second half of the classes).
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"kind": "tokens"}, {"domains": 2, "channels": 3})
    kind: str = "image"
    classes: int = 10
    train_per_class: int = 20
    test_per_class: int = 5
    image_size: int = 8
    channels: int = 1
    length: int = 12
    vocab: int = 64
    domains: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("image", "tokens"):
            raise ConfigError(f"kind must be 'image' or 'tokens', got '{self.kind}'")
        if self.channels not in (1, 3):
            raise ConfigError(f"channels must be 1 or 3, got {self.channels}")
        if self.domains < 0 or self.seed < 0:
            raise ConfigError(f"domains and seed must not be negative, got {self.domains} and {self.seed}")
        _common.at_least_one(
            classes=self.classes, train_per_class=self.train_per_class, test_per_class=self.test_per_class,
            image_size=self.image_size, length=self.length,
        )  # fmt: skip
        if self.vocab < 6:
            raise ConfigError(f"vocab must be at least 6, got {self.vocab}")

    def load(self, tokenizer_of: str | None = None, by_domain: bool = False) -> Dataset:
        return Dataset(
            train=self._split("train", self.train_per_class),
            test=self._split("test", self.test_per_class),
            class_names=tuple(f"class{c}" for c in range(self.classes)),
            groups={"half": np.arange(self.classes) * 2 // self.classes},
            group_names={"half": ("first", "second")[: min(2, self.classes)]},
            domain_names=tuple(f"domain{d}" for d in range(self.domains)),
        )

    def _split(self, split: str, per_class: int) -> ArraySplit:
        labels = np.tile(np.repeat(np.arange(self.classes), per_class), max(1, self.domains))
        domains = np.repeat(np.arange(max(1, self.domains)), self.classes * per_class)
        draw = rng.stream(self.seed, "synthetic", split)
        inputs = (
            {"pixel_values": self._images(labels, domains, draw)} if self.kind == "image" else self._tokens(labels, domains, draw)
        )
        return ArraySplit(inputs, labels, domains if self.domains else None)

    def _images(self, labels: IntArray, domains: IntArray, draw: np.random.Generator) -> NDArray[np.uint8]:
        shape = (self.image_size, self.image_size) + ((self.channels,) if self.channels > 1 else ())
        templates = rng.stream(self.seed, "synthetic", "classes").uniform(64, 192, (self.classes, *shape))
        offsets = rng.stream(self.seed, "synthetic", "domains").uniform(-48, 48, (max(1, self.domains), *shape)) * (
            self.domains > 0
        )
        images = np.empty((len(labels), *shape), dtype=np.uint8)
        for start in range(0, len(labels), AT_ONCE):  # in parts: floats of millions of images would be gigabytes
            part = slice(start, start + AT_ONCE)
            exact = templates[labels[part]] + offsets[domains[part]]
            exact += draw.normal(0, PIXEL_SIGMA, exact.shape)
            images[part] = np.clip(np.rint(exact), 0, 255)
        return images

    def _tokens(self, labels: IntArray, domains: IntArray, draw: np.random.Generator) -> dict[str, IntArray]:
        words = rng.stream(self.seed, "synthetic", "classes").integers(1, self.vocab, (self.classes, 4))
        shape = (len(labels), self.length)
        own = np.take_along_axis(words[labels], draw.integers(0, 4, shape), axis=1)
        # a domain turns its own share of the other tokens into one filler word
        other = draw.integers(1, self.vocab, shape)
        filler = 1 + domains[:, None] % (self.vocab - 1)
        other = np.where((draw.random(shape) < 0.5) & (self.domains > 0), filler, other)
        tokens = np.where(draw.random(shape) < SIGNAL, own, other)
        lengths = draw.integers((self.length + 1) // 2, self.length + 1, len(labels))
        mask = np.arange(self.length)[None, :] < lengths[:, None]
        return {"input_ids": np.where(mask, tokens, 0).astype(np.int64), "attention_mask": mask.astype(np.int64)}
