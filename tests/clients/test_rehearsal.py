"""Methods of rehearsal against their equations, what they remember, and what they cost; null options are FedAvg bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clients import local
from clients.learners import derpp, er, glfc, icarl, lider, lwf, xder
from clients.learners._buffers import Buffer, Rehearsal
from fedsim.core import contracts
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate, RoundPlan, Tensors
from fedsim.core.tensors import without_prefix
from fedsim.simulation import prepare, run
from tests.clients.test_fused import CLASSES, Here, doubled, work
from tests.clients.works import step_of
from tests.tiny import final_state, kept, learned, same_bits, tiny


def remembering(here: Here, name: str, **beside: torch.Tensor) -> Here:
    """With the first three samples of every client in its buffer."""
    for k, job in enumerate(here.jobs):
        rows = {n: t[: len(here.shards[k][:3])] for n, t in beside.items()}
        memory = Buffer(here.shards[k][:3], rows, 3, task=0).memory()
        here.jobs[k] = replace(job, memory={**job.memory, **{f"learner.{name}/{n}": t for n, t in memory.items()}})
    return here


def updates(here: Here) -> list[ClientUpdate]:
    found = here.one_by_one()
    assert all(isinstance(u, ClientUpdate) for u in found)
    return found  # type: ignore[return-value]


NULLS: dict[str, contracts.Learner] = {
    "derpp": derpp.Learner(size=4, alpha=0.0, beta=0.0),
    "xder": xder.Learner(size=4, alpha=0.0, beta=0.0, contrast=0.0, constraint=0.0),
}


@pytest.mark.parametrize("name", NULLS)
def test_with_weights_of_zero_it_is_the_cross_entropy(name: str) -> None:
    here = remembering(work(), name)
    here.learners[name] = NULLS[name]
    for got, want in zip(updates(here), updates(work()), strict=True):
        assert same_bits(got.params, want.params)


@pytest.mark.parametrize("learner", [derpp.Learner(size=4)])
def test_with_an_empty_buffer_it_is_the_cross_entropy(learner: Rehearsal) -> None:
    here = work()
    here.learners["it"] = learner
    for got, want in zip(updates(here), updates(work()), strict=True):
        assert same_bits(got.params, want.params)


def test_derpp_by_hand() -> None:
    """Own rows 0-2, another learner's row 3, then two for their logits and three for their labels; classes 1, 2, 5, 6 seen."""
    draw = torch.Generator().manual_seed(0)
    logits, stored = torch.randn(9, 8, generator=draw), torch.randn(10, 8, generator=draw)
    labels = torch.tensor([5, 6, 5, 7, 1, 2, 6, 1, 5])
    step = step_of(logits=logits, labels=labels, classes=(5, 6), seen=(1, 2, 5, 6), own=slice(0, 3), replayed=slice(4, 9))
    state = {"buffer": Buffer(np.arange(10), {"logits": stored}), "drawn": [np.array([7, 2]), np.array([3, 3, 3])]}
    seen = [1, 2, 5, 6]
    square = (logits[4:6][:, seen] - stored[[7, 2]][:, seen]).square().mean()
    entropy = F.cross_entropy(logits[6:][:, seen], torch.tensor([3, 0, 2]))
    got = derpp.Learner(alpha=0.3, beta=0.7).loss(state, step)
    assert got is not None
    torch.testing.assert_close(got, 0.3 * square + 0.7 * entropy)


def test_two_draws_are_independent_and_der_makes_one() -> None:
    state = {"buffer": Buffer(np.arange(100, 160), {}), "count": 20}
    draw = torch.Generator().manual_seed(0)
    both = derpp.Learner().replay(state, np.arange(5), draw)
    assert len(both) == 40 and len(set(both[:20])) == len(set(both[20:])) == 20 and set(both[:20]) != set(both[20:])
    assert (both == 100 + np.concatenate(state["drawn"])).all()
    assert len(derpp.Learner(beta=0.0).replay(state, np.arange(5), draw)) == 20 and not len(state["drawn"][1])


