"""The laws that every merging rule keeps, or says in its `exempt` why it cannot.

`check(rule)` holds a rule against all of them on small made-up clients, over the first three rounds of a task (so that rules
that alternate are seen in every phase), and with 1 to 32 clients where it may count them. Statistics that the rule's plan asks
for are computed from each client's made-up data.
The test suite calls it for every rule that comes with fedsim, `fedsim check FILE` for a user's own.

Shapes: N samples, I inputs and O outputs of a layer, R rank, C classes, D features.
"""

from __future__ import annotations

import copy
import io
import itertools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from types import MappingProxyType
from typing import Any, overload

import torch
from torch import Tensor

from fedsim.core.contracts import AdditiveAggregator, Aggregator
from fedsim.core.defaults import torch_defaults
from fedsim.core.errors import AggregationError, FedsimError
from fedsim.core.messages import ClientUpdate, RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.sums import BlockSum
from fedsim.core.tensors import LORA_A, LORA_B, matching, same_layout, upper_triangle

ROUNDS = 3
CLIENTS = 11  # one more than a block of sums
NUMBERS = (1, 2, 3, 9, 10, 11, 32)  # of clients, tried where a rule may count them
ENOUGH = 9  # clients that no rule may refuse; of fewer it may say in one line that they are too few
CLASSES, FEATURES, RANK = 5, 4, 2
LAYERS = {"adapter.block.0": (3, 6), "adapter.block.1": (4, 5)}  # outputs, inputs
EXACT, ROUNDED = 1e-9, 1e-4  # tolerances, relative to 1 + |value|, in float64 and in float32


class LawBroken(Exception):
    """A rule broke a law; the message says where, with numbers."""


@dataclass(frozen=True)
class Law:
    """A named property of rules. `check` raises LawBroken; None as its result means that the law holds."""

    name: str
    statement: str
    check: Callable[[Aggregator], None]


@dataclass(frozen=True)
class LawResult:
    """What became of one law. `exempt` is the rule's own reason for not keeping it (then it is not tried)."""

    name: str
    statement: str
    ok: bool
    exempt: str | None = None
    explanation: str = ""


def check(rule: Aggregator) -> list[LawResult]:
    """Hold a rule against every law."""
    with torch_defaults(torch.get_num_threads()):
        results = [_judge(law, rule) for law in LAWS]
    known = [law.name for law in LAWS]
    for name in rule.exempt:
        if name not in known:
            explanation = f"exempt names the law '{name}', which there is not; laws: {', '.join(known)}"
            results.append(LawResult(name, "an exemption names a law", False, None, explanation))
    return results


def _judge(law: Law, rule: Aggregator) -> LawResult:
    if law.name in rule.exempt:
        return LawResult(law.name, law.statement, True, rule.exempt[law.name])
    try:
        law.check(rule)
    except LawBroken as e:
        return LawResult(law.name, law.statement, False, None, str(e))
    except Exception as e:  # a user's rule may raise anything: it is reported, not passed on
        frame = traceback.extract_tb(e.__traceback__)[-1]
        where = "" if isinstance(e, FedsimError) else f" ({frame.filename}, line {frame.lineno})"
        return LawResult(law.name, law.statement, False, None, f"raised {type(e).__name__}: {e}{where}")
    return LawResult(law.name, law.statement, True)


# ---------------------------------------------------------------- made-up clients


@dataclass(frozen=True)
class Client:
    """Inputs of every layer (N, I), features (N, D) and labels (N,) of one client, float64."""

    client_id: int
    inputs_NI: Mapping[str, Tensor]
    features_ND: Tensor
    labels_N: Tensor

    def __len__(self) -> int:
        return len(self.labels_N)

    def repeated(self, times: int) -> Client:
        """The same samples several times over."""
        inputs = {layer: x.repeat(times, 1) for layer, x in self.inputs_NI.items()}
        return Client(self.client_id, inputs, self.features_ND.repeat(times, 1), self.labels_N.repeat(times))


