"""What learners are promised: the order of their methods, what a step shows them, and the same numbers together as one by one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from clients import local
from clients.work import Received, Work
from fedsim.core import contracts
from fedsim.core.contracts import ClientWork, Context, Ending, IntArray, LocalState, Outputs, Step, Synthetic
from fedsim.core.errors import ClientFailed
from fedsim.core.messages import ClientUpdate, RoundPlan, Tensors
from fedsim.core.tensors import matching
from fedsim.models.adapters import lora
from fedsim.simulation import run
from tests.clients.test_fused import CLASSES, Here, doubled, require_same, work
from tests.tiny import final_state, kept, learned, same_bits, tiny

EVERY_WAY = {
    "plain": (),
    "augmented": ("transform.augment=crop_flip",),
    "dropout": ("adapter.dropout=0.3",),
    "clipped, in groups": ("client.clip_norm=0.05", 'client.groups=[{match: "head.*", lr: 1.0e-2}]'),
}


@dataclass(frozen=True)
class Busy(contracts.Learner):
    """Uses all that a learner has: replays from its memory, shows samples again, makes others up, asks two teachers, corrects
    gradients, follows steps, remembers. image: shape of those that it makes up; empty: none."""

    image: tuple[int, ...] = (8, 8)

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        own = {n: 1.1 * t for n, t in work.params.items()}
        return {"teacher": context["teacher"], "own": own, "pull": memory["pull"], "stored": memory["stored"].numpy(), "path": []}

    def replay(self, state: LocalState, positions: IntArray, draw: torch.Generator) -> IntArray:
        stored: IntArray = state["stored"]
        return stored[torch.randperm(len(stored), generator=draw)[: 1 + len(positions) // 2].numpy()]

    def again(self, state: LocalState, positions: IntArray, draw: torch.Generator) -> IntArray:
        return positions[: len(positions) // 3]

    def synthetic(self, state: LocalState, positions: IntArray, draw: torch.Generator) -> Synthetic | None:
        count = len(positions) % 3
        if not self.image or not count:
            return None
        pixels = torch.randint(256, (count, *self.image), generator=draw, dtype=torch.uint8)
        return Synthetic({"pixel_values": pixels}, torch.arange(count) - 1)

    def loss(self, state: LocalState, step: Step) -> Tensor:
        made = step.synthetic
        assert made.stop - made.start == step.labels.shape[0] - step.again.stop
        assert (step.positions[step.again] == step.positions[: step.own.stop // 3]).all()
        terms = [(step.logits - step.model(state[who]).logits).square().mean() for who in ("teacher", "own")]
        features = (step.features - step.model(state["teacher"]).features)[step.replayed].square().mean()
        drift = torch.stack([(t - step.start[n]).square().sum() for n, t in step.params.items()]).sum()
        drift = drift + (step.logits[made, 2] * (step.labels[made] + 2)).sum()
        noise = float(torch.rand((), generator=step.draw))
        return (
            terms[0] + 0.5 * terms[1] + features + noise * drift + step.logits[step.replayed, step.labels[step.replayed]].mean()
        )

    def corrected(self, state: LocalState, gradients: Tensors, params: Tensors) -> Tensors:
        return {n: g + 0.01 * state["pull"] * params[n] for n, g in gradients.items()}

    def stepped(self, state: LocalState, params: Tensors) -> None:
        state["path"].append(params["head.bias"].detach().clone())

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        outputs = work.outputs(work.shard[:3], params)
        sums = {
            "path": torch.stack(state["path"]).sum(0),
            "logits": outputs.logits.sum(0),
            "steps": torch.tensor(float(work.steps)),
        }
        return Ending({"pull": 2 * state["pull"], "stored": torch.from_numpy(work.shard[:2])}, sums)


def busy(*overrides: str, **options: Any) -> Here:
    """Clients in float64 with a teacher, each with samples to replay and a number in its memory."""
    here = doubled(work(*overrides, **options))
    generator = torch.Generator().manual_seed(3)
    params = here.jobs[0].params
    teacher = {n: t + 0.1 * torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in params.items()}
    plan = RoundPlan(context={"teacher": teacher})
    memories = [
        {"learner.busy/pull": torch.tensor(float(k), dtype=torch.float64), "learner.busy/stored": torch.arange(k, 3 * k + 4)}
        for k in range(len(here.jobs))
    ]
    jobs = [replace(j, plan=plan, memory=m) for j, m in zip(here.jobs, memories, strict=True)]
    return replace(here, jobs=jobs, learners={"busy": Busy(() if options.get("text") else (8, 8))})


@pytest.mark.parametrize("way", EVERY_WAY)
def test_together_is_as_one_by_one(way: str) -> None:
    here = busy(*EVERY_WAY[way])
    got, want = here.together(), here.one_by_one()
    assert not here.told
    require_same(got, want)
    for k, (g, w) in enumerate(zip(got, want, strict=True)):
        assert isinstance(g, ClientUpdate) and isinstance(w, ClientUpdate)
        if not g.num_samples:
            assert not g.memory and not g.statistics
            continue
        assert g.metrics["together"] == 4
        assert g.memory.keys() == {"learner.busy/pull", "learner.busy/stored"} and float(g.memory["learner.busy/pull"]) == 2 * k
        assert w.statistics.keys() == {"busy.path", "busy.logits", "busy.steps"}
        for name, tensor in w.statistics.items():
            torch.testing.assert_close(g.statistics[name], tensor)


def test_texts_are_replayed_too() -> None:
    here = busy(text=True)
    require_same(here.together(), here.one_by_one())


def test_a_null_learner_moves_no_bit() -> None:
    """Nothing is overridden but what adds nothing; the draws of others do not move either."""
    for augment in ("none", "crop_flip"):
        bare = work(f"transform.augment={augment}", "adapter.dropout=0.3")
        with_null = replace(bare, learners={"null": contracts.Learner(), "quiet": Quiet()})
        for a, b in zip(bare.one_by_one(), with_null.one_by_one(), strict=True):
            assert isinstance(a, ClientUpdate) and isinstance(b, ClientUpdate)
            assert same_bits(a.params, b.params)
        for a, b in zip(bare.together(), with_null.together(), strict=True):
            assert isinstance(a, ClientUpdate) and isinstance(b, ClientUpdate)
            assert same_bits(a.params, b.params)


@dataclass(frozen=True)
class Quiet(contracts.Learner):
    """Looks at everything, draws, asks for another model, and adds nothing."""

    def loss(self, state: LocalState, step: Step) -> None:
        torch.rand(5, generator=step.draw)
        step.model({n: 2 * t for n, t in step.start.items()})

    def corrected(self, state: LocalState, gradients: Tensors, params: Tensors) -> Tensors:
        return {n: g.clone() for n, g in gradients.items()}


@dataclass(frozen=True)
class Watcher(contracts.Learner):
    """Notes what it sees."""

    seen: list[Any] = field(default_factory=list)

    def replay(self, state: LocalState, positions: IntArray, draw: torch.Generator) -> IntArray:
        return positions[:1] - 1 if len(positions) > 2 else positions[:0]

    def loss(self, state: LocalState, step: Step) -> None:
        outputs = step.model(step.start)
        self.seen.append((step, outputs, step.model(step.start) is outputs))


def test_what_a_step_shows() -> None:
    here = work("client.epochs=1", "client.lr=0.5")
    watchers = {"a": Watcher(), "b": Watcher()}
    one = replace(here, learners=watchers).works()[2]
    assert isinstance(local.train(one), ClientUpdate)
    first, second = watchers["a"].seen, watchers["b"].seen
    own = [p for s, _, _ in first for p in s.positions[s.own]]
    assert sorted(own) == sorted(one.shard)
    for (a, outputs, once), (b, others, _) in zip(first, second, strict=True):
        assert once and outputs is others, "one pass of a mapping, however many learners ask"
        assert np.array_equal(a.positions, b.positions) and a.own == b.own
        assert a.replayed.start == a.own.stop and b.replayed.start == a.replayed.stop
        assert len(a.labels) == len(a.positions) == b.replayed.stop
        assert torch.equal(a.labels, one.labels(a.positions))
        assert list(a.classes) == list(CLASSES)
        assert a.params.keys() == a.start.keys() and not any(t.requires_grad for t in a.start.values())
        want = one.outputs(a.positions, a.start)
        for got, expected in zip(outputs, want, strict=True):
            torch.testing.assert_close(got, expected)
    moved = first[-1][0]
    assert any(not torch.equal(moved.params[n], t) for n, t in moved.start.items())
    torch.testing.assert_close(first[0][0].logits, first[0][1].logits)  # at the first step nothing has moved


@dataclass(frozen=True)
class Back(contracts.Learner):
    """How far the model that the round began with is from what it is found to be through `start`."""

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        teacher = context["teacher"]
        return {"received": work.params, "teacher": teacher, "copy": dict(teacher), "far": []}

    def loss(self, state: LocalState, step: Step) -> None:
        begun, found = step.model(state["received"]), step.model(step.start)
        assert step.model(step.start) is found
        head = {"head.weight": step.start["head.weight"]}
        state["far"] += [
            found.features - begun.features,
            found.logits - begun.logits,
            step.outputs(step.positions, step.start).features - begun.features,
            step.head(begun.features, head) - begun.logits,
        ]
        completed = step.model(state["copy"]).features - step.model(state["teacher"]).features
        assert float(completed.abs().max()) > 0, "the teacher is whole by itself"

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        return Ending(None, {"far": torch.stack([t.detach().abs().max() for t in state["far"]]).max()})


@pytest.mark.parametrize("train", ["lora_B", "lora_A"])
def test_the_start_of_a_round_that_trains_one_factor_is_the_model_received(train: str) -> None:
    """Together as one by one; a teacher without some of the tensors is not completed."""
    here = work("client.epochs=1", "client.lr=0.1", adapter="lora")
    less = {n: t for n, t in here.jobs[0].params.items() if "layers.0." not in n}
    plan = RoundPlan(train=(f"*{train}", "head.*"), context={"teacher": less})
    here = replace(here, jobs=[replace(job, plan=plan) for job in here.jobs], learners={"back": Back()})
    for update in (*here.one_by_one(), *here.together()):
        assert isinstance(update, ClientUpdate)
        assert not update.num_samples or float(update.statistics["back.far"]) < 1e-5


@dataclass(frozen=True)
class Painter(contracts.Learner):
    """Makes grey images up, as many as it is told; notes what a step shows of them."""

    count: int = 2
    dtype: torch.dtype = torch.uint8
    seen: list[Step] = field(default_factory=list)

    def synthetic(self, state: LocalState, positions: IntArray, draw: torch.Generator) -> Synthetic | None:
        pixels = torch.full((self.count, 8, 8), 10 * self.count, dtype=self.dtype)
        return Synthetic({"pixel_values": pixels}, torch.full((self.count,), -1)) if self.count else None

    def loss(self, state: LocalState, step: Step) -> None:
        self.seen.append(step)


def test_synthetic_samples_join_the_batch() -> None:
    """Behind the replayed ones, each learner's together; the cross-entropy and its draws do not see them."""
    painters = {"a": Painter(2), "none": Painter(0), "b": Painter(3)}
    here = replace(work("client.epochs=1", "client.batch_size=7"), learners={"w": Watcher(), **painters})
    update = local.train(here.works()[2])
    for a, none, b in zip(*(p.seen for p in painters.values()), strict=True):
        replayed = 1 if a.own.stop > 2 else 0
        end = a.own.stop + replayed
        assert [p.synthetic.start - end for p in (a, none, b)] == [0, 2, 2]
        assert [p.synthetic.stop - end for p in (a, none, b)] == [2, 2, 5]
        assert a.positions[end:].tolist() == [-1] * 5 == a.labels[end:].tolist() and (a.positions[:end] >= 0).all()
        shown = a.inputs["pixel_values"][end:]
        assert shown.float().mean((1, 2)).tolist() == [20, 20, 30, 30, 30]
        assert a.features.shape[0] == a.logits.shape[0] == end + 5
    bare = local.train(replace(here, learners={}).works()[2])
    assert isinstance(update, ClientUpdate) and isinstance(bare, ClientUpdate)
    for name, tensor in bare.params.items():
        torch.testing.assert_close(update.params[name], tensor)


