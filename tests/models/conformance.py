"""Every family of backbones with every adapter, held against what an adapter promises; and the page of what goes with what.

`python -m tests.models.conformance` prints the page, which is `docs/backbones.md` (`make tables`). Families are those of
`families.py`, adapters those of their folder: a new file of either kind is looked at without being named here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from clients import local
from clients.samples import Samples
from clients.work import Work
from fedsim.core import config as configs
from fedsim.core import plugins
from fedsim.core.config import RuntimeConfig, SimConfig
from fedsim.core.contracts import ArraySplit
from fedsim.core.errors import FedsimError
from fedsim.core.messages import ClientJob, RoundPlan, StatisticRequest, Tensors
from fedsim.core.tensors import LORA_B, lora_layers
from fedsim.laws import adapters as laws
from fedsim.matrix import SMALL
from fedsim.models import transform
from fedsim.models.backbone import Backbone
from fedsim.models.model import Model
from tests.models.families import FAMILIES, Family, batch

CLASSES = 4


@dataclass(frozen=True)
class Verdict:
    """Whether an adapter works on a family. refused: why not, in one line; together: whether clients can train in one batch."""

    refused: str | None = None
    together: bool = True


@cache
def backbone(name: str) -> tuple[Backbone, transform.Transform | None]:
    """A family's encoder in float64, with weights that are large enough for every part to matter, and its transform."""
    return laws.random_backbone(FAMILIES[name].layout)


def model(name: str, adapter: str, **options: Any) -> Model:
    """A family with an adapter, small."""
    encoder, images = backbone(name)
    section = {"name": adapter, **SMALL.get(("adapters", adapter), {}), **options}
    return Model(encoder, configs.build("adapters", section), CLASSES, torch.device("cpu"), images)


@cache
def verdict(name: str, adapter: str) -> Verdict:
    """Hold a pair against every promise; LawBroken or an AssertionError where one is broken."""
    built = model(name, adapter)
    scene = laws.scene_of(name, built, batch(FAMILIES[name]))
    if scene.told:
        assert "\n" not in scene.told, scene.told
        return Verdict(scene.told)
    weights = {n: t.clone() for n, t in built.backbone.encoder.state_dict().items()}
    if "fresh" not in built.adapter.exempt:
        laws.fresh(scene)
    for law in (laws.gradients, laws.merged, laws.padding):
        law(scene)
    together = laws.stacked(scene)
    _holds_statistics(built, FAMILIES[name], laws.moved(scene.fresh, 4))
    after = built.backbone.encoder.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in weights.items()), f"{adapter} leaves weights of {name} changed"
    return Verdict(together=together)


def _holds_statistics(built: Model, family: Family, adapter: Tensors) -> None:
    """Grams of the head and of all LoRA pairs, and moments of the classes, in every form, of the shapes that they document."""
    inputs, labels = batch(family), np.array([0, 2, 2])
    samples = Samples(ArraySplit({n: t.numpy() for n, t in inputs.items()}, labels), torch.device("cpu"))
    width = built.backbone.width
    local_params = {"head.weight": torch.zeros(CLASSES, width).double(), "head.bias": torch.zeros(CLASSES), **adapter}
    requests, shapes = [], {}

    def ask(name: str, form: str, subjects: Mapping[str, tuple[int, ...]]) -> None:
        requests.append(StatisticRequest(name, tuple(subjects), {"form": form}))
        shapes.update({f"{name}.{form}/{subject}": shape for subject, shape in subjects.items()})

    upper = {d: d * (d + 1) // 2 for d in (width, *(t.shape[k] for t in adapter.values() for k in range(t.dim())))}
    pairs = {layer + LORA_B: adapter[layer + ".lora_A"].shape for layer in lora_layers(adapter)}
    ask("gram", "diagonal", {"head.weight": (width,), **{layer: (r,) for layer, (r, _) in pairs.items()}})
    ask("gram", "full", {"head.weight": (upper[width],), **{n.replace("_B", "_A"): (upper[d],) for n, (_, d) in pairs.items()}})
    if pairs:
        ask("gram", "projected", {n: (r, r) for n, (r, _) in pairs.items()})
        ask("gram", "cross", {n: (r, d) for n, (r, d) in pairs.items()})
    for form, more in (("full", {"mean": (2, width), "variance": (2, width)}), ("covariance", {"covariance": (1, upper[width])})):
        requests.append(StatisticRequest("class_moments", ("head.weight",), {"form": form}))
        shapes |= {f"class_moments.{key}/head.weight": shape for key, shape in {"count": (CLASSES,), **more}.items()}
    plan = RoundPlan(train=(), statistics=tuple(requests))
    job, config = ClientJob(0, 0, 0, local_params, plan), SimConfig(runtime=RuntimeConfig(eval_batch=2))
    found = local.collect(Work.of(built, samples, np.arange(3), range(CLASSES), job, config), local_params)
    got = {n: tuple(t.shape) for n, t in found.items()}
    assert {n: got.get(n) for n in shapes} == shapes
    assert all(bool(torch.isfinite(t).all()) for t in found.values())


# ---------------------------------------------------------------- the page


def suggested(refused: str) -> list[str]:
    """The adapters that a refusal says to use."""
    return re.findall(r"use the adapter '?(\w+)", refused)


def page() -> str:
    """Families and adapters as Markdown."""
    adapters = plugins.names("adapters")
    reasons: dict[str, int] = {}
    lines = [
        "# Backbones", "",
        "Generated by `make tables` from the encoders and adapters themselves; a test keeps it true.", "",
        "Every family with random weights of a small config, every adapter with default options (LoRA on all linear layers).", "",
        "- ✓: the adapter moves the features, and every tensor gets a gradient; fresh tensors change nothing (prompts apart);",
        "  merged weights give what applied ones give; a text's features do not depend on its padding; several clients in one",
        "  batch (`runtime.fused`) give what each gives alone; statistics have the shapes that rules expect; weights come back",
        "  bit for bit.",
        "- (✓): the same, but clients train one by one, since a layer's input is common to all samples, or the adapter is the",
        "  whole backbone (`full`).",
        "- A number: refused before any training, in the line below.", "",
        f"| family | kind | pooling `auto` | {' | '.join(adapters)} |", "|---" * (3 + len(adapters)) + "|",
    ]  # fmt: skip
    for name, family in FAMILIES.items():
        cells = list(_cells(name, adapters, reasons))
        lines.append(f"| {name} | {family.kind} | {family.pooling} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in reasons.items())]) + "\n"


def _cells(name: str, adapters: list[str], reasons: dict[str, int]) -> Iterator[str]:
    for adapter in adapters:
        found = verdict(name, adapter)
        if found.refused is None:
            yield "✓" if found.together else "(✓)"
        else:
            encoder: Any = backbone(name)[0].encoder
            own = rf"{type(encoder).__name__}|'{re.escape(encoder.config.model_type)}'|(?<=block ')[\w.]+(?=')"
            yield str(reasons.setdefault(re.sub(own, "…", found.refused), len(reasons) + 1))


if __name__ == "__main__":
    try:
        sys.stdout.write(page())
    except FedsimError as e:
        sys.exit(str(e))
