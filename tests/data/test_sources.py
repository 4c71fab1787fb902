"""Sources: what they give, on real files where there are any, and the line that bad files get."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedsim.core import config, plugins
from fedsim.core.contracts import Dataset
from fedsim.core.errors import ConfigError, DataError, PluginError
from fedsim.data import door, streams, tokenise
from fedsim.data.sources import _common, fashion_mnist, huggingface, npz, omniglot, synthetic, text


def check_dataset(dataset: Dataset) -> None:
    """What every source promises."""
    shapes = set()
    for split in (dataset.train, dataset.test):
        assert split.labels.dtype == np.int64
        assert split.labels.min() >= 0
        assert split.labels.max() < len(dataset.class_names)
        assert all(len(array) == len(split) for array in split.inputs.values())
        assert (split.domains is not None) == bool(dataset.domain_names)
        shapes.add(tuple((name, array.dtype.str, array.shape[1:]) for name, array in sorted(split.inputs.items())))
    assert len(shapes) == 1
    assert len(set(dataset.class_names)) == len(dataset.class_names)
    assert dataset.groups.keys() == dataset.group_names.keys()
    for name, group_of in dataset.groups.items():
        assert group_of.shape == (len(dataset.class_names),)
        assert 0 <= group_of.min() <= group_of.max() < len(dataset.group_names[name])


def test_all_six_are_found() -> None:
    assert {"omniglot", "fashion_mnist", "npz", "text", "huggingface", "synthetic"} <= set(plugins.names("sources"))


@given(labels=st.lists(st.integers(0, 5), max_size=40), count=st.integers(1, 5))
@settings(max_examples=50)
def test_first_per_class_is_what_a_loop_keeps(labels: list[int], count: int) -> None:
    seen: dict[int, int] = {}
    expected = []
    for i, y in enumerate(labels):
        seen[y] = seen.get(y, 0) + 1
        if seen[y] <= count:
            expected.append(i)
    assert _common.first_per_class(np.array(labels, dtype=np.int64), count).tolist() == expected


# ---------------------------------------------------------------- omniglot


def test_omniglot_subsets() -> None:
    sizes = {}
    for subset in ("evaluation", "background", "all"):
        dataset = omniglot.Source(alphabets=subset).load()
        check_dataset(dataset)
        assert np.bincount(dataset.train.labels).tolist() == [15] * len(dataset.class_names)
        assert np.bincount(dataset.test.labels).tolist() == [5] * len(dataset.class_names)
        assert dataset.train.inputs["pixel_values"].shape[1:] == (28, 28)
        names = dataset.group_names["alphabet"]
        for class_name, group in zip(dataset.class_names, dataset.groups["alphabet"], strict=True):
            assert class_name.startswith(names[group] + "/")
        sizes[subset] = (len(names), len(dataset.class_names))
    assert sizes == {"evaluation": (20, 659), "background": (30, 964), "all": (50, 1623)}


def test_omniglot_alphabets_by_name_keep_the_order_of_the_file() -> None:
    dataset = omniglot.Source(alphabets=["Korean", "Greek"]).load()
    assert dataset.group_names["alphabet"] == ("Greek", "Korean")
    assert len(dataset.class_names) == 24 + 40
    whole = omniglot.Source(alphabets="all").load()
    of_class = [whole.class_names.index(name) for name in dataset.class_names]
    assert of_class == sorted(of_class)
    c = dataset.class_names.index("Korean/character07")
    expected = whole.train.inputs["pixel_values"][whole.train.labels == whole.class_names.index("Korean/character07")]
    assert np.array_equal(dataset.train.inputs["pixel_values"][dataset.train.labels == c], expected)


@pytest.mark.parametrize(
    ("alphabets", "message"),
    [
        (
            "evaluations",
            "data.alphabets 'evaluations' is unknown (a single alphabet is a list of one). Did you mean 'evaluation'?",
        ),
        (["Greek", "Koraen"], "data.alphabets: Omniglot has no alphabet 'Koraen'. Did you mean 'Korean'?"),
        (["Greek", "Greek"], "data.alphabets names one alphabet twice"),
        ([], "data.alphabets must be one of evaluation, background, all, or a list of names, got []"),
        (3, "data.alphabets must be one of evaluation, background, all, or a list of names, got 3"),
    ],
)
def test_omniglot_misspelt(alphabets: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.expand("sources", {"source": "omniglot", "alphabets": alphabets}, "data")
    assert str(error.value) == message


def test_fashion_mnist() -> None:
    """Ten classes in the official order; labels belong to the images: the nearest mean of raw pixels finds about 70 %."""
    dataset = fashion_mnist.Source().load()
    check_dataset(dataset)
    assert np.bincount(dataset.train.labels).tolist() == [400] * 10
    assert np.bincount(dataset.test.labels).tolist() == [100] * 10
    assert (dataset.class_names[0], dataset.class_names[1], dataset.class_names[9]) == ("T-shirt/top", "Trouser", "Ankle boot")
    train, test = (s.inputs["pixel_values"].reshape(-1, 784).astype(float) for s in (dataset.train, dataset.test))
    means = np.stack([train[dataset.train.labels == c].mean(0) for c in range(10)])
    nearest = ((test[:, None] - means) ** 2).sum(2).argmin(1)
    assert (nearest == dataset.test.labels).mean() == pytest.approx(0.7, abs=0.05)


def test_an_installation_without_the_embedded_data_says_so() -> None:
    with pytest.raises(DataError, match=r"the embedded omniglot_29.npz is missing .*: install fedsim again"):
        _common.read_embedded("omniglot", "omniglot_29.npz")


# ---------------------------------------------------------------- npz


def write_npz(path: Path, **changes: Any) -> Path:
    arrays: dict[str, Any] = {
        "train_images": np.arange(8 * 4, dtype=np.uint8).reshape(8, 2, 2),
        "train_labels": np.array([2, 0, 1, 2, 0, 1, 2, 2], dtype=np.uint8),
        "test_images": np.zeros((3, 2, 2), dtype=np.uint8),
        "test_labels": np.array([0, 1, 2], dtype=np.int16),
        "class_names": np.array(["x", "y", "z"]),
    }
    arrays |= changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def test_npz_reads_both_splits(tmp_path: Path) -> None:
    dataset = npz.Source(str(write_npz(tmp_path / "d.npz"))).load()
    check_dataset(dataset)
    assert dataset.class_names == ("x", "y", "z")
    assert dataset.train.labels.tolist() == [2, 0, 1, 2, 0, 1, 2, 2]
    assert dataset.train.inputs["pixel_values"][3].tolist() == [[12, 13], [14, 15]]


def test_npz_two_files_and_no_names(tmp_path: Path) -> None:
    a = write_npz(tmp_path / "a.npz", test_images=None, test_labels=None, class_names=None)
    b = write_npz(tmp_path / "b.npz", train_images=None, train_labels=None, class_names=None)
    dataset = npz.Source(str(a), str(b)).load()
    assert dataset.class_names == ("0", "1", "2")
    assert len(dataset.test) == 3
    c = write_npz(tmp_path / "c.npz", class_names=np.array(["x", "z", "y"]))
    with pytest.raises(DataError, match=r"class_names of .* differ"):
        npz.Source(str(write_npz(tmp_path / "d.npz")), str(c)).load()


def test_npz_first_samples_per_class(tmp_path: Path) -> None:
    dataset = npz.Source(str(write_npz(tmp_path / "d.npz")), train_per_class=2).load()
    assert dataset.train.labels.tolist() == [2, 0, 1, 2, 0, 1]
    assert dataset.train.inputs["pixel_values"][:, 0, 0].tolist() == [0, 4, 8, 12, 16, 20]
    assert len(dataset.test) == 3


def test_npz_groups_and_domains(tmp_path: Path) -> None:
    path = write_npz(
        tmp_path / "d.npz",
        class_coarse=np.array([1, 0, 1]), coarse_names=np.array(["p", "q"]),
        class_shape=np.array([0, 0, 0]), shape_names=np.array(["round"]),
        train_domain=np.array([0, 1] * 4), test_domain=np.array([1, 1, 0]), domain_names=np.array(["ink", "chalk"]),
    )  # fmt: skip
    dataset = npz.Source(str(path), train_per_class=1).load()
    check_dataset(dataset)
    assert dataset.groups["superclass"].tolist() == dataset.groups["coarse"].tolist() == [1, 0, 1]
    assert dataset.group_names["superclass"] == ("p", "q")
    assert dataset.group_names["shape"] == ("round",)
    assert dataset.domain_names == ("ink", "chalk")
    assert dataset.train.domains is not None
    assert dataset.train.domains.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": None}, "holds no 'train_labels' (it holds: class_names, "),
        ({"train_images": np.zeros((8, 2, 2))}, "train_images must be uint8 in 0..255, got float64"),
        ({"train_images": np.zeros((8, 4), dtype=np.uint8)}, "must have shape (N, H, W) or (N, H, W, 1 or 3), got (8, 4)"),
        ({"train_images": np.zeros((8, 2, 2, 2), dtype=np.uint8)}, "train_images must have shape (N, H, W) or "),
        ({"train_labels": np.array([2, 0, 1, 3, 0, 1, 2, 2])}, "train_labels must be in 0..2, got 3 at position 3"),
        ({"test_labels": np.array([0, -1, 2])}, "test_labels must not be negative, got -1 at position 1"),
        ({"train_labels": np.zeros(7, dtype=int)}, "train_labels must have shape (8,), got (7,)"),
        ({"train_labels": np.zeros(8)}, "train_labels must be integers or strings, got float64"),
        ({"domain_names": np.array(["a"])}, "holds no 'train_domain'"),
        ({"class_coarse": np.array([0, 2, 0]), "coarse_names": np.array(["a", "b"])}, "class_coarse must be in 0..1, got 2"),
    ],
)  # fmt: skip
def test_npz_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_npz(tmp_path / "d.npz", **changes)
    with pytest.raises(DataError) as error:
        npz.Source(str(path)).load()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_npz_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no .npz file at .*none.npz"):
        npz.Source(str(tmp_path / "none.npz")).load()
    whole = write_npz(tmp_path / "d.npz").read_bytes()
    damaged = bytearray(whole)
    at = whole.index(bytes(range(20)))
    damaged[at] ^= 1  # one bit of one image: the archive's checksum tells
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", train_images=np.array([{}], dtype=object))
    objects = (tmp_path / "objects.npz").read_bytes()
    array = (tmp_path / "one.npy").read_bytes()
    for content in (whole[: len(whole) // 2], bytes(damaged), b"", b"not an archive", array, objects):
        (tmp_path / "d.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"d.npz (cannot be read as|is not an) .npz") as error:
            npz.Source(str(tmp_path / "d.npz")).load()
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------- text


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[[str, Any], str]:
    def write(name: str, content: Any) -> str:
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return str(tmp_path / name)

    return write


TEXTS = {
    "train": [["a b", "greet"], ["c c c c", "part"], ["a", "greet"], ["zebra", "ask"]],
    "val": [["never read", 3, 4]],
    "test": [["d e", "part"], {"text": "a", "label": "ask"}],
}


def test_text_is_tokenised_and_padded_to_the_longest(tokenizer_folder: str, write_json: Callable[[str, Any], str]) -> None:
    dataset = text.Source(write_json("t.json", TEXTS)).load(tokenizer_folder)
    check_dataset(dataset)
    assert dataset.class_names == ("greet", "part", "ask")
    assert dataset.train.inputs["input_ids"].tolist() == [
        [2, 4, 5, 3, 0, 0],
        [2, 6, 6, 6, 6, 3],
        [2, 4, 3, 0, 0, 0],
        [2, 1, 3, 0, 0, 0],
    ]
    assert dataset.train.inputs["attention_mask"].sum(axis=1).tolist() == [4, 6, 3, 3]
    assert dataset.test.inputs["input_ids"].tolist() == [[2, 7, 8, 3, 0, 0], [2, 4, 3, 0, 0, 0]]
    assert dataset.test.labels.tolist() == [1, 2]
    assert {a.dtype for a in dataset.train.inputs.values()} == {np.dtype(np.int64)}


def test_text_is_cut_at_max_length_and_says_so(tokenizer_folder: str, write_json: Callable[[str, Any], str]) -> None:
    dataset = text.Source(write_json("t.json", TEXTS), max_length=5).load(tokenizer_folder)
    assert dataset.train.inputs["input_ids"][1].tolist() == [2, 6, 6, 6, 3]  # the closing token stays
    assert dataset.notes == ("1 of 6 texts are longer than data.max_length, 5 tokens, and are cut there",)
    exact = text.Source(write_json("t.json", TEXTS), max_length=6).load(tokenizer_folder)
    assert exact.notes == (), "six tokens fit into six"
    blank = {**TEXTS, "test": [[" ", "part"], ["a", "ask"]]}
    assert text.Source(write_json("b.json", blank)).load(tokenizer_folder).notes == ("1 of 6 texts are blank",)


def test_text_without_a_token(write_json: Callable[[str, Any], str], tokenizer_folder: str) -> None:
    """Mean pooling over no token would be 0/0."""
    path = Path(tokenizer_folder) / "tokenizer.json"
    bare = {**json.loads(path.read_text()), "post_processor": None}
    path.write_text(json.dumps(bare))
    with pytest.raises(DataError, match=r"the tokenizer makes no token of the text '': leave it out of the data"):
        text.Source(write_json("t.json", {**TEXTS, "test": [["", "part"], ["a", "ask"]]})).load(tokenizer_folder)


def test_text_with_a_class_of_one_split(tokenizer_folder: str, write_json: Callable[[str, Any], str]) -> None:
    """The rules of all sources hold for it: see `fedsim.data.door`."""
    path = write_json("t.json", {"train": [["a", "x"], ["b", "y"]], "test": [["a", "x"], ["b", "z"]]})
    dataset = text.Source(path).load(tokenizer_folder)
    assert dataset.class_names == ("x", "y", "z")
    with pytest.raises(DataError, match="class 'z' of the test samples: there are no training samples to learn from"):
        streams.build(config.StreamConfig(tasks=1), dataset, 0)
    blank = text.Source(write_json("b.json", {"train": [["a", "x"], ["b", "x "]], "test": [["a", "x"]]})).load(tokenizer_folder)
    with pytest.raises(DataError, match="classes 'x', 'x ' differ in blanks only: make them one"):
        door.checked(blank, "text")


def test_text_in_two_lists_with_groups_and_fewer_samples(tokenizer_folder: str, write_json: Callable[[str, Any], str]) -> None:
    train, test = write_json("a.json", TEXTS["train"]), write_json("b.json", TEXTS["test"])
    groups = write_json("g.json", {"needs": ["ask"], "manners": ["part", "greet"]})
    dataset = text.Source(train, test, groups, train_per_class=1).load(tokenizer_folder)
    check_dataset(dataset)
    assert dataset.class_names == ("ask", "part", "greet")
    assert dataset.groups["domain"].tolist() == [0, 1, 1]
    assert dataset.group_names["domain"] == ("needs", "manners")
    assert dataset.train.labels.tolist() == [2, 1, 0]
    assert dataset.test.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not readable JSON"),
        ({"train": [["a", "x"]]}, "holds no list of 'test' samples"),
        ({"train": [], "test": [["a", "x"]]}, "holds no list of 'train' samples"),
        ([["a", "x"]], "holds one list: name the test list with data.test_path"),
        ({"train": [["a", "x"], ["b"]], "test": [["a", "x"]]}, "train sample 1 must be [text, label]"),
        ({"train": [["a", "x"], [3, "x"]], "test": [["a", "x"]]}, "train sample 1 must be [text, label]"),
        ({"train": [["a", "x"], ["b", -1]], "test": [["a", "x"]]}, "train sample 1 has no label ('-1'): leave it out"),
        ({"train": [["a", "x"]], "test": [["a", "x"], ["b", " "]]}, "test sample 1 has no label (' '): leave it out"),
        ({"train": [["a", "x"], ["b", None]], "test": [["a", "x"]]}, "train sample 1 must be [text, label]"),
    ],
)
def test_text_that_does_not_fit(tokenizer_folder: str, write_json: Callable[[str, Any], str], content: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        text.Source(write_json("t.json", content)).load(tokenizer_folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"g": ["greet", "prat", "ask"]}, "names class 'prat', which the data does not hold. Did you mean 'part'?"),
        ({"g": ["greet", "part"]}, "has no group for class 'ask'"),
        ({"g": ["greet", "part"], "h": ["ask", "part"]}, "names class 'part' twice"),
        ([["greet"]], "must hold {group: [class names]}"),
    ],
)
def test_text_groups_that_do_not_fit(
    tokenizer_folder: str, write_json: Callable[[str, Any], str], groups: Any, message: str
) -> None:
    with pytest.raises(DataError) as error:
        text.Source(write_json("t.json", TEXTS), groups_path=write_json("g.json", groups)).load(tokenizer_folder)
    assert message in str(error.value)


def test_text_needs_a_tokenizer(tmp_path: Path, write_json: Callable[[str, Any], str]) -> None:
    source = text.Source(write_json("t.json", TEXTS))
    with pytest.raises(DataError, match=r"needs a tokenizer: set model.backbone"):
        source.load(None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no tokenizer loads from .*empty") as error:
        source.load(str(tmp_path / "empty"))
    assert "\n" not in str(error.value)


def test_tokenise_of_nothing(tokenizer_folder: str) -> None:
    ids, notes = tokenise.tokenise([[], ["a"]], tokenizer_folder, 8)
    assert notes == ()
    assert ids[0]["input_ids"].shape == (0, 3)
    assert ids[1]["input_ids"].tolist() == [[2, 4, 3]]


# ---------------------------------------------------------------- huggingface


def picture(value: int, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, value if mode == "L" else (value, 0, 255 - value))


def parquet_of(datasets: Any, tmp_path: Path, label: Any, **columns: Any) -> dict[str, str]:
    """Two parquet files; `columns` are the training columns, the test takes their first two rows."""
    features = datasets.Features(
        {name: datasets.Image() if isinstance(v[0], Image.Image) else datasets.Value("string") for name, v in columns.items()}
        | {"label": label}
    )
    n = len(next(iter(columns.values())))
    rows = {**columns, "label": [i % 2 for i in range(n)]}
    files = {}
    for split, count in (("train", n), ("test", 2)):
        files[split] = str(tmp_path / f"{split}.parquet")
        datasets.Dataset.from_dict({k: v[:count] for k, v in rows.items()}, features=features).to_parquet(files[split])
    return files


def test_huggingface_parquet_of_images(local_datasets: Any, tmp_path: Path) -> None:
    files = parquet_of(
        local_datasets, tmp_path, local_datasets.ClassLabel(names=["no", "yes"]), img=[picture(10 * i) for i in range(6)]
    )
    dataset = huggingface.Source("parquet", data_files=files, train_per_class=2).load()
    check_dataset(dataset)
    assert dataset.class_names == ("no", "yes")
    assert dataset.train.labels.tolist() == [0, 1, 0, 1]
    assert dataset.train.inputs["pixel_values"].shape == (4, 4, 6, 3)
    assert dataset.train.inputs["pixel_values"].dtype == np.uint8
    assert dataset.train.inputs["pixel_values"][3, 0, 0].tolist() == [30, 0, 225]
    assert len(dataset.test) == 2


def test_huggingface_folder_of_images(local_datasets: Any, tmp_path: Path) -> None:
    root = tmp_path / "pets"
    for split, count in (("train", 3), ("test", 1)):
        for c, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(100 * c + i, mode="L").save(root / split / name / f"{i}.png")
    for source in (huggingface.Source(str(root)), huggingface.Source("imagefolder", data_dir=str(root))):
        dataset = source.load()
        check_dataset(dataset)
        assert dataset.class_names == ("cat", "dog")
        assert dataset.train.inputs["pixel_values"].shape == (6, 4, 6)  # all grey: no channels
        corner = dataset.train.inputs["pixel_values"][:, 0, 0]
        assert sorted(zip(dataset.train.labels.tolist(), corner.tolist(), strict=True)) == [
            (0, 0), (0, 1), (0, 2), (1, 100), (1, 101), (1, 102),
        ]  # fmt: skip


def test_huggingface_images_of_several_sizes_and_modes(local_datasets: Any, tmp_path: Path) -> None:
    images = [picture(50), picture(90, (5, 5)), picture(7, (8, 4), "L"), picture(1)]
    files = parquet_of(local_datasets, tmp_path, local_datasets.ClassLabel(names=["no", "yes"]), img=images)
    with pytest.raises(DataError, match=r"have 3 sizes, from \(4, 6\) to \(5, 5\): set data.image_size"):
        huggingface.Source("parquet", data_files=files).load()
    dataset = huggingface.Source("parquet", data_files=files, image_size=3).load()
    assert dataset.train.inputs["pixel_values"].shape == (4, 3, 3, 3)
    assert dataset.train.inputs["pixel_values"][2, 1, 1].tolist() == [7, 7, 7]
    assert dataset.train.inputs["pixel_values"][0, 1, 1].tolist() == [50, 0, 205]


def test_huggingface_text_with_groups_and_domains(local_datasets: Any, tmp_path: Path, tokenizer_folder: str) -> None:
    columns = {"text": ["a", "b c", "d", "e e e"], "topic": ["t0", "t1", "t0", "t1"], "site": ["s", "s", "r", "s"]}
    files = parquet_of(local_datasets, tmp_path, local_datasets.Value("int64"), **columns)
    dataset = huggingface.Source("parquet", data_files=files, group_key="topic", domain_key="site").load(tokenizer_folder)
    check_dataset(dataset)
    assert dataset.class_names == ("0", "1")
    assert dataset.train.inputs["input_ids"].tolist() == [[2, 4, 3, 0, 0], [2, 5, 6, 3, 0], [2, 7, 3, 0, 0], [2, 8, 8, 8, 3]]
    assert dataset.groups["topic"].tolist() == [0, 1]
    assert dataset.domain_names == ("r", "s")
    assert dataset.train.domains is not None
    assert dataset.train.domains.tolist() == [1, 1, 0, 1]
    with pytest.raises(DataError, match=r"'site' is no grouping of the classes: class '0' is in several groups"):
        huggingface.Source("parquet", data_files=files, text_key="text", group_key="site").load(tokenizer_folder)
    with pytest.raises(DataError, match=r"which column of parquet holds the inputs.*: text, topic, site"):
        huggingface.Source("parquet", data_files=files).load(tokenizer_folder)


def test_huggingface_columns_that_are_not_there(local_datasets: Any, tmp_path: Path) -> None:
    files = parquet_of(
        local_datasets, tmp_path, local_datasets.ClassLabel(names=["no", "yes"]), img=[picture(i) for i in range(4)]
    )
    for options, message in (
        ({"image_key": "imgs"}, "the data has no column 'imgs'. Did you mean 'img'?"),
        ({"label_key": "lable"}, "the data has no column 'lable'. Did you mean 'label'?"),
        ({"test_split": "validation"}, "datasets cannot load split 'validation' of parquet"),
    ):
        with pytest.raises(DataError) as error:
            huggingface.Source("parquet", data_files=files, **options).load()  # type: ignore[arg-type]
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"no folder .*nowhere: is the path right\?"):
        huggingface.Source(str(tmp_path / "nowhere")).load()
    with pytest.raises(ConfigError, match=r"image_key and text_key do not go together"):
        huggingface.Source("parquet", image_key="a", text_key="b")


def test_huggingface_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'", name="datasets")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(PluginError, match=r"needs the package 'datasets': pip install 'fedsim\[huggingface\]'"):
        huggingface.Source("parquet").load()


# ---------------------------------------------------------------- synthetic


def nearest_mean_accuracy(train: Any, test: Any, labels: Any, test_labels: Any) -> float:
    means = np.stack([train[labels == c].mean(axis=0) for c in range(labels.max() + 1)])
    nearest = ((test[:, None] - means[None]) ** 2).sum(axis=2).argmin(axis=1)
    return float((nearest == test_labels).mean())


@pytest.mark.parametrize("kind", ["image", "tokens"])
@pytest.mark.parametrize("domains", [0, 2])
def test_synthetic_is_repeatable_and_can_be_learnt(kind: str, domains: int) -> None:
    source = synthetic.Source(kind=kind, classes=6, train_per_class=30, test_per_class=10, domains=domains, seed=3)
    dataset, again = source.load(), source.load()
    check_dataset(dataset)
    assert len(dataset.train) == 6 * 30 * max(1, domains)
    for name, array in dataset.train.inputs.items():
        assert np.array_equal(array, again.train.inputs[name])
    other = synthetic.Source(kind=kind, classes=6, train_per_class=30, test_per_class=10, domains=domains, seed=4).load()
    name = next(iter(dataset.train.inputs))
    assert not np.array_equal(dataset.train.inputs[name], other.train.inputs[name])
    if kind == "image":
        x, xt = (s.inputs["pixel_values"].reshape(len(s), -1).astype(float) for s in (dataset.train, dataset.test))
    else:
        x, xt = (
            np.stack([np.bincount(row, minlength=64)[1:] for row in s.inputs["input_ids"]]).astype(float)
            for s in (dataset.train, dataset.test)
        )
        mask = dataset.train.inputs["attention_mask"]
        assert ((dataset.train.inputs["input_ids"] > 0) == (mask == 1)).all()
    assert nearest_mean_accuracy(x, xt, dataset.train.labels, dataset.test.labels) > 0.9


def test_synthetic_shapes_and_options() -> None:
    dataset = synthetic.Source(channels=3, image_size=5, classes=1).load()
    assert dataset.train.inputs["pixel_values"].shape == (20, 5, 5, 3)
    for options, message in (
        ({"kind": "sound"}, "data.kind must be 'image' or 'tokens', got 'sound'"),
        ({"channels": 2}, "data.channels must be 1 or 3, got 2"),
        ({"classes": 0}, "data.classes must be at least 1, got 0"),
        ({"vocab": 3}, "data.vocab must be at least 6, got 3"),
        ({"domains": -1}, "data.domains and seed must not be negative"),
    ):
        with pytest.raises(ConfigError) as error:
            config.expand("sources", {"source": "synthetic", **options}, "data")
        assert str(error.value).startswith(message)
