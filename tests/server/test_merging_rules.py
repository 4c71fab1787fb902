"""Merging rules against closed forms and brute force: task arithmetic, Fisher, DARE, Core Space, TSV."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.core.config import build, expand
from fedsim.core.contracts import Member, Merging
from fedsim.core.errors import AggregationError, ConfigError
from fedsim.core.messages import ClientUpdate, Tensors
from fedsim.core.rng import torch_stream
from fedsim.simulation import prepare, run
from server.aggregators.fairavg import Aggregator as FairAvg
from server.aggregators.fedavg import Aggregator as FedAvg
from server.aggregators.merged import Aggregator as Merged
from server.consolidators.merged import Consolidator
from server.merging import _products
from server.merging._core import Space
from server.merging.core_space import Merging as CoreSpace
from server.merging.dare import Merging as Dare
from server.merging.fisher import Merging as Fisher
from server.merging.mean import Merging as Mean
from server.merging.task_arithmetic import Merging as TaskArithmetic
from server.merging.ties import Merging as Ties
from server.merging.tsv import Merging as Tsv
from tests.server.test_products import LAYERS, close, module, products
from tests.tiny import final_state, tiny

SHAPES = {"adapter.x.lora_A": (2, 5), "adapter.x.lora_B": (3, 2), "head.bias": (4,)}


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    made = {n: torch.randn(s, dtype=torch.float64, generator=torch_stream(seed, "rules", n)) for n, s in SHAPES.items()}
    return {n: t.to(dtype) for n, t in made.items()}


def members(*seeds: int) -> list[Member]:
    return [Member(f"model {k}", tensors(k), 1.0 + k) for k in seeds]


def merged(rule: Merging, several: Sequence[Member], base: Tensors, draw: int = 0) -> Tensors:
    return rule.merge(several, base, torch_stream(draw, "merge"))


def of_pairs(rule: Merging, several: Sequence[Tensors], draw: int = 0) -> dict[str, Tensor]:
    """What a rule makes of tasks' modules."""
    seen = [Member(f"task {k}", m) for k, m in enumerate(several)]
    return _products.merged(rule, seen, _products.origin(several[0]), torch_stream(draw, "merge"))


# ---------------------------------------------------------------- task arithmetic


def test_task_vectors_are_added_up() -> None:
    base, several = tensors(0), members(1, 2, 3)
    for scale in (0.4, 1.0, -2.0):
        want = {n: t + scale * sum(m.params[n] - t for m in several) for n, t in base.items()}
        close(merged(TaskArithmetic(scale), several, base), want)


def test_a_task_vector_that_is_added_and_taken_away_leaves_the_base() -> None:
    base, (model,) = tensors(0), members(1)
    added = merged(TaskArithmetic(1.0), [model], base)
    close(added, model.params)
    gone = merged(TaskArithmetic(-1.0), [model], base)
    close(merged(TaskArithmetic(1.0), [replace(model, params=added), replace(model, params=gone)], base), base)


def test_the_mean_of_task_vectors_is_fairavg_to_the_bit() -> None:
    start = tensors(0, torch.float32)
    updates = [ClientUpdate(k, 3 * k, tensors(k, torch.float32)) for k in (1, 2, 3)]
    rules = Merged({"name": "task_arithmetic", "scale": "mean"}), FairAvg()
    got, want = (rule.combine({}, start, updates, torch.Generator())[1] for rule in rules)
    assert all(torch.equal(got[n], want[n]) for n in start)
    third = Merged({"name": "task_arithmetic", "scale": 1 / 3}).combine({}, start, updates, torch.Generator())[1]
    close(third, want, 1e-6)


# ---------------------------------------------------------------- Fisher


def told(several: Sequence[Member], fisher: Sequence[Tensors], form: str = "likelihood") -> list[Member]:
    return [replace(m, statistics={f"fisher.{form}/{n}": t for n, t in f.items()}) for m, f in zip(several, fisher, strict=True)]


def positive(seed: int) -> dict[str, Tensor]:
    return {n: t.abs() for n, t in tensors(seed + 100).items()}


