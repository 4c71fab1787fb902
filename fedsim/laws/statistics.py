"""The laws that every statistic keeps: what a pass over samples gives is what its formula says, however it is cut into batches.

A statistic is held against them on a model of two linear layers that is fed with a client's made-up inputs, and on those of its
subjects that it takes; one that asks a client's work for gradients, on the tensors of a linear head.

Shapes: N samples, I inputs of a layer, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.core.contracts import IntArray, Outputs, Statistic, WorkStatistic
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD_BIAS, HEAD_WEIGHT
from fedsim.core.rng import torch_stream
from fedsim.laws.comparing import ROUNDED, expect_bits, expect_close, expect_finite, expect_unchanged
from fedsim.laws.frame import Law, LawBroken
from fedsim.laws.made_up import CLASSES, LAYERS, Client, make_client, make_params

BATCH = 7
TOLERANCES = {torch.float32: ROUNDED, torch.bfloat16: 2.0**-7}  # by the type in which a statistic travels, of its largest number


class Echo(nn.Module):
    """A model whose layers are fed with the inputs that it is given, and whose features are given too."""

    num_classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        self.layers = {name: nn.Linear(inputs, outputs) for name, (outputs, inputs) in LAYERS.items()}

    def features(self, inputs: Tensors) -> Tensor:
        for name, layer in self.layers.items():
            layer(inputs[name].float())
        return inputs["features"]

    def logits(self, features: Tensor, params: Tensors) -> Tensor:
        return features @ params[HEAD_WEIGHT].T

    def head_inputs(self, features: Tensor, params: Tensors) -> Tensor:
        return features

    def layer(self, parameter: str) -> nn.Module:
        return self.layers[parameter.rpartition(".")[0]]


@dataclass(frozen=True, eq=False)
class HeadOnly:
    """The part of `ClientWork` that statistics ask: samples whose features nothing changes, under a linear head, and what goes
    into layers."""

    features_ND: Tensor
    labels_N: Tensor
    inputs_NI: Tensors
    classes: Sequence[int] = tuple(range(CLASSES))
    seen: Sequence[int] = tuple(range(CLASSES))

    @property
    def shard(self) -> IntArray:
        return np.arange(len(self.labels_N))

    def labels(self, positions: IntArray) -> Tensor:
        return self.labels_N[torch.from_numpy(positions)]

    def outputs(self, positions: IntArray, params: Tensors) -> Outputs:
        features = self.features_ND[torch.from_numpy(positions)]
        return Outputs(features, features @ params[HEAD_WEIGHT].to(features).T + params[HEAD_BIAS].to(features))

    scale: float = 1.0

    @property
    def own(self) -> Tensors:
        """Nothing was trained."""
        return {HEAD_WEIGHT: torch.zeros(0)}

    def passing(
        self, positions: IntArray, subjects: Sequence[str], params: Tensors
    ) -> Iterator[Mapping[str, tuple[Tensor, Tensor]]]:
        for n in positions:
            seen = self.features_ND[n : n + 1]
            yield dict.fromkeys(subjects, (seen, torch.zeros(1, CLASSES)))

    def layer_shape(self, subject: str) -> tuple[int, int]:
        return (CLASSES, self.features_ND.shape[1]) if subject == HEAD_WEIGHT else LAYERS[subject.rpartition(".")[0]]

    def traced(
        self, positions: IntArray, subjects: Sequence[str], directions: Callable[[Tensor], Tensor]
    ) -> Iterator[Mapping[str, tuple[Tensor, Sequence[Tensor]]]]:
        """As if the first outputs of every layer were the features."""
        for n in positions:
            pulls_K1D = directions(self.features_ND[n : n + 1])
            found = {}
            for s in subjects:
                layer = s.rpartition(".")[0]
                first_DO = torch.eye(pulls_K1D.shape[2], LAYERS[layer][0])
                found[s] = self.inputs_NI[layer][n : n + 1], [pull @ first_DO for pull in pulls_K1D]
            yield found

    def gradients(
        self, positions: IntArray, params: Tensors, names: Sequence[str], loss: Callable[[Tensor, Tensor], Tensor]
    ) -> Iterator[tuple[IntArray, Tensors]]:
        for n in positions:
            leaves = {name: params[name].detach().float().requires_grad_() for name in names}
            with torch.enable_grad():
                logits_1C = self.outputs(positions[n : n + 1], {**params, **leaves}).logits
                found = torch.autograd.grad(loss(logits_1C, self.labels_N[n : n + 1]).sum(), list(leaves.values()))
            yield positions[n : n + 1], {name: g[None] for name, g in zip(names, found, strict=True)}


class Scene:
    """A statistic, a client and its own parameters: LoRA layers, the layers' weights, and a head."""

    def __init__(self, statistic: Statistic, client_id: int = 3) -> None:
        self.statistic, self.client = statistic, make_client(client_id)
        weights = {f"{name}.weight": torch.full(shape, 0.5, dtype=torch.float64) for name, shape in LAYERS.items()}
        self.params = make_params() | weights
        with torch.random.fork_rng(devices=[]):
            self.model = Echo()

    @cached_property
    def subjects(self) -> list[str]:
        """Those that it takes one by one."""
        head = [name for name in (HEAD_WEIGHT, HEAD_BIAS) if self._takes(name)]
        of_head = isinstance(self.statistic, WorkStatistic) and bool(head)  # others have no model behind them
        taken = head if of_head else [name for name in self.params if self._takes(name)]
        if not taken:
            raise LawBroken(f"it takes none of {', '.join(self.params)}")
        return taken

    def _takes(self, name: str) -> bool:
        try:
            return bool(self.statistic.synthetic(self.client.seen, self.params, [name]))
        except ConfigError:
            return False

    def batches(self, client: Client, size: int = BATCH) -> list[tuple[dict[str, Tensor], Tensor]]:
        """A client's samples in a random order: inputs with features, float32, and labels."""
        order_N = torch.randperm(len(client), generator=torch_stream(0, "batches", client.client_id))
        given = {**client.inputs_NI, "features": client.features_ND}
        return [({n: x[rows].float() for n, x in given.items()}, client.labels_N[rows]) for rows in torch.split(order_N, size)]

    def collected(self, batches: Sequence[tuple[Tensors, Tensor]], subjects: Sequence[str] | None = None) -> dict[str, Tensor]:
        """What a pass over batches gives."""
        if isinstance(self.statistic, WorkStatistic):
            seen = [inputs for inputs, _ in batches] or [{n: x[:0] for n, x in self.batches(self.client)[0][0].items()}]
            whole = {n: torch.cat([part[n] for part in seen]) for n in seen[0]}
            labels = torch.cat([labels for _, labels in batches] or [torch.zeros(0, dtype=torch.int64)])
            work: Any = HeadOnly(whole["features"], labels, whole)
            return self.statistic.measured(work, self.params, subjects or self.subjects)
        with torch.no_grad(), self.statistic.collect(self.model, self.params, subjects or self.subjects) as accumulator:
            for inputs, labels in batches:
                accumulator.update(self.model.features(inputs), labels)
            return accumulator.result()


