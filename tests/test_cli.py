"""The command line: what is parsed, what is printed, which exit code comes back. Runs themselves are faked or tiny."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import fedsim
from fedsim import cli, simulation
from fedsim.cli import list as cli_list
from fedsim.cli import run as cli_run
from fedsim.cli.printing import human_bytes
from fedsim.core.errors import ClientFailed, PoolError
from fedsim.core.events import ClientDone, ClientSkipped, RoundDone, Row, RunDirOpened, RunStarted, TaskDone
from fedsim.runs.results import Results
from fedsim.watch.progress import ProgressDisplay, duration
from tests.tiny import tiny

COSTS = {
    "bytes": {"down": {"adapter": 2_500_000, "head": 999, "background": 0}, "up": {"adapter": 1_250_000, "statistics": 40_000}},
    "seconds": {"start_up": 2.04, "train": 10.0, "evaluate": 0.5},
    "client_rounds": 50,
}
ROWS = (
    Row(0, 1, "task_end", 0, 9, 10, 10),
    Row(1, 1, "task_end", 0, 6, 9, 10),
    Row(1, 1, "task_end", 1, 7, 8, 10),
)


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny(output=tmp_path / "runs").to_yaml())
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `simulation.run` was called with, in place of a run."""
    seen: list[dict[str, Any]] = []

    def fake(config: Any = None, **options: Any) -> Results:
        seen.append({"config": config, **options})
        return Results(config or tiny(), ROWS, COSTS)

    monkeypatch.setattr(simulation, "run", fake)
    return seen