def test_fisher_is_the_weighted_mean_of_every_number() -> None:
    """Within the members' hull, whatever the scale of F; not whatever one member's scale alone, unless all are normalised."""
    base, several, fisher = tensors(0), members(1, 2, 3), [positive(k) for k in (1, 2, 3)]
    got = merged(Fisher(), told(several, fisher), base)
    for name in base:
        weights, values = np.stack([f[name].numpy() for f in fisher]), np.stack([m.params[name].numpy() for m in several])
        np.testing.assert_allclose(got[name].numpy(), np.average(values, axis=0, weights=weights), rtol=0, atol=1e-9)
        assert (got[name].numpy() >= values.min(0) - 1e-12).all() and (got[name].numpy() <= values.max(0) + 1e-12).all()
    close(merged(Fisher(), told(several, [{n: 7 * t for n, t in f.items()} for f in fisher]), base), got, 1e-9)
    uneven = told(several, [{n: 10.0**k * t for n, t in f.items()} for k, f in enumerate(fisher)])
    assert any(float((merged(Fisher(), uneven, base)[n] - got[n]).abs().max()) > 0.1 for n in base)
    alike = Fisher(normalise=True)
    close(merged(alike, uneven, base), merged(alike, told(several, fisher), base), 1e-9)


def test_equal_fisher_is_the_mean_and_one_that_knows_alone_decides() -> None:
    base, several, one = tensors(0), members(1, 2, 3), positive(1)
    mean = {n: sum(m.params[n] for m in several) / 3 for n in base}
    close(merged(Fisher(), told(several, [one] * 3), base), mean, 1e-9)
    nothing = {n: torch.zeros_like(t) for n, t in one.items()}
    close(merged(Fisher(), told(several, [nothing, one, nothing]), base), several[1].params, 1e-7)
    by_weight = {n: sum(m.weight * m.params[n] for m in several) / sum(m.weight for m in several) for n in base}
    close(merged(Fisher(), told(several, [nothing] * 3), base), by_weight)
    close(merged(Fisher(normalise=True), told(several, [nothing] * 3), base), by_weight)


def test_equal_fisher_over_clients_of_equal_size_is_fedavg() -> None:
    start = tensors(0, torch.float32)
    statistics = {f"fisher.likelihood/{n}": t.float() for n, t in positive(1).items()}
    updates = [ClientUpdate(k, 4, tensors(k, torch.float32), statistics) for k in (1, 2, 3)]
    got = Merged("fisher").combine({}, start, updates, torch.Generator())[1]
    close(got, FedAvg().combine({}, start, updates, torch.Generator())[1], 1e-6)


def test_fisher_that_nobody_sent() -> None:
    with pytest.raises(AggregationError, match=r"model 1 sent 'adapter\.x\.lora_A' without its Fisher information"):
        merged(Fisher(), members(1), tensors(0))


# ---------------------------------------------------------------- DARE


def test_dare_keeps_a_number_or_drops_it() -> None:
    """What is left is exactly τ / (1 − p), about 1 − p of all; the same draws in any order, others for another generator."""
    base, rule = {"x": torch.zeros(40, 50, dtype=torch.float64)}, Dare(p=0.6)
    several = [
        Member(f"model {k}", {"x": torch.randn(40, 50, dtype=torch.float64, generator=torch_stream(k, "x"))}) for k in (1, 2)
    ]
    kept = []
    for one in several:
        out = merged(rule, [one], base)["x"]
        kept.append(out != 0)
        assert torch.equal(out[kept[-1]], one.params["x"][kept[-1]] / (1 - 0.6))
        assert abs(float(kept[-1].double().mean()) - 0.4) < 3 * (0.4 * 0.6 / 2000) ** 0.5
    assert 0.3 < float((kept[0] == kept[1]).double().mean()) < 0.7, "every member draws for itself"
    together = merged(rule, several, base)["x"]
    assert torch.equal(together, merged(rule, several[::-1], base)["x"])
    assert torch.equal((together != 0), kept[0] | kept[1])
    assert not torch.equal(together, merged(rule, several, base, draw=1)["x"])
    assert torch.equal(together, merged(rule, several, base)["x"])


def test_dare_is_unbiased() -> None:
    """10 000 draws at once, as numbers of one tensor: the mean within three standard errors of τ."""
    value, p = 1.5, 0.7
    base = {"x": torch.ones(10_000, dtype=torch.float64)}
    out = merged(Dare(p=p), [Member("one", {"x": base["x"] + value})], base)["x"] - 1
    error = value * (p / (1 - p)) ** 0.5 / 100
    assert abs(float(out.mean()) - value) < 3 * error


