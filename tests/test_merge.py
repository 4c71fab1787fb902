"""Finished runs, and the tasks of one, merged after the fact: against products merged by hand, and beside what the runs gave."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedsim.cli import main
from fedsim.core.contracts import Member
from fedsim.core.errors import ConfigError, FedsimError
from fedsim.core.messages import ClientJob, RoundPlan, StatisticRequest, Tensors
from fedsim.core.tensors import LORA_A, LORA_B, from_upper_triangle, lora_layers, with_prefix
from fedsim.finished import OpenedRun
from fedsim.merging.heads import solved
from fedsim.merging.measure import measure, measure_source
from fedsim.merging.merge import merge
from fedsim.merging.sources import of_runs, of_tasks
from fedsim.simulation import run
from server.merging.dare import Merging as Dare
from server.merging.ties import Merging as Ties
from tests.tiny import plain_vit, same_bits, tiny

MEAN = ("server.aggregator=fedavg", "server.consolidator=mean", "server.rounds=1")
TIES = ("server.aggregator=fedavg", "server.consolidator={name: merged, rule: {name: ties, density: 0.5}}", "server.rounds=1")


@dataclass(frozen=True)
class Runs:
    """Run directories: two that differ in rate and rank, one of the first task's classes only, one merged by TIES."""

    one: Path
    other: Path
    first: Path
    ties: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")

    def made(name: str, *overrides: str) -> Path:
        path = run(tiny(*overrides, model=plain_vit()), output=folder / name).path
        assert path is not None
        return path

    return Runs(
        made("one", *MEAN),
        made("other", *MEAN, "client.lr=2e-2", "adapter.rank=3"),
        made("first", *MEAN, "stream.tasks=1", "stream.classes_per_task=3"),
        made("ties", *TIES),
    )


opened = cache(OpenedRun)  # a run that is only looked at is opened once


def effect(params: Tensors) -> dict[str, Tensor]:
    """What a module does: the product of a LoRA pair, float64."""
    return {p: params[p + LORA_B].double() @ params[p + LORA_A].double() for p in lora_layers(params)}