def printed(width: int, show: Callable[[Console], Any]) -> str:
    """What `show` prints, which must not be wider than `width` (lines of free text apart)."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    show(console)
    text: str = console.file.getvalue()
    assert all(len(line) <= width for line in text.splitlines() if not line.startswith(("Seconds", "Run directory"))), text
    return text


# ---------------------------------------------------------------- parsing


def test_overrides_may_stand_anywhere(config_file: Path, calls: list[dict[str, Any]]) -> None:
    assert (
        cli.main(["run", str(config_file), "seed=3", "--output", "out", "partition.alpha=0.1", "--quiet", "client.lr=0.5"]) == 0
    )
    config = calls[0]["config"]
    assert (config.seed, config.partition["alpha"], config.client.lr, calls[0]["output"]) == (3, 0.1, 0.5, "out")


@pytest.mark.parametrize("words", [["run", "--quite"], ["run", "a.yaml", "--out"], ["list", "pools", "seed=1"], ["rnu"]])
def test_unknown_words(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert "usage: fedsim" in capsys.readouterr().err


def test_without_a_command_it_says_where_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}" in out for name in cli.COMMANDS) and "fedsim run quickstart" in out


def test_a_command_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["swep", "x.yaml"])
    assert "there is no command 'swep'. Did you mean 'sweep'?" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fedsim {fedsim.__version__}\n"


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from fedsim.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'numpy', 'rich', 'ray', 'pandas', 'omegaconf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(fedsim.__file__).parents[1])
    assert done.stdout.endswith("[]\n"), done
    assert "partition" in done.stdout


@pytest.mark.parametrize("words", [["run", "seed=1"], ["run", "a.yaml", "--resume", "x", "--output", "y"]])
def test_nothing_or_too_much_to_run(words: list[str], calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert capsys.readouterr().err.startswith("fedsim: error: ")
    assert not calls


def test_presets_have_a_line_each(calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not calls
    for preset in (Path(fedsim.__file__).parents[1] / "configs").glob("[ms]*/*.yaml"):
        line = next(line for line in lines if line.split()[:1] == [preset.stem])
        assert len(line.split()) > 3 and len(line) <= 80
    assert any(line.startswith("fedsim run fashion er ") for line in lines)


def test_resume_reads_its_own_config(config_file: Path, calls: list[dict[str, Any]]) -> None:
    assert cli.main(["run", "--resume", "runs/x", "--quiet"]) == 0
    assert (calls[0]["config"], calls[0]["resume"]) == (None, "runs/x")


def test_resume_elsewhere_with_overrides(config_file: Path, calls: list[dict[str, Any]]) -> None:
    folder = config_file.parent / "saved"
    folder.mkdir()
    config_file.rename(folder / "config.yaml")
    assert cli.main(["run", "--resume", str(folder), "runtime.pool=ray", "--quiet"]) == 0
    assert cli.main(["run", "runtime.pool=ray", "runtime.workers=2", "--resume", str(folder), "--quiet"]) == 0
    assert [c["config"].runtime.pool for c in calls] == ["ray", "ray"]
    assert calls[1]["config"].runtime.workers == 2


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PoolError("no workers"), 1, "fedsim: error: no workers"),
        (ClientFailed(3, 1, 2, "training", "boom"), 1, "fedsim: error: client 3 failed in task 1, round 2, stage training: boom"),
        (RuntimeError("two\nlines"), 1, "fedsim: error: RuntimeError: two lines (this is not expected: run with --debug"),
    ],
)
def test_errors_are_one_line(
    error: Exception, code: int, line: str, config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: Any, **options: Any) -> Results:
        raise error

    monkeypatch.setattr(simulation, "run", fails)
    assert cli.main(["run", str(config_file)]) == code
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert err.count("\n") == 1
    with pytest.raises(type(error)):
        cli.main(["run", str(config_file), "--debug"])


def test_ctrl_c_says_how_to_go_on(config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(config: Any, progress: Any, resume: Any, **options: Any) -> Results:
        if config.seed == 1:
            progress(RunDirOpened("runs/tiny-12"))
        raise KeyboardInterrupt

    monkeypatch.setattr(simulation, "run", stopped)
    assert cli.main(["run", str(config_file), "seed=1"]) == 130
    assert capsys.readouterr().err == "fedsim: stopped; go on with: fedsim run --resume runs/tiny-12\n"
    assert cli.main(["run", str(config_file)]) == 130
    assert capsys.readouterr().err == "fedsim: stopped before anything was saved\n"


# ---------------------------------------------------------------- what a run prints


def test_outcome(config_file: Path, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(config_file), "--quiet"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for expected in (
        "after task 0 1 mean",
        "0 90.0 90.0",
        "1 60.0 70.0 65.0",
        "final average accuracy 65.00 85.00",
        "average incremental accuracy 77.50 92.50",
        "forgetting 30.00 10.00",
        "backward transfer -30.00 -10.00",
        "adapter 2.5 MB 1.2 MB 50.0 kB 25.0 kB",
        "head 999 B 0 B 20 B 0 B",
        "all 2.5 MB 1.3 MB 50.0 kB 25.8 kB",
        "Seconds: 12.5 (start-up 2.0, train 10.0, evaluate 0.5)",
    ):
        assert expected in lines
    assert not any(line.startswith("background") for line in lines)


@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize("tasks", [1, 5, 20])
def test_outcome_fits_the_terminal(width: int, tasks: int) -> None:
    rows = tuple(Row(i, 1, "task_end", j, 10, 10, 10) for i in range(tasks) for j in range(i + 1))
    text = printed(width, lambda console: cli_run.show_results(Results(tiny(), rows, COSTS), console))
    assert len(re.findall(r"100\.0\b", text)) == tasks * (tasks + 1) // 2 + tasks  # every cell, and the means
    assert "…" not in text
    assert ("–" in text) == (tasks == 1)  # no forgetting of one task


def test_a_task_incremental_run_has_one_column() -> None:
    text = printed(60, lambda console: cli_run.show_results(Results(tiny("stream.name=task_incremental"), ROWS, COSTS), console))
    assert "class-" not in text
    assert "forgetting                           10.00" in text


def test_what_clients_store_is_said_below_their_bytes() -> None:
    costs = {**COSTS, "stored": {"clients": 7, "mean": 1500.0, "max": 2_500_000}}
    text = printed(100, lambda console: console.print(cli_run.bytes_table(costs)))
    assert "7 clients store 1.5 kB on average, 2.5 MB at most" in " ".join(text.split())


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (123_456, "123 kB"), (999_600, "1.0 MB"), (2.5e15, "2500.0 TB")],
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


# ---------------------------------------------------------------- progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def story(display: Callable[[Any], None], clock: Clock, first: int = 0) -> None:
    """Two tasks of two rounds, from round `first` on; a round takes 3 s, a task's end 2 s."""
    display(RunDirOpened("runs/x"))
    display(RunStarted(2, 2, 3, ("Braille", "Futhark")))
    clock.now += 50
    for index in range(first, 4):
        task, round = divmod(index, 2)
        display(ClientDone(task, round, 1, 2, 0))
        if index == 3:
            display(ClientSkipped(ClientFailed(2, task, round, "training", "loss is NaN")))
        display(ClientDone(task, round, 2, 2, 2))
        clock.now += 3
        display(RoundDone(task, round, tuple(Row(task, round, "round", j, 5 + j, 10, 10) for j in range(task + 1)), 0.25, 3.0))
        if round == 1:
            display(ClientDone(task, 2, 1, 2, 0))
            clock.now += 2
            display(TaskDone(task, (), (60.0, 80.0)[: task + 1], 2.0))