@dataclass(frozen=True)
class Shown(contracts.Learner):
    """Notes blocks, and logits of the head by itself."""

    blocks: ClassVar[bool] = True
    seen: list[Any] = field(default_factory=list)

    def loss(self, state: LocalState, step: Step) -> Tensor:
        step.model(step.start)
        other = {**step.start, "head.weight": 2 * step.start["head.weight"], "head.bias": step.start["head.bias"]}
        by_itself = step.head(step.features.detach())
        (gradient,) = torch.autograd.grad(by_itself.sum(), step.params["head.weight"], retain_graph=True)
        self.seen.append((step, by_itself, step.head(step.features, other), gradient))
        return 0.1 * by_itself.square().mean()


def test_the_head_by_itself_and_the_blocks() -> None:
    shown = Shown()
    here = replace(doubled(work("client.epochs=1", "model.config.num_hidden_layers=3")), learners={"shown": shown})
    update = here.one_by_one()[2]
    assert isinstance(update, ClientUpdate)
    assert here.together() and here.told == [
        "clients are trained one by one, whatever runtime.fused says: learner shown looks at the encoder's blocks"
    ]
    for step, by_itself, other, gradient in shown.seen[:3]:
        assert torch.equal(by_itself, step.logits)
        bias = step.start["head.bias"]
        torch.testing.assert_close(other - bias, 2 * (step.features @ step.start["head.weight"].T))
        assert [b.shape for b in step.blocks] == [(len(step.labels), 5, 16)] * 3 and step.blocks[0].requires_grad
        torch.testing.assert_close(gradient, step.features.detach().sum(0).expand(6, -1))


