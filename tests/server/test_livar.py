"""LIVAR: the layer-importance table, head rows by spread, and what it leaves alone.

Shapes: K clients, L layers, O outputs, I inputs, R rank, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.core.config import build
from fedsim.core.errors import AggregationError, ConfigError
from fedsim.core.messages import ClientUpdate, State, Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.tensors import LORA_A, LORA_B, lora_layers
from fedsim.simulation import run
from server.aggregators._grouped import Aggregator as Grouped
from server.aggregators.fedavg import Aggregator as FedAvg
from server.aggregators.livar import Aggregator as Livar
from server.aggregators.livar import layer_weights
from server.aggregators.variance_weighted import Aggregator as VarianceWeighted
from tests.tiny import final_state, learned, same_bits, tiny

K, L, O, I, R, C, D = 7, 3, 4, 5, 2, 4, 3  # noqa: E741
LAYERS = [f"adapter.layers.{k}" for k in range(L)]
ODD = "adapter.prompt"  # an adapter's tensor that is no LoRA factor
SPREAD = "class_moments.spread/head.weight"


def draw(*address: str | int, shape: Sequence[int]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch_stream(4, "livar", *address))


def params() -> dict[str, Tensor]:
    out = {ODD: draw("odd", shape=(3, D)), "head.weight": draw("H", shape=(C, D)), "head.bias": draw("b", shape=(C,))}
    for layer in LAYERS:
        out |= {layer + LORA_A: draw(layer, "A", shape=(R, I)), layer + LORA_B: draw(layer, "B", shape=(O, R))}
    return out


def clients(round: int = 0, ids: Sequence[int] = range(K)) -> list[ClientUpdate]:
    """Client 1 alone holds class 2, nobody holds class 3; every client's numbers differ."""
    updates = []
    for k in ids:
        own = {n: t + draw("own", k, round, n, shape=t.shape) for n, t in params().items()}
        signals = draw("signals", k, round, shape=(2, L)).exp()
        sent = {
            f"path_integral.movement/{p}{f}": signals[i, j] for i, f in enumerate((LORA_A, LORA_B)) for j, p in enumerate(LAYERS)
        }
        sent |= {n.replace("movement", "gradient"): 1 / t for n, t in sent.items()}
        spread = draw("spread", k, shape=(C,)).square() * torch.tensor([1.0, 1.0, k == 1, 0.0])
        updates.append(ClientUpdate(k, 3 + 2 * k, own, sent | {SPREAD: spread}))
    return updates


def with_signals(updates: Sequence[ClientUpdate], a_KL: Tensor, b_KL: Tensor) -> list[ClientUpdate]:
    out = []
    for k, u in enumerate(updates):
        sent = {f"path_integral.movement/{p}{LORA_A}": a_KL[k, j] for j, p in enumerate(LAYERS)}
        sent |= {f"path_integral.movement/{p}{LORA_B}": b_KL[k, j] for j, p in enumerate(LAYERS)}
        out.append(replace(u, statistics={**u.statistics, **sent}))
    return out


def merge(rule: Livar, updates: Sequence[ClientUpdate], start: Tensors | None = None) -> tuple[State, Tensors]:
    start = params() if start is None else start
    return rule.combine(rule.init(start), start, updates, torch.Generator())


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def by_the_sheet(signal_a: np.ndarray, signal_b: np.ndarray) -> np.ndarray:
    """Weights (K, L) with the comparisons written out."""
    a25, a50 = np.quantile(signal_a, 0.25), np.quantile(signal_a, 0.5)
    b60, b80 = np.quantile(signal_b, 0.6), np.quantile(signal_b, 0.8)
    score = np.zeros_like(signal_a)
    for at in np.ndindex(*score.shape):
        a, b = signal_a[at], signal_b[at]
        if b < b60:
            score[at] = 0.03813978
        elif b > b80:
            score[at] = 0.19313978 if a < a25 else 0.09313978 if a > a50 else 0.11813978
        else:
            score[at] = 0.09813978 if a < a25 else 0.07813978 if a > a50 else 0.08813978
    weights: np.ndarray = score / score.sum(axis=0)
    return weights


def weights_of(signal_a: Sequence[float], signal_b: Sequence[float]) -> list[float]:
    """One layer's weights."""
    a, b = (torch.tensor(s, dtype=torch.float64)[:, None] for s in (signal_a, signal_b))
    return layer_weights(a, b, torch.full((len(a),), 1 / len(a), dtype=torch.float64))[:, 0].tolist()


# ---------------------------------------------------------------- the table


