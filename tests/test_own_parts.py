"""A server part of the user's own that is wrong: one line that names it and its file, the task and the round, in good time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from clients import local
from fedsim.core import plugins
from fedsim.core.errors import NonFinite, PluginError, RunDirError
from fedsim.simulation import prepare, rehearse, run
from server import checkpoint, outcomes
from server.state import ServerState
from tests.tiny import tiny

RULE = """
from dataclasses import dataclass
import numpy as np
import torch
from fedsim import Aggregator as Base

@dataclass(frozen=True)
class Aggregator(Base):
    def init(self, params, task=0):
        return {init}

    def combine(self, state, params, updates, draw):
        out = dict(params)
        {work}
        return state, out
"""
CONSOLIDATOR = """
from dataclasses import dataclass
from server.consolidators.none import Consolidator as Base

@dataclass(frozen=True)
class Consolidator(Base):
    def end_task(self, state, params, total, draw):
        {end}
        return state

    def deployed(self, state, params, finished):
        out = dict(params)
        {work}
        return out
"""
CALIBRATOR = """
from dataclasses import dataclass
from fedsim import Calibrator as Base

@dataclass(frozen=True)
class Calibrator(Base):
    def calibrate(self, state, params, updates, classes, draw):
        return state, {**params, "head.bias": params["head.bias"][:1]}
