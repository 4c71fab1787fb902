"""The door of all data: what is counted, what is left out or refused, and what is said of it. Files as people have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.cli import main
from fedsim.core.config import SimConfig
from fedsim.core.contracts import ArraySplit, Dataset
from fedsim.core.errors import ConfigError, DataError, PluginError
from fedsim.data import door
from fedsim.data import manifest as manifests
from fedsim.simulation import run
from tests.tiny import same_bits, tiny

Make = Callable[..., SimConfig]
IID = {"name": "iid", "clients": 2}
BY_DOMAIN = {"name": "domain_incremental", "tasks": None}


def write(path: Path, labels: Any, test_labels: Any = None, **arrays: Any) -> str:
    """An .npz of 8 × 8 images, every class with a grey level of its own; the test's labels are the training's unless given."""
    splits = {"train": np.asarray(labels), "test": np.asarray(labels if test_labels is None else test_labels)}
    for split, y in splits.items():
        level = np.unique(y, return_inverse=True)[1] * 20 + 30
        noise = np.random.default_rng(len(y)).integers(0, 40, (len(y), 8, 8))
        arrays |= {f"{split}_images": (level[:, None, None] + noise).astype(np.uint8), f"{split}_labels": y}
    np.savez(path, **arrays)
    return str(path)


def prepared(config: SimConfig) -> tuple[manifests.Manifest, tuple[str, ...]]:
    """The split of a config's data, and what must be said of them."""
    dataset = door.load(config)
    split = manifests.make(config, dataset)
    return split, door.notes(dataset, split)


# ---------------------------------------------------------------- counting by class and domain


def counts(dataset: Dataset, split: str = "train") -> Any:
    """Samples of every (domain, class)."""
    part: ArraySplit = getattr(dataset, split)
    assert part.domains is not None
    table = np.zeros((len(dataset.domain_names), len(dataset.class_names)), dtype=int)
    np.add.at(table, (part.domains, part.labels), 1)
    return table


def test_samples_are_counted_per_class_and_domain_where_tasks_are_domains(tmp_path: Path, make_config: Make) -> None:
    y, domain = np.tile(np.repeat(np.arange(3), 10), 2), np.repeat([0, 1], 30)
    path = write(tmp_path / "d.npz", y, train_domain=domain, test_domain=domain, domain_names=np.array(["ink", "chalk"]))
    data = {"source": "npz", "path": path, "train_per_class": 4, "test_per_class": 3}
    dataset = door.load(make_config(data, BY_DOMAIN, IID))
    assert counts(dataset).tolist() == [[4, 4, 4]] * 2
    assert counts(dataset, "test").tolist() == [[3, 3, 3]] * 2
    by_class = door.load(make_config(data, {"tasks": 3}, IID))
    assert counts(by_class).tolist() == [[4, 4, 4], [0, 0, 0]], "elsewhere a class is counted by itself"


def test_real_digits_of_four_domains_leave_no_domain_empty(shared_data: Callable[[str], Path], make_config: Make) -> None:
    data = {"source": "npz", "path": str(shared_data("digits_domains_28.npz")), "train_per_class": 300, "test_per_class": 20}
    made = make_config(data, BY_DOMAIN, {"name": "dirichlet", "clients": 10, "min_samples": 6})
    manifest, notes = prepared(made)
    whole = counts(door.load(make_config({**data, "train_per_class": None}, BY_DOMAIN, IID)))
    assert [h.sum(axis=0).tolist() for h in manifest.histograms] == np.minimum(whole, 300).tolist()
    assert manifest.sizes.min() >= 6, "the floor holds in every domain"
    assert notes == ()


# ---------------------------------------------------------------- classes that are not there


@pytest.fixture
def same_data(tmp_path: Path) -> dict[str, str]:
    """The same samples of six classes, with labels as people write them."""
    y = np.repeat(np.arange(6), 12)
    names = np.array(["a", "b", "c", "d", "e", "f"])
    more = np.array(["a", "no", "b", "c", "none", "nobody", "d", "e", "f", "nowhere"])
    return {
        "plain": write(tmp_path / "plain.npz", y, class_names=names),
        "phantom": write(tmp_path / "phantom.npz", np.flatnonzero(np.isin(more, names))[y], class_names=more),
        "gaps": write(tmp_path / "gaps.npz", np.array([0, 5, 9, 11, 12, 40])[y]),
        "from 1": write(tmp_path / "one.npz", y + 1),
        "strings": write(tmp_path / "text.npz", names[y]),
    }


