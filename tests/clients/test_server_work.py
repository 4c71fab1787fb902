"""What a learner's server half is given where the server trains something by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clients.server_work import ServerWork
from fedsim.core.errors import ModelError
from tests.clients.test_fused import Here, work


def server_work(here: Here, shape: tuple[int, ...] = (8, 8)) -> ServerWork:
    params, draw = here.jobs[0].params, torch.Generator().manual_seed(0)
    fresh = here.model.init_adapter(draw) | here.model.init_head()
    return ServerWork(here.model, here.config, 0, (2, 3, 4), params, fresh, {"pixel_values": shape}, draw)


@pytest.mark.parametrize(("adapter", "size"), [("lora", 1), ("prefix", 1), ("tangent", 1), ("codaprompt", 5)])
def test_outputs_are_those_of_clients_and_gradients_flow(adapter: str, size: float) -> None:
    """As of the same images in bytes, augmented by nobody; derivatives along a direction against differences, those by way of a
    prompt pool's queries among them (size: of the adapter's tensors, for these to count)."""
    here = work("transform.augment=crop_flip", adapter=adapter)
    params = {n: size * t if n.startswith("adapter.") else t for n, t in here.jobs[0].params.items()}
    server, one = replace(server_work(here), params=params), here.works()[0]
    images = here.samples.batch(one.shard)[0]["pixel_values"]
    want = one.outputs(one.shard, server.params)
    pixels = (images.float() / 255).requires_grad_()
    got = server.outputs(pixels)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    trained = {n: t.clone().requires_grad_() for n, t in server.params.items()}
    for through in (None, trained):
        loss = lambda x, p: server.outputs(x, p).logits.square().sum()  # noqa: E731
        (gradient,) = torch.autograd.grad(loss(pixels, through), pixels)
        direction = gradient / gradient.norm()
        step = 3e-2
        ends = [float(loss(pixels + sign * step * direction, through).detach()) for sign in (1, -1)]
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=2e-2)
    gradients = torch.autograd.grad(server.outputs(pixels.detach(), trained).logits.square().sum(), list(trained.values()))
    assert all(bool(g.any()) for g in gradients)


def test_texts_are_no_images() -> None:
    with pytest.raises(ModelError, match="no images to be made: the data hold input_ids"):
        ServerWork(**{**vars(server_work(work())), "data_shape": {"input_ids": (7,)}}).image_shape  # noqa: B018