def test_dare_without_dropping_is_the_rule_itself() -> None:
    base, several = tensors(0), members(1, 2, 3)
    for then in (Ties(), TaskArithmetic(), Mean()):
        got = merged(Dare(then, p=0.0), several, base)
        assert all(torch.equal(got[n], t) for n, t in merged(then, several, base).items())


def test_dare_ties_is_ties_of_what_is_left() -> None:
    base, several, rule = tensors(0), members(1, 2, 3), Dare("ties", p=0.5)
    left = [merged(Dare(TaskArithmetic(1.0), p=0.5), [m], base) for m in several]
    want = merged(Ties(), [replace(m, params=t) for m, t in zip(several, left, strict=True)], base)
    close(merged(rule, several, base), want)


def test_dare_by_magnitude_keeps_the_largest_as_they_are() -> None:
    vector = torch.tensor([[3.0, -1.0], [0.5, -2.0]], dtype=torch.float64)
    base, model = {"x": torch.zeros(2, 2, dtype=torch.float64)}, [Member("one", {"x": vector})]
    assert merged(Dare(p=0.5, strategy="magnitude"), model, base)["x"].tolist() == [[3.0, 0.0], [0.0, -2.0]]
    assert merged(Dare(p=0.5, strategy="magnitude", rescale=True), model, base)["x"].tolist() == [[6.0, 0.0], [0.0, -4.0]]
    assert set(merged(Dare(p=0.5, rescale=False), model, base)["x"].flatten().tolist()) <= {0.0, 3.0, -1.0, 0.5, -2.0}


# ---------------------------------------------------------------- Core Space

RANKS = (2, 1, 3)
MODULES = [module(k, rank) for k, rank in enumerate(RANKS)]


@pytest.mark.parametrize("then", [Mean(), TaskArithmetic(0.3), TaskArithmetic("mean")])
def test_linear_rules_in_core_space_are_those_of_products(then: Merging) -> None:
    seen = [Member(f"task {k}", {**products(m), "head.bias": m["head.bias"]}) for k, m in enumerate(MODULES)]
    want = merged(then, seen, {n: torch.zeros_like(t) for n, t in seen[0].params.items()})
    got = of_pairs(CoreSpace(then), MODULES)
    close({**products(got), "head.bias": got["head.bias"]}, want)
    for layer, size in LAYERS.items():
        assert len(got[f"{layer}.lora_A"]) == min(6, *size), "the sum of the ranks, or the layer's own"


@pytest.mark.parametrize("then", ["mean", "ties", {"name": "ties", "density": 1.0}, {"name": "dare", "p": 0.0}, "tsv"])
def test_one_module_in_core_space_is_itself(then: Any) -> None:
    close(products(of_pairs(CoreSpace(then), MODULES[:1])), products(MODULES[0]))


def test_a_module_of_zeros_changes_no_sum_in_core_space() -> None:
    nothing = {n: torch.zeros_like(t) if n.endswith("lora_B") else t for n, t in module(7, 2).items()}
    for then in (TaskArithmetic(0.3), Ties(density=1.0)):
        got, want = (products(of_pairs(CoreSpace(then), several)) for several in ([*MODULES, nothing], MODULES))
        if isinstance(then, TaskArithmetic):
            close(got, want)
        else:
            assert all(torch.isfinite(d).all() for d in got.values())


