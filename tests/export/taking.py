"""What the tests of exports share: models without a training, and what the card's lines load."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.core import config as configs
from fedsim.core.config import ModelConfig
from fedsim.core.messages import Tensors
from fedsim.exports.deployed import DeployedModel
from fedsim.exports.write import plain
from fedsim.finished import DeployedRun
from fedsim.models import model as models

EXACT = 1e-5  # of logits, relative to the largest


def made_up(
    run: DeployedRun,
    layout: Mapping[str, Any],
    adapter: Any,
    head: Any = "linear",
    ranks: bool = False,
    pooling: str = "auto",
) -> DeployedModel:
    """A model on a random encoder of this layout, with the classes of a run, whose tensors are as after training.

    ranks: every other LoRA pair has twice the rank.
    """
    sections = {"adapter": configs.expand("adapters", adapter, "adapter"), "head": configs.expand("heads", head, "head")}
    model = ModelConfig(backbone="random", config=dict(layout), pooling=pooling)
    config = dataclasses.replace(run.config, model=model, **sections, runtime=plain(run.config.runtime))
    built = models.build(config, len(run.manifest.class_order))
    draw = torch.Generator().manual_seed(4)
    fresh = built.init_adapter(torch.Generator().manual_seed(0))
    params = {n: t + 0.3 * torch.randn(t.shape, generator=draw) for n, t in fresh.items()}
    if ranks:
        params = {n: torch.cat([t, t], dim=int(n.endswith("B"))) if i % 4 < 2 else t for i, (n, t) in enumerate(params.items())}
    params |= {n: t + torch.randn(t.shape, generator=draw) for n, t in built.init_head().items()}
    return DeployedModel(run, config, built, params, run.manifest.num_tasks - 1)


def loaded(folder: Path) -> dict[str, Any]:
    """All names that the card's lines make: `model`, `logits`, …"""
    lines = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert lines is not None
    assert not re.search(r"(import|from) fedsim", lines[1])
    scope: dict[str, Any] = {}
    with warnings.catch_warnings():  # PEFT asks transformers by a name that is to go
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        exec(lines[1].replace('folder = "."', f"folder = {str(folder)!r}"), scope)
    return scope


def same(got: Tensor, want: Tensor) -> None:
    """Up to rounding, and not because both say nothing."""
    assert want.std(dim=0).max() > 1e-3, "samples differ"
    torch.testing.assert_close(got, want, rtol=0, atol=EXACT * max(1.0, float(want.abs().max())))


def seen_by(deployed: DeployedModel, raw: Tensors) -> dict[str, Tensor]:
    return dict(deployed.model.shown(raw))
