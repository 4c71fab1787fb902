"""Chain of Merges, and the further looks of a round: against least squares by hand on a linear network, RegMean, and a run whose
looks are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.core.config import SimConfig
from fedsim.core.contracts import Further, Member
from fedsim.core.errors import AggregationError, ConfigError
from fedsim.core.messages import Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.tensors import LORA_A, LORA_B, upper_triangle
from fedsim.simulation import run
from server.consolidators.merged import Consolidator
from server.merging.chain_of_merges import Merging, fitted, low_rank
from server.merging.regmean import Merging as RegMean
from tests.tiny import final_state, plain_vit, tiny

FIRST, SECOND = "adapter.layers.0.fc.weight", "adapter.layers.1.fc.weight"
SHAPES = {FIRST: (4, 5), SECOND: (3, 4), "adapter.layers.1.fc.bias": (3,)}
RULE = {"aggregator": {"name": "merged", "rule": {"name": "chain_of_merges"}}, "consolidator": "mean"}


def draw(shape: Sequence[int], *address: str | int) -> Tensor:
    return torch.randn(tuple(shape), dtype=torch.float64, generator=torch_stream(0, "chain", *address))


def network(k: int) -> dict[str, Tensor]:
    """A linear network of two layers."""
    return {n: draw(s, n, k) for n, s in SHAPES.items()}


def data(k: int, samples: int = 30) -> Tensor:
    return draw((samples, 5), "data", k)


def chained(rule: Merging, several: Sequence[Member], inputs: Sequence[Tensor], base: Tensors) -> Tensors:
    """What the engine does, on the linear network."""
    look, members = rule.further(several, base, None, True), several
    while look.statistics:
        members = [replace(m, statistics=grams(look, m.params, x)) for m, x in zip(several, inputs, strict=True)]
        look = rule.further(members, base, look.merged, True)
    return look.merged


def grams(look: Further, own: Tensors, x_NI: Tensor) -> Tensors:
    """Of the inputs of the layers that are asked for, through what is merged and otherwise one's own."""
    through = {**own, **look.merged}
    seen = {FIRST: x_NI, SECOND: x_NI @ through[FIRST].T}
    return {f"gram.full/{n}": upper_triangle(seen[n].T @ seen[n]) for request in look.statistics for n in request.match}


