"""Files of a user's own that are called like our packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = """
from fedsim.simulation import run
from tests.tiny import plain_vit, tiny
short = ("stream.tasks=1", "server.rounds=1", "runtime.workers=1")
results = [run(tiny(*short, f"runtime.pool={pool}", output=HERE / pool, model=plain_vit())) for pool in POOLS]
assert all(r.rows == results[0].rows for r in results)
import clients.worker, server.loop
print("done")
"""


def script(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the user's, from its folder, where Python looks first."""
    for decoy in ("clients.py", "server.py"):
        (folder / decoy).write_text("print('the decoy was imported')\nMINE = 1\n", encoding="utf-8")
    head = "from pathlib import Path\nHERE = Path(__file__).parent\n"
    (folder / "script.py").write_text(head + text, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "script.py"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("first", ["import fedsim", "from fedsim.core import events", "import fedsim.cli"])
def test_what_is_imported_after_fedsim_is_ours(first: str, tmp_path: Path) -> None:
    done = script(tmp_path, f"{first}\nimport clients, server\nprint(clients.__file__, server.__file__)\n")
    assert (done.stdout.split(), done.stderr) == ([str(ROOT / p / "__init__.py") for p in ("clients", "server")], "")


@pytest.mark.processes
def test_a_script_beside_files_of_these_names_runs_in_every_pool(tmp_path: Path) -> None:
    done = script(tmp_path, "POOLS = ['serial', 'ray']\n" + RUN)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_module_that_the_user_has_imported_before_is_named(tmp_path: Path) -> None:
    done = script(tmp_path, "import server\nassert server.MINE\nimport fedsim\n")
    line = (
        f"ImportError: {tmp_path / 'server.py'} stands in the way of fedsim, which has a package named 'server': rename that file"
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, line)
