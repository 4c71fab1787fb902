"""LoRA pairs merged as their products: the small space that they span, ranks that differ, and the way back to one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from fedsim.core.contracts import Member
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate, Tensors
from fedsim.core.rng import torch_stream
from server.aggregators.merged import Aggregator
from server.merging import _products
from server.merging._core import Space
from server.merging.mean import Merging as Mean
from server.merging.ties import Merging as Ties

LAYERS = {"adapter.wide": (6, 9), "adapter.tall": (11, 5)}  # outputs, inputs
RANKS = (2, 3, 1)


def module(seed: int, rank: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shapes = {}
    for layer, (outputs, inputs) in LAYERS.items():
        shapes |= {f"{layer}.lora_A": (rank, inputs), f"{layer}.lora_B": (outputs, rank)}
    shapes["head.bias"] = (4,)
    return {n: torch.randn(s, dtype=torch.float64, generator=torch_stream(seed, "pairs", n)).to(dtype) for n, s in shapes.items()}


def products(tensors: Tensors) -> dict[str, Tensor]:
    return {layer: tensors[f"{layer}.lora_B"] @ tensors[f"{layer}.lora_A"] for layer in LAYERS}


def close(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float = 1e-12) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=tolerance)


def members(ranks: Sequence[int] = RANKS) -> list[Member]:
    return [Member(f"model {k}", module(k, rank), 1.0 + k) for k, rank in enumerate(ranks)]


def mean_of(several: Sequence[Member]) -> dict[str, Tensor]:
    total = sum(m.weight for m in several)
    return {layer: sum(m.weight / total * products(m.params)[layer] for m in several) for layer in LAYERS}  # type: ignore[misc]


def test_nothing_is_lost_in_core_space() -> None:
    """U C_i V = B_i A_i for pairs of ranks that differ, more of them than the layer has outputs; bases are orthonormal."""
    modules = [module(k, rank) for k, rank in enumerate((2, 3, 1, 4))]
    for layer, (outputs, inputs) in LAYERS.items():
        space = Space.of(modules, layer)
        assert space.left_Op.shape == (outputs, min(10, outputs)) and space.right_qI.shape == (min(10, inputs), inputs)
        torch.testing.assert_close(space.left_Op.T @ space.left_Op, torch.eye(min(10, outputs), dtype=torch.float64))
        for rows in (space.right_qI, space.left_Op.T):
            assert bool((rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()), "signs are not the library's"
        for one in modules:
            a_RI, b_OR = space.pair(space.core(one, layer))
            assert len(a_RI) == min(10, outputs, inputs)
            torch.testing.assert_close(b_OR @ a_RI, products(one)[layer], rtol=0, atol=1e-12)


def test_padded_ranks_are_no_ranks() -> None:
    """A pair with rows and columns of zeros spans what it spans without them, and so does one whose B does nothing."""
    padded = {n: torch.cat([t, torch.zeros_like(t)], dim=int(n.endswith("B"))) for n, t in module(0, 2).items() if "lora" in n}
    for layer in LAYERS:
        got, want = Space.of([padded, module(1, 1)], layer), Space.of([module(0, 2), module(1, 1)], layer)
        assert got.left_Op.shape == want.left_Op.shape and got.right_qI.shape == want.right_qI.shape
        torch.testing.assert_close(got.core(padded, layer), want.core(module(0, 2), layer), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranks", [RANKS, (4, 4, 4, 4)])
def test_a_linear_rule_merges_products_in_low_rank(ranks: Sequence[int]) -> None:
    several = members(ranks)
    out = _products.merged(Mean(), several, _products.origin(several[0].params), torch.Generator())
    close(products(out), mean_of(several))
    for layer, size in LAYERS.items():
        assert len(out[f"{layer}.lora_A"]) == min(sum(ranks), *size)
    torch.testing.assert_close(
        out["head.bias"], sum(m.weight * m.params["head.bias"] for m in several) / sum(m.weight for m in several)
    )


@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_the_way_back_to_a_rank_is_the_best_one(rank: int) -> None:
    """Against numpy's decomposition of the whole product: what is cut is the root of the sum of squares of the other values."""
    whole, like = module(0, 3), module(5, rank)
    out, cut = _products.truncated(whole, like)
    lost = total = 0.0
    for layer in LAYERS:
        u, s, vt = torch.linalg.svd(products(whole)[layer], full_matrices=False)
        torch.testing.assert_close(products(out)[layer], (u[:, :rank] * s[:rank]) @ vt[:rank], rtol=0, atol=1e-12)
        a, b = out[f"{layer}.lora_A"], out[f"{layer}.lora_B"]
        assert a.shape == like[f"{layer}.lora_A"].shape and b.shape == like[f"{layer}.lora_B"].shape
        kept = min(rank, 3)
        torch.testing.assert_close(b[:, :kept].T @ b[:, :kept], torch.diag(s[:kept]), rtol=0, atol=1e-10)
        torch.testing.assert_close(a[:kept] @ a[:kept].T, torch.diag(s[:kept]), rtol=0, atol=1e-10)
        assert torch.equal(a[kept:], like[f"{layer}.lora_A"][kept:]) and not b[:, kept:].any(), "still to be trained"
        lost, total = lost + float(s[rank:].square().sum()), total + float(s.square().sum())
    assert cut == pytest.approx((lost / total) ** 0.5, abs=1e-12)
    assert out["head.bias"] is whole["head.bias"]