def close(got: Tensor, want: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def test_each_layer_is_least_squares_on_what_the_merged_ones_before_it_give() -> None:
    """And the first one is RegMean's, the second is not: its inputs are others. The bias is the mean by samples."""
    networks, inputs = [network(k) for k in range(3)], [data(k) for k in range(3)]
    members = [Member(f"client {k}", w, float(k + 1)) for k, w in enumerate(networks)]
    out = chained(Merging(decay=1.0), members, inputs, networks[0])
    first = torch.linalg.lstsq(torch.cat(inputs), torch.cat([x @ w[FIRST].T for x, w in zip(inputs, networks, strict=True)]))
    close(out[FIRST], first.solution.T)
    seen = [x @ out[FIRST].T for x in inputs]
    second = torch.linalg.lstsq(torch.cat(seen), torch.cat([x @ w[SECOND].T for x, w in zip(seen, networks, strict=True)]))
    close(out[SECOND], second.solution.T)
    close(out["adapter.layers.1.fc.bias"], sum((k + 1) * w["adapter.layers.1.fc.bias"] for k, w in enumerate(networks)) / 6)

    own = [{FIRST: x, SECOND: x @ w[FIRST].T} for x, w in zip(inputs, networks, strict=True)]
    told = [{f"gram.full/{n}": upper_triangle(x.T @ x) for n, x in seen.items()} for seen in own]
    at_once = RegMean(decay=1.0).merge([replace(m, statistics=s) for m, s in zip(members, told, strict=True)], networks[0],
                                       torch.Generator())  # fmt: skip
    close(out[FIRST], at_once[FIRST])
    assert float((out[SECOND] - at_once[SECOND]).abs().max()) > 1e-2


@pytest.mark.parametrize("samples", [2, 30], ids=["fewer inputs than directions", "many"])
def test_one_member_and_equal_members_are_the_result(samples: int) -> None:
    """In directions too that no input has."""
    w = network(0)
    for several in ([Member("a", w)], [Member("a", w), Member("b", w, 3.0)]):
        out = chained(Merging(), several, [data(k, samples) for k in range(len(several))], w)
        for name, tensor in w.items():
            close(out[name], tensor)


def test_the_target_of_ones_own_outputs_is_joint_least_squares_given_the_merged_first_layer() -> None:
    """Of the second layer: what each client's own network gave, from what the merged first layer gives."""
    networks, inputs = [network(k) for k in range(3)], [data(k) for k in range(3)]
    members, rule, base = (
        [Member(f"client {k}", w) for k, w in enumerate(networks)],
        Merging(decay=1.0, target="own"),
        networks[0],
    )
    look, told = rule.further(members, base, None, True), members
    while look.statistics:
        assert [r.name for r in look.statistics] == ["gram", "response_gap"]
        told = []
        for m, x in zip(members, inputs, strict=True):
            through = {**m.params, **look.merged}
            own, seen = {FIRST: x, SECOND: x @ m.params[FIRST].T}, {FIRST: x, SECOND: x @ through[FIRST].T}
            (name,) = look.statistics[0].match
            gap = ((own[name] - seen[name]) @ m.params[name].T).T @ seen[name]
            told.append(replace(m, statistics={**grams(look, m.params, x), f"response_gap.map/{name}": gap}))
        look = rule.further(told, base, look.merged, True)
    seen_by_all = torch.cat([x @ look.merged[FIRST].T for x in inputs])
    given = torch.cat([x @ w[FIRST].T @ w[SECOND].T for x, w in zip(inputs, networks, strict=True)])
    close(look.merged[SECOND], torch.linalg.lstsq(seen_by_all, given).solution.T)


def test_who_fails_in_a_look_is_left_out_of_that_group() -> None:
    networks, inputs = [network(k) for k in range(3)], [data(k) for k in range(3)]
    members = [Member(f"client {k}", w) for k, w in enumerate(networks)]
    rule, base = Merging(decay=1.0), networks[0]
    look = rule.further(members, base, None, True)
    told = [replace(m, statistics=grams(look, m.params, x)) for m, x in zip(members[:2], inputs[:2], strict=True)]
    without = rule.further([*told, members[2]], base, look.merged, True)
    of_two = rule.further(told, base, rule.further(members[:2], base, None, True).merged, True)
    close(without.merged[FIRST], of_two.merged[FIRST])
    assert [r.match for r in without.statistics] == [(SECOND,)]


def test_groups_are_blocks_or_layers_in_the_order_of_the_encoder() -> None:
    names = [f"adapter.layers.{b}.{part}" for b in range(2) for part in ("attn.q", "attn.k", "mlp.fc1")]
    params = {n + factor: torch.zeros(2, 2) for n in names for factor in (LORA_A, LORA_B)}
    params |= {"head.weight": torch.zeros(3, 2), "head.bias": torch.zeros(3), "adapter.norm.weight": torch.zeros(2)}
    pairs = [(n + LORA_A, n + LORA_B) for n in names]
    assert Merging().groups(params) == [pairs[:3], pairs[3:], [("head.weight",)]]
    assert Merging(granularity="layer").groups(params) == [*([p] for p in pairs), [("head.weight",)]]


# ---------------------------------------------------------------- products


def test_a_product_is_cut_to_its_rank_where_that_costs_least() -> None:
    """Against the first singular values of W G^½, and no product of that rank found by descent is better."""
    map_OI, x_NI, a_RI = (
        draw((6, 7), "map"),
        draw((40, 7), "x") * torch.linspace(0.1, 3, 7, dtype=torch.float64),
        draw((2, 7), "a"),
    )
    a, b = low_rank(map_OI, x_NI.T @ x_NI, a_RI)
    lost = float(((b @ a - map_OI) @ x_NI.T).square().sum())
    assert lost == pytest.approx(float(torch.linalg.svdvals(map_OI @ x_NI.T)[2:].square().sum()), rel=1e-6)
    plain_u, plain_s, plain_v = torch.linalg.svd(map_OI)
    plain = (plain_u[:, :2] * plain_s[:2]) @ plain_v[:2]
    assert lost < 0.999 * float(((plain - map_OI) @ x_NI.T).square().sum()), "the inputs must matter"


def test_a_product_of_its_rank_keeps_its_factors() -> None:
    a, b = draw((2, 7), "a"), draw((6, 2), "b")
    for x_NI in (draw((40, 7), "x"), torch.zeros(3, 7, dtype=torch.float64)):
        got_a, got_b = low_rank(b @ a, x_NI.T @ x_NI, a)
        close(got_a, a, 1e-7)
        close(got_b, b, 1e-7)


def test_factors_stay_at_the_scale_of_the_mean() -> None:
    """Also where the mean A hardly sees the rows of the product: B must not blow up to make up for it."""
    product = draw((6, 1), "b") @ draw((1, 7), "a") + draw((6, 1), "c") @ draw((1, 7), "d")
    rows = torch.linalg.svd(product).Vh[:2]
    away = draw((2, 7), "away")
    away = away - away @ rows.T @ rows + 1e-3 * rows
    a, b = low_rank(product, torch.eye(7, dtype=torch.float64), away)
    close(b @ a, product)
    sizes = torch.linalg.svdvals(away)
    assert float(torch.linalg.svdvals(a)[-1]) >= 0.999 * min(float(sizes[-1]), float(sizes.mean()) / 2)


def test_a_product_of_nothing_keeps_a() -> None:
    a = draw((2, 7), "a")
    got_a, got_b = low_rank(torch.zeros(6, 7, dtype=torch.float64), torch.eye(7, dtype=torch.float64), a)
    assert torch.equal(got_a, a) and not got_b.any()


def test_pairs_of_several_ranks_are_merged_as_their_products() -> None:
    """Against the maps themselves, cut to the server's rank."""
    a, b = ("adapter.x" + factor for factor in (LORA_A, LORA_B))
    base = {a: draw((2, 5), "base a"), b: draw((4, 2), "base b")}
    pairs = [{a: draw((r, 5), "a", r), b: draw((4, r), "b", r)} for r in (1, 2, 3)]
    inputs = [data(k) for k in range(3)]
    told = [{f"gram.full/{a}": upper_triangle(x.T @ x)} for x in inputs]
    out = fitted([Member(str(k), p, 1.0 + k, s) for k, (p, s) in enumerate(zip(pairs, told, strict=True))], base, (a, b))
    whole = torch.linalg.lstsq(torch.cat(inputs), torch.cat([x @ (p[b] @ p[a]).T for x, p in zip(inputs, pairs, strict=True)]))
    want_a, want_b = low_rank(whole.solution.T, sum(x.T @ x for x in inputs), base[a])  # type: ignore[arg-type]
    close(out[b] @ out[a], want_b @ want_a)
    with pytest.raises(AggregationError, match=r"2 has 'adapter\.x\.lora_A' of another shape"):
        Merging(rounds="last").further([Member(str(k), p) for k, p in enumerate(pairs[1:], 1)], base, None, False)


# ---------------------------------------------------------------- in runs


def chain(tmp_path: Path, *overrides: str) -> SimConfig:
    return tiny("stream.tasks=1", "server.rounds=1", *overrides, output=tmp_path, server=RULE, model=plain_vit())


def test_one_client_alone_is_fedavg(tmp_path: Path) -> None:
    """Up to rounding: its own numbers come back, factor by factor."""
    one = ("partition.clients=1", "stream.tasks=1", "server.rounds=1")
    chained, plain = (
        chain(tmp_path / "chain", *one),
        tiny(*one, output=tmp_path / "plain", model=plain_vit(), server={"consolidator": "mean", "aggregator": "fedavg"}),
    )
    got, want = (final_state(run(c).path, c).params for c in (chained, plain))
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6)


