"""One client's local training beside a hand-written PyTorch loop and beside Hugging Face PEFT.

    python -m experiments.benchmarks.local_training [--repeats 9] [--only vit-small]

The same images, batches and steps for all: LoRA of rank 8 in every linear layer, a linear head, AdamW, one thread.

    bare loop         transformers' ViT, LoRA as two small products beside each layer, batches gathered from one uint8 tensor
    peft              what a user would write: get_peft_model, a DataLoader, AdamW
    torch             fedsim's client, runtime.kernels=torch
    onednn            the same with runtime.kernels=onednn
    bf16              and with runtime.precision=bf16

The variants take turns. Times are processor seconds, which other programs disturb less than the clock; ratios are
medians over the turns. `vit-small` is the embedded network (28 px, 6 blocks of width 128), `deit-tiny` has random weights (224,
12 blocks of width 192). The distance is that of the trained tensors from the bare loop's, as a share of how far those went.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from clients import local, lower_states
from clients.samples import Samples
from clients.work import Work
from experiments.benchmarks import machine
from fedsim.core import config as configs
from fedsim.core import rng
from fedsim.core.contracts import ArraySplit, IntArray
from fedsim.core.errors import ClientFailed
from fedsim.core.messages import ClientJob, RoundPlan
from fedsim.models import model as models
from fedsim.models.pretrained import OMNIGLOT_VIT

RANK, BATCH, LR, CLASSES = 8, 16, 1e-3, 20
DEIT_TINY = {
    "model_type": "vit", "hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768,
    "image_size": 224, "patch_size": 16, "num_channels": 3,
}  # fmt: skip
VARIANTS = {
    "torch": {"kernels": "torch", "precision": "fp32"},
    "onednn": {"kernels": "onednn", "precision": "fp32"},
    "bf16": {"kernels": "onednn", "precision": "bf16"},
}
REFERENCE = "bare loop"


@dataclass(frozen=True)
class Case:
    """A network, its images and the number of samples of the client."""

    model: dict[str, Any]
    shape: tuple[int, ...]
    samples: int
    epochs: int

    def data(self) -> ArraySplit:
        numbers = np.random.default_rng(0)
        pixels = numbers.integers(0, 256, (self.samples, *self.shape), dtype=np.uint8)
        return ArraySplit({"pixel_values": pixels}, numbers.integers(0, CLASSES, self.samples))


CASES = {
    "vit-small": Case({"backbone": "omniglot-vit"}, (28, 28), 64, 2),
    "deit-tiny": Case({"backbone": "random", "config": DEIT_TINY}, (224, 224, 3), 32, 1),
}


class Bare(nn.Module):
    """A frozen linear layer with `B A x` beside it."""

    def __init__(self, base: nn.Linear, a_rd: Tensor, b_mr: Tensor) -> None:
        super().__init__()
        self.base, self.a, self.b = base, nn.Parameter(a_rd.clone()), nn.Parameter(b_mr.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class Images(Dataset[tuple[Tensor, int]]):
    """Normalised images one by one, as a DataLoader wants them."""

    def __init__(self, split: ArraySplit, order: IntArray) -> None:
        self.pixels, self.labels, self.order = split.inputs["pixel_values"], split.labels, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        place = self.order[i]
        return normalised(torch.from_numpy(self.pixels[place])[None])[0], int(self.labels[place])


def normalised(pixels: Tensor) -> Tensor:
    """uint8 (b, H, W) or (b, H, W, C) -> float32 (b, C, H, W) in −1..1."""
    x = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    return (x.float() / 255 - 0.5) / 0.5


def encoder(case: Case) -> Any:
    """transformers' own network with the weights that fedsim loads."""
    from transformers import ViTConfig, ViTModel

    if case.model["backbone"] == "omniglot-vit":
        return ViTModel.from_pretrained(OMNIGLOT_VIT, add_pooling_layer=False, dtype=torch.float32).eval().requires_grad_(False)
    torch.manual_seed(0)
    settings = {k: v for k, v in DEIT_TINY.items() if k != "model_type"}
    return ViTModel(ViTConfig(**settings), add_pooling_layer=False).eval().requires_grad_(False)


