"""The run directory: what is written there, and how it is loaded.

    config.yaml        the resolved config; runs again with `fedsim run config.yaml`
    plugins/           copies of the user's own plug-in files and manifest, which config.yaml names; a file whose name another
                       has already lies in a folder of its own, plugins/<number>/
    manifest.json      the stream and partition: indices, histograms, hash
    environment.json   versions, machine, git commit, command line
    partition.csv      training samples per (task, client, class), where there are any
    rounds.csv         raw counts and percent, one row per (task trained, round, task tested)
    classes.csv        raw counts per class at every task's end
    drift.csv          how far the clients of a round went from what they received, and from each other
    costs.json         bytes by direction and kind of object, seconds by phase, client rounds, what a client stores (if anything)
    failures.json      clients that were skipped, if any
    notes.json         lines that whoever reads the numbers has to know, if any
    data.json          where the data lie now, if they have moved since the run began
    checkpoint.pt      the whole state after the last round, but for
    clients.sqlite     what is kept of every client (see `server.store`); beside it, while a run writes, clients.sqlite-wal
    vectors/task-<t>/  with server.unlearning: what the task started and ended with, and what every client became by itself;
                       with server.keep: deployed.safetensors, the module and head that were deployed after the task
    unlearned/         what `fedsim unlearn` wrote
    tracking.json      the run's id to its trackers, if any; they may keep folders of their own here (tensorboard/, wandb/)
    accuracy.csv  accuracy_task_incremental.csv  metrics.json   at the end
    status.json        running | finished, the identity of the config, and hashes of the split and of the backbone's weights

Every file is replaced as a whole (clients.sqlite by transactions), so that a run that is killed leaves the last full round.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from fedsim.core import config as configs
from fedsim.core.config import SimConfig
from fedsim.core.errors import FedsimError, RunDirError
from fedsim.core.events import TensorsKept
from fedsim.core.files import LOCK, held, remove_leftovers, storage_errors, write_atomic
from fedsim.core.home import __version__
from fedsim.runs.environment import FILE as ENVIRONMENT
from fedsim.runs.environment import environment
from fedsim.runs.rows import csv_bytes

BEFORE_STATUS = {"config.yaml", "plugins", "manifest.json", "partition.csv", ENVIRONMENT}  # written before status.json
RULE_OBJECT = "python:"  # the name of a rule that was passed as an object, not by name


class SavesItself(Protocol):
    """What is needed of a manifest."""

    @property
    def hash(self) -> str: ...
    def save(self, path: Path) -> None: ...
    def holdings(self) -> Iterable[tuple[int, int, int, str, int]]: ...


@dataclass(frozen=True, slots=True)  # there is one per class of every client: millions, where there are many clients
class Holding:
    """Training samples of one class that one client holds in one task; only where there are any."""

    task: int
    client: int
    class_row: int
    class_name: str
    samples: int


@dataclass(frozen=True)
class RunDir:
    """A folder that belongs to one run of one config."""

    path: Path
    config: SimConfig

    @cached_property
    def identity(self) -> str:
        """That with which the run began; of a new one the config's, taken once: a rule file that is edited while the run goes on
        is not the rule that runs."""
        return str(self._status("identity")) if (self.path / "status.json").is_file() else self.config.identity()

    @classmethod
    def create(cls, config: SimConfig, output: str | Path | None = None) -> RunDir:
        """A new folder: `output`, or `<runtime.output>/<name>-<identity>` with -2, -3, … when that is taken.

        Raises RunDirError when `output` holds something (but for a start that was cut short, which is made anew), StorageError
        when it cannot be made.
        """
        if output is not None:
            path = Path(output).absolute()
            if path.is_dir() and not {p.name for p in path.iterdir() if not _is_passing(p.name)} <= BEFORE_STATUS:
                raise RunDirError(_in_the_way(path, config))
            if path.exists() and not path.is_dir():
                raise RunDirError(f"{path} is a file: choose another --output")
            with storage_errors(path):
                path.mkdir(parents=True, exist_ok=True)
            return cls(path, config)
        parent = Path(config.runtime.output).absolute()
        with storage_errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
            return cls(_first_free(parent, f"{config.name}-{config.identity()[:8]}"), config)

    @contextmanager
    def begun(self) -> Iterator[RunDir]:
        """A new folder, kept to this process while open. Raises InUse, and RunDirError if another process was there before."""
        with self.held():
            if (self.path / "status.json").is_file():
                raise RunDirError(_in_the_way(self.path, self.config))
            yield self

    def held(self) -> AbstractContextManager[None]:
        """The folder, kept to this process while open. Raises InUse."""
        return held(self.path, "fedsim run")

    @classmethod
    def read(cls, path: str | Path) -> RunDir:
        """A folder that a run began, to look at. Raises RunDirError when it is missing or damaged."""
        path = Path(path).absolute()
        if not path.is_dir():
            raise RunDirError(f"no run directory {path}")
        if not (path / "status.json").is_file():
            raise RunDirError(f"{path} is no run directory: it holds no status.json")
        return cls(path, _load_config(path))

    @classmethod
    def open(cls, path: str | Path, config: SimConfig | None = None, moved: bool = False) -> RunDir:
        """A folder that a run began, to go on in with its own config or with `config`. moved: the config may have another data
        section, if these are the same data (`write_start` sees to that).

        Raises RunDirError when it is missing, damaged, was changed, or belongs to another config.
        """
        found = cls.read(path)
        if found.identity not in found.config.known_as():
            version = found._status("fedsim")
            raise RunDirError(
                f"{found.path} cannot be resumed: its config.yaml or plugins/ were changed since the run began"
                + (f", or fedsim {__version__} reads them otherwise than fedsim {version} did" if version != __version__ else "")
            )
        if config is None:
            return found
        begun = dataclasses.replace(config, data=found.config.data) if moved else config
        if begun.identity() != found.config.identity():
            raise RunDirError(f"{found.path} belongs to another config: resume it without a config, or choose another --output")
        return cls(found.path, begun)

    def located(self, config: SimConfig | None = None) -> SimConfig:
        """The config with the data where they lie now: where `config` says so, else where they were found last."""
        config, path = config or self.config, self.path / "data.json"
        if config.data != self.config.data or not path.is_file():
            return config
        with damage(path):
            return dataclasses.replace(config, data=dict(json.loads(path.read_text(encoding="utf-8"))))

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self._status("state") == "finished")

    @property
    def manifest_hash(self) -> str:
        """The hash of the split that the run began with."""
        return str(self._status("manifest_hash"))

    def require_backbone(self, digest: str) -> None:
        """Raise RunDirError when this is not the backbone that the run began with, as far as that is known: not its weights, or
        not its use (runs of older versions noted the weights alone)."""
        began, began_use = self._backbone.partition(".")[::2]
        weights, use = digest.partition(".")[::2]
        name = self.config.model.backbone
        if began not in ("", weights):
            raise RunDirError(
                f"{self.path}: the weights of the backbone '{name}' are not those that the run began with (or another version of "
                "transformers reads them otherwise): put those back, or start a new run"
            )
        if began_use not in ("", use):
            raise RunDirError(
                f"{self.path}: the weights of the backbone '{name}' are those that the run began with, but its config.json or "
                "preprocessor_config.json changed how they are used (heads, activation, epsilon of norms, mean and deviation of "
                "images): put the old file back, or start a new run"
            )

    @property
    def _backbone(self) -> str:
        """What was noted of the backbone, `Backbone.digest`; "" if nothing was."""
        return str(_read_status(self.path).get("backbone", ""))

    @property
    def checkpoint(self) -> Path:
        """The file that holds the state after the last round."""
        return self.path / "checkpoint.pt"

    @property
    def store(self) -> Path:
        """The file that holds what is kept of every client."""
        return self.path / "clients.sqlite"

    def write_start(self, manifest: SavesItself, data: configs.Section | None = None, backbone: str = "") -> None:
        """Write what is known before training. On a resumed run: check the split, and note the environment once more, and that
        the data came from the section `data` if that is not where they lay before. backbone: `Backbone.digest`, as the
        identity holds its name or path alone.

        Raises RunDirError when a resumed run's data give another split than it began with.
        """
        with storage_errors(self.path, self.advice):
            remove_leftovers(self.path)
        if (self.path / "status.json").is_file():
            if self.manifest_hash != manifest.hash:
                raise RunDirError(
                    f"{self.path}: the data give another split than the run began with. Were files changed? Start a new run"
                )
            self._note_resume()
            if data is not None and data != self.located().data:
                self.write_json("data.json", data)
            return
        self.write("config.yaml", self._copy_plugins().to_yaml())
        with storage_errors(self.path / "manifest.json", self.advice):
            manifest.save(self.path / "manifest.json")
        columns = [f.name for f in dataclasses.fields(Holding)]
        write_atomic(self.path / "partition.csv", csv_bytes(columns, manifest.holdings()), self.advice)
        self.write_json(ENVIRONMENT, environment(self.config.runtime.device))
        self.write_status("running", manifest.hash, backbone)

    def keep(self, kept: TensorsKept) -> None:
        """Write tensors that are asked for later. A run that goes on writes those of its task again, to the same bits."""
        from safetensors.torch import save

        path = self.vectors(kept.task, kept.name)
        with storage_errors(path.parent, self.advice):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save({n: t.clone().contiguous() for n, t in kept.tensors.items()}), self.advice)

    def vectors(self, task: int, name: str) -> Path:
        """The file of `events.TensorsKept`."""
        return self.path / "vectors" / f"task-{task}" / f"{name}.safetensors"

    @property
    def advice(self) -> str:
        """What is said where the disk is full."""
        return f"free space, then go on with: fedsim run --resume {self.path}"

    def write(self, name: str, text: str, lasting: bool = True) -> None:
        """lasting: see `write_atomic`."""
        write_atomic(self.path / name, text.encode(), self.advice, lasting)

    def write_json(self, name: str, value: Any, lasting: bool = True) -> None:
        self.write(name, json.dumps(value, indent=2) + "\n", lasting)

    def write_status(self, state: str, manifest_hash: str, backbone: str | None = None) -> None:
        """backbone: the digest of its weights; None: as it was noted."""
        status = {
            "state": state,
            "identity": self.identity,
            "manifest_hash": manifest_hash,
            "backbone": self._backbone if backbone is None else backbone,
            "fedsim": __version__,
        }
        self.write_json("status.json", status | {"rule_object": _rule_object(self.config)})

    def _status(self, key: str) -> Any:
        return _read_status(self.path)[key]

    def _note_resume(self) -> None:
        path = self.path / ENVIRONMENT
        with damage(path):
            first = dict(json.loads(path.read_text(encoding="utf-8")))
        now = environment(self.config.runtime.device)
        self.write_json(path.name, first | {"resumed": [*first.get("resumed", []), now]})

    def _copy_plugins(self) -> SimConfig:
        """Copy the user's plug-in files and manifest here, and return the config that names the copies."""
        config, files = self.config, self.config.user_files()
        for number, source in enumerate(files):
            name = Path(source).name  # stays: a learner's memory and draws go by it, and a channel's memory
            taken = any(Path(other).name.casefold() == name.casefold() for other in files[:number])
            place = f"plugins/{number}/{name}" if taken else f"plugins/{name}"
            copy = self.path / place
            with storage_errors(copy, self.advice):
                copy.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(copy, Path(source).read_bytes(), self.advice)
            config = _renamed(config, source, f"./{place}")
        if config.manifest is not None and Path(config.manifest).is_file():  # its bytes are part of the identity
            copy = self.path / "plugins" / "manifest.json"
            with storage_errors(copy, self.advice):
                copy.parent.mkdir(exist_ok=True)
            write_atomic(copy, Path(config.manifest).read_bytes(), self.advice)
            config = dataclasses.replace(config, manifest="./plugins/manifest.json")
        return config