def test_bytes_of_a_round_and_its_looks(tmp_path: Path) -> None:
    """Up: the Grams of every map as triangles, those of queries, keys and values once. Down: nothing that a client has: the
    parameters once and what was merged in each look, but for the last group, which the next round sends."""
    config = chain(tmp_path)
    result = run(config)
    state = final_state(result.path, config)
    sizes = {n: t.numel() for n, t in state.params.items()}
    adapter, head = (sum(v for n, v in sizes.items() if n.startswith(kind)) for kind in ("adapter", "head"))
    triangle = lambda d: d * (d + 1) // 2  # noqa: E731
    grams = 2 * (3 * triangle(16) + triangle(32)) + triangle(16)  # of 2 blocks: q k v, output, fc1 and fc2; the head's features
    clients = config.partition["clients"]
    assert state.bytes["up"] == {"adapter": 4 * clients * adapter, "head": 4 * clients * head, "statistics": 4 * clients * grams}
    bias = sizes["head.bias"]
    assert state.bytes["down"]["adapter"] == 4 * clients * 2 * adapter
    assert state.bytes["down"]["head"] == 4 * clients * (head + bias)
    assert state.client_rounds == 4 * clients


def test_the_gap_is_what_the_merged_part_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run with s = 2: (W + s B_i A_i)(x_i − x̂_i) against the hooks of two passes, by the products with x̂; none in the first
    block's queries, whose inputs nobody trains."""
    from clients.statistics.response_gap import Statistic

    found: list[tuple[str, float, float]] = []
    real = Statistic.measured

    def measured(self, work, params, subjects):  # type: ignore[no-untyped-def]
        sent = real(self, work, params, subjects)
        for s in subjects:
            name, layer = s.removesuffix(LORA_A), None if s == "head.weight" else work.model.layer(s)
            merged, own = ([b[s][0] for b in work.passing(work.shard, [s], p)] for p in (params, work.own))
            x, x_own = (torch.cat(parts).flatten(0, -2).double() for parts in (merged, own))
            w = (
                work.own[s].double()
                if layer is None
                else layer.weight.double() + 2 * (work.own[name + LORA_B] @ work.own[s]).double()
            )
            want = ((x_own - x) @ w.T).T @ x / (1 if layer is None else 2)
            found.append((s, float((sent[f"map/{s}"] - want).abs().max() / (1 + want.abs().max())), float(want.abs().max())))
        return sent

    monkeypatch.setattr(Statistic, "measured", measured)
    rule = {**RULE, "aggregator": {"name": "merged", "rule": {"name": "chain_of_merges", "target": "own"}}}
    adapter = {"name": "lora", "rank": 2, "targets": "all-linear", "alpha": 4.0}
    run(tiny("stream.tasks=1", "server.rounds=1", output=tmp_path, server=rule, adapter=adapter, model=plain_vit()))
    assert len(found) == 3 * 13 and max(off for _, off, _ in found) < 1e-3
    sizes = {s: size for s, _, size in found}
    assert sizes["adapter.layers.0.attention.q_proj.lora_A"] == 0 and sizes["adapter.layers.1.mlp.fc2.lora_A"] > 1e-3


