"""What a client sends of a scatter: in half the precision, of low rank, or its diagonal alone; against whole sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.statistics.class_moments import centred, low_rank
from fedsim.core.config import build
from fedsim.core.errors import ConfigError
from fedsim.core.rng import torch_stream
from fedsim.core.tensors import upper_triangle
from fedsim.simulation import run
from tests.tiny import final_state, tiny

CLASSES, WIDTH = 3, 6


def samples(count: int, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    draw = torch_stream(0, "low rank", count)
    labels = torch.arange(count) % CLASSES
    x = torch.randn(count, width, dtype=torch.float64, generator=draw)
    return x + 5.0 * torch.randn(CLASSES, width, dtype=torch.float64, generator=draw)[labels], labels


@pytest.mark.parametrize("count", [7, 40])  # fewer samples than features: from X Xᵀ; and more: from Xᵀ X
def test_directions_are_the_largest_eigenpairs_and_the_rest_completes_the_diagonal(count: int) -> None:
    x, y = samples(count, 9)
    counts, means, x = centred(x, y)
    assert counts.tolist() == y.bincount().tolist()
    scatter = x.T @ x
    values, vectors = torch.linalg.eigh(scatter)
    for rank in (0, 2, 4, 20):
        directions, rest = low_rank(x, rank, CLASSES)
        assert len(directions) == min(rank, 9, count - CLASSES)
        kept = vectors[:, 9 - len(directions) :]
        want = kept @ torch.diag(values[9 - len(directions) :]) @ kept.T
        torch.testing.assert_close(directions.T @ directions, want, rtol=0, atol=1e-9)
        torch.testing.assert_close(rest, (scatter - want).diagonal().clamp_min(0), rtol=0, atol=1e-9)
    torch.testing.assert_close(directions.T @ directions, scatter, rtol=0, atol=1e-9)  # as many as there are: all of it
    assert torch.allclose(means[0], samples(count, 9)[0][y == 0].mean(0))


FROZEN = (
    "adapter=none", "server.aggregator=frozen", "server.rounds=1", "server.consolidator=none",
    "head={name: random_features, size: 24}",
)  # fmt: skip
CLIENTS, TASKS, M, H = 3, 2, 24, 3  # every client of the split holds all three classes of a task
PLAIN = 4 * (H + H * M + M * (M + 1) // 2)  # counts, means, and the triangle
BYTES = {  # up, of a client and task
    "whole": ({}, PLAIN),
    "half": ({"precision": "bfloat16"}, PLAIN - 2 * (M * (M + 1) // 2)),
    "rank": ({"rank": 5}, 4 * (H + H * M + 5 * M + M)),
    "half rank": ({"rank": 5, "precision": "bfloat16"}, 4 * (H + H * M + M) + 2 * 5 * M),
    "means": ({"rank": 0}, 4 * (H + H * M + M)),
}
EXACT = {"all there is": ({"rank": 12 - H}, 4 * (H + H * M + (12 - H) * M + M))}  # of 12 samples


def state_of(folder: Path, name: str, **options: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """The calibrator's state at the end of a run, and bytes up."""
    more = {"penalties": [1.0]} if name == "ridge" else {}
    split = "partition={name: iid, clients: 3}"
    config = tiny(*FROZEN, f"server.calibrator={ {'name': name, **more, **options} }", split, output=folder)
    results = run(config)
    assert results.path is not None
    return final_state(Path(results.path), config).calibrator, results.costs["bytes"]["up"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The state of a run whose clients send Σ h hᵀ as it is."""
    return state_of(tmp_path_factory.mktemp("whole"), "ridge")[0]


@pytest.mark.parametrize(("name", "case"), [*(("ridge", case) for case in {**BYTES, **EXACT}), ("lda", "half"), ("lda", "rank")])
def test_what_travels_and_what_arrives(name: str, case: str, whole: dict[str, Any], tmp_path: Path) -> None:
    """Bytes are those of the small form; the state is Σ h hᵀ itself, or as much of it as was sent, with its own diagonal."""
    options, size = {**BYTES, **EXACT}[case]
    state, up = state_of(tmp_path, name, **options)
    assert up == {"statistics": CLIENTS * TASKS * size}
    errors = (state["gram"] - whole["gram"]).abs() / whole["gram"].abs().max()
    if case in ("whole", "all there is"):
        assert float(errors.max()) < 3e-7
    else:
        assert 1e-6 < float(errors.max()) < 0.01  # something was left out, or rounded
    diagonal = upper_triangle(torch.eye(M)).bool()
    assert float(errors[diagonal].max()) < (2.0**-8 if case == "half" else 3e-7)
    for form in ("count", "sum"):
        torch.testing.assert_close(state[form], whole[form], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ridge", "lda"])
def test_bad_options(name: str) -> None:
    for options, told in (({"precision": "float16"}, "precision .*float32, bfloat16"), ({"rank": -1}, "rank must be at least 0")):
        with pytest.raises(ConfigError, match=told):
            build("calibrators", {"name": name, **options})
    with pytest.raises(ConfigError, match="rank and precision are for the form within"):
        build("statistics", {"name": "class_moments", "form": "mean", "rank": 3})