def test_derpp_remembers_what_the_model_said_and_is_stored_with_the_samples(tmp_path: Path) -> None:
    config = tiny("client.learners=[{name: derpp, size: 7}]", "server.aggregator=fedavg", "server.consolidator=none",
                  "server.rounds=1", output=tmp_path)  # fmt: skip
    results = run(config)
    held = prepare(config).manifest.sizes.sum(axis=0)
    for client, memory in kept(results.path)["memory"].items():
        n = min(7, held[client])
        assert memory["learner.derpp/logits"].shape == (n, 6)
    assert results.costs["stored"]["max"] == min(7, held.max()) * (8 * 8 + 8 + 6 * 4) + 16
    assert results.costs["bytes"]["up"]["statistics"] == 0 and "context" not in results.costs["bytes"]["down"]

    here = work()
    here.learners["derpp"] = derpp.Learner(size=4)
    for one, update in zip(here.works(), updates(here), strict=True):
        if update.num_samples:
            assert update.memory is not None
            buffer = Buffer.of(without_prefix(update.memory, "learner.derpp/"))
            want = one.outputs(buffer.positions, {**one.params, **update.params}).logits
            torch.testing.assert_close(buffer.beside["logits"], want)


def test_losses_of_rehearsal_and_distillation_add_up() -> None:
    """One step of SGD in float64, from tensors with a buffer and a teacher: er and lwf together move by what each moves more than
    the cross-entropy alone."""

    def moved(**learners: contracts.Learner) -> list[Tensors]:
        plain = ("client.optimizer=sgd", "client.lr=0.1", "client.epochs=1", "client.batch_size=64")
        here = remembering(doubled(work(*plain)), "er")
        here.learners |= learners
        start = here.jobs[0].params
        plan = RoundPlan(context={"teacher": {n: 1.2 * t for n, t in start.items()}})
        here = replace(here, jobs=[replace(job, plan=plan) for job in here.jobs])
        return [{n: t - start[n] for n, t in u.params.items()} for u in updates(here)]

    rehearsal, teaching = er.Learner(size=4), lwf.Learner(alpha=2.0)
    both, alone = moved(er=rehearsal, lwf=teaching), (moved(er=rehearsal), moved(lwf=teaching), moved())
    for together, first, second, neither in zip(both, *alone, strict=True):
        for name, tensor in together.items():
            torch.testing.assert_close(tensor, first[name] + second[name] - neither[name], rtol=1e-6, atol=1e-10)
    far = [(first[n] - neither[n]).abs().max() for first, neither in zip(alone[0], alone[2], strict=True) for n in first]
    assert max(far) > 1e-6


def test_icarl_without_old_classes_is_the_binary_cross_entropy() -> None:
    """Own rows 0-2, another learner's row 3, replayed rows 4-5, all classes of one task; and with two older ones taught."""
    draw = torch.Generator().manual_seed(0)
    logits, taught = torch.randn(6, 8, generator=draw), torch.randn(6, 8, generator=draw)
    labels, rows, seen = torch.tensor([5, 6, 5, 7, 1, 2]), [0, 1, 2, 4, 5], [1, 2, 5, 6]
    known = {"logits": logits, "labels": labels, "own": slice(0, 3), "replayed": slice(4, 6), "seen": seen}
    targets = F.one_hot(torch.tensor([2, 3, 2, 0, 1]), 4).float()
    want = F.binary_cross_entropy_with_logits(logits[rows][:, seen], targets)
    torch.testing.assert_close(icarl.Learner().loss({"teacher": None}, step_of(**known, classes=seen)), want)
    targets[:, :2] = taught[rows][:, [1, 2]].sigmoid()
    want = F.binary_cross_entropy_with_logits(logits[rows][:, seen], targets)
    step = step_of(**known, classes=(5, 6), model=lambda params: contracts.Outputs(taught, taught))
    torch.testing.assert_close(icarl.Learner().loss({"teacher": {}}, step), want)