@pytest.mark.parametrize("order", ["given", "shuffle"])
def test_labels_with_gaps_are_the_same_stream(order: str, same_data: dict[str, str], make_config: Make) -> None:
    specs = {}
    for kind, path in same_data.items():
        made = make_config({"source": "npz", "path": path}, {"tasks": 3, "order": order}, {"name": "dirichlet", "clients": 3})
        split, notes = prepared(made)
        specs[kind] = manifests.work_spec(split, door.load(made), made)
        phantom = ("classes 'no', 'none', 'nobody', 'nowhere': no samples, left out of head and averages",)
        assert notes == (phantom if kind == "phantom" else ())
    for spec in specs.values():
        assert spec.task_classes == ((0, 1), (2, 3), (4, 5))
        for name in ("shard_indices", "shard_offsets", "test_indices", "test_offsets"):
            assert np.array_equal(getattr(spec, name), getattr(specs["plain"], name))
        assert np.array_equal(spec.train.labels, specs["plain"].train.labels)


def test_names_without_samples_move_no_number(same_data: dict[str, str], tmp_path: Path) -> None:
    plain, phantom = (
        run(
            tiny(
                data={"source": "npz", "path": same_data[kind]},
                server={"rounds": 1, "aggregator": "fedavg", "consolidator": "none"},
                output=tmp_path / "runs",
            )
        )
        for kind in ("plain", "phantom")
    )
    assert len(plain.accuracy) == 2
    assert same_bits([r.correct for r in phantom.rows], [r.correct for r in plain.rows])
    assert np.array_equal(phantom.accuracy[1], plain.accuracy[1])
    assert len(phantom.notes) == 1
    assert not plain.notes


def test_phantom_domains_classes_of_groups_and_orders(tmp_path: Path, make_config: Make) -> None:
    names = np.array(["a", "x", "b", "y"])
    path = write(tmp_path / "d.npz", [0, 2, 0, 2], class_names=names, train_domain=[0, 0, 1, 1], test_domain=[0, 0, 1, 1],
                 domain_names=np.array(["ink", "chalk"]), class_kind=np.array([0, 0, 1, 1]),
                 kind_names=np.array(["k", "l"]))  # fmt: skip
    data = {"source": "npz", "path": path}
    of_domain, notes = prepared(make_config(data, BY_DOMAIN, IID))
    assert (of_domain.class_names, of_domain.task_classes) == (("a", "b"), ((0, 1), (0, 1)))
    assert notes == ("classes 'x', 'y': no samples, left out of head and averages",)
    grouped, _ = prepared(make_config(data, {"tasks": None, "group": "kind"}, {"name": "iid", "clients": 1}))
    assert (grouped.class_names, grouped.task_classes) == (("a", "b"), ((0,), (1,)))
    with pytest.raises(ConfigError, match=r"stream.order names class 'x', which has no training samples: leave it out"):
        prepared(make_config(data, {"tasks": 2, "order": ["a", "x"]}, IID))
    with pytest.raises(ConfigError, match=r"there are only 2 classes with samples: use at most 2 tasks"):
        prepared(make_config(data, {"tasks": 3}, IID))


def test_a_class_of_one_split_only(tmp_path: Path, make_config: Make) -> None:
    names = np.array(["a", "b", "c", "d"])
    untested = {"source": "npz", "path": write(tmp_path / "u.npz", [0, 1, 2, 3] * 2, [0, 1, 3], class_names=names)}
    manifest, notes = prepared(make_config(untested, {"tasks": 2}, IID))
    assert manifest.class_names == ("a", "b", "c", "d")
    assert notes == ("class 'c': training samples but no test samples, learned and never tested",)
    unseen = {"source": "npz", "path": write(tmp_path / "n.npz", [0, 1, 3] * 2, [0, 1, 2, 3], class_names=names)}
    for stream in ({"tasks": 2}, {"tasks": 2, "order": "shuffle"}):
        with pytest.raises(DataError) as error:
            prepared(make_config(unseen, stream, IID))
        assert str(error.value) == (
            "class 'c' of the test samples: there are no training samples to learn from: mend the data, or list the classes "
            "to be used in stream.order"
        )
    without, _ = prepared(make_config(unseen, {"tasks": 2, "order": ["a", "b", "d"]}, IID))
    assert without.class_names == ("a", "b", "d")
    assert len(without.test_indices) == 3


