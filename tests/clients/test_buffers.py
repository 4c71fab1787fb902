"""What a buffer keeps, by the law of each policy, and what lies beside its samples."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clients.learners._buffers import POLICIES, Buffer, Offer, Rehearsal, balanced, herded, herding, reservoir, shares
from fedsim.core.contracts import ClientWork, IntArray
from fedsim.core.messages import Tensors
from tests.clients.test_fused import work
from tests.tiny import same_bits

NOTHING = np.zeros(0, dtype=np.int64)


def offer(labels: IntArray, size: int, stored: int = 0, features_ND: Tensor | None = None, **past: object) -> Offer:
    """Samples 0, 1, …, of which the first are in the buffer."""
    known = {"offered": stored, "counts": NOTHING, **past}
    given = torch.zeros(len(labels), 1) if features_ND is None else features_ND
    return Offer(np.arange(len(labels)), labels, stored, size, features=lambda places: given[torch.from_numpy(places)], **known)  # type: ignore[arg-type]


def test_a_reservoir_keeps_every_sample_with_the_same_probability() -> None:
    """Offered in two parts, 30 samples in 6 places: each is in it with 6 / 30. χ² with 29 degrees of freedom, 0.1 % at 58.3."""
    trials, counts = 3000, Counter[int]()
    draw = torch.Generator().manual_seed(0)
    for _ in range(trials):
        first = reservoir(offer(np.zeros(4, dtype=np.int64), 6), draw)
        assert first.tolist() == [0, 1, 2, 3]
        stored = reservoir(offer(np.zeros(30, dtype=np.int64), 6, stored=4), draw)
        assert len(set(stored.tolist())) == 6
        counts.update(stored.tolist())
    expected = trials * 6 / 30
    # places are drawn without replacement, so that counts vary less than independent ones: the bound is on the safe side
    assert sum((counts[i] - expected) ** 2 / expected for i in range(30)) < 58.3


def test_a_balanced_buffer_is_even_over_classes_and_uniform_within() -> None:
    """20, 8 and 2 samples of three classes, shuffled and offered in two parts, in 9 places: the smallest class is there whole,
    the others share what is left; of a class, each sample with the same probability (χ², 0.1 % at 43.8 for 19 degrees)."""
    trials, counts, sizes = 2000, Counter[int](), Counter[tuple[int, ...]]()
    numbers = np.random.default_rng(0)
    draw = torch.Generator().manual_seed(0)
    for _ in range(trials):
        order = numbers.permutation(30)  # sample -> class 0 for 0..19, 1 for 20..27, 2 for 28 and 29
        labels = np.searchsorted([20, 28], order, side="right")
        first = balanced(offer(labels[:12], 9), draw)
        seen = np.bincount(labels[:12])
        names = np.concatenate([order[:12][first], order[12:]])
        again = np.concatenate([labels[:12][first], labels[12:]])
        kept = balanced(offer(again, 9, stored=len(first), offered=12, counts=seen), draw)
        assert len(set(names[kept].tolist())) == 9
        sizes[tuple(np.bincount(again[kept], minlength=3).tolist())] += 1
        counts.update(names[kept].tolist())
    assert set(sizes) <= {(4, 3, 2), (3, 4, 2)}, sizes
    assert counts[28] == counts[29] == trials
    expected = sum(counts[i] for i in range(20)) / 20
    assert sum((counts[i] - expected) ** 2 / expected for i in range(20)) < 43.8
    expected = sum(counts[i] for i in range(20, 28)) / 8
    assert sum((counts[i] - expected) ** 2 / expected for i in range(20, 28)) < 24.3, "7 degrees"


def test_herding_is_nearer_to_the_mean_than_chance() -> None:
    """Brute force, step by step; and on average over draws nearer than random samples, for every number of them."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 6, generator=generator) + 1
    units = F.normalize(features.double(), dim=1)
    order = herded(features, 40)
    assert sorted(order.tolist()) == list(range(40))
    chosen: list[int] = []
    for best in order[:10].tolist():
        far = {i: float((units.mean(0) - units[[*chosen, i]].mean(0)).norm()) for i in range(40) if i not in chosen}
        assert far[best] == pytest.approx(min(far.values()))
        chosen.append(best)
    for count in (1, 3, 10, 20):
        random = [
            float((units.mean(0) - units[torch.randperm(40, generator=generator)[:count]].mean(0)).norm()) for _ in range(50)
        ]
        assert float((units.mean(0) - units[order[:count]].mean(0)).norm()) < np.mean(random)


def test_herded_classes_give_way_from_their_ends() -> None:
    """Of an old class the first ones stay, in their order; of a class that comes again all are looked at again."""
    features = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 1, 1])
    kept = herding(offer(labels, 6, stored=6, features_ND=features), torch.Generator())
    ones = np.flatnonzero(labels == 1)
    assert kept.tolist() == [0, 1, *ones[herded(features[ones], 2)], *(6 + herded(features[6:10], 2))]


@pytest.mark.parametrize(
    ("held", "size", "want"), [([5, 5, 5], 9, [3, 3, 3]), ([1, 9, 9], 9, [1, 4, 4]), ([2, 3], 9, [2, 3]), ([9, 9], 1, [0, 1])]
)
def test_room_is_shared_evenly(held: list[int], size: int, want: list[int]) -> None:
    assert shares(np.array(held), size) == want


class Noting(Rehearsal):
    """Stores with every sample its position once more, and its logits."""

    def beside(self, work: ClientWork, positions: IntArray, params: Tensors) -> Tensors:
        return {"again": torch.from_numpy(positions), "logits": work.outputs(positions, params).logits}


@pytest.mark.parametrize("policy", POLICIES)
def test_what_lies_beside_a_sample_stays_with_it(policy: str) -> None:
    """Two offers, of two tasks; what was stored with the first is what the model said then. Offered once a task."""
    first, _, second, *_ = work().works()
    learner, draw, buffer = Noting(size=10, buffer=policy), torch.Generator().manual_seed(0), Buffer.of({})
    other = {n: 1.5 * t for n, t in first.params.items()}
    buffer = learner.filled(buffer, first, first.params, draw)
    known = Buffer.of(buffer.memory())
    assert same_bits(known.memory(), buffer.memory()) and buffer.offered == 16 and buffer.task == 1
    assert learner.filled(known, second, other, draw) is known, "the same task"
    after = learner.filled(known._replace(task=0), second, other, draw)
    assert len(after.positions) == len(set(after.positions)) == 10 and after.offered == 16 + 40
    assert after.beside["again"].tolist() == after.positions.tolist()
    old = np.isin(after.positions, first.shard)
    assert 0 < old.sum() < 10
    for rows, params in ((old, first.params), (~old, other)):
        want = first.outputs(after.positions[rows], params).logits
        torch.testing.assert_close(after.beside["logits"][torch.from_numpy(rows)], want)
    if policy == "balanced":
        labels = first.labels(np.concatenate([first.shard, second.shard])).numpy()
        assert after.counts.tolist() == np.bincount(labels).tolist()
