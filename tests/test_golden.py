"""A golden run guards numerics: a refactor may not move it, and a changed number needs a line in the changelog.

Made by `python -m tests.test_golden`. Counts must be equal; norms to 1e-4, since kernels differ between processors.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from fedsim.simulation import run
from tests.tiny import final_state, tiny

GOLDEN = Path(__file__).parent / "golden"
RUNS: dict[str, dict[str, Any]] = {
    "fedavg_2tasks": {"server": {"aggregator": "fedavg", "consolidator": "none"}},
    "lorm_2tasks": {},
}


def measure(name: str, output: Path) -> dict[str, Any]:
    """Counts of the accuracy matrix, bytes, and the norm of every final parameter."""
    config = tiny("client.epochs=4", "data.train_per_class=20", output=output, **RUNS[name])
    results = run(config)
    params = final_state(results.path, config).params
    return {
        "manifest": results.manifest_hash,
        "correct": [r.correct for r in results.rows],
        "bytes": results.costs["bytes"],
        "norms": {n: round(float(t.double().norm()), 6) for n, t in params.items()},
    }


@pytest.mark.parametrize("name", RUNS)
def test_golden(name: str, tmp_path: Path) -> None:
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    found = measure(name, tmp_path)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4, abs=1e-5)
    assert {k: v for k, v in found.items() if k != "norms"} == {k: v for k, v in expected.items() if k != "norms"}


if __name__ == "__main__":
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            (GOLDEN / f"{name}.json").write_text(json.dumps(measure(name, Path(folder)), indent=1) + "\n")
