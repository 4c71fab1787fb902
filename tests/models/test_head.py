"""Heads and the masked cross-entropy against closed forms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import normalize
from torch import Tensor

from fedsim.core import config as configs
from fedsim.core import contracts, plugins
from fedsim.core.errors import FedsimError, ModelError
from fedsim.core.messages import Tensors
from fedsim.core.rng import torch_stream
from fedsim.models import logits as of_logits
from fedsim.models.heads import linear, mixture
from fedsim.models.model import Model, build
from fedsim.simulation import prepare, rehearse, run
from tests.tiny import final_state, tiny


@settings(max_examples=30)
@given(classes=st.lists(st.integers(0, 6), min_size=1, unique=True), seed=st.integers(0, 99))
def test_cross_entropy_is_over_the_chosen_classes_alone(classes: list[int], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 7, dtype=torch.float64, generator=g, requires_grad=True)
    labels = torch.tensor(classes)[torch.randint(len(classes), (5,), generator=g)]
    loss = of_logits.masked_cross_entropy(logits, labels, classes)
    z = logits.detach().tolist()
    want = sum(math.log(sum(math.exp(z[i][c]) for c in classes)) - z[i][y] for i, y in enumerate(labels.tolist())) / 5
    assert loss.item() == pytest.approx(want, abs=1e-12)
    loss.backward()  # type: ignore[no-untyped-call]
    others = [c for c in range(7) if c not in classes]
    assert logits.grad is not None
    assert not logits.grad[:, others].any()


@pytest.mark.parametrize("classes", [range(100, 103), [100, 102, 101]])
@pytest.mark.parametrize("label", [0, 99, 103])
def test_label_outside_of_the_task_is_no_silent_zero(classes: list[int], label: int) -> None:
    with pytest.raises(IndexError):
        of_logits.masked_cross_entropy(torch.zeros(1, 200), torch.tensor([label]), classes)


def test_no_classes() -> None:
    with pytest.raises(ModelError, match="no classes"):
        of_logits.masked_cross_entropy(torch.zeros(1, 3), torch.tensor([0]), [])


def test_prediction_is_among_the_classes() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0, 0.0], [9.0, 3.0, 2.0, 8.0]])
    assert of_logits.predict(logits, [1, 2]).tolist() == [2, 1]
    assert of_logits.predict(logits, [3, 1]).tolist() == [1, 3]
    assert of_logits.predict(logits, range(4)).tolist() == [0, 0]


def test_logits_and_zero_start() -> None:
    params = linear.Head().init(4, 3, torch.Generator())
    assert not any(t.any() for t in params.values())
    params = {"head.weight": torch.arange(12.0).view(4, 3), "head.bias": torch.ones(4)}
    h = torch.tensor([[1.0, 0.0, 2.0]])
    assert linear.Head().logits(h, params).tolist() == [[5.0, 14.0, 23.0, 32.0]]


# ---------------------------------------------------------------- every head

WIDTH, ROWS = 5, 4
HEADS: dict[str, contracts.Head] = {
    name: configs.build("heads", {"name": name, **({"size": 7} if name == "random_features" else {})})
    for name in plugins.names("heads")
}


def tensors(head: contracts.Head, seed: int = 0) -> dict[str, Tensor]:
    """Of a head: those that are trained, drawn anew, and those that are fixed; float64."""
    made = head.init(ROWS, WIDTH, torch_stream(seed, "start")) | head.fixed(WIDTH, torch_stream(seed, "fixed"))
    return {n: torch.randn(t.shape, dtype=torch.float64, generator=torch_stream(seed, n)) for n, t in made.items()}


def some_features(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64, generator=torch_stream(0, "features"))


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def by_definition(name: str, f: list[float], params: dict[str, Tensor]) -> list[float]:
    """A sample's logits, number by number."""
    weight = params["head.weight"].tolist()
    if name == "cosine":
        return [16 * dot(f, w) / math.sqrt(dot(f, f)) / math.sqrt(dot(w, w)) for w in weight]
    if name == "centres":
        return [-sum((x - y) ** 2 for x, y in zip(f, w, strict=True)) / len(f) for w in weight]
    if name == "quadratic":
        offsets, precisions = params["head.offset"].tolist(), params["head.precision"].tolist()
        away = [[x - y for x, y in zip(f, w, strict=True)] for w in weight]
        sides = [[dot(row, d) for row in p] for p, d in zip(precisions, away, strict=True)]
        return [b - 0.5 * dot(d, side) for b, d, side in zip(offsets, away, sides, strict=True)]
    if name == "random_features":
        f = [max(0.0, dot(f, column)) for column in params["head.projection"].T.tolist()]
    return [b + dot(f, w) for w, b in zip(weight, params["head.bias"].tolist(), strict=True)]


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_what_the_docstring_says(name: str) -> None:
    head, params, features = HEADS[name], tensors(HEADS[name]), some_features(6)
    want = torch.tensor([by_definition(name, f, params) for f in features.tolist()], dtype=torch.float64)
    torch.testing.assert_close(head.logits(features, params), want, rtol=0, atol=1e-12)
    if "an affine head" in head.traits.gives:
        affine = head.inputs(features, params) @ params["head.weight"].T + params["head.bias"]
        torch.testing.assert_close(affine, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("common", [(), ("head.weight",), ("head.bias",)])
@pytest.mark.parametrize("name", HEADS)
def test_stacked_clients_are_each_their_own(name: str, common: tuple[str, ...]) -> None:
    """common: what is the same for all clients and has no axis of them, as what is fixed."""
    head, own = HEADS[name], [tensors(HEADS[name], k) for k in range(3)]
    once = {n: own[0][n] for n in own[0] if n in (*common, "head.projection")}
    stacked = {n: torch.stack([t[n] for t in own]) for n in own[0]} | once
    features = some_features(3, 6)
    want = [head.logits(f, {**t, **once}) for f, t in zip(features, own, strict=True)]
    torch.testing.assert_close(head.stacked_logits(features, stacked), torch.stack(want), rtol=0, atol=1e-12)


def test_cosine_forgets_lengths_and_starts_with_directions() -> None:
    head, params, features = HEADS["cosine"], tensors(HEADS["cosine"]), some_features(6)
    longer = {"head.weight": params["head.weight"] * torch.tensor([[1.0], [2.0], [30.0], [0.1]])}
    torch.testing.assert_close(head.logits(3 * features, longer), head.logits(features, params), rtol=1e-12, atol=1e-12)
    start = head.init(ROWS, WIDTH, torch_stream(0, "start"))
    torch.testing.assert_close(start["head.weight"].norm(dim=1), torch.ones(ROWS))
    assert not head.logits(torch.zeros(1, WIDTH), start).any()


def test_what_is_fixed_is_drawn_from_the_seed_and_does_not_travel() -> None:
    """The same on every worker, another in a run of another seed, and neither among the parameters nor in the bytes."""
    config = tiny("adapter=none", "head={name: random_features, size: 9}", "server.aggregator=fedavg", "server.consolidator=none")
    one, again, other = (build(dataclasses.replace(config, seed=seed), 6) for seed in (0, 0, 1))
    features = torch.randn(3, one.backbone.width, generator=torch_stream(0, "features"))
    start = one.init_head()
    assert {n: tuple(t.shape) for n, t in start.items()} == {"head.weight": (6, 9), "head.bias": (6,)}
    inputs = [model.head_inputs(features, start) for model in (one, again, other)]
    assert inputs[0].shape == (3, 9)
    assert torch.equal(inputs[0], inputs[1])
    assert not torch.allclose(inputs[0], inputs[2])
    assert rehearse(config).costs["bytes"]["up"]["head"] == 4 * (6 * 9 + 6) * 3 * 2 * 2  # clients, tasks, rounds


@pytest.mark.parametrize("name", ["cosine", "random_features"])
def test_heads_train_together_as_one_by_one(name: str, tmp_path: Path) -> None:
    ended = []
    for fused in ("false", "true"):
        merged = ("server.aggregator=fedavg", "server.consolidator=none", f"runtime.fused={fused}", "client.epochs=2")
        config = tiny("adapter=none", f"head={name}", *merged, output=tmp_path / fused)
        run(config, output=tmp_path / fused / "run")
        ended.append(final_state(tmp_path / fused / "run", config).params)
    start = build(tiny(f"head={name}"), 6).init_head()
    for n, t in ended[0].items():
        torch.testing.assert_close(ended[1][n], t, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(t, start[n], rtol=1e-3, atol=1e-3)


def test_statistics_see_what_the_head_is_given() -> None:
    """The nearest mean of normalised features under `cosine`: against scikit-learn on the features themselves."""
    config = tiny(
        "adapter=none", "head=cosine", "server.aggregator=frozen", "server.consolidator=none", "server.calibrator=nearest_mean",
        "server.rounds=1",
    )  # fmt: skip
    parts = prepare(config)
    spec, model = parts.spec, parts.model
    unit = [
        normalize(model.features({"pixel_values": torch.from_numpy(split.inputs["pixel_values"])}).double().numpy())
        for split in (spec.train, spec.test)
    ]
    means = np.stack([unit[0][spec.train.labels == c].mean(0) for c in range(6)])
    guess = (unit[1] @ normalize(means).T).argmax(1)
    want = [100 * (guess == spec.test.labels)[spec.test_of(t)].mean() for t in range(2)]
    assert rehearse(config).accuracy[1].tolist() == pytest.approx(want)


@dataclass(frozen=True)
class Rowless(contracts.Head):
    """A scale for all classes at once, which no rule could weigh class by class."""

    def init(self, num_classes: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"head.weight": torch.zeros(num_classes, width), "head.temperature": torch.ones(1)}

    def logits(self, features: Tensor, params: Tensors) -> Tensor:
        return features

    def stacked_logits(self, features_KbD: Tensor, params: Tensors) -> Tensor:
        return features_KbD


@dataclass(frozen=True)
class Narrow(linear.Head):
    """It forgets its own map."""

    def logits(self, features: Tensor, params: Tensors) -> Tensor:
        return features


def test_a_head_that_does_not_keep_its_contract_is_one_line() -> None:
    made = build(tiny(), 6)
    odd = Model(made.backbone, made.adapter, 6, torch.device("cpu"), None, Rowless())
    with pytest.raises(ModelError, match=r"a row for each of the 6 classes, got head\.weight .* head\.temperature \(1,\)"):
        odd.init_head()
    with pytest.raises(ModelError, match=r"must give a finite logit for each of 6 classes, got \(2, 16\) for 2 samples"):
        Model(made.backbone, made.adapter, 6, torch.device("cpu"), None, Narrow()).init_head()
    with pytest.raises(ModelError, match=r"random_features cannot be made: "):
        prepare(tiny("head={name: random_features, size: 1000000000000}"))


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("{name: random_features, size: 0}", "head.size must be at least 1"),
        ("{name: random_features, activation: gelu}", "head.activation 'gelu' is unknown"),
        ("{name: cosine, scale: 0}", "scale must be positive"),
        ("bilinear", "unknown head 'bilinear'"),
    ],
)
def test_wrong_options(section: str, told: str) -> None:
    with pytest.raises(FedsimError, match=told):
        tiny(f"head={section}")


