"""Merging rules by themselves: TIES against loops in numpy, and the rules as aggregators."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.config import build, expand
from fedsim.core.contracts import Member
from fedsim.core.errors import AggregationError, ConfigError, PluginError
from fedsim.core.messages import ClientUpdate, StatisticRequest, Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.tensors import matching, upper_triangle
from fedsim.laws import aggregators as rules
from fedsim.simulation import run
from server.aggregators.fedavg import Aggregator as FedAvg
from server.aggregators.merged import Aggregator as Merged
from server.aggregators.regmean import Aggregator as RegMean
from server.consolidators.mean import Consolidator as MeanOfTasks
from server.consolidators.merged import Consolidator
from server.consolidators.regmean import Consolidator as RegMeanOfTasks
from server.merging.mean import Merging as Mean
from server.merging.ties import Merging as Ties
from tests.tiny import final_state, learned, same_bits, tiny

SHAPES = {"adapter.x.lora_A": (2, 5), "adapter.x.lora_B": (3, 2), "head.bias": (4,)}


def tensors(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    return {n: scale * torch.randn(s, dtype=torch.float64, generator=torch_stream(seed, "merging", n)) for n, s in SHAPES.items()}


def members(*seeds: int) -> list[Member]:
    """Each a step away from `tensors(0)`."""
    return [Member(f"model {k}", {n: t + tensors(k)[n] for n, t in tensors(0).items()}) for k in seeds]


def vectors(*rows: Sequence[float]) -> list[Member]:
    """Task vectors of models of one tensor, from a base of zeros."""
    return [Member(f"model {k}", {"x": torch.tensor(row, dtype=torch.float64)}) for k, row in enumerate(rows)]


def merged(rule: Ties, rows: Sequence[Member], base: Tensors | None = None) -> Tensors:
    base = base or {n: torch.zeros_like(t) for n, t in rows[0].params.items()}
    return rule.merge(rows, base, torch.Generator())


def close(got: Tensors, want: Tensors, tolerance: float = 1e-12) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=tolerance)


# ---------------------------------------------------------------- TIES


def test_ties_by_hand() -> None:
    """Signs of (3, -1, 0.1) + (-2, -2, 0.2) are (+, -, +): 3 alone, the mean of -1 and -2, the mean of 0.1 and 0.2."""
    out = merged(Ties(density=1.0), vectors((3, -1, 0.1), (-2, -2, 0.2)))["x"]
    torch.testing.assert_close(out, torch.tensor([3.0, -1.5, 0.15], dtype=torch.float64), rtol=0, atol=1e-15)


def test_ties_by_hand_with_trimming() -> None:
    """Of three numbers one is kept: 3 of the first, -2.5 of the second; nobody has a third number, and half of it is added."""
    out = merged(Ties(density=0.4, scale=0.5), vectors((3, -1, 0.1), (-2, -2.5, 0.2)))["x"]
    assert out.tolist() == [1.5, -1.25, 0.0]


def test_what_cancels_takes_the_sign_that_most_numbers_have() -> None:
    """The first number sums to 0; of the elected signs of the others two are negative and one is positive."""
    out = merged(Ties(density=1.0), vectors((2, -1, -1, 1), (-2, -1, -1, 1)))["x"]
    assert out.tolist() == [-2.0, -1.0, -1.0, 1.0]
    assert merged(Ties(density=1.0), vectors((2, 1, -1), (-2, 1, -1)))["x"].tolist() == [0.0, 1.0, -1.0], "nor has any a majority"


def brute_force(rows: Sequence[Sequence[float]], density: float, scale: float) -> Sequence[float]:
    """The three steps number by number, in numpy's float64."""
    if len(rows) == 1:
        return rows[0]
    kept = []
    for row in rows:
        count = max(1, round(density * len(row)))
        smallest = sorted((abs(v) for v in row), reverse=True)[count - 1]
        kept.append([v if abs(v) >= smallest else 0.0 for v in row])
    signs = [float(np.sign(sum(column))) for column in zip(*kept, strict=True)]
    most = float(np.sign(sum(signs)))
    out = []
    for column, sign in zip(zip(*kept, strict=True), signs, strict=True):
        agreeing = [v for v in column if v != 0 and np.sign(v) == (sign or most)]
        out.append(scale * float(np.mean(agreeing)) if agreeing else 0.0)
    return out


