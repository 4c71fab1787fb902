"""Whether one of transformers' own classifiers is the run's model: the encoder, its pooling and one linear layer behind it.

That is not read off a table: the classifier is made, and its logits are held against the run's.
"""

# b samples, C classes, D features

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core.messages import Tensors
from fedsim.models import pretrained

AUTO = {"image": "AutoModelForImageClassification", "text": "AutoModelForSequenceClassification"}
TOLERANCE, ROUNDING = 1e-4, 1e-5  # of logits, relative to how far classes lie from their mean, and to the largest of them


@dataclass(frozen=True)
class Classifier:
    """A model of transformers with the run's head in it. auto: the class that loads it; prefix: before the encoder's names;
    head: the module that PEFT saves as a whole."""

    model: Any
    auto: str
    prefix: str
    head: str


def fitting(
    encoder: Any, kind: str, layer: tuple[Tensor, Tensor], names: Sequence[str], probe: Tensors, want: Tensor
) -> Classifier | None:
    """The classifier whose logits of the probe are these, (b, C), if there is one.

    encoder: with the run's weights. layer: W (C, D), b (C,). probe: what the encoder is given.
    """
    import transformers

    auto = AUTO[kind]
    mapping: Any = getattr(transformers, auto)._model_mapping
    if type(encoder.config) not in mapping:
        return None
    try:
        found = mapping[type(encoder.config)]  # of DeiT two, the second for training with a teacher
        model = _made(found[0] if isinstance(found, tuple) else found, encoder, names)
    except Exception:  # it wants more than the encoder's weights, or cannot be made without settings of its own
        return None
    return next((c for c in _with_head(model, auto, layer) if agrees(c.model, probe, want)), None)


def agrees(model: Any, probe: Tensors, want: Tensor) -> bool:
    """Whether a classifier gives these logits."""
    try:
        with torch.inference_mode():
            got: Tensor = model(**probe).logits
    except Exception:  # a batch without a token of padding, a head of another width
        return False
    return close(got, want)


def close(got: Tensor, want: Tensor) -> bool:
    """Whether logits are the same up to rounding. What tells classes apart may be small beside the logits themselves."""
    if got.shape != want.shape:
        return False
    spread = float((want - want.mean(dim=1, keepdim=True)).abs().max())
    return bool((got - want).abs().max() <= TOLERANCE * max(1.0, spread) + ROUNDING * float(want.abs().max()))


def labelled(config: Any, names: Sequence[str]) -> Any:
    """A copy of a config with the classes' names."""
    config = copy.deepcopy(config)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    return config


def _made(cls: Any, encoder: Any, names: Sequence[str]) -> Any:
    """The classifier with the encoder's weights; its own layers are still to be filled in. Raises where they do not fit."""
    with pretrained.unseeded():
        model = cls(labelled(encoder.config, names)).to(torch.float32).eval()
    getattr(model, model.base_model_prefix).load_state_dict(encoder.state_dict())
    return model


def _with_head(model: Any, auto: str, layer: tuple[Tensor, Tensor]) -> Iterator[Classifier]:
    """The classifier with W in the columns where the features may stand, each in turn; none if more than one layer is its own."""
    weight_CD, bias_C = layer
    prefix = f"{model.base_model_prefix}."
    own = [n for n, _ in model.named_parameters() if not n.startswith(prefix)]
    name = own[0].rpartition(".")[0] if own else ""
    head: Any = model.get_submodule(name) if name else None
    alone = isinstance(head, nn.Linear) and {n.rpartition(".")[0] for n in own} == {name}
    if not alone or head.out_features != len(bias_C) or head.in_features % weight_CD.shape[1]:
        return
    if head.bias is None and bool(bias_C.any()):
        return
    for place in range(head.in_features // weight_CD.shape[1]):
        with torch.no_grad():
            head.weight.zero_()
            head.weight[:, place * weight_CD.shape[1] : (place + 1) * weight_CD.shape[1]] = weight_CD
            if head.bias is not None:
                head.bias.copy_(bias_C)
        yield Classifier(model, auto, prefix, name.partition(".")[0])
