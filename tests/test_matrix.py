"""Every adapter and learner with every aggregator, consolidator and calibrator: it runs, or is refused in one clear line."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fedsim import matrix, simulation
from fedsim.core import plugins
from fedsim.core.errors import ConfigError, FedsimError, ModelError
from fedsim.matrix import NONE, Mix

MIXES = matrix.mixes()
PAGE = Path(__file__).parent.parent / "docs" / "methods.md"


def of(adapter: str, aggregator: str) -> Sequence[Mix]:
    return [m for m in MIXES if (m.adapter, m.aggregator) == (adapter, aggregator)]


@pytest.mark.parametrize("aggregator", plugins.names("aggregators"))
@pytest.mark.parametrize("adapter", plugins.names("adapters"))
def test_every_mix_runs_or_says_why_not(adapter: str, aggregator: str) -> None:
    """Whatever passes the checks before training ends with numbers: nothing is found out on the way."""
    for mix in of(adapter, aggregator):
        config = mix.config()
        try:
            parts = simulation.prepare(config)
        except (ConfigError, ModelError) as refused:
            told = str(refused)
            assert "\n" not in told, mix
            assert any(name in told for name in (adapter, aggregator, mix.consolidator, mix.calibrator)), (mix, told)
            continue
        del parts
        results = simulation.rehearse(config)
        assert results.accuracy.shape == (2, 2), mix
        assert np.isfinite(results.accuracy[1]).all(), mix
        assert np.isfinite(results.costs["bytes"]["up"].get("head", 0)), mix


def test_learners_take_turns_so_that_each_meets_every_part() -> None:
    for kind in ("adapter", "aggregator", "consolidator", "calibrator"):
        met = {(getattr(m, kind), m.learner) for m in MIXES}
        names = {getattr(m, kind) for m in MIXES}
        assert met == set(itertools.product(names, [NONE, *plugins.names("learners")])), kind


def test_most_parts_are_free_to_meet() -> None:
    """Merging rules, adapters and consolidators that merge go together, but for what needs LoRA pairs or sources."""
    for adapter, aggregator in itertools.product(("lora", "prefix", "vpt", "none"), ("fedavg", "fairavg", "variance_weighted")):
        assert Mix(adapter, aggregator, "mean").obstacle() is None
    with pytest.raises(FedsimError, match="LoRA"):
        simulation.prepare(Mix("prefix", "fedavg", "regmean").config())


def test_the_page_is_what_the_plugins_say() -> None:
    page = matrix.page()
    assert PAGE.read_text(encoding="utf-8") == page, "run `make docs`"
    counts = re.search(r"Of (\d+) mixes .* (\d+) run;", page)
    assert counts is not None
    readme = (PAGE.parent.parent / "README.md").read_text(encoding="utf-8")
    assert f"({counts[2]} of {counts[1]} mixes;" in readme
