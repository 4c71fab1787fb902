"""One client is removed from finished runs, and the rest compared with runs that never had it.

    python -m experiments.unlearning.run [--seeds 3] [--client 3] [--jobs 2] [--output runs/unlearning]

For tangents (composition by client × task: exact; FedAvg over three rounds: task arithmetic in the tangent space) and for plain
LoRA: accuracy on the training samples of who is forgotten and of those who remain, on test samples, and the AUC of a
membership-inference attack, before, after, and retrained without the client. Runs that are finished are loaded, not repeated.
Writes results.csv beside this file and prints the README's table: mean and standard deviation (ddof 1) over seeds.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from fedsim.core.config import load
from fedsim.simulation import once
from fedsim.unlearning.finished import FinishedRun
from fedsim.unlearning.measure import measure, retrained
from fedsim.unlearning.remove import remove

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parents[1] / "configs"
CASES = {  # name -> preset and what differs from it
    "tangent, one round": ("tmc", []),
    "tangent, three rounds": ("unlearning", []),
    "LoRA, three rounds": ("fedavg_mean", []),
}
ALPHAS = (None, 0.3, 1.0)
COLUMNS = ["forgotten", "retained", "test", "membership_auc"]


def case(name: str, seed: int, client: int, output: Path) -> list[dict[str, object]]:
    """One run, the ways to remove the client from it, and the run without the client."""
    preset, overrides = CASES[name]
    shared = [f"seed={seed}", "server.unlearning=true", "runtime.pool=serial", "runtime.kernels=torch", *overrides]
    config = load(CONFIGS / f"{preset}.yaml", shared)
    folder = output / f"{preset}-{seed}-{config.identity()[:8]}"
    once(config, folder)
    run = FinishedRun(folder)
    models = [("before", run.deployed)]
    exact = remove(run, [client])
    if exact.way != "subtract":
        models.append((exact.name, exact.deployed))
    ways = [remove(run, [client], way="subtract", alpha=alpha) for alpha in ALPHAS]
    ways.append(remove(run, [client], way="subtract", renormalise=True))
    models += [(w.name, w.deployed) for w in ways]
    models.append(("retrained without", retrained(run, [client], folder / "unlearned" / f"client-{client}" / "retrained")))
    rows = [measure(run, model, tensors, [client]) for model, tensors in models]
    return [{"run": name, "seed": seed, "client": client, **asdict(row)} for row in rows]


def table(frame: pd.DataFrame) -> str:
    """The README's table, in Markdown."""
    lines = ["| run | model | forgotten | retained | test | membership AUC |", "|---|---|---|---|---|---|"]
    for (run, name), group in frame.groupby(["run", "name"], sort=False):
        cells = [f"{group[c].mean():.1f} ± {group[c].std():.1f}" for c in COLUMNS[:3]]
        cells.append(f"{group['membership_auc'].mean():.3f} ± {group['membership_auc'].std():.3f}")
        lines.append(f"| {run} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--client", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/unlearning"))
    args = parser.parse_args()
    wanted = [(name, seed, args.client, args.output) for name in CASES for seed in range(args.seeds)]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(case, *zip(*wanted, strict=True)))
    frame = pd.DataFrame([row for rows in found for row in rows]).round(4)
    frame.to_csv(HERE / "results.csv", index=False)
    print(table(frame))


if __name__ == "__main__":
    main()