def test_nothing_to_cut() -> None:
    nothing = {n: torch.zeros_like(t) for n, t in module(0, 2).items()}
    out, cut = _products.truncated(nothing, module(1, 2))
    assert cut == 0.0 and not any(d.any() for d in products(out).values())
    assert torch.equal(out["adapter.wide.lora_A"], module(1, 2)["adapter.wide.lora_A"])


def updates(ranks: Sequence[int]) -> list[ClientUpdate]:
    return [ClientUpdate(k, 1 + k, module(k, rank, torch.float32)) for k, rank in enumerate(ranks)]


def test_mean_of_products_over_clients_is_the_best_of_the_servers_rank() -> None:
    """FlexLoRA: from clients of unequal ranks, each with a pair of its own shape; types and shapes are the server's."""
    start, rule = module(9, 4, torch.float32), Aggregator("mean", "products")
    state, out = rule.combine(rule.init(start), start, updates(RANKS), torch.Generator())
    want, cut = _products.truncated(_products.merged(Mean(), members(), start, torch.Generator()), module(9, 4))
    assert {n: (t.shape, t.dtype) for n, t in out.items()} == {n: (t.shape, t.dtype) for n, t in start.items()}
    exact = mean_of(members())
    for layer in LAYERS:
        got = out[f"{layer}.lora_B"].double() @ out[f"{layer}.lora_A"].double()
        torch.testing.assert_close(got, products(want)[layer], rtol=0, atol=1e-5)
        u, s, vt = torch.linalg.svd(exact[layer], full_matrices=False)
        torch.testing.assert_close(got, (u[:, :4] * s[:4]) @ vt[:4], rtol=0, atol=1e-5)
    assert 0 < state["cut"] < 1 and state["cut"] == pytest.approx(cut, rel=1e-5)


def test_products_over_clients_that_fit_the_rank_are_exact() -> None:
    """Three clients of rank 1 and a server of rank 3: nothing is cut, where averaging the factors would lose."""
    start, rule = module(9, 3, torch.float32), Aggregator("mean", "products")
    state, out = rule.combine(rule.init(start), start, updates((1, 1, 1)), torch.Generator())
    for layer, want in mean_of(members((1, 1, 1))).items():
        torch.testing.assert_close(out[f"{layer}.lora_B"] @ out[f"{layer}.lora_A"], want.float(), rtol=0, atol=1e-5)
    assert state["cut"] < 1e-7


def test_a_rule_that_is_not_linear_sees_whole_products_over_clients() -> None:
    start, rule = module(9, 5), Aggregator({"name": "ties", "density": 0.5}, "products")
    sent = [ClientUpdate(k, 1, module(k, 2)) for k in range(3)]
    out = rule.combine(rule.init(start), start, sent, torch.Generator())[1]
    seen = [Member("", {**products(u.params), "head.bias": u.params["head.bias"]}) for u in sent]
    want = Ties(density=0.5).merge(seen, {**products(start), "head.bias": start["head.bias"]}, torch.Generator())
    torch.testing.assert_close(out["head.bias"], want["head.bias"], rtol=0, atol=1e-12)
    u, s, vt = torch.linalg.svd(want["adapter.wide"], full_matrices=False)
    torch.testing.assert_close(products(out)["adapter.wide"], (u[:, :5] * s[:5]) @ vt[:5], rtol=0, atol=1e-12)
    torch.testing.assert_close(products(out)["adapter.tall"], want["adapter.tall"], rtol=0, atol=1e-12)


def test_one_factor_alone_is_merged_as_it_is() -> None:
    start, rule = module(9, 2), Aggregator("mean", "products")
    sent = [ClientUpdate(k, 1, {n: t for n, t in module(k, 2).items() if n.endswith("lora_B")}) for k in range(2)]
    out = rule.combine(rule.init(start), start, sent, torch.Generator())[1]
    name = "adapter.wide.lora_B"
    torch.testing.assert_close(out[name], (sent[0].params[name] + sent[1].params[name]) / 2)
    assert torch.equal(out["adapter.wide.lora_A"], start["adapter.wide.lora_A"])


def test_grams_of_products_are_asked_of_the_layers_inputs() -> None:
    rule = Aggregator("regmean", "products")
    (of_layers, of_head) = rule.plan(rule.init({**module(0, 2), "head.weight": torch.zeros(3, 2)}), 0).statistics
    assert of_layers.match == ("adapter.wide.lora_A", "adapter.tall.lora_A") and of_head.match == ("head.weight",)


def test_bad_pairs() -> None:
    with pytest.raises(ConfigError, match=r"pairs .product. is unknown"):
        Aggregator("mean", "product")
    assert Aggregator("mean").additive and not Aggregator("mean", "products").additive
