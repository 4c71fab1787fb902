"""A run's deployed model written into a folder, for whoever has transformers (and PEFT) but no fedsim."""

# b samples, C classes, D features

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedsim.core import rng
from fedsim.core.config import RuntimeConfig
from fedsim.core.defaults import torch_defaults
from fedsim.core.errors import ModelError, RunDirError, require_choice
from fedsim.core.files import storage_errors
from fedsim.core.names import HEAD
from fedsim.core.tensors import without_prefix
from fedsim.exports import card, classifier, peft, script
from fedsim.exports import encoder as encoders
from fedsim.exports.classifier import Classifier
from fedsim.exports.deployed import DeployedModel, opened
from fedsim.exports.script import Script
from fedsim.models import pretrained

FORMS = ("peft", "merged")
PROBE = 4  # samples of noise that the exported model is held against the run's with
PROBE_TOKENS = 8  # of the longest text among them
RUN_CONFIG = "config_of_the_run.yaml"
RESAMPLING = {"nearest": 0, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


@dataclass(frozen=True)
class Exported:
    """folder: where it lies; script: the lines that load it; notes: what whoever uses it has to know."""

    folder: Path
    script: Script
    notes: tuple[str, ...]


def export(run: str | Path, to: str, target: str | Path, after_task: int | None = None) -> Exported:
    """Write the model that a finished run deployed into a new folder.

    to: "peft", a LoRA adapter of the rank that the model has, with the head; "merged", the backbone with merged weights, as a
    classifier of transformers where the head and the pooling are those of one, else with `head.safetensors` beside it.
    after_task: see `load_model`. Raises ConfigError for another form, RunDirError for a target that holds something, and
    ModelError for what the form cannot hold, before anything is written.
    """
    require_choice("to", to, FORMS)
    folder = Path(os.path.expanduser(target)).absolute()
    require_free(folder)
    return write(opened(run, after_task, plain), to, folder)


def plain(runtime: RuntimeConfig) -> RuntimeConfig:
    """The CPU's float32, by torch's own kernels."""
    return replace(runtime, device="cpu", kernels="torch", precision="fp32")


def require_free(folder: Path) -> None:
    """Raise RunDirError unless a new folder can be made there."""
    if folder.exists() and not folder.is_dir():
        raise RunDirError(f"{folder} is a file: choose another folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise RunDirError(f"{folder} is not empty: choose another folder, or remove what it holds")


def write(deployed: DeployedModel, to: str, folder: Path) -> Exported:
    """The same of a model that is there, on the CPU in float32."""
    with torch_defaults(torch.get_num_threads()):
        encoder, _ = encoders.published(deployed.config.model)
        adapter = peft.adapter(deployed, encoder) if to == "peft" else None
        weights = peft.changed_weights(deployed)
        with _new(folder) as draft:
            named = adapter is None or encoders.found_by_name(deployed.config.model, encoder)
            if not named:
                _save(encoder, draft / script.BACKBONE, deployed.classes)
            encoders.put(encoder, weights)
            parts = _parts(deployed, encoder, adapter, deployed.config.model.backbone if named else None)
            if adapter is None:
                _save(parts.model, draft, deployed.classes)
            else:
                _write_adapter(deployed, adapter, parts, draft, parts.script.base or str(folder / script.BACKBONE))
            _write_beside(deployed, to, adapter, parts, draft)
    return Exported(folder, parts.script, parts.notes)


@dataclass(frozen=True)
class _Parts:
    """model: of transformers, with the run's weights: the classifier's, or the encoder. head: what lies beside an encoder."""

    script: Script
    model: Any
    classifier: Classifier | None = None
    head: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _parts(deployed: DeployedModel, encoder: Any, adapter: peft.Adapter | None, base: str | None) -> _Parts:
    """How the exported model is put together. encoder: with the run's weights; base: the name of the bare one, if it has one.
    Raises ModelError where the logits are not the run's."""
    raw = probe(deployed)
    shown, want_bC = dict(deployed.model.shown(raw)), deployed.logits(raw)
    made = Script(("", ""), adapter is not None, base)
    parts = _as_classifier(deployed, encoder, made, raw, shown) or _as_encoder(deployed, encoder, made)
    got_bC = parts.script.logits(parts.model, parts.head, shown)
    shift = parts.classifier is not None and not classifier.close(got_bC, want_bC)
    if shift:  # see `Head.affine`
        got_bC, want_bC = (z_bC - z_bC.mean(dim=1, keepdim=True) for z_bC in (got_bC, want_bC))
    if not classifier.close(got_bC, want_bC):
        raise ModelError(
            f"the exported model gives other logits than the run's: adapter {deployed.config.adapter['name']} with head "
            f"{deployed.config.head['name']} on {deployed.config.model.backbone} cannot be exported, use fedsim predict, or "
            "fedsim.load_model in Python"
        )
    return replace(parts, notes=tuple(_notes(deployed, adapter, shift)))


def _as_classifier(
    deployed: DeployedModel, encoder: Any, made: Script, raw: Mapping[str, Tensor], shown: Mapping[str, Tensor]
) -> _Parts | None:
    """One of transformers' classifiers, if the head is one linear layer and there is one that pools as the run does."""
    layer = deployed.model.head.affine(deployed.of_rows())
    if layer is None:
        return None
    want_bC = deployed.features(raw) @ layer[0].T + layer[1]
    found = classifier.fitting(encoder, deployed.reader.kind, layer, deployed.classes, shown, want_bC)
    if found is None:
        return None
    return _Parts(replace(made, cls=("transformers", found.auto), body=script.of_classifier()), found.model, found)


def _as_encoder(deployed: DeployedModel, encoder: Any, made: Script) -> _Parts:
    """The encoder, with the head's tensors and its formula beside it. Raises ModelError for a head without one."""
    formula = deployed.model.head.formula()
    if formula is None:
        raise ModelError(
            f"head {deployed.config.head['name']} is not one linear layer and says no formula of its logits, so that it cannot "
            "be exported: use fedsim predict, or fedsim.load_model in Python"
        )
    body, options = script.of_encoder(deployed.model.backbone, formula), encoders.options(encoder)
    told = replace(made, cls=encoders.maker(encoder), options=options, body=body, head=True)
    head = {n: t.contiguous() for n, t in without_prefix(deployed.of_rows(), HEAD).items()}
    return _Parts(told, encoder, head=head)


def _notes(deployed: DeployedModel, adapter: peft.Adapter | None, shift: bool) -> Iterator[str]:
    if shift:
        yield "its logits are those of the run up to a number per sample that all classes share: the same probabilities"
    if adapter is not None and adapter.empty:
        yield "the run trained the head alone; PEFT takes no adapter without a layer, so one pair of zeros is in it"
    if deployed.config_as_it_was.runtime.precision == "bf16":
        yield "the run computed its frozen layers in bfloat16, this is float32: logits differ by that rounding"


def probe(deployed: DeployedModel) -> dict[str, Tensor]:
    """A raw batch of noise: images, or texts of different lengths."""
    backbone, draw = deployed.model.backbone, rng.torch_stream(0, "export")
    if backbone.kind == "image":
        channels = () if backbone.num_channels == 1 else (backbone.num_channels,)
        size = (PROBE, *backbone.image_size, *channels)
        return {"pixel_values": torch.randint(0, 256, size, dtype=torch.uint8, generator=draw)}
    length = min(PROBE_TOKENS, backbone.positions or PROBE_TOKENS)
    pad = getattr(backbone.encoder.config, "pad_token_id", None)
    padding = pad if isinstance(pad, int) and pad >= 0 else 0
    ids_bL = torch.randint(0, backbone.vocabulary or 2, (PROBE, length), generator=draw)
    ids_bL = torch.where(ids_bL == padding, (padding + 1) % (backbone.vocabulary or 2), ids_bL)
    mask_bL = (torch.arange(length) < torch.arange(length, length - PROBE, -1).clamp(min=1)[:, None]).long()
    return {"input_ids": torch.where(mask_bL.bool(), ids_bL, padding), "attention_mask": mask_bL}


def _write_adapter(deployed: DeployedModel, adapter: peft.Adapter, parts: _Parts, draft: Path, base: str) -> None:
    found, model, saved = parts.classifier, parts.model, dict[str, Tensor]()
    if found is not None:
        saved = {f"{found.head}.{n}": t for n, t in model.get_submodule(found.head).state_dict().items()}
    tensors = adapter.tensors("" if found is None else found.prefix, saved)
    save_file(tensors, draft / peft.WEIGHTS, metadata={"format": "pt"})
    (draft / peft.CONFIG).write_text(json.dumps(adapter.config(base, found, model), indent=2) + "\n", encoding="utf-8")
    with pretrained.quiet():
        classifier.labelled(model.config, deployed.classes).save_pretrained(draft / script.BACKBONE)


def _write_beside(deployed: DeployedModel, to: str, adapter: peft.Adapter | None, parts: _Parts, draft: Path) -> None:
    """Head, preprocessing, the run's config and the card."""
    if parts.script.head:
        save_file(dict(parts.head), draft / script.HEAD_FILE)
    _write_preprocessing(deployed, draft)
    (draft / RUN_CONFIG).write_text(deployed.config_as_it_was.to_yaml(), encoding="utf-8")
    (draft / "README.md").write_text(card.text(deployed, to, adapter, parts.script, parts.notes), encoding="utf-8")


def _save(model: Any, folder: Path, names: Sequence[str]) -> None:
    """Weights, and a config with the classes' names."""
    model.config = classifier.labelled(model.config, names)
    with pretrained.quiet():
        model.save_pretrained(folder)


def _write_preprocessing(deployed: DeployedModel, draft: Path) -> None:
    """The tokenizer, or what transformers' processor of images has to do."""
    told = deployed.config.transform
    if deployed.reader.kind == "text":
        source = pretrained.tokenizer_name(deployed.config.model)
        if source is not None:
            from transformers import AutoTokenizer

            with pretrained.quiet():
                AutoTokenizer.from_pretrained(source).save_pretrained(draft)
        return
    images = deployed.model.images
    (height, width), channels = images.size, images.mean.shape[0]
    processor: Mapping[str, Any] = {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": RESAMPLING[told.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": images.mean.flatten().tolist(),
        "image_std": images.std.flatten().tolist(),
    }
    (draft / pretrained.PREPROCESSOR).write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


def _let_others_read(draft: Path) -> None:
    """As far as files that are written here by default may be read: temporary folders, and safetensors, keep them to the user."""
    mode = (draft / "README.md").stat().st_mode & 0o777
    for path in (draft, *draft.rglob("*")):
        path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)


@contextmanager
def _new(folder: Path) -> Iterator[Path]:
    """A folder beside the one that is to be made, which takes its name when all is written; nothing is left where it is not."""
    with storage_errors(folder, "free space, or choose another folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            yield draft
            _let_others_read(draft)
            if folder.is_dir():
                folder.rmdir()
            draft.rename(folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
