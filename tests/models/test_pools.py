"""Pools of prompts against computations by hand: which prompts a sample gets, what is trained, what travels."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clients.learners._buffers import Buffer
from clients.learners.er import Learner as Er
from fedsim.core.contracts import Step
from fedsim.core.errors import FedsimError
from fedsim.core.messages import ClientUpdate, RoundPlan, StatisticRequest, Tensors
from fedsim.core.tensors import matching
from fedsim.models import inject
from fedsim.models.adapters import _keys, l2p, lora
from fedsim.models.model import ADAPTER, Model
from fedsim.runs.results import Results
from fedsim.simulation import prepare, run
from fedsim.unlearning.finished import FinishedRun
from fedsim.unlearning.remove import remove
from server import checkpoint
from server.state import ServerState
from tests.clients.test_fused import ADAPTERS, Here, doubled, require_same, work
from tests.models.conformance import verdict
from tests.models.zoo import VIT, images, model, trained
from tests.tiny import final_state, learned, plain_vit, same_bits, stopping, tiny

L2P, DUAL = ADAPTERS["l2p"], ADAPTERS["dualprompt"]
POOLS = {"l2p": L2P, "dualprompt": DUAL}
NULL = {"l2p": {**L2P, "length": 0}, "dualprompt": {**DUAL, "shared": 0, "own": 0}}


def after_tasks(built: Model, tasks: int, seed: int = 4) -> dict[str, Tensor]:
    """Tensors as after so many tasks, in which nothing is zero."""
    params, generator = trained(built, seed), torch.Generator().manual_seed(seed)
    for _ in range(tasks - 1):
        grown = built.grown(params, generator)
        params |= {n: torch.randn(t.shape, generator=generator).to(torch.float64) for n, t in grown.items() if n not in params}
    return params


def queries(count: int) -> Tensor:
    """As far from each other as those of real images: the features of noise are nearly the same."""
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def cosines_by_hand(queries: Tensor, keys: Tensor) -> np.ndarray[Any, Any]:
    q, k = queries.numpy(), keys.numpy()
    return np.array([[a @ b / np.sqrt((a @ a) * (b @ b)) for b in k] for a in q])


# ---------------------------------------------------------------- what a sample gets


@torch.no_grad()
@pytest.mark.parametrize("reads", l2p.READS)
def test_l2p_by_hand(reads: str) -> None:
    """The N nearest prompts behind the class token, through blocks that know of no adapter, and the mean of their outputs."""
    built, inputs = model(VIT, {**L2P, "reads": reads}), images(4)
    params = trained(built)
    prompt, key = params["adapter.layers.0.pool_prompt"], params["adapter.layers.0.pool_key"]
    encoder: Any = built.backbone.encoder
    pixels = built.shown(inputs)["pixel_values"].double()
    query = queries(4)
    nearest = np.argsort(-cosines_by_hand(query, key), axis=1)[:, :2]
    for opened in (built.applied, built.merged):
        with opened(params):
            features = built.features(inputs, query=query)
        for i, chosen in enumerate(nearest):
            tokens = encoder.embeddings(pixels[i : i + 1])
            tokens = torch.cat([tokens[:, :1], *(prompt[m][None] for m in chosen), tokens[:, 1:]], dim=1)
            for block in encoder.layers:
                tokens = block(tokens)
            outputs = encoder.layernorm(tokens)[0]
            want = outputs[(1 if reads == "prompts" else 0) : 1 + 2 * 3].mean(dim=0)
            torch.testing.assert_close(features[i], want, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_dualprompt_has_a_tasks_own_prefix_in_training_and_the_nearest_in_inference() -> None:
    built, by_prefix, inputs = model(VIT, DUAL), model(VIT, {"name": "prefix"}), images(6)
    params = after_tasks(built, 3)
    part = "adapter.layers.{}.prefix_{}{}"
    keys = torch.stack([params[f"adapter.layers.1.key.task{t}"] for t in range(3)])

    def with_prefix_of(task: int) -> Tensor:
        """The same by the adapter whose prefixes are for all samples the same."""
        names = {part.format(0, kv, ""): params[part.format(0, kv, "")] for kv in ("key", "value")}
        names |= {part.format(1, kv, ""): params[part.format(1, kv, f".task{task}")] for kv in ("key", "value")}
        with by_prefix.applied(names):
            return by_prefix.features(inputs)

    with built.applied(params):
        torch.testing.assert_close(built.features(inputs), with_prefix_of(2), rtol=1e-12, atol=1e-12)
    query = queries(6)
    nearest = cosines_by_hand(query, keys).argmax(axis=1)
    assert len(set(nearest)) > 1
    with built.merged(params):
        features = built.features(inputs, query=query)
    for i, task in enumerate(nearest):
        torch.testing.assert_close(features[i], with_prefix_of(int(task))[i], rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("adapter", NULL)
def test_without_prompts_features_are_the_bare_backbones(adapter: str) -> None:
    built = model(VIT, NULL[adapter])
    assert built.init_adapter(torch.Generator()) == {}
    with built.merged({}):
        assert torch.equal(built.features(images()), built.query(images()))


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("section", POOLS.values(), ids=POOLS)
def test_the_key_loss_by_hand_and_a_step_along_it(section: dict[str, Any]) -> None:
    built = model(VIT, {**section, "pull": 0.7})
    params = {n: t.requires_grad_() for n, t in after_tasks(built, 2).items()}
    query = queries(5)
    name = next(n for n in reversed(params) if "pool_key" in n or ".key." in n)
    keys = params[name].detach().view(-1, 16)
    cosines = cosines_by_hand(query, keys)
    chosen = np.sort(cosines, axis=1)[:, -2:] if section is L2P else cosines
    loss = built.loss(params, query)
    assert loss is not None
    assert loss.item() == pytest.approx(-0.7 * chosen.mean(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, params[name])
    others = torch.autograd.grad(built.loss(params, query), [t for n, t in params.items() if n != name], allow_unused=True)  # type: ignore[arg-type]
    assert all(g is None for g in others)
    with torch.no_grad():
        params[name] -= 0.01 * gradient
    after = built.loss(params, query)
    assert after is not None and after.item() < loss.item()


def test_only_chosen_prompts_get_a_gradient() -> None:
    built, inputs = model(VIT, {**L2P, "size": 40, "top": 2}), images(3)
    params = {n: t.requires_grad_() for n, t in trained(built).items()}
    with built.applied(params):
        built.features(inputs, query=queries(3)).square().sum().backward()  # type: ignore[no-untyped-call]
    prompt, key = params["adapter.layers.0.pool_prompt"], params["adapter.layers.0.pool_key"]
    chosen = np.unique(np.argsort(-cosines_by_hand(queries(3), key.detach()), axis=1)[:, :2])
    assert prompt.grad is not None and key.grad is None
    assert np.flatnonzero(prompt.grad.abs().sum(dim=(1, 2)).numpy()).tolist() == chosen.tolist()


@pytest.mark.parametrize("section", POOLS.values(), ids=POOLS)
def test_without_pull_keys_are_neither_moved_nor_sent(section: dict[str, Any]) -> None:
    built = model(VIT, {**section, "pull": 0.0})
    params = after_tasks(built, 2)
    assert built.loss(params, built.query(images())) is None
    keys = {n for n in params if "pool_key" in n or ".key." in n}
    assert keys and keys <= set(matching(params, built.frozen(params)))


def test_the_vote_of_a_batch_by_counting() -> None:
    """Two slots of 4 rows, of which 4 and 3 count; equal numbers of votes go to the smaller index."""
    chosen = torch.tensor([[3, 1], [3, 0], [2, 3], [1, 2], [4, 0], [0, 4], [4, 2], [2, 1]])
    got = _keys.voted(chosen, 5, (4, 3), 4)
    for slot, own in ((0, 4), (1, 3)):
        votes = Counter(chosen[4 * slot : 4 * slot + own].flatten().tolist())
        want = sorted(range(5), key=lambda m: (-votes[m], m))[:2]
        assert got[4 * slot : 4 * slot + 4].tolist() == [want] * 4


# ---------------------------------------------------------------- together, and what is kept of queries

WAYS = {
    "l2p": ("l2p",),
    "l2p, augmented": ("l2p", "transform.augment=crop_flip"),
    "l2p, by vote": ("l2p", "adapter.batchwise=true"),
    "dualprompt": ("dualprompt",),
    "dualprompt, augmented": ("dualprompt", "transform.augment=crop_flip"),
    "dualprompt, without pull": ("dualprompt", "adapter.pull=0"),
}


def second_task(adapter: str, *overrides: str) -> Here:
    """Clients in float64 in their second task, who replay samples of other clients' shards too."""
    here = doubled(work(*overrides, adapter=adapter))
    params = here.model.grown(here.jobs[0].params, torch.Generator().manual_seed(2))
    params = {n: t.double() for n, t in params.items()}
    frozen = matching(params, here.model.frozen(params))
    plan = RoundPlan(
        train=tuple(n for n in params if n not in frozen), statistics=(StatisticRequest("class_moments", ("head.weight",)),)
    )
    memory = {f"learner.er/{n}": t for n, t in Buffer(np.array([0, 20, 40]), {}, 3, task=0).memory().items()}
    jobs = [replace(job, params=params, plan=plan, memory=memory) for job in here.jobs]
    return replace(here, jobs=jobs, learners={"er": Er(size=4, batch_size=3)})


