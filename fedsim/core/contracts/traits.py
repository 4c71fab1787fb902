"""What a part of a run says of itself, so that parts which do not suit each other are refused before any training.

Parts know nothing of each other: they meet in words. `fedsim/suitable.py` goes once over the traits of a run's parts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields

from fedsim.core.contracts.plugin import Plugin
from fedsim.core.errors import FedsimError, PluginError

REWRITES = "old head rows rewritten"  # who gives it does not go with a consolidator that keeps these rows
WORDS: Mapping[str, str] = {
    "a module per client": "what is deployed has a leading axis of clients, in place of one merged module and head",
    "composes modules": "makes one prediction of tensors with such an axis",
    "composes heads": "makes one prediction of a head per client",
    "class centres": "head.weight has a point per class among the features, and logits fall with the distance to it",
    "an affine head": "logits are W inputs + b, of head.weight and head.bias",
    "a quadratic head": "logits are −½ (inputs − w)ᵀ P (inputs − w) + b, of head.weight, head.precision and head.offset",
    "keeps every module": "takes tensors with such an axis from task to task",
    REWRITES: "the head's rows of classes of past tasks are changed, by training or afterwards",
    "past modules beside": "a task's module is trained on top of those of past tasks, which stay as they are",
    "a module beneath": "rounds leave part of the model beneath the module that is trained, whose tensors then begin anew",
    "pairs in a new basis": "a round brings LoRA pairs back as factors of which only the product goes on from those before it",
    "changes of weights": "what the module adds to the weights of linear layers is a matrix or a product of two",
    "takes unequal ranks": "merges LoRA pairs of which clients hold the first ranks only, and zeros in the place of the others",
    "affine features": "features are affine in the tensors, so that modules of clients and tasks add up",
    "linear maps": "the module is made of linear maps that are trained, weights of layers or LoRA pairs",
    "one module goes on": "a task starts from the very module that the last one ended with, and what is trained is deployed",
    "other tensors deployed": "what is evaluated at a task's end has other tensors than what is trained",
    "uniform sum": "clients are summed under their tensors' own names, each with weight one, and counted",
    "uniform mean": "what a round gives is the mean of its clients' tensors, each with weight one",
    "outside the clients' span": "a tensor's change in a round is no combination of its clients' changes, with a number for each",
    "rule remembers tasks": "at a task's start the rule knows something of the clients of earlier tasks",
    "the cross-entropy": "the loss term that every client has, unless a learner stands in its place",
    "the buffer": "samples that a client held before, kept and replayed by one learner",
    "learns one class": "something is learned even where a task has a single class, of which the cross-entropy is 0",
}
HOLDS_ON: Mapping[str, str] = {  # for a part's `refuses`
    "a module beneath": "compares tensors with those of an earlier round or task, but {other} moves part of what they do beneath "
    "the module: use another rule, such as fedavg",
}
HOLDS_FACTORS: Mapping[str, str] = {  # for a part's `refuses`
    **HOLDS_ON,
    "pairs in a new basis": "keeps numbers for every factor of a LoRA pair, but {other} gives its product other factors in every "
    "round: use another rule, such as fedavg",
}
WHOLE_PAIRS: Mapping[str, str] = {
    "unequal ranks": "keeps numbers for every tensor of a client, of which client.ranks takes a part from some: leave that out",
}
ONE_ROUND: Mapping[str, str] = {  # for a part's `refuses`
    "several rounds": "takes one round per task, but server.rounds is {server.rounds}: set it to 1 and raise client.epochs",
}


def holding(words: Mapping[str, bool]) -> frozenset[str]:
    """The words that hold: what a part gives that depends on its options."""
    return frozenset(word for word, holds in words.items() if holds)


@dataclass(frozen=True)
class Traits:
    """Words that decide what goes with what. `WORDS` are those of fedsim's own parts; a plug-in may bring others.

    gives: what others may need or refuse. Besides, every part gives its kind ("calibrator") and its kind with its name
        ("calibrator ccvr"), and the run itself gives words such as "several rounds" (`fedsim.suitable.run_words`).
    takes: places of a run that one part only can have: who takes one that is taken, or that the run is without, is refused. Who
        takes a place gives its word too.
    needs: word -> what is said where nobody gives it.
    refuses: word -> what is said where another part, or the run, gives it.
    minds: the same, of what is allowed: the run says it in a note.

    What is said goes on after the part's own kind and name: "composes what every client learned by itself, but {aggregator}
    merges it: use aggregator: collect". It may hold {other} (who gives a refused word), kinds ({adapter} is "adapter vpt"), and
    keys of the config ({server.rounds}). Raises PluginError where a word stands alone in the place of a set of words.
    """

    gives: Collection[str] = frozenset()
    takes: Collection[str] = frozenset()
    needs: Mapping[str, str] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)
    minds: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for f in fields(self):
            value, wanted = getattr(self, f.name), Collection if f.name in ("gives", "takes") else Mapping
            if isinstance(value, str) or not isinstance(value, wanted) or not all(isinstance(word, str) for word in value):
                what = "map words to what is said" if wanted is Mapping else 'be a set of words, such as {"affine features"}'
                raise PluginError(f"{f.name} of a part's traits must {what}, got {value!r}")

    def lines(self) -> Iterator[str]:
        """What is said, for lists of plug-ins: "needs composes modules, keeps every module"."""
        for f in fields(self):
            if found := getattr(self, f.name):
                yield f"{f.name} {', '.join(sorted(found))}"


class Part(Plugin):
    """A plug-in that a run is made of."""

    @property
    def traits(self) -> Traits:
        """What it gives to, needs of and refuses in the other parts; may depend on its options. Default: it goes with all."""
        return Traits()

    @classmethod
    def usual_traits(cls) -> Traits:
        """With the options that it has by default; none of a part that must be told something first."""
        try:
            return cls().traits
        except (TypeError, FedsimError):
            return Traits()
