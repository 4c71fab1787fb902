"""What consolidators share that merge pairs of LoRA factors."""

from __future__ import annotations

from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.core.tensors import LORA_A, LORA_B, lora_layers, with_prefix


def require_pairs(params: Tensors, who: str) -> None:
    """Raise ConfigError unless the adapter is made of LoRA pairs. who: "regmean merges"."""
    pairs = {p + factor for p in lora_layers(params) for factor in (LORA_A, LORA_B)}
    other = [n for n in with_prefix(params, "adapter.") if n not in pairs]
    if other or not pairs:
        what = f"'{other[0]}' is none" if other else "there are none"
        raise ConfigError(f"consolidator {who} pairs of LoRA factors and {what}: use adapter: lora, or consolidator: mean")
