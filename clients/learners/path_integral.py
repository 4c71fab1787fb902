"""Follows the training: the path integral of the loss along a client's steps, one number per tensor (see the statistic of the
same name, by which rules ask for it).

Shapes: P numbers of all subjects that move, side by side; S subjects.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import ClientWork, Context, Ending, LocalState
from fedsim.core.errors import require_choice
from fedsim.core.messages import Tensors
from fedsim.core.tensors import wide

FORMS = ("movement", "gradient")


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """A sum over a round's steps, for every subject w with gradient g (before clipping):

        movement   s = Σ_steps | Σ_entries g · (w_before − w_after) |    (how much of the loss's fall the step accounts for)
        gradient   s = Σ_steps | Σ_entries g |

    The absolute value is of the sum over the tensor, once per step. Sent as `movement/<subject>` or `gradient/<subject>`, a
    scalar; zero for subjects that are not trained and for clients without samples. Products and sums are float64 (float32 on
    the wire). Keeps one copy of the subjects' gradients and values, from each step's backward to its end. Nothing looks at a
    number before the end, which would wait for a GPU at every step.

    After the path integral of synaptic intelligence (Zenke, Poole & Ganguli 2017), in the form of LIVAR's code
    (arXiv 2507.06813: `si_withmomentum` true is movement, false is gradient). The code keeps its sums from round to round; here
    they are a round's own, and a rule that wants the former adds them up.

    form: movement | gradient.
    subjects: names of tensors; none: all that are trained.
    """

    form: str = "movement"
    subjects: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_choice("form", self.form, tuple(FORMS))

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        return {"subjects": list(self.subjects or work.trained), "total_S": None}

    def corrected(self, state: LocalState, gradients: Tensors, params: Tensors) -> Tensors:
        """The gradients as they are."""
        moving = [s for s in state["subjects"] if s in gradients]
        state["moving"] = moving
        if moving:
            gradient_P = torch.cat(
                [gradients[s].detach().flatten() for s in moving]
            )  # a copy: clipping writes into the gradients
            if self.form == "gradient":
                _add(state, wide(gradient_P), params)
            else:
                state["gradient_P"], state["before_P"] = gradient_P, _values(moving, params)
        return gradients

    def stepped(self, state: LocalState, params: Tensors) -> None:
        if self.form == "movement" and state["moving"]:
            after_P = _values(state["moving"], params)
            _add(state, wide(state["gradient_P"]) * (wide(state["before_P"]) - wide(after_P)), params)

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        subjects, total_S = state["subjects"], state["total_S"]
        total_S = torch.zeros(len(subjects)) if total_S is None else total_S.float().cpu()
        return Ending(statistics={f"{self.form}/{s}": total.clone() for s, total in zip(subjects, total_S, strict=True)})


def _values(names: list[str], params: Tensors) -> Tensor:
    return torch.cat([params[s].detach().flatten() for s in names])


def _add(state: LocalState, terms_P: Tensor, params: Tensors) -> None:
    moving = state["moving"]
    parts = torch.split(terms_P, [params[s].numel() for s in moving])
    sums = {s: part.sum().abs() for s, part in zip(moving, parts, strict=True)}
    none = terms_P.new_zeros(())
    step_S = torch.stack([sums.get(s, none) for s in state["subjects"]])
    state["total_S"] = step_S if state["total_S"] is None else state["total_S"] + step_S
