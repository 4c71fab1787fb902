"""Trains the small Omniglot ViT from scratch: the recipe of `fedsim/assets/omniglot_vit`, one process on the CPU.

Training data: drawers 1-15 of the 964 background characters. Reported accuracy: drawers 16-20 of the same characters,
so other people's handwriting. The 20 evaluation alphabets are dropped when the file is read and never reach the model.
The last epoch is what is saved: the held-out drawers are looked at, but pick nothing. The same seed, thread count and
library versions give the same bits.

    python -m experiments.pretraining.train_omniglot_vit --output runs/omniglot_vit
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from fedsim.core.rng import stream, torch_stream

# Shapes: N images, C classes, H height, W width, D hidden width.

MAX_ROTATION_RAD = math.radians(15.0)
MAX_SHEAR = 0.2
MAX_LOG_SCALE = math.log(1.2)
MAX_SHIFT = 0.15  # in the -1..1 coordinates of affine_grid: 0.15 is 2.1 pixels of 28
LABEL_SMOOTHING = 0.1
WEIGHT_DECAY = 0.05
EVAL_EVERY = 5  # epochs between two looks at the held-out drawers; the last epoch is always measured


@dataclass(frozen=True)
class Split:
    """Images as uint8 (N, 1, H, W), bright ink on black, and their labels as int64 (N,)."""

    images: Tensor
    labels: Tensor


def load_background() -> tuple[Split, Split, int]:
    """The background characters of the shipped Omniglot file: (drawers 1-15, drawers 16-20, number of characters)."""
    path = files("fedsim") / "assets" / "omniglot" / "omniglot_28.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        is_background = ~arrays["alphabet_is_evaluation"][arrays["class_alphabet"]]
        num_classes = int(is_background.sum())
        if not is_background[:num_classes].all():
            raise ValueError("the background characters are expected to be the first labels of the file")

        def split(name: str) -> Split:
            labels = arrays[f"{name}_labels"].astype(np.int64)
            keep = is_background[labels]
            images = arrays[f"{name}_images"][keep][:, None]
            return Split(torch.from_numpy(images), torch.from_numpy(labels[keep]))

        return split("train"), split("test"), num_classes


def normalise(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1."""
    return images.float().div_(127.5).sub_(1.0)


def random_affine(images_N1HW: Tensor, generator: torch.Generator) -> Tensor:
    """Every image under its own random rotation, shear, scale and shift; what comes in from outside is background (-1).

    The matrix maps output to input coordinates: R(angle) [[1, shear_x], [shear_y, 1]] diag(scale_x, scale_y) | shift,
    with angle, shears, log-scales and shifts uniform in plus or minus the limits at the top of the file.
    """
    num_images = images_N1HW.shape[0]
    limits = torch.tensor([MAX_ROTATION_RAD, MAX_SHEAR, MAX_SHEAR, MAX_LOG_SCALE, MAX_LOG_SCALE, MAX_SHIFT, MAX_SHIFT])
    draws = (torch.rand(num_images, limits.numel(), generator=generator) * 2.0 - 1.0) * limits
    angle, shear_x, shear_y, log_scale_x, log_scale_y, shift_x, shift_y = draws.unbind(dim=1)
    cos, sin, scale_x, scale_y = angle.cos(), angle.sin(), log_scale_x.exp(), log_scale_y.exp()
    row_x = torch.stack([(cos - sin * shear_y) * scale_x, (cos * shear_x - sin) * scale_y, shift_x], dim=1)
    row_y = torch.stack([(sin + cos * shear_y) * scale_x, (sin * shear_x + cos) * scale_y, shift_y], dim=1)
    theta_N23 = torch.stack([row_x, row_y], dim=1)
    grid = F.affine_grid(theta_N23, list(images_N1HW.shape), align_corners=False)
    # Padding is zero, so background is moved to zero for the sampling and back.
    return F.grid_sample(images_N1HW + 1.0, grid, mode="bilinear", padding_mode="zeros", align_corners=False) - 1.0


class Classifier(nn.Module):
    """A ViT without pooler and a linear head on its class token: (N, 1, 28, 28) in -1..1 -> logits (N, C)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        config = ViTConfig(
            image_size=28,
            patch_size=7,
            num_channels=1,
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=512,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, num_classes)

    def forward(self, images_N1HW: Tensor) -> Tensor:
        tokens_NTD: Tensor = self.vit(pixel_values=images_N1HW).last_hidden_state
        logits_NC: Tensor = self.head(tokens_NTD[:, 0])
        return logits_NC


def build(num_classes: int, seed: int) -> Classifier:
    """A freshly initialised classifier; torch's global generator, which the libraries draw from, is put back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_stream(seed, "pretraining", "init").initial_seed())
        return Classifier(num_classes)


def accuracy(model: Classifier, data: Split, batch_size: int = 512) -> float:
    """The share of `data` whose highest logit is its label."""
    model.eval()
    num_correct = 0
    with torch.inference_mode():
        for images, labels in zip(torch.split(data.images, batch_size), torch.split(data.labels, batch_size), strict=True):
            num_correct += int((model(normalise(images)).argmax(dim=1) == labels).sum())
    return num_correct / len(data.labels)


def train(model: Classifier, data: Split, held_out: Split, *, epochs: int, batch_size: int, lr: float, seed: int) -> None:
    """Trains `model` in place; one printed line per epoch: mean loss, minutes so far, `held_out` accuracy if measured.

    AdamW under a one-cycle schedule with peak `lr`, cross-entropy with label smoothing. Each epoch is one pass over
    `data` in a new order.
    """
    num_images = len(data.labels)
    steps_per_epoch = math.ceil(num_images / batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * steps_per_epoch)
    start_s = time.monotonic()
    for epoch in range(1, epochs + 1):
        model.train()
        order = torch.from_numpy(stream(seed, "pretraining", "order", epoch).permutation(num_images))
        generator = torch_stream(seed, "pretraining", "augment", epoch)
        loss_sum = 0.0
        for rows in torch.split(order, batch_size):
            images = random_affine(normalise(data.images[rows]), generator)
            loss = F.cross_entropy(model(images), data.labels[rows], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(rows)
        minutes = (time.monotonic() - start_s) / 60
        line = f"epoch {epoch}/{epochs} loss {loss_sum / num_images:.4f} minutes {minutes:.1f}"
        if epoch % EVAL_EVERY == 0 or epoch == epochs:
            line += f" held-out accuracy {accuracy(model, held_out):.4f}"
        print(line, flush=True)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults are the recipe."""
    parser = argparse.ArgumentParser(description="Train the small Omniglot ViT from scratch.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the config and the weights")
    parser.add_argument("--epochs", type=int, default=70)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of the one-cycle schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads; part of what fixes the bits")
    args = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, rounds the weights to float16, measures what was rounded, saves it."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    data, held_out, num_classes = load_background()
    model = build(num_classes, args.seed)
    num_parameters = sum(p.numel() for p in model.vit.parameters())
    print(
        f"{len(data.labels)} images, {num_classes} classes, ViT of {num_parameters} parameters, {vars(args)}",
        flush=True,
    )
    train(model, data, held_out, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=args.seed)
    nn.Module.to(model.vit, torch.float16)
    nn.Module.to(model.vit, torch.float32)
    print(f"held-out accuracy with the encoder rounded to float16: {accuracy(model, held_out):.4f}", flush=True)
    nn.Module.to(model.vit, torch.float16)
    model.vit.save_pretrained(args.output)
    print(f"saved in {args.output}", flush=True)


if __name__ == "__main__":
    main()
