"""CODA-Prompt against its definition: weights by torch's cosine, directions by singular values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fedsim.core.errors import ConfigError, ModelError
from fedsim.core.messages import RoundPlan
from fedsim.core.tensors import matching
from fedsim.models.adapters import codaprompt
from fedsim.models.model import Model
from fedsim.simulation import prepare, run
from server import checkpoint
from tests.clients.test_fused import doubled, require_same, require_trained, work
from tests.models.zoo import VIT, images, model
from tests.tiny import final_state, learned, same_bits, stopping, tiny


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_weights_are_cosines_of_the_attended_query_and_the_keys() -> None:
    query, attention, key = drawn(7, 6), drawn(4, 6, seed=1), drawn(4, 6, seed=2)
    attention[3] = 0  # nothing is attended to: no direction, no weight
    got = codaprompt.weights(query, attention, key)
    torch.testing.assert_close(got, F.cosine_similarity(query[:, None] * attention, key, dim=-1))
    assert bool((got.abs() <= 1 + 1e-12).all()) and bool((got[:, 3] == 0).all())
    clients = codaprompt.weights(query[:6], torch.stack([attention, 2 * key]), torch.stack([key, attention + 1]))
    torch.testing.assert_close(clients[0], got[:3])
    torch.testing.assert_close(clients[1], codaprompt.weights(query[3:6], 2 * key, attention + 1))
    prompts = drawn(2, 4, 3, 6, seed=3)
    want = [sum(clients[i // 3, i % 3, k] * prompts[i // 3, k] for k in range(4)) for i in range(6)]
    torch.testing.assert_close(codaprompt.mixed(clients, prompts), torch.stack(want))  # type: ignore[arg-type]


def test_new_components_are_orthonormal_and_orthogonal_to_the_old() -> None:
    old = drawn(3, 8)
    old[2] = 2 * old[0]  # training has made them dependent: two directions are taken
    new = codaprompt.orthonormal(old.float(), 6, torch.Generator().manual_seed(5))
    torch.testing.assert_close(new @ new.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(old.float().double() @ new.T, torch.zeros(3, 6, dtype=torch.float64), rtol=0, atol=1e-6)
    assert float(codaprompt.off_orthonormal(new)) < 1e-28
    with pytest.raises(ModelError, match=r"7 more components .* beside 2 in 8 numbers"):
        codaprompt.orthonormal(old, 7, torch.Generator())
    again = codaprompt.orthonormal(old.float(), 6, torch.Generator().manual_seed(5))
    assert torch.equal(new, again)


def test_the_penalty_is_the_mean_square_of_the_gram_without_the_identity() -> None:
    rows = drawn(2, 3, 5)
    want = [sum((float(r[i] @ r[j]) - (i == j)) ** 2 for i in range(3) for j in range(3)) / 9 for r in rows]
    torch.testing.assert_close(codaprompt.off_orthonormal(rows), torch.tensor(want, dtype=torch.float64))


def grown(built: Model, tasks: int) -> dict[str, torch.Tensor]:
    params = built.init_adapter(torch.Generator().manual_seed(0))
    for task in range(1, tasks):
        params = built.grown(params, torch.Generator().manual_seed(task))
    return params


def test_every_task_brings_components_orthogonal_to_all_that_are_there() -> None:
    options = {"name": "codaprompt", "length": 2, "blocks": [1], "components": 3}
    built = model(VIT, options, double=False)
    three = grown(built, 3)
    parts = ("coda_prompt", "coda_key", "coda_attention")
    assert list(three) == [f"adapter.layers.1.{part}.task{task}" for task in range(3) for part in parts]
    for part in parts:
        rows = torch.cat([three[f"adapter.layers.1.{part}.task{task}"].flatten(1) for task in range(3)]).double()
        assert len(rows) == 9 and float(codaprompt.off_orthonormal(rows)) < 1e-13
    trained = matching(three, built.frozen(three))
    assert trained == [n for n in three if not n.endswith("task2")]


@pytest.mark.parametrize("inference", [False, True])
def test_every_sample_attends_to_the_prefix_that_it_mixes(inference: bool) -> None:
    """As with the adapter prefix, sample by sample, given the mixed prompts by hand."""
    built = model(VIT, {"name": "codaprompt", "length": 4, "blocks": [1], "components": 2})
    plain = model(VIT, {"name": "prefix", "length": 2, "blocks": [1]})
    params = {n: t.double() + 0.1 * drawn(*t.shape, seed=i) for i, (n, t) in enumerate(grown(built, 2).items())}
    inputs, query = images(), built.features(images())
    with built.merged(params) if inference else built.applied(params):
        got = built.features(inputs)
        torch.testing.assert_close(built.features(inputs, query=query), got, rtol=0, atol=1e-12)
    for b in range(3):
        prompt = torch.zeros(4, 16, dtype=torch.float64)
        for task, k in ((0, 0), (0, 1), (1, 0), (1, 1)):
            p, key, a = (params[f"adapter.layers.1.coda_{part}.task{task}"][k] for part in ("prompt", "key", "attention"))
            prompt += F.cosine_similarity(query[b] * a, key, dim=0) * p
        own = {"adapter.layers.1.prefix_key": prompt[:2], "adapter.layers.1.prefix_value": prompt[2:]}
        with plain.applied(own):
            want = plain.features({n: t[b : b + 1] for n, t in inputs.items()})
        torch.testing.assert_close(got[b : b + 1], want, rtol=0, atol=1e-12)


def test_the_penalty_is_over_all_components_and_moves_the_new_ones() -> None:
    built = model(VIT, {"name": "codaprompt", "length": 2, "blocks": "all", "components": 2, "mu": 0.5})
    params = {n: t.double() + 0.1 * drawn(*t.shape, seed=i) for i, (n, t) in enumerate(grown(built, 2).items())}
    want = 0.0
    for part in ("prompt", "key", "attention"):
        for block in range(2):
            rows = torch.cat([params[f"adapter.layers.{block}.coda_{part}.task{t}"].flatten(1) for t in range(2)])
            want += 0.5 * float((rows @ rows.T - torch.eye(4)).square().mean())
    assert float(built.loss(params, None)) == pytest.approx(want, rel=1e-12)  # type: ignore[arg-type]
    assert model(VIT, {"name": "codaprompt", "blocks": [0]}).loss(params, None) is None


def test_more_components_than_directions_are_refused_before_any_training() -> None:
    section = {"name": "codaprompt", "length": 2, "blocks": [0], "components": 9}
    with pytest.raises(ModelError, match=r"with task 1 there are 18 components .* features have 16: lower adapter.components"):
        prepare(tiny("server.aggregator=fedavg", "server.consolidator=none", adapter=section))


@pytest.mark.parametrize("options", [{"length": 3}, {"components": 0}, {"mu": -0.1}, {"blocks": []}])
def test_options_that_can_never_work(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        codaprompt.Adapter(**options)


def test_together_is_as_one_by_one_with_old_components() -> None:
    here = doubled(work(adapter="codaprompt", plan=RoundPlan(train=("*.task1", "head.*"))))
    params = {**here.jobs[0].params, **here.model.grown(here.jobs[0].params, torch.Generator())}
    params = {n: t.double() + 0.1 * drawn(*t.shape) for n, t in params.items()}
    here = replace(here, jobs=[replace(j, params=params) for j in here.jobs])
    got = here.together()
    assert not here.told
    require_same(got, here.one_by_one(), 1e-9)
    require_trained(got, here.jobs)


def test_a_run_keeps_old_components_and_sends_the_tasks_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up: k (P + 2) D numbers a block, head and task; down: in a task's first round its new components, later what was merged."""
    coda = {"name": "codaprompt", "length": 2, "blocks": "all", "components": 2, "mu": 0.1}
    config = tiny("server.aggregator=fedavg", "server.consolidator=none", output=tmp_path / "whole", adapter=coda)
    results, prepared = run(config), prepare(config)
    after = final_state(results.path, config)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", stopping(3))  # two rounds and the end of the first task
        with pytest.raises(KeyboardInterrupt):
            run(config, output=tmp_path / "stopped")
    before = final_state(tmp_path / "stopped", config).params
    first = [n for n in before if n.startswith("adapter.")]
    assert len(first) == 6 == len([n for n in after.params if n.endswith("task1")])
    for name in first:
        assert not torch.equal(before[name], prepared.state.params[name]), "trained in its task"
        assert torch.equal(before[name], after.params[name]), "kept in the next one"
    assert same_bits(learned(after), learned(final_state(run(resume=tmp_path / "stopped").path, config)))
    task_bytes, rounds = 2 * 2 * (2 + 2) * 16 * 4, 2
    sent, received = results.costs["bytes"]["up"]["adapter"], results.costs["bytes"]["down"]["adapter"]
    assert sent == rounds * int((prepared.manifest.sizes > 0).sum()) * task_bytes
    # the second task's first round brings the first one's components once more: they changed in the last merge
    assert received == 3 * task_bytes * (rounds + rounds + 1)