@lru_cache(maxsize=max(NUMBERS))
def make_client(client_id: int) -> Client:
    """Client 0 holds all classes; every other one lacks one. Sizes and scales differ; every class has four samples or more."""
    generator = torch_stream(0, "client", client_id)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    classes = [c for c in range(CLASSES) if client_id == 0 or c != client_id % CLASSES]
    labels = torch.tensor(classes).repeat(4 + client_id % 3)
    scale, n = 0.5 + client_id % 4, len(labels)
    inputs = {layer: 0.5 + scale * draw(n, width) for layer, (_, width) in LAYERS.items()}
    return Client(client_id, inputs, draw(CLASSES, FEATURES)[labels] + scale * draw(n, FEATURES), labels)


def some_clients(number: int) -> tuple[Client, ...]:
    """The first ones."""
    return tuple(make_client(k) for k in range(number))


@dataclass(frozen=True)
class Scene:
    """One round before it is merged."""

    round: int
    state: State
    params: Tensors
    plan: RoundPlan
    dtype: torch.dtype = torch.float64
    clients: tuple[Client, ...] = field(default_factory=lambda: some_clients(CLIENTS))

    def trained(self, client_id: int) -> dict[str, Tensor]:
        """What a client makes of the tensors that the plan trains."""
        out = {}
        for name in matching(self.params, self.plan.train):
            step = torch.randn(
                self.params[name].shape, dtype=torch.float64, generator=torch_stream(0, "step", client_id, self.round, name)
            )
            out[name] = self.params[name] + (0.3 * step).to(self.dtype)
        return out

    def update(self, client: Client, tensors: Tensors | None = None) -> ClientUpdate:
        """A client's update, with these tensors or else its own."""
        tensors = self.trained(client.client_id) if tensors is None else tensors
        own = {**self.params, **tensors}
        statistics = {n: t for request in self.plan.statistics for n, t in synthesise(request, client, own).items()}
        sent = {n: t.to(self.dtype) for n, t in statistics.items()}
        return ClientUpdate(client.client_id, len(client), tensors, sent, metrics={"loss": 1.0})

    @cached_property
    def updates(self) -> list[ClientUpdate]:
        """All clients' updates, in the order of their ids."""
        return [self.update(c) for c in self.clients]