def test_ties_in_core_space_is_ties_of_cores() -> None:
    """Against the rule on the cores that numpy's bases give; it is another result than on whole products."""
    bases, cores = {}, []
    for layer in LAYERS:
        u = np.linalg.svd(np.concatenate([m[f"{layer}.lora_B"].numpy() for m in MODULES], axis=1), full_matrices=False)[0]
        vt = np.linalg.svd(np.concatenate([m[f"{layer}.lora_A"].numpy() for m in MODULES]), full_matrices=False)[2]
        u *= np.sign(np.take_along_axis(u, np.abs(u).argmax(0)[None], 0))
        vt *= np.sign(np.take_along_axis(vt, np.abs(vt).argmax(1)[:, None], 1))
        bases[layer] = u, vt
    for k, m in enumerate(MODULES):
        own = {layer: torch.from_numpy(u.T @ products(m)[layer].numpy() @ vt.T) for layer, (u, vt) in bases.items()}
        cores.append(Member(f"task {k}", {**own, "head.bias": m["head.bias"]}))
    want = merged(Ties(density=0.4), cores, {n: torch.zeros_like(t) for n, t in cores[0].params.items()})
    got = of_pairs(CoreSpace({"name": "ties", "density": 0.4}), MODULES)
    for layer, (u, vt) in bases.items():
        np.testing.assert_allclose(products(got)[layer].numpy(), u @ want[layer].numpy() @ vt, rtol=0, atol=1e-12)
    whole = products(of_pairs(Ties(density=0.4), MODULES))
    assert all(float((whole[layer] - d).abs().max()) > 0.1 for layer, d in products(got).items())


def test_isotropic_makes_all_directions_count_alike() -> None:
    got, plain = (products(of_pairs(CoreSpace(scale=scale, isotropic=scale < 1), MODULES[:2])) for scale in (0.5, 1.0))
    for layer, merge in plain.items():
        sizes = torch.linalg.svdvals(merge)
        want = torch.cat([torch.full((3,), 0.5 * float(sizes[:3].mean())), torch.zeros(len(sizes) - 3)]).double()
        torch.testing.assert_close(torch.linalg.svdvals(got[layer]), want, rtol=0, atol=1e-6)
        u, _, vt = torch.linalg.svd(merge, full_matrices=False)
        torch.testing.assert_close(got[layer], 0.5 * sizes[:3].mean() * u[:, :3] @ vt[:3], rtol=0, atol=1e-10)


def test_core_space_over_clients_starts_from_the_servers_product() -> None:
    """Clients that did not move leave the server's product as it is, whatever the rule inside and its scale."""
    start = module(9, 2, torch.float32)
    updates = [ClientUpdate(k, 1 + k, dict(start)) for k in range(3)]
    for then in ("ties", {"name": "task_arithmetic", "scale": 1.0}, {"name": "dare", "p": 0.5}, "tsv"):
        rule = Merged({"name": "core_space", "then": then, "isotropic": then == "tsv"})
        state, out = rule.combine(rule.init(start), start, updates, torch.Generator())
        close(products(out), products(start), 1e-5)
        assert state["cut"] < 1e-6


# ---------------------------------------------------------------- TSV


def by_brute_force(deltas: Sequence[np.ndarray[Any, Any]], scale: float = 1.0) -> np.ndarray[Any, Any]:
    """As published, on whole matrices of full rank, in numpy."""
    k = min(deltas[0].shape) // len(deltas)
    parts = [np.linalg.svd(d, full_matrices=False) for d in deltas]
    u, s, v = (
        np.concatenate([p[0][:, :k] for p in parts], axis=1),
        np.concatenate([p[1][:k] for p in parts]),
        np.concatenate([p[2][:k].T for p in parts], axis=1),
    )
    (xu, _, yu), (xv, _, yv) = (np.linalg.svd(m, full_matrices=False) for m in (u, v))
    result: np.ndarray[Any, Any] = scale * (xu @ yu) @ np.diag(s) @ (xv @ yv).T
    return result


def test_tsv_is_what_is_published_on_whole_matrices() -> None:
    draws = [torch.randn(9, 12, dtype=torch.float64, generator=torch_stream(k, "tsv")) for k in range(3)]
    base = {"x.weight": draws[0] + draws[1], "x.bias": torch.ones(3, dtype=torch.float64)}
    several = [
        Member(f"task {k}", {"x.weight": base["x.weight"] + d, "x.bias": torch.full((3,), 1.0 + k)}) for k, d in enumerate(draws)
    ]
    got = merged(Tsv(scale=0.5), several, base)
    want = base["x.weight"].numpy() + by_brute_force([d.numpy() for d in draws], 0.5)
    np.testing.assert_allclose(got["x.weight"].numpy(), want, rtol=0, atol=1e-12)
    assert got["x.bias"].tolist() == [1.5, 1.5, 1.5]


