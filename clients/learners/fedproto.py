"""FedProto: features are drawn to the class prototypes of all clients (Tan et al. 2022, "FedProto: Federated prototype learning
across heterogeneous clients"; as in fed-mammoth the models are merged too), both halves."""

# b rows of the client's own batch, C classes (head rows), H of them that a client holds, D features

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import OWN, ClientWork, Context, Ending, LocalState, Step
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import State, Tensors
from fedsim.core.names import HEAD_WEIGHT
from fedsim.core.tensors import wide

COUNT, MEAN, SUM, WEIGHT = "count", "mean", "sum", "weight"  # of what a client sends; of what is summed
CLASSES, PROTOTYPES = "classes", "prototypes"  # of what clients are told


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """Every step        L = CE + λ · 1/(b D) Σ_i ‖f(x_i) − P_{y_i}‖²
    at a round's end  n_kc and μ_kc = mean f(x) of every class that client k holds, by its trained module
    the server        P_c = Σ_k n_kc μ_kc / Σ_k n_kc   over the clients of the round that hold class c

    A sample whose class has no prototype adds 0, as in the first round. A class of which nobody in a round told keeps the
    prototype that it had. Up: C + H D numbers; down: the prototypes that there are, D numbers and an integer each. The model is
    merged by whatever rule: fed-mammoth's "centralised" FedProto takes the uniform mean (aggregator: fairavg), in the paper
    clients send prototypes alone and keep models of their own. What is deployed is the head that is trained; `calibrator:
    nearest_mean` is the paper's nearest prototype.

    lam: λ (1 in the paper's code, 0.1 in fed-mammoth). averaging: samples (n_kc, the paper's text) | clients (every client that
    holds the class counts once, its code). term: sample, as above | class (fed-mammoth): Σ_c 1/D ‖mean f(x_i) − P_c‖², over the
    classes of the batch and the mean over their samples in it. reset: prototypes are forgotten at a task's start (fed-mammoth;
    the paper has one task): that matters where a class comes again.
    Ours: features of a client's prototypes are those after its last step, without augmentation, in one more pass (the paper's
    code takes the mean of those that the last epoch saw); samples that other learners replay have no part.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"lam": 0.1, "averaging": "clients", "term": "class", "reset": False},
    )
    lam: float = 1.0
    averaging: str = "samples"
    term: str = "sample"
    reset: bool = True

    def __post_init__(self) -> None:
        require_choice("averaging", self.averaging, ("samples", "clients"))
        require_choice("term", self.term, ("sample", "class"))
        if not self.lam >= 0:
            raise ConfigError(f"lam must not be negative, got {self.lam}")

    # ------------------------------------------------ on the client

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        told = context[OWN]
        if not told or not self.lam:
            return {}
        prototypes_HD = told[PROTOTYPES]
        known_C = torch.zeros(len(work.params[HEAD_WEIGHT]), dtype=torch.bool, device=prototypes_HD.device)
        whole_CD = prototypes_HD.new_zeros(len(known_C), prototypes_HD.shape[1])
        known_C[told[CLASSES]], whole_CD[told[CLASSES]] = True, prototypes_HD
        return {"known": known_C, PROTOTYPES: whole_CD}

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        if not state:
            return None
        f_bD, y_b = step.features[step.own], step.labels[step.own].long()
        known_C: Tensor = state["known"]
        whole_CD: Tensor = state[PROTOTYPES]
        if self.term == "sample":
            apart_bD = (f_bD - whole_CD[y_b]) * known_C[y_b][:, None]
            return self.lam * apart_bD.square().mean()
        count_C = y_b.bincount(minlength=len(known_C))
        mean_CD = torch.zeros_like(whole_CD).index_add(0, y_b, f_bD) / count_C.clamp_min(1)[:, None]
        apart_CD = (mean_CD - whole_CD) * (known_C & (count_C > 0))[:, None]
        return self.lam * apart_CD.square().mean(dim=1).sum()

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        f_ND, y_N = wide(work.outputs(work.shard, params).features), work.labels(work.shard)
        onehot_NC = F.one_hot(y_N.to(f_ND.device), len(params[HEAD_WEIGHT])).to(f_ND.dtype)
        count_C = onehot_NC.sum(dim=0)
        held = count_C > 0
        mean_HD = (onehot_NC.T @ f_ND)[held] / count_C[held][:, None]
        return Ending(statistics={COUNT: count_C.float(), MEAN: mean_HD.float()})

    # ------------------------------------------------ on the server

    def opened(self, state: State, params: Tensors, task: int) -> State:
        """State: `weight` (C,) and `sum` (C, D) as of the last round in which somebody told of a class, float64."""
        return {} if state is None or self.reset else state

    def lift(self, statistics: Tensors, num_samples: int) -> Tensors:
        if not statistics:  # the round trains nothing
            return {}
        count_C, mean_HD = statistics[COUNT].double(), statistics[MEAN].double()
        held = count_C > 0
        weight_C = count_C if self.averaging == "samples" else held.double()
        sum_CD = mean_HD.new_zeros(len(count_C), mean_HD.shape[1])
        sum_CD[held] = weight_C[held][:, None] * mean_HD
        return {WEIGHT: weight_C, SUM: sum_CD}

    def heard(self, state: State, total: Tensors, clients: int) -> State:
        if not state or not total:
            return dict(total) or state
        told = total[WEIGHT] > 0
        return {WEIGHT: torch.where(told, total[WEIGHT], state[WEIGHT]), SUM: torch.where(told[:, None], total[SUM], state[SUM])}

    def context(self, state: State) -> Tensors:
        if not state:
            return {}
        classes_H = (state[WEIGHT] > 0).nonzero()[:, 0]
        return {CLASSES: classes_H, PROTOTYPES: (state[SUM][classes_H] / state[WEIGHT][classes_H][:, None]).float()}
