"""A stream that trains in about a second: synthetic images, a random two-block ViT, 2 tasks x 3 classes, 3 clients."""

from __future__ import annotations

import atexit
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from fedsim.core import config as configs
from fedsim.core.config import SimConfig
from fedsim.models import vit
from server import checkpoint
from server.state import ServerState

VIT = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 8, "patch_size": 4, "num_channels": 1,
}  # fmt: skip
TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 0,
    "data": {"source": "synthetic", "classes": 6, "train_per_class": 12, "test_per_class": 4, "image_size": 8},
    "stream": {"tasks": 2},
    "partition": {"name": "dirichlet", "alpha": 0.5, "clients": 3, "min_samples": 2},
    "model": {"backbone": "random", "config": VIT},
    "adapter": {"name": "lora", "rank": 2, "targets": "all-linear"},
    "client": {"epochs": 1, "batch_size": 8, "lr": 1e-2},
    "server": {"rounds": 2, "aggregator": "lorm", "consolidator": "regmean"},
    "runtime": {"pool": "serial", "device": "cpu"},
}


def tiny(*overrides: str, output: Path | None = None, **sections: Any) -> SimConfig:
    """The tiny config with overrides as on the command line, of one key the last, and whole sections replaced."""
    overrides = tuple({item.partition("=")[0]: item for item in overrides}.values())
    merged = configs.merge(TINY, sections)
    if output is not None:
        merged = configs.merge(merged, {"runtime": {"output": str(output)}})
    return configs.from_dict(configs.merge(merged, configs.parse_overrides(overrides)))


@cache
def plain_vit() -> dict[str, Any]:
    """The section `model` of a plain ViT in a folder: a new process loads it without transformers, and so in half of the time."""
    folder = Path(tempfile.mkdtemp(prefix="fedsim-vit"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    told = {**VIT, "hidden_act": "gelu", "qkv_bias": True, "layer_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(told))
    with torch.device("meta"):
        encoder = vit.ViT(vit.Layout(**{key: told[key] for key in vit.REQUIRED}))
    draw = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(t.shape, generator=draw) * 0.3 for n, t in encoder.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    assert vit.load(folder) is not None
    return {"backbone": str(folder), "config": None}


def final_state(run_dir: Path, config: SimConfig) -> ServerState:
    """What the last checkpoint of a run holds."""
    return checkpoint.load(run_dir / "checkpoint.pt", config.identity())


def same_bits(a: Any, b: Any) -> bool:
    """Whether two nested structures hold the same tensors, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, Sequence) and not isinstance(a, str):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def learned(state: ServerState) -> dict[str, Any]:
    """The part of a state that must not depend on where it ran: all but the seconds."""
    plain = state.to_plain()
    del plain["seconds"]
    return plain


def stopping(after: int) -> Any:
    """In the place of `checkpoint.save`: saves, and stops the run as Ctrl-C does after so many times."""
    real, calls = checkpoint.save, []

    def save(*args: Any) -> None:
        real(*args)
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt

    return save


def kept(run_dir: Path) -> dict[str, dict[int, Any]]:
    """What a run keeps of every client: its memory, and the messages."""
    with closing(sqlite3.connect(run_dir / "clients.sqlite")) as db:
        memory = {
            client: dict(sorted(load(tensors).items())) for client, tensors in db.execute("SELECT client, tensors FROM memory")
        }
        return {"memory": memory, "messages": {m: row for m, *row in db.execute("SELECT * FROM messages")}}