@dataclass(frozen=True)
class NotStacked(lora.Adapter):
    """LoRA without a form for several clients at once."""

    stacked = contracts.Adapter.stacked


@pytest.mark.parametrize(("adapter", "stacks"), [("lora", True), ("lora", False), ("prefix", True)])
def test_every_samples_gradient(adapter: str, stacks: bool) -> None:
    """In one backward, or one by one where the adapter cannot be stacked, against autograd on a single sample."""
    one = doubled(work(adapter=adapter)).works()[1]
    if not stacks:
        one.model.adapter = NotStacked(rank=2, targets="all-linear", alpha=3.0)
    names = ["head.bias", *[n for n in one.params if n.startswith("adapter.")][:3]]

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    chunks = list(one.gradients(one.shard, one.params, names, loss))
    assert np.array_equal(np.concatenate([positions for positions, _ in chunks]), one.shard)
    got = {n: torch.cat([g[n] for _, g in chunks]) for n in names}
    for k, position in enumerate(one.shard):
        leaves = {n: one.params[n].detach().clone().requires_grad_() for n in names}
        inputs, label = one.samples.batch(np.array([position]))
        with one.model.applied({**one.params, **leaves}):
            logits = one.model.logits(one.model.features(inputs), {**one.params, **leaves})
        want = torch.autograd.grad(loss(logits, label).sum(), list(leaves.values()))
        for n, g in zip(names, want, strict=True):
            torch.testing.assert_close(got[n][k], g)