def test_table_by_hand() -> None:
    """s^B = 1, 2, 3, 10: B60 = 2 + 0.8 = 2.8, B80 = 3 + 0.4·7 = 5.8, so low, low, middle, high.
    s^A = 4, 3, 2, 1: A25 = 1.75, A50 = 2.5, so high, high, middle, low."""
    scores = [0.03813978, 0.03813978, 0.08813978, 0.19313978]
    assert weights_of([4, 3, 2, 1], [1, 2, 3, 10]) == pytest.approx([s / 0.35755912 for s in scores], abs=1e-15)


def test_much_movement_in_b_with_little_in_a_counts_most() -> None:
    """Oracle (e): (B high, A low) : (B low) = 0.19313978 : 0.03813978."""
    weights = weights_of([1, 2, 3, 4, 5, 6], [6, 1, 2, 3, 4, 5])
    assert weights[0] / weights[1] == pytest.approx(0.19313978 / 0.03813978, rel=1e-14)
    assert max(weights) == weights[0]


@pytest.mark.parametrize(
    ("a", "b", "score"),
    [
        (0, 0, 0.03813978), (2, 0, 0.03813978), (9, 0, 0.03813978),
        (0, 7, 0.09813978), (3, 7, 0.08813978), (9, 7, 0.07813978),
        (0, 9, 0.19313978), (3, 9, 0.11813978), (9, 9, 0.09313978),
    ],
)  # fmt: skip
def test_every_cell_of_the_table(a: int, b: int, score: float) -> None:
    """Signals 0 to 9 each: A25 = 2.25, A50 = 4.5, B60 = 5.4, B80 = 7.2. The client in question holds `a` and `b`; all cells are
    compared with a client of low B."""
    others = [x for x in range(10) if x != a], [x for x in range(10) if x != b]
    if b == 0:
        others[1].sort(key=lambda x: (x != 1, x))
    else:
        others[1].sort(key=lambda x: (x != 0, x))
    weights = weights_of([a, *others[0]], [b, *others[1]])
    assert weights[0] / weights[1] == pytest.approx(score / 0.03813978, rel=1e-13)


def test_what_lies_on_a_quantile_is_in_the_middle() -> None:
    """s^B = 0 … 5: B60 = 3 and B80 = 4 are clients' own numbers. s^A = 0 … 4: A25 = 1 and A50 = 2 are. All equal: all middle."""
    weights = weights_of([0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5])
    scores = [0.03813978] * 3 + [0.08813978] * 2 + [0.11813978]
    assert weights == pytest.approx([s / sum(scores) for s in scores], abs=1e-15)
    weights = weights_of([0, 1, 2, 3, 4], [7, 7, 7, 7, 7])
    scores = [0.09813978, 0.08813978, 0.08813978, 0.07813978, 0.07813978]
    assert weights == pytest.approx([s / sum(scores) for s in scores], abs=1e-15)


signals = st.integers(0, 10_000).flatmap(
    lambda seed: st.tuples(st.just(seed), st.integers(1, 9), st.integers(1, 6), st.booleans())
)


@settings(max_examples=80)
@given(case=signals)
def test_weights_are_those_of_the_sheet(case: tuple[int, int, int, bool]) -> None:
    """Also with many ties (signals of few values), where quantiles are clients' own numbers. Oracle (a): columns sum to 1."""
    seed, num_clients, num_layers, ties = case
    generator = np.random.default_rng(seed)
    shape = num_clients, num_layers
    a, b = (generator.integers(0, 4, shape).astype(float) if ties else generator.exponential(size=shape) for _ in range(2))
    shares = torch.from_numpy(generator.dirichlet(np.ones(num_clients)))
    got = layer_weights(torch.from_numpy(a), torch.from_numpy(b), shares)
    np.testing.assert_allclose(got.numpy(), by_the_sheet(a, b), rtol=0, atol=1e-15)
    np.testing.assert_allclose(got.sum(dim=0).numpy(), 1, rtol=0, atol=1e-15)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), scale_a=st.sampled_from([2.0**-20, 0.5, 1024.0]), scale_b=st.sampled_from([2.0**-9, 64.0]))
def test_only_the_order_of_signals_counts(seed: int, scale_a: float, scale_b: float) -> None:
    """Scaled signals give the same weights, and clients in another order the same weights in that order."""
    generator = np.random.default_rng(seed)
    a, b = (torch.from_numpy(generator.exponential(size=(6, 4))) for _ in range(2))
    shares, order = torch.full((6,), 1 / 6, dtype=torch.float64), torch.from_numpy(generator.permutation(6))
    want = layer_weights(a, b, shares)
    assert torch.equal(layer_weights(scale_a * a, scale_b * b, shares), want)
    close(layer_weights(a[order], b[order], shares), want[order])


