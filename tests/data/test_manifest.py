"""The manifest: what it holds, its file, its checks, and what workers and eyes get from it."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fedsim.core import config, rng
from fedsim.core.config import SimConfig
from fedsim.core.contracts import ArraySplit, Dataset
from fedsim.core.errors import ConfigError, DataError, PartitionError, StorageError
from fedsim.data import manifest, show, streams

Make = Callable[..., SimConfig]
DATA = {"source": "synthetic", "image_size": 4, "classes": 12, "train_per_class": 15, "test_per_class": 3}
STREAM = {"tasks": 3, "order": "shuffle"}
PARTITION = {"name": "dirichlet", "clients": 5, "alpha": 0.5}


def data_of(made: SimConfig) -> Dataset:
    dataset: Dataset = config.build("sources", made.data).load()
    return dataset


def test_holds_the_stream_and_the_partition(make_config: Make) -> None:
    made = make_config({**DATA, "classes": 13}, STREAM, PARTITION, seed=3)  # tasks of 5, 4 and 4 classes
    dataset = data_of(made)
    found = manifest.make(made, dataset)
    stream = streams.build(made.stream, dataset, 3)
    assert (found.class_order, found.class_names, found.task_names, found.task_classes) == (
        stream.class_order, stream.class_names, stream.task_names, stream.task_classes,
    )  # fmt: skip
    partition = config.build("partitions", made.partition)
    for t in range(3):
        shards = partition.split(dataset.train.labels[stream.train[t]], rng.stream(3, "partition", t))
        for k, shard in enumerate(shards):
            assert np.array_equal(found.shard(t, k), stream.train[t][shard])
            expected = [
                (dataset.train.labels[found.shard(t, k)] == found.class_order[row]).sum() for row in found.task_classes[t]
            ]
            assert found.histograms[t][k].tolist() == expected
        assert np.array_equal(found.test_of(t), stream.test[t])
        assert found.alpha[t] == manifest.estimate_alpha(found.histograms[t].T)
    assert found.overall_alpha == manifest.estimate_alpha(np.concatenate([h.T for h in found.histograms]))
    assert found.sizes.tolist() == [[len(found.shard(t, k)) for k in range(5)] for t in range(3)]


def test_same_config_same_hash_and_everything_that_decides_changes_it(make_config: Make) -> None:
    made = make_config(DATA, STREAM, PARTITION)
    dataset = data_of(made)
    found = manifest.make(made, dataset)
    assert manifest.make(made, dataset) == found
    others = [
        make_config(DATA, STREAM, PARTITION, seed=1),
        make_config(DATA, STREAM, {**PARTITION, "alpha": 0.6}),
        make_config(DATA, {"tasks": 4, "order": "shuffle"}, PARTITION),
        make_config({**DATA, "seed": 1}, STREAM, PARTITION),
    ]
    hashes = {found.hash, *(manifest.make(other, data_of(other)).hash for other in others)}
    assert len(hashes) == 5


def test_domains(make_config: Make) -> None:
    made = make_config({**DATA, "domains": 3}, {"name": "domain_incremental", "tasks": None}, {"name": "iid", "clients": 4})
    dataset = data_of(made)
    found = manifest.make(made, dataset)
    assert found.task_classes == (tuple(range(12)),) * 3
    assert [int(h.sum()) for h in found.histograms] == [180, 180, 180]
    assert dataset.train.domains is not None
    assert set(dataset.train.domains[found.shard(1, 2)]) == {1}


def test_round_trip_is_exact(make_config: Make, tmp_path: Path) -> None:
    for i, partition in enumerate(
        (PARTITION, {"name": "iid", "clients": 3}, {"name": "pathological", "clients": 4, "classes_per_client": 1})
    ):
        made = make_config(DATA, {"tasks": 3}, partition)
        found = manifest.make(made, data_of(made))
        path = tmp_path / f"{i}" / "manifest.json"
        found.save(path)
        back = manifest.load(path)
        assert back == found
        for f in dataclasses.fields(found):
            a, b = getattr(found, f.name), getattr(back, f.name)
            if isinstance(a, np.ndarray):
                assert a.dtype == b.dtype
                assert np.array_equal(a, b)
            elif f.name in ("histograms", "flips"):
                assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
            else:
                assert a == b, f.name
        assert [p.name for p in path.parent.iterdir()] == ["manifest.json"]  # nothing half-written is left


def test_the_file_reads_without_fedsim(make_config: Make, tmp_path: Path) -> None:
    made = make_config(DATA, STREAM, PARTITION)
    dataset = data_of(made)
    found = manifest.make(made, dataset)
    found.save(tmp_path / "m.json")
    plain = json.loads((tmp_path / "m.json").read_text())
    task = plain["tasks"][1]
    labels = dataset.train.labels[task["clients"][2]]
    assert {plain["class_order"][row] for row in task["classes"]} >= set(labels.tolist())
    assert sum(task["histogram"][2]) == len(labels)
    assert plain["asked"]["partition"]["alpha"] == 0.5


def test_alpha_beyond_numbers_survives(make_config: Make, tmp_path: Path) -> None:
    made = make_config(DATA, {"tasks": 3}, {"name": "iid", "clients": 1})
    found = manifest.make(made, data_of(made))
    assert math.isnan(found.overall_alpha)
    odd = dataclasses.replace(found, alpha=(math.inf, 0.0, math.nan))
    odd.save(tmp_path / "m.json")
    json.loads((tmp_path / "m.json").read_text(), parse_constant=pytest.fail)  # standard JSON: no NaN or Infinity
    assert manifest.load(tmp_path / "m.json").alpha[:2] == (math.inf, 0.0)


def test_a_manifest_repeats_the_split_under_another_seed(make_config: Make, tmp_path: Path) -> None:
    first = make_config(DATA, STREAM, PARTITION, seed=3)
    dataset = data_of(first)
    found = manifest.make(first, dataset)
    found.save(tmp_path / "m.json")
    other = make_config(DATA, {"tasks": 2}, {"name": "iid", "clients": 5}, seed=9, manifest=str(tmp_path / "m.json"))
    assert manifest.make(other, dataset) == found


def test_a_manifest_of_other_data_or_clients_is_refused(make_config: Make, tmp_path: Path) -> None:
    made = make_config(DATA, STREAM, PARTITION)
    manifest.make(made, data_of(made)).save(tmp_path / "m.json")
    changed = make_config({**DATA, "seed": 5}, STREAM, PARTITION, manifest=str(tmp_path / "m.json"))
    with pytest.raises(DataError, match=r"is of other data"):
        manifest.make(changed, data_of(changed))
    fewer = make_config(DATA, STREAM, {**PARTITION, "clients": 4}, manifest=str(tmp_path / "m.json"))
    with pytest.raises(ConfigError, match=r"partition.clients is 4, but the manifest .* holds 5: set partition.clients=5"):
        manifest.make(fewer, data_of(fewer))


def test_damaged_files_are_refused(make_config: Make, tmp_path: Path) -> None:
    made = make_config(DATA, STREAM, PARTITION)
    path = tmp_path / "m.json"
    manifest.make(made, data_of(made)).save(path)
    text = path.read_text()
    plain = json.loads(text)
    moved, lacking, outside, newer, unhashed = (json.loads(text) for _ in range(5))
    moved["tasks"][0]["clients"][0].append(moved["tasks"][0]["clients"][1].pop())
    del lacking["tasks"][1]["test"]
    outside["tasks"][0]["clients"][0][0] = plain["data"]["train"]
    newer["format"] = "fedsim-manifest-2"
    unhashed["tasks"][2]["histogram"][0][0] += 1
    cases = {
        text[: len(text) // 2]: "is damaged",
        "[1, 2]": "is damaged",
        "": "is damaged",
        json.dumps(moved): "does not match its own hash",
        json.dumps(lacking): "is damaged .KeyError: 'test'",
        json.dumps(outside): "is damaged .*client positions must lie in 0..179",
        json.dumps(newer): "has format 'fedsim-manifest-2', this version reads 'fedsim-manifest-1'",
        json.dumps(unhashed): "does not match its own hash",
    }
    for content, message in cases.items():
        path.write_text(content)
        with pytest.raises(DataError, match=message) as error:
            manifest.load(path)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"cannot be read"):
        manifest.load(tmp_path / "none.json")


def test_a_full_disk_leaves_the_old_file(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_config(DATA, STREAM, PARTITION)
    found = manifest.make(made, data_of(made))
    found.save(tmp_path / "m.json")
    before = (tmp_path / "m.json").read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"disk full, .*m.json could not be written"):
        dataclasses.replace(found, task_names=("a", "b", "c")).save(tmp_path / "m.json")
    assert (tmp_path / "m.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_errors_of_the_partition_name_the_task(make_config: Make) -> None:
    made = make_config(DATA, {"tasks": 12}, {"name": "iid", "clients": 16})
    with pytest.raises(
        PartitionError, match=r"^task 0 \(task 0\): 16 clients with at least 1 sample each need 16 samples, but there are 15"
    ):
        manifest.make(made, data_of(made))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[np.arange(len(labels))] * self.clients", "is no disjoint cover"),
        ("[np.arange(len(labels))[k : -1 : self.clients] for k in range(self.clients)]", "is no disjoint cover"),
        ("list(np.arange(len(labels)).reshape(3, -1) + 0.5)", "is no disjoint cover"),
        ("[np.arange(len(labels))]", "gave 1 shards for 3 clients"),
        ("[np.arange(len(labels)), np.arange(0), np.arange(0)]", "gave a client 0 samples, the floor is 1"),
        ("[np.arange(len(labels)), np.array([]), np.array([])]", "gave a client 0 samples, the floor is 1"),
    ],
)
def test_a_users_partition_that_breaks_its_promise(make_config: Make, tmp_path: Path, body: str, message: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nimport numpy as np\nfrom fedsim.core import contracts\n"
        "@dataclass(frozen=True)\nclass Partition(contracts.Partition):\n"
        f"    def split(self, labels, rng):\n        return {body}\n"
    )
    made = make_config(DATA, STREAM, {"name": str(file), "clients": 3})
    with pytest.raises(PartitionError, match=f"^task 0: partition .* {message}"):
        manifest.make(made, data_of(made))


def test_work_spec_has_labels_in_the_order_of_the_head(make_config: Make) -> None:
    made = make_config(DATA, {"tasks": 2, "classes_per_task": 4, "order": "shuffle"}, PARTITION, seed=4)
    dataset = data_of(made)
    found = manifest.make(made, dataset)
    spec = manifest.work_spec(found, dataset, made)
    assert spec.config is made
    assert spec.train.inputs["pixel_values"] is dataset.train.inputs["pixel_values"]  # no copy
    for t in range(2):
        for k in range(5):
            shard = spec.shard(t, k)
            assert np.array_equal(shard, found.shard(t, k))
            rows = spec.train.labels[shard]
            assert set(rows) <= set(spec.task_classes[t])
            assert [found.class_order[row] for row in rows] == dataset.train.labels[shard].tolist()
        assert set(spec.test.labels[spec.test_of(t)]) == set(spec.task_classes[t])
    used = np.isin(dataset.train.labels, found.class_order)
    assert (spec.train.labels[~used] == -1).all()
    assert (spec.train.labels[used] >= 0).all()


def test_fingerprint_sees_every_byte(make_config: Make) -> None:
    dataset = data_of(make_config(DATA, STREAM, PARTITION))
    base = manifest.fingerprint(dataset)

    def with_train(split: ArraySplit) -> str:
        return manifest.fingerprint(dataclasses.replace(dataset, train=split))

    train = dataset.train
    pixels = train.inputs["pixel_values"].copy()
    pixels[-1, -1, -1] ^= 1
    labels = train.labels.copy()
    labels[0], labels[-1] = labels[-1], labels[0]
    variants = {
        base,
        with_train(ArraySplit({"pixel_values": pixels}, train.labels)),
        with_train(ArraySplit(train.inputs, labels)),
        with_train(ArraySplit(train.inputs, train.labels, np.zeros(len(train), dtype=np.int64))),
        with_train(ArraySplit({"pixel_values": train.inputs["pixel_values"].reshape(-1, 2, 8)}, train.labels)),
        manifest.fingerprint(dataclasses.replace(dataset, class_names=tuple(reversed(dataset.class_names)))),
    }
    assert len(variants) == 6
    turned = {"pixel_values": np.asfortranarray(train.inputs["pixel_values"])}
    assert with_train(ArraySplit(turned, train.labels)) == base  # the layout in memory is not the data


def test_many_clients(make_config: Make, tmp_path: Path) -> None:
    data = {"source": "synthetic", "image_size": 1, "classes": 10, "train_per_class": 3_000}
    made = make_config(data, {"tasks": 1}, {"name": "iid", "clients": 30_000})
    found = manifest.make(made, data_of(made))
    found.save(tmp_path / "m.json")
    assert manifest.load(tmp_path / "m.json") == found
    assert found.sizes.shape == (1, 30_000)


# ---------------------------------------------------------------- for the eye


def printed(found: manifest.Manifest) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(show.table(found))
    return console.export_text()


def test_table_shows_counts_and_both_alphas(make_config: Make) -> None:
    made = make_config(DATA, {"tasks": 3}, PARTITION)
    found = manifest.make(made, data_of(made))
    text = printed(found)
    assert "alpha 0.5 asked" in text
    assert f"overall α {found.overall_alpha:.3g}" in text
    for t in range(3):
        assert f"{found.alpha[t]:.3g}" in text
        for k in range(5):
            assert f"{found.sizes[t, k]} / {np.count_nonzero(found.histograms[t][k])}c" in text
    for word in ("min", "mean", "max", "(12 test)"):
        assert word in text


def test_table_of_domains_counts_a_class_once(make_config: Make) -> None:
    made = make_config({**DATA, "domains": 3}, {"name": "domain_incremental", "tasks": None}, {"name": "iid", "clients": 2})
    found = manifest.make(made, data_of(made))
    assert found.histograms[0].all()  # both clients hold all twelve classes, in every domain
    rows = [line for line in printed(found).splitlines() if line.startswith(("│      0 │", "│      1 │"))]
    assert [row.split("│")[-2].strip() for row in rows] == ["12", "12"]


def test_table_of_many_clients_is_cut(make_config: Make) -> None:
    made = make_config(DATA, {"tasks": 3}, {"name": "iid", "clients": 55})
    lines = printed(manifest.make(made, data_of(made))).splitlines()
    assert any(line.startswith("│     49 │") for line in lines)
    assert not any(line.startswith("│     50 │") for line in lines)
    assert any(line.startswith("│      … │") for line in lines)


@pytest.mark.parametrize(("clients", "stream"), [(10, {"tasks": 3}), (100, {"tasks": 1}), (2, {"tasks": 12})])
def test_picture(make_config: Make, tmp_path: Path, clients: int, stream: dict[str, Any]) -> None:
    from matplotlib import image

    made = make_config(DATA, stream, {"name": "iid", "clients": clients})
    path = tmp_path / "split.png"
    show.picture(manifest.make(made, data_of(made)), path)
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 300
    assert (pixels[..., :3].min(axis=2) < 0.8).mean() > 0.005  # something is drawn
    assert pixels[..., :3].std(axis=2).max() > 0.1  # in colour


def test_picture_that_cannot_be_written(make_config: Make, tmp_path: Path) -> None:
    made = make_config(DATA, {"tasks": 3}, PARTITION)
    found = manifest.make(made, data_of(made))
    with pytest.raises(StorageError, match=r"cannot write the picture"):
        show.picture(found, tmp_path / "none" / "split.png")
