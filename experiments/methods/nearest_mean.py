"""What the bare backbone knows: the nearest class mean of its features, with no training at all, on the stream of the table.

    python -m experiments.methods.nearest_mean [--seeds 3]

Class means are over all clients' training samples (sums over clients give them exactly, in one upload), so that they depend
neither on the split nor on the order of tasks; distances are Euclidean. Prints percent of the test samples of every task, and
their mean.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clients.local import batches
from clients.samples import Samples
from fedsim import simulation
from fedsim.core.config import load
from fedsim.core.contracts import ArraySplit, IntArray
from fedsim.models.model import Model

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "head_only.yaml"


@torch.inference_mode()
def features(model: Model, split: ArraySplit, positions: IntArray) -> tuple[Tensor, Tensor]:
    """Features (N, D) and labels (N,) of samples."""
    samples, found = Samples(split, model.device), list[tuple[Tensor, Tensor]]()
    for batch in batches(positions, 256):
        inputs, labels = samples.batch(batch)
        found.append((model.features(inputs), labels))
    return torch.cat([f for f, _ in found]).double(), torch.cat([y for _, y in found])


def accuracies(seed: int) -> list[float]:
    """Percent per task, among all classes."""
    parts = simulation.prepare(load(CONFIG, [f"seed={seed}", "runtime.kernels=torch"]))
    tasks, clients = range(len(parts.manifest.task_names)), range(parts.manifest.num_clients)
    train = np.concatenate([parts.spec.shard(t, c) for t in tasks for c in clients])
    x_ND, y_N = features(parts.model, parts.spec.train, train)
    means_CD = torch.stack([x_ND[y_N == c].mean(0) for c in range(int(y_N.max()) + 1)])
    out = []
    for task in tasks:
        x_ND, y_N = features(parts.model, parts.spec.test, parts.spec.test_of(task))
        out.append(100 * float((torch.cdist(x_ND, means_CD).argmin(1) == y_N).double().mean()))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    for seed in range(parser.parse_args().seeds):
        per_task = accuracies(seed)
        print(f"seed {seed}: {np.mean(per_task):.1f}  ({', '.join(f'{a:.1f}' for a in per_task)})")


if __name__ == "__main__":
    main()
