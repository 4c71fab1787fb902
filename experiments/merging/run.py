"""The tasks' LoRA modules of one run merged by every rule, beside FedAvg's one module and the modules by themselves.

    python -m experiments.merging.run [--seeds 3] [--streams fashion omniglot] [--output runs/merging]

One training per stream and seed (`fedavg_mean`: FedAvg within a task, a fresh LoRA module for each), and one of `fedavg`; all
else is merging, as `fedsim merge RUN --of tasks` does it. Every merge is judged with the head that the run trained, and some with
a head that linear discriminant analysis solves anew on the merged features. What is there already (runs, and rows in a run's
folder) is not made again. Writes results.csv beside this file and prints the README's tables: mean ± standard deviation (ddof 1)
over seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from fedsim.core.config import SimConfig, load
from fedsim.core.files import write_atomic
from fedsim.core.messages import Tensors
from fedsim.finished import OpenedRun
from fedsim.merging.heads import solved
from fedsim.merging.measure import Measured, measure
from fedsim.merging.merge import merge
from fedsim.merging.sources import Sources, of_tasks
from fedsim.simulation import once

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parents[1] / "configs"
OF_TASKS, ONE = "fedavg_mean", "fedavg"
RULES: dict[str, dict[str, Any]] = {
    "mean": {"name": "mean"},
    "task arithmetic, λ = 0.1": {"name": "task_arithmetic", "scale": 0.1},
    "task arithmetic, λ = 0.4": {"name": "task_arithmetic", "scale": 0.4},
    "task arithmetic, λ = 1": {"name": "task_arithmetic", "scale": 1.0},
    "RegMean": {"name": "regmean"},
    "Fisher": {"name": "fisher"},
    "TIES": {"name": "ties"},
    "DARE": {"name": "dare"},
    "DARE-TIES": {"name": "dare", "then": "ties"},
    "TSV": {"name": "tsv"},
    "Core Space, mean": {"name": "core_space", "then": "mean"},
    "Core Space, TIES": {"name": "core_space", "then": "ties"},
    "Core Space, DARE": {"name": "core_space", "then": "dare"},
    "Core Space, TSV": {"name": "core_space", "then": "tsv"},
    "median": {"name": "median"},
    "trimmed mean": {"name": "trimmed_mean"},
    "Chain of Merges": {"name": "chain_of_merges"},
}
SOLVED = (
    "mean",
    "Chain of Merges",
    "task arithmetic, λ = 1",
    "RegMean",
    "Fisher",
    "TIES",
    "TSV",
    "Core Space, TIES",
)  # with a second head
NOTHING, SINGLE, FEDAVG = "no module", "each task's own module", "FedAvg, one module"
TRAINED, LDA = "trained", "LDA"
COLUMNS = ["stream", "seed", "rule", "head", "class_incremental", "task_told"]
Made = Callable[[], Measured]


def config_of(stream: str, preset: str, seed: int) -> SimConfig:
    """A method on a stream, on one core."""
    files = [CONFIGS / "streams" / f"{stream}.yaml", CONFIGS / "methods" / f"{preset}.yaml"]
    return load(files, [f"seed={seed}", "runtime.pool=serial", "server.evaluate=task"])


def finished(stream: str, preset: str, seed: int, output: Path) -> Path:
    """The run directory, made if it is not there."""
    config = config_of(stream, preset, seed)
    folder = output / f"{stream}-{preset}-{seed}-{config.identity()[:8]}"
    once(config, folder)
    return folder


def rows(stream: str, seed: int, output: Path) -> Iterator[dict[str, object]]:
    """All rows of one training; those that its folder holds already are read."""
    folder = finished(stream, OF_TASKS, seed, output)
    cache = folder / "merges.json"
    known: dict[str, Any] = json.loads(cache.read_text()) if cache.is_file() else {}
    sources: Sources | None = None
    for rule, section in {NOTHING: None, SINGLE: None, **RULES}.items():
        heads = (TRAINED, LDA) if rule in (NOTHING, *SOLVED) else (TRAINED,)
        key = json.dumps([rule, section, heads])
        if key not in known:
            sources = sources or of_tasks(folder)
            known[key] = {head: list(pair) for head, pair in judged(sources, rule, section, heads)}
            write_atomic(cache, json.dumps(known).encode())
        for head, (own, told) in known[key].items():
            yield dict(zip(COLUMNS, (stream, seed, rule, head, own, told), strict=True))
    one = once(config_of(stream, ONE, seed), finished(stream, ONE, seed, output)).metrics
    names = ("final_average_accuracy", "final_average_accuracy_task_incremental")
    yield dict(zip(COLUMNS, (stream, seed, FEDAVG, TRAINED, *(one[n] for n in names)), strict=True))


def judged(
    sources: Sources, rule: str, section: dict[str, Any] | None, heads: tuple[str, ...]
) -> Iterator[tuple[str, tuple[float | None, float | None]]]:
    """Head -> final average accuracy, class-incremental and with the task told."""
    run = sources.run
    if rule == SINGLE:
        told = [measure(run, s.who, s.params).task_told[t] for t, s in enumerate(sources.members)]
        yield TRAINED, (None, sum(p for p in told if p is not None) / len(told))
        return
    deployed = bare(run, sources) if section is None else merge(sources, section).deployed
    for head in heads:
        row = measure(run, rule, deployed if head == TRAINED else solved(sources, deployed, "lda"))
        yield head, (row.average, row.average_told)


def bare(run: OpenedRun, sources: Sources) -> Tensors:
    """The run's head on the backbone as it was pretrained: a module that has learned nothing."""
    return {**sources.members[0].params, **sources.members[0].start}


def table(frame: pd.DataFrame, stream: str) -> str:
    """The README's table of a stream, in Markdown."""
    lines = [
        "| modules | class-incremental | task told | class-incremental, LDA head | task told, LDA head |",
        "|---|---|---|---|---|",
    ]
    of_stream = frame[frame["stream"] == stream]
    for rule, group in of_stream.groupby("rule", sort=False):
        cells = [_cell(group.loc[group["head"] == head, column]) for head in (TRAINED, LDA) for column in COLUMNS[4:]]
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: pd.Series) -> str:
    return "–" if values.dropna().empty else f"{values.mean():.1f} ± {values.std():.1f}"


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--streams", nargs="+", default=["fashion", "omniglot"])
    parser.add_argument("--output", type=Path, default=Path("runs/merging"))
    args = parser.parse_args()
    wanted = [(stream, seed) for stream in args.streams for seed in range(args.seeds)]
    frame = pd.DataFrame([row for stream, seed in wanted for row in rows(stream, seed, args.output)], columns=COLUMNS)
    frame.to_csv(HERE / "results.csv", index=False, float_format="%.4f")
    for stream in args.streams:
        print(f"\n{stream}\n\n{table(frame, stream)}")


if __name__ == "__main__":
    main()
