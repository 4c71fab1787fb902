"""Made-up clients and parameters, small: what rules, statistics and calibrators are held against the laws with.

Shapes: N samples, I inputs and O outputs of a layer, R rank, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from clients.learning import statistic_of
from fedsim.core.contracts import Seen
from fedsim.core.errors import ConfigError, PluginError
from fedsim.core.messages import StatisticRequest, Tensors
from fedsim.core.names import HEAD_BIAS, HEAD_WEIGHT
from fedsim.core.rng import torch_stream
from fedsim.core.tensors import LORA_A, LORA_B, matching
from fedsim.laws.frame import LawBroken

NUMBERS = (1, 2, 3, 9, 10, 11, 32)  # of clients, tried where a rule may count them
CLASSES, FEATURES, RANK = 5, 4, 2
LAYERS = {"adapter.block.0": (3, 6), "adapter.block.1": (4, 5)}  # outputs, inputs


@dataclass(frozen=True)
class Client:
    """Inputs of every layer (N, I), features (N, D) and labels (N,) of one client, float64."""

    client_id: int
    inputs_NI: Mapping[str, Tensor]
    features_ND: Tensor
    labels_N: Tensor

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def seen(self) -> Seen:
        """Its samples as a statistic sees them."""
        return Seen(self.inputs_NI, self.features_ND, self.labels_N, CLASSES)

    def of(self, classes: Sequence[int]) -> Client:
        """Its samples of some classes."""
        rows = torch.isin(self.labels_N, torch.tensor(list(classes)))
        inputs = {layer: x[rows] for layer, x in self.inputs_NI.items()}
        return Client(self.client_id, inputs, self.features_ND[rows], self.labels_N[rows])

    def repeated(self, times: int) -> Client:
        """The same samples several times over."""
        inputs = {layer: x.repeat(times, 1) for layer, x in self.inputs_NI.items()}
        return Client(self.client_id, inputs, self.features_ND.repeat(times, 1), self.labels_N.repeat(times))


@lru_cache(maxsize=max(NUMBERS))
def make_client(client_id: int) -> Client:
    """Client 0 holds all classes; every other one lacks one. Sizes and scales differ; every class has four samples or more."""
    generator = torch_stream(0, "client", client_id)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    classes = [c for c in range(CLASSES) if client_id == 0 or c != client_id % CLASSES]
    labels = torch.tensor(classes).repeat(4 + client_id % 3)
    scale, n = 0.5 + client_id % 4, len(labels)
    inputs = {layer: 0.5 + scale * draw(n, width) for layer, (_, width) in LAYERS.items()}
    return Client(client_id, inputs, draw(CLASSES, FEATURES)[labels] + scale * draw(n, FEATURES), labels)


def some_clients(number: int) -> tuple[Client, ...]:
    """The first ones."""
    return tuple(make_client(k) for k in range(number))


def make_params(dtype: torch.dtype = torch.float64, address: str = "params") -> dict[str, Tensor]:
    """Two LoRA layers and a head."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (outputs, inputs) in LAYERS.items():
        shapes |= {layer + LORA_A: (RANK, inputs), layer + LORA_B: (outputs, RANK)}
    shapes |= {HEAD_WEIGHT: (CLASSES, FEATURES), HEAD_BIAS: (CLASSES,)}
    return {n: torch.randn(s, dtype=torch.float64, generator=torch_stream(0, address, n)).to(dtype) for n, s in shapes.items()}


def stepped(params: Tensors, train: Sequence[str], *address: str | int) -> dict[str, Tensor]:
    """What a client makes of the tensors that a plan trains: each a step away, by an address."""
    out = {}
    for name in matching(params, train):
        draw = torch.randn(params[name].shape, dtype=torch.float64, generator=torch_stream(0, "step", *address, name))
        out[name] = params[name] + (0.3 * draw).to(params[name].dtype)
    return out


def synthesise(request: StatisticRequest, client: Client, params: Tensors) -> dict[str, Tensor]:
    """What the statistics plug-in of that name would send for a client, float64, named as in an update. Raises LawBroken where
    it has nothing to send."""
    subjects = matching(params, request.match)
    try:
        sent = statistic_of(request).synthetic(client.seen, params, subjects)
    except (PluginError, ConfigError) as e:
        raise LawBroken(f"the plan asks for the statistic '{request.name}' of {', '.join(request.match)}: {e}") from e
    return {f"{request.name}.{key}": t for key, t in sent.items()}
