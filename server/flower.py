"""Flower's own strategies as merging rules: `aggregator: {name: flower, strategy: FedMedian}`.

A strategy of `flwr.serverapp.strategy` owns the round loop in Flower; here it is asked for one thing only, `aggregate_train`.
It is built anew in every round, handed the current parameters through its own `configure_train`, and what it remembers
(momenta) is put back from our state and read out again. So the rule stays pure, and a resumed run goes on with the same bits.
"""

from __future__ import annotations

import gc
import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
import torch

from fedsim.core import contracts
from fedsim.core.contracts import OUTSIDE_SPAN, Traits, require_updates
from fedsim.core.errors import AggregationError, ConfigError, did_you_mean
from fedsim.core.messages import ClientUpdate, State, Tensors

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when flwr is imported

with warnings.catch_warnings():  # flwr's own dependencies warn on import
    warnings.simplefilter("ignore")
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, Metadata, MetricRecord, RecordDict
    from flwr.serverapp import Grid, strategy
    from flwr.serverapp.strategy import FedAvg

OURS = {  # options that every strategy has and that have no meaning here
    **dict.fromkeys(("fraction_train", "min_train_nodes", "min_available_nodes"), "server.participation decides who trains"),
    **dict.fromkeys(("fraction_evaluate", "min_evaluate_nodes"), "fedsim evaluates by itself"),
    **dict.fromkeys(("arrayrecord_key", "configrecord_key"), "fedsim builds the records"),
    **dict.fromkeys(("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn", "selection_rule"), "a config holds no functions"),
}
REFUSED = {
    "FedProx": "its proximal term is the clients' business: use FedAvg here and a learner under client.learners",
    "FedXgbBagging": "it merges trees of XGBoost, not tensors",
    "FedXgbCyclic": "it passes on trees of XGBoost, not tensors",
    **{
        name: "it wraps another strategy and draws noise from an unseeded generator"
        for name in strategy.__all__
        if name.startswith("DifferentialPrivacy")
    },
}

_ADAPTIVE = ("FedAdagrad", "FedAdam", "FedYogi")
_STEPPING = (*_ADAPTIVE, "FedAvgM", "QFedAvg")
_BY_NUMBER = (*_ADAPTIVE, "FedMedian", "FedTrimmedAvg", "Bulyan")
_UNWEIGHTED = ("FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan", "QFedAvg")
EXEMPT: Mapping[str, tuple[tuple[str, ...], str]] = {  # law -> strategies that cannot keep it, and why
    "fixed_point": (_STEPPING, "goes a step of its own size from the server's parameters towards the clients'"),
    "one_client": (_STEPPING, "goes a step of its own size"),
    "weights": (_UNWEIGHTED, "counts or selects clients, whatever they hold"),
}