# ---------------------------------------------------------------- one head per source


def sources(
    seed: int, count: int = 4, classes: int = 5, width: int = 3, prototypes: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Features (b, S, D) and what is beside the heads of sources, each of which holds a class at least, float64."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    held = torch.randint(0, 3, (count, classes), generator=g)
    held[torch.arange(count), torch.randint(0, classes, (count,), generator=g)] += 1
    params = {"head.weight": draw(count, classes, width), "head.bias": draw(count, classes), "head.count": held.float()}
    if prototypes:
        params |= {"head.prototypes": draw(count, classes, width), "head.scale": draw(count).exp()}
    return draw(6, count, width), params


def by_hand(features: Tensor, params: dict[str, Tensor]) -> list[list[float]]:
    """The mixture's probabilities, number by number."""
    out = []
    for x in features:
        parts, weights = [], []
        for s, f in enumerate(x.tolist()):
            held = [c for c in range(params["head.count"].shape[1]) if params["head.count"][s, c] > 0]
            z = {c: sum(w * v for w, v in zip(params["head.weight"][s, c].tolist(), f, strict=True)) for c in held}
            e = {c: math.exp(z[c] + params["head.bias"][s, c].item()) for c in held}
            parts.append({c: e[c] / sum(e.values()) for c in held})
            weights.append(1.0)
            if "head.prototypes" in params:
                means = params["head.prototypes"][s].tolist()
                near = min(sum((v - m) ** 2 for v, m in zip(f, means[c], strict=True)) for c in held)
                weights[-1] = math.exp(-near / params["head.scale"][s].item())
        share = [w / sum(weights) for w in weights]
        out.append([sum(w * p.get(c, 0.0) for w, p in zip(share, parts, strict=True)) for c in range(features.shape[2] + 2)])
    return out


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), prototypes=st.booleans())
def test_mixture_is_a_weighted_mean_of_probabilities(seed: int, prototypes: bool) -> None:
    features, params = sources(seed, prototypes=prototypes)
    got = mixture.Head().logits(features, params)
    torch.testing.assert_close(got.exp(), torch.tensor(by_hand(features, params), dtype=torch.float64), rtol=1e-9, atol=1e-12)
    unknown = params["head.count"].sum(0) == 0
    assert torch.equal(torch.isneginf(got), unknown.expand_as(got))


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), s=st.integers(0, 3))
def test_one_source_alone_keeps_its_own_prediction(seed: int, s: int) -> None:
    features, params = sources(seed)
    alone = {n: t[[s]] for n, t in params.items()}
    own = features[:, s] @ params["head.weight"][s].T + params["head.bias"][s]
    held = (params["head.count"][s] > 0).nonzero()[:, 0].tolist()
    got = mixture.Head().logits(features[:, [s]], alone)
    torch.testing.assert_close(got[:, held], own[:, held].log_softmax(1), rtol=0, atol=1e-12)
    assert torch.equal(of_logits.predict(got, range(5)), of_logits.predict(own, held))


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(4)), left=st.integers(1, 4))
def test_sources_do_not_depend_on_the_others(seed: int, order: list[int], left: int) -> None:
    features, params = sources(seed)
    some = order[:left]
    fewer = {n: t[some] for n, t in params.items()}
    for part in (mixture.source_log_probabilities, mixture.source_weights):
        assert torch.equal(part(features[:, some], fewer), part(features, params)[:, some])
    permuted = mixture.Head().logits(features[:, order], {n: t[order] for n, t in params.items()})
    torch.testing.assert_close(permuted, mixture.Head().logits(features, params), rtol=1e-12, atol=1e-12)


def test_far_sources_and_sources_without_a_scale() -> None:
    """No overflow to NaN: the nearest decides however far all are; who has no scale counts where nobody else does."""
    params = {
        "head.weight": torch.zeros(2, 2, 1),
        "head.bias": torch.tensor([[3.0, 0.0], [0.0, 3.0]]),
        "head.count": torch.ones(2, 2),
        "head.prototypes": torch.tensor([[[0.0], [0.0]], [[1e4], [1e4]]]),
        "head.scale": torch.tensor([1e-20, 1e-20]),
    }
    features = torch.full((1, 2, 1), 9e3)
    assert of_logits.predict(mixture.Head().logits(features, params), [0, 1]).tolist() == [1]
    one_sample = {**params, "head.scale": torch.tensor([0.0, 1.0])}
    for x, want in ((5.0, 1), (0.0, 0)):
        assert of_logits.predict(mixture.Head().logits(torch.full((1, 2, 1), x), one_sample), [0, 1]).tolist() == [want]
    alone = {n: t[[0]] for n, t in one_sample.items()}
    torch.testing.assert_close(mixture.Head().logits(features[:, :1], alone), params["head.bias"][:1].log_softmax(1))
