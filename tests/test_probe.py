"""What `prepare` finds before any training: data that no client could read, parts of a model that do nothing, steps that fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsim import probe, simulation
from fedsim.core import config as configs
from fedsim.core.contracts import ArraySplit
from fedsim.core.errors import ConfigError, DataError, ModelError
from fedsim.models import backbone as backbones
from tests.models.families import FAMILIES
from tests.models.zoo import BERT
from tests.tiny import TINY, tiny

TOKENS = {"source": "synthetic", "kind": "tokens", "classes": 6, "train_per_class": 12, "test_per_class": 4, "vocab": 50}
ROBERTA = {**BERT, "model_type": "roberta", "max_position_embeddings": 14, "pad_token_id": 1}


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_passed", set())


def prepare(**sections: Any) -> None:
    """`simulation.prepare` of the tiny config with whole sections in the place of its own."""
    simulation.prepare(configs.from_dict({**TINY, **sections}))


def text(layout: dict[str, Any], **data: Any) -> None:
    prepare(
        model={"backbone": "random", "config": layout},
        adapter={"name": "lora", "rank": 2, "targets": ["query"]},
        data={**TOKENS, **data},
    )


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("layout", [BERT, ROBERTA])
def test_texts_as_long_as_the_positions_fit_and_no_longer_ones(layout: dict[str, Any]) -> None:
    """RoBERTa's 14 positions begin behind that of its padding, id 1: 12 are left."""
    text(layout, length=12)
    with pytest.raises(
        DataError, match=r"^texts of up to 13 tokens do not fit the 12 positions .*data.max_length: 12.*sample \d+"
    ):
        text(layout, length=13)


