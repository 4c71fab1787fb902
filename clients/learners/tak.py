"""Task arithmetic with Kronecker-factored regularisation (TAK): a task's weights are kept from changing what the network makes of
other tasks' data, of which two small matrices per layer are all that is known (aimagelab, mammoth's `tak`, 2025; there for a
linearised CLIP).

Shapes: m outputs, d inputs of a layer (ΔW (m, d), P (d, d), Q (m, m)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fedsim.core import contracts
from fedsim.core.contracts import OWN, ClientWork, Context, LocalState, Step, Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.tensors import LORA_A, from_upper_triangle, without_prefix

SAMPLES = "samples"
INPUTS, OUTPUTS, ROWS = "inputs/", "outputs/", "rows/"
_matrices: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # triangle -> matrix, for as long as the triangle is held
SUBJECTS = (LORA_A, ".tangent_B", ".tangent_weight")  # a tensor that says that its layer's weight is changed


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """For every linear layer whose weight the module changes by ΔW, from the second task on:

        loss         adds  λ Σ_layers tr(Q̄ ΔW P̄ ΔWᵀ)
        task's end   P_t = E a aᵀ over inputs, Q_t = E Σ g gᵀ of the features' Jacobian, both of the pretrained network
                     (statistic `kfac`, summed over clients), and   P̄ = Σ_t P_t rows_t / Σ_t rows_t,   Q̄ = Σ_t Q_t

    P̄ ⊗ Q̄ is the Kronecker form of what a change of weights does to the features of all past tasks' samples: the penalty is about
    its mean square. What is kept does not grow with the tasks. Of a LoRA pair ΔW = s B A, tr(Q̄ ΔW P̄ ΔWᵀ) = Σ (s²BᵀQ̄B) ∘ (A P̄ Aᵀ),
    so that no (m, d) matrix is formed; the same for the adapter `tangent` (ΔW = s Ḃ A₀, or Ẇ), whose features are linear in ΔW
    as the paper has them. Biases and norms are not penalised, so that there is no input 1 for the bias as in the paper's code.

    The modules of tasks are then added: consolidator `merged` with task arithmetic, or `mean`.
    Up: the triangles of both matrices once per task, d(d+1)/2 + m(m+1)/2 numbers a layer (equal ones once). Down: the same, once
    per task to who takes part. In memory: nothing.

    lam: λ, 0 or more; 0: nothing is asked for. Published 500, with a learning rate of 3e-4 and AdamW's decay 0.1, of features of
    unit length; ours are as they come, so that λ has to be tuned. Published too, and not followed: Q̄ weighs by tasks and P̄ by
    samples (that is followed), and rates of their own for norms and the last projection.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"lam": 1e-3}, {"lam": 0.0})
    lam: float = 500.0

    def __post_init__(self) -> None:
        if not self.lam >= 0:
            raise ConfigError(f"lam must not be negative, got {self.lam}")

    @property
    def traits(self) -> Traits:
        adapter = "holds back the changes of layers' weights, and {adapter} says of none: use adapter: lora or tangent"
        goes_on = "holds a task's own module near zero, but {other} goes on with the same one: use consolidator: mean or merged"
        beneath = "holds back all that a task changes, and {other} leaves part of it beneath the module: use aggregator: fedavg"
        refused = {"one module goes on": goes_on, "a module beneath": beneath}
        return Traits(needs={"changes of weights": adapter}, refuses=refused)

    # ------------------------------------------------ on the client

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        told = context[OWN]
        inputs, outputs = ({n: _whole(t) for n, t in without_prefix(told, form).items()} for form in (INPUTS, OUTPUTS))
        return {"factors": {layer: (inputs[layer], outputs[layer]) for layer in inputs}, "work": work}

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        if not state["factors"] or not self.lam:
            return None
        work: ClientWork = state["work"]
        changes = work.changes({**work.params, **step.params})
        terms = [penalty(changes[layer], *state["factors"][layer]) for layer in changes if layer in state["factors"]]
        return self.lam * torch.stack(terms).sum() if terms else None

    # ------------------------------------------------ on the server

    def opened(self, state: State, params: Tensors, task: int) -> State:
        return {"inputs": {}, "rows": {}, "outputs": {}} if state is None else state

    def context(self, state: State) -> Tensors:
        inputs = {INPUTS + layer: (t / state["rows"][layer]).float() for layer, t in state["inputs"].items()}
        return {**inputs, **{OUTPUTS + layer: t.float() for layer, t in state["outputs"].items()}}

    def closing(self, state: State, params: Tensors) -> RoundPlan | None:
        layers = {n.rpartition(".")[0]: n for n in params if n.endswith(SUBJECTS)}
        if not self.lam or not layers:
            return None
        return RoundPlan(train=(), statistics=(StatisticRequest("kfac", tuple(layers.values())),))

    def lift(self, statistics: Tensors, num_samples: int) -> Tensors:
        sums = {n: t.double() for n, t in without_prefix(statistics, "kfac.").items()}
        return {**sums, SAMPLES: torch.tensor(float(num_samples), dtype=torch.float64)} if sums else {}

    def closed(self, state: State, params: Tensors, total: Tensors) -> State:
        if not total:
            return state
        new = {form: _by_layer(without_prefix(total, form)) for form in (INPUTS, ROWS, OUTPUTS)}
        means = {layer: t / total[SAMPLES] for layer, t in new[OUTPUTS].items()}
        return {
            "inputs": _added(state["inputs"], new[INPUTS]),
            "rows": _added(state["rows"], new[ROWS]),
            "outputs": _added(state["outputs"], means),
        }


def penalty(change: Sequence[Tensor], inputs_dd: Tensor, outputs_mm: Tensor) -> Tensor:
    """tr(Q ΔW P ΔWᵀ) of ΔW = change[0], or the product of the two."""
    if len(change) == 1:
        (w_md,) = change
        return ((outputs_mm @ w_md) * (w_md @ inputs_dd)).sum()
    left_mr, right_rd = change
    return ((left_mr.T @ outputs_mm @ left_mr) * (right_rd @ inputs_dd @ right_rd.T)).sum()


def _whole(triangle: Tensor) -> Tensor:
    """The matrix of an upper triangle, once for all clients that are told of it, and for triangles that are equal, as those of
    queries, keys and values are."""
    if triangle not in _matrices:
        like = [t for t in _matrices if (t.shape, t.dtype, t.device) == (triangle.shape, triangle.dtype, triangle.device)]
        equal = next((_matrices[t] for t in like if torch.equal(t, triangle)), None)
        _matrices[triangle] = from_upper_triangle(triangle) if equal is None else equal
    matrix: Tensor = _matrices[triangle]
    return matrix


def _by_layer(tensors: Tensors) -> dict[str, Tensor]:
    return {name.rpartition(".")[0]: t for name, t in tensors.items()}


def _added(old: Tensors, new: Tensors) -> dict[str, Tensor]:
    """The sums of both, and what is only in one."""
    return {**old, **{name: old[name] + t if name in old else t for name, t in new.items()}}
