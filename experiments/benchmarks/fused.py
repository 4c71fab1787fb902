"""Ten clients in one forward and backward beside the same clients one by one, on a GPU where there is one.

    python -m experiments.benchmarks.fused [--device cuda] [--repeats 5] [--steps 8]

On a GPU: ViT-B/16 (random weights, 224 px, LoRA of rank 16 on q k v o and the MLP) with a frozen backbone in bf16. On a CPU: a
small ViT (28 px) in float32, which is there to check results: no GPU figure can be had from it. Both ways take turns; the
matrix-product peak is measured between them, and a way's share of it counts the products that training needs (by torch's own
counter). Operations per client and step are what a device is asked to do one after the other: where they are many and small, a
GPU waits for them, so their number is what training together saves. Results of both ways are compared in float32 and with SGD:
AdamW divides by a gradient's size, which magnifies the rounding of gradients that are next to nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from clients import fused, local
from clients.samples import Samples
from clients.work import Received, Work
from experiments.benchmarks import machine
from fedsim.core import config as configs
from fedsim.core.contracts import ArraySplit
from fedsim.core.messages import ClientJob, ClientUpdate, RoundPlan
from fedsim.models import model as models

VIT_B = {"model_type": "vit"}  # transformers' defaults are ViT-B/16 at 224 px
SMALL = {
    "model_type": "vit", "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512,
    "image_size": 28, "patch_size": 7, "num_channels": 1,
}  # fmt: skip
CLIENTS, CLASSES, RANK = 10, 20, 16
BATCHES = (16, 4)
FREE = {  # views and looks at sizes
    "view", "_unsafe_view", "t", "transpose", "expand", "detach", "alias", "slice", "select", "split", "split_with_sizes",
    "unsqueeze", "permute", "as_strided", "unbind", "squeeze", "empty", "empty_like", "is_same_size", "_local_scalar_dense",
    "lift_fresh",
}  # fmt: skip
PRODUCT = {"cuda": 8192, "cpu": 2048}  # side of the matrices of the peak


class Case:
    """A round of clients with full batches, ready to be trained either way."""

    def __init__(
        self, device: str, batch: int, steps: int, precision: str, kernels: str = "auto", optimizer: str = "adamw"
    ) -> None:
        on_gpu = device.startswith("cuda")
        layout: dict[str, Any] = VIT_B if on_gpu else SMALL
        self.config = configs.from_dict(
            {
                "model": {"backbone": "random", "config": layout},
                "adapter": {"name": "lora", "rank": RANK, "targets": "all-linear"},
                "client": {"batch_size": batch, "lr": 1e-3, "optimizer": optimizer},
                "runtime": {"pool": "serial", "device": device, "precision": precision, "kernels": kernels},
            }
        )
        side, channels = layout.get("image_size", 224), layout.get("num_channels", 3)
        numbers = np.random.default_rng(0)
        shape = (CLIENTS * batch * steps, side, side, channels)
        pixels = np.frombuffer(numbers.bytes(int(np.prod(shape))), dtype=np.uint8).reshape(shape)
        split = ArraySplit({"pixel_values": pixels}, numbers.integers(0, CLASSES, shape[0]))
        self.model = models.build(self.config, CLASSES, device)
        self.samples = Samples(split, self.model.device)
        self.shards = np.split(np.arange(shape[0]), CLIENTS)
        generator = torch.Generator().manual_seed(0)
        fresh = self.model.init_adapter(generator) | self.model.init_head()
        params = {
            n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in fresh.items()
        }  # so that all of it is trained
        plan = RoundPlan()
        self.jobs = [ClientJob(k, 0, 0, params, plan) for k in range(CLIENTS)]
        self.client_steps = CLIENTS * steps

    def ways(self) -> dict[str, Callable[[], list[Any]]]:
        return {"one by one": self.one_by_one, "together": self.together}

    def together(self) -> list[Any]:
        return fused.train(self.works())

    def one_by_one(self) -> list[Any]:
        return [local.train(work) for work in self.works()]

    def works(self) -> list[Work]:
        received = Received.on(self.model.device, self.jobs[0].params, self.jobs[0].plan)
        classes = range(CLASSES)
        return [
            Work(self.model, self.samples, shard, classes, classes, job, self.config, received)
            for shard, job in zip(self.shards, self.jobs, strict=True)
        ]


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is asked of the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in FREE
        return func(*args, **(kwargs or {}))


def seconds(work: Callable[[], Any], device: str) -> float:
    """Of one call, the device's work included."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def peak(device: str, precision: str) -> float:
    """Floating-point operations per second of a large matrix product."""
    side = PRODUCT[device.partition(":")[0]]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * side**3 / min(seconds(lambda: torch.mm(a, b, out=product), device) for _ in range(5))


