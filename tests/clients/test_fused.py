"""Clients that train together against the oracle: `local.train`, client by client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clients import fused, local
from clients.samples import Samples
from clients.work import Received, Work, round_shard
from fedsim.core import config as configs
from fedsim.core import contracts
from fedsim.core.config import SimConfig
from fedsim.core.contracts import ArraySplit, IntArray, LocalState, Slots, Step
from fedsim.core.errors import ClientFailed, ConfigError, ModelError
from fedsim.core.events import Note
from fedsim.core.messages import ClientJob, ClientUpdate, RoundPlan, StatisticRequest
from fedsim.models import model as models
from fedsim.models.model import Asked, Model
from fedsim.runs.results import Results
from fedsim.simulation import run
from tests.models.zoo import BERT
from tests.tiny import tiny

SIZES = (16, 5, 40, 0, 17)  # with batches of 16: whole, short, ragged, none and one over
CLASSES = (2, 3, 4)
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 2, "targets": "all-linear", "alpha": 3.0},
    "dropout": {"name": "lora", "rank": 2, "targets": "all-linear", "dropout": 0.3},
    "prefix": {"name": "prefix", "length": 3},
    "vpt": {"name": "vpt", "length": 3, "blocks": [1]},
    "apt": {"name": "apt", "memory": 3},
    "tangent": {"name": "tangent", "rank": 2, "targets": "all-linear", "alpha": 3.0, "full_blocks": 1},
    "l2p": {"name": "l2p", "size": 5, "top": 2, "length": 3},
    "l2p, batchwise": {"name": "l2p", "size": 5, "top": 2, "length": 3, "batchwise": True},
    "dualprompt": {"name": "dualprompt", "shared_blocks": [0], "own_blocks": [1], "shared": 2, "own": 3},
    "codaprompt": {"name": "codaprompt", "length": 2, "blocks": "all", "components": 2, "mu": 0.1},
    "none": {"name": "none"},
}


@dataclass
class Here:
    """All that both ways of training need."""

    model: Model
    samples: Samples
    shards: list[IntArray]
    jobs: list[ClientJob]
    config: SimConfig
    learners: dict[str, contracts.Learner]
    told: list[str] = field(default_factory=list)

    def together(self) -> list[ClientUpdate | ClientFailed]:
        return fused.train(self.works(), tell=self.told.append)

    def works(self) -> list[Work]:
        received = Received.on(self.model.device, self.jobs[0].params, self.jobs[0].plan)
        return [
            Work(self.model, self.samples, shard, CLASSES, CLASSES, job, self.config, received, self.learners)
            for shard, job in zip(self.shards, self.jobs, strict=True)
        ]

    def one_by_one(self) -> list[ClientUpdate | ClientFailed]:
        return [local.train(work) for work in self.works()]


def work(*overrides: str, adapter: str = "lora", text: bool = False, plan: RoundPlan | None = None, **sections: Any) -> Here:
    """A round of five clients with as many samples as SIZES says, from tensors in which nothing is zero."""
    sections = {"adapter": ADAPTERS[adapter]} | sections
    if text:
        sections["model"] = {"backbone": "random", "config": BERT}
    config = tiny("client.batch_size=16", "client.epochs=2", "client.lr=1e-3", *overrides, **sections)
    model = models.build(config, num_classes=6)
    numbers = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.backbone.encoder.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    total = sum(SIZES)
    inputs: dict[str, Any] = {"pixel_values": numbers.integers(0, 256, (total, 8, 8), dtype=np.uint8)}
    if text:
        mask = np.arange(12) < numbers.integers(2, 13, total)[:, None]
        inputs = {"input_ids": numbers.integers(1, 50, mask.shape) * mask, "attention_mask": mask.astype(np.int64)}
    split = ArraySplit(inputs, numbers.choice(CLASSES, total))
    params = model.init_adapter(generator) | model.init_head()
    params = {n: torch.randn(t.shape, generator=generator) * 0.2 for n, t in params.items()}
    ends = np.cumsum(SIZES)
    shards = [round_shard(np.arange(end - SIZES[k], end), config, job(k)) for k, end in enumerate(ends)]
    plan = plan or RoundPlan()
    jobs = [job(k, params, plan) for k in range(len(SIZES))]
    learners = configs.build_learners(config.client.learners)
    return Here(model, Samples(split, model.device), shards, jobs, config, learners)


def doubled(here: Here) -> Here:
    """The same in float64, where rounding hides nothing: optimizers that divide by a gradient's size magnify it."""
    here.model.backbone.encoder.double()
    params = {n: t.double() for n, t in here.jobs[0].params.items()}
    return replace(here, jobs=[replace(j, params=params) for j in here.jobs])


