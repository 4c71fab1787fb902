"""The README of an exported model: how it is loaded, what it knows, and how it came about."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.core import config as configs
from fedsim.exports import peft
from fedsim.exports.deployed import DeployedModel
from fedsim.exports.script import Script
from fedsim.runs.directory import damage
from fedsim.runs.environment import FILE
from fedsim.runs.metrics import METRICS
from fedsim.runs.results import Results

SHOWN = ("final_average_accuracy", "average_incremental_accuracy", "forgetting", "backward_transfer")
MOST_CLASSES = 200  # that are listed


def text(deployed: DeployedModel, to: str, adapter: peft.Adapter | None, script: Script, notes: Sequence[str]) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    parts = [
        _front_matter(deployed, adapter, script),
        f"# {deployed.config_as_it_was.name}",
        _what(deployed, adapter, script),
        f"## Load it\n\n```python\n{script}\n```",
        _inputs(deployed),
        *(f"Note: {note}." for note in notes),
        _classes(deployed),
        _accuracy(deployed),
        _origin(deployed, to),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(deployed: DeployedModel, adapter: peft.Adapter | None, script: Script) -> str:
    kind = "image" if deployed.reader.kind == "image" else "text"
    lines = [f"library_name: {'transformers' if adapter is None else 'peft'}", f"pipeline_tag: {kind}-classification"]
    name = deployed.config.model.backbone
    if adapter is not None and script.base is not None and not Path(os.path.expanduser(name)).is_dir():
        lines.append(f"base_model: {name}")
    return "\n".join(["---", *lines, "tags: [federated-learning, continual-learning, fedsim]", "---"])


def _what(deployed: DeployedModel, adapter: peft.Adapter | None, script: Script) -> str:
    config, tasks = deployed.config_as_it_was, deployed.run.manifest.num_tasks
    learned = (
        "at the end of its stream" if deployed.after_task == tasks - 1 else f"after task {deployed.after_task} of its stream"
    )
    form = "its backbone with merged weights"
    if adapter is not None:
        ranks = sorted({len(a) for a, _ in adapter.pairs.values()})
        form = f"a LoRA adapter of rank {' to '.join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))} for PEFT"
    where = "The head is part of it." if not script.head else "The head is in `head.safetensors`; the lines below apply it."
    return (
        f"A model of federated continual learning, as fedsim's run `{config.name}` deployed it "
        f"{learned}: {form}, on `{config.model.backbone}`. {where}"
    )


def _inputs(deployed: DeployedModel) -> str:
    if deployed.reader.kind == "text":
        return (
            "`logits(input_ids=..., attention_mask=...)` takes what the backbone's tokenizer makes of texts, cut at "
            f"{deployed.reader.most_tokens} tokens and padded on the right."
        )
    images = deployed.model.images
    (height, width), channels = images.size, images.mean.shape[0]
    mean, std = images.mean.flatten().tolist(), images.std.flatten().tolist()
    return (
        f"`logits(pixel_values=...)` takes float images (N, {channels}, {height}, {width}): `(pixels / 255 - mean) / std` with "
        f"mean {_numbers(mean)} and std {_numbers(std)}, resized ({images.interpolation}, antialiased) where they have another "
        "size. `AutoImageProcessor.from_pretrained(folder)` does that too, but rounds resized pixels to whole numbers."
    )


def _numbers(values: Sequence[float]) -> str:
    return (
        ", ".join(f"{v:.6g}" for v in dict.fromkeys(values))
        if len(set(values)) == 1
        else str([float(f"{v:.6g}") for v in values])
    )


def _classes(deployed: DeployedModel) -> str:
    listed = [f"| {i} | {_cell(name)} |" for i, name in enumerate(deployed.classes[:MOST_CLASSES])]
    more = len(deployed.classes) - MOST_CLASSES
    rest = [f"\nand {more} more: `id2label` of the model's config names all."] if more > 0 else []
    return "\n".join(["## Classes", "", "| logit | class |", "|---|---|", *listed, *rest])


def _accuracy(deployed: DeployedModel) -> str:
    results = Results.load(deployed.run.dir.path)
    matrix = results.accuracy[: deployed.after_task + 1, : deployed.after_task + 1]
    names = [_cell(name) for name in deployed.run.manifest.task_names]
    tasks = [name if name == f"task {t}" else f"{t} {name}" for t, name in enumerate(names)]
    told = "with the task told" if results.config.stream.name == "task_incremental" else "among all classes seen"
    lines = [
        f"## Accuracy\n\nPercent of the test samples of a task (column) after learning a task (row), {told}.\n",
        f"| after | {' | '.join(tasks[: len(matrix)])} |",
        f"|{'---|' * (len(matrix) + 1)}",
    ]
    for i, row in enumerate(matrix):
        cells = ["" if j > i else "–" if math.isnan(value) else f"{value:.2f}" for j, value in enumerate(row)]
        lines.append(f"| {tasks[i]} | {' | '.join(cells)} |")
    if deployed.after_task == len(tasks) - 1:
        found = [(METRICS[n].title, results.metrics.get(n)) for n in SHOWN if n in METRICS]
        lines += ["", *(f"- {title}: {value:.2f}" for title, value in found if value is not None)]
    return "\n".join(lines)


def _origin(deployed: DeployedModel, to: str) -> str:
    config, folder = deployed.config_as_it_was, deployed.run.dir.path
    path = folder / FILE
    with damage(path):
        told: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        command, versions = told["command"], told["packages"] | {"fedsim": told["fedsim"], "python": told["python"]}
    only = "" if deployed.after_task == deployed.run.manifest.num_tasks - 1 else f" --after-task {deployed.after_task}"
    lines = [
        "## How it came about",
        "",
        *(f"- {what}: {value}" for what, value in _facts(deployed)),
        f"- versions of the run: {', '.join(f'{n} {v}' for n, v in sorted(versions.items()) if v)}",
        f"- versions of this export: {', '.join(f'{n} {v}' for n, v in sorted(_versions().items()) if v)}",
        f"- run by: `{shlex.join([os.path.basename(command[0]), *command[1:]]) if command else 'Python'}`",
        f"- exported by: `fedsim export {shlex.quote(folder.name)} --to {to} FOLDER{only}`",
        f"- repeated by: `fedsim run config_of_the_run.yaml` (identity `{config.identity()}`)",
    ]
    return "\n".join(lines)


def _versions() -> dict[str, str | None]:
    from fedsim.core.home import __version__
    from fedsim.runs.environment import version

    return {"fedsim": __version__, **{name: version(name) for name in ("torch", "transformers")}}


def _facts(deployed: DeployedModel) -> Iterator[tuple[str, str]]:
    config, manifest = deployed.config_as_it_was, deployed.run.manifest
    server, client = config.server, config.client
    yield (
        "stream",
        f"{config.stream.name}, {manifest.num_tasks} tasks, {len(manifest.class_names)} classes, data {_said(config.data)}",
    )
    measured = ", ".join("unknown" if math.isnan(a) else f"{a:.3g}" for a in manifest.alpha)
    yield "clients", f"{manifest.num_clients}, split by {_said(config.partition)}"
    yield "Dirichlet α, measured by task", measured
    yield "adapter and head", f"{_said(config.adapter)}; {_said(config.head)}"
    yield "rule", _all(server.aggregator)
    yield "tasks merged by", _said(server.consolidator)
    if server.calibrator is not None:
        yield "head repaired by", _said(server.calibrator)
    if client.learners:
        yield "learners", _all(client.learners)
    if server.channel:
        yield "channel", _all(server.channel)
    yield "rounds", f"{server.rounds} for each task, {server.participation:.3g} of the clients in each"
    yield "clients' training", f"{client.epochs} epoch(s) of {client.optimizer}, batch {client.batch_size}, rate {client.lr:g}"
    yield "seed", str(config.seed)


def _all(sections: Any) -> str:
    return "; ".join(map(_said, sections)) if isinstance(sections, list) else _said(sections)


def _said(section: configs.Section) -> str:
    """name (option=value, …), without what is null."""
    name = str(section.get("name", section.get("source")))
    options = [f"{k}={v}" for k, v in section.items() if k not in ("name", "source") and v is not None]
    return f"{name} ({', '.join(options)})" if options else name


def _cell(value: str) -> str:
    return " ".join(value.replace("|", "\\|").split())
