"""What Grams take from a layer's inputs: the values of the plain formulas, once per tensor however many layers see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from clients.statistics import _inputs
from clients.statistics._inputs import ROWS, Inputs
from clients.statistics.gram import Statistic as Gram


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).mul(3).to(dtype)


@pytest.mark.parametrize(
    "shape", [(1, 5), (7, 512), (3, 17, 40), (ROWS, 600), (ROWS + 1, 600), (5 * ROWS + 3, 300), (17 * ROWS + 9, 40)]
)
def test_energies_are_the_sum_of_squares(shape: tuple[int, ...]) -> None:
    x = rows(*shape)
    wide_NI = x.double().reshape(-1, shape[-1])
    torch.testing.assert_close(Inputs(x).energies, (wide_NI**2).sum(0), rtol=1e-14, atol=0)


@pytest.mark.parametrize("count", [5, ROWS, 3 * ROWS, 15 * ROWS + 7])
def test_energies_of_a_usual_batch_are_the_bits_of_one_sum(count: int) -> None:
    x_NI = rows(count, 560)
    assert x_NI.numel() > _inputs.AT_ONCE or count == 5
    assert torch.equal(Inputs(x_NI).energies, x_NI.double().square().sum(0))


def test_half_precision_is_widened_before_it_is_squared() -> None:
    x_NI = torch.full((4, 3), 300.0, dtype=torch.float16)  # its square overflows
    assert Inputs(x_NI).energies.tolist() == [360000.0] * 3
    assert Inputs(x_NI).gram.tolist() == [[360000.0] * 3] * 3


def test_the_inputs_are_left_as_they_are() -> None:
    x_NI = rows(6, 4, dtype=torch.float64)  # is float64 already, so that widening it could be the tensor itself
    before = x_NI.clone()
    assert Inputs(x_NI).energies.shape == (4,)
    assert torch.equal(x_NI, before)


def test_a_tensor_that_was_changed_in_place_is_looked_at_again() -> None:
    x = rows(6, 4)
    before = _inputs.of(x).energies
    assert _inputs.of(x).energies is before
    x.mul_(2)
    torch.testing.assert_close(_inputs.of(x).energies, 4 * before)


class Widened(TorchDispatchMode):
    """Counts the numbers that are turned into float64."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and out.dtype == torch.float64:
            self.numbers += out.numel()
        return out


class ThreeHeads:
    """q, k and v of one input."""

    num_classes = 2

    def __init__(self, count: int) -> None:
        self.layers = {name: nn.Linear(8, 4) for name in "qkv"[:count]}

    def features(self, inputs: Any) -> Tensor:
        x: Tensor = inputs["x"]
        return torch.cat([layer(x) for layer in self.layers.values()], dim=-1)

    def logits(self, features: Tensor, params: Any) -> Tensor:
        return features

    def layer(self, parameter: str) -> nn.Module:
        return self.layers[parameter.split(".")[1]]


@pytest.mark.parametrize("options", [{"form": "diagonal"}, {"form": "full", "decay": 0.5}])
def test_layers_and_requests_that_share_an_input_widen_it_once(options: dict[str, Any]) -> None:
    def widened(layers: int, requests: int) -> int:
        model = ThreeHeads(layers)
        params = {f"adapter.{name}.lora_A": rows(2, 8) for name in model.layers}
        statistic = Gram(**options)
        x = rows(30, 8)
        with torch.no_grad(), Widened() as mode:
            opened = [statistic.collect(model, params, list(params)) for _ in range(requests)]
            accumulators = [one.__enter__() for one in opened]
            features = model.features({"x": x})
            for accumulator in accumulators:
                accumulator.update(features, torch.zeros(30, dtype=torch.int64))
            count = mode.numbers
            for one in opened:
                one.__exit__(None, None, None)
        results = [accumulator.result() for accumulator in accumulators]
        assert all(torch.equal(t, next(iter(results[0].values()))) for r in results for t in r.values())
        return count

    once = widened(1, 1)
    assert once == 30 * 8 * (1 if options["form"] == "diagonal" else 2)  # for the squares, and for the products
    assert widened(3, 2) == once
