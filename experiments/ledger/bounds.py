"""The bounds that come with the package: of the embedded streams, means over seeds 0, 1 and 2.

    python -m experiments.ledger.bounds [--streams fashion omniglot characters] [--output runs/bounds]

Writes fedsim/assets/bounds.json. A quarter of an hour on one core, most of it joint training; what lies in the output folder is
not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fedsim import cli
from fedsim.core.config import load
from fedsim.runs import bounds

STREAMS = ("omniglot", "fashion", "characters")
SEEDS = (0, 1, 2)


def of_stream(name: str, folder: Path) -> dict[str, object]:
    """The record of one stream, whose runs are made where they are missing."""
    found = []
    for seed in SEEDS:
        keys = [f"seed={seed}", "runtime.kernels=torch", "runtime.pool=serial", f"runtime.output={folder}"]
        if cli.main(["bounds", name, *keys, "--quiet"]):
            raise SystemExit(f"the bounds of {name} could not be made")
        made = bounds.beside(folder, bounds.reference(load(name, keys), "ncm").identity())
        found.append(bounds.find(made))
    return dict(bounds.entry(load(name), bounds.mean(found), SEEDS))


def main() -> None:
    """All streams that are asked for; the records of others stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", nargs="+", default=STREAMS, choices=STREAMS)
    parser.add_argument("--output", type=Path, default=Path("runs/bounds"))
    args = parser.parse_args()
    before = json.loads(bounds.SHIPPED.read_text()) if bounds.SHIPPED.is_file() else []
    records = {record["name"]: record for record in before} | {n: of_stream(n, args.output.absolute()) for n in args.streams}
    bounds.SHIPPED.write_text(json.dumps([records[name] for name in STREAMS if name in records], indent=1) + "\n")


if __name__ == "__main__":
    main()
