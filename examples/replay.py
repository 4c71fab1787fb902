"""A client method of your own in one file: replay from a buffer that holds as many samples of every class.

    fedsim check examples/replay.py                 the laws that every learner keeps
    python examples/replay.py                       beside FedAvg, and beside `er`, whose buffer is a reservoir
    fedsim run configs/fedavg.yaml 'client.learners=[./examples/replay.py]'

A learner says what a client does beyond SGD on the cross-entropy, in methods that are asked one after the other (see
`fedsim.core.contracts.Learner`). What a client must not forget between rounds is its memory; the engine keeps it, with any pool,
for as many clients as there are, and over kills and resumes.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import Learner as BaseLearner
from fedsim import load, run
from fedsim.core.contracts import ClientWork, Context, Ending, IntArray, LocalState, Step, Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.models.logits import masked_cross_entropy


@dataclass(frozen=True)
class Learner(BaseLearner):
    """The cross-entropy of the batch, and `weight` times that of as many samples of past tasks, over all classes seen.

    size: samples of the buffer, divided evenly over the classes that the client has held.
    """

    size: int = 60
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"size must be at least 1, got {self.size}")

    @property
    def traits(self) -> Traits:
        # refused: a second method with a buffer, and a consolidator that keeps the head's rows of old classes as they are
        return Traits(gives={"old head rows rewritten"}, takes={"the buffer"})

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        stored = memory.get("positions", torch.zeros(0, dtype=torch.int64)).cpu().numpy()
        return {"positions": stored}  # where the samples lie in the training split: the simulator has them

    def replay(self, state: LocalState, positions: IntArray, draw: torch.Generator) -> IntArray:
        stored: IntArray = state["positions"]
        chosen: IntArray = stored[torch.randperm(len(stored), generator=draw)[: len(positions)].numpy()]
        return chosen

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        if not len(step.labels[step.replayed]):
            return None
        return self.weight * masked_cross_entropy(step.logits[step.replayed], step.labels[step.replayed], step.seen)

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        if work.round < work.config.server.rounds - 1:  # samples of this task join the buffer at its end
            return Ending({"positions": torch.from_numpy(state["positions"])})
        held = defaultdict(list)
        candidates = torch.from_numpy(state["positions"]).tolist() + work.shard.tolist()
        for position, label in zip(candidates, work.labels(torch.tensor(candidates).numpy()).tolist(), strict=True):
            held[label].append(position)
        room = max(1, self.size // len(held))
        kept = [p for own in held.values() for p in (own[i] for i in torch.randperm(len(own), generator=draw)[:room])]
        return Ending({"positions": torch.tensor(kept[: self.size], dtype=torch.int64)})


def main() -> None:
    small = ["stream.tasks=3", "stream.classes_per_task=10", "partition.clients=5", "runtime.pool=serial", "server.evaluate=task"]
    with tempfile.TemporaryDirectory() as folder:
        for learners in ("[]", "[{name: er, size: 60}]", f"[{{name: {__file__}, size: 60}}]"):
            config = load("configs/fedavg.yaml", [*small, f"client.learners={learners}", f"runtime.output={folder}"])
            metrics = run(config).metrics
            print(f"{learners:30.30} accuracy {metrics['final_average_accuracy']:.1f}, forgetting {metrics['forgetting']:.1f}")


if __name__ == "__main__":
    main()
