"""Every plug-in that comes with fedsim keeps the laws of its kind. A new file is found without a line here."""

from __future__ import annotations

import pytest

from fedsim import laws
from fedsim.core import plugins

ELSEWHERE = ("aggregators",)  # tests/server/test_aggregators.py
ALONE = {"pools": ["serial"], "trackers": ["tensorboard"]}  # of what starts processes; tests of the kind play the others
LAWFUL = (
    "adapters", "calibrators", "channels", "consolidators", "heads", "learners", "merging", "partitions", "pools", "sources",
    "statistics", "trackers",
)  # fmt: skip
FROM_FILES = ("huggingface", "npz", "text")  # sources of data that the tests of the kind bring along


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in LAWFUL for name in ALONE.get(kind, plugins.names(kind)) if name not in FROM_FILES]
)
def test_it_keeps_the_laws(kind: str, name: str) -> None:
    broken = [r for r in laws.check_named(kind, name) if not r.ok]
    assert not broken, "\n".join(f"{kind} {name}, {r.name}: {r.explanation}" for r in broken)


@pytest.mark.parametrize("kind", LAWFUL + ELSEWHERE)
def test_every_law_has_its_own_name_and_a_statement(kind: str) -> None:
    found = laws.laws_of(kind)
    assert len({law.name for law in found}) == len(found)
    assert all(len(law.statement) > 20 for law in found)
