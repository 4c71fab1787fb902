"""Modules on a frozen backbone, and what others see of a client's model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from fedsim.core.contracts.traits import Part
from fedsim.core.errors import ModelError
from fedsim.core.messages import Tensors

CENTRES = "class centres"  # a word of `Traits`


class BackboneLike(Protocol):
    """What adapters see of a backbone: the frozen encoder, its width, and whether features are the encoder's own pooler's."""

    @property
    def encoder(self) -> nn.Module: ...
    @property
    def width(self) -> int: ...
    @property
    def by_encoder(self) -> bool: ...


@dataclass
class Slots:
    """Where K clients' samples lie in a batch. Whoever runs the encoder writes it anew before every forward.

    width: samples of a slot: client k's are the rows from `k · width` on. rows: how many of these are its own, K numbers; the
    rest of the slot only fills it. tokens: how long each client's texts would be without the others' beside them, None for
    images. dropout: the generators of the clients' dropout masks in training, None otherwise.
    """

    width: int
    rows: Sequence[int]
    tokens: Sequence[int] | None = None
    dropout: Sequence[torch.Generator] | None = None

    def axis(self, batch: int) -> int:
        """Rows of a slot in a tensor of `batch` rows in which a sample may take several (windows).

        Raises ModelError when they cannot be told apart: what the tensor holds is not sample after sample.
        """
        samples = len(self.rows) * self.width
        if batch % samples:
            raise ModelError(
                f"a layer's input has {batch} rows for {samples} samples, so the clients' parts cannot be told apart"
            )
        return batch // len(self.rows)


@dataclass(frozen=True)
class Adapter(Part, ABC):
    """A small trainable module on a frozen backbone, as functions of its tensors (names without the `adapter.` prefix).

    lean: what it does to a token does not depend on the others being there, and it leaves the class token first, so that the
    last block may leave out all tokens but that one.
    queries: what it does to a sample depends on the sample's query, the features (D,) that the bare backbone gives of the same
    input: a pool of prompts, of which each sample gets its own. It may then tell training, `applied`, from inference, `merged`.
    An adapter that gives "composes modules": with tensors that have a leading axis of sources, `applied` and `merged` give
    features (b, S, D), one per source, each the same bits whatever the others are. A head that "composes heads" then
    makes one prediction of them.
    """

    lean: ClassVar[bool] = False
    queries: ClassVar[bool] = False

    @abstractmethod
    def init(self, backbone: BackboneLike, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh tensors; with them the backbone computes what it computes without an adapter (prompts apart)."""

    @abstractmethod
    def applied(
        self, backbone: BackboneLike, tensors: Tensors, dropout: torch.Generator | None = None
    ) -> AbstractContextManager[None]:
        """While open, the encoder's forward runs with these tensors, and gradients flow to them.
        `dropout`: the generator of dropout masks while training, None otherwise. The base weights are never touched."""

    def notes(self, backbone: BackboneLike) -> tuple[str, ...]:
        """Lines that whoever reads the numbers has to know of this adapter on this backbone, such as what is left out."""
        return ()

    def merged(self, backbone: BackboneLike, tensors: Tensors) -> AbstractContextManager[None]:
        """Like `applied`, in the cheapest form for inference; the base weights come back bit for bit."""
        return self.applied(backbone, tensors)

    def stacked(self, backbone: BackboneLike, tensors: Tensors, slots: Slots) -> AbstractContextManager[None]:
        """Like `applied` for K clients whose samples share the batch: a tensor has a leading axis of clients, or is the same for
        all of them and has none. What one client's samples give must not depend on the others. An adapter without this method
        is trained client by client."""
        raise ModelError(f"the adapter {type(self).__module__} cannot train several clients at once: it has no method 'stacked'")

    def as_trained(self, backbone: BackboneLike, tensors: Tensors, slots: Slots | None = None) -> AbstractContextManager[None]:
        """Like `merged`, but with the prompts that training gives the samples, where those of inference may be others: what the
        features of a step are compared with. slots: K clients' samples share the batch, all with the same tensors."""
        return self.merged(backbone, tensors)

    def asked(self, backbone: BackboneLike, query_bD: Tensor) -> AbstractContextManager[None]:
        """Of an adapter with `queries`. While open, inside `applied`, `merged` or `stacked`, the samples that go through the
        encoder have these queries; outside of it, what is applied does nothing, and features are the bare backbone's."""
        return nullcontext()

    def changes(self, backbone: BackboneLike, tensors: Tensors) -> Mapping[str, Sequence[Tensor]]:
        """What the tensors add to the weight (m, d) of a linear layer, for every layer of which they do: ΔW, or two factors whose
        product it is. Gradients flow to them. An adapter that has it gives "changes of weights"."""
        return {}

    def weights(self, backbone: BackboneLike, tensors: Tensors) -> Mapping[str, Tensor] | None:
        """The backbone's own tensors, by name, that are others with the module merged into them: a backbone that holds these, and
        nothing else, computes what `merged` does. None, as by default, where no weights do that, as of prompts. Only what has it
        can be exported; as a LoRA, if `changes` gives two factors for each of these weights."""
        return None

    def loss(self, tensors: Tensors, query_bD: Tensor | None) -> Tensor | None:
        """A term of its own in a client's loss: of its tensors, and of the queries of the client's own samples of a batch (None
        without `queries`). None for nothing, as where its weight is 0."""
        return None

    def grown(self, backbone: BackboneLike, tensors: Tensors, generator: torch.Generator) -> dict[str, Tensor]:
        """At the start of every task but the first, on the server: the tensors with those that the new task brings, under names
        of their own (`….task3`), so that what travels is what there is. As they are by default."""
        return dict(tensors)

    def frozen(self, tensors: Tensors) -> tuple[str, ...]:
        """Globs of tensors that no client trains in the task whose tensors these are: components of earlier tasks."""
        return ()


