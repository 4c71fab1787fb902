"""SCAFFOLD (Karimireddy et al. 2020) as plain loops that follow its pseudocode, beside the learner that fedsim runs.

    python examples/scaffold.py

`clients/learners/scaffold.py` says the same in two halves: what a client does (`begin`, `corrected`, `end`, with c_i in its
memory) and what the server does (`context`, `heard`). It works with any rule, in parallel, is stopped and resumed, and its bytes
are counted. Here everything is in one place. A test holds the two against each other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from clients.samples import Samples
from fedsim import simulation
from fedsim.core import config as configs
from fedsim.core import rng
from fedsim.core.config import SimConfig
from fedsim.simulation import run

SMALL = {
    "data": {"source": "omniglot"},
    "stream": {"tasks": 2, "classes_per_task": 10},
    "partition": {"name": "dirichlet", "alpha": 0.1, "clients": 5, "min_samples": 1},
    "client": {"optimizer": "sgd", "lr": 0.1, "epochs": 2, "learners": ["scaffold"]},
    "server": {"rounds": 3, "aggregator": "fairavg", "consolidator": "none"},
    "runtime": {"pool": "serial", "device": "cpu"},
}


def scaffold(config: SimConfig) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """x and c at the end of the stream; all clients take part in every round."""
    parts = simulation.prepare(config)
    model, spec, eta = parts.model, parts.spec, config.client.lr
    train, clients = Samples(spec.train, model.device), range(spec.num_clients)
    x = dict(parts.state.params)
    for task, classes in enumerate(map(list, spec.task_classes)):
        c = {n: torch.zeros_like(t) for n, t in x.items()}  # the server's control variate
        c_i = [{n: torch.zeros_like(t) for n, t in x.items()} for _ in clients]  # the clients'
        for round in range(config.server.rounds):
            delta_y, delta_c = [], []
            for i in clients:
                y = {n: t.clone().requires_grad_() for n, t in x.items()}
                order, K = rng.stream(config.seed, "batches", i, task, round), 0
                with model.applied(y):
                    for _ in range(config.client.epochs):
                        shuffled = order.permutation(spec.shard(task, i))
                        for start in range(0, len(shuffled), config.client.batch_size):
                            images, labels = train.batch(shuffled[start : start + config.client.batch_size])
                            logits = model.logits(model.features(images), y)
                            loss = F.cross_entropy(logits[:, classes], labels.long() - classes[0])
                            gradients = torch.autograd.grad(loss, list(y.values()))
                            with torch.no_grad():  # y ← y − η (g(y) − c_i + c)
                                for n, g in zip(y, gradients, strict=True):
                                    y[n] -= eta * (g - c_i[i][n] + c[n])
                            K += 1
                with torch.no_grad():  # c_i⁺ = c_i − c + (x − y) / (K η)
                    c_plus = {n: c_i[i][n] - c[n] + (x[n] - y[n]) / (K * eta) for n in x}
                    delta_y.append({n: y[n] - x[n] for n in x})
                    delta_c.append({n: c_plus[n] - c_i[i][n] for n in x})
                c_i[i] = c_plus
            N = len(clients)
            x = {n: x[n] + sum(d[n] for d in delta_y) / N for n in x}
            c = {n: c[n] + sum(d[n] for d in delta_c) / N for n in x}
    return x, c


def main() -> None:
    config = configs.from_dict(SMALL)
    x, _ = scaffold(config)
    print("plain loop:", {n: round(float(t.norm()), 4) for n, t in list(x.items())[-2:]})
    for learners in ([], ["scaffold"]):
        results = run(configs.from_dict(configs.merge(SMALL, {"client": {"learners": learners}})))
        print(f"learners {learners}: {results.metrics['final_average_accuracy']:.1f} % final average accuracy")


if __name__ == "__main__":
    main()