@pytest.mark.parametrize("way", WAYS)
def test_together_is_as_one_by_one(way: str) -> None:
    here = second_task(*WAYS[way])
    got = here.together()
    assert not here.told
    require_same(got, here.one_by_one(), 1e-9)
    names = got[0].params.keys()  # type: ignore[union-attr]
    assert any(n.startswith(ADAPTER) for n in names)
    assert not any(n.endswith("task0") for n in names)
    assert ("adapter.layers.1.key.task1" in names) == (way in ("dualprompt", "dualprompt, augmented"))


KEEPING = {"l2p": ("l2p",), "above a block": ("dualprompt", "adapter.shared=0")}


@pytest.mark.parametrize("way", KEEPING)
def test_queries_found_or_computed_again_are_the_same(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here, forgetting = second_task(*KEEPING[way]), second_task(*KEEPING[way], "runtime.cache=false")
    passes, real = list[int](), Model.query

    def counted(self: Model, inputs: Tensors) -> Tensor:
        passes.append(len(inputs["pixel_values"]))
        return real(self, inputs)

    monkeypatch.setattr(Model, "query", counted)
    first = here.one_by_one()
    computed = len(passes)
    again, anew = here.one_by_one(), forgetting.one_by_one()
    for a, b, c in zip(first, again, anew, strict=True):
        assert isinstance(a, ClientUpdate) and isinstance(b, ClientUpdate) and isinstance(c, ClientUpdate)
        assert same_bits(a.params, b.params) and same_bits(a.params, c.params)
        assert same_bits(a.statistics, b.statistics) and same_bits(a.statistics, c.statistics)
    found = passes[computed : 2 * computed]
    assert 0 < sum(found) < sum(passes[:computed])


def test_outputs_between_rounds_find_the_queries_of_a_shard() -> None:
    """Half of the passes are saved."""
    one = second_task("dualprompt").works()[0]
    inputs, encoder, passes = one.samples.batch(one.shard)[0], one.model.backbone.encoder, list[int]()
    with torch.no_grad(), one.looking(one.params):
        want = one.model.features(inputs)
    for expected in (2, 1):
        with inject.installed([lambda: encoder.register_forward_hook(lambda *told: passes.append(1))]):
            torch.testing.assert_close(one.outputs(one.shard, one.params).features, want)
        assert len(passes) == expected
        passes.clear()


def test_a_learner_sees_the_queries_that_the_adapter_was_asked_with(monkeypatch: pytest.MonkeyPatch) -> None:
    for augment in ("none", "crop_flip"):
        here, seen, asked = second_task("l2p", f"transform.augment={augment}"), list[Step](), list[Tensor]()
        monkeypatch.setattr(Er, "loss", lambda self, state, step, seen=seen: seen.append(step))
        monkeypatch.setattr(l2p.Adapter, "loss", lambda self, tensors, query, asked=asked: asked.append(query))
        here.one_by_one()
        for step, own in zip(seen, asked, strict=True):
            assert step.query is not None and len(step.query) > step.own.stop
            assert torch.equal(step.query[step.own], own), "the adapter's own term is over the client's own samples"
            assert step.query is not None and not step.query.requires_grad
            close = torch.allclose(step.query, here.model.query(step.inputs), rtol=1e-9)
            assert close == (augment == "none")


@dataclass(frozen=True)
class Shrinking(lora.Adapter):
    """A term of its own, without queries."""

    def loss(self, tensors: Tensors, query_bD: Tensor | None) -> Tensor:
        assert query_bD is None
        return torch.stack([t.square().sum() for n, t in tensors.items() if n.endswith("lora_B")]).sum()


def test_any_adapter_may_add_a_term() -> None:
    """Its gradient by hand: 2 B more in the first step, which is the only one."""
    found = {}
    for shrinks in (False, True):
        here = doubled(work("client.optimizer=sgd", "client.epochs=1", "client.batch_size=64", "client.lr=0.1"))
        if shrinks:
            here.model.adapter = Shrinking(targets="all-linear", rank=2, alpha=3.0)
        require_same(here.together(), here.one_by_one(), 1e-9)
        found[shrinks] = here.one_by_one()[0]
    plain, shrunk = (found[s].params for s in (False, True))  # type: ignore[union-attr]
    for name, tensor in plain.items():
        more = 2 * here.jobs[0].params[name] if name.endswith("lora_B") else torch.zeros(())
        torch.testing.assert_close(shrunk[name], tensor - 0.1 * more, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- whole runs

DEVICES, ROUNDS, TASKS = 3, 2, 3
RUN = (
    "server.aggregator=fedavg", "server.consolidator=none", f"server.rounds={ROUNDS}", f"stream.tasks={TASKS}", "client.epochs=1",
    "partition={name: iid, clients: 3}", "client.weight_decay=0.1",
)  # fmt: skip


def play(path: Path, section: dict[str, Any], *overrides: str) -> tuple[Results, ServerState]:
    config = tiny(*RUN, *overrides, adapter=section, output=path, model=plain_vit())
    results = run(config)
    assert results.path is not None
    return results, final_state(results.path, config)


@pytest.fixture(scope="module")
def dual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, ServerState]:
    """A run of three tasks that keeps what clients sent."""
    return play(tmp_path_factory.mktemp("dual"), DUAL, "server.unlearning=true")


def test_what_dualprompt_learned_stays_and_does_not_travel_again(dual: tuple[Results, ServerState]) -> None:
    """Three tasks, with weight decay: tensors of earlier tasks keep their bits. Up goes what was trained, down what changed."""
    results, state = dual
    ends = [load_file(results.path / "vectors" / f"task-{t}" / "end.safetensors") for t in range(TASKS)]  # type: ignore[operator]
    for task, end in enumerate(ends):
        own = {n: t for n, t in end.items() if n.endswith(f".task{task}")}
        assert own.keys() == {f"adapter.layers.1.{n}.task{task}" for n in ("prefix_key", "prefix_value", "key")}
        assert not any(n.endswith(f".task{task + 1}") for n in end)
        assert same_bits(own, {n: state.params[n] for n in own})
        for name in own:
            assert (load_file(results.path / "vectors" / f"task-{task}" / "start.safetensors")[name] != own[name]).any()  # type: ignore[operator]
    shared, own_size = 2 * 2 * 16, 2 * 3 * 16 + 16
    assert results.costs["bytes"]["up"]["adapter"] == 4 * DEVICES * ROUNDS * TASKS * (shared + own_size)
    # of a task's own: as it is drawn, after the first round, and, when the next task begins, after the last
    assert results.costs["bytes"]["down"]["adapter"] == 4 * DEVICES * (
        ROUNDS * TASKS * shared + (ROUNDS * TASKS + TASKS - 1) * own_size
    )


def test_l2p_travels_whole(tmp_path: Path) -> None:
    for pull, numbers in ((0.5, 5 * 3 * 16 + 5 * 16), (0.0, 5 * 3 * 16)):
        results, state = play(tmp_path / str(pull), {**L2P, "pull": pull}, "server.rounds=1", "stream.tasks=2")
        assert results.costs["bytes"]["up"]["adapter"] == 4 * DEVICES * 2 * numbers
        assert {n for n in state.params if n.startswith(ADAPTER)} == {f"adapter.layers.0.pool_{n}" for n in ("prompt", "key")}


def test_no_prompts_are_no_adapter(tmp_path: Path) -> None:
    """FedAvg of the head alone, bit for bit."""
    short = ("server.rounds=1", "stream.tasks=2")
    bare, want = play(tmp_path / "bare", {"name": "none"}, *short)
    for name, null in NULL.items():
        results, state = play(tmp_path / name, null, *short)
        assert same_bits(state.params, want.params)
        assert results.accuracy.tobytes() == bare.accuracy.tobytes()


def test_it_goes_on_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the first task, and within the second."""
    overrides = ("client.learners=[{name: er, size: 4}]", "stream.tasks=2")
    _, want = play(tmp_path / "whole", DUAL, *overrides)
    config = tiny(*RUN, *overrides, adapter=DUAL, output=tmp_path, model=plain_vit())
    for after in (3, 4):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", stopping(after))
            with pytest.raises(KeyboardInterrupt):
                run(config, output=tmp_path / str(after))
        run(resume=tmp_path / str(after))
        assert same_bits(learned(final_state(tmp_path / str(after), config)), learned(want))


def test_clients_are_taken_out_of_a_pool(dual: tuple[Results, ServerState]) -> None:
    results, state = dual
    removed = remove(FinishedRun(results.path), [1])  # type: ignore[arg-type]
    assert removed.deployed.keys() == state.params.keys()
    moved = {n for n, t in removed.deployed.items() if not torch.equal(t, state.params[n])}
    assert {n for n in state.params if ".task" in n} <= moved


# ---------------------------------------------------------------- what is refused

REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "modules that are averaged": (DUAL, ("server.consolidator=mean",), r"adapter dualprompt keeps .* use consolidator: none"),
    "modules that are stacked": (L2P, ("server.consolidator=regmean",), r"adapter l2p keeps .* use consolidator: none"),
    "a block twice": ({**DUAL, "own_blocks": [-2]}, (), r"shared_blocks and adapter.own_blocks both name 'layers.0'"),
    "blocks that are not there": ({**DUAL, "own_blocks": [2]}, (), "names block 2, but the backbone has blocks 0 to 1"),
    "more than the pool has": ({**L2P, "top": 6}, (), "top must be from 1 to size, the 5 prompts of the pool, got 6"),
    "a negative weight": ({**DUAL, "pull": -1.0}, (), "pull must not be negative"),
    "no blocks": ({**DUAL, "own_blocks": []}, (), "own_blocks is empty, but own is 3"),
    "another reading": ({**L2P, "reads": "cls"}, (), "reads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_one_line_before_training(case: str) -> None:
    section, overrides, message = REFUSED[case]
    with pytest.raises(FedsimError, match=message) as told:
        prepare(tiny(*RUN, *overrides, adapter=section, model=plain_vit()))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("adapter", POOLS)
@pytest.mark.parametrize("family", ["bert", "convnext"])
def test_a_backbone_without_an_images_tokens_is_refused(family: str, adapter: str) -> None:
    found = verdict(family, adapter).refused
    assert found is not None and found.startswith(f"the adapter {adapter} does not fit") and "use the adapter lora" in found
