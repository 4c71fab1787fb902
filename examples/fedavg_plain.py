"""Federated continual learning on one page: FedAvg over a stream of tasks as plain loops, clients one after the other.

    python examples/fedavg_plain.py

The same as `fedsim run configs/fedavg.yaml`, without what makes that fast, resumable and general. Data, split, model and random
draws are fedsim's own, so that both end with the same parameters, up to rounding: a test holds the engine against this file.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from clients.samples import Samples
from fedsim import simulation
from fedsim.core import config as configs
from fedsim.core import rng
from fedsim.core.config import SimConfig
from fedsim.core.messages import Tensors
from fedsim.core.work import WorkSpec
from fedsim.models.model import Model

SMALL = {
    "data": {"source": "omniglot"},
    "stream": {"tasks": 2, "classes_per_task": 10},
    "partition": {"name": "dirichlet", "alpha": 0.5, "clients": 5},
    "client": {"optimizer": "sgd", "lr": 0.1, "epochs": 2},
    "server": {"rounds": 2, "aggregator": "fedavg", "consolidator": "none"},
    "runtime": {"pool": "serial", "device": "cpu"},
}


def fedavg(config: SimConfig) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Final parameters, and the accuracy on task j after task i in percent, (T, T), 0 where j > i."""
    parts = simulation.prepare(config)  # reads the data, splits them over tasks and clients, builds the model
    model, spec = parts.model, parts.spec
    train, test = Samples(spec.train, model.device), Samples(spec.test, model.device)
    params = dict(parts.state.params)  # adapter and head; the backbone is frozen
    accuracy = np.zeros((len(spec.task_classes), len(spec.task_classes)))
    for task in range(len(spec.task_classes)):
        for round in range(config.server.rounds):
            updates = [local_training(config, model, train, spec, params, (k, task, round)) for k in range(spec.num_clients)]
            sizes = [len(spec.shard(task, k)) for k in range(spec.num_clients)]
            params = {n: sum(size * u[n] for size, u in zip(sizes, updates, strict=True)) / sum(sizes) for n in params}
        for tested in range(task + 1):
            accuracy[task, tested] = evaluate(model, test, spec, params, task, tested)
    return params, accuracy


def local_training(
    config: SimConfig, model: Model, train: Samples, spec: WorkSpec, params: Tensors, address: tuple[int, int, int]
) -> dict[str, torch.Tensor]:
    """What client k makes of the parameters, in one round of a task: SGD on the cross-entropy over the task's own classes."""
    client, task, _ = address
    local = {n: t.clone().requires_grad_() for n, t in params.items()}
    optimizer = torch.optim.SGD(local.values(), lr=config.client.lr)
    classes, order = list(spec.task_classes[task]), rng.stream(config.seed, "batches", *address)
    with model.applied(local):  # the adapter beside the frozen weights
        for _ in range(config.client.epochs):
            shuffled = order.permutation(spec.shard(task, client))
            for start in range(0, len(shuffled), config.client.batch_size):
                images, labels = train.batch(shuffled[start : start + config.client.batch_size])
                logits = model.logits(model.features(images), local)
                loss = F.cross_entropy(logits[:, classes], labels.long() - classes[0])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return {n: t.detach() for n, t in local.items()}


def evaluate(model: Model, test: Samples, spec: WorkSpec, params: Tensors, task: int, tested: int) -> float:
    """Percent of a task's test samples that are told right, among the classes of all tasks so far."""
    images, labels = test.batch(spec.test_of(tested))
    seen = sorted(c for classes in spec.task_classes[: task + 1] for c in classes)
    with torch.no_grad(), model.merged(params):
        guess = torch.tensor(seen)[model.logits(model.features(images), params)[:, seen].argmax(dim=1)]
    return 100 * float((guess == labels).double().mean())


def main() -> None:
    _, accuracy = fedavg(configs.from_dict(SMALL))
    for task, row in enumerate(accuracy):
        print(f"after task {task}:", *(f"{percent:5.1f} %" for percent in row[: task + 1]))


if __name__ == "__main__":
    main()
