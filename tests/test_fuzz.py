"""The fuzzers of `tests/fuzz.py`, a few cases of each: always the same ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests import fuzz

BOUNDED = settings(derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@settings(BOUNDED, max_examples=500)
@given(fuzz.cases())
def test_what_is_given_is_found_again_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, case: fuzz.Case) -> None:
    fuzz.check(case, tmp_path_factory.getbasetemp())


@settings(BOUNDED, max_examples=100)
@given(fuzz.small_runs())
def test_a_run_is_prepared_or_refused_in_one_line(layer: dict[str, Any]) -> None:
    fuzz.check_prepare(layer)


def test_the_oracle_sees_what_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A door that drops a key, one that rounds, and one that says two lines."""
    case = fuzz.Case("mapping", (("client.lr", 0.25),))
    assert fuzz.check(case, tmp_path).client.lr == 0.25  # type: ignore[union-attr]
    real = fuzz.configs.compose
    monkeypatch.setattr(fuzz.configs, "compose", lambda layers: real(layers[:1]))
    with pytest.raises(AssertionError, match=r"client\.lr: 0\.25 became 0\.01"):
        fuzz.check(case, tmp_path)
    monkeypatch.setattr(fuzz.configs, "compose", lambda layers: real([*layers, {"client.lr": 0.2}]))
    with pytest.raises(AssertionError, match=r"client\.lr: 0\.25 became 0\.2"):
        fuzz.check(case, tmp_path)