@pytest.mark.parametrize(("split", "task"), [("train", 1), ("test", 0)])
def test_the_sample_that_does_not_fit_is_named(split: str, task: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token of one sample of the last task, or of the first one's test samples."""
    from fedsim.data.sources import synthetic

    real = synthetic.Source._tokens

    def spoiled(self: Any, labels: Any, domains: Any, draw: Any) -> Any:
        inputs = real(self, labels, domains, draw)
        if len(labels) == (72 if split == "train" else 24):
            wrong = np.flatnonzero(labels == (5 if task else 0))[1]
            inputs["input_ids"][wrong, 0] = 50
            inputs["attention_mask"][wrong, 0] = 1
        return inputs

    monkeypatch.setattr(synthetic.Source, "_tokens", spoiled)
    word = "training" if split == "train" else "test"
    with pytest.raises(DataError, match=rf"token id 50 is not among the 50 \(0 to 49\) .*{word} sample \d+, of task {task}"):
        text(BERT)


def test_images_for_a_text_backbone_and_the_other_way_round() -> None:
    with pytest.raises(DataError, match=r"the data hold images, but model.backbone 'random' reads texts"):
        prepare(model={"backbone": "random", "config": BERT}, adapter={"name": "none"})
    with pytest.raises(DataError, match=r"the data hold texts, but model.backbone 'random' reads images"):
        prepare(data=TOKENS)


def test_channels_that_do_not_fit() -> None:
    with pytest.raises(DataError, match=r"images of 3 channels do not fit model.backbone 'random' of 1 channel"):
        prepare(data={**TINY["data"], "channels": 3})
    colour = {**TINY["model"]["config"], "num_channels": 3}
    prepare(model={"backbone": "random", "config": colour})  # grey ones are repeated


def test_the_longest_text_that_is_used_is_probed() -> None:
    lengths = np.array([2, 9, 4, 7, 3])
    mask = (np.arange(10) < lengths[:, None]).astype(np.int64)
    split = ArraySplit({"input_ids": mask, "attention_mask": mask}, np.zeros(5, np.int64))
    assert probe._few(split, np.array([4, 2, 3, 0]), 1).tolist() == [3, 4]
    assert probe._few(split, np.arange(5), 2).tolist() == [0, 1, 4]
    empty = ArraySplit({"input_ids": mask, "attention_mask": 0 * mask}, split.labels)
    assert probe._few(empty, np.array([4, 2]), 2).tolist() == [2, 4]


# ---------------------------------------------------------------- the model

ADAPTER = '''
from dataclasses import dataclass
from contextlib import contextmanager
import torch
from fedsim.core import contracts

@dataclass(frozen=True)
class Adapter(contracts.Adapter):
    """A shift of what comes out of the first block."""

    def init(self, backbone, generator):
        return {{"layers.0.shift": torch.zeros(backbone.width), "layers.1.other": torch.zeros(2)}}

    @contextmanager
    def applied(self, backbone, tensors, dropout=None):
        def hook(module, args, output):
            {hook}
        handle = backbone.encoder.layers[0].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
'''


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        (
            "return output + tensors['layers.0.shift'].to(output)",
            r"the trained tensor 'adapter.layers.1.other' moves no feature and gets no gradient: choose",
        ),
        ("return output + tensors['layers.0.shift'].detach()", r"'adapter.layers.0.shift' moves .* \(nor do 1 more\)"),
        (
            "return output[:, :, :3] + tensors['layers.0.shift'][:3] + 0 * tensors['layers.1.other'].sum()",
            r"does not fit model.backbone 'random' \(ViTModel\) \(tensor 'adapter.layers.1.other'\): .* in layer 'layers.1.",
        ),
        (
            "return output + tensors['layers.0.shift'] + torch.log(tensors['layers.1.other'] - 9).sum()",
            r"^adapter .* on model.backbone 'random' \(ViTModel\) gives features that are not finite",
        ),
        (
            "return output + tensors['layers.0.shift'] + (0 * tensors['layers.1.other']).sqrt().sum()",
            r"the gradient of 'adapter.layers.1.other' is not finite",
        ),
        (
            "return output + torch.rand(output.shape) + tensors['layers.0.shift'] + tensors['layers.1.other'].sum()",
            r"^adapter .* draws at random in evaluation",
        ),
    ],
    ids=["one idle", "all idle", "shape", "not finite", "gradient", "random"],
)  # fmt: skip
def test_an_adapter_that_is_wrong_is_one_line_that_names_it(hook: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(ADAPTER.format(hook=hook))
    with pytest.raises(ModelError, match=said) as refused:
        prepare(adapter={"name": str(file)}, server={"aggregator": "fedavg", "rounds": 1})
    assert "\n" not in str(refused.value) and str(file) in str(refused.value)


def test_the_same_adapter_without_a_fault_passes_and_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.py"
    right = "return output + (tensors['layers.0.shift'] + tensors['layers.1.other'].sum()).to(output)"
    file.write_text(ADAPTER.format(hook=right))
    sections: Any = {"adapter": {"name": str(file)}, "server": {"aggregator": "fedavg", "rounds": 1}}
    prepare(**sections)
    monkeypatch.setattr(probe, "_Probe", None)
    prepare(**sections, client={"lr": 0.5}, seed=3)
    file.write_text(ADAPTER.format(hook=right) + "\n")
    with pytest.raises(TypeError):  # another file is another adapter
        prepare(**sections)


@pytest.mark.parametrize("family", ["deberta_v2", "mamba", "swin", "t5", "xlnet"])
def test_prompts_that_do_not_fit_are_refused_before_training(family: str) -> None:
    found = FAMILIES[family]
    data = {**TOKENS, "length": 7} if found.kind == "text" else TINY["data"]
    with pytest.raises(ModelError, match=r"^the adapter vpt does not fit a \w+: .*; use the adapter lora$"):
        prepare(model={"backbone": "random", "config": found.layout}, adapter={"name": "vpt"}, data=data)


class Changed(nn.Module):
    """In the place of a block's last layer."""

    def __init__(self, layer: nn.Module, change: Any) -> None:
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.change(self.layer(x))
        return out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y: y + torch.rand(y.shape), r"^model.backbone 'random' \(ViTModel\) draws at random in evaluation"),
        (lambda y: y * torch.inf, r"^model.backbone 'random' \(ViTModel\) gives features that are not finite"),
        (lambda y: y[:, :2], r"^model.backbone 'random' \(ViTModel\) cannot read samples of the data: RuntimeError"),
    ],
)
def test_a_backbone_that_is_wrong(change: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = backbones.load

    def load(config: Any, hashed: bool = False) -> Any:
        loaded: Any = real(config, hashed)
        loaded.encoder.layers[1].mlp.fc2 = Changed(loaded.encoder.layers[1].mlp.fc2, change)
        return loaded

    monkeypatch.setattr(backbones, "load", load)
    with pytest.raises(ModelError, match=said):
        prepare(adapter={"name": "lora", "rank": 2})


@pytest.mark.parametrize(
    "overrides",
    [
        ("transform.augment=affine",), ("runtime.kernels=onednn",), ("adapter.dropout=0.5",), ("adapter=none",),
        ("server.aggregator=fedavg", "server.consolidator=mean"), ("server.consolidator=dolfin",),
    ],
)  # fmt: skip
def test_nothing_that_a_run_uses_is_touched(overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("server.aggregator=fedavg", "server.consolidator=none", *overrides)
    seen: list[Any] = []
    real = probe.require

    def watched(config: Any, model: Any, spec: Any, params: Any, trained: Any) -> None:
        def parts() -> Iterator[Tensor]:
            yield from model.backbone.encoder.state_dict().values()
            yield from params.values()
            yield torch.random.get_rng_state()

        before = [t.clone() for t in parts()]
        real(config, model, spec, params, trained)
        seen.append(all(torch.equal(a, b) for a, b in zip(before, parts(), strict=True)))
        seen.append(all(not t.requires_grad and t.grad is None for t in parts()))

    monkeypatch.setattr(probe, "require", watched)
    simulation.prepare(config)
    assert seen == [True, True]


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("client", "said"),
    [
        ({"optimizer": "lbfgs"}, r"client.optimizer LBFGS does not work in this training: TypeError.*closure"),
        ({"optimizer": "sparseadam"}, r"client.optimizer SparseAdam does not work .* does not support dense gradients"),
        ({"optimizer": "muon"}, r"Muon only supports 2D parameters"),  # the head's bias is none
        (
            {"schedule": "onecyclelr", "schedule_options": {"max_lr": 0.1, "total_steps": 1}, "epochs": 3},
            r"client.schedule OneCycleLR does not work .* total steps is 1",
        ),
    ],
)
def test_steps_that_would_fail_for_every_client(client: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prepare(client=client)


def test_a_schedule_of_the_clients_own_steps_lasts() -> None:
    prepare(client={"schedule": "onecyclelr", "schedule_options": {"max_lr": 0.1, "total_steps": "steps"}, "epochs": 3})


@pytest.mark.parametrize("rule", ["rolora", "lorm"])
def test_a_factor_beside_one_that_stays_zero_is_not_trained_in_vain(rule: str) -> None:
    """B starts at zero: where A alone is trained, it has no gradient in any round, and the head alone would learn."""
    options = "server.aggregator={name: %s, train: %s}"
    with pytest.raises(ModelError, match=r"lora_A' moves no feature .* multiplied with is zero .* train both factors"):
        simulation.prepare(tiny("server.consolidator=none", options % (rule, "A")))
    for factor in ("B", "alternate"):
        simulation.prepare(tiny("server.consolidator=none", options % (rule, factor)))
    with pytest.raises(ModelError, match=r"is trained in no round"):  # its one round is that of A
        simulation.prepare(tiny("server.consolidator=none", "server.aggregator={name: lorm, start: A}", "server.rounds=1"))
    simulation.prepare(tiny("server.consolidator=none", "server.aggregator={name: lorm, start: A}", "server.rounds=2"))


def test_no_adapter_needs_no_gradient() -> None:
    prepare(adapter={"name": "none"}, server={"aggregator": "fedavg"})


# ---------------------------------------------------------------- learners

FAULTY = """
from dataclasses import dataclass
import torch
from fedsim.core import contracts
from fedsim.core.contracts import Ending

@dataclass(frozen=True)
class Learner(contracts.Learner):
    fault: str = ""

    def begin(self, work, memory, context, draw):
        return {"control": context["own"]["control"], "old": context["prototypes"] if self.fault == "context" else None}

    def loss(self, state, step):
        return step.logits.sum() * (float("nan") if self.fault == "loss" else 0.0)

    def end(self, state, work, params, draw):
        return Ending({}, {"count": torch.ones(2 if self.fault == "shape" else 1)})

    def context(self, state):
        return {"control": torch.zeros(1)} if self.fault != "server" else state["control"]

    def heard(self, state, total, clients):
        return {"control": torch.zeros(1, dtype=torch.float64).add_(total["count"])}
"""


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("", None),
        ("context", "stage training: learner faulty looks for the context 'prototypes', which nobody sends in task 0, round 0"),
        ("loss", "would fail in stage training: the loss is nan at step 1"),
        ("server", "the server half of faulty fails before the first round: TypeError"),
        ("shape", "the server half of faulty fails before the first round: RuntimeError"),
    ],
)
def test_a_learner_that_would_fail_is_refused_before_training(fault: str, line: str | None, tmp_path: Path) -> None:
    file = tmp_path / "faulty.py"
    file.write_text(FAULTY)
    config = tiny(client={"learners": [{"name": str(file), "fault": fault}]})
    if line is None:
        simulation.prepare(config)
        return
    with pytest.raises(ConfigError) as e:
        simulation.prepare(config)
    assert line in str(e.value) and "\n" not in str(e.value)


def test_what_a_learner_sends_must_be_covered_by_the_channels() -> None:
    private = "server.channel=[{name: clip_noise, clip: 1.0, noise: 1.0}]"
    sgd = ("client.optimizer=sgd", "server.aggregator=fairavg", "server.consolidator=none", "client.learners=[scaffold]")
    with pytest.raises(ConfigError, match="scaffold"):
        simulation.prepare(tiny(*sgd, private))