@settings(max_examples=120)
@given(data=st.data(), count=st.integers(1, 5), size=st.integers(1, 12))
def test_ties_is_what_loops_give(data: st.DataObject, count: int, size: int) -> None:
    """Whole numbers, so that ties and cancellations are frequent and sums are exact."""
    rows = data.draw(st.lists(st.lists(st.integers(-4, 4), min_size=size, max_size=size), min_size=count, max_size=count))
    density, scale = data.draw(st.sampled_from([0.01, 0.2, 0.3, 0.5, 0.9, 1.0])), data.draw(st.sampled_from([1.0, 0.4]))
    out = merged(Ties(density=density, scale=scale), vectors(*rows))["x"]
    np.testing.assert_allclose(out.numpy(), brute_force(rows, density, scale), rtol=0, atol=1e-12)


@settings(max_examples=20)
@given(order=st.permutations(range(1, 6)), density=st.sampled_from([0.1, 0.5, 1.0]))
def test_ties_does_not_hang_on_the_order(order: list[int], density: float) -> None:
    base = tensors(0)
    close(merged(Ties(density=density), members(*order), base), merged(Ties(density=density), members(*range(1, 6)), base))


@pytest.mark.parametrize("density", [0.02, 0.2, 0.5, 1.0])
def test_of_equal_models_the_largest_numbers_are_kept(density: float) -> None:
    """Exactly round(density · 20) of 20 numbers move from the base, and those are the models' own."""
    base, (model,) = tensors(0), members(1)
    out = merged(Ties(density=density), [model, model], base)
    moved = torch.cat([(out[n] != t).flatten() for n, t in base.items()])
    assert int(moved.sum()) == max(1, round(density * 20))
    way = torch.cat([(model.params[n] - t).flatten() for n, t in base.items()])
    assert float(way[moved].abs().min()) >= float(way.abs().sort(descending=True).values[int(moved.sum()) - 1])
    got, own = (torch.cat([x[n].flatten() for n in base]) for x in (out, model.params))
    torch.testing.assert_close(got[moved], own[moved], rtol=0, atol=1e-15)


def test_every_number_goes_where_its_elected_sign_says() -> None:
    base, several = tensors(0), members(1, 2, 3, 4)
    out = merged(Ties(density=1.0), several, base)
    for name, start in base.items():
        total = sum((m.params[name] - start for m in several), torch.zeros_like(start))
        assert torch.equal((out[name] - start).sign(), total.sign())


def test_each_tensor_by_itself_is_a_merge_of_that_tensor() -> None:
    """And not what all numbers together give: the head's are a hundred times larger."""
    base = tensors(0)
    several = [replace(m, params={**m.params, "head.bias": 100 * m.params["head.bias"]}) for m in members(1, 2, 3)]
    apart = merged(Ties(trim="tensor"), several, base)
    for name, start in base.items():
        alone = [replace(m, params={name: m.params[name]}) for m in several]
        close({name: apart[name]}, merged(Ties(), alone, {name: start}))
    together = merged(Ties(), several, base)
    assert torch.equal(together["adapter.x.lora_A"], base["adapter.x.lora_A"])
    assert not torch.equal(apart["adapter.x.lora_A"], base["adapter.x.lora_A"])


