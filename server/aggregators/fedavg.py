"""FedAvg: the mean weighted by numbers of samples (McMahan et al. 2017, "Communication-efficient learning of deep networks")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import TAKES_RANKS, Traits
from fedsim.core.messages import ClientUpdate, State, Tensors
from server.merging import mean


@dataclass(frozen=True)
class Aggregator(contracts.AdditiveAggregator):
    """w⁺ = Σ n_i w_i / Σ n_i, tensor by tensor; tensors that nobody trained stay as they are.

    Of clients with fewer ranks than the server's pairs (`client.ranks`) factors are padded by zeros, as in HetLoRA (Cho et al.
    2024, "Heterogeneous LoRA for federated fine-tuning of on-device foundation models"), without its weights by sparsity.

    Asks for no statistics. Raises AggregationError when nobody sent an update or nobody holds samples.
    """

    @property
    def traits(self) -> Traits:
        return Traits(gives={TAKES_RANKS})

    def lift(self, update: ClientUpdate) -> dict[str, Tensor]:
        return mean.lift(update.params, float(update.num_samples))

    def finish(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> tuple[State, Tensors]:
        return state, mean.finish(params, total)