def test_names_that_are_nearly_the_same(tmp_path: Path, make_config: Make) -> None:
    blank = {"source": "npz", "path": write(tmp_path / "b.npz", ["cat", "dog"] * 4, ["cat ", "dog"] * 2)}
    with pytest.raises(DataError, match=r"^data source 'npz': classes 'cat', 'cat ' differ in blanks only: make them one$"):
        prepared(make_config(blank, {"tasks": 1}, IID))
    case = {"source": "npz", "path": write(tmp_path / "c.npz", ["cat", "dog"] * 4, ["Cat", "dog"] * 2)}
    with pytest.raises(DataError, match=r"class 'Cat' of the test samples: .*: 'Cat' and 'cat' differ in blanks or case only"):
        prepared(make_config(case, {"tasks": 1}, IID))
    letters = {"source": "npz", "path": write(tmp_path / "l.npz", ["a", "A", "b", "B"] * 4)}
    manifest, notes = prepared(make_config(letters, {"tasks": 2}, IID))
    assert manifest.class_names == ("A", "B", "a", "b")
    assert notes == ("classes 'A' and 'a' differ in case only, and are two classes",)
    twice = {"source": "npz", "path": write(tmp_path / "t.npz", [0, 1] * 4, class_names=np.array(["a", "a"]))}
    with pytest.raises(DataError, match=r"classes 'a', 'a' are the same: make them one"):
        prepared(make_config(twice, {"tasks": 1}, IID))


def test_a_number_in_an_order_is_what_the_data_calls_it(tmp_path: Path, make_config: Make) -> None:
    data = {"source": "npz", "path": write(tmp_path / "d.npz", [1, 5, 9, 20] * 4)}
    manifest, _ = prepared(make_config(data, {"tasks": 2, "order": [9, "1", 20]}, IID))
    assert manifest.class_names == ("9", "1", "20"), "and labels are sorted by size"
    with pytest.raises(ConfigError, match=r"stream.order: the data has no class 2. Did you mean '20'\?"):
        prepared(make_config(data, {"tasks": 2, "order": [2, 1]}, IID))


# ---------------------------------------------------------------- what every source promises

SOURCE = """
from dataclasses import dataclass, replace
import numpy as np
from fedsim.core import contracts
from fedsim.data.sources import synthetic

@dataclass(frozen=True)
class Source(contracts.Source):
    def load(self, {arguments}):
        whole = synthetic.Source(classes=4).load()
        train, test = whole.train, whole.test
        {change}
        return {result}
"""


