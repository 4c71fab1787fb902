"""Statistics of a client's data against dense computations on a small random ViT, and the proximal term.

Shapes: N tokens, I inputs, R rank, C classes, D features.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from clients.learners.proximal import Learner as Proximal
from clients.statistics.class_moments import Statistic as ClassMoments
from clients.statistics.gram import Statistic as Gram
from fedsim.core import contracts
from fedsim.core.contracts import Step
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.tensors import from_upper_triangle
from fedsim.models import model as models
from tests.clients.works import step_of
from tests.tiny import tiny

CLASSES, RANK = 5, 3


class TinyVit:
    """A random two-block ViT without an adapter; layers by the names of their modules."""

    num_classes = CLASSES

    def __init__(self) -> None:
        config = ViTConfig(
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=20,
            image_size=8,
            patch_size=4,
            num_channels=1,
        )
        self.encoder = ViTModel(config, add_pooling_layer=False).eval().requires_grad_(False)
        for name, p in self.encoder.named_parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=torch_stream(5, name)))
        self.linear = [n for n, m in self.encoder.named_modules() if isinstance(m, nn.Linear)]

    def features(self, inputs: Tensors) -> Tensor:
        hidden: Tensor = self.encoder(inputs["pixel_values"]).last_hidden_state
        return hidden[:, 0]

    def logits(self, features: Tensor, params: Tensors) -> Tensor:
        return features @ params["head.weight"].T

    def layer(self, parameter: str) -> nn.Module:
        return self.encoder.get_submodule(parameter.removeprefix("adapter.").rpartition(".")[0])


@pytest.fixture(scope="module")
def model() -> TinyVit:
    return TinyVit()


@pytest.fixture(scope="module")
def params(model: TinyVit) -> dict[str, Tensor]:
    out = {"head.weight": torch.zeros(CLASSES, 12)}
    for name in model.linear:
        layer = model.encoder.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        out[f"adapter.{name}.lora_A"] = torch.randn(RANK, layer.in_features, generator=torch_stream(6, name))
        out[f"adapter.{name}.lora_B"] = torch.zeros(layer.out_features, RANK)
    return out


IMAGES = torch.randn(13, 1, 8, 8, generator=torch_stream(7, "images"))
LABELS = torch.tensor([0, 1, 1, 2, 0, 0, 2, 1, 4, 0, 1, 2, 0])  # no 3, a single 4


def measure(
    statistic: contracts.Statistic, model: contracts.ModelLike, params: Tensors, subjects: Sequence[str], batch: int
) -> dict[str, Tensor]:
    with torch.no_grad(), statistic.collect(model, params, subjects) as accumulator:
        for rows in torch.arange(len(IMAGES)).split(batch):
            accumulator.update(model.features({"pixel_values": IMAGES[rows]}), LABELS[rows])
        return accumulator.result()


@pytest.fixture(scope="module")
def dense(model: TinyVit) -> Mapping[str, Tensor]:
    """Inputs (N, I) of every layer and the head, float64, from one forward over all images."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        return model.encoder.get_submodule(name).register_forward_hook(lambda module, args, out: seen.update({name: args[0]}))

    handles = [keep(name) for name in model.linear]
    with torch.no_grad():
        seen["head"] = model.features({"pixel_values": IMAGES})
    for handle in handles:
        handle.remove()  # type: ignore[attr-defined]
    return {n: x.reshape(-1, x.shape[-1]).double() for n, x in seen.items()}


def decayed(x_NI: Tensor, decay: float) -> Tensor:
    gram = x_NI.T @ x_NI
    return torch.where(torch.eye(len(gram), dtype=torch.bool), gram, decay * gram)


def close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == torch.float32
    assert got.device.type == "cpu"
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