def test_plain_lines() -> None:
    clock = Clock()
    console = Console(file=io.StringIO(), width=60)
    with ProgressDisplay(console, clock=clock) as display:
        story(display, clock)
    assert console.file.getvalue() == (
        "run directory: runs/x\n"
        "2 tasks, 2 rounds each, 3 clients\n"
        "[1/4] task 0 round 0: accuracy 50.0 %, loss 0.250, 3.0 s, ETA 9 s\n"
        "[2/4] task 0 round 1: accuracy 50.0 %, loss 0.250, 3.0 s, ETA 6 s\n"
        "task 0 learned (Braille): accuracy 60.0 %\n"
        "[3/4] task 1 round 0: accuracy 55.0 %, loss 0.250, 3.0 s, ETA 4 s\n"
        "skipped: client 2 failed in task 1, round 1, stage training: loss is NaN"
        " (server.on_client_failure: skip goes on without it)\n"
        "[4/4] task 1 round 1: accuracy 55.0 %, loss 0.250, 3.0 s, ETA 0 s\n"
        "task 1 learned (Futhark): accuracy 70.0 % = mean of 60.0 80.0\n"
    )


def test_a_resumed_run_counts_on() -> None:
    clock = Clock()
    console = Console(file=io.StringIO(), width=100)
    with ProgressDisplay(console, clock=clock) as display:
        story(display, clock, first=2)
    assert "[3/4] task 1 round 0: accuracy 55.0 %, loss 0.250, 3.0 s, ETA 3 s" in console.file.getvalue()


def test_rounds_without_evaluation_or_training() -> None:
    console = Console(file=io.StringIO(), width=100)
    display = ProgressDisplay(console, clock=Clock())
    display(RunStarted(1, 1, 1))
    display(RoundDone(0, 0, (), float("nan"), 1.0))
    assert console.file.getvalue().endswith("[1/1] task 0 round 0: 1.0 s, ETA 0 s\n")


@pytest.mark.parametrize("width", [60, 100])
def test_live_line(width: int) -> None:
    clock = Clock()
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    shown: list[str] = []
    display = ProgressDisplay(console, clock=clock)

    def watched(event: Any) -> None:
        display(event)
        if display._live is not None and display._live.task_ids:
            shown.append(printed(width, lambda plain: plain.print(display._live.get_renderable())).rstrip("\n"))

    with display:
        story(watched, clock)
    assert all("\n" not in line and "…" not in line for line in shown), shown
    assert any(line.startswith("task 1 round 0") and "3/4" in line and "client 2/2" in line for line in shown)
    assert any(line.startswith("task 0 merging") for line in shown)
    assert "acc 55.0 %" in shown[-1]
    assert "ETA 0 s" in shown[-1]
    out = console.file.getvalue()
    assert "task 0 learned (Braille): accuracy 60.0 %" in out
    assert "[1/4]" not in out