def job(k: int, params: dict[str, Tensor] | None = None, plan: RoundPlan | None = None) -> ClientJob:
    return ClientJob(client_id=3 * k + 1, task=1, round=1, params=params or {}, plan=plan or RoundPlan())


def require_same(got: Sequence[Any], want: Sequence[Any], tolerance: float = 1e-5) -> None:
    """Updates equal up to rounding, failures to the letter."""
    assert [type(g) for g in got] == [type(w) for w in want]
    for g, w in zip(got, want, strict=True):
        if isinstance(w, ClientFailed):
            assert str(g) == str(w)
            continue
        assert (g.client_id, g.num_samples) == (w.client_id, w.num_samples)
        for theirs, ours in ((w.params, g.params), (w.statistics, g.statistics)):
            assert list(ours) == list(theirs)
            for name, tensor in theirs.items():
                assert ours[name].dtype == tensor.dtype
                assert ours[name].shape == tensor.shape
                close = torch.allclose(ours[name], tensor, rtol=tolerance, atol=tolerance)
                assert close, f"{name} is off by {(ours[name] - tensor).abs().max():.1e}"
        assert ("loss" in g.metrics) == ("loss" in w.metrics)
        assert g.metrics.get("loss", 0) == pytest.approx(w.metrics.get("loss", 0), rel=1e-5)


def require_trained(updates: Sequence[Any], jobs: Sequence[ClientJob]) -> None:
    """The comparison says nothing unless training moved what it trained."""
    for update in updates:
        if isinstance(update, ClientUpdate) and update.num_samples:
            assert all((t - jobs[0].params[n]).abs().max() > 1e-4 for n, t in update.params.items())


GROUPS = 'client.groups=[{match: "head.*", lr: 0.02}, {match: "*.lora_B", lr: 0.004, weight_decay: 0.3}]'

CASES: dict[str, Callable[[], Here]] = {
    "lora": lambda: work(),
    "lora, only A": lambda: work(plan=RoundPlan(train=("*.lora_A", "head.*"))),
    "lora, only B": lambda: work(plan=RoundPlan(train=("*.lora_B", "head.*"))),
    "lora, no head": lambda: work(plan=RoundPlan(train=("adapter.*",))),
    "head beside a frozen adapter": lambda: work(plan=RoundPlan(train=("head.*",))),
    "lora with dropout": lambda: work(adapter="dropout"),
    "prefix": lambda: work(adapter="prefix"),
    "vpt": lambda: work(adapter="vpt"),
    "apt": lambda: work(adapter="apt"),
    "tangent": lambda: work(adapter="tangent"),
    "tangent, square": lambda: work("client.learners=[{name: square, kappa: 5.0}]", adapter="tangent"),
    "none": lambda: work(adapter="none"),
    "l2p": lambda: work(adapter="l2p"),
    "dualprompt": lambda: work(adapter="dualprompt"),
    "lora, text": lambda: work(text=True),
    "lora with dropout, text": lambda: work(text=True, adapter="dropout"),
    "prefix, text": lambda: work(text=True, adapter="prefix"),
    "vpt, text": lambda: work(text=True, adapter="vpt"),
    "augmented": lambda: work(transform={"augment": "crop_flip"}),
    "clipped": lambda: work("client.clip_norm=0.05"),
    "online": lambda: work("stream.online=true", "client.epochs=1", "server.rounds=2"),
    "proximal": lambda: work("client.learners=[{name: proximal, mu: 0.5}]"),
    "a schedule by steps": lambda: work(
        "client.schedule=cosineannealinglr", "client.schedule_options={T_max: steps}", "client.optimizer=adam"
    ),
    "a schedule for all": lambda: work("client.schedule=steplr", "client.schedule_options={step_size: 2}"),
    "groups": lambda: work(GROUPS),
    "groups and a schedule by steps": lambda: work(
        GROUPS,
        "client.weight_decay=0.1",
        "client.schedule=cosineannealinglr",
        "client.schedule_options={T_max: steps}",
        "client.optimizer=adam",
    ),
    "momentum and decay": lambda: work(
        "client.optimizer=sgd",
        "client.lr=0.1",
        "client.weight_decay=0.1",
        "client.optimizer_options={momentum: 0.9, nesterov: true}",
    ),
}


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_together_is_as_one_by_one(case: str, double: bool) -> None:
    here = doubled(CASES[case]()) if double else CASES[case]()
    got = here.together()
    require_same(got, here.one_by_one(), 1e-9 if double else 1e-5)
    require_trained(got, here.jobs)
    assert [u.metrics.get("together") for u in got if isinstance(u, ClientUpdate)] == [4, 4, 4, None, 4]