# ---------------------------------------------------------------- gram


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_gram_of_every_layer_and_form(model: TinyVit, params: Tensors, dense: Mapping[str, Tensor], decay: float) -> None:
    """Batches of 4 against one dense product; every token of every image counts."""
    assert len(dense[model.linear[0]]) == 13 * 5
    a_subjects, b_subjects = ([f"adapter.{n}.lora_{f}" for n in model.linear] for f in "AB")
    full = measure(Gram("full", decay), model, params, [*a_subjects, *b_subjects, "head.weight"], batch=4)
    diagonal = measure(Gram("diagonal", decay), model, params, [*a_subjects, *b_subjects, "head.weight"], batch=4)
    projected = measure(Gram("projected", decay), model, params, b_subjects, batch=4)
    cross = measure(Gram("cross", decay), model, params, b_subjects, batch=4)
    for name in model.linear:
        gram, a_RI = decayed(dense[name], decay), params[f"adapter.{name}.lora_A"].double()
        close(from_upper_triangle(full[f"full/adapter.{name}.lora_A"]), gram)
        close(diagonal[f"diagonal/adapter.{name}.lora_A"], gram.diagonal())
        close(projected[f"projected/adapter.{name}.lora_B"], a_RI @ gram @ a_RI.T)
        close(cross[f"cross/adapter.{name}.lora_B"], a_RI @ gram)
        own = decayed(dense[name] @ a_RI.T, decay)  # the decay falls on what B is applied to
        close(from_upper_triangle(full[f"full/adapter.{name}.lora_B"]), own)
        close(diagonal[f"diagonal/adapter.{name}.lora_B"], own.diagonal())
    close(from_upper_triangle(full["full/head.weight"]), decayed(dense["head"], decay))
    close(diagonal["diagonal/head.weight"], dense["head"].square().sum(0))


