"""Every family of backbones with every adapter: it works, or is refused before training in a line that says which one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsim.core import plugins
from fedsim.laws.adapters import features
from tests.models import conformance
from tests.models.conformance import model, suggested, verdict
from tests.models.families import FAMILIES, batch

PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_works_or_says_which_one_does(family: str) -> None:
    verdicts = {adapter: verdict(family, adapter) for adapter in plugins.names("adapters")}
    for adapter, found in verdicts.items():
        if found.refused is not None:
            instead = suggested(found.refused)
            assert adapter in found.refused, found.refused
            assert instead, f"{found.refused}: which adapter works is not said"
            assert all(verdicts[other].refused is None for other in instead), found.refused


@pytest.mark.parametrize("family", FAMILIES)
def test_going_on_from_a_block_gives_what_the_whole_gives(family: str) -> None:
    """What is kept of frozen blocks is used where blocks are a chain, and there to the same bits."""
    built, inputs = model(family, "none"), batch(FAMILIES[family])
    count = built.untouched_blocks({})
    if not count or not built.enterable(inputs):
        return
    with torch.no_grad():
        for below in range(1, count):
            states = built.lower_states(inputs, below)
            assert torch.equal(built.upper_asked(inputs, states, below).features, features(built, inputs)), below


def test_the_page_is_what_was_found() -> None:
    assert PAGE.read_text(encoding="utf-8") == conformance.page(), "run `make tables`"
