"""A private federated run: clip what every client sends, add noise to the sum, and see what privacy costs.

    python examples/private.py

40 clients train the head of a small frozen backbone on synthetic images. The more noise, the smaller ε (what the merged models of
all rounds can tell of one client at most) and the lower the accuracy. Takes a few seconds and needs no data.
"""

from __future__ import annotations

from fedsim.core import config as configs
from fedsim.simulation import rehearse

BASE = {
    "name": "private",
    "data": {"source": "synthetic", "classes": 4, "train_per_class": 100, "test_per_class": 100, "image_size": 8},
    "stream": {"tasks": 1},
    "partition": {"name": "iid", "clients": 40},  # the noise of the mean is noise · clip / clients
    "model": {
        "backbone": "random",
        "config": {
            "model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
            "image_size": 8, "patch_size": 4, "num_channels": 1,
        },
    },
    "adapter": "none",
    "client": {"epochs": 2, "batch_size": 8, "optimizer": "sgd", "lr": 0.1},
    "server": {"rounds": 4, "consolidator": "none", "evaluate": "task", "drift": False},
    "runtime": {"pool": "serial", "device": "cpu"},
}  # fmt: skip


def private(noise: float, clip: float = 0.3) -> tuple[float, float]:
    """Final accuracy in percent and ε at δ = 10⁻⁵ of a run with this much noise, in units of the clip.

    A client's part of the sum is bounded only if all count the same, so the rule is fairavg: fedavg with noise is refused.
    """
    channel = {"name": "clip_noise", "clip": clip, "noise": noise, "delta": 1e-5}
    config = configs.compose([BASE, {"server": {"aggregator": "fairavg", "channel": [channel]}}])
    epsilon: float = configs.build("channels", config.server.channel[0]).epsilon(rounds=config.server.rounds)
    return rehearse(config).metrics["final_average_accuracy"], epsilon


def main() -> None:
    """A row for each noise level."""
    for noise in (0.0, 1.0, 4.0):
        accuracy, epsilon = private(noise)
        print(f"noise {noise:3.1f}: accuracy {accuracy:5.1f} %, ε = {epsilon:.2f}")


if __name__ == "__main__":
    main()