@dataclass(frozen=True)
class Wishful(contracts.Learner):
    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        return {"teacher": context["teacher"]}


@dataclass(frozen=True)
class Renames(contracts.Learner):
    def corrected(self, state: LocalState, gradients: Tensors, params: Tensors) -> Tensors:
        return {"other": torch.zeros(1)}


@dataclass(frozen=True)
class Forgets(contracts.Learner):
    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        return Ending({"x": torch.tensor(torch.nan)})


@pytest.mark.parametrize(
    ("learner", "reason"),
    [
        (Wishful(), "learner odd looks for the context 'teacher', which nobody sends in task 1, round 1 (there is nothing)"),
        (Renames(), "learner odd: 'corrected' must give gradients of the same names, "),
        (Forgets(), "memory 'learner.odd/x' holds NaN or infinity"),
        (Painter(dtype=torch.float32), "of theirs is torch.uint8 (8, 8) and torch.float32 (8, 8)"),
    ],
)
def test_what_goes_wrong_is_one_line(learner: contracts.Learner, reason: str) -> None:
    (failed, *_) = replace(work(), learners={"odd": learner}).one_by_one()
    assert isinstance(failed, ClientFailed) and reason in failed.reason and "\n" not in failed.reason


# ---------------------------------------------------------------- runs

