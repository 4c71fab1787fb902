"""The files of a PEFT adapter, written without PEFT: LoRA pairs, whatever their rank, and a head beside them."""

# r rank, d inputs of a layer, m outputs

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.core.errors import ModelError
from fedsim.core.messages import Tensors
from fedsim.core.tensors import LORA_A, LORA_B, folded, without_prefix
from fedsim.exports import encoder as encoders
from fedsim.exports.classifier import Classifier
from fedsim.exports.deployed import DeployedModel
from fedsim.models import inject
from fedsim.models.model import ADAPTER

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REFUSED = {  # model types -> layers whose weight their kernels read without a call, which PEFT refuses
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"), ("out_proj",)),
}
MERGED = "use --to merged, which writes the backbone with the weights in it"


@dataclass(frozen=True)
class Adapter:
    """pairs: A (r, d) and B (m, r) of every layer, by the names that transformers has for them. shapes: the same as PEFT's layers
    hold them. fan_in_fan_out: PEFT's word for weights that lie (inputs, outputs). dropout: what it was trained with.
    empty: there is nothing but a pair of zeros, since PEFT takes no adapter without a layer."""

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    fan_in_fan_out: bool
    dropout: float
    empty: bool

    @property
    def rank(self) -> int:
        """The most usual one."""
        return Counter(len(a) for a, _ in self.pairs.values()).most_common(1)[0][0]

    def tensors(self, prefix: str, saved: Tensors) -> dict[str, Tensor]:
        """What `adapter_model.safetensors` holds. prefix: before the encoder's names; saved: of modules that are there whole."""
        own = {}
        for name, pair in self.pairs.items():
            for letter, factor in zip("AB", pair, strict=True):
                own[f"base_model.model.{prefix}{name}.lora_{letter}.weight"] = factor.contiguous()
        return own | {f"base_model.model.{n}": t.detach().contiguous() for n, t in saved.items()}

    def config(self, base: str, classifier: Classifier | None, model: Any) -> dict[str, Any]:
        """What `adapter_config.json` holds. Each pair's scale is in its B: alpha is the rank. model: what is adapted."""
        prefix = "" if classifier is None else classifier.prefix
        ranks = {f"^{prefix}{n}": len(a) for n, (a, _) in self.pairs.items() if len(a) != self.rank}
        task = "SEQ_CLS" if classifier is not None and classifier.auto.endswith("SequenceClassification") else None
        made_by = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
        return {
            "peft_type": "LORA",
            "task_type": task,
            "auto_mapping": None if task else made_by,
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.rank,
            "rank_pattern": ranks,
            "alpha_pattern": dict(ranks),
            "target_modules": [prefix + n for n in self.pairs],
            "modules_to_save": None if classifier is None else [classifier.head],
            "lora_dropout": self.dropout,
            "fan_in_fan_out": self.fan_in_fan_out,
            "bias": "none",
        }


def adapter(deployed: DeployedModel, encoder: Any) -> Adapter:
    """The module as LoRA pairs. encoder: transformers' own. Raises ModelError for what PEFT cannot hold."""
    name = deployed.config.adapter["name"]
    weights = changed_weights(deployed)
    own = without_prefix(deployed.params, ADAPTER)
    changes = deployed.model.adapter.changes(deployed.model.backbone, own)
    pairs = {n: change for n, change in changes.items() if len(change) == 2}
    other = [n for n in weights if n.removesuffix(".weight") not in pairs]
    if other:
        raise ModelError(f"adapter {name} changes '{other[0]}' by more than a LoRA pair, which PEFT has no form for: {MERGED}")
    stacked = folded({n + end: t.detach() for n, (b, a) in pairs.items() for end, t in ((LORA_A, a), (LORA_B, b))})
    found, inverted = {}, set()
    for n in pairs or _first_layer(encoder, deployed):
        own_name, module = encoders.layer(encoder, n)
        _require_taken(encoder, own_name)
        a, b = (stacked[n + LORA_A], stacked[n + LORA_B]) if pairs else _zeros(deployed, n)
        found[own_name] = encoders.factors(module, a, b)
        inverted.add(encoders.fans_in_first(module))
    return Adapter(found, inverted == {True}, float(deployed.config.adapter.get("dropout", 0.0)), not pairs)


def changed_weights(deployed: DeployedModel) -> Mapping[str, Tensor]:
    """The backbone's tensors with the module merged into them, by fedsim's names. Raises ModelError where no weights stand for
    it."""
    name, own = deployed.config.adapter["name"], without_prefix(deployed.params, ADAPTER)
    deployed.release()
    with torch.no_grad():
        weights = deployed.model.adapter.weights(deployed.model.backbone, own)
    if weights is None:
        raise ModelError(
            f"adapter {name} is no change of weights, so that neither a PEFT adapter nor merged weights compute what it does "
            "(PEFT's own prefix and prompt tuning put prompts, or the tokens behind them, at other places): use fedsim predict, "
            "or fedsim.load_model in Python"
        )
    return weights


def _first_layer(encoder: Any, deployed: DeployedModel) -> list[str]:
    """A linear layer that PEFT takes, for a module that changes none."""
    for name in inject.linear_names(deployed.model.backbone.encoder):
        try:
            _require_taken(encoder, encoders.layer(encoder, name)[0])
        except ModelError:
            continue
        return [name]
    raise ModelError(f"the backbone has no linear layer, and PEFT takes no adapter without one: {MERGED}")


def _zeros(deployed: DeployedModel, name: str) -> tuple[Tensor, Tensor]:
    outputs, inputs = inject.linear(deployed.model.backbone.encoder, name).weight.shape
    return torch.zeros(1, inputs), torch.zeros(outputs, 1)


def _require_taken(encoder: Any, name: str) -> None:
    if name.rpartition(".")[2] in REFUSED.get(encoder.config.model_type, ()):
        raise ModelError(f"PEFT takes no LoRA in '{name}' of a {type(encoder).__name__}, whose kernel reads its weight: {MERGED}")
