"""Parts that do not suit each other are refused before training, in one line that says what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedsim.core.config import SimConfig
from fedsim.core.errors import ConfigError
from fedsim.core.events import Event, RoundDone
from fedsim.simulation import prepare, rehearse, run
from server import sampling
from tests.tiny import tiny


def events_of(config: SimConfig, folder: Path) -> list[Event]:
    """What a run tells."""
    events: list[Event] = []
    run(config, output=folder, progress=events.append)
    return events


COLLECT = ("adapter=apt", "head=mixture", "server.rounds=1", "server.aggregator=collect", "server.consolidator=compose")
PRIVATE = ("server.aggregator=fairavg", "server.consolidator=none", "server.channel=[{name: clip_noise, clip: 1, noise: 1}]")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            [*COLLECT, "server.rounds=2"],
            r"collect takes one round .* server\.rounds is 2: .* client\.epochs",
        ),
        ([*COLLECT, "adapter=vpt"], r"collect composes clients at inference, which adapter vpt cannot: use adapter: apt"),
        ([*COLLECT, "server.consolidator=none"], "collect hands on one module per client, which consolidator none cannot keep"),
        ([*COLLECT, "server.calibrator=ccvr"], "no common one for calibrator ccvr to repair"),
        (
            [*COLLECT, "server.aggregator=fedavg"],
            "head mixture composes .* but aggregator fedavg merges .* use aggregator: collect",
        ),
        (
            ["server.aggregator=[{match: 'head.*', name: fedavg}, {match: '*', name: collect}]"],
            "collect keeps every client's tensors by themselves, so it cannot be one of a list",
        ),
        (["server.consolidator=dolfin"], r"lorm trains \*\.lora_A, head\.\* in round 1 .* dolfin .* freezes adapter\.\*\.lora_A"),
        (
            ["server.aggregator={name: merged, rule: regmean, pairs: products}", "server.consolidator=dolfin"],
            r"merged asks for the statistic gram of whole LoRA pairs, but .* dolfin freezes .*lora_A': set pairs: factors",
        ),
        (
            ["server.aggregator=fedavg", "server.consolidator=dolfin", "server.calibrator=hgp"],
            "dolfin keeps the head's rows of old tasks as they are, which calibrator hgp trains: let that",
        ),
        (
            ["client.learners=[square, {name: square, kappa: 3}]"],
            "client.learners.1: 'square' is there already: name a learner once",
        ),
        (["client.learners=[er, square]"], "er and learner square both take the place of the cross-entropy, .* choose one"),
        ([*PRIVATE, "client.learners=[scaffold]"], "clip_noise does not cover the statistic 'scaffold', which clients send"),
        (
            [*PRIVATE, "client.learners=[ewc]"],
            "clip_noise does not cover the statistic 'fisher', which clients send",
        ),  # of what moved
        ([*PRIVATE, "server.calibrator=nearest_mean"], "clip_noise does not cover the statistic 'class_moments'"),
        (
            [*COLLECT, "server.unlearning=true"],
            "collect keeps what every client becomes by itself, .*server.unlearning.* leave that out",
        ),
        ([*COLLECT, "head=linear"], "aggregator collect keeps a head per client, of which head linear .* use head: mixture"),
        (
            ["head=mixture"],
            "head mixture composes a head per client, but aggregator lorm merges .* or head: linear",
        ),
        (["head=cosine", "server.calibrator=hgp"], "calibrator hgp draws features and trains .* which head cosine has not: use"),
        (
            ["head=cosine", "server.aggregator=regmean"],
            r"aggregator regmean merges head\.weight by Grams, but head cosine is no linear map .* name: fedavg",
        ),
        (["adapter=prefix"], "merges pairs of LoRA factors and 'adapter.layers.0.prefix_key' is none"),
        (["server.without=[5]"], r"server\.without names client 5, but there are clients 0 to 2"),
    ],
)
def test_refused_before_training(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        prepare(tiny(*overrides))
    assert "\n" not in str(refused.value)


PRODUCTS = "server.aggregator={name: merged, rule: mean, pairs: products}"
CHAIN = "server.aggregator={name: merged, rule: chain_of_merges}"
SPARSE = "server.channel=[{name: topk, share: 0.1, feedback: %s}]"


@pytest.mark.parametrize(
    "keeps",
    [
        "client.learners=[ewc]",
        "client.learners=[si]",
        "client.learners=[scaffold]",
        "server.consolidator=coma",
        "server.consolidator=cofima",
        SPARSE % "true",
    ],
)
def test_numbers_for_every_factor_need_factors_that_last(keeps: str) -> None:
    """An SVD gives a product that hardly moved other factors: signs and places of directions change."""
    told = r"keeps (numbers|a residual) for every factor .* aggregator merged gives its product other factors in every round"
    with pytest.raises(ConfigError, match=told):
        prepare(tiny("server.consolidator=none", PRODUCTS, keeps))
    for rule in ("server.aggregator=fedavg", CHAIN):  # the one keeps factors; the other gives those nearest to the ones before
        prepare(tiny("server.consolidator=none", rule, keeps))


def test_a_residual_does_not_outlast_the_pair_that_it_belongs_to() -> None:
    with pytest.raises(ConfigError, match=r"topk keeps a residual .* aggregator flora gives .* feedback: false"):
        prepare(tiny("server.consolidator=none", "server.aggregator=flora", SPARSE % "true"))
    for rule in (PRODUCTS, "server.aggregator=flora"):
        prepare(tiny("server.consolidator=none", rule, SPARSE % "false"))


def test_a_class_that_nobody_holds_enough_of_is_refused_with_a_calibrator() -> None:
    """12 samples of a class over 36 clients: every client has one at most, which has no spread; pooled they have one."""
    spread = ("partition={name: iid, clients: 36, min_samples: 1}", "server.aggregator=fedavg", "server.consolidator=none")
    with pytest.raises(ConfigError, match=r"hgp makes the head's rows of what clients tell .* of \d of 6 classes .* nobody"):
        prepare(tiny(*spread, "server.calibrator=hgp"))
    prepare(tiny(*spread, "server.calibrator=ccvr"))  # pools


def test_a_calibrator_of_the_current_task_goes_with_frozen_heads() -> None:
    ccvr = "server.calibrator={name: ccvr, classes: task}"
    found = rehearse(tiny("server.aggregator=fedavg", "server.consolidator=dolfin", ccvr))
    assert np.isfinite(found.accuracy[1]).all()


def test_without_leaves_all_others_when_they_would_have_taken_part() -> None:
    for task, round in ((0, 0), (0, 1), (3, 2)):
        drawn = sampling.draw(7, task, round, 20, 0.3)
        assert sampling.draw(7, task, round, 20, 0.3, without=[drawn[1], 99]) == [c for c in drawn if c != drawn[1]]
    with pytest.raises(ConfigError, match=r"task 0, round 0: server\.without leaves nobody"):
        sampling.draw(7, 0, 0, 20, 0.05, without=sampling.draw(7, 0, 0, 20, 0.05))


def test_rounds_in_which_nobody_is_left_are_found_before_training() -> None:
    with pytest.raises(ConfigError, match=r"task \d, round \d: server\.without leaves nobody"):
        prepare(tiny("server.without=[0, 1]", "server.participation=0.34", "server.rounds=6"))


def test_a_client_that_is_left_out_is_nowhere_in_the_run(tmp_path: Path) -> None:
    from tests.test_unlearning import finished

    found = finished(tmp_path, "server.without=[1]", "server.unlearning=true", "server.aggregator=fedavg")
    assert not found.dir.vectors(0, "client-1").exists()
    assert found.dir.vectors(0, "client-0").is_file()
    assert all(1 not in found.participants(task) for task in found.tasks)


def test_a_rehearsal_plays_the_whole_run_or_its_first_rounds_and_keeps_nothing(tmp_path: Path) -> None:
    config = tiny(output=tmp_path)
    whole, first = rehearse(config), rehearse(config, rounds=1)
    assert whole.accuracy.shape == (2, 2)
    assert {(r.task, r.round) for r in first.rows} == {(0, 0)}
    assert not list(tmp_path.iterdir())


def test_tasks_of_a_single_class_are_said(tmp_path: Path) -> None:
    """The loss of such a round is 0, and nothing moves; with the square loss it is not."""
    alone = (
        "stream.tasks=null",
        "stream.classes_per_task=1",
        "stream.order=[0,1]",
        "server.aggregator=fedavg",
        "server.consolidator=none",
    )
    parts = prepare(tiny(*alone))
    assert parts.notes == (
        "2 of 2 tasks have a single class ('task 0' first): the cross-entropy over a task's own classes is 0 there and trains "
        "nothing. Use more classes per task, client.learners: [square], or a calibrator",
    )
    assert [e.loss for e in events_of(tiny(*alone), tmp_path / "a") if isinstance(e, RoundDone)] == [0.0] * 4
    for other in ("client.learners=[square]", "server.calibrator=ccvr", "stream.classes_per_task=2"):
        assert prepare(tiny(*alone, other)).notes == ()
    assert all(
        e.loss > 0 for e in events_of(tiny(*alone, "client.learners=[square]"), tmp_path / "b") if isinstance(e, RoundDone)
    )
    some = prepare(tiny("stream.tasks=null", "stream.classes_per_task=5")).notes
    assert len(some) == 1
    assert some[0].startswith("1 of 2 tasks have a single class ('task 1' first)")