def test_looks_only_in_a_tasks_last_round(tmp_path: Path) -> None:
    """By default: nothing is trained from what was merged, or modules grow from round to round."""
    config = tiny("stream.tasks=1", "server.rounds=3", output=tmp_path, model=plain_vit(), server=RULE)
    assert final_state(run(config).path, config).client_rounds == 3 * (3 + 3)


def test_a_look_sees_the_clients_own_module_but_for_what_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Grams of the second block, of every client, against a pass of the model with those tensors."""
    from clients import local

    seen: list[tuple[int, dict[str, Tensor], tuple[str, ...]]] = []
    real = local.collect

    def collect(work, own, kept):  # type: ignore[no-untyped-def]
        if work.plan.merged is not None:
            seen.append((work.client_id, {n: t.clone() for n, t in own.items()}, work.plan.merged))
        return real(work, own, kept)

    monkeypatch.setattr(local, "collect", collect)
    trained: dict[int, Tensors] = {}
    real_further = Merging.further

    def further(self, members, base, merged, last):  # type: ignore[no-untyped-def]
        trained.update({int(m.who.split()[1]): m.params for m in members})
        return real_further(self, members, base, merged, last)

    monkeypatch.setattr(Merging, "further", further)
    run(chain(tmp_path))
    assert [len(merged) for _, _, merged in seen[::3]] == [1, 13, 25]
    for client, own, merged in seen:
        for name, tensor in own.items():
            assert torch.equal(tensor, trained[client][name]) == (name not in merged) or not tensor.any()


# ---------------------------------------------------------------- bad input


def test_tasks_are_not_merged_so() -> None:
    with pytest.raises(ConfigError, match="chain_of_merges looks at the data of all that it merges, and those of past tasks"):
        Consolidator(rule="chain_of_merges")
    with pytest.raises(AggregationError, match="part after part"):
        Merging().merge([Member("a", network(0)), Member("b", network(1))], network(0), torch.Generator())


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("head=cosine",), "no linear map of its inputs"),
        (("server.unlearning=true",), "looks at clients' data again before every merge"),
    ],
)
def test_bad_input_in_one_line(tmp_path: Path, overrides: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as e:
        run(chain(tmp_path, *overrides))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("options", [{"decay": 2.0}, {"granularity": "head"}, {"rounds": "first"}, {"target": "both"}])
def test_options_are_checked(options: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Merging(**options)
