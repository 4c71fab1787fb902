"""A client's local training: kernels and precisions beside torch's own, and what is kept of frozen blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clients import local, lower_states, optim
from clients.cache import Cache
from clients.lower_states import LowerStates
from clients.samples import Samples
from clients.work import Work
from fedsim.core import hardware
from fedsim.core.config import ClientConfig, SimConfig
from fedsim.core.contracts import ArraySplit
from fedsim.core.messages import BACKGROUND, BENEATH, ClientJob, ClientUpdate, RoundPlan, StatisticRequest, Tensors
from fedsim.core.tensors import stack_modules
from fedsim.models import kernels
from fedsim.models import lower as lowers
from fedsim.models import model as models
from fedsim.models.model import Model
from tests.models.zoo import BERT
from tests.tiny import same_bits, tiny

CLASSES, COUNT = (1, 2, 4), 21
UPPER: dict[str, dict[str, Any]] = {  # adapters that leave the first of two blocks alone, or both
    "none": {"name": "none"},
    "lora": {"name": "lora", "rank": 2, "targets": ["layers.1.*"]},
    "dropout": {"name": "lora", "rank": 2, "targets": ["layers.1.*"], "dropout": 0.3},
    "prefix": {"name": "prefix", "length": 2, "blocks": [1]},
    "vpt": {"name": "vpt", "length": 2, "blocks": [-1]},
}
EVERYWHERE = {"name": "lora", "rank": 2, "targets": "all-linear"}
PLANS = {
    "A": RoundPlan(train=("*.lora_A", "head.*")),
    "B": RoundPlan(train=("*.lora_B", "head.*")),
    "both": RoundPlan(),
}
onednn = pytest.mark.skipif(hardware.onednn_product() is None, reason="this build of torch has no such operator")


@dataclass
class Client:
    """One client of a round, whose samples are scattered over the split."""

    config: SimConfig
    model: Model
    samples: Samples
    params: Tensors

    @property
    def shard(self) -> Any:
        return np.random.default_rng(1).permutation(2 * COUNT)[:COUNT]

    def train(self, plan: RoundPlan | None = None, round: int = 0) -> ClientUpdate:
        job = ClientJob(client_id=3, task=0, round=round, params=self.params, plan=plan or RoundPlan())
        update = local.train(Work.of(self.model, self.samples, self.shard, CLASSES, job, self.config))
        assert isinstance(update, ClientUpdate), update
        return update


def client(adapter: dict[str, Any], *overrides: str, text: bool = False) -> Client:
    """A client with a batch that is not full, from tensors in which nothing is zero."""
    sections: dict[str, Any] = {"model": {"backbone": "random", "config": BERT}} if text else {}
    if text and adapter["name"] == "lora":
        adapter = adapter | {"targets": [t.replace("layers.1", "layer.1") for t in adapter["targets"]]}
    config = tiny("client.batch_size=8", "client.epochs=2", "runtime.eval_batch=8", *overrides, adapter=adapter, **sections)
    model, generator, numbers = models.build(config, 6), torch.Generator().manual_seed(1), np.random.default_rng(0)
    with torch.no_grad():
        for p in model.backbone.encoder.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    inputs: dict[str, Any] = {"pixel_values": numbers.integers(0, 256, (2 * COUNT, 8, 8), dtype=np.uint8)}
    if text:
        mask = np.arange(12) < numbers.integers(2, 13, 2 * COUNT)[:, None]
        inputs = {"input_ids": numbers.integers(1, 50, mask.shape) * mask, "attention_mask": mask.astype(np.int64)}
    samples = Samples(ArraySplit(inputs, numbers.choice(CLASSES, 2 * COUNT)), model.device)
    fresh = model.init_adapter(generator) | model.init_head()
    return Client(config, model, samples, {n: torch.randn(t.shape, generator=generator) * 0.2 for n, t in fresh.items()})


def require_close(got: ClientUpdate, want: ClientUpdate, start: Tensors, share: float) -> None:
    """Tensors went the same way: apart by at most this share of the way."""
    for name, t in want.params.items():
        assert float((got.params[name] - t).norm()) <= share * float((t - start[name]).norm()) + 1e-7 * float(t.norm()), name
    assert got.metrics["loss"] == pytest.approx(want.metrics["loss"], rel=share)
    assert got.statistics.keys() == want.statistics.keys()
    for name, t in want.statistics.items():
        assert float((got.statistics[name] - t).norm()) <= share * float(t.norm()) + 1e-9, name


# ---------------------------------------------------------------- kernels


@onednn
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.1), ("adamw", 1e-3)])
@pytest.mark.parametrize(("precision", "share"), [("fp32", 2e-3), ("bf16", 0.2)])
def test_kernels_train_to_where_torch_does(
    plan: RoundPlan, optimizer: str, lr: float, precision: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "SMALL", 0)  # layers of this size would stay in float32
    options = (f"client.optimizer={optimizer}", f"client.lr={lr}")
    want = client(EVERYWHERE, "runtime.kernels=torch", *options)
    got = client(EVERYWHERE, "runtime.kernels=onednn", f"runtime.precision={precision}", *options)
    assert same_bits(got.params, want.params)
    require_close(got.train(plan), want.train(plan), want.params, share)


@pytest.mark.parametrize(
    ("optimizer", "options", "fused"),
    [
        ("adamw", {}, True),
        ("sgd", {"momentum": 0.9}, True),
        ("rmsprop", {}, None),
        ("adamw", {"foreach": True}, None),
        ("adamw", {"fused": False}, False),
    ],
)
def test_fused_steps_are_the_same_steps(optimizer: str, options: dict[str, Any], fused: bool | None) -> None:
    found = []
    for wanted in (True, False):
        p = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
        made, _ = optim.build(ClientConfig(optimizer=optimizer, optimizer_options=options), {"p": p}, steps=5, fused_step=wanted)
        if wanted:
            assert made.defaults.get("fused") == fused
        for i in range(5):
            p.grad = (p.detach() * (i + 1)).sin()
            made.step()
        found.append(p.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- what is kept of frozen blocks

STATISTICS = (
    StatisticRequest("gram", ("head.weight", "*.lora_A"), {"form": "full"}),
    StatisticRequest("class_moments", ("head.weight",)),
)


@pytest.mark.parametrize("adapter", UPPER)
@pytest.mark.parametrize("text", [False, True], ids=["images", "texts"])
def test_keeping_what_is_frozen_changes_rounding_at_most(adapter: str, text: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = RoundPlan(statistics=STATISTICS)
    here = client(UPPER[adapter], text=text)
    below = lower_states.lower_states(here.model, here.samples, here.shard, here.params, here.config.runtime)
    assert isinstance(below, LowerStates)
    assert below.count == (2 if adapter == "none" else 1)
    got = here.train(plan)
    monkeypatch.setattr(lower_states, "lower_states", lambda *args: None)
    require_close(got, client(UPPER[adapter], text=text).train(plan), here.params, 1e-3)


@pytest.mark.parametrize("adapter", UPPER)
@pytest.mark.parametrize("text", [False, True], ids=["images", "texts"])
def test_found_or_computed_again_the_bits_are_the_same(adapter: str, text: bool) -> None:
    plan = RoundPlan(statistics=STATISTICS)
    keeping, forgetting = client(UPPER[adapter], text=text), client(UPPER[adapter], "runtime.cache=false", text=text)
    first, again, anew = keeping.train(plan), keeping.train(plan), forgetting.train(plan)
    for other in (again, anew):
        assert same_bits(other.params, first.params)
        assert same_bits(other.statistics, first.statistics)
    assert not forgetting.samples.cache.get((1, forgetting.shard.tobytes()))


def test_kept_blocks_are_not_run_again() -> None:
    here, calls = client(UPPER["lora"]), list[str]()
    for i, block in enumerate(here.model.backbone.encoder.layers):  # type: ignore[union-attr,arg-type]
        block.attention.register_forward_hook(lambda *_, i=i: calls.append(f"block {i}"))
    here.train(RoundPlan(statistics=STATISTICS))
    chunks, steps = 3, 2 * 3
    assert calls.count("block 0") == 1 + chunks  # one to see whether it works
    assert calls.count("block 1") == 1 + steps + chunks
    calls.clear()
    here.train(round=1)
    assert calls == ["block 1"] * steps


@pytest.mark.parametrize(
    ("adapter", "override"),
    [(EVERYWHERE, "seed=0"), (UPPER["none"], "transform.augment=flip"), (UPPER["lora"] | {"targets": ["layers.0.*"]}, "seed=0")],
)
def test_nothing_is_kept_where_all_changes(adapter: dict[str, Any], override: str) -> None:
    here = client(adapter, override)
    assert lower_states.lower_states(here.model, here.samples, here.shard, here.params, here.config.runtime) is None


def test_a_shard_that_takes_too_much_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    size = COUNT * 5 * 16 * 4  # samples × tokens × width × bytes
    for limit, found in ((size, True), (size - 1, False)):
        monkeypatch.setattr(lower_states, "LIMIT", limit)
        here = client(UPPER["lora"])
        below = lower_states.lower_states(here.model, here.samples, here.shard, here.params, here.config.runtime)
        assert (below is not None) == found


def test_what_was_not_used_longest_goes_first() -> None:
    def one() -> LowerStates:
        return LowerStates(1, torch.zeros(10), np.arange(10), np.arange(10))

    store = Cache[LowerStates](limit=2 * one().nbytes)
    store.put("a", one())
    store.put("b", one())
    assert store.get("a")
    store.put("c", one())
    assert [bool(store.get(k)) for k in "abc"] == [True, False, True]


def test_an_encoder_whose_blocks_hand_on_something_else_is_left_alone() -> None:
    class Doubling(nn.Module):
        """Blocks between which something happens."""

        def __init__(self) -> None:
            super().__init__()
            self.config = type("Layout", (), {"num_hidden_layers": 2})()
            self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
            self.between = 1.0

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
                x = x * 2 if self.between != 1 else x
            return x

    encoder = Doubling()
    assert lowers.is_chain(encoder, lambda: encoder(torch.ones(1, 2, 3)))
    encoder.between = 2.0
    assert not lowers.is_chain(encoder, lambda: encoder(torch.ones(1, 2, 3)))
    assert lowers.untouched(nn.Linear(2, 2), []) == 0
    assert lowers.untouched(encoder, ["layers.1.lora_A"]) == 1
    assert lowers.untouched(encoder, ["layers.1.lora_A", "elsewhere"]) == 0


def test_statistics_of_a_client_that_trains_beside_past_modules_see_them_too() -> None:
    """Whether a request asks for the blend or not: the client has no other model. Oracle: all modules stacked, as its own."""
    here = client(EVERYWHERE)
    generator = torch.Generator().manual_seed(0)
    adapter = {n: t for n, t in here.params.items() if n.startswith("adapter.")}
    past = {n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in adapter.items()}
    own = {**here.params, **{n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in adapter.items()}}
    request = (StatisticRequest("class_moments", ("head.weight",)),)

    def moments(plan: RoundPlan, params: Tensors) -> Tensors:
        job = ClientJob(client_id=3, task=0, round=0, params=params, plan=plan)
        return local.collect(Work.of(here.model, here.samples, here.shard, CLASSES, job, here.config), params)

    got = moments(RoundPlan(statistics=request, context={"background": past}, beside=True), own)
    both = {**own, **stack_modules([past, {n: own[n] for n in adapter}], [1.0, 1.0])}
    want, alone = moments(RoundPlan(statistics=request), both), moments(RoundPlan(statistics=request), own)
    mean = "class_moments.mean/head.weight"
    torch.testing.assert_close(got[mean], want[mean])
    assert not torch.allclose(got[mean], alone[mean], atol=1e-3)


def beneath_and_whole() -> tuple[Client, Tensors, Tensors]:
    """A client, a module that lies beneath its own, and the tensors in which both are one pair."""
    here = client(EVERYWHERE, "client.optimizer=sgd", "client.batch_size=64", "client.epochs=1", "client.lr=0.1")
    here.model.backbone.encoder.double()  # rounding hides nothing
    here = replace(here, params={n: t.double() for n, t in here.params.items()})
    generator = torch.Generator().manual_seed(5)
    own = {n: t for n, t in here.params.items() if n.startswith("adapter.")}
    module = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) * 0.2 for n, t in own.items()}
    return here, module, {**here.params, **stack_modules([own, module], [1.0, 1.0])}


def test_a_client_trains_on_top_of_what_lies_beneath() -> None:
    """One step of SGD is that of the first ranks of a pair that holds both."""
    here, module, whole = beneath_and_whole()
    got = here.train(RoundPlan(context={BENEATH: module})).params
    want = replace(here, params=whole).train().params
    for name, tensor in got.items():
        own = want[name][:2] if name.endswith("lora_A") else want[name][:, :2] if name.endswith("lora_B") else want[name]
        torch.testing.assert_close(tensor, own)
        assert not torch.equal(tensor, here.params[name])


@pytest.mark.parametrize("statistic", ["class_moments", "fisher"])
@pytest.mark.parametrize(("share", "beside"), [(None, False), (0.25, False), (1.0, True)])
def test_statistics_see_what_lies_beneath_as_a_part_of_the_module(statistic: str, share: float | None, beside: bool) -> None:
    """Alone, in a mean with a past module, and beside one at full weight; looked at batch by batch and sample by sample."""
    here, module, whole = beneath_and_whole()
    past = {n: 0.5 * t.flip(0) for n, t in module.items()}
    request = StatisticRequest(statistic, ("head.weight",), blended=share is not None)
    context = {} if share is None else {BACKGROUND: past}
    plan = RoundPlan(train=(), statistics=(request,), context={**context, BENEATH: module}, share=share or 1.0, beside=beside)
    adapter = {n: t for n, t in whole.items() if n.startswith("adapter.")}
    seen = adapter if share is None else stack_modules([past, adapter], [1.0, share])
    want = replace(here, params={**here.params, **seen}).train(RoundPlan(train=(), statistics=(request,))).statistics
    for name, tensor in here.train(plan).statistics.items():
        torch.testing.assert_close(tensor, want[name], atol=1e-5, rtol=1e-4)
