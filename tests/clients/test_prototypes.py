"""FedProto and PILoRA against their equations: terms, prototypes and centres by hand, what stays as it is, and what travels."""

# K clients, C classes, D features

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.learners.fedproto import Learner as FedProto
from clients.learners.pilora import Learner as PILoRA
from fedsim.core import config as configs
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate, RoundPlan, Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.sums import summed
from fedsim.core.tensors import lora_layers, with_prefix, without_prefix
from fedsim.models.heads.centres import Head
from fedsim.simulation import prepare, run
from server.aggregators.centres import Aggregator as Centres
from server.aggregators.fedavg import Aggregator as FedAvg
from tests.clients.test_fused import CLASSES, Here, require_same, work
from tests.clients.works import step_of
from tests.server.test_calibrators import recorded
from tests.tiny import final_state, same_bits, tiny


def randn(*shape: int, address: str) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch_stream(0, address))


# ---------------------------------------------------------------- FedProto

PROTOTYPES = randn(3, 4, address="prototypes")  # of classes 1, 2 and 4 of 6
TOLD = {"own": {"classes": torch.tensor([1, 2, 4]), "prototypes": PROTOTYPES}}


def begun(learner: FedProto, told: Mapping[str, Tensors] = TOLD) -> dict[str, Any]:
    (one, *_) = replace(work(), learners={}).works()
    return learner.begin(one, {}, told, torch.Generator())


def test_features_are_drawn_to_prototypes_by_sample_and_by_class() -> None:
    """Class 5 has no prototype, and the last row is replayed: both add 0, and the means are over what is there."""
    f, y = randn(6, 4, address="features"), torch.tensor([1, 1, 4, 5, 1, 2])
    step = step_of(features=f.clone().requires_grad_(), labels=y, own=slice(0, 5))
    by_sample, by_class = FedProto(lam=0.5), FedProto(lam=0.5, term="class")
    rows = [(0, 0), (1, 0), (2, 2), (4, 0)]
    want = 0.5 * sum(float((f[i] - PROTOTYPES[p]).square().sum()) for i, p in rows) / (5 * 4)
    got = by_sample.loss(begun(by_sample), step)
    assert got is not None and float(got.detach()) == pytest.approx(want)
    got.backward()  # type: ignore[no-untyped-call]
    assert not step.features.grad[[3, 5]].any() and step.features.grad[[0, 1, 2, 4]].any(dim=1).all()
    batches = (f[[0, 1, 4]].mean(0) - PROTOTYPES[0], f[2] - PROTOTYPES[2])
    want = 0.5 * sum(float(difference.square().mean()) for difference in batches)
    of_classes = by_class.loss(begun(by_class), step)
    assert of_classes is not None and float(of_classes.detach()) == pytest.approx(want)


@pytest.mark.parametrize("term", ["sample", "class"])
def test_at_the_prototypes_and_without_any_there_is_nothing_to_add(term: str) -> None:
    learner = FedProto(term=term)
    there = step_of(features=PROTOTYPES[[0, 2, 2]].clone().requires_grad_(), labels=torch.tensor([1, 4, 4]))
    strange = step_of(features=PROTOTYPES.clone().requires_grad_(), labels=torch.tensor([0, 3, 5]))
    for step in (there, strange):
        nothing = learner.loss(begun(learner), step)
        assert nothing is not None and float(nothing.detach()) == 0
        nothing.backward()  # type: ignore[no-untyped-call]
    assert learner.loss(begun(learner, {"own": {}}), there) is None
    assert FedProto(lam=0.0).loss(begun(FedProto(lam=0.0)), there) is None