def close(got: Tensors, want: Tensors, atol: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=atol, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_mean_of_two_runs_is_the_mean_of_their_products(runs: Runs) -> None:
    """Of ranks 2·2 and 2·3; the head row by row."""
    a, b = opened(runs.one), opened(runs.other)
    merged = merge(of_runs([a, b]), "mean").deployed
    one, other = effect(a.deployed), effect(b.deployed)
    close(effect(merged), {p: (one[p] + other[p]) / 2 for p in one})
    heads = [with_prefix(r.deployed, "head.") for r in (a, b)]
    close(with_prefix(merged, "head."), {n: (heads[0][n] + heads[1][n]) / 2 for n in heads[0]})
    assert not torch.equal(heads[0]["head.weight"], heads[1]["head.weight"])


def test_ties_of_two_runs_is_the_pure_rule(runs: Runs) -> None:
    sources = of_runs([opened(runs.one), opened(runs.other)])
    members = [Member(s.who, effect(s.params)) for s in sources.members]
    base = {p: torch.zeros_like(t) for p, t in members[0].params.items()}
    want = Ties(density=0.3, scale=0.7).merge(members, base, torch.Generator())
    close(effect(merge(sources, {"name": "ties", "density": 0.3, "scale": 0.7}).deployed), dict(want))


def test_what_dare_drops_of_a_run_hangs_on_the_run_and_not_on_its_folder(runs: Runs, tmp_path: Path) -> None:
    """Elsewhere, and both in folders of one name, the merge is the same; the two runs' draws are independent."""
    dare = {"name": "dare", "p": 0.5, "then": {"name": "task_arithmetic", "scale": 1.0}}
    found = merge(of_runs([runs.one, runs.other]), dare, seed=3)
    moved = []
    for folder, path in (("a", runs.one), ("b", runs.other)):
        moved.append(tmp_path / folder / "run")
        shutil.copytree(path, moved[-1])
    assert same_bits(merge(of_runs(moved), dare, seed=3).deployed, found.deployed)
    members = [Member("run run", {"w": torch.ones(1000)}, key=key) for key in ("one", "other")]
    rule, base = Dare(p=0.5, then="mean"), {"w": torch.zeros(1000)}
    alone = [rule.merge([member], base, torch.Generator().manual_seed(3))["w"] for member in members]
    both = sum(int(((a > 0) & (b > 0)).sum()) for a, b in [alone])
    assert 180 < both < 320, both  # 250 of 1000 stay in both, where equal masks would leave 500


def test_statistics_are_those_of_the_run_s_own_clients(runs: Runs) -> None:
    """A pass over all samples at once gives the sum of what the clients give one by one, through the same model."""
    source = of_runs([opened(runs.one), opened(runs.other)]).members[0]
    name = next(n for n in source.params if n.endswith(LORA_A))
    request = StatisticRequest("gram", (name,), {"form": "full", "decay": 1.0})
    told = source.statistics([request])
    worker, plan = source.run.worker, RoundPlan(train=(), statistics=(request,))
    total = torch.zeros_like(told[f"gram.full/{name}"], dtype=torch.float64)
    for task in source.run.tasks:
        for client in source.run.participants(task):
            update = worker.train_client(ClientJob(client, task, 1, source.params, plan))
            total += update.statistics[f"gram.full/{name}"].double()
    torch.testing.assert_close(told[f"gram.full/{name}"].double(), total, rtol=1e-5, atol=1e-5)
    assert source.statistics([request])[f"gram.full/{name}"] is told[f"gram.full/{name}"], "measured once"


def test_regmean_of_a_run_and_itself_elsewhere_is_the_run(runs: Runs, tmp_path: Path) -> None:
    """Equal members are a fixed point, whatever their Grams."""
    again = run(opened(runs.one).config, output=tmp_path / "again").path
    assert again is not None
    sources = of_runs([opened(runs.one), again])
    close(effect(merge(sources, "regmean").deployed), effect(sources.members[0].params), atol=1e-5)


def test_chain_of_merges_looks_through_what_is_merged(runs: Runs) -> None:
    """The first layer is RegMean's; the last one fits what it is given behind the merged ones, better than RegMean's does."""
    sources = of_runs([opened(runs.one), opened(runs.other)])
    regmean = effect(merge(sources, {"name": "regmean", "decay": 1.0, "form": "full"}).deployed)
    merged = merge(sources, {"name": "chain_of_merges", "granularity": "layer"}).deployed
    chain, (*_, last) = effect(merged), regmean
    first = next(iter(regmean))
    torch.testing.assert_close(chain[first], regmean[first], atol=1e-4, rtol=1e-3)
    own = [effect(s.params)[last] for s in sources.members]
    request, name = StatisticRequest("gram", (last + LORA_A,), {"form": "full", "decay": 1.0}), f"gram.full/{last}{LORA_A}"
    before = {n: t for n, t in with_prefix(merged, "adapter.").items() if not n.startswith(last)}
    grams = [from_upper_triangle(s.statistics([request], before)[name].double()) for s in sources.members]

    def error(map_OI: Tensor) -> float:
        return sum(float(((map_OI - w) @ g @ (map_OI - w).T).trace()) for w, g in zip(own, grams, strict=True))

    assert error(chain[last]) < error(regmean[last]), "it is the least squares solution there"


def test_rows_of_classes_that_a_run_never_saw_do_not_count(runs: Runs) -> None:
    one, first = opened(runs.one), opened(runs.first)
    for sources in (of_runs([one, first]), of_runs([first, one])):
        assert sources.run is one, "the one with all classes gives the tasks"
        head = merge(sources, "mean").deployed["head.weight"]
        own, its = one.deployed["head.weight"], first.deployed["head.weight"]
        assert its.shape[0] == 3
        torch.testing.assert_close(head[:3], (own[:3] + its) / 2)
        assert torch.equal(head[3:], own[3:])
        row = measure_source(sources, next(s for s in sources.members if s.run is first))
        assert row.class_incremental == [row.task_told[0], 0.0] and row.task_told[1] is None and row.average_told is None
    with pytest.raises(ConfigError, match="did not learn all classes"):
        merge(of_runs([one, first]), "mean", head="rule")


def test_the_head_by_the_rule(runs: Runs) -> None:
    """The mean is the mean; TIES sees the head's numbers beside the modules'."""
    sources = of_runs([opened(runs.one), opened(runs.other)])
    close(merge(sources, "mean", head="rule").deployed, merge(sources, "mean").deployed)
    told = merge(sources, {"name": "ties", "trim": "tensor"}, head="rule").deployed["head.weight"]
    assert int((told == 0).sum()) > told.numel() / 2 > 0


@pytest.mark.parametrize(("name", "rule"), [("one", "mean"), ("ties", {"name": "ties", "density": 0.5})])
def test_the_tasks_of_a_run_by_its_own_rule_are_the_run(runs: Runs, name: str, rule: Any) -> None:
    """Every count of its last evaluation; by the very rule of consolidator `merged`, every bit."""
    found = opened(getattr(runs, name))
    merged = merge(of_tasks(found), rule)
    row = measure(found, "merged", merged.deployed)
    assert row.class_incremental == found.final
    if merged.own:
        assert same_bits(dict(merged.deployed), dict(found.deployed))
    assert merged.own == (name == "ties")


def test_the_tasks_of_a_run_by_another_rule(runs: Runs) -> None:
    """What consolidator `merged` makes of the same tasks by TIES: training does not see the merge of former tasks."""
    by_ties, other = opened(runs.ties), opened(runs.one)
    want, own = effect(by_ties.deployed), effect(other.deployed)
    close(effect(merge(of_tasks(other), {"name": "ties", "density": 0.5}).deployed), want)
    assert all(bool((want[p] - own[p]).abs().max() > 1e-3) for p in want), "TIES is another model than the mean"


def test_a_head_that_is_solved_anew(runs: Runs, tmp_path: Path) -> None:
    """On features that no training moves it is the head that the run's own calibrator made; elsewhere it fits the merged ones."""
    frozen = ("server.aggregator=frozen", "server.consolidator=mean", "server.calibrator=lda", "server.rounds=1")
    path = run(tiny(*frozen, model=plain_vit()), output=tmp_path / "run").path
    assert path is not None
    sources = of_tasks(path)
    merged = merge(sources, "mean").deployed
    got = solved(sources, {n: torch.zeros_like(t) if n.startswith("head.") else t for n, t in merged.items()}, "lda")
    close(with_prefix(got, "head."), with_prefix(sources.run.deployed, "head."), atol=1e-4)
    two = of_runs([opened(runs.one), opened(runs.other)])
    merged = merge(two, "mean").deployed
    head = solved(two, merged, {"name": "nearest_mean"})["head.weight"]
    worker, spec = two.run.worker, two.run.parts.spec
    held = torch.tensor([p for s in two.members for t in s.tasks for c in s.run.participants(t) for p in spec.shard(t, c)])
    inputs, labels = worker.train_samples.batch(held.numpy())
    worker.restore()
    with torch.no_grad(), worker.model.merged(merged):
        features = worker.model.features(inputs)
    means = torch.stack([features[labels == c].mean(0) for c in range(6)])
    torch.testing.assert_close(head / head.norm(), means / means.norm(), atol=1e-4, rtol=1e-3)
    with pytest.raises(ConfigError, match="calibrator hgp repairs after rounds"):
        solved(two, merged, "hgp")


def test_the_command(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    words = ["merge", str(runs.one), str(runs.other), "--rule", "ties", "--set", "density=0.3", "trim=tensor"]
    assert main([*words, "--output", str(out)]) == 0
    told = json.loads((out / "merged.json").read_text())
    assert told["rule"] == {"name": "ties", "density": 0.3, "scale": 1.0, "trim": "tensor"}
    assert [r["path"] for r in told["runs"]] == [str(runs.one), str(runs.other)]
    merged = merge(of_runs([opened(runs.one), opened(runs.other)]), told["rule"])
    assert same_bits(load_file(out / "merged.safetensors"), dict(merged.deployed))
    rows = {row["name"]: row for row in told["rows"]}
    assert rows["run one"]["class_incremental"] == opened(runs.one).final
    assert rows["merged"]["average"] == measure(opened(runs.one), "", merged.deployed).average
    shown = capsys.readouterr().out
    assert "task told" in shown and "mean over the runs that learned the class" in shown and str(out) in shown
    assert main([*words, "--output", str(out)]) == 2
    assert capsys.readouterr().err == f"fedsim: error: {out} exists already: choose another --output\n"
    assert main(["merge", str(runs.ties), "--of", "tasks", "--rule", "mean", "--output", str(tmp_path / "tasks")]) == 0
    shown = capsys.readouterr().out
    assert "2 tasks merged by mean" in shown and "went on from task to task" in shown


OWN = """
from dataclasses import dataclass
from fedsim.core import contracts

@dataclass(frozen=True)
class Merging(contracts.Merging):
    member: int = 0

    def merge(self, members, base, draw):
        return {n: 2 * members[self.member].params[n] for n in base}
"""


def test_a_rule_of_one_s_own(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text(OWN)
    words = ["merge", str(runs.one), str(runs.other), "--rule", str(tmp_path / "twice.py"), "--set", "member=1"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    want = {p: 2 * t for p, t in effect(opened(runs.other).deployed).items()}
    close(effect(load_file(tmp_path / "out" / "merged.safetensors")), want)


REFUSED = {
    "one run": (["one"], [], "one run alone is merged already"),
    "twice": (["one", "one"], [], "is there twice"),
    "several runs of tasks": (["one", "other"], ["--of", "tasks"], "--of tasks merges the tasks of one run"),
    "no such rule": (["one", "other"], ["--rule", "tis"], "Did you mean 'ties'?"),
    "no such option": (["one", "other"], ["--set", "densty=1"], "densty"),
    "a value that is none": (["one", "other"], ["--set", "density=2"], "density must be in (0, 1]"),
    "one task": (["first"], ["--of", "tasks"], "has one task"),
    "no run": (["one", "nothing"], [], "no run directory"),
}


@pytest.mark.parametrize(("names", "words", "said"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_refused(
    runs: Runs, names: list[str], words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(getattr(runs, name, tmp_path / name)) for name in names]
    assert main(["merge", *paths, "--rule", "ties", *words, "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


UNLIKE = {
    "backbone": (["model.image_size=12"], "different backbones"),
    "targets": (["adapter.targets=[q_proj]"], "different targets of their adapters"),
    "scale": (["adapter.alpha=4"], "different adapters"),
    "kind": (["adapter=none"], "different adapters"),
    "head": (["head=cosine"], "different heads"),
    "order": (["stream.order=[1, 0, 2, 3, 4, 5]"], "different class orders"),
    "test data": (["data.test_per_class=5"], "different test data"),
    "no module per task": (["server.consolidator=none", "stream.tasks=2"], "has no module per task"),
    "prompts": (["adapter={name: vpt, length: 2}", "stream.tasks=2"], "started from different numbers"),
}


@pytest.mark.parametrize(("overrides", "said"), UNLIKE.values(), ids=list(UNLIKE))
def test_what_cannot_be_merged(runs: Runs, overrides: list[str], said: str, tmp_path: Path) -> None:
    """With the first run, or of its own tasks."""
    other = run(tiny(*MEAN, "stream.tasks=1", *overrides, model=plain_vit()), output=tmp_path / "run").path
    assert other is not None
    with pytest.raises(FedsimError, match=said) as caught:
        merge(of_tasks(other), "mean") if "module per task" in said or "numbers" in said else of_runs([opened(runs.one), other])
    assert "\n" not in str(caught.value)


def test_a_run_that_is_not_finished_or_damaged(runs: Runs, tmp_path: Path) -> None:
    for file, old, new, said in (
        ("status.json", b"finished", b"running", "is not finished"),
        ("checkpoint.pt", b"P", b"Q", "is damaged"),
    ):
        copy = tmp_path / file
        shutil.copytree(runs.other, copy)
        (copy / file).write_bytes((copy / file).read_bytes().replace(old, new))
        with pytest.raises(FedsimError, match=said):
            of_runs([opened(runs.one), copy])