COUNTER = '''
from dataclasses import dataclass
import torch
from fedsim.core import contracts
from fedsim.core.contracts import Ending, Traits

@dataclass(frozen=True)
class Learner(contracts.Learner):
    """Counts rounds in its memory, and what all clients have seen on the server, which tells them; pulls towards the teacher."""

    @property
    def traits(self):
        return Traits(needs={"context teacher": "needs several tasks"})

    def begin(self, work, memory, context, draw):
        count = memory.get("count", torch.tensor(0.0))
        assert float(context["own"]["rounds"]) == work.task * work.config.server.rounds + work.round
        assert ("teacher" in context) == (work.task > 0)
        return {"count": count, "told": context["own"]["sum"], "teacher": context.get("teacher")}

    def loss(self, state, step):
        rest = step.logits.mean() * 1e-3 * (state["count"] + state["told"])
        return rest if state["teacher"] is None else rest + (step.logits - step.model(state["teacher"]).logits).square().mean()

    def end(self, state, work, params, draw):
        count = state["count"] + 1 + torch.rand((), generator=draw)
        return Ending({"count": count}, {"count": count})

    def opened(self, state, params, task):
        return state or {"sum": torch.zeros((), dtype=torch.float64), "rounds": 0, "ends": 0, "moments": 0.0}

    def context(self, state):
        return {"sum": state["sum"].float(), "rounds": torch.tensor(float(state["rounds"]))}

    def heard(self, state, total, clients):
        return state | {"sum": state["sum"] + total["count"] / clients, "rounds": state["rounds"] + 1}

    def closing(self, state, params):
        from fedsim.core.messages import RoundPlan, StatisticRequest
        return RoundPlan(statistics=(StatisticRequest("class_moments", ("head.weight",), {"form": "scalar"}),))

    def closed(self, state, params, total):
        seen = float(total["class_moments.count/head.weight"].sum())
        return state | {"ends": state["ends"] + 1, "moments": state["moments"] + seen}

    def made(self, state, server):
        assert server.task == 0 and list(server.seen) == [0, 1, 2]
        pixels = torch.rand(3, *server.image_shape, generator=server.draw, requires_grad=True)
        (gradient,) = torch.autograd.grad(server.outputs(pixels).logits.logsumexp(1).sum(), pixels)
        return state | {"sum": state["sum"] + gradient.norm().double(), "made": state.get("made", 0) + 1}
'''


def counting(tmp_path: Path, name: str, *overrides: str) -> Any:
    (tmp_path / "counter.py").write_text(COUNTER)
    learners = {"client": {"learners": [str(tmp_path / "counter.py")]}}
    return tiny("server.rounds=2", *overrides, output=tmp_path / name, **learners)


def test_both_halves_over_a_run(tmp_path: Path) -> None:
    """Its sums, its context and its pass at a task's end; a run that is stopped goes on to the same bits."""
    config = counting(tmp_path, "whole", "server.aggregator=fedavg")
    state = final_state(run(config).path, config)
    server = state.learners["counter"]
    assert server["rounds"] == 2 * len(state.classes and {c.task for c in state.classes}) and server["ends"] == 2
    assert server["moments"] == 72.0, "every training sample once"
    assert server["made"] == 1 and state.seconds["server"] > 0, "after every task but the last"
    assert state.bytes["down"]["context"] > 0
    whole = counting(tmp_path, "one-by-one", "server.aggregator=prototype_margin")
    other = final_state(run(whole).path, whole)
    assert other.learners["counter"]["rounds"] == server["rounds"]
    for stop in (1, 3):
        cut = counting(tmp_path, f"cut-{stop}", "server.aggregator=fedavg")
        with pytest.raises(KeyboardInterrupt):
            run(cut, output=tmp_path / f"stopped-{stop}", progress=Stop(stop))
        resumed = run(resume=tmp_path / f"stopped-{stop}")
        assert same_bits(learned(state), learned(final_state(resumed.path, cut)))