def test_what_travels_is_small(model: TinyVit, params: Tensors) -> None:
    name = f"adapter.{model.linear[-1]}"
    sizes = {
        form: next(iter(measure(Gram(form), model, params, [f"{name}.lora_{factor}"], batch=13).values())).shape
        for form, factor in (("diagonal", "A"), ("full", "A"), ("projected", "B"))
    }
    width = params[f"{name}.lora_A"].shape[1]
    assert sizes == {"diagonal": (width,), "full": (width * (width + 1) // 2,), "projected": (RANK, RANK)}


@pytest.mark.parametrize("form", ["projected", "cross"])
def test_projected_forms_never_hold_a_square_of_the_width(model: TinyVit, params: Tensors, form: str) -> None:
    subject = f"adapter.{model.linear[0]}.lora_B"
    for decay in (0.0, 0.5, 1.0):
        with Gram(form, decay).collect(model, params, [subject]) as accumulator:
            held = accumulator.sums[subject]  # type: ignore[attr-defined]
            assert held.products.numel() <= RANK * 12
            assert held.energies().numel() == 12


def test_hooks_are_taken_off_even_after_an_error(model: TinyVit, params: Tensors) -> None:
    layer = model.encoder.get_submodule(model.linear[0])
    collecting = Gram().collect(model, params, [f"adapter.{model.linear[0]}.lora_A"])
    collecting.__enter__()
    assert len(layer._forward_pre_hooks) == 1
    swallowed = collecting.__exit__(RuntimeError, RuntimeError("on purpose"), None)
    assert not swallowed
    assert len(layer._forward_pre_hooks) == 0


class OneLayer:
    """A half-precision layer whose inputs' squares overflow in half precision."""

    num_classes = 2

    def __init__(self) -> None:
        self.linear = nn.Identity()

    def features(self, inputs: Tensors) -> Tensor:
        out: Tensor = self.linear(inputs["x"])
        return out

    def logits(self, features: Tensor, params: Tensors) -> Tensor:
        return features

    def layer(self, parameter: str) -> nn.Module:
        return self.linear


class _Wide(OneLayer):
    num_classes = 100


def test_half_precision_inputs_do_not_overflow() -> None:
    one, x = OneLayer(), torch.full((4, 3), 300.0, dtype=torch.float16)
    params = {"adapter.x.lora_A": torch.ones(1, 3), "adapter.x.lora_B": torch.ones(2, 1)}
    for form, subject, want in (
        ("diagonal", "A", 4 * 300.0**2),
        ("full", "A", 4 * 300.0**2),
        ("projected", "B", 9 * 4 * 300.0**2),
    ):
        with Gram(form).collect(one, params, [f"adapter.x.lora_{subject}"]) as accumulator:
            one.features({"x": x})
            assert next(iter(accumulator.result().values())).flatten().tolist() == pytest.approx(
                [want] * {"diagonal": 3, "full": 6}.get(form, 1)
            )


def test_a_client_without_samples_sends_zeros(model: TinyVit, params: Tensors) -> None:
    name = f"adapter.{model.linear[0]}"
    for form, subject, shape in (
        ("diagonal", f"{name}.lora_A", (12,)),
        ("full", "head.weight", (78,)),
        ("projected", f"{name}.lora_B", (3, 3)),
    ):
        for decay in (0.0, 0.5, 1.0):
            with Gram(form, decay).collect(model, params, [subject]) as accumulator:
                assert torch.equal(accumulator.result()[f"{form}/{subject}"], torch.zeros(shape))


@pytest.mark.parametrize(
    ("form", "subject"),
    [("diagonal", "head.bias"), ("projected", "adapter.x.lora_A"), ("full", "adapter.x.keys"), ("cross", "head.weight")],
)
def test_gram_of_the_wrong_subject(model: TinyVit, params: Tensors, form: str, subject: str) -> None:
    with pytest.raises(ConfigError, match=f"there is no gram of form '{form}' for '{subject}': it is for "):
        measure(Gram(form), model, params, [subject], batch=4)


def test_gram_bad_options() -> None:
    with pytest.raises(ConfigError, match=r"form 'diagnal' is unknown\. Did you mean 'diagonal'"):
        Gram("diagnal")
    with pytest.raises(ConfigError, match=r"decay must be in \[0, 1\], got 2"):
        Gram("full", 2)


def test_gram_under_a_trained_adapter_merged_or_not() -> None:
    """fedsim's own model with a LoRA that changes the inputs of later layers: the statistics pass runs with merged weights."""
    model = models.build(tiny(), num_classes=CLASSES)
    fresh = {**model.init_adapter(torch_stream(10, "adapter")), **model.init_head()}
    trained = {n: t + 0.5 * torch.randn(t.shape, generator=torch_stream(10, n)) for n, t in fresh.items()}
    images = torch.randint(0, 256, (6, 8, 8), dtype=torch.uint8, generator=torch_stream(10, "images"))
    subjects = [n for n in trained if n.endswith("lora_A")]

    def grams(params: Tensors, merged: bool) -> dict[str, Tensor]:
        through = model.merged(params) if merged else model.applied(params)
        with torch.no_grad(), through, Gram("full", 0.5).collect(model, params, [*subjects, "head.weight"]) as accumulator:
            accumulator.update(model.features({"pixel_values": images}), LABELS[:6])
            return accumulator.result()

    got, want, before = grams(trained, merged=True), grams(trained, merged=False), grams(fresh, merged=True)
    for name, expected in want.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    last = f"full/{subjects[-1]}"
    assert float((got[last] - before[last]).abs().max()) > 0.1 * float(before[last].abs().max())


# ---------------------------------------------------------------- class moments


@pytest.mark.parametrize("batch", [1, 4, 13])
def test_moments_of_every_class(model: TinyVit, params: Tensors, dense: Mapping[str, Tensor], batch: int) -> None:
    full = measure(ClassMoments("full"), model, params, ["head.weight"], batch)
    scalar = measure(ClassMoments("scalar"), model, params, ["head.weight"], batch)
    assert set(full) == {"count/head.weight", "mean/head.weight", "variance/head.weight"}
    assert set(scalar) == {"count/head.weight", "spread/head.weight"}
    assert full["count/head.weight"].tolist() == scalar["count/head.weight"].tolist() == [5, 4, 3, 0, 1]
    held = [0, 1, 2, 4]
    assert full["mean/head.weight"].shape == full["variance/head.weight"].shape == (len(held), 12)
    for row, c in enumerate(held):
        features = dense["head"][c == LABELS]
        variance = features.var(0) if len(features) > 1 else torch.zeros(12, dtype=torch.float64)
        torch.testing.assert_close(full["mean/head.weight"][row].double(), features.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(full["variance/head.weight"][row].double(), variance, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(scalar["spread/head.weight"][c].double(), variance.mean(), rtol=1e-5, atol=1e-6)
    assert full["variance/head.weight"][3].tolist() == [0.0] * 12
    assert scalar["spread/head.weight"][3] == 0


@pytest.mark.parametrize("batch", [1, 4, 13])
def test_covariances_are_numpys(model: TinyVit, params: Tensors, dense: Mapping[str, Tensor], batch: int) -> None:
    """Of classes with two samples or more; count and mean as in the form full."""
    got = measure(ClassMoments("covariance"), model, params, ["head.weight"], batch)
    full = measure(ClassMoments("full"), model, params, ["head.weight"], batch)
    assert set(got) == {"count/head.weight", "mean/head.weight", "covariance/head.weight"}
    assert torch.equal(got["count/head.weight"], full["count/head.weight"])
    assert torch.equal(got["mean/head.weight"], full["mean/head.weight"])
    assert got["covariance/head.weight"].shape == (3, 78)
    for row, c in enumerate([0, 1, 2]):
        want = torch.from_numpy(np.cov(dense["head"][c == LABELS].numpy(), rowvar=False))
        covariance = from_upper_triangle(got["covariance/head.weight"][row])
        close(covariance, want)
        torch.testing.assert_close(covariance.diagonal(), full["variance/head.weight"][row], rtol=1e-5, atol=1e-7)
    within = measure(ClassMoments("within", [2, 0, 3]), model, params, ["head.weight"], batch)
    assert within["count/head.weight"].tolist() == [3, 5, 0]
    assert torch.equal(within["mean/head.weight"], full["mean/head.weight"][[2, 0]])
    want = sum(torch.from_numpy(np.cov(dense["head"][c == LABELS].numpy(), rowvar=False) * n) for c, n in ((2, 2), (0, 4)))
    close(from_upper_triangle(within["within/head.weight"]), want)


def test_classes_that_a_client_does_not_hold_cost_no_bytes() -> None:
    """100 classes of 768 features, of which this client holds two: a dense table of covariances would be 118 MB."""
    x, wide = torch.randn(3, 768, generator=torch_stream(8, "wide")), {"head.weight": torch.zeros(100, 768)}
    sizes = {}
    for form in ("full", "covariance", "scalar"):
        with ClassMoments(form).collect(_Wide(), wide, ["head.weight"]) as accumulator:
            accumulator.update(x, torch.tensor([70, 3, 70]))
            sizes[form] = {name: tuple(t.shape) for name, t in accumulator.result().items()}
    count, mean = {"count/head.weight": (100,)}, {"mean/head.weight": (2, 768)}
    assert sizes["full"] == {**count, **mean, "variance/head.weight": (2, 768)}
    assert sizes["covariance"] == {**count, **mean, "covariance/head.weight": (1, 768 * 769 // 2)}
    assert sizes["scalar"] == {**count, "spread/head.weight": (100,)}


@pytest.mark.parametrize(
    ("form", "last"), [("full", ("variance", (0, 2))), ("covariance", ("covariance", (0, 3))), ("within", ("within", (3,)))]
)
def test_moments_of_a_client_without_samples(form: str, last: tuple[str, tuple[int, ...]]) -> None:
    with ClassMoments(form).collect(OneLayer(), {"head.weight": torch.zeros(2, 2)}, ["head.weight"]) as accumulator:
        shapes = {name: tuple(t.shape) for name, t in accumulator.result().items()}
    assert shapes == {"count/head.weight": (2,), "mean/head.weight": (0, 2), f"{last[0]}/head.weight": last[1]}


def test_features_far_from_zero_keep_their_variance() -> None:
    """Variance 1 around 1e7: the textbook Σx² − (Σx)²/n loses all digits in float32 and half of them in float64."""
    x = 1e7 + torch.randn(4000, 2, dtype=torch.float64, generator=torch_stream(8, "far"))
    labels = torch.zeros(4000, dtype=torch.int64)
    with ClassMoments("scalar").collect(OneLayer(), {"head.weight": torch.zeros(2, 2)}, ["head.weight"]) as accumulator:
        for rows in torch.arange(4000).split(3):
            accumulator.update(x[rows], labels[rows])
    assert float(accumulator.result()["spread/head.weight"][0]) == pytest.approx(float(x.var(0).mean()), rel=1e-6)
    with ClassMoments("covariance").collect(OneLayer(), {"head.weight": torch.zeros(2, 2)}, ["head.weight"]) as accumulator:
        for rows in torch.arange(4000).split(3):
            accumulator.update(x[rows], labels[rows])
    got = from_upper_triangle(accumulator.result()["covariance/head.weight"][0]).double()
    torch.testing.assert_close(got, x.T.cov(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["full", "covariance", "within"])
@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, 20), max_size=4), seed=st.integers(0, 100))
def test_moments_do_not_depend_on_the_batches(form: str, cuts: list[int], seed: int) -> None:
    generator = torch_stream(9, "cuts", seed)
    x, labels = torch.randn(20, 2, generator=generator), torch.randint(0, 2, (20,), generator=generator)
    outs = []
    for bounds in ([0, 20], sorted([0, 20, *cuts])):
        with ClassMoments(form).collect(OneLayer(), {"head.weight": torch.zeros(2, 2)}, ["head.weight"]) as accumulator:
            for a, b in itertools.pairwise(bounds):
                accumulator.update(x[a:b], labels[a:b])
        outs.append(accumulator.result())
    for name, want in outs[0].items():
        torch.testing.assert_close(outs[1][name], want, rtol=1e-6, atol=1e-7)


def test_moments_of_the_wrong_subject(model: TinyVit, params: Tensors) -> None:
    with pytest.raises(ConfigError, match=r"class_moments describes the inputs of 'head\.weight', not of 'head\.bias'"):
        measure(ClassMoments(), model, params, ["head.bias"], batch=4)
    with pytest.raises(ConfigError, match=r"form 'scalr' is unknown\. Did you mean 'scalar'"):
        ClassMoments("scalr")


# ---------------------------------------------------------------- the proximal term


def step(params: Tensors, start: Tensors) -> Step:
    return step_of(params=params, start=start)


def test_proximal_term_and_its_gradient_by_hand() -> None:
    """μ/2 Σ (w − w_g)² = 0.5 · (4 + 1 + 9) = 7 and μ (w − w_g) with μ = 1."""
    params = {"a": torch.tensor([3.0, 0.0], requires_grad=True), "b": torch.tensor([[5.0]], requires_grad=True)}
    start = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([[2.0]])}
    term = Proximal(mu=1.0).loss({}, step(params, start))
    term.backward()  # type: ignore[no-untyped-call]
    assert term.item() == 7.0
    assert params["a"].grad is not None
    assert params["a"].grad.tolist() == [2.0, -1.0]
    assert params["b"].grad is not None
    assert params["b"].grad.tolist() == [[3.0]]
    assert Proximal(mu=0.5).loss({}, step(params, start)).item() == 3.5


def test_proximal_term_starts_at_zero_and_takes_no_negative_weight() -> None:
    same = {"a": torch.ones(3)}
    assert Proximal().loss({}, step(same, same)).item() == 0.0
    assert Proximal().loss({}, step({}, {})).item() == 0.0
    with pytest.raises(ConfigError, match="mu must not be negative"):
        Proximal(mu=-1.0)
