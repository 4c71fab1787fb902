"""What pages show is so: commands parse, configs load, tutorials run from start to end, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from fedsim import cli
from fedsim.core import config as configs
from fedsim.core import plugins
from fedsim.core.config import SimConfig
from fedsim.sweeps import launch
from fedsim.sweeps.job import JobResult
from fedsim.sweeps.launch import Begun, Ended
from fedsim.sweeps.plan import PlannedRun, SweepPlan, expand
from tests.pages import DOCS, PAGES, ROOT, Block, blocks, file_of
from tests.run_dirs import write_run
from tests.tiny import plain_vit

SMALL = (
    "stream.tasks=2", "stream.classes_per_task=2", "server.rounds=1", "client.epochs=1", "server.evaluate=task",
    "partition.clients=3", "partition.min_samples=1", "runtime.pool=serial", "runtime.device=cpu",
)  # fmt: skip
TAKES_CONFIG = ("run", "partition")
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
RUN = [name for name in NAMES if any("runs" in block.marks for block in blocks(ROOT / name))]
LINK = re.compile(r"(?<!`)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")


def commands(block: Block) -> Iterator[list[str]]:
    """The words of every `fedsim` command of a block, without the first."""
    for line in block.text.replace("\\\n", " ").splitlines() if block.language == "bash" else ():
        words = shlex.split(line, comments=True)
        if words and words[0] == "fedsim":
            yield words[1 : next((i for i, word in enumerate(words) if word in (">", "|")), None)]  # the rest is the shell's


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a sweep are written by hand; its configs, splits and models are still made."""

    def execute(plan: SweepPlan, runs: Sequence[PlannedRun]) -> Iterator[Any]:
        for run in runs:
            write_run(plan.folder, run.config)
            yield Begun(run, 1)
            yield Ended(run, JobResult("finished", 1.0, 65.0), 1)

    monkeypatch.setattr(launch, "execute", execute)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    "name", [n for n, page in zip(NAMES, PAGES, strict=True) if any("runs" in b.marks for b in blocks(page))]
)
def test_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom in one folder, as a reader would, with smaller runs."""
    monkeypatch.chdir(tmp_path)
    real, small = configs.load, (*SMALL, f"model.backbone={plain_vit()['backbone']}")

    def load(paths: Any, overrides: Sequence[str] = (), **more: Any) -> SimConfig:
        return real(paths, overrides if "begun" in more else [*overrides, *small], **more)

    monkeypatch.setattr(configs, "load", load)
    space: dict[str, Any] = {}
    for block in blocks(ROOT / name):
        write_files(block, ROOT / name)
        if "runs" in block.marks and block.language == "python":
            exec(compile(block.text, name, "exec"), space)
        for words in commands(block) if "runs" in block.marks else ():
            assert cli.main([*words, *(small if words[0] == "sweep" else ())]) == 0, words


@pytest.mark.filterwarnings("ignore:.*bf16")  # a page for GPUs
@pytest.mark.parametrize("name", NAMES)
def test_what_a_page_shows_can_be_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands parse and their configs load, whether there is a GPU or a cluster here or not; Python compiles; YAML is YAML."""
    monkeypatch.chdir(tmp_path)
    shown = [*blocks(ROOT / name)]
    for block in shown:
        write_files(block, ROOT / name)
    for block in shown:
        if block.language == "python":
            compile(block.text, name, "exec")
        elif block.language == "yaml":
            readable(yaml.safe_load(block.text), block)
        for words in commands(block):
            args = cli.parse(words)
            if words[0] in TAKES_CONFIG and args.configs and all(there(word) for word in (*args.configs, *args.overrides)):
                configs.load(args.configs, args.overrides)


def write_files(block: Block, page: Path) -> None:
    """The files that a block is, or needs."""
    for told in block.marked("file"):
        file, _, elsewhere = told.partition(" from ")
        Path(file).write_text(file_of(page.parent / elsewhere, file) if elsewhere else block.text, encoding="utf-8")


def readable(told: Any, block: Block) -> None:
    """A file that a page shows is a config or a sweep that would run."""
    for file in block.marked("file"):
        if file.endswith(".yaml"):
            assert expand(file).runs if "base" in told else configs.load([file])


def there(word: str) -> bool:
    """Whether the files that a word names can be there: a run directory or a user's file of another page is not."""
    files = re.findall(r"[\w./-]+\.(?:py|yaml|json)\b", word)
    return all(Path(file).exists() for file in files)


@pytest.mark.parametrize("name", [*NAMES, "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_lead_somewhere(name: str) -> None:
    """Those into the repository; pages of the reference are made when the site is built."""
    page = ROOT / name
    code = re.compile(r"^```.*?^```|`[^`\n]+`(?!\])", re.MULTILINE | re.DOTALL)
    for target in LINK.findall(code.sub("", page.read_text(encoding="utf-8"))):
        if not re.match(r"[a-z]+:|#", target):
            file = (page.parent / target.partition("#")[0]).resolve()
            assert file.exists() or generated(file), f"{name}: {target}"


def generated(file: Path) -> bool:
    """Whether the site's generator makes this page."""
    if not file.is_relative_to(DOCS / "reference"):
        return False
    *kind, name = file.relative_to(DOCS / "reference").with_suffix("").parts
    known = {"config", "commands", "metrics", "api"} if not kind else {"index", *plugins.names(kind[0])}
    return name in known
