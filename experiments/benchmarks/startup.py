"""From the command to the first client's first step, beside `import torch, transformers`.

    python -m experiments.benchmarks.startup [--repeats 9]

The quickstart with the serial pool, until the first optimizer step is done (the process is left there); a config error; --help.
Wall time of whole processes, which take turns. Tearing torch down at exit takes half a second, which the first step's process
does not see, so the imports are also measured without it. What limits it: `import torch` is three quarters of a run's start, and
all but a little of a config error. transformers is not imported for a plain ViT, nor is torch's compiler by an optimizer.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.benchmarks import machine

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = "configs/quickstart.yaml"
UNTIL_FIRST_STEP = """
import os, sys
from clients import optim
from fedsim.cli import main

build = optim.build

def watched(*args, **options):
    optimizer, schedule = build(*args, **options)
    step = optimizer.step
    def leave(*args, **options):
        step(*args, **options)
        os._exit(0)
    optimizer.step = leave
    return optimizer, schedule

optim.build = watched
main(sys.argv[1:])
sys.exit("no client took a step")
"""
COMMANDS: dict[str, tuple[list[str], int]] = {  # words after the interpreter, exit code
    "import torch, transformers": (["-c", "import torch, transformers"], 0),
    "import torch, transformers, and leave": (["-c", "import os, torch, transformers; os._exit(0)"], 0),
    "import torch": (["-c", "import torch"], 0),
    "first client step": (["-c", UNTIL_FIRST_STEP, "run", QUICKSTART, "runtime.pool=serial", "--quiet"], 0),
    "config error": (["-m", "fedsim.cli", "run", QUICKSTART, "client.lrr=1"], 2),
    "--help": (["-m", "fedsim.cli", "--help"], 0),
}


def seconds_of(name: str) -> float:
    """Wall time of one process."""
    words, code = COMMANDS[name]
    with tempfile.TemporaryDirectory() as folder:
        output = ["--output", f"{folder}/run"] if name == "first client step" else []
        clock = time.perf_counter()
        done = subprocess.run([sys.executable, *words, *output], cwd=ROOT, capture_output=True, encoding="utf-8")
        spent = time.perf_counter() - clock
    if done.returncode != code:
        raise RuntimeError(f"{name}: exit code {done.returncode}: {done.stderr}")
    return spent


def main() -> None:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    for name in COMMANDS:  # files are read from the disk once
        seconds_of(name)
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.repeats):
        for name in COMMANDS:
            seconds[name].append(round(seconds_of(name), 3))
        print({name: s[-1] for name, s in seconds.items()}, flush=True)
    ratios: dict[str, dict[str, float]] = {}
    for imports in list(COMMANDS)[:2]:
        base = seconds[imports]
        ratios[f"over '{imports}'"] = {
            name: round(statistics.median(a / b for a, b in zip(s, base, strict=True)), 3) for name, s in seconds.items()
        }
    print(ratios)
    print(machine.write("startup", {"seconds": seconds, **ratios}))


if __name__ == "__main__":
    main()