def _subjects(statistic: Statistic) -> None:
    scene = Scene(statistic)
    if isinstance(statistic, WorkStatistic):
        return  # of a head's tensors, or of layers', which is what the others are held against
    for name in scene.params:
        try:
            took = bool(scene.collected(scene.batches(scene.client), [name]))
        except ConfigError:
            took = False
        if took != (name in scene.subjects):
            raise LawBroken(f"collect {'takes' if took else 'refuses'} '{name}', synthetic does not: both say what it is for")


def _synthetic(statistic: Statistic) -> None:
    for client_id in (0, 3):
        scene = Scene(statistic, client_id)
        want = statistic.synthetic(scene.client.seen, scene.params, scene.subjects)
        narrow = [n for n, t in want.items() if t.dtype != torch.float64]
        if narrow:
            raise LawBroken(f"synthetic gives '{narrow[0]}' as {want[narrow[0]].dtype}: it is float64")
        got = scene.collected(scene.batches(scene.client))
        _expect_alike(got, want, f"client {client_id}, collect against synthetic", got)


def _expect_alike(got: Tensors, want: Tensors, when: str, sent: Tensors) -> None:
    """The same up to the rounding of the types in which they are sent."""
    coarse = max((TOLERANCES.get(t.dtype, ROUNDED) for t in sent.values()), default=ROUNDED)
    expect_close(_relative(got, want), _relative(want, want), when, coarse)