@pytest.mark.parametrize("ranks", [(2, 3, 1), (4, 4)])
def test_tsv_of_pairs_is_that_of_their_products_in_low_rank(ranks: Sequence[int]) -> None:
    """The triplets that have a size, of which each keeps a T-th of the layer's; over clients, of what was added to the server's
    pair."""
    modules, start = [module(k, rank) for k, rank in enumerate(ranks)], module(9, 2)
    for origin in (_products.origin(start), start):
        got = _products.merged(Tsv(), [Member("", m) for m in modules], origin, torch.Generator())
        for layer, size in LAYERS.items():
            begun = products(origin)[layer]
            vectors = [Member("", {"x": products(m)[layer]}) for m in modules]
            want = merged(Tsv(), vectors, {"x": begun})["x"]
            torch.testing.assert_close(products(got)[layer], want, rtol=0, atol=1e-12)
            assert len(got[f"{layer}.lora_A"]) <= origin[f"{layer}.lora_A"].shape[0] + min(size)


def test_tsv_in_core_space_is_that_of_products_where_there_is_room_for_all() -> None:
    """Two modules of rank 2 each: a space of four directions leaves each of them two, and so do the layers."""
    modules = [module(k, 2) for k in range(2)]
    close(products(of_pairs(CoreSpace("tsv"), modules)), products(of_pairs(Tsv(), modules)))


def test_tsv_of_one_or_of_equals_is_itself_up_to_its_share() -> None:
    one = MODULES[0]
    close(products(of_pairs(Tsv(), [one])), products(one))
    close(products(of_pairs(Tsv(), [one] * 2)), products(one))  # of rank 2, and each keeps ⌊5/2⌋ triplets
    nothing = {n: torch.zeros_like(t) for n, t in one.items()}
    assert not any(d.any() for d in products(of_pairs(Tsv(), [nothing] * 2)).values())


def test_members_that_are_orthogonal_do_not_disturb_each_other_in_tsv() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    several = [Member(str(k), {"x": (3.0 - k) * eye[:, [k]] @ eye[[k + 3]]}) for k in range(3)]
    got = merged(Tsv(), several, {"x": torch.zeros(6, 6, dtype=torch.float64)})["x"]
    torch.testing.assert_close(got, sum(m.params["x"] for m in several))