def test_glfc_by_hand() -> None:
    """Own rows 0-2 of new classes, another learner's row 3, replayed rows 4-5 of old ones: each group's weights are its distances
    from the labels over their mean, and the teacher's word is the target for old classes in half of the loss."""
    draw = torch.Generator().manual_seed(0)
    logits, taught = torch.randn(6, 8, generator=draw).requires_grad_(), torch.randn(6, 8, generator=draw)
    labels, rows, seen = torch.tensor([5, 6, 5, 7, 1, 2]), [0, 1, 2, 4, 5], [1, 2, 5, 6]
    known = {"logits": logits, "labels": labels, "own": slice(0, 3), "replayed": slice(4, 6), "seen": seen, "classes": (5, 6)}
    ours, targets = logits[rows][:, seen], F.one_hot(torch.tensor([2, 3, 2, 0, 1]), 4).float()
    far = (1 - logits[rows].sigmoid()[range(5), labels[rows]]).detach()
    weights = torch.cat([far[:3] / far[:3].mean(), far[3:] / far[3:].mean()])
    each = F.binary_cross_entropy_with_logits(ours, targets, reduction="none")
    first = (weights[:, None] * each).mean()
    got = glfc.Learner().loss({"teacher": None}, step_of(**known))
    torch.testing.assert_close(got, first)
    (grad,) = torch.autograd.grad(got, logits, retain_graph=True)
    want = torch.zeros_like(logits)
    want[torch.tensor(rows)[:, None], torch.tensor(seen)] = weights[:, None] * (ours.sigmoid() - targets) / 20
    torch.testing.assert_close(grad, want), "weights are no part of the gradient"
    targets[:, :2] = taught[rows][:, [1, 2]].sigmoid()
    second = F.binary_cross_entropy_with_logits(ours, targets)
    step = step_of(**known, model=lambda params: contracts.Outputs(taught, taught))
    assert glfc.Learner(relation=0.0).begin(work().works()[0], {}, {"teacher": {}}, draw)["teacher"] is None
    assert not glfc.Learner(relation=0.0).traits.needs, "and none is sent"
    torch.testing.assert_close(glfc.Learner(relation=0.25).loss({"teacher": {}}, step), 0.25 * second + 0.75 * first)


def test_weights_of_glfc() -> None:
    """Of mean 1 in both groups, and 1 where there is nothing to weigh: a group of one, of zeros, or nobody's."""
    far, new = torch.tensor([0.1, 0.5, 0.2, 0.4, 0.9]), torch.tensor([True, True, False, False, True])
    found = glfc.weights(far, new)
    torch.testing.assert_close(found, torch.tensor([0.2, 1.0, 2 / 3, 4 / 3, 1.8]))
    assert glfc.weights(far[:1], new[:1]).tolist() == [1.0]
    assert glfc.weights(torch.zeros(3), torch.tensor([True, False, True])).tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(glfc.weights(far, torch.ones(5, dtype=torch.bool)), far / far.mean())


def test_glfc_weighs_nothing_where_no_class_is_old() -> None:
    """In the first task: the plain binary cross-entropy, as in the authors' code. With old classes known, a batch without any of
    their rows is weighed all the same."""
    draw = torch.Generator().manual_seed(0)
    logits, labels = 2 * torch.randn(6, 4, generator=draw), torch.tensor([2, 3, 3, 2, 2, 3])
    targets = F.one_hot(labels, 4).float()
    want = F.binary_cross_entropy_with_logits(logits[:, 2:], targets[:, 2:])
    first = step_of(logits=logits, labels=labels, classes=(2, 3), seen=(2, 3))
    torch.testing.assert_close(glfc.Learner().loss({"teacher": None}, first), want)
    far = 1 - logits.sigmoid()[range(6), labels]
    each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    later = step_of(logits=logits, labels=labels, classes=(2, 3), seen=(0, 1, 2, 3))
    torch.testing.assert_close(glfc.Learner().loss({"teacher": None}, later), (far / far.mean() * each).mean())