def make_params(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Two LoRA layers and a head."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (outputs, inputs) in LAYERS.items():
        shapes |= {layer + LORA_A: (RANK, inputs), layer + LORA_B: (outputs, RANK)}
    shapes |= {"head.weight": (CLASSES, FEATURES), "head.bias": (CLASSES,)}
    return {n: torch.randn(s, dtype=torch.float64, generator=torch_stream(0, "params", n)).to(dtype) for n, s in shapes.items()}


def synthesise(request: StatisticRequest, client: Client, params: Tensors) -> dict[str, Tensor]:
    """What the statistics plug-in of that name would send for a client, float64, named as in an update."""
    if request.name not in STATISTICS:
        raise LawBroken(
            f"the plan asks for the statistic '{request.name}', which the law suite cannot make up "
            f"(it knows {', '.join(STATISTICS)}): test the rule in a run, or with updates of your own"
        )
    subjects = matching(params, request.match)
    return {
        f"{request.name}.{key}/{s}": t
        for s in subjects
        for key, t in STATISTICS[request.name](request.options, client, params, s).items()
    }


def _gram(options: Mapping[str, Any], client: Client, params: Tensors, subject: str) -> dict[str, Tensor]:
    form, decay = options.get("form", "diagonal"), options.get("decay", 1.0)
    layer = subject.removesuffix(LORA_A).removesuffix(LORA_B)
    x = client.features_ND if subject == "head.weight" else client.inputs_NI.get(layer)
    if x is None or (form in ("projected", "cross") and not subject.endswith(LORA_B)):
        raise LawBroken(f"the plan asks for a gram of form '{form}' for '{subject}', which there is not")
    if subject.endswith(LORA_B) and form in ("diagonal", "full"):
        x = x @ params[layer + LORA_A].double().T
    gram_II = decay * x.T @ x + (1 - decay) * torch.diag(x.square().sum(0))
    if form == "diagonal":
        return {form: gram_II.diagonal()}
    if form == "full":
        return {form: upper_triangle(gram_II)}
    half_RI = params[layer + LORA_A].double() @ gram_II
    return {form: half_RI if form == "cross" else half_RI @ params[layer + LORA_A].double().T}


def _class_moments(options: Mapping[str, Any], client: Client, params: Tensors, subject: str) -> dict[str, Tensor]:
    if subject != "head.weight":
        raise LawBroken(f"the plan asks for class_moments of '{subject}': the only subject is 'head.weight'")
    of_class = [client.features_ND[client.labels_N == c] for c in range(CLASSES)]
    count = torch.tensor([float(len(rows)) for rows in of_class], dtype=torch.float64)
    form, held = options.get("form", "full"), [rows for rows in of_class if len(rows)]
    if form == "scalar":
        spread = [float(rows.var(0).mean()) if len(rows) > 1 else 0.0 for rows in of_class]
        return {"count": count, "spread": torch.tensor(spread, dtype=torch.float64)}
    mean = torch.stack([rows.mean(0) for rows in held])
    if form == "covariance":
        return {"count": count, "mean": mean, form: torch.stack([upper_triangle(rows.T.cov()) for rows in held if len(rows) > 1])}
    return {
        "count": count,
        "mean": mean,
        "variance": torch.stack([rows.var(0, correction=min(1, len(rows) - 1)) for rows in held]),
    }


def _path_integral(options: Mapping[str, Any], client: Client, params: Tensors, subject: str) -> dict[str, Tensor]:
    """No step is taken here: numbers that differ by client, layer and factor and grow with the samples, as the real ones do."""
    x = client.inputs_NI.get(subject.removesuffix(LORA_A).removesuffix(LORA_B), client.features_ND)
    return {options.get("form", "movement"): x.double().abs().sum() * params[subject].double().abs().mean()}


STATISTICS: Mapping[str, Callable[[Mapping[str, Any], Client, Tensors, str], dict[str, Tensor]]] = {
    "gram": _gram,
    "class_moments": _class_moments,
    "path_integral": _path_integral,
}


def scenes(rule: Aggregator, dtype: torch.dtype = torch.float64, clients: int = CLIENTS) -> Iterator[Scene]:
    """The first rounds of a task with so many clients, each going on from the merge of the one before."""
    params: Tensors = make_params(dtype)
    state = rule.init(copy.deepcopy(params))
    for number in range(ROUNDS):
        scene = Scene(number, state, params, rule.plan(copy.deepcopy(state), number), dtype, some_clients(clients))
        yield scene
        state, params = _merge(rule, scene, scene.updates)


def _merge(rule: Aggregator, scene: Scene, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
    """`combine` on copies, so that a rule that changes its inputs breaks the law on that and no other."""
    return rule.combine(copy.deepcopy(scene.state), copy.deepcopy(scene.params), copy.deepcopy(updates))


def _if_enough(rule: Aggregator, scene: Scene, updates: Sequence[ClientUpdate]) -> Tensors:
    """The parameters that a merge gives; none where the rule says that so few clients are not enough for it."""
    try:
        return _merge(rule, scene, updates)[1]
    except AggregationError:
        if len(updates) >= ENOUGH:
            raise
        return {}


# ---------------------------------------------------------------- the laws


def _plan(rule: Aggregator) -> None:
    for scene in scenes(rule):
        if scene.plan.train and not matching(scene.params, scene.plan.train):
            raise LawBroken(
                f"round {scene.round}: the plan trains {scene.plan.train}, which matches none of {', '.join(scene.params)}"
            )
        again = rule.plan(copy.deepcopy(scene.state), scene.round)
        if (again.train, again.statistics) != (scene.plan.train, scene.plan.statistics):
            raise LawBroken(f"round {scene.round}: plan gave {again}, after {scene.plan} for the same state and round")
        for request in scene.plan.statistics:
            synthesise(request, scene.clients[0], scene.params)


def _layout(rule: Aggregator) -> None:
    for dtype in (torch.float32, torch.float64):
        for scene in scenes(rule, dtype):
            _, out = _merge(rule, scene, scene.updates)
            if not same_layout(out, scene.params):
                raise LawBroken(f"round {scene.round}: {_layout_difference(out, scene.params)}")


def _finite(rule: Aggregator) -> None:
    for dtype, numbers in ((torch.float64, NUMBERS[-1:]), (torch.float32, NUMBERS)):
        for scene, clients in itertools.product(scenes(rule, dtype, max(NUMBERS)), numbers):
            for name, tensor in _if_enough(rule, scene, scene.updates[:clients]).items():
                if not bool(torch.isfinite(tensor).all()):
                    bad = f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} numbers of '{name}' are NaN or infinite"
                    raise LawBroken(f"round {scene.round}, {clients} clients: {bad}")


def _fixed_point(rule: Aggregator) -> None:
    for scene in scenes(rule, clients=max(NUMBERS)):
        common = scene.trained(0)
        updates = [scene.update(c, common) for c in scene.clients]
        for clients in NUMBERS:
            when = f"round {scene.round}, all {clients} clients sent the same tensors"
            if out := _if_enough(rule, scene, updates[:clients]):
                _expect_close(out, {**scene.params, **common}, when)


def _one_client(rule: Aggregator) -> None:
    for scene in scenes(rule):
        update = scene.update(scene.clients[0])
        _, out = _merge(rule, scene, [update])
        _expect_close(out, {**scene.params, **update.params}, f"round {scene.round}, one client alone")


def _order(rule: Aggregator) -> None:
    for scene in scenes(rule):
        updates = scene.updates
        _, want = _merge(rule, scene, updates)
        for name, other in (("reversed", updates[::-1]), ("rotated by 4", updates[4:] + updates[:4])):
            _expect_close(_merge(rule, scene, other)[1], want, f"round {scene.round}, updates {name}")


def _no_mutation(rule: Aggregator) -> None:
    for scene in scenes(rule):
        before = {"state": scene.state, "params": scene.params, "updates": scene.updates}
        given = copy.deepcopy(before)
        rule.init(given["params"])
        rule.plan(given["state"], scene.round)
        rule.combine(given["state"], given["params"], given["updates"])
        for what, old in before.items():
            if not _same(given[what], old):
                raise LawBroken(
                    f"round {scene.round}: the {what} that the rule was given changed under its hands: return new values"
                )


def _deterministic(rule: Aggregator) -> None:
    for scene in scenes(rule):
        (state, out), (state_again, again) = (_merge(rule, scene, scene.updates) for _ in range(2))
        _expect_bits(again, out, f"round {scene.round}, merged twice")
        if not _same(state, state_again):
            raise LawBroken(f"round {scene.round}, merged twice: the new states differ")


def _state_file(rule: Aggregator) -> None:
    for scene in scenes(rule):
        file = io.BytesIO()
        try:
            torch.save(scene.state, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=True)
        except Exception as e:
            first = str(e).splitlines()[0]
            raise LawBroken(
                f"round {scene.round}: a file cannot hold the state ({type(e).__name__}: {first}): "
                f"build it from dicts, lists, tuples, tensors, numbers and strings"
            ) from e
        if not _same(loaded, scene.state):
            raise LawBroken(f"round {scene.round}: the state that comes back from a file is another one")
        again = rule.plan(loaded, scene.round)
        if (again.train, again.statistics) != (scene.plan.train, scene.plan.statistics):
            raise LawBroken(f"round {scene.round}: the plan from the state in the file is another one")
        resumed = replace(scene, state=loaded)
        _expect_bits(
            _merge(rule, resumed, scene.updates)[1],
            _merge(rule, scene, scene.updates)[1],
            f"round {scene.round}, state from a file",
        )


def _any_sequence(rule: Aggregator) -> None:
    for scene in scenes(rule):
        updates = scene.updates
        _, want = _merge(rule, scene, updates)
        frozen = [
            replace(u, params=MappingProxyType(dict(u.params)), statistics=MappingProxyType(dict(u.statistics))) for u in updates
        ]
        _, out = rule.combine(copy.deepcopy(scene.state), MappingProxyType(dict(copy.deepcopy(scene.params))), _ReadOnly(frozen))
        _expect_bits(out, want, f"round {scene.round}, a read-only sequence in place of a list")


def _no_data(rule: Aggregator) -> None:
    for scene in scenes(rule):
        empty = [
            replace(u, num_samples=0, statistics={n: torch.zeros_like(t) for n, t in u.statistics.items()}) for u in scene.updates
        ]
        for what, updates in (("no updates", []), ("only clients without samples", empty)):
            try:
                _merge(rule, scene, updates)
            except AggregationError:
                continue
            except Exception as e:
                raise LawBroken(
                    f"round {scene.round}, {what}: raised {type(e).__name__} ({e}), not AggregationError: call require_updates"
                ) from e
            raise LawBroken(
                f"round {scene.round}, {what}: combine returned tensors instead of raising AggregationError: call require_updates"
            )


def _weights(rule: Aggregator) -> None:
    for scene in scenes(rule):
        number = CLIENTS // 2
        once, before, after = scene.updates[number], scene.updates[:number], scene.updates[number + 1 :]
        double = scene.update(scene.clients[number].repeated(2), once.params)
        _, out = _merge(rule, scene, [*before, double, *after])
        _, want = _merge(rule, scene, [*before, once, once, *after])
        _expect_close(out, want, f"round {scene.round}, a client with twice the samples against the client sent twice")


def _additive(rule: Aggregator) -> None:
    if not isinstance(rule, AdditiveAggregator) or (type(rule).additive is not AdditiveAggregator.additive and not rule.additive):
        return  # a `combine` of its own beside `lift` and `finish` must agree with them, so that is no way out
    for scene in scenes(rule):
        updates = scene.updates
        _, want = _merge(rule, scene, updates)
        for cuts in ((CLIENTS,), (1, CLIENTS), (4, 5, CLIENTS), tuple(range(1, CLIENTS + 1))):
            bundles = [updates[a:b] for a, b in zip((0, *cuts), cuts, strict=False)]
            partial_sums = [_sum([rule.lift(u) for u in bundle]) for bundle in bundles]
            _, out = rule.finish(copy.deepcopy(scene.state), copy.deepcopy(scene.params), _sum(partial_sums))
            _expect_close(out, want, f"round {scene.round}, summed in bundles of {', '.join(str(len(b)) for b in bundles)}")


def _float64(rule: Aggregator) -> None:
    for narrow, wide in zip(scenes(rule, torch.float32), scenes(rule), strict=True):
        _, got = _merge(rule, narrow, narrow.updates)
        _, want = _merge(rule, wide, wide.updates)
        _expect_close({n: t.double() for n, t in got.items()}, want, f"round {narrow.round}, float32 against float64", ROUNDED)
        narrowed = [n for n, t in want.items() if bool(t.any()) and torch.equal(t, t.float().double())]
        if narrowed:
            raise LawBroken(f"round {wide.round}: '{narrowed[0]}' went in as float64 and came out with the digits of float32")


LAWS: tuple[Law, ...] = (
    Law("plan", "every plan names tensors and statistics that there are, and the same ones when asked again", _plan),
    Law("layout", "the parameters that come out have the names, shapes and types of those that went in", _layout),
    Law("finite", "from finite updates come finite parameters, whatever the number of clients", _finite),
    Law(
        "fixed_point",
        "when all clients, however many, send the same tensors these are the result, and what nobody trained stays",
        _fixed_point,
    ),
    Law("one_client", "a client that is alone gets its own tensors back", _one_client),
    Law("order", "the order of the updates does not matter, rounding apart", _order),
    Law("no_mutation", "state, parameters and updates that go in are not changed", _no_mutation),
    Law("deterministic", "the same inputs give the same bits", _deterministic),
    Law("state_file", "a state that was written to a file and read back goes on with the same bits", _state_file),
    Law("any_sequence", "updates may come as any read-only sequence, with read-only mappings in them", _any_sequence),
    Law("no_data", "without updates, or without samples, AggregationError is raised", _no_data),
    Law("weights", "a client with every sample twice counts as much as the client sent twice", _weights),
    Law("additive", "an additive rule gives the same result however its clients are bundled", _additive),
    Law("float64", "float64 in gives float64 out, and float32 the same up to its rounding", _float64),
)


# ---------------------------------------------------------------- comparing


class _ReadOnly(Sequence[ClientUpdate]):
    """A sequence that is no list."""

    def __init__(self, items: Sequence[ClientUpdate]) -> None:
        self._items = tuple(items)

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> ClientUpdate: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ClientUpdate]: ...
    def __getitem__(self, index: int | slice) -> ClientUpdate | Sequence[ClientUpdate]:
        return self._items[index] if isinstance(index, int) else _ReadOnly(self._items[index])