def orders(case: Case) -> list[IntArray]:
    """The order of samples in each epoch, the very one of fedsim's client."""
    stream = rng.stream(0, "batches", 0, 0, 0)
    return [stream.permutation(np.arange(case.samples)) for _ in range(case.epochs)]


def bare_batches(case: Case, split: ArraySplit) -> Iterator[tuple[Tensor, Tensor]]:
    pixels, labels = torch.from_numpy(split.inputs["pixel_values"]), torch.from_numpy(split.labels)
    for order in orders(case):
        for places in torch.from_numpy(order).split(BATCH):
            yield normalised(pixels[places]), labels[places]


def loader_batches(case: Case, split: ArraySplit) -> Iterator[tuple[Tensor, Tensor]]:
    for order in orders(case):
        yield from DataLoader(Images(split, order), batch_size=BATCH)


def steps(network: nn.Module, trained: list[Tensor], head: nn.Linear, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    """The loop that everybody writes."""
    optimizer = torch.optim.AdamW([*trained, *head.parameters()], lr=LR, weight_decay=0.0)
    for pixels, labels in batches:
        features = network(pixel_values=pixels).last_hidden_state[:, 0]
        loss = F.cross_entropy(head(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def zero_head(width: int) -> nn.Linear:
    head = nn.Linear(width, CLASSES)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def bare_loop(case: Case, split: ArraySplit, start: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    network = encoder(case)
    layers = {n.removeprefix("adapter.").removesuffix(".lora_A") for n in start if n.endswith(".lora_A")}
    inner = {name: Bare(network.get_submodule(name), *(start[f"adapter.{name}.lora_{x}"] for x in "AB")) for name in layers}
    for name, layer in inner.items():
        network.set_submodule(name, layer)

    def run() -> dict[str, Tensor]:
        with torch.no_grad():
            for name, layer in inner.items():
                layer.a.copy_(start[f"adapter.{name}.lora_A"])
                layer.b.copy_(start[f"adapter.{name}.lora_B"])
        head = zero_head(network.config.hidden_size)
        steps(network, [p for layer in inner.values() for p in (layer.a, layer.b)], head, bare_batches(case, split))
        found = {f"adapter.{n}.lora_{x}": getattr(layer, x.lower()).detach() for n, layer in inner.items() for x in "AB"}
        return {n: t.clone() for n, t in (found | {"head.weight": head.weight.detach(), "head.bias": head.bias.detach()}).items()}

    return run


def with_peft(case: Case, split: ArraySplit, start: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    from peft import LoraConfig, get_peft_model

    names = sorted({n.removeprefix("adapter.").removesuffix(".lora_A") for n in start if n.endswith(".lora_A")})
    network = get_peft_model(encoder(case), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
    parameters = dict(network.named_parameters())
    places = {f"adapter.{n}.lora_{x}": f"base_model.model.{n}.lora_{x}.default.weight" for n in names for x in "AB"}

    def run() -> dict[str, Tensor]:
        with torch.no_grad():
            for ours, theirs in places.items():
                parameters[theirs].copy_(start[ours])
        head = zero_head(network.config.hidden_size)
        steps(network, [p for p in parameters.values() if p.requires_grad], head, loader_batches(case, split))
        found = {ours: parameters[theirs].detach().clone() for ours, theirs in places.items()}
        return found | {"head.weight": head.weight.detach(), "head.bias": head.bias.detach()}

    return run


def with_fedsim(
    case: Case, split: ArraySplit, start: dict[str, Tensor], runtime: dict[str, Any], targets: Any = "all-linear"
) -> Callable[[], dict[str, Tensor]]:
    config = configs.from_dict(
        {
            "seed": 0,
            "data": {"source": "synthetic"},
            "model": case.model,
            "adapter": {"name": "lora", "rank": RANK, "targets": targets},
            "client": {"epochs": case.epochs, "batch_size": BATCH, "lr": LR, "optimizer": "adamw"},
            "runtime": {"pool": "serial", "device": "cpu", **runtime},
        }
    )
    model = models.build(config, CLASSES)
    samples, shard = Samples(split, model.device), np.arange(case.samples)

    def run() -> dict[str, Tensor]:
        update = local.train(Work.of(model, samples, shard, range(CLASSES), ClientJob(0, 0, 0, start, RoundPlan()), config))
        if isinstance(update, ClientFailed):
            raise SystemExit(str(update))
        return dict(update.params)

    return run


def first_tensors(case: Case, targets: Any = "all-linear") -> dict[str, Tensor]:
    """What every variant begins with."""
    config = configs.from_dict({"model": case.model, "adapter": {"name": "lora", "rank": RANK, "targets": targets}})
    model = models.build(config, CLASSES)
    return model.init_adapter(torch.Generator().manual_seed(0)) | model.init_head()


def measured(case: Case, repeats: int) -> dict[str, Any]:
    """Milliseconds of processor time per step, ratios to the bare loop, and how far the results are from its."""
    split, start = case.data(), first_tensors(case)
    runs: dict[str, Callable[[], dict[str, Tensor]]] = {
        REFERENCE: bare_loop(case, split, start),
        "peft": with_peft(case, split, start),
        **{name: with_fedsim(case, split, start, runtime) for name, runtime in VARIANTS.items()},
    }
    results, seconds = timed(runs, repeats)
    count = case.epochs * -(-case.samples // BATCH)
    went = distance(results[REFERENCE], start)
    return {
        "steps": count,
        "ms_per_step": {n: round(1e3 * statistics.median(s) / count, 2) for n, s in seconds.items()},
        "over_bare_loop": {n: round(median_ratio(s, seconds[REFERENCE]), 3) for n, s in seconds.items()},
        "over_peft": {n: round(median_ratio(s, seconds["peft"]), 3) for n, s in seconds.items()},
        "distance": {n: float(f"{distance(r, results[REFERENCE]) / went:.1e}") for n, r in results.items()},
    }


def measured_keeping(case: Case, repeats: int) -> dict[str, Any]:
    """The same for LoRA in the upper third of the blocks, with what is below computed in every step, every round, or kept."""
    split, targets = case.data(), ["layers.4.*", "layers.5.*"]
    start, torch_only = first_tensors(case, targets), {"kernels": "torch"}
    every_step = with_fedsim(case, split, start, torch_only, targets)

    def uncached() -> dict[str, Tensor]:
        with patch.object(lower_states, "lower_states", lambda *args: None):
            return every_step()

    runs = {
        "every step": uncached,
        "every round": with_fedsim(case, split, start, torch_only | {"cache": False}, targets),
        "kept": with_fedsim(case, split, start, torch_only | {"cache": True}, targets),
    }
    results, seconds = timed(runs, repeats)
    return {
        "over_every_step": {n: round(median_ratio(s, seconds["every step"]), 3) for n, s in seconds.items()},
        "kept_is_every_round_bit_for_bit": all(torch.equal(t, results["kept"][n]) for n, t in results["every round"].items()),
    }


def timed(
    runs: dict[str, Callable[[], dict[str, Tensor]]], repeats: int
) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[float]]]:
    """What each variant ends with, and its processor seconds in every turn. The first turn warms up, and is not timed."""
    results = {name: run() for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begun = time.process_time()
            run()
            seconds[name].append(time.process_time() - begun)
    return results, seconds


def median_ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(sum((one[n].double() - other[n].double()).square().sum() for n in other)) ** 0.5


def main() -> None:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", choices=list(CASES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in [args.only] if args.only else CASES:
        found[name] = measured(CASES[name], args.repeats)
        print(name, *(f"\n  {key}: {value}" for key, value in found[name].items()), flush=True)
    if not args.only:
        found["vit-small, upper third"] = measured_keeping(CASES["vit-small"], args.repeats)
        print("vit-small, upper third", found["vit-small, upper third"])
        print(machine.write("local_training", found))


if __name__ == "__main__":
    main()