def test_a_signal_that_is_not_finite_leaves_its_layer_to_sample_shares() -> None:
    a, b = torch.arange(8.0).view(4, 2).double(), torch.arange(8.0).flip(0).view(4, 2).double()
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    for bad in (float("nan"), float("inf")):
        broken = a.clone()
        broken[2, 0] = bad
        got = layer_weights(broken, b, shares)
        assert torch.equal(got[:, 0], shares)
        np.testing.assert_array_equal(got[:, 1], layer_weights(a[:, 1:], b[:, 1:], shares)[:, 0])
    assert torch.equal(layer_weights(a * float("nan"), b, shares), shares[:, None].expand(4, 2))


# ---------------------------------------------------------------- a whole merge


def test_a_merge_written_out() -> None:
    """Every tensor, with loops and numpy."""
    updates = clients()
    _, got = merge(Livar(), updates)
    signal = {
        f: np.array([[float(u.statistics[f"path_integral.movement/{p}{f}"]) for p in LAYERS] for u in updates])
        for f in (LORA_A, LORA_B)
    }
    omega = by_the_sheet(signal[LORA_A], signal[LORA_B])
    for j, p in enumerate(LAYERS):
        for f in (LORA_A, LORA_B):
            want = sum(omega[k, j] * u.params[p + f].numpy() for k, u in enumerate(updates))
            np.testing.assert_allclose(got[p + f].numpy(), want, rtol=0, atol=1e-13)
    n = sum(u.num_samples for u in updates)
    want = sum(u.num_samples / n * u.params[ODD].numpy() for u in updates)
    np.testing.assert_allclose(got[ODD].numpy(), want, rtol=0, atol=1e-13)
    for c in range(C - 1):
        v = np.array([float(u.statistics[SPREAD][c]) for u in updates])
        for name in ("head.weight", "head.bias"):
            want = sum(v[k] / v.sum() * u.params[name][c].numpy() for k, u in enumerate(updates))
            np.testing.assert_allclose(got[name][c].numpy(), want, rtol=0, atol=1e-13)
    assert torch.equal(got["head.weight"][3], params()["head.weight"][3])  # nobody's class


def test_a_class_of_one_client_takes_its_row() -> None:
    """Oracle (d): to the bit in float32, which is what travels."""
    single = [replace(u, params={n: t.float() for n, t in u.params.items()}) for u in clients()]
    _, got = merge(Livar(), single, {n: t.float() for n, t in params().items()})
    assert torch.equal(got["head.weight"][2], single[1].params["head.weight"][2])
    assert got["head.bias"][2] == single[1].params["head.bias"][2]


def test_equal_signals_give_the_uniform_mean() -> None:
    """Oracle (c)."""
    ones = torch.ones(K, L, dtype=torch.float64)
    updates = with_signals(clients(), 3 * ones, ones)
    _, got = merge(Livar(), updates)
    for name in [n for n in got if "lora" in n]:
        close(got[name], torch.stack([u.params[name] for u in updates]).mean(0))


@settings(max_examples=15)
@given(order=st.permutations(range(K)))
def test_the_order_of_clients_does_not_matter(order: list[int]) -> None:
    """Oracle (b)."""
    updates = clients()
    _, want = merge(Livar(), updates)
    _, got = merge(Livar(), [updates[k] for k in order])
    for name in want:
        close(got[name], want[name])


def test_clients_without_samples_count_nowhere() -> None:
    idle = ClientUpdate(99, 0, params(), {n: torch.zeros_like(t) for n, t in clients()[0].statistics.items()})
    for rule in (Livar(), Livar(evaluated="products", cumulative=True)):
        (state, got), (want_state, want) = merge(rule, [*clients(), idle, replace(idle, client_id=98)]), merge(rule, clients())
        assert same_bits(got, want)
        assert same_bits(state, want_state)


def test_the_head_is_that_of_variance_weighting_to_the_bit() -> None:
    start, updates = params(), clients()
    _, want = VarianceWeighted().combine({}, start, updates, torch.Generator())
    _, got = merge(Livar(), updates)
    for name in ("head.weight", "head.bias", ODD):
        assert torch.equal(got[name], want[name])