def _sum(terms: Sequence[Tensors]) -> dict[str, Tensor]:
    layouts = {tuple(sorted((n, tuple(t.shape)) for n, t in term.items())) for term in terms}
    if len(layouts) > 1:
        raise LawBroken("lift gives different names or shapes for different clients, so that they cannot be summed")
    narrow = [n for n, t in terms[0].items() if t.dtype != torch.float64]
    if narrow:
        raise LawBroken(f"lift gives '{narrow[0]}' as {terms[0][narrow[0]].dtype}: sums are kept in float64")
    total = BlockSum()
    for place, term in enumerate(terms):
        total.add(place, 1, term)
    return total.result() or {}


def _expect_close(got: Tensors, want: Tensors, when: str, tolerance: float = EXACT) -> None:
    if got.keys() != want.keys():
        raise LawBroken(f"{when}: {_layout_difference(got, want)}")
    for name, expected in want.items():
        if got[name].shape != expected.shape:
            raise LawBroken(f"{when}: {_layout_difference(got, want)}")
        off = (got[name].double() - expected.double()).abs() / (1 + expected.double().abs())
        if off.numel() and not bool((off <= tolerance).all()):
            at = tuple(int(i) for i in torch.unravel_index(off.nan_to_num(float("inf")).argmax(), off.shape))
            value, right = float(got[name][at]), float(expected[at])
            raise LawBroken(
                f"{when}: '{name}'{list(at)} is {value:.6g} and should be {right:.6g} (off by {abs(value - right):.2g})"
            )


def _expect_bits(got: Tensors, want: Tensors, when: str) -> None:
    _expect_close(got, want, when)
    for name, expected in want.items():
        if not torch.equal(got[name], expected):
            off = float((got[name].double() - expected.double()).abs().max())
            raise LawBroken(f"{when}: '{name}' is not the same to the bit (off by {off:.2g})")


def _layout_difference(got: Tensors, want: Tensors) -> str:
    lost, new = [n for n in want if n not in got], [n for n in got if n not in want]
    if lost or new:
        return f"lost {lost or 'no'} and added {new or 'no'} tensors"
    name = next(n for n in want if got[n].shape != want[n].shape or got[n].dtype != want[n].dtype)
    return f"'{name}' is {tuple(got[name].shape)} {got[name].dtype} and should be {tuple(want[name].shape)} {want[name].dtype}"


def _same(a: Any, b: Any) -> bool:
    """Equality of nested values, tensors by their bits."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, ClientUpdate):
        return isinstance(b, ClientUpdate) and _same(list(vars(a).values()), list(vars(b).values()))
    return type(a) is type(b) and bool(a == b)