@dataclass(frozen=True)
class Head(Part, ABC):
    """Logits from pooled features, as functions of its tensors, which are named `head.*` and of which `head.weight` is one.

    It ends in a map of classes: `inputs` says what that is given, which is what statistics of `head.weight` (Grams, class
    moments) are taken of. Where logits are `W inputs + b`, W = `head.weight` (C, M) and b = `head.bias` (C,), a head gives the
    trait "an affine head": rules that merge it by Grams or train it on drawn inputs need that. Shapes: b samples, D features,
    M inputs of the last map, C classes, K clients.
    """

    @abstractmethod
    def init(self, num_classes: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The tensors that are trained and sent, CPU float32. The first axis of each is classes: what holds for a class is a
        row, which rules may weigh, keep or replace by itself."""

    def fixed(self, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Tensors that stay as they are drawn. They do not travel: every worker draws the same from the run's seed, and they are
        among the `params` of all methods below. Other names than those of `init`."""
        return {}

    def inputs(self, features: Tensor, params: Tensors) -> Tensor:
        """What the last linear map is given, (…, M), from features (…, D): row by row, none depends on the others."""
        return features

    @abstractmethod
    def logits(self, features: Tensor, params: Tensors) -> Tensor:
        """(b, C) from (b, D)."""

    def affine(self, params: Tensors) -> tuple[Tensor, Tensor] | None:
        """W (C, D) and b (C,) of one linear layer on the features themselves that predicts the same: `W f + b` are the logits, up
        to a number per sample that all classes have in common. None, as by default, where no such layer does."""
        return None

    def formula(self) -> str | None:
        """The logits as one expression of Python, for whoever has the tensors but no fedsim: of `features` (b, D), of `head`, a
        dict of its tensors by their names without "head.", and of `torch`. None, as by default, where it says none."""
        return None

    @abstractmethod
    def stacked_logits(self, features_KbD: Tensor, params: Tensors) -> Tensor:
        """`logits` of every client with its own tensors, (K, b, C): a tensor of `init` has a leading axis of clients, or is the
        same for all of them and has none."""


class ModelLike(Protocol):
    """What learners and statistics see of a client's model. `adapter.*` and `head.*` are in the tensors they are given."""

    num_classes: int

    def features(self, inputs: Tensors) -> Tensor: ...
    def head_inputs(self, features: Tensor, params: Tensors) -> Tensor: ...
    def logits(self, features: Tensor, params: Tensors) -> Tensor: ...
    def layer(self, parameter: str) -> nn.Module: ...