def test_signals_are_the_ones_that_were_asked_for() -> None:
    for signal in ("movement", "gradient"):
        rule = Livar(signal=signal)
        (asked, spread) = rule.plan(rule.init(params()), 0).statistics
        assert (asked.name, dict(asked.options)) == ("path_integral", {"form": signal})
        assert spread.match == ("head.weight",)
    results = [merge(Livar(signal=s), clients())[1][LAYERS[0] + LORA_B] for s in ("movement", "gradient")]
    assert not torch.equal(*results)


def test_total_weights_sum_divides_the_layers_only() -> None:
    _, one = merge(Livar(), clients())
    _, four = merge(Livar(total_weights_sum=4.0), clients())
    for name in one:
        close(four[name], one[name] / 4 if "lora" in name else one[name])


# ---------------------------------------------------------------- rounds


def test_cumulative_signals_are_summed_client_by_client() -> None:
    """Three rounds, of which clients miss some, against a rule that is handed the sums."""
    rule, attends = Livar(cumulative=True), [range(K), [0, 2, 3, 6], [1, 2, 6]]
    state, start, sums = rule.init(params()), params(), dict[int, Tensor]()
    for round, ids in enumerate(attends):
        updates = clients(round, ids)
        for u in updates:
            now = torch.stack([u.statistics[f"path_integral.movement/{p}{f}"] for f in (LORA_A, LORA_B) for p in LAYERS]).view(
                2, L
            )
            sums[u.client_id] = sums.get(u.client_id, torch.zeros(2, L, dtype=torch.float64)) + now
        told = torch.stack([sums[k] for k in ids])
        _, want = merge(Livar(), with_signals(updates, told[:, 0], told[:, 1]), start)
        _, forgetful = merge(Livar(), updates, start)
        state, start = rule.combine(state, start, updates, torch.Generator())
        for name in want:
            close(start[name], want[name])
        assert same_bits(forgetful, want) == (round == 0)
    assert set(state["signals"]) == set(range(K))
    assert rule.init(start)["signals"] == {}, "a task begins anew"


def test_products_are_evaluated_and_factors_go_on() -> None:
    """Reference: evaluation by Σ p_i B_i A_i, the next round from the merged factors."""
    rule, updates = Livar(evaluated="products"), clients()
    start = params()
    assert rule.deployed(rule.init(start), start) is start, "nothing was merged yet"
    state, merged = merge(rule, updates)
    assert same_bits(dict(merged), dict(merge(Livar(), updates)[1]))
    shown = rule.deployed(state, merged)
    assert shown.keys() == merged.keys()
    n = sum(u.num_samples for u in updates)
    for p in lora_layers(merged):
        want = sum(u.num_samples / n * u.params[p + LORA_B] @ u.params[p + LORA_A] for u in updates)
        close(shown[p + LORA_B] @ shown[p + LORA_A], want)
        assert shown[p + LORA_A].shape == (K * R, I)
    assert all(shown[n] is merged[n] for n in merged if "lora" not in n)
    assert Livar().deployed(merge(Livar(), updates)[0], merged) is merged


def test_a_factor_that_nobody_trains_stays() -> None:
    """A consolidator may freeze lora_A: B is merged by the table, products are made with the common A."""
    frozen = [replace(u, params={n: t for n, t in u.params.items() if not n.endswith(LORA_A)}) for u in clients()]
    rule = Livar(evaluated="products")
    state, got = merge(rule, frozen)
    for p in LAYERS:
        assert torch.equal(got[p + LORA_A], params()[p + LORA_A])
        assert torch.equal(got[p + LORA_B], merge(Livar(), clients())[1][p + LORA_B])
        n = sum(u.num_samples for u in frozen)
        shown, mean = rule.deployed(state, got), sum(u.num_samples / n * u.params[p + LORA_B] for u in frozen)
        close(shown[p + LORA_B] @ shown[p + LORA_A], mean @ params()[p + LORA_A])


# ---------------------------------------------------------------- parts of a model


def test_adapter_alone_and_head_alone() -> None:
    """As one rule of a list it asks for what its own tensors need, and merges them as it would beside the rest."""
    _, whole = merge(Livar(), clients())
    groups = (("adapter.*", Livar()), ("head.*", Livar()))
    both = Grouped(groups)
    state = both.init(params())
    alone = [rule.plan(inner, 0).statistics for (_, rule), inner in zip(groups, state["states"], strict=True)]
    assert [[r.name for r in requests] for requests in alone] == [["path_integral"], ["class_moments"]]
    _, got = both.combine(state, params(), clients(), torch.Generator())
    for name in whole:
        close(got[name], whole[name])