def _load_config(folder: Path) -> SimConfig:
    """The resolved config of a run. A rule that was passed as an object stays as its description."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise RunDirError(f"{folder} is damaged: it holds no config.yaml")
    section = _read_status(folder)["rule_object"]
    try:
        if section is None:
            return configs.load(path, begun=True)
        config = configs.load(path, ["server.aggregator=fedavg"], begun=True)  # a place holder that loads
    except FedsimError as e:
        raise RunDirError(f"{path} is damaged or was written by another version of fedsim: {e}") from e
    return dataclasses.replace(config, server=dataclasses.replace(config.server, aggregator=section))


def _rule_object(config: SimConfig) -> Any:
    """The section of a rule that was passed as an object, and that no name can build again; None for all others."""
    section = config.server.aggregator
    return section if isinstance(section, dict) and section["name"].startswith(RULE_OBJECT) else None


def _read_status(folder: Path) -> dict[str, Any]:
    path = folder / "status.json"
    with damage(path):
        status = json.loads(path.read_text(encoding="utf-8"))
        missing = {"state", "identity", "manifest_hash", "fedsim", "rule_object"} - set(status)
        if missing:
            raise KeyError(", ".join(sorted(missing)))
        return dict(status)


def _is_passing(name: str) -> bool:
    """Whether it is a file that a process leaves behind when it is killed."""
    return name.endswith(".tmp") or name.startswith(LOCK)


def _in_the_way(path: Path, config: SimConfig) -> str:
    try:
        found = RunDir.open(path)
        same, finished = found.config.identity() == config.identity(), found.finished
    except RunDirError:
        return f"{path} is not empty, and no run directory that can be read: choose another --output"
    if not same:
        return f"{path} belongs to another config: choose another --output"
    if finished:
        return f"{path} already holds a finished run of this config: choose another --output"
    return f"{path} holds an unfinished run of this config: go on with fedsim run --resume {path}, or choose another --output"


def _first_free(parent: Path, name: str) -> Path:
    """Make the first of name, name-2, name-3, … that nobody has; two runs at once get two folders."""
    number = 1
    while True:
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def _renamed(config: SimConfig, old: str, new: str) -> SimConfig:
    """The config with another path for one plug-in file."""
    server, client = config.server, config.client
    return dataclasses.replace(
        config,
        **{key: _replaced(getattr(config, key), old, new) for key in configs.PLUGIN_KEYS},
        server=dataclasses.replace(
            server, **{key: _replaced(getattr(server, key), old, new) for key in configs.SERVER_PLUGIN_KEYS}
        ),
        client=dataclasses.replace(client, learners=_replaced(client.learners, old, new)),
        trackers=_replaced(config.trackers, old, new),
        runtime=dataclasses.replace(config.runtime, pool=new if config.runtime.pool == old else config.runtime.pool),
    )


def _replaced(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {k: _replaced(v, old, new) for k, v in value.items()}
    if isinstance(value, list):
        return [_replaced(v, old, new) for v in value]
    return new if value == old else value


def read_text(path: Path, absent: str) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else absent


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a file is read is damage to the run directory."""
    try:
        yield
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, csv.Error) as e:
        raise RunDirError(f"{path} is damaged ({type(e).__name__}: {e})") from e