def of_a_user(tmp_path: Path, make_config: Make, change: str = "pass", arguments: str = "tokenizer_of=None, by_domain=False",
              result: str = "replace(whole, train=train, test=test)") -> Dataset:  # fmt: skip
    path = tmp_path / "mine.py"
    path.write_text(SOURCE.format(change=change, arguments=arguments, result=result))
    return door.load(make_config({"source": str(path)}, {"tasks": 2}, IID))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train = replace(train, labels=train.labels - 1)", "training labels must be in 0..3, got -1 at position 0"),
        ("train = replace(train, labels=train.labels[:, None])", "must have shape (80,), got (80, 1): use .reshape(-1)"),
        ("test = replace(test, labels=test.labels[1:])", "test: 20 pixel_values for 19 labels"),
        ("test = replace(test, labels=test.labels[:0])", "test split: it holds no samples"),
        ("test = replace(test, inputs={'pixel_values': np.zeros((20, 4, 4), np.uint8)})", "and test inputs pixel_values (4, 4)"),
        ("train = replace(train, inputs={'pixel_values': train.inputs['pixel_values'] / 255})", "with (images * 255).round()"),
        ("whole = replace(whole, class_names=tuple('abca'))", "classes 'a', 'a' are the same: make them one"),
        ("whole = replace(whole, domain_names=('x', 'y'))", "training samples have no domains, but the data names some"),
        ("whole = replace(whole, groups={'half': np.arange(4)})", "groups 'half' must be in 0..1, got 2"),
    ],
)  # fmt: skip
def test_a_source_of_the_users_own_is_held_to_its_promises(tmp_path: Path, make_config: Make, change: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        of_a_user(tmp_path, make_config, change)
    assert message in str(error.value)
    assert "mine.py" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_source_with_another_contract(tmp_path: Path, make_config: Make) -> None:
    assert len(of_a_user(tmp_path, make_config).train) == 80
    with pytest.raises(PluginError, match=r"mine.py'?: its load must take \(tokenizer_of, by_domain\)"):
        of_a_user(tmp_path, make_config, arguments="tokenizer_of=None")
    with pytest.raises(PluginError, match=r"mine.py': its load gave a tuple, it must give a Dataset"):
        of_a_user(tmp_path, make_config, result="(train, test)")


def test_what_a_source_says_is_said(tmp_path: Path, make_config: Make) -> None:
    dataset = of_a_user(tmp_path, make_config, "whole = replace(whole, notes=('half of it is noise',))")
    assert dataset.notes == ("half of it is noise",)
    made = make_config("synthetic", {"tasks": 2}, IID)
    split = manifests.make(made, door.load(made))
    assert door.notes(replace(door.load(made), notes=dataset.notes), split) == dataset.notes


# ---------------------------------------------------------------- images and labels of .npz files


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda u: u / np.float32(255), "images * 255"),
        (lambda u: u / 127.5 - 1, "(images + 1) * 127.5"),
        (lambda u: u.astype(np.float64), "images.round()"),
        (lambda u: u.astype(np.int64), "images.round()"),
        (lambda u: u.astype(np.uint16) * 257, "images.clip(0) * (255 / 65535)"),
    ],
)
def test_images_of_other_numbers_get_the_line_that_converts_them(make: Any, line: str, tmp_path: Path, make_config: Make) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4)).astype(np.uint8)
    images[0, 0, :2] = 0, 255
    other = make(images)
    path = tmp_path / "d.npz"
    splits = {"train_labels": np.arange(8) % 2, "test_labels": np.arange(8) % 2, "test_images": images}
    np.savez(path, train_images=other, **splits)
    config = make_config({"source": "npz", "path": str(path)}, {"tasks": 1}, IID)
    with pytest.raises(DataError, match=r"train_images must be uint8 in 0..255, got") as error:
        door.load(config)
    advice = str(error.value).partition("convert them with ")[2]
    assert line in advice
    converted = eval(advice.partition(" (65535,")[0], {"images": other, "np": np})
    np.savez(path, train_images=converted, **splits)
    assert np.array_equal(door.load(config).train.inputs["pixel_values"], images), "the line is right"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [0, 1, -1, 1]}, "train_labels must not be negative, got -1 at position 2 (1 of 4 are): leave out samples"),
        ({"labels": [1, 2, 1, 2], "class_names": np.array(["a", "b"])}, "got 2 at position 1: if they begin at 1, subtract 1"),
        ({"labels": ["a", "b"] * 2, "test_labels": [0, 1]}, "must be of one kind, but some are integers and some are strings"),
        ({"labels": ["a", "bb"] * 2, "class_names": np.array(["a", "b"])}, "'bb' at position 1 is none of the names"),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit(changes: dict[str, Any], message: str, tmp_path: Path, make_config: Make) -> None:
    path = write(tmp_path / "d.npz", **changes)
    with pytest.raises(DataError) as error:
        door.load(make_config({"source": "npz", "path": path}, {"tasks": 1}, IID))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_labels_and_domains_that_are_strings(tmp_path: Path, make_config: Make) -> None:
    where = np.array([b"sea", b"land", b"sea", b"sea"])
    path = write(tmp_path / "d.npz", ["dog", "cat", "dog", "ant"], train_domain=where, test_domain=where)
    dataset = door.load(make_config({"source": "npz", "path": path}, BY_DOMAIN, IID))
    assert (dataset.class_names, dataset.train.labels.tolist()) == (("ant", "cat", "dog"), [2, 1, 2, 0])
    assert dataset.train.domains is not None
    assert (dataset.domain_names, dataset.train.domains.tolist()) == (("land", "sea"), [1, 0, 1, 1])
    named = write(tmp_path / "n.npz", ["dog", "cat"], class_names=np.array(["dog", "cat", "ant"]))
    assert door.load(make_config({"source": "npz", "path": named}, {"tasks": 1}, IID)).train.labels.tolist() == [0, 1]


def test_partition_says_what_is_said(same_data: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    code = main(["partition", str(quickstart), "data.source=npz", f"data.path={same_data['phantom']}", "stream.tasks=3",
                 "stream.classes_per_task=null", "partition.clients=2"])  # fmt: skip
    assert code == 0
    assert "note: classes 'no', 'none', 'nobody', 'nowhere': no samples, left out of head and averages" in capsys.readouterr().out