@dataclass(frozen=True)
class Aggregator(contracts.Aggregator):
    """What Flower's strategy makes of the clients' tensors; tensors that nobody trained stay as they are.

    strategy: FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi, FedMedian, FedTrimmedAvg, Krum, MultiKrum, Bulyan or QFedAvg.
    options: arguments of its constructor, e.g. {eta: 0.01}.

    The strategy computes in float64 whatever travels, and the result is cast back to the type of the parameters.
    Its memory (momenta) starts afresh with every task, and should the set of trained tensors change. Clients without samples are
    left out.
    Raises AggregationError when nobody sent an update or holds samples, and when the strategy gives no result (Bulyan with
    fewer than 4 f + 3 clients, f = num_malicious_nodes; where that can be known it is refused before any training).

    Quirks of Flower's implementations, kept:
    FedAdam corrects its bias with exponent t + 1 in round t = 1, 2, …, where Kingma & Ba have t; FedYogi and FedAdagrad do not
    correct it. FedAvgM with momentum 0 and rate 1 is FedAvg. Krum and MultiKrum weight those they select by samples, the
    median, the trimmed mean and Bulyan weight nobody. QFedAvg reads the clients' `loss`, the mean of their last local epoch,
    where the paper has the loss before training. `eta_l` is documented by Flower as a client's rate and used nowhere.
    """

    strategy: str
    options: dict[str, Any] = field(default_factory=dict)

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"strategy": "FedAvg"},
        {"strategy": "FedAvgM", "options": {"server_momentum": 0.9}},
        {"strategy": "FedAdam"},
        {"strategy": "FedMedian"},
        {"strategy": "MultiKrum", "options": {"num_malicious_nodes": 1, "num_nodes_to_select": 3}},
    )

    def __post_init__(self) -> None:
        """Raise ConfigError for a strategy or an option that Flower does not have, or that makes no sense here."""
        _check_options(_strategy_class(self.strategy), self.options)
        self._build()
        kept = {law: why for law, (names, why) in EXEMPT.items() if self.strategy in names}
        object.__setattr__(self, "exempt", kept)  # not one set for the class: the laws that hold depend on the strategy

    @property
    def traits(self) -> Traits:
        return Traits(gives={OUTSIDE_SPAN} if self.strategy in _BY_NUMBER else ())

    @property
    def least(self) -> int:
        """Flower's Bulyan gives no result for fewer than 4 f + 3; its other strategies take any number."""
        return 4 * int(self.options.get("num_malicious_nodes", 0)) + 3 if self.strategy == "Bulyan" else 1

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        updates = require_updates(updates)  # strategies that weigh nobody would count the others
        names = [name for name in params if name in updates[0].params]
        if state.get("tensors") != names:
            state = {"tensors": names, "round": 0, "memory": {}}
        built = self._build()
        pristine = dict(vars(built))
        for name, value in state["memory"].items():
            setattr(built, name, _thaw(value))
        round, replies = state["round"] + 1, _replies(names, updates)
        with _quiet() as log, _cheap_collections():
            try:
                # With fraction_train 0 this sets the strategy's `current_arrays` and samples nobody; the grid is not touched.
                built.configure_train(round, _arrays(params, names), ConfigRecord(), cast(Grid, None))
                arrays, _ = built.aggregate_train(round, replies)
            except Exception as e:
                raise AggregationError(f"Flower's {self.strategy} failed on {len(updates)} updates: {e}") from e
        if arrays is None:
            words = f": {log[-1]}" if log else ""
            raise AggregationError(f"Flower's {self.strategy} gave no result for {len(updates)} updates{words}")
        # `current_arrays` is handed over anew every round; what else has changed is memory
        memory = {n: _freeze(n, v) for n, v in vars(built).items() if n != "current_arrays" and v is not pristine.get(n)}
        merged = {n: torch.from_numpy(arrays[n].numpy()).to(params[n].dtype) for n in names}
        return {"tensors": names, "round": round, "memory": memory}, {n: merged.get(n, t) for n, t in params.items()}

    def _build(self) -> FedAvg:
        """A new strategy. ConfigError for a value that it refuses."""
        cls = _strategy_class(self.strategy)
        options = {"fraction_train": 0.0, **_defaults(cls), **self.options}
        with _quiet():
            try:
                return cls(**options)
            except (TypeError, ValueError) as e:
                raise ConfigError(f"options do not suit Flower's {self.strategy}: {' '.join(str(e).split())}") from e


def strategies() -> list[str]:
    """Names of Flower's strategies that can be rules here."""
    return [n for n in strategy.__all__ if n not in REFUSED and issubclass(getattr(strategy, n), FedAvg)]


def _strategy_class(name: str) -> type[FedAvg]:
    if name in REFUSED:
        raise ConfigError(f"strategy '{name}' of Flower cannot be a rule: {REFUSED[name]}")
    if name not in strategies():
        raise ConfigError(f"strategy '{name}' is not one of Flower's.{did_you_mean(name, strategies())}")
    cls: type[FedAvg] = getattr(strategy, name)
    return cls


