"""Samples on a device: what is gathered of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clients.samples import Samples
from fedsim.core.contracts import ArraySplit


class Unread(np.ndarray):
    """An array of which nothing may be taken."""

    def __getitem__(self, key: Any) -> Any:
        raise AssertionError("somebody looked at the images")


@pytest.mark.parametrize("resident", [False, True])
def test_labels_are_those_of_the_batch_and_cost_no_image(resident: bool) -> None:
    images, labels = np.zeros((6, 2, 2), np.uint8), np.array([3, 1, 4, 1, 5, 9])
    samples, positions = Samples(ArraySplit({"pixel_values": images}, labels), torch.device("cpu")), np.array([5, 0, 0, 2])
    if resident:  # as on another device
        samples._resident = {"pixel_values": torch.from_numpy(images), "labels": torch.from_numpy(labels)}
    want = samples.batch(positions)[1]
    if resident:
        del samples._resident["pixel_values"]
    samples._arrays["pixel_values"] = images.view(Unread)
    got = samples.labels(positions)
    assert torch.equal(got, want) and (got.dtype, got.device) == (want.dtype, want.device)
    assert got.tolist() == [9, 3, 3, 4]