REVIEWER = '''
from dataclasses import dataclass
import torch
from fedsim.core import contracts
from fedsim.core.contracts import Ending

@dataclass(frozen=True)
class Learner(contracts.Learner):
    """Looks through what is deployed; its server half moves the head's bias, and deploys another head."""

    def begin(self, work, memory, context, draw):
        assert int(memory.get("reviews", torch.tensor(0))) == work.task
        return {}

    def review(self, work, memory, context, draw):
        assert not work.trained and float(context["own"]["rounds"]) == 2 * (work.task + 1)
        logits = work.outputs(work.shard, work.params).logits
        if work.client_id == 1:
            return Ending(statistics={"logits": logits.sum(0)})
        return Ending({"reviews": memory.get("reviews", torch.tensor(0)) + 1}, {"logits": logits.sum(0)})

    def opened(self, state, params, task):
        return state or {"rounds": 0.0, "logits": torch.zeros(6, dtype=torch.float64), "taken": [], "before": []}

    def context(self, state):
        return {"rounds": torch.tensor(state["rounds"])}

    def merged(self, state, before, after, taken, clients):
        assert clients == 3 and before.keys() == after.keys()
        moved = {**after, "head.bias": after["head.bias"] + 1}
        state = state | {"rounds": state["rounds"] + 1, "taken": [*state["taken"], taken]}
        return state | {"before": [*state["before"], before["head.bias"]]}, moved

    def lift(self, statistics, num_samples):
        assert set(statistics) <= {"logits"}
        return super().lift(statistics, num_samples)

    def closed(self, state, params, total):
        return state | {"logits": state["logits"] + total["logits"]}

    def deployed(self, state, params):
        return {**params, "head.weight": 0 * params["head.weight"], "head.bias": torch.arange(6.0)}
'''


def test_review_merged_and_deployed(tmp_path: Path) -> None:
    """In a run: what clients say of the deployed model, what they then remember, the bias that the server moved, and the head
    that it deployed, of which nothing is left when training goes on. Stopped and gone on with, the same bits."""
    (tmp_path / "reviewer.py").write_text(REVIEWER.replace("work.task\n", "(work.task if work.client_id != 1 else 0)\n"))
    learners = {"client": {"learners": [str(tmp_path / "reviewer.py"), {"name": "er", "size": 4}]}}
    options = ("server.aggregator=fedavg", "server.consolidator=none", "partition.name=iid")
    config = tiny(*options, output=tmp_path / "whole", **learners)
    results = run(config)
    state = final_state(results.path, config)
    server, last = state.learners["reviewer"], [c for c in state.classes if c.stage == "task_end"]
    assert server["taken"] == [3] * 4 and server["rounds"] == 4.0
    assert [int(r.predicted > 0) for r in last if r.task == 1] == [0, 0, 0, 0, 0, 1], "the head of a bias alone, as deployed"
    assert not torch.equal(state.params["head.bias"], torch.arange(6.0))
    assert float((server["before"][1] - server["before"][0]).mean()) > 0.9, "every round begins where the server moved to"
    memory = {client: set(tensors) for client, tensors in kept(results.path)["memory"].items()}
    assert all("learner.er/positions" in names for names in memory.values())
    assert {c: "learner.reviewer/reviews" in names for c, names in memory.items()} == {0: True, 1: False, 2: True}
    up = {k: v for k, v in state.bytes["up"].items() if k == "statistics"}
    assert up == {"statistics": 2 * 3 * 6 * 4}, "two passes, three clients, six floats"
    again = tiny(*options, output=tmp_path / "cut", **learners)
    with pytest.raises(KeyboardInterrupt):
        run(again, output=tmp_path / "stopped", progress=Stop(2))
    resumed = run(resume=tmp_path / "stopped")
    assert same_bits(learned(state), learned(final_state(resumed.path, again)))
    assert same_bits(kept(results.path), kept(resumed.path))


class Stop:
    """Ctrl-C when the given number of rounds are done."""

    def __init__(self, rounds: int) -> None:
        self.left = rounds

    def __call__(self, event: Any) -> None:
        self.left -= type(event).__name__ == "RoundDone"
        if self.left < 0:
            raise KeyboardInterrupt


def test_received_is_on_the_device_once() -> None:
    here = busy()
    received = Received.on(here.model.device, here.jobs[0].params, here.jobs[0].plan)
    assert received.context["teacher"].keys() == here.jobs[0].params.keys() and received.background == {}
    assert isinstance(here.works()[0], Work) and isinstance(Outputs(torch.zeros(1), torch.zeros(1)), tuple)