def _relative(tensors: Tensors, scale: Tensors) -> dict[str, Tensor]:
    """By the largest number of each, so that sums over many samples are looked at as closely as means."""
    return {n: t.double() / scale[n].abs().max().clamp_min(1) if n in scale and t.numel() else t for n, t in tensors.items()}


def _wire(statistic: Statistic) -> None:
    scene = Scene(statistic)
    for name, tensor in scene.collected(scene.batches(scene.client)).items():
        form, slash, subject = name.partition("/")
        if not (form and slash and subject in scene.params):
            raise LawBroken(f"'{name}' is not named '<form>/<subject>' with a subject that was asked for")
        if tensor.dtype not in TOLERANCES or tensor.device.type != "cpu":
            raise LawBroken(f"'{name}' is {tensor.dtype} on {tensor.device}: float32 or bfloat16 on the CPU travels")
    expect_finite(scene.collected(scene.batches(scene.client)), "a client's samples")


def _batches(statistic: Statistic) -> None:
    scene = Scene(statistic)
    want = scene.collected(scene.batches(scene.client, len(scene.client)))
    for size in (1, 2, BATCH):
        got = scene.collected(scene.batches(scene.client, size))
        _expect_alike(got, want, f"in batches of {size} against all at once", want)
    backwards = scene.collected(scene.batches(scene.client)[::-1])
    _expect_alike(backwards, want, "batches in another order", want)


def _nobody(statistic: Statistic) -> None:
    scene = Scene(statistic)
    want, got = scene.collected(scene.batches(scene.client)), scene.collected([])
    if list(got) != list(want):
        raise LawBroken(
            f"without samples it sends {', '.join(got) or 'nothing'}, with some {', '.join(want)}: names are the same"
        )
    expect_finite(got, "without samples")


def _additive(statistic: Statistic) -> None:
    if not statistic.additive:
        return
    scene = Scene(statistic)
    parts = scene.batches(scene.client)
    one, other, both = (scene.collected(p) for p in (parts[:2], parts[2:], parts))
    layouts = [{n: t.shape for n, t in sent.items()} for sent in (one, other)]
    if layouts[0] != layouts[1]:
        raise LawBroken(f"it is said to be additive, but sends {layouts[0]} for some samples and {layouts[1]} for others")
    total = {n: t.double() + other[n].double() for n, t in one.items()}
    _expect_alike(total, both, "two parts summed against the whole", both)


def _deterministic(statistic: Statistic) -> None:
    scene = Scene(statistic)
    first, again = (scene.collected(scene.batches(scene.client)) for _ in range(2))
    expect_bits(again, first, "the same pass twice")


def _no_mutation(statistic: Statistic) -> None:
    scene = Scene(statistic)
    batches = scene.batches(scene.client)
    before: Mapping[str, object] = deepcopy({"parameters": scene.params, "batches": batches, "weights": scene.model.state_dict()})
    hooks = _hooks(scene.model)
    scene.collected(batches)
    statistic.synthetic(scene.client.seen, scene.params, scene.subjects)
    expect_unchanged(
        {"parameters": scene.params, "batches": batches, "weights": scene.model.state_dict()}, before, "one pass over samples"
    )
    if _hooks(scene.model) != hooks:
        raise LawBroken("the pass leaves hooks in the model: take them out where `collect` closes")


def _hooks(model: Echo) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (model, *model.layers.values()))


LAWS: tuple[Law[Statistic], ...] = (
    Law("subjects", "there are parameters that it describes, and `collect` and `synthetic` take the same ones", _subjects),
    Law("synthetic", "a pass over samples gives what its formula gives of all of them, up to float32", _synthetic),
    Law("wire", "tensors are named '<form>/<subject>', finite, float32 (or bfloat16) and on the CPU", _wire),
    Law("batches", "how samples are cut into batches, and in what order they come, does not matter, rounding apart", _batches),
    Law("nobody", "without samples it sends tensors of the same names, and finite ones", _nobody),
    Law("additive", "an additive statistic of two parts of the samples adds up to that of the whole", _additive),
    Law("deterministic", "the same pass gives the same bits", _deterministic),
    Law("no_mutation", "parameters, samples and model are left as they were, without hooks", _no_mutation),
)
