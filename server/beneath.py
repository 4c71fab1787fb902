"""What a rule's rounds have left beneath the module that clients train: part of the model since (see `Aggregator.beneath`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedsim.core.contracts import Aggregator
from fedsim.core.messages import State, Tensors
from fedsim.core.tensors import LORA_A, LORA_B, folded, lora_layers, stack_modules, with_prefix


@dataclass(frozen=True)
class Beneath:
    """All of it as one module. parts: what each merge left, by name -> its bytes as it travels, once to every client."""

    module: Tensors = field(default_factory=dict)
    parts: Mapping[str, int] = field(default_factory=dict)

    def with_part(self, name: str, part: Tensors) -> Beneath:
        """After a merge that left this."""
        if not part:
            return self
        module = stack_modules([self.module, part], [1.0, 1.0]) if self.module else part
        return Beneath(folded(module), {**self.parts, name: _bytes(part)})

    def under(self, params: Tensors) -> Tensors:
        """Parameters on top of it: as they are if there is nothing."""
        if not self.module:
            return params
        own = {n: t for n, t in with_prefix(params, "adapter.").items() if n in self.module}
        return {**params, **stack_modules([self.module, own], [1.0, 1.0])}


def model_of(rule: Aggregator, state: State, params: Tensors, beneath: Beneath) -> Tensors:
    """The tensors of the model that a rule has made so far in its task: what the consolidator is handed."""
    return beneath.under(rule.deployed(state, params))


def _bytes(part: Tensors) -> int:
    """Of every layer the pair or its product, whichever is smaller."""
    total = 0
    for layer in lora_layers(part):
        a_QI, b_OQ = part[layer + LORA_A], part[layer + LORA_B]
        total += min(a_QI.numel() + b_OQ.numel(), len(b_OQ) * a_QI.shape[1]) * a_QI.element_size()
    return total