def _defaults(cls: type[FedAvg]) -> dict[str, Any]:
    """QFedAvg looks for the clients' loss under this name."""
    return {"train_loss_key": "loss"} if "train_loss_key" in inspect.signature(cls).parameters else {}


def _check_options(cls: type[FedAvg], options: Mapping[str, Any]) -> None:
    known = {n: p for n, p in inspect.signature(cls).parameters.items() if n not in OURS}
    for name, value in options.items():
        if name in OURS:
            raise ConfigError(f"options.{name} cannot be set: {OURS[name]}")
        if name not in known:
            raise ConfigError(f"options.{name} is not an option of Flower's {cls.__name__}.{did_you_mean(name, known)}")
        wanted = known[name].annotation
        fits = isinstance(value, (int, float)) if wanted is float else isinstance(value, wanted)
        if not fits or isinstance(value, bool):
            raise ConfigError(f"options.{name} must be of type {wanted.__name__}, got {value!r}")
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise ConfigError(f"options.{name} must be given for Flower's {cls.__name__}")


def _arrays(tensors: Tensors, names: Sequence[str]) -> ArrayRecord:
    return ArrayRecord({name: Array(tensors[name].detach().double().numpy()) for name in names})


def _replies(names: Sequence[str], updates: Sequence[ClientUpdate]) -> list[Message]:
    """What Flower's strategies expect of a client: one record of arrays, one of numbers with the weight in it."""
    replies = []
    told = [m for m in updates[0].metrics if m != "num-examples" and all(m in u.metrics for u in updates)]
    for update in updates:
        if update.params.keys() != set(names):
            raise AggregationError(f"client {update.client_id} trained other tensors than client {updates[0].client_id}")
        numbers = MetricRecord({"num-examples": update.num_samples, **{m: float(update.metrics[m]) for m in told}})
        replies.append(_reply(update.client_id, RecordDict({"arrays": _arrays(update.params, names), "metrics": numbers})))
    return replies


def _reply(client_id: int, content: RecordDict) -> Message:
    """A message as it would have come from a node. Flower's short form of the constructor works only inside its runtime."""
    metadata = Metadata(
        run_id=0,
        message_id=str(client_id),
        src_node_id=client_id,
        dst_node_id=0,
        reply_to_message_id="",
        group_id="",
        created_at=0.0,
        ttl=1.0,
        message_type=MessageType.TRAIN,
    )
    message: Message = Message(content=content, metadata=metadata)  # type: ignore[call-overload]
    return message


def _freeze(name: str, value: Any) -> Any:
    """What a strategy remembers, as a file can hold it."""
    if isinstance(value, (np.ndarray, np.generic)):
        return torch.from_numpy(np.array(value))
    if isinstance(value, Mapping):
        return {str(k): _freeze(name, v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_freeze(name, v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise AggregationError(f"Flower's strategy remembers '{name}' as {type(value).__name__}, which a checkpoint cannot hold")


def _thaw(value: Any) -> Any:
    """The reverse of `_freeze`, in memory of its own."""
    if isinstance(value, torch.Tensor):
        return value.numpy().copy()
    if isinstance(value, Mapping):
        return {k: _thaw(v) for k, v in value.items()}
    return [_thaw(v) for v in value] if isinstance(value, list) else value


@contextmanager
def _cheap_collections() -> Iterator[None]:
    """Bulyan and QFedAvg run the garbage collector once per client, over everything that torch has loaded: seconds a round.
    Objects that are there already are kept out of it meanwhile."""
    ours = gc.get_freeze_count() == 0  # else the user has frozen some, and thawing would undo it
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Flower's log is caught and its warnings kept, for an error message; the user's logging is as before afterwards."""
    kept: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            kept.append(" ".join(record.getMessage().split()))
        return False

    logger = logging.getLogger("flwr")
    logger.addFilter(keep)
    try:
        yield kept
    finally:
        logger.removeFilter(keep)
