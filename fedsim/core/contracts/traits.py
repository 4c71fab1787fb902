"""What a part of a run says of itself, so that parts which do not suit each other are refused before any training.

Parts know nothing of each other: they meet in words. `fedsim/suitable.py` goes through the traits of a run's parts once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedsim.core.contracts.plugin import Plugin

WORDS: Mapping[str, str] = {
    "a module per client": "what is deployed has a leading axis of clients, in place of one merged module and head",
    "composes modules": "makes one prediction of tensors with such an axis",
    "keeps every module": "takes tensors with such an axis from task to task",
    "old head rows rewritten": "the head's rows of classes of past tasks are changed",
    "affine features": "features are affine in the tensors, so that modules of clients and tasks add up",
    "the cross-entropy": "the loss term that every client has, unless a learner stands in its place",
    "learns one class": "something is learned even where a task has a single class, of which the cross-entropy is 0",
}


@dataclass(frozen=True)
class Traits:
    """Words that decide what goes with what. `WORDS` are those of fedsim's own parts; a plug-in may bring others.

    gives: what others may need or refuse. Besides, every part gives its kind ("calibrator") and its kind with its name
        ("calibrator ccvr"), and the run gives words of its own (`fedsim.suitable.run_words`), such as "several rounds".
    takes: places of a run that one part only can have: who takes one that is taken is refused.
    needs: word -> what is said where nobody gives it.
    refuses: word -> what is said where another part, or the run, gives it.

    What is said follows the part's own kind and name ("consolidator compose ..."), names what is wrong and what to do, and may
    hold {other} (who gives a refused word), a kind ({adapter}: "adapter vpt"), and keys of the config ({server.rounds}).
    """

    gives: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset()
    needs: Mapping[str, str] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)


class Part(Plugin):
    """A plug-in that a run is made of."""

    @property
    def traits(self) -> Traits:
        """What it gives to, needs of and refuses in other parts; may depend on its options. Default: it goes with all."""
        return Traits()
