"""A folder that another process writes to is left alone, and who that is gets named; a process that dies lets go of it."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedsim.cli import main
from fedsim.core.errors import InUse, RunDirError
from fedsim.core.files import held, in_use
from fedsim.runs.collection import Entry
from fedsim.runs.directory import RunDir
from fedsim.runs.results import Results
from fedsim.simulation import run
from fedsim.sweeps.job import perform
from tests.run_dirs import write_run
from tests.tiny import final_state, learned, same_bits, stopping, tiny

HOLD = """
import sys, time
from fedsim.core.files import held
with held(sys.argv[1], "fedsim run", file={file}):
    print(flush=True)
    time.sleep(60)
"""


@pytest.fixture
def elsewhere() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Lets another process hold a path."""
    started: list[subprocess.Popen[str]] = []

    def hold(path: Path, file: bool = False) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", HOLD.format(file=file), str(path)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".lock")}


def test_who_holds_it_and_until_when(tmp_path: Path, elsewhere: Callable[..., subprocess.Popen[str]]) -> None:
    folder = tmp_path / "run-0.5"
    assert not in_use(folder)
    holder = elsewhere(folder)
    with pytest.raises(InUse) as caught, held(folder, "a test"):
        pass
    line = f"{folder} is in use by fedsim run (process {holder.pid} on {socket.gethostname()}, since 20"
    assert str(caught.value).startswith(line)
    assert str(caught.value).endswith("+00:00): wait until it has ended, or stop it")
    assert in_use(folder)
    holder.kill()  # kill -9: nobody cleans up
    holder.wait()
    assert [p.name for p in sorted(folder.iterdir())] == [".lock", ".lock.json"]
    assert not in_use(folder)
    with held(folder, "a test"):
        assert in_use(folder)
    assert not list(folder.iterdir())


def test_a_run_that_goes_elsewhere_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: Callable[..., subprocess.Popen[str]]
) -> None:
    config = tiny("stream.tasks=1", output=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("server.checkpoint.save", stopping(1))
        with pytest.raises(KeyboardInterrupt):
            run(config, output=tmp_path / "out")
    (tmp_path / "out" / ".costs.json.1.tmp").write_text("what the other process is about to put in place")
    before, holder = files(tmp_path / "out"), elsewhere(tmp_path / "out")
    with pytest.raises(InUse, match=f"process {holder.pid}"):
        run(resume=tmp_path / "out")
    entry = Entry(config.identity(), {"seed": 0})
    (tmp_path / entry.folder).symlink_to(tmp_path / "out")
    assert perform(config, tmp_path, entry, 1).state == "elsewhere"
    assert files(tmp_path / "out") == before
    holder.kill()
    holder.wait()
    ended = run(resume=tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))
    whole = run(config, output=tmp_path / "whole")
    assert same_bits(learned(final_state(ended.path, config)), learned(final_state(whole.path, config)))  # type: ignore[arg-type]


def test_a_new_run_in_a_folder_that_another_has_just_taken(
    tmp_path: Path, elsewhere: Callable[..., subprocess.Popen[str]]
) -> None:
    elsewhere(tmp_path / "out")
    with pytest.raises(InUse):
        run(tiny("stream.tasks=1"), output=tmp_path / "out")
    run_dir = RunDir.create(tiny(), tmp_path / "late")
    write_run(tmp_path, tiny()).rename(tmp_path / "late")  # between a look at the folder and its lock
    before = files(tmp_path / "late")
    with pytest.raises(RunDirError, match="already holds a finished run"), run_dir.begun():
        pass
    assert files(tmp_path / "late") == before


def test_a_run_that_another_process_has_ended_by_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(tmp_path, tiny())
    answers = iter((False, True, True, True))
    monkeypatch.setattr(RunDir, "finished", property(lambda self: next(answers)))
    monkeypatch.setattr("fedsim.simulation.prepare", lambda *_: pytest.fail("it was run again"))
    assert run(resume=path).rows == Results.load(path).rows


@pytest.mark.parametrize("command", ["report", "unlearn"])
def test_what_is_written_beside_runs(
    tmp_path: Path, command: str, elsewhere: Callable[..., subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "report":
        target = tmp_path / "page.html"
        write_run(tmp_path / "runs", tiny())
        words = ["report", str(tmp_path / "runs"), "--output", str(target)]
    else:
        target = tmp_path / "without"
        path = run(tiny("stream.tasks=1", "server.rounds=1", "server.unlearning=true", output=tmp_path)).path
        words = ["unlearn", str(path), "--client", "0", "--output", str(target)]
    holder = elsewhere(target, file=command == "report")
    assert main(words) == 1
    assert f"{target} is in use by fedsim run (process {holder.pid} " in capsys.readouterr().err
    assert not [p for p in tmp_path.rglob("*") if p.name in ("page.html", "deployed.safetensors")]
    holder.kill()
    holder.wait()
    assert main(words) == 0
    assert not list(tmp_path.rglob(".*"))