def test_glfc_picks_exemplars_of_a_task_at_its_end(tmp_path: Path) -> None:
    """Of all tasks that a client held, and nothing is sent for it."""
    config = tiny(
        "client.learners=[{name: glfc, size: 5}]", "server.aggregator=fedavg", "server.consolidator=none", output=tmp_path
    )
    results = run(config)
    manifest = prepare(config).manifest
    for client, memory in kept(results.path)["memory"].items():
        held, task = memory["learner.glfc/positions"].tolist(), int(memory["learner.glfc/task"])
        shards = [manifest.shard(t, client).tolist() for t in range(2)]
        assert set(held) <= set(shards[0] + shards[1]) and len(held) == min(5, len(shards[0] + shards[1]))
        assert task == max(t for t, shard in enumerate(shards) if shard)
    assert results.costs["bytes"]["up"]["statistics"] == 0


def test_glfc_is_refused_with_a_module_per_client() -> None:
    parts = ("server.aggregator=collect", "server.consolidator=compose", "adapter=apt", "head=mixture", "server.rounds=1")
    told = r"^learner glfc picks exemplars by one model's features, but what .* are the clients' models"
    with pytest.raises(ConfigError, match=told):
        prepare(tiny("client.learners=[{name: glfc, size: 4}]", *parts))


def test_glfc_is_refused_where_no_class_is_old() -> None:
    with pytest.raises(ConfigError, match="glfc weighs old classes against new ones, and with domain_incremental"):
        glfc.Learner(size=2).suits(tiny("stream.name=domain_incremental"), np.array([[4, 4]]))


def test_icarl_with_all_samples_is_the_nearest_mean_of_their_features() -> None:
    learner, works = icarl.Learner(size=40), work().works()
    draw, params = torch.Generator(), works[0].params
    endings = [learner.review(one, {}, {}, draw) for one in works]
    lifted = [learner.lift(e.statistics, 1) for e in endings]
    total = {n: torch.stack([t[n] for t in lifted]).sum(0) for n in ("sum", "count")}
    state = learner.closed(learner.opened(None, params, 0), params, total)
    everything = np.concatenate([one.shard for one in works])
    features = F.normalize(works[0].outputs(everything, params).features.double(), dim=1)
    labels = works[0].labels(everything)
    assert state["count"].tolist() == np.bincount(labels, minlength=6).tolist()
    means = F.normalize(torch.stack([features[labels == c].mean(0) for c in CLASSES]), dim=1)
    nearest = torch.cdist(features, means).argmin(1) + CLASSES[0]
    deployed = learner.deployed(state, params)
    outputs = works[0].outputs(everything, deployed)
    assert torch.equal(outputs.logits.argmax(1), nearest) and len(set(nearest.tolist())) > 1
    assert {n for n, t in params.items() if deployed[n] is not t} == {"head.weight", "head.bias"}
    again = learner.closed(state, params, {n: torch.zeros_like(t) for n, t in total.items()})
    assert same_bits(again, state), "of classes that nobody tells of, what was known stays"


def test_icarl_hears_of_exemplars_of_clients_without_samples_of_the_task(tmp_path: Path) -> None:
    """In the ledger: sums of C features and counts of every client at every task's end, whatever it holds; and exemplars."""
    options = ("client.learners=[{name: icarl, size: 5}]", "server.aggregator=fedavg", "server.consolidator=none")
    whole, path = prepare(tiny(*options)).manifest, tmp_path / "split.json"
    shards = [[whole.shard(t, k).tolist() for k in range(3)] for t in range(2)]
    shards[1] = [[], sorted(shards[1][0] + shards[1][1]), shards[1][2]]
    sizes = np.array([[len(own) for own in task] for task in shards])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    histograms = (
        whole.histograms[0],
        np.stack([0 * whole.histograms[1][0], whole.histograms[1][:2].sum(0), whole.histograms[1][2]]),
    )
    flat = np.array([p for task in shards for own in task for p in own])
    replace(whole, shard_indices=flat, shard_offsets=offsets, histograms=histograms).save(path)
    config = tiny(*options, f"manifest={path}", "server.rounds=1", output=tmp_path)
    results = run(config)
    assert sizes[0, 0] > 0 == sizes[1, 0], "the first client has samples of the first task alone"
    held = {c: m["learner.icarl/positions"] for c, m in kept(results.path)["memory"].items()}
    assert {c: len(p) for c, p in held.items()} == {c: min(5, n) for c, n in enumerate(sizes.sum(0).tolist()) if n}
    state = final_state(results.path, config).learners["icarl"]
    assert float(state["count"].sum()) == sum(map(len, held.values()))
    assert results.costs["bytes"]["up"]["statistics"] == 3 * 2 * (6 * 16 + 6) * 4
    assert results.costs["stored"]["max"] == 5 * (8 * 8 + 8) + 16


