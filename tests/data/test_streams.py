"""Streams: which classes and samples a task gets, and what is said about orders that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.core import config, rng
from fedsim.core.config import StreamConfig
from fedsim.core.contracts import ArraySplit, Dataset
from fedsim.core.errors import ConfigError, DataError
from fedsim.data import streams
from fedsim.data.sources import omniglot, synthetic


def stream_of(dataset: Dataset, seed: int = 0, **options: Any) -> streams.Stream:
    return streams.build(config.typed(StreamConfig, options, "stream"), dataset, seed)


def synthetic_data(**options: Any) -> Dataset:
    return synthetic.Source(image_size=2, train_per_class=4, test_per_class=2, **options).load()


def animals() -> Dataset:
    """Six classes in two kinds, in an order that mixes the kinds; labels in no order."""
    train, test = np.array([5, 0, 3, 1, 2, 4, 0, 5, 3]), np.array([0, 1, 2, 3, 4, 5, 5])
    pixels = [np.arange(len(y), dtype=np.uint8)[:, None, None] for y in (train, test)]
    return Dataset(
        train=ArraySplit({"pixel_values": pixels[0]}, train),
        test=ArraySplit({"pixel_values": pixels[1]}, test),
        class_names=("cat", "trout", "dog", "salmon", "horse", "pike"),
        groups={"kind": np.array([1, 0, 1, 0, 1, 0])},
        group_names={"kind": ("fish", "mammal")},
    )


def test_given_order_in_even_tasks() -> None:
    stream = stream_of(animals(), tasks=3)
    assert stream.class_order == (0, 1, 2, 3, 4, 5)
    assert stream.task_classes == ((0, 1), (2, 3), (4, 5))
    assert stream.task_names == ("task 0", "task 1", "task 2")
    assert [t.tolist() for t in stream.train] == [[1, 3, 6], [2, 4, 8], [0, 5, 7]]
    assert [t.tolist() for t in stream.test] == [[0, 1], [2, 3], [4, 5, 6]]


def test_task_incremental_is_the_same_stream() -> None:
    a, b = stream_of(animals(), tasks=3), stream_of(animals(), tasks=3, name="task_incremental")
    assert a.task_classes == b.task_classes
    assert all(np.array_equal(x, y) for x, y in zip(a.train, b.train, strict=True))


def test_explicit_order_by_name_and_id_uses_only_what_it_names() -> None:
    stream = stream_of(animals(), tasks=2, order=["pike", 0, "dog"])
    assert stream.class_order == (5, 0, 2)
    assert stream.class_names == ("pike", "cat", "dog")
    assert stream.task_classes == ((0, 1), (2,))
    assert [t.tolist() for t in stream.train] == [[0, 1, 6, 7], [4]]


def test_groups_are_tasks() -> None:
    stream = stream_of(animals(), tasks=None, group="kind")
    assert stream.task_names == ("fish", "mammal")
    assert stream.class_names == ("trout", "salmon", "pike", "cat", "dog", "horse")
    assert stream.task_classes == ((0, 1, 2), (3, 4, 5))
    assert [t.tolist() for t in stream.train] == [[0, 2, 3, 7, 8], [1, 4, 5, 6]]
    only = stream_of(animals(), tasks=1, group="kind", order=["mammal"])
    assert only.task_names == ("mammal",)
    assert only.class_order == (0, 2, 4)


def test_domains_are_tasks_over_all_classes() -> None:
    dataset = synthetic_data(classes=3, domains=4)
    stream = stream_of(dataset, name="domain_incremental", tasks=None, order=["domain2", 0, 1, 3])
    assert stream.task_names == ("domain2", "domain0", "domain1", "domain3")
    assert stream.task_classes == ((0, 1, 2),) * 4
    assert dataset.train.domains is not None
    for positions, domain in zip(stream.train, (2, 0, 1, 3), strict=True):
        assert np.array_equal(positions, np.flatnonzero(dataset.train.domains == domain))
    assert len(stream_of(dataset, name="domain_incremental", tasks=2).task_names) == 2


def test_shuffle_follows_the_seed_and_nothing_else() -> None:
    dataset = synthetic_data(classes=30)
    a, b, c = (stream_of(dataset, seed, tasks=3, order="shuffle") for seed in (1, 1, 2))
    assert a.class_order == b.class_order != c.class_order
    assert a.class_order == tuple(rng.stream(1, "stream").permutation(30).tolist())
    assert sorted(a.class_order) == list(range(30))


@given(classes=st.integers(1, 12), tasks=st.integers(1, 12), shuffle=st.booleans())
@settings(max_examples=40)
def test_every_sample_is_in_one_task_and_sizes_are_as_array_split_cuts(classes: int, tasks: int, shuffle: bool) -> None:
    dataset = synthetic_data(classes=classes)
    options: dict[str, Any] = {"tasks": tasks, "order": "shuffle" if shuffle else "given"}
    if tasks > classes:
        with pytest.raises(ConfigError, match=f"stream.tasks is {tasks}, but there are only {classes} classes"):
            stream_of(dataset, **options)
        return
    stream = stream_of(dataset, **options)
    assert [len(t) for t in stream.task_classes] == [len(part) for part in np.array_split(np.arange(classes), tasks)]
    assert [row for task in stream.task_classes for row in task] == list(range(classes))
    for split, positions in ((dataset.train, stream.train), (dataset.test, stream.test)):
        assert np.array_equal(np.sort(np.concatenate(positions)), np.arange(len(split)))
        for task, of_task in zip(stream.task_classes, positions, strict=True):
            assert set(split.labels[of_task]) == {stream.class_order[row] for row in task}


def test_classes_per_task() -> None:
    dataset = synthetic_data(classes=10)
    first = stream_of(dataset, tasks=2, classes_per_task=3)
    assert first.class_order == (0, 1, 2, 3, 4, 5)
    assert first.task_classes == ((0, 1, 2), (3, 4, 5))
    everything = stream_of(dataset, tasks=None, classes_per_task=4)
    assert [len(t) for t in everything.task_classes] == [4, 4, 2]
    with pytest.raises(ConfigError, match=r"4 × 3 = 12, but there are only 10 classes: use at most 3 tasks of 3"):
        stream_of(dataset, tasks=4, classes_per_task=3)
    with pytest.raises(ConfigError, match=r"stream.tasks or stream.classes_per_task must be given"):
        stream_of(dataset, tasks=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": ["cat", "troot"]}, "stream.order: the data has no class 'troot'. Did you mean 'trout'?"),
        ({"order": ["cat", 6]}, "stream.order: the data has no class 6, ids go from 0 to 5"),
        ({"order": [-1]}, "stream.order: the data has no class -1, ids go from 0 to 5"),
        ({"order": ["cat", 1, 0]}, "stream.order names class 0 twice"),
        ({"order": [True]}, "stream.order must hold names or ids, got True"),
        ({"order": [1.5]}, "stream.order must hold names or ids, got 1.5"),
        ({"order": []}, "stream.order is an empty list: name at least one class"),
        ({"order": ["cat", 1], "tasks": 3}, "stream.tasks is 3, but there are only 2 classes in stream.order, which leaves"),
        ({"order": [0, 1, 2], "tasks": 2, "classes_per_task": 2}, "stream.tasks × stream.classes_per_task is 2 × 2 = 4, but "
         "there are only 3 classes in stream.order, which leaves the others out: use at most 1 tasks of 2"),
        ({"group": "kind", "order": ["fish"], "tasks": 2}, "stream.tasks is 2, but there are only 1 groups in stream.order"),
        ({"group": "kid"}, "stream.group 'kid' is not a grouping of the data. Did you mean 'kind'?"),
        ({"group": "kind", "order": ["fsh"]}, "stream.order: the data has no kind 'fsh'. Did you mean 'fish'?"),
        ({"group": "kind", "tasks": 3}, "stream.tasks is 3, but there are only 2 groups: use at most 2, or null for all"),
        ({"group": "kind", "classes_per_task": 2}, "stream.classes_per_task does not go with stream.group: "),
        ({"name": "domain_incremental"}, "stream.name is domain_incremental, but the data has no domains: "),
        ({"name": "domain_incremental", "group": "kind"}, "stream.group does not go with domain_incremental: "),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        stream_of(animals(), **{"tasks": 1, **options})
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_too_many_domains() -> None:
    with pytest.raises(ConfigError, match=r"stream.tasks is 5, but there are only 4 domains: use at most 4, or null for all"):
        stream_of(synthetic_data(domains=4), name="domain_incremental", tasks=5)


def test_a_task_without_samples_is_named() -> None:
    data = animals()
    kept = np.flatnonzero(data.test.labels != 4)
    test = ArraySplit({"pixel_values": data.test.inputs["pixel_values"][kept]}, data.test.labels[kept])
    holey = Dataset(data.train, test, data.class_names)
    with pytest.raises(DataError, match=r"task 4 \(task 4\) has no test samples"):
        stream_of(holey, tasks=6)


def test_first_hundred_evaluation_characters_are_those_of_the_plain_loop() -> None:
    arrays = omniglot._read(None)
    dataset = omniglot.Source().load()
    stream = stream_of(dataset, tasks=5, classes_per_task=20)
    # the independent loop: class ids of the first 100 characters of evaluation alphabets, in the order of the file
    chosen = np.flatnonzero(arrays["alphabet_is_evaluation"][arrays["class_alphabet"]])[:100]
    new = np.full(len(arrays["class_names"]), -1)
    new[chosen] = np.arange(100)
    assert stream.class_names == tuple(arrays["class_names"][chosen])
    row_of = streams.rows(stream.class_order, len(dataset.class_names))
    for name, split, positions in (("train", dataset.train, stream.train), ("test", dataset.test, stream.test)):
        y = new[arrays[f"{name}_labels"].astype(int)]
        images, y = arrays[f"{name}_images"][y >= 0], y[y >= 0]
        for t in range(5):
            of_task = y // 20 == t
            assert np.array_equal(split.inputs["pixel_values"][positions[t]], images[of_task])
            assert np.array_equal(row_of[split.labels[positions[t]]], y[of_task])
            assert stream.task_classes[t] == tuple(range(20 * t, 20 * t + 20))


def test_omniglot_alphabets_as_tasks() -> None:
    dataset = omniglot.Source(alphabets=["Greek", "Angelic"]).load()
    stream = stream_of(dataset, tasks=None, group="alphabet")
    assert stream.task_names == ("Greek", "Angelic")
    assert [len(t) for t in stream.task_classes] == [24, 20]
    assert all(name.startswith("Greek/") for name in stream.class_names[:24])
