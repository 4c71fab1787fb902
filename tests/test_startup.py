"""What a run does not need is not imported: seconds before the first client's step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fedsim

pytestmark = pytest.mark.processes
ROOT = Path(fedsim.__file__).resolve().parents[1]
HEAVY = {
    "ray", "flwr", "transformers", "pandas", "pyarrow", "scipy", "sympy", "altair", "matplotlib", "vl_convert", "datasets",
    "sklearn", "omegaconf", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.onnx._internal",
}  # fmt: skip


def loaded_by(program: str) -> set[str]:
    """The heavy modules that a Python process has loaded after a program."""
    shown = program + f"\nimport sys\nsys.stderr.write(' '.join(sorted({HEAVY!r} & set(sys.modules))) + '\\n')\n"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", shown], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


def test_a_serial_run_of_the_quickstart_loads_nothing_it_does_not_use(tmp_path: Path) -> None:
    words = [
        "run", "configs/quickstart.yaml", "runtime.pool=serial", "stream.tasks=1", "stream.classes_per_task=2",
        "partition.clients=2", "server.rounds=1", "--quiet", "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    program = f"from fedsim.cli import main\nassert main({words!r}) == 0"
    torch_alone = loaded_by("import torch")
    assert loaded_by(program) - torch_alone == set()
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_reading_a_config_loads_no_framework_but_torch() -> None:
    program = "from fedsim.core.config import load\nload('configs/quickstart.yaml', ['runtime.pool=ray'])"
    assert loaded_by(program) - loaded_by("import torch") == set()
