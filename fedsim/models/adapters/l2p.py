"""A pool of prompts, of which every sample gets those with the nearest keys ("Learning to Prompt for Continual Learning", L2P,
Wang et al., 2022, arXiv:2112.08654)."""

# b samples, L tokens, M prompts in the pool, N chosen of them, P tokens of a prompt, D width, K clients

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedsim.core.contracts import BackboneLike, Slots
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import Tensors
from fedsim.models import inject
from fedsim.models.adapters import _keys, _pool, _prompts, vpt

PROMPT, KEY = ".pool_prompt", ".pool_key"
READS = ("prompts", "class_and_prompts")


@dataclass(frozen=True)
class Adapter(_pool.Pool):
    """Sample x has the query q(x), the features that the bare backbone gives of it. Of the pool's M prompts P_m (P, D) with keys
    k_m (D,) it gets the N of largest cos(q, k_m), behind the class token and in front of the patches, from the first block on:

        [x_cls; P_m1 … P_mN; patches]  →  all blocks  →  feature = mean of the N·P outputs at the prompts' places
        loss = cross-entropy − λ · mean of cos(q, k_m) over the samples of a batch and the N keys of each

    The choice has no gradient, so the second term alone moves keys: towards the queries that choose them. Prompts that nobody
    chose get no gradient (with AdamW a weight decay moves them all the same). The pool is one for all tasks: M·(P + 1)·D numbers
    up and down, as many in every task. Clients start from the same pool, so that entry m is the same thing for all of them and
    the mean of their pools is one.

    size: M; top: N; length: P, 0 for none: features are then the bare backbone's. pull: λ; with 0 nothing moves the keys, which
    stay as they are drawn and do not travel. reads: prompts, or class_and_prompts: the class token's output is part of the mean.
    batchwise: in training all samples of a client's batch get the N prompts that they chose most often; in evaluation each has
    its own choice, whatever else is in its batch [ours]. bound: prompts and keys start uniform in ±bound.

    Defaults: M, N, P and the start are those of published codes. They sum the cosines over the N keys, with a weight of 0.1: as a
    mean over them that is 0.5, the default here. Federated codes that pass the cross-entropy only have λ = 0 and never train a
    key; theirs read class_and_prompts. Rates there: Adam at 1.875e-3, or AdamW at 1e-3, constant.
    Raises ModelError for a backbone that is no vision transformer, or whose features are its own pooler's.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"size": 4, "top": 2, "length": 2},
        {"size": 3, "top": 1, "length": 1, "reads": "class_and_prompts", "pull": 0.0},
    )
    size: int = 10
    top: int = 5
    length: int = 5
    pull: float = 0.5
    reads: str = "prompts"
    batchwise: bool = False
    bound: float = 1.0

    def __post_init__(self) -> None:
        require_choice("reads", self.reads, READS)
        _pool.require_not_negative(length=self.length, pull=self.pull, bound=self.bound)
        if not 1 <= self.top <= self.size:
            raise ConfigError(f"top must be from 1 to size, the {self.size} prompts of the pool, got {self.top}")

    def init(self, backbone: BackboneLike, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh `<first block>.pool_prompt` (M, P, D) and `<first block>.pool_key` (M, D)."""
        blocks, width = _prompts.blocks("l2p", backbone.encoder, "all"), backbone.width
        why = _obstacle(backbone, blocks)
        if why is not None:
            raise _prompts.refuse("l2p", backbone.encoder, why)
        if not self.length:
            return {}
        first = next(iter(blocks))
        prompt = _pool.uniform(generator, self.bound, self.size, self.length, width)
        return {first + PROMPT: prompt, first + KEY: _pool.uniform(generator, self.bound, self.size, width)}

    @contextmanager
    def prompted(
        self, backbone: BackboneLike, tensors: Tensors, query_bD: Tensor, training: bool, slots: Slots | None = None
    ) -> Iterator[None]:
        """The chosen prompts among the tokens of all blocks, and features read off them."""
        name = next((n for n in tensors if n.endswith(PROMPT)), None)
        if name is None:
            yield
            return
        encoder = backbone.encoder
        first = inject.submodule(encoder, name.removesuffix(PROMPT))
        chosen_bN = self._chosen(tensors, query_bD, slots, vote=self.batchwise and training)
        prompt_bND = _keys.picked(tensors[name], chosen_bN, axes=3).flatten(1, 2)  # N·P tokens
        length = prompt_bND.shape[1]
        hooks: list[Callable[..., Any]] = [
            vpt.inserting(block, length, prompt_bND if block is first else None) for block in inject.blocks(encoder).values()
        ]
        hooks.append(partial(encoder.register_forward_hook, partial(self._read, length)))
        with inject.installed(hooks):
            yield

    def loss(self, tensors: Tensors, query_bD: Tensor | None) -> Tensor | None:
        """−λ · mean cos(q, k) over each sample's chosen keys."""
        if not self.pull or query_bD is None or not any(n.endswith(KEY) for n in tensors):
            return None
        cosines_bM = _keys.cosines(query_bD, _key(tensors))
        chosen_bN = self._chosen(tensors, query_bD, None, vote=self.batchwise)
        return -self.pull * cosines_bM.gather(1, chosen_bN).mean()

    def frozen(self, tensors: Tensors) -> tuple[str, ...]:
        """Keys that nothing moves."""
        return () if self.pull or not self.length else (f"*{KEY}",)

    def _chosen(self, tensors: Tensors, query_bD: Tensor, slots: Slots | None, vote: bool) -> Tensor:
        """Indices of each sample's prompts, (b, N)."""
        chosen_bN = _keys.nearest(_keys.cosines(query_bD, _key(tensors)), self.top)
        if not vote:
            return chosen_bN
        rows, width = ((len(query_bD),), len(query_bD)) if slots is None else (slots.rows, slots.width)
        return _keys.voted(chosen_bN, self.size, rows, width)

    def _read(self, length: int, encoder: Any, args: tuple[Any, ...], output: Any) -> Any:
        """In the place of every token, so that whatever pooling gives it: the mean of the outputs that features are read off."""
        states_bLD = output.last_hidden_state
        first = vpt.PLACE if self.reads == "prompts" else 0
        read_bD = states_bLD[:, first : vpt.PLACE + length].mean(dim=1)
        return SimpleNamespace(last_hidden_state=read_bD[:, None].expand(-1, states_bLD.shape[1] - length, -1))


def _obstacle(backbone: BackboneLike, blocks: Mapping[str, nn.Module]) -> str | None:
    """Why prompts cannot stay among a backbone's tokens and be read at its end; None if they can."""
    _pool.require_vision_transformer("l2p", backbone.encoder)
    for name, block in blocks.items():
        why = vpt.obstacle(block)
        if why is not None:
            return f"block '{name}' {why}"
    if backbone.by_encoder:
        return "its features are its own pooler's, which does not read prompts"
    config: Any = backbone.encoder.config
    return "it adds positions between its blocks" if getattr(config, "use_mid_position_embeddings", False) else None


def _key(tensors: Tensors) -> Tensor:
    return next(t for n, t in tensors.items() if n.endswith(KEY))
