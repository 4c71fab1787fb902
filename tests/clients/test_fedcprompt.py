"""The loss of Fed-CPrompt by hand, where it is nothing, and where there is nobody to stay away from."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.learners.fedcprompt import Learner
from fedsim.core import config as configs
from fedsim.core.contracts import Outputs
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate
from fedsim.simulation import prepare, run
from tests.clients.test_fused import work
from tests.clients.works import step_of
from tests.tiny import final_state, same_bits, tiny

OURS, COMMON, PAST = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def c2(features: torch.Tensor, last: bool, **options: Any) -> torch.Tensor | None:
    """Of own rows 0–2; rows 3 and 4 are replayed by somebody."""
    found: dict[str, torch.Tensor] = {"received": COMMON, "last": PAST}
    state = {"received": {"who": torch.tensor(0)}, "last": {"who": torch.tensor(1)} if last else None}
    names = {id(tensors): who for who, tensors in state.items()}
    step = step_of(
        features=features, labels=torch.zeros(5), own=slice(0, 3), model=lambda p: Outputs(found[names[id(p)]], torch.zeros(5, 2))
    )
    return Learner(**options).loss(state, step)


def test_the_triplet_by_hand() -> None:
    """The sum over the batch stands inside of the maximum."""
    near = sum(float(OURS[b, d] - COMMON[b, d]) ** 2 for b in range(3) for d in range(4))
    far = sum(float(OURS[b, d] - PAST[b, d]) ** 2 for b in range(3) for d in range(4))
    want = 1e3 * near - 1e1 * far + 1
    assert want > 0 and float(c2(OURS, True)) == pytest.approx(want, rel=1e-12)  # type: ignore[arg-type]
    assert float(c2(OURS, True, positive=1.0, weight=0.5)) == 0 == 0.5 * max(0.0, near - 10 * far + 1)  # type: ignore[arg-type]
    assert float(c2(OURS, False, weight=0.5)) == pytest.approx(500 * near, rel=1e-12)  # type: ignore[arg-type]


def test_contrast_by_hand() -> None:
    want = 0.0
    for b in range(3):
        near, far = (float(OURS[b] @ other[b] / (OURS[b].norm() * other[b].norm())) / 0.5 for other in (COMMON, PAST))
        want -= math.log(math.exp(near) / (math.exp(near) + math.exp(far))) / 3
    assert float(c2(OURS, True, kind="infonce")) == pytest.approx(want, rel=1e-12)  # type: ignore[arg-type]


def test_where_there_is_nothing_to_lose() -> None:
    """Where the features are the common ones and there is no past, and with weight 0."""
    assert float(c2(COMMON, False)) == 0  # type: ignore[arg-type]
    assert c2(OURS, False, kind="infonce") is None
    here = work()
    idle = replace(here, learners={"fedcprompt": Learner(weight=0.0)})
    for got, want in zip(idle.one_by_one(), here.one_by_one(), strict=True):
        assert isinstance(got, ClientUpdate) and isinstance(want, ClientUpdate)
        assert same_bits(got.params, want.params)


def test_the_last_tasks_model_comes_down_with_what_the_task_begins_with(tmp_path: Path) -> None:
    whole = ("server.aggregator=fedavg", "server.consolidator=none")
    plain, config = tiny(*whole, output=tmp_path), tiny(*whole, client={"learners": ["fedcprompt"]}, output=tmp_path)
    ours, theirs = run(config), run(plain)
    got, want = ours.costs["bytes"], theirs.costs["bytes"]
    assert got["down"].pop("context") == 0 and got == want
    assert not same_bits(final_state(ours.path, config).params, final_state(theirs.path, plain).params)


@pytest.mark.parametrize("options", [{"kind": "moon"}, {"weight": -1.0}, {"positive": -1.0}, {"temperature": 0.0}])
def test_options_that_can_never_work(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        configs.build("learners", {"name": "fedcprompt", **options})


def test_a_stream_of_one_task_has_no_last_task() -> None:
    with pytest.raises(ConfigError, match=r"learner fedcprompt .*one task"):
        prepare(tiny("stream.tasks=1", client={"learners": ["fedcprompt"]}))
