"""EWC and SI: the penalty and its minimum, what clients note on their way, and what their servers make of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clients import local
from clients.learners import _anchor, ewc, si
from fedsim.core import config as configs
from fedsim.core import contracts
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate, RoundPlan
from fedsim.simulation import prepare, run
from tests.clients.test_fused import Here, doubled, require_same, work
from tests.clients.test_scaffold import Gradients
from tests.clients.works import step_of
from tests.tiny import final_state, same_bits, tiny

GOES_ON = ("server.aggregator=fedavg", "server.consolidator=none")
BOTH = {"ewc": ewc.Learner(lam=3.0), "si": si.Learner(c=3.0)}


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def term(learner: contracts.Learner, importance: Tensor, anchor: Tensor, params: Tensor) -> Tensor:
    value = learner.loss({"importance": {"w": importance}, "anchor": {"w": anchor}}, step_of(params={"w": params}))
    assert value is not None
    return value


@pytest.mark.parametrize("name", BOTH)
def test_the_penalty_and_its_gradient(name: str) -> None:
    f, anchor, w = numbers(0, 4, 3).abs(), numbers(1, 4, 3), numbers(2, 4, 3).requires_grad_()
    value = term(BOTH[name], f, anchor, w)
    want = sum(3.0 * float(a * (b - c) ** 2) for a, b, c in zip(f.flatten(), w.detach().flatten(), anchor.flatten(), strict=True))
    assert value.item() == pytest.approx(want, rel=1e-12)
    (gradient,) = torch.autograd.grad(value, w)
    state = {"importance": {"w": f}, "anchor": {"w": anchor}}
    torch.testing.assert_close(gradient, 3.0 * _anchor.pull(state, "w", w.detach()))
    at_home = anchor.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(term(BOTH[name], f, anchor, at_home), at_home)
    assert not gradient.any()


def test_where_it_comes_to_rest_on_a_quadratic() -> None:
    """½ (θ − a)ᵀ H (θ − a) + λ Σ F (θ − θ*)² has its minimum at (H + 2 λ F)⁻¹ (H a + 2 λ F θ*)."""
    root, a, anchor, f = numbers(0, 5, 5), numbers(1, 5), numbers(2, 5), numbers(3, 5).abs()
    h = root @ root.T + torch.eye(5, dtype=torch.float64)
    w = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w], lr=1, max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (w - a) @ h @ (w - a) / 2 + term(BOTH["ewc"], f, anchor, w)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    pull = 2 * 3.0 * torch.diag(f)
    torch.testing.assert_close(w.detach(), torch.linalg.solve(h + pull, h @ a + pull @ anchor), rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------- the clients' half, as it trains


def anchored(name: str, *overrides: str) -> Here:
    """Clients in float64 with an anchor beside their start, and an importance for every number."""
    here = doubled(work("client.optimizer=sgd", "client.lr=0.02", *overrides))
    start = here.jobs[0].params
    draws = {n: numbers(k, *t.shape) for k, (n, t) in enumerate(start.items())}
    own = {**{n: t + 0.1 * draws[n] for n, t in start.items()}, **{f"importance/{n}": d.square() for n, d in draws.items()}}
    plan = RoundPlan(context={f"learner.{name}": own})
    return replace(here, jobs=[replace(j, plan=plan) for j in here.jobs], learners={name: BOTH[name]})


@pytest.mark.parametrize("name", BOTH)
def test_together_is_as_one_by_one(name: str) -> None:
    here = anchored(name, "client.clip_norm=0.5")
    got = here.together()
    require_same(got, here.one_by_one())
    bare = replace(here, learners={}).one_by_one()
    assert not any(
        same_bits(a.params, b.params) for a, b in zip(got, bare, strict=True) if isinstance(a, ClientUpdate) and a.num_samples
    )


def test_a_path_integral_is_of_the_loss_without_the_penalty() -> None:
    """w = Σ g (θ before − θ after) with plain SGD: Σ η (g + penalty's) g, and what is noted on the way gives the same."""
    here = anchored("si")
    gradients = Gradients()
    here.learners |= {"gradients": gradients}
    update = local.train(here.works()[0])
    assert isinstance(update, ClientUpdate)
    own = here.jobs[0].plan.context["learner.si"]
    for name, start in here.jobs[0].params.items():
        value, path = start.clone(), torch.zeros_like(start)
        for seen in gradients.seen:
            whole = seen[name]
            path += (whole - 3.0 * 2 * own[f"importance/{name}"] * (value - own[name])) * 0.02 * whole
            value = value - 0.02 * whole
        torch.testing.assert_close(update.statistics[f"si.path/{name}"], path, rtol=1e-9, atol=1e-14)


def test_path_integrals_add_up_to_the_fall_of_the_loss() -> None:
    """Small steps on whole batches: Σ w = L(start) − L(end), to first order."""
    here = doubled(work("client.optimizer=sgd", "client.lr=1e-2", "client.epochs=30", "client.batch_size=64"))
    here.learners["si"] = si.Learner()
    work_of = here.works()[2]
    update = local.train(work_of)
    assert isinstance(update, ClientUpdate)
    losses = []
    for params in (here.jobs[2].params, update.params):
        logits, labels = work_of.outputs(work_of.shard, params).logits, work_of.labels(work_of.shard)
        losses.append(float(torch.nn.functional.cross_entropy(logits[:, 2:5], labels.long() - 2)))
    walked = sum(float(t.sum()) for t in update.statistics.values())
    assert losses[0] - losses[1] > 0.01
    assert walked == pytest.approx(losses[0] - losses[1], rel=0.05)


# ---------------------------------------------------------------- the servers' halves


def test_si_by_hand() -> None:
    """Two clients with 1 and 3 samples, two rounds, two tasks; a negative sum is no importance."""
    learner, t = si.Learner(xi=0.5), torch.tensor
    state = learner.opened(None, {"w": t([1.0, 1.0])}, 0)
    assert not learner.context(state)
    for paths in (([4.0, 0.0], [8.0, -4.0]), ([0.0, 0.0], [4.0, 0.0])):
        lifted = [learner.lift({"path/w": t(path)}, n) for path, n in zip(paths, (1, 3), strict=True)]
        state = learner.heard(state, {n: lifted[0][n] + lifted[1][n] for n in lifted[0]}, 2)
    torch.testing.assert_close(state["path"]["w"], t([7.0 + 3.0, -3.0], dtype=torch.float64))
    state = learner.opened(state, {"w": t([3.0, 2.0])}, 1)
    told = learner.context(state)
    torch.testing.assert_close(told["importance/w"], t([10 / 4.5, 0.0]))
    assert torch.equal(told["w"], t([3.0, 2.0])) and not state["path"]
    state = learner.heard(state, learner.lift({"path/w": t([1.0, 6.0])}, 5), 2)
    torch.testing.assert_close(
        learner.context(learner.opened(state, {"w": t([3.0, 4.0])}, 2))["importance/w"], t([10 / 4.5 + 1 / 0.5, 6 / 4.5])
    )


def test_ewc_by_hand() -> None:
    """Clients of 1 and 3 samples: F = Σ F_i / 4; with the next task's, γ F + F'. What no task moved is not asked for."""
    learner, t = ewc.Learner(gamma=0.5), torch.tensor
    state = learner.opened(None, {"w": t([1.0]), "b": t([1.0]), "frozen": t([1.0])}, 0)
    assert not learner.context(state)
    deployed = {"w": t([2.0]), "b": t([3.0]), "frozen": t([1.0])}
    plan = learner.closing(state, deployed)
    assert plan is not None and not plan.train and [(r.name, r.match) for r in plan.statistics] == [("fisher", ("w", "b"))]
    sent = [
        {"fisher.likelihood/w": t([4.0]), "fisher.likelihood/b": t([0.0])},
        {"fisher.likelihood/w": t([8.0]), "fisher.likelihood/b": t([2.0])},
    ]
    lifted = [learner.lift(one, n) for one, n in zip(sent, (1, 3), strict=True)]
    state = learner.closed(state, deployed, {n: lifted[0][n] + lifted[1][n] for n in lifted[0]})
    state = learner.opened(state, deployed, 1)
    told = learner.context(state)
    assert (told["importance/w"], told["importance/b"], told["w"]) == (t([3.0]), t([0.5]), t([2.0]))
    state = learner.closed(state, deployed, learner.lift({"fisher.likelihood/w": t([1.0])}, 2))
    told = learner.context(state)
    assert (told["importance/w"], told["importance/b"]) == (t([2.0]), t([0.25]))
    still = learner.opened(state, deployed, 2)
    assert learner.closing(still, deployed) is None and ewc.Learner(lam=0.0).closing(state, {**deployed, "w": t([9.0])}) is None


# ---------------------------------------------------------------- runs


def test_in_a_run_they_hold_it_back_and_travel_as_they_say(tmp_path: Path) -> None:
    """A head alone, of which no two tensors are alike, and all classes in both tasks: P numbers of 3 clients, SI's paths in
    each of 4 rounds and EWC's Fisher at 2 ends; down, the importance once in the second task, and the anchor for nothing. Weight
    zero is FedAvg, to bit and byte."""
    told = (*GOES_ON, "adapter=none", "stream.name=domain_incremental", "stream.tasks=null", "data.domains=2")
    ended, bytes_of = {}, {}
    for name, items in {"none": "", "null": "{name: ewc, lam: 0}, {name: si, c: 0}", "ewc": "{name: ewc, lam: 1.0e+4}",
                        "si": "{name: si, c: 1.0e+4}"}.items():  # fmt: skip
        config = tiny(*told, f"client.learners=[{items}]", output=tmp_path / name)
        results = run(config)
        ended[name], bytes_of[name] = final_state(results.path, config).params, results.costs["bytes"]  # type: ignore[arg-type]
        assert "stored" not in results.costs
    assert same_bits(ended["null"], ended["none"]) and bytes_of["null"] == bytes_of["none"]
    size = sum(t.numel() for t in ended["none"].values())
    assert bytes_of["si"]["up"]["statistics"] == 4 * size * 3 * 4
    assert bytes_of["ewc"]["up"]["statistics"] == 4 * size * 3 * 2
    for name in ("ewc", "si"):
        assert bytes_of[name]["down"]["context"] == 4 * size * 3
        assert not same_bits(ended[name], ended["none"])


@pytest.mark.parametrize(
    ("learner", "overrides", "told"),
    [
        *(
            (name, ["server.consolidator=mean"], f"^learner {name} holds every number near .* mean starts .*: none$")
            for name in BOTH
        ),
        (
            "ewc",
            ["server.aggregator={name: livar, evaluated: products}"],
            "^learner ewc asks what .* aggregator livar deploys other",
        ),
    ],
)
def test_where_there_is_no_anchor_or_nothing_to_measure(learner: str, overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        prepare(tiny(*GOES_ON, f"client.learners=[{learner}]", *overrides))


@pytest.mark.parametrize(
    "options",
    [
        {"name": "ewc", "lam": -1.0}, {"name": "ewc", "gamma": 1.5}, {"name": "ewc", "form": "true"}, {"name": "si", "c": -0.1},
        {"name": "si", "xi": 0.0},
    ],
)  # fmt: skip
def test_options_that_can_never_work(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(options)[1]):
        configs.build("learners", options)
