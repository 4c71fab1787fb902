"""Fashion-MNIST: ten kinds of clothing, a part of it embedded in the package."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim.core import contracts
from fedsim.core.contracts import ArraySplit, Dataset
from fedsim.data.sources import _common


@dataclass(frozen=True)
class Source(contracts.Source):
    """Grey 28 × 28 pictures of clothing, 400 training and 100 test images per class (Xiao, Rasul, Vollgraf 2017, MIT).

    They are drawn from the 6,000 and 1,000 of the official split. Classes are in the official order.
    """

    def load(self, tokenizer_of: str | None = None, by_domain: bool = False) -> Dataset:
        arrays = _common.read_embedded("fashion_mnist", "fashion_mnist_28.npz")
        train, test = (
            ArraySplit({"pixel_values": arrays[f"{split}_images"]}, arrays[f"{split}_labels"].astype(np.int64))
            for split in ("train", "test")
        )
        return Dataset(train, test, class_names=_common.strings(arrays["class_names"]))