@dataclass(frozen=True)
class OnTop(contracts.Learner):
    """Looks through what it received, and through the teacher."""

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        return {"received": work.params, "teacher": context["teacher"], "work": work}

    def loss(self, state: LocalState, step: Step) -> None:
        if "seen" not in state:
            state["seen"] = (
                step.positions,
                step.logits.detach(),
                [step.model(state[who]).logits for who in ("received", "teacher")],
            )

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        positions, own, (received, teacher) = state["seen"]
        for got, who in ((received, "received"), (teacher, "teacher")):
            torch.testing.assert_close(got, work.outputs(positions, state[who]).logits)
        return Ending({}, {"own": own, "received": received, "teacher": teacher})


def test_what_trains_on_past_modules_is_looked_at_on_top_of_them_and_a_teacher_is_whole() -> None:
    """Before the first step, what a client received gives the logits that it trains; a teacher gives its own, modules or not."""
    here = doubled(work("client.epochs=1"))
    past = {n: -t for n, t in here.jobs[0].params.items() if n.startswith("adapter.")}
    teacher = {n: 1.1 * t for n, t in here.jobs[0].params.items()}
    looked = []
    for beside in (True, False):
        plan = RoundPlan(context={"background": past, "teacher": teacher}, beside=beside)
        there = replace(here, jobs=[replace(j, plan=plan) for j in here.jobs], learners={"on_top": OnTop()})
        got = there.one_by_one()
        require_same(there.together(), got)
        looked.append([u.statistics for u in got if isinstance(u, ClientUpdate) and u.num_samples])
    for on_top, alone in zip(*looked, strict=True):
        torch.testing.assert_close(on_top["on_top.own"], on_top["on_top.received"])
        torch.testing.assert_close(on_top["on_top.teacher"], alone["on_top.teacher"])
        assert not torch.allclose(on_top["on_top.received"], alone["on_top.received"])


@dataclass(frozen=True)
class Twin(contracts.Learner):
    """Holds a client's first step against the received model and the teacher: how far they are in the step, and in a pass."""

    received: list[tuple[float, float]] = field(default_factory=list)
    taught: list[tuple[float, float]] = field(default_factory=list)

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        return {"received": work.params, "teacher": context[contracts.TEACHER]}

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        if not state.get("seen"):
            for others, told in ((state["received"], self.received), (state["teacher"], self.taught)):
                found = step.model(others).features, step.outputs(step.positions, others).features
                own = step.features.detach()
                told.append((float((own - found[0]).abs().max()), float((own - found[1]).abs().max())))
            state["seen"] = True
        return None


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("adapter", ["dualprompt", "l2p", "l2p, batchwise", "codaprompt"])
def test_the_received_model_chooses_prompts_as_the_step_does(adapter: str, together: bool) -> None:
    """In a second task. Nothing has moved at the first step, so that features are the received model's; the teacher's, of the
    same numbers, are those of inference, where dualprompt chooses among tasks. What a batch votes for, no sample says alone."""
    here = doubled(work("client.epochs=1", adapter=adapter))
    draw = torch.Generator().manual_seed(5)
    params = {n: torch.randn(t.shape, generator=draw).double() for n, t in here.model.grown(here.jobs[0].params, draw).items()}
    query_D = here.model.query(here.samples.batch(np.arange(9))[0]).mean(0)
    params |= {n: query_D * (1 if "task0" in n else -1) for n in params if ".key.task" in n}  # the nearest is the first task's
    frozen = matching(params, here.model.frozen(params))
    plan = RoundPlan(train=tuple(n for n in params if n not in frozen), context={contracts.TEACHER: dict(params)})
    twin = Twin()
    here = replace(here, jobs=[replace(j, params=params, plan=plan) for j in here.jobs], learners={"twin": twin})
    updates = here.together() if together else here.one_by_one()
    assert all(isinstance(update, ClientUpdate) for update in updates) and not here.told
    voted, tasks = adapter.endswith("batchwise"), adapter == "dualprompt"
    in_step, alone = (max(apart) for apart in zip(*twin.received, strict=True))
    assert len(twin.received) > 2 and in_step < 1e-9 and (alone > 1e-3 if voted else alone < 1e-9)
    for apart in zip(*twin.taught, strict=True):
        assert max(apart) > 1e-3 if voted or tasks else max(apart) < 1e-9
