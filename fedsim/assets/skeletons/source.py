"""NAME: one line that says which data these are, and where they come from.

Hold it against the laws of its kind, then use it:

    fedsim check ./NAME.py
    fedsim partition quickstart 'data={source: ./NAME.py}'
    fedsim run quickstart 'data={source: ./NAME.py}' stream.classes_per_task=2
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim import ArraySplit, Dataset
from fedsim import Source as Base
from fedsim.core.errors import ConfigError
from fedsim.core.numbers import IntArray


@dataclass(frozen=True)
class Source(Base):
    """Ten kinds of noisy stripes, 28 × 28 pixels: put your own arrays in their place. The same whenever it is loaded.

    per_class: training images of every class; a quarter as many for testing.
    """

    per_class: int = 100

    def __post_init__(self) -> None:
        if self.per_class < 4:
            raise ConfigError(f"per_class must be at least 4, got {self.per_class}")

    def load(self, tokenizer_of: str | None = None, by_domain: bool = False) -> Dataset:
        """Images are uint8, (N, H, W) or (N, H, W, 3); labels are whole numbers that index the names of the classes.

        A file that is missing or damaged: raise `fedsim.core.errors.DataError`, one line that says what to do.
        """
        return Dataset(
            train=_images(self.per_class, seed=0),
            test=_images(self.per_class // 4, seed=1),
            class_names=tuple(f"stripes of {width + 1}" for width in range(10)),
        )


def _images(per_class: int, seed: int) -> ArraySplit:
    draw = np.random.default_rng(seed)
    labels: IntArray = np.repeat(np.arange(10), per_class)
    stripes = (np.arange(28)[None, :] // (labels[:, None] + 1) % 2) * 160
    noise = draw.integers(0, 96, size=(len(labels), 28, 28))
    return ArraySplit({"pixel_values": (stripes[:, None, :] + noise).astype(np.uint8)}, labels)
