from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fedsim.core import config
from fedsim.core.config import SimConfig

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e"]


@pytest.fixture
def make_config() -> Callable[..., SimConfig]:
    """A config of the data room alone: data, stream, partition, seed, manifest."""

    def make(data: Any, stream: dict[str, Any], partition: Any, seed: int = 0, manifest: str | None = None) -> SimConfig:
        return SimConfig(
            seed=seed,
            manifest=manifest,
            data=config.expand("sources", data, "data"),
            stream=config.typed(config.StreamConfig, stream, "stream"),
            partition=config.expand("partitions", partition, "partition"),
        )

    return make


@pytest.fixture
def local_datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The datasets library, offline, with its cache in the test's own folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> str:
    """A word tokenizer with BERT's special tokens, shipped with truncation to 3 and fixed padding to 128."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=128, pad_token="[PAD]", pad_id=0)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return str(folder)
