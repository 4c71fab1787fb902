"""MFCL: mimicking federated class-incremental learning with a data-free generator (Babakniya et al. 2023, "A data-free approach
to mitigate catastrophic forgetting in federated class incremental learning for vision tasks"), both halves."""

# b images of a batch, C classes (head rows), S classes seen, D features

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clients.learners import _generator, _teacher
from clients.learners._generator import ImageGenerator
from fedsim.core import contracts
from fedsim.core.contracts import OWN, REWRITES, ClientWork, Context, IntArray, LocalState, ServerWork, Step, Synthetic, Traits
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import State, Tensors
from fedsim.core.tensors import without_prefix
from fedsim.models.logits import columns, masked_cross_entropy

GENERATOR, SAMPLES = "generator", "samples"
TENSORS, SHAPE = "generator/", "shape"  # of what clients are told
CHUNK = 256  # samples that the server draws at once


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """**The server**, at every task's end but the last, trains a generator G of images x = G(z), z ~ N(0, 1), in `steps` steps
    of Adam, against the deployed model T with logits over the S classes seen, p = softmax(T(x)):

        content · CE(T(x) / temperature, argmax T(x))                  the images are of some class,
        + balance · (1 + Σ_c p̄_c log p̄_c / log S),  p̄ = mean of p       and all classes are among them (information entropy),
        + bn · mean over layers of (‖μ̂ − μ‖ + ‖σ̂² − σ²‖)               with the moments of batch norms, where there are any,
        + smooth · mean (x − x̃)²                                       and are smooth: x̃ is x under a Gaussian of 5 × 5, σ = 1

    **A client**, from the second task on, draws b images from G in every step, whose labels are argmax T(x). Beside the
    cross-entropy over its own samples and the task's classes, whose features alone it trains:

        + head · CE(h(sg f)) over all classes seen, own and synthetic samples; sg stops the gradient, so that only the head learns
        + features · mean over samples and old classes of (h_T(f) − h_T(f_T))²,  f features, h_T and f_T head and features of T

    Down: G's tensors once per task and client (4 bytes each: 13 MB with latent 1000 and width 32 at 28 × 28 pixels), or with
    `sends: samples` so many `images` that the server has drawn, of H · W · C bytes; and T where it is not the parameters
    themselves. Up and in memory: nothing; a device keeps what it was sent while a task lasts.

    The reference trains 100 steps of 128 images, with width 64, against a ResNet-18 from scratch that its clients train for 10
    epochs in each of 100 rounds; here the budget is smaller, so that a task's end costs about as much as its rounds on a CPU
    [ours]. Its weights are as far as we know them; that the cross-entropy of the images has weight 1 and temperature 1, that the
    mean of the last term is over classes too, and that G starts anew at every task's end is [ours]. So are images in bytes, which
    are augmented as a client's own. A transformer has no batch norms: published numbers fall where that term is empty.

    head, features: 0 or more; both 0: nothing is made and sent. sends: generator | samples. batch_size: images of a client's
    step; null: as `client.batch_size`. images: drawn for `sends: samples`. steps: of Adam on the generator; lr: of Adam; batch:
    images of one of these steps. content, balance, bn, smooth: weights of the generator's terms; temperature: of the first.
    latent: numbers of z; width: channels of the generator's last layers.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"steps": 2, "batch": 4, "latent": 3, "width": 2},
        {"steps": 2, "batch": 4, "latent": 3, "width": 2, "sends": "samples", "images": 5, "batch_size": 1},
    )
    head: float = 1.0
    features: float = 0.1
    batch_size: int | None = None
    sends: str = GENERATOR
    images: int = 512
    steps: int = 50
    batch: int = 64
    lr: float = 1e-3
    content: float = 1.0
    temperature: float = 1.0
    balance: float = 1.0
    bn: float = 50.0
    smooth: float = 1e-3
    latent: int = 1000
    width: int = 32

    def __post_init__(self) -> None:
        require_choice("sends", self.sends, (GENERATOR, SAMPLES))
        for key in ("images", "steps", "batch", "latent", "width"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")
        for key in ("head", "features", "content", "balance", "bn", "smooth"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"{key} must not be negative, got {getattr(self, key)}")
        for key in ("lr", "temperature"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"{key} must be positive, got {getattr(self, key)}")

    @property
    def traits(self) -> Traits:
        if not self.head and not self.features:
            return Traits()
        composed = "asks the head of the last task's model about a client's features, and {other} keeps a head per client"
        return Traits({REWRITES}, needs=_generator.NEEDS, refuses={**_generator.REFUSES, "a module per client": composed})

    # ------------------------------------------------ on the client

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        own, count = context[OWN], self.batch_size or work.config.client.batch_size
        state: LocalState = {"teacher": _teacher.teacher(context), "count": count, SAMPLES: own.get(SAMPLES), GENERATOR: None}
        if SHAPE in own:
            shape = tuple(own[SHAPE].tolist())
            state |= {GENERATOR: ImageGenerator(self.latent, self.width, shape), TENSORS: without_prefix(own, TENSORS)}
        return state

    def synthetic(self, state: LocalState, positions: IntArray, draw: torch.Generator) -> Synthetic | None:
        samples, generator, count = state[SAMPLES], state[GENERATOR], state["count"]
        if samples is not None:
            pixels = samples[torch.randperm(len(samples), generator=draw)[:count].to(samples.device)]
        elif generator is not None:
            with torch.no_grad():
                pixels = _drawn(generator, state[TENSORS], count, draw)
        else:
            return None
        return Synthetic({"pixel_values": pixels}, torch.full((len(pixels),), -1))

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        teacher = state["teacher"]
        if step.synthetic.start == step.synthetic.stop:
            return None
        own, made = (range(len(step.labels))[part] for part in (step.own, step.synthetic))
        rows, old = [*own, *made], _teacher.old_classes(step.classes, step.seen)  # others may have added samples of their own
        features_bD, taught_bC = step.features[rows], step.model(teacher).logits[rows]
        told_b = torch.tensor(old, device=taught_bC.device)[columns(taught_bC[len(own) :], old).argmax(1)]
        labels_b = torch.cat([step.labels[step.own], told_b])
        finetuned = masked_cross_entropy(step.head(features_bD.detach()), labels_b, step.seen)
        apart = F.mse_loss(columns(step.head(features_bD, teacher), old), columns(taught_bC, old))
        return self.head * finetuned + self.features * apart

    # ------------------------------------------------ on the server

    def context(self, state: State) -> Tensors:
        return state or {}

    def made(self, state: State, server: ServerWork) -> State:
        if not self.head and not self.features:
            return state
        generator = ImageGenerator(self.latent, self.width, server.image_shape)
        tensors = _generator.trained(generator.init(server.draw, server.device))
        optimizer = _generator.adam([{"params": _generator.leaves(tensors)}], self.lr)
        for _ in range(self.steps):
            z_bZ = generator.latents(self.batch, server.draw, server.device)
            loss = self.image_loss(server, generator.images(tensors, z_bZ, training=True))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        final = {n: t.detach() for n, t in tensors.items()}
        if self.sends == SAMPLES:
            counts = [min(CHUNK, self.images - start) for start in range(0, self.images, CHUNK)]
            return {SAMPLES: torch.cat([_drawn(generator, final, count, server.draw) for count in counts]).cpu()}
        return {f"{TENSORS}{n}": t.cpu() for n, t in final.items()} | {SHAPE: torch.tensor(server.image_shape)}

    def image_loss(self, server: ServerWork, images: Tensor) -> Tensor:
        """Of a batch from the generator."""
        with _generator.moments_watched(server.backbone.encoder) as gaps:
            logits_bS = columns(server.outputs(images).logits, server.seen)
        loss = self.content * F.cross_entropy(logits_bS / self.temperature, logits_bS.argmax(1))
        loss = loss + self.smooth * F.mse_loss(images, _generator.smoothed(images))
        if len(server.seen) > 1:
            mean_S = logits_bS.softmax(1).mean(0)
            loss = loss + self.balance * (1 + torch.special.xlogy(mean_S, mean_S).sum() / math.log(len(server.seen)))
        return loss + self.bn * torch.stack(gaps).mean() if gaps else loss


def _drawn(generator: ImageGenerator, tensors: Tensors, count: int, draw: torch.Generator) -> Tensor:
    """So many images as bytes."""
    return _generator.as_bytes(generator.images(tensors, generator.latents(count, draw, tensors["linear.weight"].device)))