def test_products_inside_a_list() -> None:
    rules = Grouped((("adapter.*", Livar(evaluated="products")), ("head.*", FedAvg())))
    state, merged = rules.combine(rules.init(params()), params(), clients(), torch.Generator())
    alone, want = merge(Livar(evaluated="products"), clients())
    shown, expected = rules.deployed(state, merged), Livar(evaluated="products").deployed(alone, want)
    for name in [n for n in params() if "lora" in n]:
        assert torch.equal(shown[name], expected[name])
    assert torch.equal(shown["head.weight"], FedAvg().combine({}, params(), clients(), torch.Generator())[1]["head.weight"])


def test_a_bias_without_its_weight_and_a_factor_without_its_pair_go_by_samples() -> None:
    names = ["head.bias", ODD, LAYERS[0] + LORA_A, LAYERS[1] + LORA_A, LAYERS[1] + LORA_B]
    start = {n: params()[n] for n in names}
    updates = [replace(u, params={n: u.params[n] for n in names}) for u in clients()]
    _, got = merge(Livar(), updates, start)
    _, want = FedAvg().combine({}, start, updates, torch.Generator())
    for name in names[:3]:
        close(got[name], want[name])
    for name in names[3:]:
        assert float((got[name] - want[name]).abs().max()) > 1e-3


def test_tensors_that_it_can_do_nothing_for() -> None:
    with pytest.raises(ConfigError, match=r"livar weighs LoRA layers and the rows of 'head\.weight'.*name: fedavg"):
        Livar().init({ODD: torch.zeros(1), "head.bias": torch.zeros(2)})
    with pytest.raises(ConfigError, match=r"evaluated: products is about pairs of LoRA factors, and there are none"):
        Livar(evaluated="products").init({"head.weight": torch.zeros(2, 2)})


def test_a_missing_statistic_names_client_and_tensor() -> None:
    for lost in (f"path_integral.movement/{LAYERS[1]}{LORA_B}", SPREAD):
        bare = [replace(u, statistics={n: t for n, t in u.statistics.items() if n != lost}) for u in clients()]
        with pytest.raises(AggregationError, match=rf"client 0 sent no '{lost}'"):
            merge(Livar(), bare)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signal": "gradients"}, "signal 'gradients' is unknown. Did you mean 'gradient'"),
        ({"evaluated": "product"}, "evaluated 'product' is unknown. Did you mean 'products'"),
        ({"total_weights_sum": 0.0}, "total_weights_sum must be above 0, got 0.0"),
        ({"total_weights_sum": float("nan")}, "total_weights_sum must be a finite number, got nan"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("aggregators", {"name": "livar", **options})


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("evaluated", ["merged", "products"])
@pytest.mark.parametrize("consolidator", ["none", "mean", "regmean"])
def test_a_stream_of_tasks_with_any_consolidator(consolidator: str, evaluated: str, tmp_path: Path) -> None:
    rule = f"server.aggregator={{name: livar, evaluated: {evaluated}, cumulative: true}}"
    config = tiny(rule, f"server.consolidator={consolidator}", "server.participation=0.7", output=tmp_path)
    results = run(config)
    assert np.isfinite(results.accuracy[1]).all()
    ranks = {t.shape[0] for n, t in final_state(results.path, config).params.items() if n.endswith(LORA_A)}
    assert ranks == {2}, "the factors that go on keep their rank"


def test_merged_and_products_train_alike_and_evaluate_differently(tmp_path: Path) -> None:
    """What is evaluated moves nothing that is trained, where the consolidator keeps one module that goes on."""
    states, rows = [], []
    for evaluated in ("merged", "products"):
        rule = f"server.aggregator={{name: livar, evaluated: {evaluated}}}"
        config = tiny(rule, "server.consolidator=none", "data.test_per_class=40", "client.lr=0.05", output=tmp_path / evaluated)
        results = run(config)
        states.append(final_state(results.path, config))
        rows.append(results.accuracy)
    assert same_bits(dict(states[0].params), dict(states[1].params))
    assert not np.array_equal(rows[0], rows[1], equal_nan=True)


def test_alone_and_as_rules_of_a_list(tmp_path: Path) -> None:
    states = []
    for rule in ("livar", '[{match: "adapter.*", name: livar}, {match: "head.*", name: livar}]'):
        config = tiny(f"server.aggregator={rule}", "server.consolidator=none", output=tmp_path / str(len(states)))
        states.append(learned(final_state(run(config).path, config)))
    for key in ("params", "rows", "bytes"):
        assert same_bits(states[0][key], states[1][key]), key
