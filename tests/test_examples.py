"""The examples, run."""

from __future__ import annotations

import math

import pytest

from examples import private


def test_private_prints_what_privacy_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """Three noise levels: chance is 25 %, ε = R / 2z² + 2 (R / 2z² · ln 10⁵)^½ with R = 4 rounds."""
    private.main()
    lines = capsys.readouterr().out.splitlines()
    found = [(float(line.split()[3]), float(line.split()[-1])) for line in lines]
    accuracies, epsilons = zip(*found, strict=True)
    assert accuracies[0] > accuracies[1] > accuracies[2] and accuracies[0] > 60
    rhos = [4 / 2 / z**2 for z in (1.0, 4.0)]
    assert epsilons == pytest.approx([math.inf, *(rho + 2 * math.sqrt(rho * math.log(1e5)) for rho in rhos)], abs=0.005)
