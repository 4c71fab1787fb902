"""TARGET: data-free distillation with synthetic images (Zhang et al. 2023, "TARGET: Federated class-continual learning via
exemplar-free distillation"), both halves."""

# b images of a batch, C classes (head rows)

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clients import optim
from clients.learners import _generator, _teacher
from clients.learners._generator import ImageGenerator
from fedsim.core import contracts
from fedsim.core.contracts import OWN, REWRITES, ClientWork, Context, IntArray, LocalState, ServerWork, Step, Synthetic, Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import State, Tensors
from fedsim.models.logits import columns, masked_cross_entropy

IMAGES = "images"
BETAS = (0.5, 0.999)  # of the generator's optimizers


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """**The server**, at every task's end but the last, makes images that the deployed model T takes for classes seen, and hard
    for a student S, with a generator G that starts anew. For every batch of images, labels y drawn uniformly among classes seen:

        G' = a copy of G,  z ~ N(0, 1);   steps times, with Adam on G' (lr) and z (lr_z):
            x = G'(z),   L = bn Σ_layers (‖μ̂ − μ‖ + ‖σ̂² − σ²‖) + oh · CE(T(x), y) − adv · mean[1(argmax S = argmax T) KL(T ‖ S)]
        the x of the least L join the pool; G takes one step of Adam along the sum of the gradients at G' (first-order MAML)
        S learns T on the pool, with student_steps minibatches of KL(T ‖ S) at temperature 20

    All over the classes seen. The adversarial term begins after `warmup` batches. The term of batch norms is empty for backbones
    without them, as transformers are: their images have no likeness to the data's, and published numbers fall as well.

    **A client**, from the second task on: CE over its own samples and the task's classes, plus on one minibatch of the images per
    step, augmented as its own, over the classes of earlier tasks

        distillation · 1/b Σ −Σ_c softmax(t / 2)_c · log softmax(z / 2)_c,     t, z: logits of the teacher (T) and its own

    Down: `images` · H · W · C bytes once per task and client (uint8, as they lie in the files of the reference), and the teacher
    where it is not the parameters themselves. Up and in memory: nothing; a device keeps the images while a task lasts.

    In the reference's code: batches of 256, 10 steps (50 for Tiny ImageNet), warmup 20, student_steps 400 with SGD, images 8000,
    about 100 batches at 5 clients and a ResNet; fed-mammoth's for a ViT: batches of 16, 80 steps, 30 batches. Here the budget is
    smaller, so that a task's end costs about as much as its rounds on a CPU [ours]; there are as many batches as the images need.
    [Ours] too: S is the frozen backbone with a new adapter and head, and trains with the clients' optimizer; no image is
    augmented on the server; G steps with rate lr · steps.

    distillation: 0 or more; 0: nothing is made and sent. batch_size: of a client's minibatch of images; null: as
    `client.batch_size`. images: made per task; batch: images that are made together; steps: of Adam on each batch; warmup:
    batches without the adversarial term; student_steps: of S after each batch. bn, oh, adv: weights of L's terms. lr, lr_z: of
    G' and of z. latent: numbers of z; width: channels of the generator's last layers.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"images": 5, "batch": 3, "steps": 2, "warmup": 0, "student_steps": 1, "latent": 4, "width": 2},
        {"images": 4, "batch": 4, "steps": 1, "adv": 0.0, "latent": 3, "width": 2, "batch_size": 1},
    )
    distillation: float = 25.0
    batch_size: int | None = None
    images: int = 512
    batch: int = 64
    steps: int = 10
    warmup: int = 4
    student_steps: int = 2
    bn: float = 10.0
    oh: float = 0.5
    adv: float = 1.0
    lr: float = 2e-3
    lr_z: float = 1e-2
    latent: int = 256
    width: int = 32

    def __post_init__(self) -> None:
        for key in ("images", "batch", "steps", "latent", "width"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")
        for key in ("distillation", "warmup", "student_steps", "bn", "oh", "adv"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"{key} must not be negative, got {getattr(self, key)}")
        for key in ("lr", "lr_z"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"{key} must be positive, got {getattr(self, key)}")

    @property
    def traits(self) -> Traits:
        return Traits({REWRITES}, needs=_generator.NEEDS, refuses=_generator.REFUSES) if self.distillation else Traits()

    # ------------------------------------------------ on the client

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        images = context[OWN].get(IMAGES)
        count = self.batch_size or work.config.client.batch_size
        return {"teacher": _teacher.teacher(context), IMAGES: images, "count": count}

    def synthetic(self, state: LocalState, positions: IntArray, draw: torch.Generator) -> Synthetic | None:
        images = state[IMAGES]
        if images is None:
            return None
        chosen = torch.randperm(len(images), generator=draw)[: state["count"]]
        return Synthetic({"pixel_values": images[chosen.to(images.device)]}, torch.full((len(chosen),), -1))

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        if state[IMAGES] is None:
            return None
        ours, theirs = step.logits[step.synthetic], step.model(state["teacher"]).logits[step.synthetic]
        old = _teacher.old_classes(step.classes, step.seen)
        return self.distillation * _teacher.distillation(ours, theirs, old, temperature=2.0)

    # ------------------------------------------------ on the server

    def context(self, state: State) -> Tensors:
        return state or {}

    def made(self, state: State, server: ServerWork) -> State:
        if not self.distillation:
            return state
        generator = ImageGenerator(self.latent, self.width, server.image_shape)
        meta = _generator.trained(generator.init(server.draw, server.device))
        meta_step = _generator.adam([{"params": _generator.leaves(meta)}], self.lr * self.steps, BETAS)
        student = {n: t.detach().clone().requires_grad_() for n, t in server.fresh.items()}
        batches = math.ceil(self.images / self.batch)
        student_step, _ = optim.build(server.config.client, student, max(1, batches * self.student_steps))
        pool = list[Tensor]()
        for number in range(batches):
            hard = student if self.adv and number >= self.warmup else None
            pool.append(_generator.as_bytes(self._batch(server, generator, meta, hard)))
            meta_step.step()
            if self.adv and number + 1 >= self.warmup:
                self._teach(server, student, student_step, torch.cat(pool))
        return {IMAGES: torch.cat(pool)[: self.images].cpu()}

    def _batch(self, server: ServerWork, generator: ImageGenerator, meta: Tensors, student: Tensors | None) -> Tensor:
        """The best images of one batch; leaves its gradient at the generator's tensors."""
        fast = _generator.trained(meta)
        z_bZ = generator.latents(self.batch, server.draw, server.device).requires_grad_()
        labels = torch.tensor(server.seen)[torch.randint(len(server.seen), (self.batch,), generator=server.draw)]
        latents = {"params": [z_bZ], "lr": self.lr_z}
        optimizer = _generator.adam([{"params": _generator.leaves(fast)}, latents], self.lr, BETAS)
        least, best = math.inf, torch.zeros(0)
        for parameter in _generator.leaves(meta):
            parameter.grad = torch.zeros_like(parameter)
        for _ in range(self.steps):
            images = generator.images(fast, z_bZ, training=True)
            loss = self.image_loss(server, images, labels.to(server.device), student)
            if not len(best) or float(loss.detach()) < least:
                least, best = float(loss.detach()), images.detach()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            for slow, quick in zip(_generator.leaves(meta), _generator.leaves(fast), strict=True):
                assert slow.grad is not None and quick.grad is not None
                slow.grad.add_(quick.grad)
            optimizer.step()
        return best

    def image_loss(self, server: ServerWork, images: Tensor, labels_b: Tensor, student: Tensors | None) -> Tensor:
        """L of a batch; without a student there is no adversarial term."""
        with _generator.moments_watched(server.backbone.encoder) as gaps:
            taught_bC = server.outputs(images).logits
        loss = self.oh * masked_cross_entropy(taught_bC, labels_b, server.seen)
        if gaps:
            loss = loss + self.bn * torch.stack(gaps).sum()
        if student is None:
            return loss
        taught_bS = columns(taught_bC, server.seen)
        learned_bS = columns(server.outputs(images, {n: t.detach() for n, t in student.items()}).logits, server.seen)
        agree_b = (taught_bS.argmax(1) == learned_bS.argmax(1)).to(taught_bS.dtype)
        apart_b = F.kl_div(learned_bS.log_softmax(1), taught_bS.softmax(1), reduction="none").sum(1)
        return loss - self.adv * (agree_b * apart_b).mean()

    def _teach(self, server: ServerWork, student: Tensors, optimizer: torch.optim.Optimizer, pool: Tensor) -> None:
        """A few steps of the student towards the deployed model, on the images that there are."""
        for _ in range(self.student_steps):
            chosen = torch.randperm(len(pool), generator=server.draw)[: self.batch]
            images = pool[chosen.to(pool.device)].float() / 255
            with torch.no_grad():
                taught_bC = server.outputs(images).logits
            learned_bC = server.outputs(images, student).logits
            loss = _teacher.distillation(learned_bC, taught_bC, server.seen, temperature=20.0) * 20.0**2
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
