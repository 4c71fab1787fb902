"""Golden runs guard numerics: a refactor may not move them, and what moved a method's numbers says so in the changelog and makes
that method's rows of the tables anew.

Two runs tensor by tensor, and every method's preset played small. Made by `python -m tests.test_golden [NAME…]`, which leaves
alone what did not move. Counts must be equal; norms to 1e-4, since kernels differ between processors.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fedsim.core import config as configs
from fedsim.core import presets
from fedsim.core.config import SimConfig
from fedsim.finished import DeployedRun
from fedsim.matrix import section
from fedsim.simulation import run
from tests.tiny import TINY, final_state, kept, plain_vit, tiny

GOLDEN = Path(__file__).parent / "golden"
RUNS: dict[str, dict[str, Any]] = {
    "fedavg_2tasks": {"server": {"aggregator": "fedavg", "consolidator": "none"}},
    "lorm_2tasks": {},
}
PRESETS = GOLDEN / "presets.json"
FELT = {"ewc": {"lam": 1000.0}, "si": {"c": 1000.0}}  # weights that so small a run feels
ROUNDED = {  # how far other kernels move them by rounding alone, relative
    # a task begins with a student that equals its teacher: the gradient between them is rounding, which AdamW makes a whole step
    **dict.fromkeys(("feature_distillation", "fedcprompt", "lwf"), 0.05),
    "target": 0.3,
    "icarl": 1e-3,
    # a basis of every direction of a layer leaves rounding: a tensor that it moves is sent again
    **dict.fromkeys(("fot", "gpm"), 0.02),
}
OF_A_STATE = ("aggregator", "beneath", "calibrator", "consolidator", "learners", "teacher")


def measure(name: str, output: Path) -> dict[str, Any]:
    """Counts of the accuracy matrix, bytes, and the norm of every final parameter."""
    config = tiny("client.epochs=4", "data.train_per_class=20", output=output, **RUNS[name])
    results = run(config)
    assert results.path is not None
    params = final_state(results.path, config).params
    return {
        "manifest": results.manifest_hash,
        "correct": [r.correct for r in results.rows],
        "bytes": results.costs["bytes"],
        "norms": {n: round(float(t.double().norm()), 6) for n, t in params.items()},
    }


def played_small(name: str, output: Path) -> SimConfig:
    """A preset on two tasks of three classes for eight clients, as robust rules need seven: at most two rounds of two epochs."""
    whole = configs.load(["omniglot", name]).to_dict()
    method: dict[str, Any] = {key: whole[key] for key in ("adapter", "head", "client", "server")}
    for kind in ("adapter", "head"):
        method[kind] |= section(f"{kind}s", method[kind]["name"])
    learners = [one | section("learners", one["name"]) | FELT.get(one["name"], {}) for one in whole["client"]["learners"]]
    method["client"] |= {"epochs": 2, "batch_size": 8, "learners": learners}
    method["server"]["rounds"] = min(2, whole["server"]["rounds"])
    scene = {
        "name": "golden",
        "seed": TINY["seed"],
        "data": TINY["data"] | {"train_per_class": 24, "test_per_class": 20},
        "stream": {"tasks": 2, "joint": whole["stream"]["joint"]},
        "partition": TINY["partition"] | {"clients": 8},
        "model": plain_vit(),
        "runtime": {"pool": "serial", "device": "cpu", "kernels": "torch", "output": str(output)},
    }
    return configs.from_dict(scene | method)


def squares(value: Any) -> float:
    """Of all numbers in it."""
    if isinstance(value, Tensor):
        return float(value.double().square().sum())
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(squares, inner))


def measure_preset(name: str, output: Path) -> dict[str, Any]:
    """Counts, bytes, and norms: of what is deployed at the end by what tensors are called ("adapter lora_B"), and of what the
    server and the clients keep."""
    results = run(played_small(name, output))
    assert results.path is not None
    opened = DeployedRun(results.path)
    sums: dict[str, float] = {}
    for path, tensor in opened.deployed.items():
        part, *_, last = path.removesuffix(".task0").removesuffix(".task1").split(".")
        sums[f"{part} {last}"] = sums.get(f"{part} {last}", 0.0) + squares(tensor)
    state = opened.state.to_plain()
    sums |= {f"server {key}": squares(state[key]) for key in OF_A_STATE} | {"clients": squares(kept(results.path)["memory"])}
    return {
        "correct": [r.correct for r in results.rows],
        "bytes": results.costs["bytes"],
        "norms": {key: float(f"{math.sqrt(total):.7g}") for key, total in sums.items() if total},
    }


def require_same(found: dict[str, Any], expected: dict[str, Any], rounded: float = 0.0) -> None:
    assert found["norms"] == pytest.approx(expected["norms"], rel=max(1e-4, rounded), abs=1e-5)
    sent, told = (moved["bytes"] for moved in (found, expected))
    assert sent.keys() == told.keys()
    for way in told:
        assert sent[way] == pytest.approx(told[way], rel=rounded, abs=0), way
    exact, told = ({key: value for key, value in one.items() if key not in ("norms", "bytes")} for one in (found, expected))
    assert exact == told


@pytest.mark.parametrize("name", RUNS)
def test_golden(name: str, tmp_path: Path) -> None:
    require_same(measure(name, tmp_path), json.loads((GOLDEN / f"{name}.json").read_text()))


@pytest.mark.parametrize("name", presets.names(presets.METHODS))
def test_every_preset(name: str, tmp_path: Path) -> None:
    """Where this fails by intent: make its entry anew, and the rows of the tables that have this method."""
    expected = json.loads(PRESETS.read_text())
    require_same(measure_preset(name, tmp_path), expected[name], ROUNDED.get(name, 0.0))


def test_presets_differ() -> None:
    """What is measured tells every method from every other, so that none can become another unnoticed."""
    told = json.loads(PRESETS.read_text())
    assert sorted(told) == presets.names(presets.METHODS)
    assert len({json.dumps([one["norms"], one["correct"]]) for one in told.values()}) == len(told)


def moved(name: str, found: dict[str, Any], told: dict[str, Any] | None) -> bool:
    if told is not None:
        with suppress(AssertionError):
            require_same(found, told, ROUNDED.get(name, 0.0))
            return False
    sys.stdout.write(f"{name} is new\n" if told is None else f"{name} moved: make its rows of the tables anew\n")
    return True


def main(names: list[str]) -> None:
    """Write what these runs give now, or all of them, where it moved."""
    known = json.loads(PRESETS.read_text()) if PRESETS.is_file() else {}
    for name in names or [*RUNS, *presets.names(presets.METHODS)]:
        with tempfile.TemporaryDirectory() as folder:
            if name in RUNS:
                file, found = GOLDEN / f"{name}.json", measure(name, Path(folder))
                if moved(name, found, json.loads(file.read_text()) if file.is_file() else None):
                    file.write_text(json.dumps(found, indent=1) + "\n")
            elif moved(name, found := measure_preset(name, Path(folder)), known.get(name)):
                known[name] = found
    lines = [f" {json.dumps(name)}: {json.dumps(known[name])}" for name in presets.names(presets.METHODS) if name in known]
    PRESETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