"""
AT_ONCE = ("server.rounds=2", "server.consolidator=none", "client.batch_size=36")


def rule_file(folder: Path, work: str = "pass", init: str = "{}") -> Path:
    path = folder / "my.py"
    path.write_text(RULE.format(work=work, init=init))
    return path


@pytest.mark.parametrize(
    ("work", "said"),
    {
        "one for all classes": (
            "out['head.bias'] = out['head.bias'][:1]",
            r"it gives 'head.bias' with shape \(1,\) where \(6,\)",
        ),
        "a number": ("out['head.bias'] = out['head.bias'].mean()", r"it gives 'head.bias' with shape \(\) where \(6,\)"),
        "more rows": (
            "out['head.weight'] = torch.cat([out['head.weight']] * 2)",
            r"it gives 'head.weight' with shape \(12, 16\) where \(6, 16\) is wanted",
        ),
        "another tensor": ("out['junk'] = torch.ones(3)", "it gives 'junk', which is none of the tensors"),
        "a tensor less": ("del out['head.bias']", "it gives no 'head.bias'"),
        "half": (
            "out['head.bias'] = out['head.bias'].half()",
            "it gives 'head.bias' as torch.float16 where torch.float32 is wanted",
        ),
        "numpy": (
            "out['head.bias'] = out['head.bias'].numpy()",
            "it gives 'head.bias' as numpy.ndarray where a tensor is wanted",
        ),
        "in place": ("params['head.bias'] += 1", "it changes 'head.bias' of the parameters that it is given: change a copy"),
        "put in": ("params['head.bias'] = torch.ones(6)", "it changes 'head.bias' of the parameters that it is given"),
        "the parameters alone": ("return out", "it gives dict where a pair of its state and the parameters is wanted"),
        "nothing": ("return None", "it gives nothing where a pair"),
        "an error": (
            "updates[0].params['foo']",
            "combine fails: KeyError: 'foo': hold it against the laws with fedsim check .*my.py",
        ),
    }.values(),
)
def test_a_rule_that_gives_something_else_than_parameters(tmp_path: Path, work: str, said: str) -> None:
    path = rule_file(tmp_path, work)
    with pytest.raises(PluginError, match=rf"^server.aggregator {path}: task 0, round 0: {said}") as caught:
        rehearse(tiny(*AT_ONCE, f"server.aggregator={path}"), 1)
    assert (caught.value.__cause__ is not None) == ("fails" in said)  # for --debug


def test_what_is_not_finite_is_said_of_the_rule_that_gives_it(tmp_path: Path) -> None:
    path = rule_file(tmp_path, "out['head.bias'] = out['head.bias'] * float('nan')")
    with pytest.raises(NonFinite, match=rf"^server.aggregator {path}: task 0, round 0: .*'head.bias' holds NaN"):
        rehearse(tiny(*AT_ONCE, f"server.aggregator={path}"), 1)


@pytest.mark.parametrize(
    ("end", "work", "said"),
    [
        ("return {}['x']", "pass", "end_task fails: KeyError: 'x'"),
        ("pass", "out['head.bias'] = out['head.bias'][:1]", r"it gives 'head.bias' with shape \(1,\) where \(6,\) is wanted"),
        ("pass", "return None", "it deploys nothing where tensors by name are wanted"),
    ],
)
def test_a_consolidator_and_a_calibrator(tmp_path: Path, end: str, work: str, said: str) -> None:
    path, calibrator = tmp_path / "mine.py", tmp_path / "repair.py"
    path.write_text(CONSOLIDATOR.format(end=end, work=work))
    options = ("server.rounds=1", "server.aggregator=fedavg", "client.batch_size=36")
    with pytest.raises(PluginError, match=rf"^server.consolidator {path}: task 0, (round 0|at its end): {said}"):
        rehearse(tiny(*options, f"server.consolidator={path}"))
    calibrator.write_text(CALIBRATOR)
    with pytest.raises(PluginError, match=rf"^server.calibrator {calibrator}: task 0, round 0: it gives 'head.bias' with shape"):
        rehearse(tiny(*options, "server.consolidator=none", f"server.calibrator={calibrator}"))


def test_what_can_be_known_is_said_before_any_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "fit", lambda *args: pytest.fail("training began"))
    path = rule_file(tmp_path)
    right = path.read_text()
    for wrong, said in {
        right.replace("params, updates, draw", "params"): r"its combine must take \(state, params, updates, draw\)",
        right.replace("params, task=0", "params"): r"its init must take \(params, task\)",
        right + "\n    def least(self):\n        return 2\n": "its least must be a property",
    }.items():
        path.write_text(wrong)
        with pytest.raises(PluginError, match=rf"^server.aggregator: {path}: {said}.*see fedsim.core.contracts.Aggregator"):
            tiny(*AT_ONCE, f"server.aggregator={path}")
    path = rule_file(tmp_path, init="[][0]")
    with pytest.raises(PluginError, match=rf"^server.aggregator {path}: before any training: init fails: IndexError"):
        prepare(tiny(*AT_ONCE, f"server.aggregator={path}"))
    path = rule_file(tmp_path, init="{'seen': {'of': np.zeros(3)}}")
    with pytest.raises(
        PluginError, match=rf"^server.aggregator {path}: its state holds numpy.ndarray at 'seen.of', which a check"
    ):
        prepare(tiny(*AT_ONCE, f"server.aggregator={path}"))


def test_names_of_ones_own_and_arguments_by_name_are_as_good(tmp_path: Path) -> None:
    """What a part is called with, it may name as it likes, give defaults, and take as *args."""
    path = rule_file(tmp_path)
    path.write_text(
        path.read_text().replace("params, updates, draw", "params, *rest, more=1").replace("params, task=0", "p, t=3")
    )
    assert plugins.load("aggregators", str(path))


def test_a_state_that_a_checkpoint_cannot_keep_ends_the_run_at_its_first_round(tmp_path: Path) -> None:
    path = rule_file(tmp_path, "state = {'mean': [1.0, np.float64(3)]}")
    config, folder = tiny(*AT_ONCE, f"server.aggregator={path}"), tmp_path / "run"
    with pytest.raises(
        PluginError, match=r"its state holds numpy.float64 at 'mean.1', which a checkpoint cannot keep: use tensors"
    ):
        run(config, output=folder)
    assert not (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"a": [1, 2.0, None, "x", True, {3}, (1j,)], 4: torch.ones(2, requires_grad=True)}, None),
        (torch.Size([2]), None),
        ({"a": [1, (np.int64(1),)]}, "numpy.int64 at 'a.1.0'"),
        ({"a": {"b": range(3)}}, "range at 'a.b'"),
        (frozenset({1}), "frozenset, which"),
    ],
)
def test_what_is_refused_is_what_cannot_be_read_again(tmp_path: Path, state: object, place: str | None) -> None:
    """The oracle is torch: what passes comes back from a checkpoint, and what is refused does not, as that and not as damage."""
    part = plugins.load("aggregators", "fedavg")()
    checkpoint.save(tmp_path / "c.pt", ServerState(0, 0, {}, None, aggregator=state), "same")
    if place is None:
        outcomes.require_plain(part, state)
        assert str(checkpoint.load(tmp_path / "c.pt", "same").aggregator) == str(state)
        return
    with pytest.raises(PluginError, match=f"^server.aggregator fedavg: its state holds {place}"):
        outcomes.require_plain(part, state)
    with pytest.raises(RunDirError, match=r"is whole, but holds .*, from a plug-in's state"):
        checkpoint.load(tmp_path / "c.pt", "same")
    (tmp_path / "c.pt").write_bytes((tmp_path / "c.pt").read_bytes()[:200])
    with pytest.raises(RunDirError, match="is damaged"):
        checkpoint.load(tmp_path / "c.pt", "same")