@pytest.mark.parametrize(
    "name", ["adadelta", "adagrad", "adam", "adamw", "adamax", "asgd", "nadam", "radam", "rmsprop", "rprop", "sgd", "adafactor"]
)
def test_every_optimizer_goes_its_own_way_for_every_client(name: str) -> None:
    here = doubled(work(f"client.optimizer={name}", "client.clip_norm=1.0", "client.epochs=3"))
    got = here.together()
    require_same(got, here.one_by_one(), 1e-9)
    assert got[0].metrics["together"] == 4


def test_groups_of_an_optimizer_that_looks_at_whole_tensors() -> None:
    here = doubled(work("client.optimizer=adafactor", GROUPS))
    got = here.together()
    require_same(got, here.one_by_one(), 1e-9)
    assert got[0].metrics["together"] == 4


def test_an_optimizer_of_matrices() -> None:
    """Muon takes nothing but matrices, and looks at each as a whole."""
    here = work("client.optimizer=muon", plan=RoundPlan(train=("adapter.*",)))
    got = here.together()
    require_same(got, here.one_by_one(), 1e-3)  # it works in bfloat16 inside, where float64 is no help
    assert got[0].metrics["together"] == 4


@pytest.mark.parametrize("name", ["lbfgs", "sparseadam", "muon"])
def test_an_optimizer_that_cannot_work_fails_as_alone(name: str) -> None:
    here = work(f"client.optimizer={name}")
    got = here.together()
    require_same(got, here.one_by_one())
    assert [isinstance(g, ClientFailed) for g in got] == [True, True, True, False, True]


def test_the_default_options_are_known_to_be_elementwise() -> None:
    """An optimizer that torch brings next is no member until somebody looked at it."""
    known = {n.lower() for n, c in vars(torch.optim).items() if isinstance(c, type) and n != "Optimizer"}
    assert known - fused.ELEMENTWISE == {"adafactor", "lbfgs", "muon", "sparseadam"}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_half_precision(adapter: str) -> None:
    """An encoder that is bfloat16 throughout, as on a GPU: rounding is coarse, but it is the same training."""
    here = work("client.optimizer=sgd", "client.lr=0.1", adapter=adapter)
    here.model.backbone = replace(here.model.backbone, half=True)
    here.model.backbone.encoder.bfloat16()
    got, want = here.together(), here.one_by_one()
    for ours, theirs in zip(got, want, strict=True):
        assert isinstance(ours, ClientUpdate)
        assert isinstance(theirs, ClientUpdate)
        if ours.num_samples:
            assert ours.metrics["together"] == 4
            change, off = (
                torch.cat([(ours.params[n] - t[n]).flatten() for n in ours.params]).norm()
                for t in (here.jobs[0].params, theirs.params)
            )
            assert off < 0.1 * change


def test_one_that_goes_wild_fails_alone() -> None:
    """A loss that is not finite makes the tensors of its client useless from the next step on, and of nobody else."""
    here = work("client.optimizer=sgd", "client.lr=0.1", "client.epochs=3")
    here.learners["explodes"] = _Explodes(labels=int(SIZES[4]))
    got, want = here.together(), here.one_by_one()
    require_same(got, want)
    assert [isinstance(g, ClientFailed) for g in got] == [False, False, False, False, True]
    assert "the loss is" in got[4].reason


@dataclass(frozen=True)
class _Explodes(contracts.Learner):
    """Not finite for a client whose last batch holds one sample, from that batch on."""

    labels: int

    def loss(self, state: LocalState, step: Step) -> Tensor:
        return step.logits.sum() * (float("inf") if len(step.labels) == self.labels % 16 else 0.0)