def test_quiet_prints_nothing_but_knows_the_folder() -> None:
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True)
    with ProgressDisplay(console, quiet=True, clock=clock) as display:
        story(display, clock)
    assert console.file.getvalue() == ""
    assert display.run_dir == "runs/x"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (3599, "59:59 min"), (7385, "2:03 h")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---------------------------------------------------------------- list, check, partition


def test_list_shows_summary_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "partitions"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("partitions (partition)\n")
    assert "  dirichlet         Label skew by a Dirichlet per class" in out
    assert "                      alpha (float, default 0.5): α > 0. Small: a class" in out
    assert "                      clients (int, default 10): K\n" in out


def test_list_of_everything_names_every_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    from fedsim.core import plugins

    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for kind in plugins.KINDS:
        assert any(line.startswith(f"{kind} (") for line in lines)
        for name in plugins.names(kind):
            assert any(line.startswith(f"  {name} ") and len(line.split()) > 3 for line in lines), name


def test_list_of_an_unknown_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "aggregator"]) == 2
    assert capsys.readouterr().err == "fedsim: error: unknown kind 'aggregator'. Did you mean 'aggregators'?\n"


def test_a_plugin_whose_package_is_missing_is_listed_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clients.pools.ray", None)
    assert "not available" in next(cli_list.describe("pools", "ray", 100))


RULE = """
from dataclasses import dataclass
import torch
from fedsim.core import contracts

@dataclass(frozen=True)
class Aggregator(contracts.Aggregator):
    tilt: float = 0.0
    exempt = {"weights": "every client counts once"}

    def combine(self, state, params, updates, draw):
        contracts.require_updates(updates)
        held = [u for u in updates if u.num_samples]
        mean = {n: torch.stack([u.params[n] for u in held]).mean(dim=0) + self.tilt for n in held[0].params}
        return state, {**params, **mean}
"""


def test_check_of_a_good_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rule.py").write_text(RULE)
    assert cli.main(["check", str(tmp_path / "rule.py")]) == 0
    out = capsys.readouterr().out
    assert "exempt  weights" in out
    assert "→ every client counts once" in out
    assert "1 exempt, 0 broken" in out


def test_check_explains_what_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rule.py").write_text(RULE)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", "./rule.py", "tilt=0.5"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "BROKEN fixed_point" in out
    assert "off by 0.5" in out


def test_check_sees_a_file_that_was_edited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Within one process and one second, and with the same size."""
    for tilt, code in (("0.0", 0), ("0.5", 1), ("0.0", 0)):
        (tmp_path / "rule.py").write_text(RULE.replace("tilt: float = 0.0", f"tilt: float = {tilt}"))
        assert cli.main(["check", str(tmp_path / "rule.py")]) == code, capsys.readouterr().out


def test_check_of_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "lorm", "decai=1"]) == 2
    assert "Did you mean 'decay'?" in capsys.readouterr().err


def test_partition_shows_draws_and_saves(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["partition", str(config_file), "partition.alpha=0.3", "--picture", "split.png", "--save", "split.json"]) == 0
    out = capsys.readouterr().out
    assert "alpha 0.3 asked" in out
    assert (config_file.parent / "split.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["partition", str(config_file), "seed=7", "manifest=./split.json"]) == 0
    wanted = [line for line in out.splitlines() if line.startswith("manifest hash")]
    assert wanted == [line for line in capsys.readouterr().out.splitlines() if line.startswith("manifest hash")]


def test_partition_with_a_picture_of_no_known_kind(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["partition", str(config_file), "--picture", "split.doc"]) == 2
    assert "must end in .png, .svg, .pdf" in capsys.readouterr().err