def features_of(here: Here, updates: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    """Features of every client's samples by its trained module, and labels."""
    own = [{**w.params, **u.params} for w, u in zip(here.works(), updates, strict=True)]
    return [
        (w.outputs(w.shard, params).features.double(), w.labels(w.shard))
        for w, params in zip(here.works(), own, strict=True)
        if len(w.shard)
    ]


@pytest.mark.parametrize("averaging", ["samples", "clients"])
def test_prototypes_are_the_means_of_all_clients_features(averaging: str) -> None:
    learner = FedProto(averaging=averaging)
    here = replace(work("client.lr=0.1"), learners={"fedproto": learner})
    updates = here.one_by_one()
    assert all(isinstance(u, ClientUpdate) for u in updates)
    sent = [u for u in updates if isinstance(u, ClientUpdate) and u.num_samples]
    lifts = [learner.lift(without_prefix(u.statistics, "fedproto."), u.num_samples) for u in sent]
    told = learner.context(learner.heard(learner.opened(None, {}, 0), summed(lifts), 5))
    found = features_of(here, updates)
    for c, prototype in zip(told["classes"].tolist(), told["prototypes"], strict=True):
        own = [f[y == c] for f, y in found if bool((y == c).any())]
        want = torch.cat(own).mean(0) if averaging == "samples" else torch.stack([rows.mean(0) for rows in own]).mean(0)
        torch.testing.assert_close(prototype.double(), want, rtol=1e-5, atol=1e-6)
    assert told["classes"].tolist() == sorted(set(torch.cat([y for _, y in found]).tolist()))


def test_who_is_not_told_of_keeps_its_prototype_until_the_next_task() -> None:
    learner = FedProto()
    first = {"weight": torch.tensor([2.0, 0.0]), "sum": torch.tensor([[4.0], [0.0]])}
    second = {"weight": torch.tensor([0.0, 1.0]), "sum": torch.tensor([[0.0], [3.0]])}
    state = learner.heard(learner.heard(learner.opened(None, {}, 0), first, 3), second, 3)
    assert learner.context(state)["prototypes"].tolist() == [[2.0], [3.0]]
    assert learner.context(learner.opened(state, {}, 1)) == {}
    assert learner.context(replace(learner, reset=False).opened(state, {}, 1))["prototypes"].tolist() == [[2.0], [3.0]]


def with_prototypes(here: Here, learner: FedProto) -> Here:
    """Clients that have been told of prototypes of two of the three classes."""
    told = {"classes": torch.tensor(CLASSES[:2]), "prototypes": torch.randn(2, 16, generator=torch_stream(0, "told"))}
    plan = RoundPlan(context={"learner.fedproto": told})
    return replace(here, jobs=[replace(j, plan=plan) for j in here.jobs], learners={"fedproto": learner})


@pytest.mark.parametrize("term", ["sample", "class"])
def test_together_is_as_one_by_one(term: str) -> None:
    here = with_prototypes(work(), FedProto(lam=0.3, term=term))
    require_same(here.together(), here.one_by_one())
    assert not here.told


# ---------------------------------------------------------------- PILoRA


def test_distances_are_the_logits() -> None:
    f, w = randn(5, 8, address="f"), {"head.weight": randn(3, 8, address="w")}
    squares = torch.cdist(f, w["head.weight"]).square() / 8
    torch.testing.assert_close(Head().logits(f, w), -squares)
    torch.testing.assert_close(Head(root=True).logits(f, w), -squares.sqrt())
    at_a_centre = w["head.weight"][:1].clone().requires_grad_()
    Head(root=True).logits(at_a_centre, w)[0, 0].backward()  # type: ignore[no-untyped-call]
    assert bool(torch.isfinite(at_a_centre.grad).all()), "a root has no slope at 0"  # type: ignore[arg-type]


def test_pilora_by_hand() -> None:
    logits, y = -randn(4, 6, address="logits").abs(), torch.tensor([3, 4, 4, 0])
    a, b = randn(2, 5, address="a"), randn(5, 2, address="b")
    old = {"adapter.x.lora_A": randn(4, 5, address="old")}  # two modules of rank 2, one on the other
    step = step_of(
        logits=logits, labels=y, own=slice(0, 3), classes=(3, 4), seen=(1, 2, 3, 4),
        params={"adapter.x.lora_A": a, "adapter.x.lora_B": b, "head.weight": a},
    )  # fmt: skip
    pulls = float(-logits[[0, 1, 2], y[:3]].mean()) * 0.1
    crossed = sum(abs(float(a[i] @ old["adapter.x.lora_A"][j])) for i in range(2) for j in range(4))
    for over, classes in (("all", range(6)), ("seen", (1, 2, 3, 4)), ("task", (3, 4))):
        terms = []
        for i in range(3):
            z = {c: float(logits[i, c]) / 0.5 for c in classes}
            terms.append(math.log(sum(math.exp(v) for v in z.values())) - z[int(y[i])])
        want = sum(terms) / 3 + pulls + 0.5 * crossed + 0.01 * float(a.abs().sum())
        got = PILoRA(over=over, temperature=0.5, proximity=0.1).loss({"past": old}, step)
        assert float(got) == pytest.approx(want)
    plain = PILoRA(proximity=0.0, sparsity=0.0)
    right, _ = torch.linalg.qr(old["adapter.x.lora_A"].T, mode="complete")
    apart = replace(step, params={"adapter.x.lora_A": right[:, 4:].T})
    torch.testing.assert_close(plain.loss({"past": old}, apart), plain.loss({"past": {}}, apart))
    assert float(plain.loss({"past": old}, step)) > float(plain.loss({"past": {}}, step)) + 0.1


def test_only_the_tasks_own_centres_move() -> None:
    """Whatever the softmax is over."""
    sections = {"head": {"name": "centres"}}
    here = replace(work("client.lr=0.1", **sections), learners={"pilora": PILoRA()})
    for update in here.one_by_one():
        assert isinstance(update, ClientUpdate)
        moved = (update.params["head.weight"] != here.jobs[0].params["head.weight"]).any(dim=1)
        assert moved.tolist() == [c in CLASSES and update.num_samples > 0 for c in range(6)]


def update(client: int, centres: Tensor, means: Mapping[int, Tensor], n: int = 3) -> ClientUpdate:
    """What a client sends to the rule, with `n` samples of each class."""
    count = torch.tensor([float(n * (c in means)) for c in range(len(centres))])
    sent = {"class_moments.count/head.weight": count, "class_moments.mean/head.weight": torch.stack([*means.values()])}
    tensors = {"head.weight": centres, "adapter.x.lora_A": randn(2, 3, address=f"lora {client}")}
    return ClientUpdate(client, n * len(means), tensors, sent)


def test_centres_are_weighted_by_how_near_they_are_to_all_features() -> None:
    """Class 0: clients 0 and 1 tell; class 1: client 2 alone, and client 0's centre is on its feature; class 2: nobody."""
    centres = [randn(3, 4, address=f"centres {k}") for k in range(3)]
    means = [{0: randn(4, address="m0")}, {0: randn(4, address="m1")}, {1: centres[0][1]}]
    updates = [update(k, w, m) for k, (w, m) in enumerate(zip(centres, means, strict=True))]
    params = {"head.weight": torch.zeros(3, 4).double(), "adapter.x.lora_A": torch.zeros(2, 3).double()}
    rule = Centres(temperature=0.2)
    _, out = rule.combine({}, params, updates, torch.Generator())
    weights = rule.weights(torch.stack(centres), updates)
    torch.testing.assert_close(weights.sum(0), torch.ones(3).double())
    distances = [sum(float((w[0] - means[k][0]).norm()) for k in (0, 1)) for w in centres]
    near = [1 / d for d in distances]
    shares = [math.exp((u - min(near)) / (max(near) - min(near)) / 0.2) for u in near]
    want = sum(s / sum(shares) * w[0] for s, w in zip(shares, centres, strict=True))
    torch.testing.assert_close(out["head.weight"][0], want)
    assert int(weights[:, 0].argmax()) == distances.index(min(distances)) and int(weights[:, 1].argmax()) == 0
    torch.testing.assert_close(out["head.weight"][2], torch.stack([w[2] for w in centres]).mean(0))
    others = [replace(u, params={n: t for n, t in u.params.items() if n != "head.weight"}) for u in updates]
    fedavg = FedAvg().combine({}, params, others, torch.Generator())[1]
    assert torch.equal(out["adapter.x.lora_A"], fedavg["adapter.x.lora_A"])
    few = Centres(more_than=3).weights(torch.stack(centres), updates)
    torch.testing.assert_close(few, torch.full((3, 3), 1 / 3).double(), msg="nobody has more than three samples of a class")


def test_centres_that_are_all_as_near_are_averaged() -> None:
    same = randn(2, 4, address="same")
    for number in (1, 3):
        updates = [update(k, same, {0: same[0], 1: same[0]}) for k in range(number)]
        weights = Centres().weights(torch.stack([same] * number), updates)
        torch.testing.assert_close(weights, torch.full((number, 2), 1 / number).double())


PILORA = {
    "adapter": {"name": "lora", "rank": 2, "targets": ["layers.0.*q_proj", "layers.0.*v_proj"]},
    "head": {"name": "centres"},
    "server": {"aggregator": {"name": "centres"}, "consolidator": {"name": "sum", "keep_old_rows": True}},
}


def test_a_run_freezes_old_modules_and_centres_and_counts_what_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight decay moves neither; what is deployed is the sum of both tasks' modules."""
    config = tiny("client.learners=[pilora]", "client.weight_decay=0.1", output=tmp_path, **PILORA)
    shown, states, results = recorded(config, monkeypatch)
    first, second = states[1].consolidator["past"]
    assert same_bits(first, with_prefix(states[0].params, "adapter.")) and same_bits(shown[0], states[0].params)
    assert torch.equal(states[1].params["head.weight"][:3], states[0].params["head.weight"][:3])
    for p in lora_layers(first):
        got = shown[1][p + ".lora_B"] @ shown[1][p + ".lora_A"]
        want = sum(m[p + ".lora_B"] @ m[p + ".lora_A"] for m in (first, second))
        torch.testing.assert_close(got, want)
        assert bool(first[p + ".lora_B"].any()) and bool(second[p + ".lora_B"].any())
    clients, module, head = 3, sum(t.nbytes for t in first.values()), states[1].params["head.weight"].nbytes
    up, down = results.costs["bytes"]["up"], results.costs["bytes"]["down"]
    assert up["adapter"] == 2 * 2 * clients * module and up["head"] == 2 * 2 * clients * head
    held = sum(int((h > 0).sum()) for h in prepare(config).manifest.histograms)
    assert up["statistics"] == 2 * (2 * clients * 6 * 4 + held * 16 * 4)
    assert down["background"] == clients * module, "the first task's module once, in the second task"


@pytest.mark.parametrize("method", ["fedproto", "pilora"])
def test_weights_of_zero_are_federated_averaging_bit_for_bit(method: str, tmp_path: Path) -> None:
    learner = {
        "fedproto": {"name": "fedproto", "lam": 0},
        "pilora": {"name": "pilora", "over": "task", "proximity": 0, "orthogonality": 0, "sparsity": 0},
    }[method]
    sections = {**PILORA, "server": {"aggregator": {"name": "fairavg"}, "consolidator": {"name": "sum"}}}
    ends = []
    for learners in ([], [learner]):
        config = tiny(output=tmp_path / str(len(learners)), **{**sections, "client": {"learners": learners, "optimizer": "sgd"}})
        ends.append(final_state(run(config).path, config))
    assert same_bits(ends[0].params, ends[1].params) and same_bits(ends[0].consolidator, ends[1].consolidator)


def test_fedproto_counts_what_travels(tmp_path: Path) -> None:
    """Up: a count of every class and a mean of those held; down: from the second round on the prototypes of the task, once a
    client, for they change in every round."""
    config = tiny("client.learners=[fedproto]", "server.aggregator=fairavg", "server.consolidator=none", output=tmp_path)
    results, parts = run(config), prepare(config)
    held = sum(int((h > 0).sum()) for h in parts.manifest.histograms)
    clients, up, down = 3, results.costs["bytes"]["up"], results.costs["bytes"]["down"]
    assert up["statistics"] == 2 * (2 * clients * 6 * 4 + held * 16 * 4)
    told = [int((h > 0).any(axis=0).sum()) for h in parts.manifest.histograms]
    assert down["context"] == clients * sum(k * (8 + 16 * 4) for k in told)


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"head": {"name": "linear"}}, "aggregator centres weighs a head's rows by how near features are to them"),
        (
            {"head": {"name": "linear"}, "server": {"aggregator": "fedavg"}},
            "learner pilora looks at distances of features to class",
        ),
        (
            {"server": {"consolidator": "none"}},
            "learner pilora keeps a task's LoRA apart from frozen ones, and consolidator none",
        ),
        ({"adapter": {"name": "prefix", "length": 2}}, "consolidator sum adds up pairs of LoRA factors"),
        ({"client": {"learners": ["pilora", "er"]}}, "keeps the head's rows of old tasks as they are, which learner er trains"),
        ({"client": {"learners": ["pilora", "fedrs"]}}, "both take the place of the cross-entropy"),
        ({"client": {"learners": [{"name": "pilora", "over": "most"}]}}, "over 'most' is unknown"),
        ({"client": {"learners": [{"name": "pilora", "sparsity": -1}]}}, "sparsity must not be negative"),
        ({"client": {"learners": [{"name": "pilora", "temperature": 0}]}}, "temperature must be positive"),
        ({"client": {"learners": [{"name": "fedproto", "lam": -1}]}}, "lam must not be negative"),
        ({"client": {"learners": [{"name": "fedproto", "term": "batch"}]}}, "term 'batch' is unknown"),
        ({"server": {"aggregator": {"name": "centres", "temperature": 0}}}, "temperature must be positive"),
    ],
)
def test_bad_input_is_one_line(sections: dict[str, Any], line: str) -> None:
    wanted = configs.merge({"client": {"learners": ["pilora"]}}, PILORA)
    for kind, own in sections.items():
        whole = kind in ("adapter", "head")
        wanted[kind] = own if whole else {**wanted[kind], **own}
    with pytest.raises(ConfigError, match=line) as caught:
        prepare(tiny(**wanted))
    assert "\n" not in str(caught.value)
