"""Addresses of random draws: no two in use mean one stream."""

from __future__ import annotations

import itertools

from fedsim.core import rng

ALONE = ("stream", "merge", "export", "head", "probe", "validation")  # purposes without a number behind them
WORDS = (("head", "start"), ("probe", "augment"), ("probe", "dropout"), ("synthetic", "train"), ("synthetic", "classes"))
NUMBERS = {  # how many
    "partition": 1, "label noise": 1, "adapter": 1, "grown": 1, "consolidate": 1, "rank": 1, "tune": 1,
    "participants": 2, "aggregate": 2, "calibrate": 2, "online": 2,
    "batches": 3, "dropout": 3, "augment": 3, "learner er": 3,
    "channel": 4,
}  # fmt: skip


def state(*address: str | int, seed: int = 0) -> tuple[int, ...]:
    return tuple(rng.seed_sequence(seed, *address).generate_state(4).tolist())


def test_no_two_addresses_in_use_are_one() -> None:
    addresses: list[tuple[str | int, ...]] = [*((word,) for word in ALONE), *WORDS, ("server", "learner er", 0)]
    for word, count in NUMBERS.items():
        addresses += [(word, *numbers) for numbers in itertools.product(range(3), repeat=count)]
    addresses += [("channel", 0, 0, 0, part) for part in ("rule", "learner.er")]
    addresses += [("channel", 0, 0, 0, 0, "pass"), ("channel", 0, 0, 0, 0, "pass", "rule")]
    states = {state(*address, seed=seed) for address in addresses for seed in range(3)}
    assert len(states) == 3 * len(addresses)


def test_a_purpose_alone_is_one_with_a_zero_behind_it() -> None:
    """Why no purpose is used both ways."""
    assert state("head") == state("head", 0) != state("head", 1)
    assert len({state("batches", *[0] * count) for count in range(1, 6)}) == 5
