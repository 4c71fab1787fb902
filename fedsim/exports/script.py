"""The lines of Python that load an exported model with transformers (and PEFT) alone; the model card shows them, the export runs
the last of them to see that they give the run's logits."""

# b samples, C classes

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core.messages import Tensors
from fedsim.models.backbone import Backbone

HERE = 'folder = "."  # where this file lies'
HEAD_FILE = "head.safetensors"
BACKBONE = "backbone"  # beside an adapter: the backbone's config, with the classes, and its weights where no name stands for them


@dataclass(frozen=True)
class Script:
    """cls: what makes the model, and where it is imported from. base: name of the backbone, None if it lies beside; only with
    `peft`. options: of from_pretrained. body: the lines of `logits(**inputs)`. head: whether a file holds the head."""

    cls: tuple[str, str]
    peft: bool
    base: str | None = None
    options: Mapping[str, bool] = field(default_factory=dict)
    body: Sequence[str] = ()
    head: bool = False

    def __str__(self) -> str:
        return "\n".join([*self._imports(), "", HERE, *self._model(), *self._head(), "", "", *self.function()])

    def function(self) -> list[str]:
        """`logits(**inputs)`, of `model`, `torch` and, with a head beside, `head`."""
        return ["@torch.inference_mode()", "def logits(**inputs):", *(f"    {line}" for line in self.body)]

    def logits(self, model: nn.Module, head: Tensors, inputs: Tensors) -> Tensor:
        """What the function gives of this model."""
        scope: dict[str, Any] = {"torch": torch, "model": model, "head": head}
        exec("\n".join(self.function()), scope)
        out: Tensor = scope["logits"](**inputs)
        return out

    def _imports(self) -> list[str]:
        module, name = self.cls
        found = ["from peft import PeftModel"] if self.peft else []
        found += ["from safetensors.torch import load_file"] if self.head else []
        names = (["AutoConfig"] if self.peft else []) + ([name] if module == "transformers" else [])
        found += [f"from transformers import {', '.join(sorted(names))}"] if names else []
        return ["import torch", *found, *([] if module == "transformers" else [f"from {module} import {name}"])]

    def _model(self) -> list[str]:
        _, name = self.cls
        options = "".join(f", {key}={value}" for key, value in self.options.items())
        if not self.peft:
            return [f"model = {name}.from_pretrained(folder{options}).eval()"]
        where = f'f"{{folder}}/{BACKBONE}"' if self.base is None else repr(self.base)
        return [
            f'config = AutoConfig.from_pretrained(f"{{folder}}/{BACKBONE}")',
            *([] if self.head else ["# it says that its classifier is new: the adapter brings the run's"]),
            f"base = {name}.from_pretrained({where}, config=config, dtype=torch.float32{options})",
            "model = PeftModel.from_pretrained(base, folder).eval()",
        ]

    def _head(self) -> list[str]:
        return [f'head = load_file(f"{{folder}}/{HEAD_FILE}")'] if self.head else []


def of_classifier() -> list[str]:
    """The body where the head is in the model."""
    return ["return model(**inputs).logits"]


def of_encoder(backbone: Backbone, formula: str) -> list[str]:
    """The body where the head lies beside an encoder: pooling as the backbone does it, and the head's formula."""
    return ["out = model(**inputs)", *_pooling(backbone), f"return {formula}"]


def _pooling(backbone: Backbone) -> list[str]:
    states = "out.last_hidden_state"
    if backbone.by_encoder:
        return ["features = out.pooler_output.flatten(1)"]
    if backbone.places:
        return [f"features = {states}.mean(dim=(2, 3))"]
    if backbone.pooling == "cls":
        return [f"features = {states}[:, 0]"]
    if backbone.kind == "image":
        last = "" if backbone.last_patch is None else backbone.last_patch
        return [f"features = {states}[:, {backbone.first_patch}:{last}].mean(dim=1)"]
    if backbone.pooling == "last":
        return [
            'mask = inputs["attention_mask"]',
            "last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)",
            f"features = {states}[torch.arange(len(last), device=last.device), last]",
        ]
    return [
        'mask = inputs["attention_mask"][..., None].float()',
        f"features = ({states} * mask).sum(dim=1) / mask.sum(dim=1)",
    ]
