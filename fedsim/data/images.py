"""Pictures of any kind as arrays of bytes, in the one way in which fedsim reads them: to train on, and to predict."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.core.errors import DataError


@dataclass
class Decoder:
    """Images as uint8, grey (H, W) or RGB (H, W, 3), and what was lost on the way.

    size: side in pixels to which the shorter side is resized (bicubic), the middle being cut out; None: as they are.
    background: what transparent pixels are laid on. path: where the images come from, for what is said.
    """

    size: int | None
    background: str
    path: str
    done: Counter[str] = field(default_factory=Counter)
    brightest: int = 0  # of images of 16 bits

    def array(self, image: Any, where: str) -> NDArray[np.uint8]:
        """A picture of Pillow's. where: of `path`, for errors. Raises DataError for one that 8 bits cannot hold."""
        from PIL import Image, ImageOps

        image = self._eight_bits(image, where)
        if self.size is not None and image.size != (self.size, self.size):
            image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BICUBIC)
        return np.asarray(image, dtype=np.uint8)

    def notes(self) -> list[str]:
        """One line for each thing that was done."""
        return [
            f"{count} images of {self.path}: {what.format(brightest=self.brightest)}" for what, count in sorted(self.done.items())
        ]

    def _eight_bits(self, image: Any, where: str) -> Any:
        """Mode L or RGB."""

        mode = image.mode
        if getattr(image, "n_frames", 1) > 1:
            self.done["more than one frame, of which the first is taken"] += 1
        if mode in ("1", "L", "RGB") and "transparency" not in image.info:
            return image.convert("L") if mode == "1" else image
        if mode == "I" or mode.startswith("I;16"):
            return self._scaled(np.asarray(image).astype(np.int64), where)
        if mode == "F":
            raise DataError(f"{self.path}: {where} holds real numbers, whose white nobody knows: save it with 8 or 16 bits")
        if "transparency" in image.info or mode in ("RGBA", "LA", "PA", "RGBa", "La"):
            return self._on_background(image, where)
        if mode != "P":
            self.done[f"{mode} converted to RGB"] += 1
        plain = image.convert("RGB")
        red, green, blue = (plain.getchannel(c).tobytes() for c in "RGB")
        return plain.getchannel("R") if mode == "P" and red == green == blue else plain

    def _scaled(self, values: NDArray[np.int64], where: str) -> Any:
        from PIL import Image

        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise DataError(f"{self.path}: {where} holds numbers from {low} to {high}, beyond 16 bits: save it with 8 or 16 bits")
        self.brightest = max(self.brightest, high)
        self.done["16 bits scaled to 8, 65535 becomes 255 (the largest value is {brightest})"] += 1
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))

    def _on_background(self, image: Any, where: str) -> Any:
        from PIL import Image

        grey, opaque = image.mode in ("L", "LA", "La", "1"), image.convert("RGBA")
        alpha_HW = np.asarray(opaque.getchannel("A"))
        plain = Image.alpha_composite(Image.new("RGBA", image.size, self.background), opaque).convert("RGB")
        if alpha_HW.min() < 255:
            self.done[f"transparent pixels laid on {self.background}"] += 1
        if alpha_HW.min() < alpha_HW.max() and not np.ptp(np.asarray(plain), axis=(0, 1)).any():
            other = "black" if self.background == "white" else "white"
            raise DataError(f"{self.path}: {where} vanishes on {self.background}: set data.background to {other}")
        return plain.convert("L") if grey else plain
