"""A model that a script or notebook holds, kept as a folder that `model.backbone` can name."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedsim.core import content
from fedsim.core.errors import ConfigError, ModelError, one_line
from fedsim.core.files import storage_errors

OF_THE_DAY = ("transformers_version", "_name_or_path")  # in a config.json, nothing that a run depends on


def is_model(value: Any) -> bool:
    """Whether it is a PreTrainedModel of transformers; without importing that."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(value, library.PreTrainedModel)


def backbone(model: Any, processor: Any, folder: Path) -> str:
    """Keep a PreTrainedModel in `folder`, and give the path that `model.backbone` takes; it is named by what it holds.

    processor: its tokenizer or image processor, or None; texts need the first, and without the second images are normalised to
    mean and standard deviation 0.5. On disk it takes what its weights take in memory.
    Raises ConfigError for other objects, ModelError for one that cannot be saved, StorageError.
    """
    if not is_model(model):
        raise ConfigError(
            f"model must be the name of a backbone, a folder, a hub id or a PreTrainedModel of transformers, got {_kind(model)}"
        )
    if processor is not None and not hasattr(processor, "save_pretrained"):
        raise ConfigError(f"processor must be a tokenizer or an image processor of transformers, got {_kind(processor)}")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".model-", dir=folder))
        try:
            for part in (model, processor):
                if part is not None:
                    _save(part, beside)
            target = folder.absolute() / content.name("model", _parts(beside))
            if not target.is_dir():
                beside.rename(target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return str(target)


def _save(part: Any, folder: Path) -> None:
    try:
        part.save_pretrained(folder)
    except OSError:
        raise
    except Exception as e:
        raise ModelError(f"the {_kind(part)} cannot be saved: {one_line(e)}") from e


def _parts(folder: Path) -> Iterator[bytes]:
    """Every file in it, by name."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            body = path.read_bytes()
            if path.name == "config.json":
                told = {key: value for key, value in json.loads(body).items() if key not in OF_THE_DAY}
                body = json.dumps(told, sort_keys=True).encode()
            yield f"{path.relative_to(folder).as_posix()} {len(body)}".encode()
            yield body


def _kind(value: Any) -> str:
    return type(value).__name__