def operations(device: str, batch: int, precision: str, way: str) -> float:
    """Per client and step: what one step more costs, so that what happens once a round does not count."""
    counts: list[int] = []
    for steps in (1, 2):
        work = Case(device, batch, steps, precision).ways()[way]
        with Operations() as asked:
            work()
        counts.append(asked.count)
    return (counts[1] - counts[0]) / CLIENTS


def needed_flops(device: str, batch: int, steps: int, precision: str) -> int:
    """Of all matrix products. In torch's own kernels: its counter does not see into others."""
    with FlopCounterMode(display=False) as counter:
        Case(device, batch, steps, precision, kernels="torch").together()
    return int(counter.get_total_flops())


def largest_difference(case: Case) -> float:
    """Between the updates of both ways for any client, as a share of what training changed: norms over all its tensors."""
    shares = []
    for one, other in zip(case.together(), case.one_by_one(), strict=True):
        assert isinstance(one, ClientUpdate)
        assert one.metrics["together"] == CLIENTS, "they were not trained together"
        start = case.jobs[0].params
        apart, moved = (
            torch.cat([(t - than[n]).flatten() for n, t in other.params.items()]).norm() for than in (one.params, start)
        )
        shares.append(float(apart / moved))
    return float(np.max(shares))


def measure(device: str, batch: int, steps: int, precision: str, repeats: int) -> dict[str, Any]:
    """One batch size, both ways."""
    case = Case(device, batch, steps, precision)
    ways = case.ways()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    peaks = []
    for repeat in range(repeats + 1):  # the first warms up
        for name, work in ways.items():
            took = seconds(work, device)
            if repeat:
                taken[name].append(took)
        peaks.append(peak(device, precision))
    flops, highest = needed_flops(device, batch, steps, precision), max(peaks)
    found: dict[str, Any] = {"batch": batch, "precision": precision}
    for name in ways:
        middle = statistics.median(taken[name])
        found[name] = {
            "ms per client and step": round(1000 * middle / case.client_steps, 3),
            "share of the peak": round(flops / middle / highest, 3),
            "operations per client and step": round(operations(device, batch, precision, name)),
        }
    found["times faster together"] = round(statistics.median(a / b for a, b in zip(*taken.values(), strict=True)), 2)
    found["peak, GFLOP/s"] = round(highest / 1e9)
    return found


def main() -> None:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    on_gpu = args.device.startswith("cuda")
    difference = largest_difference(Case(args.device, 4, args.steps, "fp32", optimizer="sgd"))
    print(f"largest difference between both ways: {difference:.1e} of what training changed")
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(args.device) if on_gpu else "cpu, one thread",
        "model": "ViT-B/16, 224 px" if on_gpu else "small ViT, 28 px",
        "clients": CLIENTS,
        "largest difference, of what training changed": difference,
        "measured": [],
    }
    for batch in BATCHES:
        found = measure(args.device, batch, args.steps, "bf16" if on_gpu else "fp32", args.repeats)
        results["measured"].append(found)
        print(found, flush=True)
    print(machine.write("fused", results))


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