def test_statistics_come_with_the_updates() -> None:
    requests = (
        StatisticRequest("gram", ("*.lora_A",), {"form": "diagonal"}),
        StatisticRequest("class_moments", ("head.weight",)),
    )
    here = work(plan=RoundPlan(statistics=requests))
    got = here.together()
    require_same(got, here.one_by_one())
    assert got[0].statistics


def test_a_statistics_pass_trains_nobody() -> None:
    here = work(plan=RoundPlan(train=(), statistics=(StatisticRequest("class_moments", ("head.weight",)),)))
    require_same(here.together(), here.one_by_one())


def test_tensors_of_an_update_are_its_own() -> None:
    """A view of all clients' memory would be sent whole with every tensor."""
    for update in work().together():
        for tensor in update.params.values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_no_client_changes_what_another_computes() -> None:
    """Their features and gradients are those of a batch of their own, in float64 to the last digits."""
    here = work()
    model = here.model
    model.backbone.encoder.double()
    generator = torch.Generator().manual_seed(7)
    stacked = {n: torch.randn((2, *t.shape), generator=generator, dtype=torch.float64) for n, t in here.jobs[0].params.items()}
    inputs, _ = here.samples.batch(np.arange(6))
    slots = Slots(3, (3, 3))
    with model.stacked(stacked, slots):
        both = model.stacked_features(inputs, slots, [])
    for k in range(2):
        own = {n: t[k] for n, t in stacked.items()}
        with model.applied(own):
            alone = model.features({n: t[3 * k : 3 * k + 3] for n, t in inputs.items()})
        torch.testing.assert_close(both[3 * k : 3 * k + 3], alone, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("most", [1, 2, 3])
def test_bundles_are_halved_until_they_fit(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocator that has room for so many clients; what did not fit is not tried again."""
    here, tried = work(), []
    real = Model.stacked_asked

    def limited(self: Model, inputs: Any, slots: Slots, *rest: Any) -> Asked:
        tried.append(len(slots.rows))
        if len(slots.rows) > most:
            raise torch.OutOfMemoryError("no room")
        return real(self, inputs, slots, *rest)

    monkeypatch.setattr(Model, "stacked_asked", limited)
    want = here.one_by_one()
    got = here.together()
    require_same(got, want)
    assert max(u.metrics.get("together", 1) for u in got) == min(most, 2)
    assert max(tried) == 4
    tried.clear()
    require_same(here.together(), want)
    assert max(tried, default=1) == min(most, 2)


def test_whatever_goes_wrong_together_is_found_client_by_client(monkeypatch: pytest.MonkeyPatch) -> None:
    here = work()
    here.learners["refuses"] = _Refuses()
    got = here.together()
    require_same(got, here.one_by_one())
    assert [isinstance(g, ClientFailed) for g in got] == [False, True, False, False, False]
    assert "five samples are too few" in got[1].reason
    (note,) = here.told
    assert note.endswith("were trained one by one, which is slower: ValueError: five samples are too few")


@dataclass(frozen=True)
class _Refuses(contracts.Learner):
    """Raises for the client that has a batch of five."""

    def loss(self, state: LocalState, step: Step) -> Tensor:
        if len(step.labels) == 5:
            raise ValueError("five samples are too few")
        return step.logits.new_zeros(())


@pytest.mark.parametrize(
    ("steps", "most", "want"),
    [
        ([3, 9, 1, 9], 8, [[1, 3, 0, 2]]),
        ([3, 9, 1, 9], 2, [[1, 3], [0, 2]]),
        ([1] * 9, 8, [[0, 1, 2, 3, 4], [5, 6, 7, 8]]),
        ([4, 5], 1, [[1], [0]]),
        ([], 8, []),
    ],
)
def test_bundles(steps: list[int], most: int, want: list[list[int]]) -> None:
    assert fused.bundles(steps, most) == want


# ---------------------------------------------------------------- who and when


def test_auto_stands_for_what_pays_on_the_device() -> None:
    assert tiny().runtime.fused is False
    assert tiny("runtime.fused=true").runtime.fused is True
    assert tiny("runtime.fused=true").identity() != tiny().identity() == tiny("runtime.fused=false").identity()
    assert configs.resolve_fused("auto", "cuda", "ray") is True
    assert configs.resolve_fused("auto", "cuda:1", "serial") is True
    assert configs.resolve_fused("auto", "cuda", "flower") is False
    assert configs.resolve_fused(False, "cuda", "ray") is False


@pytest.mark.parametrize(("override", "says"), [("runtime.fused=2", "auto, true or false"), ("runtime.fused=maybe", "maybe")])
def test_other_words_are_refused(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        tiny(override)


def test_flower_sends_every_client_by_itself() -> None:
    with pytest.raises(ConfigError, match="pool flower"):
        tiny("runtime.fused=true", "runtime.pool=flower")


def test_layers_that_mix_a_batch_are_an_obstacle() -> None:
    here = work()
    assert fused.obstacle(here.works()[0]) is None
    here.model.backbone.encoder.norm = nn.BatchNorm1d(4).eval()
    assert fused.obstacle(here.works()[0]) is None  # its statistics are frozen: it is a scale
    here.model.backbone.encoder.norm = nn.BatchNorm1d(4, track_running_stats=False).eval()
    assert "'norm'" in str(fused.obstacle(here.works()[0]))
    want = here.one_by_one()
    got = here.together()
    require_same(got, want)
    assert all("together" not in g.metrics for g in got)


def test_an_adapter_without_the_method_is_an_obstacle() -> None:
    @dataclass(frozen=True)
    class Plain(contracts.Adapter):
        def init(self, backbone: Any, generator: torch.Generator) -> dict[str, Tensor]:
            return {}

        def applied(self, backbone: Any, tensors: Any, dropout: Any = None) -> Any:
            return self.merged(backbone, tensors)

    here = work(adapter="none")
    here.model.adapter = Plain()
    assert "no method 'stacked'" in str(fused.obstacle(here.works()[0]))
    with pytest.raises(ModelError, match="several clients at once"):
        here.model.stacked({}, Slots(1, (1,)))
    here.together()
    assert here.told == [f"clients are trained one by one, whatever runtime.fused says: {fused.obstacle(here.works()[0])}"]


def test_a_statistic_of_the_training_follows_each_of_those_who_train_together() -> None:
    here = doubled(work("client.clip_norm=0.1", plan=RoundPlan(statistics=(StatisticRequest("path_integral", ("adapter.*",)),))))
    got = here.together()
    require_same(got, here.one_by_one())
    assert all(u.metrics["together"] == 4 for u in got if isinstance(u, ClientUpdate) and u.num_samples)


@dataclass(frozen=True)
class _Alone(contracts.Learner):
    alone: ClassVar[str] = "it wants every sample's gradient"


def test_a_learner_that_cannot_is_an_obstacle_and_a_pass_over_data_is_none() -> None:
    here = work()
    here.learners["hermit"] = _Alone()
    assert all("together" not in getattr(g, "metrics", {}) for g in here.together())
    assert here.told == [
        "clients are trained one by one, whatever runtime.fused says: learner hermit: it wants every sample's gradient"
    ]
    only_looked_at = work(plan=RoundPlan(train=(), statistics=(StatisticRequest("class_moments", ("head.weight",)),)))
    only_looked_at.together()
    assert only_looked_at.told == []


@pytest.mark.parametrize("error", [RuntimeError("12 of 34 rows\nare wrong"), torch.OutOfMemoryError("out")])
def test_what_happened_to_bundles_is_said_once_in_log_and_results(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(bundle: fused.Together) -> None:
        raise error

    monkeypatch.setattr(fused.Together, "train", fails)
    said: list[Any] = []
    results = run(tiny("runtime.fused=true", output=tmp_path), progress=said.append)
    assert [event.text for event in said if isinstance(event, Note)] == list(results.notes)
    (note,) = results.notes
    assert ("memory is short for 3" if isinstance(error, torch.OutOfMemoryError) else "RuntimeError: 12 of 34 rows") in note
    assert Results.load(str(results.path)).notes == results.notes


def test_rows_that_are_not_sample_after_sample_are_refused() -> None:
    """A layer that works on a table of positions, say: nobody can tell whose rows these are."""
    with pytest.raises(ModelError, match="49 rows for 6 samples"):
        Slots(3, (3, 2)).axis(49)
    assert Slots(3, (3, 2)).axis(24) == 12


def test_clients_that_start_from_other_tensors_are_refused() -> None:
    here = work()
    here.jobs[1] = replace(here.jobs[1], params=dict(here.jobs[1].params))
    with pytest.raises(ValueError, match="same tensors"):
        here.together()