def test_the_scale_is_linear_and_the_start_moves_along() -> None:
    base, several = tensors(0), members(1, 2, 3)
    one, part = (merged(Ties(scale=scale), several, base) for scale in (1.0, 0.3))
    close(part, {n: t + 0.3 * (one[n] - t) for n, t in base.items()})
    away = [replace(m, params={n: t + 7 for n, t in m.params.items()}) for m in several]
    close(merged(Ties(), away, {n: t + 7 for n, t in base.items()}), {n: t + 7 for n, t in one.items()}, 1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0\.0"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1\.5"),
        ({"scale": 0.0}, "scale must not be 0"),
        ({"trim": "layer"}, "trim 'layer' is unknown"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("merging", {"name": "ties", **options})


# ---------------------------------------------------------------- as an aggregator


@pytest.mark.parametrize(
    ("rule", "alone"),
    [("mean", FedAvg()), ("regmean", RegMean()), ({"name": "regmean", "decay": 0.0}, RegMean(decay=0.0))],
)
def test_a_rule_over_clients_is_the_aggregator_of_its_name(rule: object, alone: contracts.AdditiveAggregator) -> None:
    """The same plans, the same bits, whole or in sums."""
    over = build("aggregators", expand("aggregators", {"name": "merged", "rule": rule}, "server.aggregator"))
    assert over.additive
    for scene in rules.scenes(over):
        assert over.plan(scene.state, scene.round).statistics == alone.plan(scene.state, scene.round).statistics
        first = scene.updates[0]
        outs = [
            [r.combine({}, scene.params, scene.updates, scene.draw()), r.finish({}, scene.params, r.lift(first), scene.draw())]
            for r in (over, alone)
        ]
        for (_, got), (_, want) in zip(*outs, strict=True):
            assert all(torch.equal(got[n], want[n]) for n in scene.params)


def test_clients_are_merged_from_the_rounds_start_and_their_tensors_only() -> None:
    """A client without samples has no vote, what nobody trained stays, types stay."""
    start = {**{n: t.float() for n, t in tensors(0).items()}, "adapter.frozen": torch.ones(3)}
    several = [{n: t.float() for n, t in m.params.items()} for m in members(1, 2, 3)]
    updates = [ClientUpdate(k, 5 * (k < 2), own) for k, own in enumerate(several)]
    state, out = Merged("ties").combine({}, start, updates, torch.Generator())
    assert state == {} and torch.equal(out["adapter.frozen"], start["adapter.frozen"])
    base = {n: start[n] for n in SHAPES}
    want = merged(Ties(), [Member("a", several[0]), Member("b", several[1])], base)
    for name in SHAPES:
        assert out[name].dtype == torch.float32 and torch.equal(out[name], want[name].float())


def test_a_rule_that_draws_draws_from_the_rounds_generator() -> None:
    start, updates = tensors(0), [ClientUpdate(0, 1, tensors(1))]
    out = Merged(Noisy()).combine({}, start, updates, torch_stream(4, "draw"))[1]
    assert torch.equal(out["head.bias"], tensors(1)["head.bias"] + torch.randn(4, generator=torch_stream(4, "draw")))


@dataclass(frozen=True)
class Noisy(Mean):
    """An additive rule with a merge of its own, which a sum would pass by."""

    def merge(self, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> Tensors:
        mean = super().merge(members, base, draw)
        return {n: t + torch.randn(4, generator=draw) if n == "head.bias" else t for n, t in mean.items()}


def test_which_rules_are_summed_where_clients_run() -> None:
    assert Merged("mean").additive and Merged("regmean").additive
    assert not Merged("ties").additive and not Merged(Noisy()).additive


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ("tie", PluginError, r"server\.aggregator\.rule: unknown merging rule 'tie'\. Did you mean 'ties'"),
        ({"name": "ties", "density": 3}, ConfigError, r"server\.aggregator\.rule\.density must be in \(0, 1\], got 3\.0"),
        ({"name": "ties", "dens": 1}, ConfigError, r"^unknown key 'server\.aggregator\.rule\.dens'\. Did you mean 'density'"),
        ({"density": 1}, ConfigError, r"rule must be the name of one of the merging"),
    ],
)
def test_rules_that_there_are_not(rule: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        expand("aggregators", {"name": "merged", "rule": rule}, "server.aggregator")
    with pytest.raises(ConfigError, match=r"server\.aggregator\.rule must be given"):
        expand("aggregators", "merged", "server.aggregator")


def test_nobody_sent_anything() -> None:
    with pytest.raises(AggregationError, match="no client sent an update"):
        Merged("ties").combine({}, tensors(0), [], torch.Generator())


# ---------------------------------------------------------------- as a consolidator

LAYERS = {"adapter.wide": (3, 5), "adapter.tall": (6, 4)}  # outputs, inputs
RANK, TASKS = 2, 3


def lora(task: int, width: int = RANK) -> dict[str, Tensor]:
    """The module of a task."""
    made = {}
    for layer, (outputs, inputs) in LAYERS.items():
        for name, shape in ((f"{layer}.lora_A", (width, inputs)), (f"{layer}.lora_B", (outputs, width))):
            made[name] = torch.randn(shape, dtype=torch.float64, generator=torch_stream(task, "lora", name))
    return made


def unborn(module: Tensors) -> dict[str, Tensor]:
    """A module that does nothing yet."""
    return {n: torch.zeros_like(t) if n.endswith("lora_B") else t for n, t in module.items()}


def played(rule: contracts.Consolidator, modules: Sequence[Tensors], draw: int = 0) -> Tensors:
    """What is deployed after these tasks, with made-up Grams where they are asked for."""
    state, params = rule.init(), {"head.weight": torch.ones(2, 2, dtype=torch.float64)}
    for task, module in enumerate(modules):
        params = {**rule.start_task(state, params, unborn(module), {}).params, **module}
        plan, total = rule.plan(state, params), {}
        for request in () if plan is None else plan.statistics:
            assert request.blended and all(n.endswith("lora_A") for n in request.match)
            for name in matching(params, request.match):
                x = (1 + task) * torch.randn(
                    9, params[name].shape[1], dtype=torch.float64, generator=torch_stream(task, "x", name)
                )
                gram, form = x.T @ x, request.options["form"]
                total[f"gram.{form}/{name}"] = gram.diagonal() if form == "diagonal" else upper_triangle(decayed(gram, request))
        state = rule.end_task(state, params, total, torch_stream(draw, "end", task))
    return rule.deployed(state, params, finished=True)


def decayed(gram: Tensor, request: StatisticRequest) -> Tensor:
    decay = request.options["decay"]
    return decay * gram + (1 - decay) * torch.diag(gram.diagonal())


def products(module: Tensors) -> dict[str, Tensor]:
    return {layer: module[f"{layer}.lora_B"] @ module[f"{layer}.lora_A"] for layer in LAYERS}


def test_ties_over_tasks_is_ties_of_dense_products() -> None:
    """All layers' numbers are trimmed together, and nothing of the result is lost: the brute force on B_t A_t."""
    modules = [lora(t) for t in range(TASKS)]
    out = played(Consolidator("ties"), modules)
    rows = [torch.cat([d.flatten() for d in products(m).values()]).tolist() for m in modules]
    got = torch.cat([d.flatten() for d in products(out).values()])
    np.testing.assert_allclose(got.numpy(), brute_force(rows, 0.2, 1.0), rtol=0, atol=1e-12)
    assert out["adapter.wide.lora_A"].shape == (3, 5) and out["adapter.tall.lora_B"].shape == (6, 4)
    assert torch.equal(out["head.weight"], torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("rule", "alone"),
    [
        ("mean", MeanOfTasks()),
        ({"name": "regmean", "decay": 0.0}, RegMeanOfTasks()),
        ({"name": "regmean", "decay": 0.5}, RegMeanOfTasks(decay=0.5)),
    ],
)
def test_a_rule_over_tasks_is_the_consolidator_of_its_name(rule: object, alone: contracts.Consolidator) -> None:
    """What these keep in rank T·r: the same products, up to rounding."""
    modules = [lora(t) for t in range(TASKS)]
    close(products(played(Consolidator(rule), modules)), products(played(alone, modules)), 1e-9)


def test_the_order_of_tasks_does_not_matter_and_one_is_itself() -> None:
    modules = [lora(t) for t in range(TASKS)]
    want, rule = products(played(Consolidator("ties"), modules)), Consolidator({"name": "ties", "trim": "tensor"})
    for order in itertools.permutations(range(TASKS)):
        close(products(played(Consolidator("ties"), [modules[t] for t in order])), want)
    alone = played(rule, modules[:1])
    assert all(alone[n] is t for n, t in modules[0].items()), "with its rank"
    together = products(played(rule, [modules[0]] * 2))
    assert {layer: int((d != 0).sum()) for layer, d in together.items()} == {"adapter.wide": 3, "adapter.tall": 5}


def test_a_module_that_does_nothing_changes_no_sign() -> None:
    """Zeros have no sign and are not counted: a task that learned nothing leaves the merge of the others as it is."""
    modules = [lora(0), lora(1)]
    close(products(played(Consolidator("ties"), [*modules, unborn(lora(2))])), products(played(Consolidator("ties"), modules)))


def test_tensors_that_start_from_zeros_are_merged_number_by_number() -> None:
    rows = [tensors(k) for k in (1, 2)]
    state, rule = Consolidator("ties").init(), Consolidator({"name": "ties", "density": 1.0})
    for own in rows:
        params = {n: t for n, t in own.items() if n == "head.bias"} | {"adapter.0.shift": own["adapter.x.lora_A"]}
        assert rule.start_task(state, params, {"adapter.0.shift": torch.zeros(2, 5)}, {}).past.share == 1 / (
            1 + len(state["past"])
        )
        state = rule.end_task(state, params, {}, torch.Generator())
    got = rule.deployed(state, params, finished=True)["adapter.0.shift"]
    want = brute_force([row["adapter.x.lora_A"].flatten().tolist() for row in rows], 1.0, 1.0)
    np.testing.assert_allclose(got.flatten().numpy(), want, rtol=0, atol=1e-14)
    during = rule.deployed(state, params, finished=False)["adapter.0.shift"]
    close({"x": during}, {"x": (rows[0]["adapter.x.lora_A"] + 2 * rows[1]["adapter.x.lora_A"]) / 3})


def test_what_starts_elsewhere_is_refused() -> None:
    rule = Consolidator("ties")
    with pytest.raises(ConfigError, match=r"'adapter\.0\.prompt' starts from other numbers: use adapter: lora"):
        rule.start_task(rule.init(), {}, {"adapter.0.prompt": torch.ones(2, 2)}, {})
    with pytest.raises(ConfigError, match=r"'adapter\.wide\.weight' starts from other numbers"):
        rule.start_task(rule.init(), {}, lora(0), {})


def test_a_rule_over_tasks_without_its_statistics() -> None:
    rule = Consolidator("regmean")
    with pytest.raises(AggregationError, match=r"no client sent the gram of 'adapter\.wide\.lora_A'"):
        rule.end_task(rule.init(), lora(0), {}, torch.Generator())


def test_what_is_drawn_over_tasks_hangs_on_the_seed_alone() -> None:
    """The generator of the task's end decides; deploying twice, from a state in a file too, gives the same bits."""
    rule, modules = Consolidator(Shaken()), [lora(t) for t in range(TASKS)]
    one, again, other = (products(played(rule, modules, draw)) for draw in (0, 0, 1))
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert all(float((one[n] - other[n]).abs().max()) > 0.1 for n in one)
    assert all(float((one[n] - t).abs().max()) < 5 for n, t in products(played(Consolidator("mean"), modules)).items())


@dataclass(frozen=True)
class Shaken(Mean):
    """Adds N(0, 1)."""

    def merge(self, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> Tensors:
        return {n: t + torch.randn(t.shape, generator=draw) for n, t in super().merge(members, base, draw).items()}


# ---------------------------------------------------------------- in runs

OWN = '''
from dataclasses import dataclass

from fedsim.core import contracts


@dataclass(frozen=True)
class Merging(contracts.Merging):
    """The sum of task vectors, so much of it."""

    part: float = 0.5

    def merge(self, members, base, draw):
        return {n: t + self.part * sum(m.params[n] - t for m in members) for n, t in base.items()}
'''


@pytest.mark.parametrize("adapter", ["lora", "tangent"])
def test_one_file_of_the_users_merges_clients_and_tasks(tmp_path: Path, adapter: str) -> None:
    """In a run; what the file says is part of the run's identity, in both roles."""
    path = tmp_path / "own.py"
    path.write_text(OWN)
    section = f"{{name: merged, rule: {{name: {path}, part: 0.25}}}}"
    options = [f"server.aggregator={section}", f"server.consolidator={section}"]
    if adapter == "tangent":
        options += ["adapter={name: tangent, targets: all-linear, rank: 2}"]
    config = tiny(*options, output=tmp_path)
    assert config.user_files() == [str(path)]
    results = run(config)
    assert np.isfinite(np.tril(results.accuracy)[np.tril_indices(2)]).all()
    state = final_state(results.path, config)
    assert len(state.consolidator["past"]) == 2
    identities = [config.identity()]
    for only in ("server.aggregator=fedavg", "server.consolidator=none"):
        identities.append(tiny(*options, only).identity())
    path.write_text(OWN + "\n")
    for again in ((), ("server.aggregator=fedavg",), ("server.consolidator=none",)):
        identities.append(tiny(*options, *again).identity())
    assert len(set(identities)) == 6


def test_ties_runs_in_both_roles_and_repeats(tmp_path: Path) -> None:
    """Its preset's method on a small stream: twice the same bits; what was deployed at the end is the merge of both tasks."""
    options = ("server.aggregator={name: merged, rule: ties}", "server.consolidator={name: merged, rule: ties}")
    states = []
    for name in "ab":
        config = tiny(*options, output=tmp_path / name)
        states.append(final_state(run(config).path, config))
    assert same_bits(learned(states[0]), learned(states[1]))
    drawn = torch.randint(2**63 - 1, (), generator=torch_stream(0, "consolidate", 1))  # of the run's seed and the last task
    assert states[0].consolidator["seed"] == int(drawn)
    past = states[0].consolidator["past"]
    deployed = Consolidator("ties").deployed(states[0].consolidator, states[0].params, finished=True)
    layers = [n.removesuffix(".lora_A") for n in past[0] if n.endswith(".lora_A")]
    rows = [torch.cat([(m[f"{p}.lora_B"].double() @ m[f"{p}.lora_A"].double()).flatten() for p in layers]).tolist() for m in past]
    got = torch.cat([(deployed[f"{p}.lora_B"] @ deployed[f"{p}.lora_A"]).flatten() for p in layers])
    np.testing.assert_allclose(got.numpy(), brute_force(rows, 0.2, 1.0), rtol=0, atol=1e-7)