@pytest.mark.parametrize("gamma", [0.0, 0.85, 1.0])
def test_no_transplanted_logit_is_above_its_share_of_the_true_one(gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, true = 3 * torch.randn(200, 5, generator=generator), 3 * torch.randn(200, generator=generator)
    got = xder.transplanted(logits, true, gamma)
    assert bool((got <= gamma * true[:, None]).all()) and bool(torch.isfinite(got).all())
    below = logits.amax(1) <= gamma * true
    assert 0 < int(below.sum()) < 200 and torch.equal(got[below], logits[below]), "what is below stays as it is"
    if gamma:
        torch.testing.assert_close(got[~below].amax(1), gamma * true[~below])
        assert torch.equal(got.argsort(1), logits.argsort(1)), "their order stays"
        scaled = ~below & (true > 0)
        torch.testing.assert_close(got[scaled] / logits[scaled], (gamma * true / logits.amax(1))[scaled][:, None].expand(-1, 5))
    else:
        assert not got[~below].any()


def test_contrast_by_brute_force() -> None:
    z = F.normalize(torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
    labels, each = [0, 1, 0, 2, 1, 0, 3], []
    for i in range(7):
        friends = [p for p in range(7) if p != i and labels[p] == labels[i]]
        weights = {a: float(z[i] @ z[a] / 5.0) for a in range(7) if a != i}
        total = np.log(sum(np.exp(w) for w in weights.values()))
        if friends:
            each.append(-np.mean([weights[p] - total for p in friends]))
    assert float(xder.contrastive(z, torch.tensor(labels), 5.0)) == pytest.approx(np.mean(each))


def test_xder_by_hand() -> None:
    """Classes 0, 1 past, 2, 3 present, 4 to 6 to come: two tasks of two and one. Two own rows, one for its logits, two for
    labels, and a further view of the first own row and the replayed one."""
    generator = torch.Generator().manual_seed(0)
    logits, stored = torch.randn(7, 7, generator=generator), torch.randn(4, 7, generator=generator)
    logits[1, 3] = 9.0
    labels = torch.tensor([2, 3, 0, 1, 0, 2, 0])
    step = step_of(
        logits=logits, labels=labels, classes=(2, 3), seen=(0, 1, 2, 3), own=slice(0, 2), replayed=slice(2, 5), again=slice(5, 7)
    )
    drawn = [np.array([3]), np.array([1, 0])]
    state = {"buffer": Buffer(np.arange(4), {"logits": stored}), "drawn": drawn, "future": [4, 5, 6], "more": 1}
    learner = xder.Learner(alpha=0.3, beta=0.8, contrast=0.7, constraint=0.1, margin=2.0, contrasted=1)
    square = (logits[2] - stored[3]).square().mean()
    entropy = F.cross_entropy(logits[3:5, :2], torch.tensor([1, 0]))
    shown, friends = [0, 2, 5, 6], torch.tensor([2, 0, 2, 0])
    parts = [xder.contrastive(F.normalize(logits[shown][:, part], dim=1), friends, 5.0) for part in ([4, 5], [6])]
    good = ((0, [2, 3]), (1, [2, 3]), (2, [0, 1]))
    future = torch.stack([logits[row, 4:].max() + 2.0 - logits[row, classes].max() for row, classes in good])
    p = logits[:2, :4].softmax(1)
    past = p[:, :2].amax(1) + 2.0 - p[:, 2:].amax(1)
    assert (future > 0).any() and not (future > 0).all()
    want = 0.3 * square + 0.8 * entropy + 0.7 * torch.stack(parts).mean() + 0.1 * (future[future > 0].mean() + past.mean())
    got = learner.loss(state, step)
    assert got is not None
    torch.testing.assert_close(got, want)


def test_xder_brings_stored_logits_up_to_date_at_a_task_s_end() -> None:
    """Of classes of the task (2, 3, 4) and later ones (5); what was stored of past ones (0, 1) stays."""
    one = replace(work().works()[2], seen=(0, 1, *CLASSES))
    learner, draw = xder.Learner(size=8, gamma=0.5), torch.Generator().manual_seed(0)
    old = one.shard[:3]  # as if they were of a past task, with these logits and their own labels
    stored = torch.randn(3, 6, generator=draw)
    memory = Buffer(old, {"logits": stored}, 3, np.array([0, 0, 3]), task=0).memory()
    after = Buffer.of(learner.review(replace(one, shard=one.shard[3:]), memory, {}, draw).memory or {})
    assert len(after.positions) == 8 and after.task == 1
    true = stored.gather(1, one.labels(old)[:, None])[:, 0]
    now = one.outputs(old, one.params).logits
    for place, position in enumerate(after.positions):
        where = np.flatnonzero(old == position)
        if len(where):
            want = torch.cat([stored[where[0], :2], xder.transplanted(now[where, 2:], true[where], 0.5)[0]])
        else:
            want = one.outputs(np.array([position]), one.params).logits[0]
            own = want[one.labels(np.array([position]))]
            want = torch.cat([xder.transplanted(want[None, :2], own, 0.5)[0], want[2:]])
        torch.testing.assert_close(after.beside["logits"][place], want)


@pytest.mark.parametrize(("augment", "views"), [("none", 0), ("crop_flip", 3 * (5 + 3))])
def test_xder_takes_further_views_where_they_differ(augment: str, views: int) -> None:
    one = work(f"transform.augment={augment}").works()[0]
    learner, draw = xder.Learner(size=8), torch.Generator().manual_seed(0)
    state = learner.begin(one, Buffer(one.shard[:3], {"logits": torch.zeros(3, 6)}).memory(), {}, draw)
    assert state["future"] == [0, 1, 5]
    assert len(learner.replay(state, one.shard[3:8], draw)) == 3 + 3
    assert len(learner.again(state, one.shard[3:8], draw)) == views


def test_xder_needs_past_and_future_classes() -> None:
    config = tiny("client.learners=[{name: xder, size: 4}]")
    stream = replace(config.stream, name="domain_incremental")
    with pytest.raises(ConfigError, match="learner xder divides the head's rows into past, present and future classes, which a "):
        xder.Learner(size=4).suits(replace(config, stream=stream), np.ones((2, 2), dtype=np.int64))
    assert any("use head: cosine" in note for note in prepare(config).notes)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("server.calibrator=nearest_mean", "whatever calibrator nearest_mean makes of it: set server.calibrator to null"),
        ("head=cosine", "head cosine is no linear map: use head: linear"),
        ("stream.tasks=1", "is taught by the model of the last task's end, which a stream of one task has not"),
    ],
)
def test_icarl_refuses_what_it_cannot_deploy_or_learn_from(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"^learner icarl .*{told}"):
        prepare(
            tiny("client.learners=[{name: icarl, size: 4}]", "server.aggregator=fedavg", "server.consolidator=none", override)
        )


