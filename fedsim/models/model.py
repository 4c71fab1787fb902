"""A client's model: a frozen backbone, an adapter that is applied to it, and a head over all classes.

The model holds no trainable state. Adapter and head travel as tensors (`adapter.*`, `head.*`) and are handed in.
"""

# b samples, D features, C classes, K clients

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fedsim.core import config as configs
from fedsim.core import contracts, rng
from fedsim.core.config import SimConfig
from fedsim.core.contracts import Slots
from fedsim.core.errors import FedsimError, ModelError, one_line
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD, HEAD_UNKNOWN, HEAD_WEIGHT
from fedsim.core.tensors import without_prefix
from fedsim.models import backbone as backbones
from fedsim.models import inject, lower, transform
from fedsim.models.backbone import Backbone
from fedsim.models.heads import linear
from fedsim.models.transform import Transform

ADAPTER = "adapter."
T = TypeVar("T")


class Asked(NamedTuple):
    """Pooled features (b, D), and what an adapter with queries was asked with, (b, D); None of any other."""

    features: Tensor
    query: Tensor | None = None


class Model:
    """What clients train and evaluate with. Made by `build`."""

    def __init__(
        self,
        backbone: Backbone,
        adapter: contracts.Adapter,
        num_classes: int,
        device: torch.device,
        transform: Transform | None,
        head: contracts.Head | None = None,
        seed: int = 0,
    ) -> None:
        """head: the linear one by default. seed: the run's, from which what is random in a head is drawn."""
        self.backbone = backbone
        self.adapter = adapter
        self.head: contracts.Head = linear.Head() if head is None else head
        self.num_classes = num_classes
        self.device = device
        self._transform = transform
        self._seed = seed
        fixed = self._of_head(lambda: self.head.fixed(backbone.width, rng.torch_stream(seed, "head")))
        self._fixed = {n: t.to(device) for n, t in fixed.items()}
        self._enterable: bool | None = None  # whether the encoder's blocks are a chain; looked at when it matters

    def init_adapter(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh `adapter.*` tensors, CPU float32. Raises ModelError if the adapter does not fit the backbone."""
        return {ADAPTER + n: t for n, t in self.adapter.init(self.backbone, generator).items()}

    def grown(self, params: Tensors, generator: torch.Generator) -> dict[str, Tensor]:
        """All tensors, with what a task after the first brings to the adapter."""
        grown = self.adapter.grown(self.backbone, _adapter_tensors(params), generator)
        return {**params, **{ADAPTER + n: t for n, t in grown.items()}}

    def frozen(self, params: Tensors) -> tuple[str, ...]:
        """Globs of `adapter.*` tensors that no client trains."""
        return tuple(ADAPTER + glob for glob in self.adapter.frozen(_adapter_tensors(params)))

    def init_head(self) -> dict[str, Tensor]:
        """The `head.*` tensors that a run starts with, CPU float32, the same for all clients. Raises ModelError for a head that
        does not make them as its contract says."""
        generator = rng.torch_stream(self._seed, "head", "start")
        made = self._of_head(lambda: self.head.init(self.num_classes, self.backbone.width, generator))
        odd = [n for n, t in made.items() if n in self._fixed or not n.startswith(HEAD) or t.shape[:1] != (self.num_classes,)]
        if HEAD_WEIGHT not in made or odd:
            raise ModelError(
                f"head {type(self.head).__module__} must make '{HEAD_WEIGHT}', and only tensors '{HEAD}…' with a row for each of "
                f"the {self.num_classes} classes, got {', '.join(f'{n} {tuple(t.shape)}' for n, t in made.items())}"
            )
        self._of_head(lambda: self._try_head(made))
        return made

    def applied(self, params: Tensors, dropout: torch.Generator | None = None) -> AbstractContextManager[None]:
        """While open, features are those of the backbone with the `adapter.*` tensors, and gradients flow to them.

        dropout: generator of the adapter's dropout masks in training, None otherwise.
        """
        return self.adapter.applied(self.backbone, _adapter_tensors(params), dropout)

    def merged(self, params: Tensors) -> AbstractContextManager[None]:
        """Like `applied`, in the cheapest form for inference."""
        return self.adapter.merged(self.backbone, _adapter_tensors(params))

    def as_trained(self, params: Tensors, slots: Slots | None = None) -> AbstractContextManager[None]:
        """Like `merged`, with the prompts that training gives the samples, see `Adapter.as_trained`."""
        return self.adapter.as_trained(self.backbone, _adapter_tensors(params), slots)

    def stacked(self, params: Tensors, slots: Slots) -> AbstractContextManager[None]:
        """Like `applied` for K clients in one batch: `adapter.*` tensors with a leading axis of clients, or common to all."""
        return self.adapter.stacked(self.backbone, _adapter_tensors(params), slots)

    @property
    def images(self) -> Transform:
        """What is done to images. Raises ModelError of a backbone that takes texts."""
        if self._transform is None:
            raise ModelError("the backbone takes text, which is not transformed")
        return self._transform

    @property
    def fixed(self) -> Tensors:
        """Tensors of the head that are neither trained nor sent."""
        return self._fixed

    @property
    def stacks(self) -> bool:
        """Whether the adapter can be applied for several clients at once."""
        return type(self.adapter).stacked is not contracts.Adapter.stacked

    def changes(self, params: Tensors) -> dict[str, Sequence[Tensor]]:
        """What the adapter adds to weights, by `adapter.<layer>`, see `Adapter.changes`."""
        return {ADAPTER + n: change for n, change in self.adapter.changes(self.backbone, _adapter_tensors(params)).items()}

    @property
    def has_loss(self) -> bool:
        """Whether the adapter may add a term to the clients' loss."""
        return type(self.adapter).loss is not contracts.Adapter.loss

    def loss(self, params: Tensors, query: Tensor | None) -> Tensor | None:
        """The adapter's own term of a client's loss, see `Adapter.loss`."""
        return self.adapter.loss(_adapter_tensors(params), query)

    @property
    def augments(self) -> bool:
        """Whether training shows other images than there are, drawn at random."""
        return self._transform is not None and self._transform.augment != "none"

    def untouched_blocks(self, params: Tensors) -> int:
        """How many blocks, from the first on, compute the same whatever is trained: those below the adapter.

        0 with augmentation, which shows them other images every time.
        """
        if self.augments:
            return 0
        return lower.untouched(self.backbone.encoder, list(_adapter_tensors(params)))

    def enterable(self, inputs: Tensors) -> bool:
        """Whether `upper_asked` works with this encoder: found out once, with a small raw batch."""
        if self._enterable is None:
            self._enterable = lower.is_chain(self.backbone.encoder, lambda: self.query(inputs))
        return self._enterable

    @torch.no_grad()
    def lower_states(self, inputs: Tensors, count: int) -> Tensor:
        """What comes out of the first `count` blocks for a raw batch, (b, L, D); after all of them: the features (b, D)."""
        with lower.capturing(self.backbone.encoder, count) as found:
            features = self.query(inputs)
        return features if count == self.depth else found[0]

    def upper_asked(self, inputs: Tensors, states: Tensor, count: int, lean: bool = False, query: Tensor | None = None) -> Asked:
        """`asked`, from what the first `count` blocks make of the batch; tokens of padding at the end may be among it."""
        if count == self.depth:
            return Asked(states)
        with lower.entering(self.backbone.encoder, count, states[:, : self._tokens(inputs)]):
            return self.asked(inputs, lean=lean, query=query)

    @property
    def depth(self) -> int:
        """How many blocks the encoder has."""
        return len(inject.blocks(self.backbone.encoder))

    def _tokens(self, inputs: Tensors) -> int | None:
        """Tokens of a batch of texts that are computed; None for images, which are all of one size."""
        return None if self._transform is not None else self.backbone.used_tokens(inputs)

    def features(
        self,
        inputs: Tensors,
        augment: torch.Generator | None = None,
        lean: bool = False,
        query: Tensor | None = None,
    ) -> Tensor:
        """A raw batch on the device (`pixel_values` uint8, or `input_ids` and `attention_mask`) -> pooled features (b, D).

        augment: generator of random augmentations in training, None otherwise. lean: layers may leave out tokens on which no
        feature depends, so nobody may look at what goes through them. query: of each sample, (b, D), if it is at hand; what an
        adapter with queries needs is computed otherwise. Raises ModelError if the batch does not fit.
        """
        return self.asked(inputs, augment, lean, query).features

    def asked(
        self,
        inputs: Tensors,
        augment: torch.Generator | None = None,
        lean: bool = False,
        query: Tensor | None = None,
    ) -> Asked:
        """`features`, and the queries behind them."""
        return self._asked(self.shown(inputs, augment), lean, query)

    def stacked_features(
        self, inputs: Tensors, slots: Slots, augment: Sequence[torch.Generator] | None, query: Tensor | None = None
    ) -> Tensor:
        """A raw batch of K slots -> pooled features (K·b, D). Every client's own images are augmented from its own generator;
        None: none are."""
        return self.stacked_asked(inputs, slots, augment, query).features

    def stacked_asked(
        self, inputs: Tensors, slots: Slots, augment: Sequence[torch.Generator] | None, query: Tensor | None = None
    ) -> Asked:
        """`stacked_features`, and the queries behind them."""
        if "attention_mask" in inputs:
            slots.tokens = _own_tokens(inputs["attention_mask"], len(slots.rows))
        if self._transform is None or not self.augments or augment is None:
            return self.asked(inputs, lean=True, query=query)
        parts = []
        for k, rows in enumerate(slots.rows):
            start = k * slots.width
            own = self._transform(inputs["pixel_values"][start : start + rows], augment[k])
            parts += [own, own[:1].expand(slots.width - rows, -1, -1, -1)]
        return self._asked({"pixel_values": torch.cat(parts)}, True, query)

    def shown(self, inputs: Tensors, augment: torch.Generator | None = None) -> Tensors:
        """What the encoder is given of a raw batch: normalised images, or texts as they are."""
        if self._transform is None:
            return inputs
        if "pixel_values" not in inputs:
            raise ModelError(f"the backbone takes images, but the data hold {', '.join(inputs)}: choose a text backbone")
        return {"pixel_values": self._transform(inputs["pixel_values"], augment)}

    def _encoded(self, shown: Tensors, lean: bool) -> Tensor:
        if self._transform is None:
            return self.backbone.text_features(shown)
        return self.backbone.image_features(shown["pixel_values"], lean)

    def _asked(self, shown: Tensors, lean: bool, query: Tensor | None) -> Asked:
        lean = lean and self.adapter.lean
        if not self.adapter.queries:
            return Asked(self._encoded(shown, lean))
        if query is None:
            wanted = any(t.requires_grad for t in shown.values())  # a generator's images
            with torch.set_grad_enabled(wanted and torch.is_grad_enabled()):
                query = self._encoded(shown, lean=True)
        with self.adapter.asked(self.backbone, query):
            return Asked(self._encoded(shown, lean), query)

    def query(self, inputs: Tensors) -> Tensor:
        """Features (b, D) of a raw batch as it is, for which no adapter with queries is asked: the bare backbone's."""
        return self._encoded(self.shown(inputs), lean=False)

    def head_inputs(self, features: Tensor, params: Tensors) -> Tensor:
        """What the head's last linear map is given, (b, M): features themselves for a linear head."""
        return self.head.inputs(features, self._with_fixed(params))

    def stacked_logits(self, features: Tensor, params: Tensors) -> Tensor:
        """`logits` of (K, b, D) with every client's own head, (K, b, C)."""
        return self.head.stacked_logits(features, self._with_fixed(params))

    def logits(self, features: Tensor, params: Tensors) -> Tensor:
        """The head's logits of features (b, D), over all classes, (b, C); the lowest number of all for rows that are no answer
        (`head.unknown`)."""
        logits, unknown = self.head.logits(features, self._with_fixed(params)), params.get(HEAD_UNKNOWN)
        return logits if unknown is None else logits.masked_fill(unknown, torch.finfo(logits.dtype).min)

    def _try_head(self, params: Tensors) -> None:
        """Two samples through a head. Raises ModelError for logits of another shape, and for numbers that are not finite."""
        on_device = {n: t.to(self.device) for n, t in params.items()}
        features_bD = torch.linspace(-1, 1, 2 * self.backbone.width, device=self.device).view(2, -1)
        logits_bC = self.logits(features_bD, on_device)
        if logits_bC.shape != (2, self.num_classes) or not bool(torch.isfinite(logits_bC).all()):
            raise ModelError(
                f"head {type(self.head).__module__} must give a finite logit for each of {self.num_classes} classes, got "
                f"{tuple(logits_bC.shape)} for 2 samples"
            )

    def _with_fixed(self, params: Tensors) -> Tensors:
        return {**params, **self._fixed} if self._fixed else params

    def _of_head(self, make: Callable[[], T]) -> T:
        try:
            return make()
        except FedsimError:
            raise
        except Exception as e:  # sizes beyond memory, or a fault of a head of the user's own
            raise ModelError(f"head {type(self.head).__module__} cannot be made: {one_line(e)}") from e

    def layer(self, parameter: str) -> nn.Module:
        """The encoder's module that an adapter tensor belongs to: `adapter.layers.0.mlp.fc1.lora_A` -> `layers.0.mlp.fc1`."""
        name = parameter.removeprefix(ADAPTER).rpartition(".")[0]
        if not parameter.startswith(ADAPTER) or not name:
            raise ModelError(f"parameter '{parameter}' belongs to no layer of the backbone: expected adapter.<layer>.<tensor>")
        return inject.submodule(self.backbone.encoder, name)


def build(
    config: SimConfig, num_classes: int, device: torch.device | str = "cpu", backbone: backbones.Backbone | None = None
) -> Model:
    """The model of a run on a device, on a backbone that is there already if one is given. Raises ModelError for weights that are
    missing, damaged or do not fit."""
    device = torch.device(device)
    backbone = backbones.prepared(backbone or backbones.load(config.model), config.runtime, device)
    adapter: contracts.Adapter = configs.build("adapters", config.adapter)
    head: contracts.Head = configs.build("heads", config.head)
    images = None
    if backbone.kind == "image":
        images = transform.build(
            config.transform, backbone.image_size, backbone.num_channels, backbone.mean, backbone.std, device
        )
    return Model(backbone, adapter, num_classes, device, images, head, config.seed)


def _own_tokens(mask: Tensor, clients: int) -> list[int]:
    """Tokens of each client's longest text, from the masks (K·b, L) of all."""
    used_KL = mask.view(clients, -1, mask.shape[1]).any(dim=1)
    lengths: list[int] = (used_KL * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(dim=1).clamp(min=1).tolist()
    return lengths


def _adapter_tensors(params: Tensors) -> dict[str, Tensor]:
    return without_prefix(params, ADAPTER)
