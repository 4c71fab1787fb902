"""NAME: one line that says what a client does beyond SGD on the cross-entropy, and the paper (authors, year, "title").

Hold it against the laws of its kind, then use it:

    fedsim check ./NAME.py
    fedsim run fedavg 'client.learners=[./NAME.py]'
    fedsim run fedavg 'client.learners=[{name: ./NAME.py, weight: 0.1}, proximal]'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim import Ending, LocalState, Step, Tensors
from fedsim import Learner as Base
from fedsim.core.contracts import ClientWork, Context
from fedsim.core.errors import ConfigError


@dataclass(frozen=True)
class Learner(Base):
    """Adds   weight · 1/b Σ ‖f‖²   over the client's own batch, f the features. Say here what travels and what a client stores.

    What you do not need, leave out: what is not overridden is not computed. `fedsim.core.contracts.Learner` has every method of
    both halves, in the order in which they are asked.
    """

    # Fields are the options of the YAML. `examples` are those under which `fedsim check` holds it against the laws.
    weight: float = 0.01
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ConfigError(f"weight must not be negative, got {self.weight}")

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        """What this round needs. `memory`: what this client remembered when it last trained, empty at first."""
        return {"rounds": memory.get("rounds", torch.zeros((), dtype=torch.int64))}

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        """A term of the loss; None for nothing. `step.own`: the rows of the client's own samples."""
        return self.weight * step.features[step.own].square().sum(1).mean() if self.weight else None

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        """What the client remembers (never seen by anybody else), and statistics, which travel and are summed on the server."""
        return Ending(memory={"rounds": state["rounds"] + 1})