@pytest.mark.parametrize("masked", [False, True], ids=["images", "texts"])
def test_the_largest_singular_value_of_what_a_block_makes_of_tokens(masked: bool) -> None:
    """Within 1 % of the root of the largest eigenvalue of T Tᵀ, whose gradient is that of the singular value; features of another
    size change nothing, nor does padding."""
    generator = torch.Generator().manual_seed(0)
    front, step = (torch.randn(3, 7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    front = front + 2 * torch.randn(5, generator=generator, dtype=torch.float64)  # tokens have a direction in common, as they do
    back, used = front + 0.5 * step, [7, 4, 1] if masked else [7, 7, 7]
    mask = torch.arange(7) < torch.tensor(used)[:, None] if masked else None
    front.requires_grad_()
    got = lider.largest_singular(lider.unit_tokens(front, mask), lider.unit_tokens(back, mask), 10)
    want = []
    for one, other, length in zip(front, back, used, strict=True):
        a, c = (F.normalize(tokens[:length], dim=1) for tokens in (one, other))
        matrix = a.T @ c / length
        want.append(torch.linalg.eigvalsh(matrix @ matrix.T)[-1].sqrt())
    torch.testing.assert_close(got, torch.stack(want), rtol=0.01, atol=0)
    ours, theirs = (torch.autograd.grad(values.sum(), front, retain_graph=True)[0] for values in (got, torch.stack(want)))
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=1e-4)
    again = lider.largest_singular(lider.unit_tokens(3 * front, mask), lider.unit_tokens(7 * back, mask), 10)
    torch.testing.assert_close(again, got)


def lipschitz(blocks: list[torch.Tensor], row: int) -> list[torch.Tensor]:
    """Of one sample and every pair of blocks, from the whole matrix that one block makes of the other's unit tokens."""
    found = []
    for front, back in pairwise(blocks):
        pairs = [torch.outer(f / f.norm(), g / g.norm()) for f, g in zip(front[row], back[row], strict=True)]
        found.append(torch.linalg.matrix_norm(torch.stack(pairs).mean(0), ord=2))
    return found


def test_lider_by_hand() -> None:
    """Two own rows, three that others replay, one synthetic; three blocks. Budgets start at means over own rows, then follow the
    loss, whose distances are those of every sample and block: budgets lie between the samples' constants."""
    generator = torch.Generator().manual_seed(0)
    common = torch.tensor([1.0, 2.0, 0.0, 1.0, 4.0, 0.0], dtype=torch.float64)[:, None, None]  # in all tokens of a sample
    blocks = [(torch.randn(6, 4, 3, generator=generator).double() + common).requires_grad_() for _ in range(3)]
    positions = np.array([4, 5, 8, 9, 7, -1])
    step = step_of(blocks=blocks, labels=torch.zeros(6), positions=positions, own=slice(0, 2), rehearsed=slice(2, 5))
    learner, state = lider.Learner(alpha=0.3, beta=0.5, iterations=200), {"budgets": None, "rate": 0.1, "slope": None}
    each = [lipschitz(blocks, row) for row in range(6)]
    known = [[one.item() for one in of_sample] for of_sample in each]
    start = [(known[0][k] + known[1][k]) / 2 for k in range(2)]

    def expected(budgets: list[float]) -> torch.Tensor:
        terms = [0.3 * each[i][k] + 0.5 * (each[i][k] - max(budgets[k], 0.0)).abs() for i in (2, 3, 4) for k in range(2)]
        return torch.stack(terms).sum() / 6

    got = learner.loss(state, step)
    assert got is not None
    torch.testing.assert_close(got, expected(start))
    for ours, theirs in zip(torch.autograd.grad(got, blocks), torch.autograd.grad(expected(start), blocks), strict=True):
        torch.testing.assert_close(ours, theirs)
    above = [sum(1 if known[i][k] > start[k] else -1 for i in (2, 3, 4)) for k in range(2)]
    assert {abs(n) for n in above} != {3}, "some samples are above a budget, others below"
    learner.stepped(state, {})
    want = [c + 0.1 * 0.5 * n / 6 for c, n in zip(start, above, strict=True)]
    torch.testing.assert_close(state["budgets"], torch.tensor(want, dtype=torch.float64))
    state["budgets"] = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    got = learner.loss(state, step)
    assert got is not None and float(state["slope"][0]) == 0, "a budget below 0 stands for 0, and moves no more"
    torch.testing.assert_close(got, expected([-1.0, 1.0]))
    nothing = step_of(blocks=blocks, labels=torch.zeros(6), own=slice(0, 6))
    assert learner.loss(state, nothing) is None and lider.Learner(alpha=0.0, beta=0.0).loss(state, step) is None


def test_lider_beside_a_buffer(tmp_path: Path) -> None:
    """What it adds trains, its budgets are remembered, and nothing but what its rival sends travels; alone it is refused."""
    found = []
    for others in ("", ", lider", ", {name: lider, alpha: 0.0, beta: 0.0}"):
        config = tiny(f"client.learners=[{{name: er, size: 6}}{others}]", "server.aggregator=fedavg", "server.consolidator=none",
                      "server.rounds=1", output=tmp_path / str(len(found)))  # fmt: skip
        found.append((config, run(config)))
    params = [final_state(results.path, config).params for config, results in found]
    assert same_bits(params[0], params[2]) and not same_bits(params[0], params[1])
    for memory in kept(found[1][1].path)["memory"].values():
        assert memory["learner.lider/budgets"].shape == (1,)
    assert found[1][1].costs["bytes"] == found[0][1].costs["bytes"]
    assert found[1][1].costs["stored"]["max"] == found[0][1].costs["stored"]["max"] + 4
    with pytest.raises(ConfigError, match="learner lider works on samples that are replayed, but no learner keeps a buffer"):
        prepare(tiny("client.learners=[lider]"))


def test_lider_beside_xder_takes_further_views_for_no_replayed_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of own samples there are views, but with an empty buffer nothing is replayed, and LiDER adds nothing; with samples stored
    it looks at those that are replayed alone."""
    looked = list[int]()

    def constants(self: lider.Learner, step: contracts.Step, rows: slice) -> torch.Tensor:
        assert not np.isin(step.positions[rows], step.positions[step.own]).any() or rows == step.own
        if torch.is_grad_enabled():
            looked.append(rows.stop - rows.start)
        return torch.stack([block[rows].mean((1, 2)) for block in step.blocks], dim=1)

    monkeypatch.setattr(lider.Learner, "constants", constants)
    first = work("transform.augment=flip", "client.epochs=1").works()[2]
    learners = {"xder": xder.Learner(size=8, batch_size=2, beta=0.0), "lider": lider.Learner()}
    for stored, rows in ((0, []), (3, [2])):
        memory = Buffer(first.shard[:stored], {"logits": torch.zeros(stored, 6)}).memory()
        job = replace(first.job, memory={f"learner.xder/{n}": t for n, t in memory.items()})
        one = replace(first, job=job, shard=first.shard[3:9], seen=(0, 1, *CLASSES), learners=learners)
        assert isinstance(local.train(one), ClientUpdate) and looked == rows


def test_lider_needs_blocks_of_one_shape() -> None:
    for blocks in ([torch.zeros(2, 4, 3)], [torch.zeros(2, 4, 3), torch.zeros(2, 2, 6)]):
        with pytest.raises(ConfigError, match="learner lider needs blocks with outputs of one shape"):
            lider.require_tokens(blocks)


@pytest.mark.parametrize("others", [["er", "derpp"], ["icarl", "er"], ["xder", "icarl"]])
def test_two_buffers_are_refused(others: list[str]) -> None:
    with pytest.raises(ConfigError, match="both take the place of the buffer, which only one part of a run can have: choose one"):
        prepare(tiny(client={"learners": [{"name": name, "size": 4} for name in others]}))


@pytest.mark.parametrize("method", ["derpp", "glfc", "icarl", "xder"])
def test_a_run_that_was_stopped_remembers_the_same(method: str, tmp_path: Path) -> None:
    config = tiny(
        f"client.learners=[{{name: {method}, size: 6}}]", "server.aggregator=fedavg", "server.consolidator=none",
        "server.rounds=1", output=tmp_path,
    )  # fmt: skip
    whole = run(config)

    class Stopped(Exception):
        pass

    def stop(event: object) -> None:
        if type(event).__name__ == "TaskDone":
            raise Stopped

    with pytest.raises(Stopped):
        run(config, output=tmp_path / "cut", progress=stop)
    resumed = run(resume=tmp_path / "cut")
    assert same_bits(learned(final_state(whole.path, config)), learned(final_state(resumed.path, config)))
    assert same_bits(kept(whole.path), kept(resumed.path))