# ---------------------------------------------------------------- options, and roles


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"name": "task_arithmetic", "scale": 0}, r"rule\.scale must not be 0"),
        ({"name": "task_arithmetic", "scale": "half"}, r"rule\.scale must be a number or mean, got 'half'"),
        ({"name": "fisher", "epsilon": 0}, r"rule\.epsilon must be positive"),
        ({"name": "fisher", "form": "diagonal"}, r"rule\.form 'diagonal' is unknown"),
        ({"name": "dare", "p": 1}, r"rule\.p must be in \[0, 1\), got 1\.0"),
        ({"name": "dare", "then": "core_space"}, r"rule\.then must merge number by number"),
        ({"name": "dare", "then": {"name": "ties", "density": 2}}, r"rule\.then\.density must be in"),
        ({"name": "dare", "then": "tie"}, r"unknown merging rule 'tie'\. Did you mean 'ties'"),
        ({"name": "core_space", "then": "regmean"}, r"rule\.then must be a rule that asks for no statistics, .* 'gram'"),
        ({"name": "core_space", "scale": 0}, r"rule\.scale must not be 0"),
        ({"name": "tsv", "scale": 0}, r"rule\.scale must not be 0"),
    ],
)
def test_bad_options_are_one_line(rule: Mapping[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as raised:
        expand("consolidators", {"name": "merged", "rule": rule}, "server.consolidator")
    assert "\n" not in str(raised.value)


def test_a_rule_on_pairs_takes_products_over_clients() -> None:
    assert Merged("core_space").products and Merged("tsv", "products").products and not Merged("ties").products
    with pytest.raises(ConfigError, match="pairs must be products or auto"):
        Merged("core_space", "factors")


@pytest.mark.parametrize("rule", ["core_space", "tsv", {"name": "core_space", "then": "ties"}])
def test_tasks_are_deployed_in_low_rank(rule: Any) -> None:
    consolidator = Consolidator(rule)
    state = consolidator.init()
    for task in range(3):
        pairs = {n: t for n, t in module(task, 1, torch.float32).items() if "lora" in n}
        state = consolidator.end_task(state, pairs, {}, torch_stream(0, "end", task))
    out = consolidator.deployed(state, pairs, finished=True)
    assert all(out[f"{layer}.lora_A"].shape[0] <= 3 and out[f"{layer}.lora_A"].dtype == torch.float32 for layer in LAYERS)


def test_the_space_of_tasks_does_not_hang_on_their_order() -> None:
    want = products(of_pairs(CoreSpace("ties"), MODULES))
    for order in itertools.permutations(range(3)):
        close(products(of_pairs(CoreSpace("ties"), [MODULES[k] for k in order])), want)
    assert Space.of(MODULES, "adapter.wide").left_Op.shape == (6, 6)


def test_a_file_of_the_users_inside_another_rule_is_part_of_the_run(tmp_path: Path) -> None:
    """However deep it lies."""
    path = tmp_path / "own.py"
    path.write_text(OWN)
    rule = {"name": "dare", "p": 0.5, "then": {"name": "dare", "then": str(path)}}
    sections = {"server": {"rounds": 1, "aggregator": {"name": "merged", "rule": rule}, "consolidator": "none"}}
    config = tiny(output=tmp_path, **sections)
    assert config.user_files() == [str(path)]
    before = config.identity()
    path.write_text(OWN + "\n")
    assert tiny(output=tmp_path, **sections).identity() != before


OWN = '''
from dataclasses import dataclass

from fedsim.core import contracts


@dataclass(frozen=True)
class Merging(contracts.Merging):
    """The first member."""

    def merge(self, members, base, draw):
        return members[0].params
'''


def test_fisher_over_tasks_weighs_products_and_sends_as_many_numbers(tmp_path: Path) -> None:
    """In a round as many numbers again as are trained; at a task's end m·d for every layer, once. Every client takes two steps:
    after one, B is zero still, nothing hangs on A, and equal zeros travel once."""
    rule = {"name": "merged", "rule": "fisher"}
    server = {"rounds": 1, "aggregator": rule, "consolidator": rule}
    sections = {"server": server, "client": {"epochs": 1, "batch_size": 4, "lr": 1e-2}}
    config = tiny(output=tmp_path, **sections)
    results = run(config)
    state = final_state(results.path, config)
    past, told_ = state.consolidator["past"], state.consolidator["statistics"]
    layers = [n.removesuffix(".lora_A") for n in past[0] if n.endswith(".lora_A")]
    sizes = {p: (len(past[0][f"{p}.lora_B"]), past[0][f"{p}.lora_A"].shape[1]) for p in layers}
    assert {k: t.shape for k, t in told_[0].items()} == {f"fisher.likelihood/{p}.lora_A": s for p, s in sizes.items()}
    trained = sum(t.numel() for t in state.params.values())
    assert results.costs["bytes"]["up"]["statistics"] == 2 * 3 * 4 * (trained + sum(m * d for m, d in sizes.values()))
    out = Consolidator("fisher").deployed(state.consolidator, state.params, finished=True)
    for p in layers:
        deltas = np.stack([(m[f"{p}.lora_B"].double() @ m[f"{p}.lora_A"].double()).numpy() for m in past])
        weights = np.stack([t[f"fisher.likelihood/{p}.lora_A"].numpy() for t in told_]) + 1e-12
        want = (weights * deltas).sum(0) / weights.sum(0)
        np.testing.assert_allclose((out[f"{p}.lora_B"] @ out[f"{p}.lora_A"]).numpy(), want, rtol=0, atol=1e-6)


def test_every_option_of_a_rule_within_a_rule_is_written_out() -> None:
    rule = build("merging", expand("merging", {"name": "core_space", "then": {"name": "dare", "then": "ties"}}, "rule"))
    assert rule.then["then"]["density"] == 0.2 and rule.then["p"] == 0.3


def test_fisher_of_frozen_tensors_is_refused_before_training() -> None:
    told = "asks for the statistic fisher of 'adapter.*lora_A', which consolidator dolfin freezes: nobody trains it"
    with pytest.raises(ConfigError, match=told):
        prepare(tiny(server={"rounds": 1, "aggregator": {"name": "merged", "rule": "fisher"}, "consolidator": "dolfin"}))
