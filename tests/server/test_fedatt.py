"""FedAtt: attention over clients by how far they went, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim import laws
from fedsim.core.config import build
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate, State, Tensors
from fedsim.core.rng import torch_stream
from fedsim.simulation import run
from server.aggregators.fairavg import Aggregator as FairAvg
from server.aggregators.fedatt import Aggregator as FedAtt
from tests.tiny import final_state, learned, same_bits, tiny

SHAPES = {"adapter.x.lora_A": (2, 5), "adapter.prompt": (2, 3, 4), "head.weight": (6, 4), "head.bias": (6,)}
K = 5


def draw(*address: str | int, shape: Sequence[int]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch_stream(8, "fedatt", *address))


def params() -> dict[str, Tensor]:
    return {n: draw(n, shape=s) for n, s in SHAPES.items()}


def clients(seed: int = 0, scale: float = 1.0) -> list[ClientUpdate]:
    own = [{n: t + scale * draw(seed, k, n, shape=t.shape) for n, t in params().items()} for k in range(K)]
    return [ClientUpdate(k, 3 + k, tensors) for k, tensors in enumerate(own)]


def merge(rule: FedAtt, updates: Sequence[ClientUpdate], start: Tensors | None = None) -> Tensors:
    start = params() if start is None else start
    return rule.combine(rule.init(start), start, updates, torch.Generator())[1]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ---------------------------------------------------------------- the step


@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), step=st.sampled_from([0.3, 1.0, 1.2]))
def test_a_merge_written_out(norm: str, seed: int, step: float) -> None:
    """numpy's norms, and a softmax as it is written."""
    updates = clients(seed)
    got = merge(FedAtt(step=step, norm=norm), updates)
    for name, old in params().items():
        w, own = old.numpy(), [u.params[name].numpy() for u in updates]
        order = 2 if norm == "spectral" and w.ndim == 2 else None
        distance = np.array([np.linalg.norm(w - x if w.ndim < 3 else (w - x).ravel(), ord=order) for x in own])
        alpha = np.exp(distance) / np.exp(distance).sum()
        want = w - step * sum(a * (w - x) for a, x in zip(alpha, own, strict=True))
        np.testing.assert_allclose(got[name].numpy(), want, rtol=0, atol=1e-12)


def test_by_hand() -> None:
    """w = 0; a client at (3, 4), distance 5, and one at (0, 5 − ln 3): odds 3 : 1, so 1.2·(¾·(3, 4) + ¼·(0, 5 − ln 3))."""
    near = 5 - float(np.log(3))
    updates = [ClientUpdate(k, 1, {"head.bias": torch.tensor(w, dtype=torch.float64)}) for k, w in enumerate(([3, 4], [0, near]))]
    got = merge(FedAtt(), updates, {"head.bias": torch.zeros(2, dtype=torch.float64)})["head.bias"]
    close(got, 1.2 * torch.tensor([2.25, 3 + near / 4], dtype=torch.float64))


def test_spectral_and_frobenius_norms_by_hand() -> None:
    """diag(3, 4) and diag(0, 4.5): the largest singular values are 4 and 4.5, the Frobenius norms 5 and 4.5."""
    own = [torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([3.0, 4.0], [0.0, 4.5])]
    updates = [ClientUpdate(k, 1, {"head.weight": w}) for k, w in enumerate(own)]
    start = {"head.weight": torch.zeros(2, 2, dtype=torch.float64)}
    for norm, distances in (("spectral", [4.0, 4.5]), ("frobenius", [5.0, 4.5])):
        alpha = torch.softmax(torch.tensor(distances, dtype=torch.float64), 0)
        want = alpha[0] * own[0] + alpha[1] * own[1]
        close(merge(FedAtt(step=1.0, norm=norm), updates, start)["head.weight"], want)


def test_identical_clients_move_by_the_step() -> None:
    """w⁺ = w + ε (w_i − w), whatever the distance."""
    one = clients()[0]
    for step in (0.5, 1.0, 1.2):
        got = merge(FedAtt(step=step), [replace(one, client_id=k) for k in range(K)])
        for name, old in params().items():
            close(got[name], old + step * (one.params[name] - old))


def test_equal_distances_and_a_whole_step_are_fairavg() -> None:
    """Clients at equal distance: the sign of every step is drawn anew, which keeps both norms of a single column and a vector."""
    start = {"head.weight": draw("column", shape=(7, 1)), "head.bias": draw("vector", shape=(7,))}
    away = {n: draw("away", n, shape=t.shape).abs() for n, t in start.items()}
    updates = []
    for k in range(K):
        own = {n: t + away[n] * draw("sign", k, n, shape=t.shape).sign() for n, t in start.items()}
        updates.append(ClientUpdate(k, 1 + 4 * k, own))
    _, want = FairAvg().combine({}, start, updates, torch.Generator())
    for norm in ("spectral", "frobenius"):
        got = merge(FedAtt(step=1.0, norm=norm), updates, start)
        for name in start:
            close(got[name], want[name])


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), shift=st.floats(-5, 5))
def test_attention_sums_to_one_in_every_tensor(seed: int, shift: float) -> None:
    """A whole step ends among the clients, number by number; and what is added to all of them and to w is added to the result."""
    updates = clients(seed)
    got = merge(FedAtt(step=1.0), updates)
    moved = [replace(u, params={n: t + shift for n, t in u.params.items()}) for u in updates]
    shifted = merge(FedAtt(step=1.0), moved, {n: t + shift for n, t in params().items()})
    for name in SHAPES:
        own = torch.stack([u.params[name] for u in updates])
        assert bool((got[name] <= own.amax(0) + 1e-12).all())
        assert bool((got[name] >= own.amin(0) - 1e-12).all())
        close(shifted[name], got[name] + shift, 1e-10)


def test_farther_clients_count_more_until_one_wins() -> None:
    """exp of a distance of a thousand is no number; the softmax takes the largest off first."""
    updates = clients()
    far = replace(updates[2], params={n: t + 1e4 * (t - params()[n]) for n, t in updates[2].params.items()})
    got = merge(FedAtt(step=1.0), [*updates[:2], far, *updates[3:]])
    for name in SHAPES:
        assert bool(torch.isfinite(got[name]).all())
        torch.testing.assert_close(got[name], far.params[name], rtol=1e-12, atol=1e-12)


def test_numbers_of_samples_do_not_count_but_having_none_does() -> None:
    many = [replace(u, num_samples=1000 * u.num_samples) if u.client_id == 1 else u for u in clients()]
    idle = ClientUpdate(9, 0, {n: t + 100 for n, t in params().items()})
    want = merge(FedAtt(), clients())
    for updates in (many, [*clients(), idle]):
        assert same_bits(dict(merge(FedAtt(), updates)), dict(want))


def test_what_nobody_trained_stays() -> None:
    heads = [replace(u, params={"head.bias": u.params["head.bias"]}) for u in clients()]
    got = merge(FedAtt(noise=0.1), heads)
    assert all(torch.equal(got[n], t) for n, t in params().items() if n != "head.bias")
    assert list(got) == list(params())


@dataclass(frozen=True)
class WholeStep(FedAtt):
    """Held against the laws from which only a step other than 1 is exempt."""

    exempt: ClassVar[Mapping[str, str]] = {"weights": FedAtt.exempt["weights"]}


def test_a_whole_step_keeps_the_laws_that_a_longer_one_cannot() -> None:
    assert [r.name for r in laws.check("aggregators", WholeStep(step=1.0)) if not r.ok] == []
    assert [r.name for r in laws.check("aggregators", WholeStep(step=1.2)) if not r.ok] == ["fixed_point", "one_client"]


# ---------------------------------------------------------------- noise


def test_noise_has_its_size_and_is_independent() -> None:
    """N(0, σ²): the standard deviation of 60 000 numbers is σ up to 2 %; tensors, merges and seeds are uncorrelated."""
    start = {n: torch.zeros(300, 200, dtype=torch.float64) for n in ("adapter.a", "adapter.b")}
    rule, updates = FedAtt(noise=0.5), [ClientUpdate(0, 1, start)]
    merges = [rule.combine({}, start, updates, torch_stream(*address))[1] for address in ((0, 0), (0, 1), (1, 0))]
    draws = [merged[n].flatten() for merged in merges for n in start]
    correlation = torch.corrcoef(torch.stack(draws))
    assert all(d.std().item() == pytest.approx(0.5, rel=0.02) for d in draws)
    assert all(d.mean().abs() < 0.01 for d in draws)
    assert float((correlation - torch.eye(len(draws))).abs().max()) < 0.02


def test_noise_is_what_the_generator_gives() -> None:
    """The same generator gives the same bits, in whatever order an update names its tensors; zero adds nothing and draws
    nothing."""
    rule, updates = FedAtt(noise=1e-3), clients()
    turned = [replace(u, params=dict(reversed(u.params.items()))) for u in updates]
    noisy, again = (rule.combine({}, params(), u, torch_stream(3, "draw"))[1] for u in (updates, turned))
    assert same_bits(noisy, again)
    unused = torch_stream(3, "draw")
    quiet = FedAtt().combine({}, params(), updates, unused)[1]
    assert torch.equal(unused.get_state(), torch_stream(3, "draw").get_state())
    want = torch_stream(3, "draw")
    for name, tensor in params().items():
        close(noisy[name] - quiet[name], 1e-3 * torch.randn(tensor.shape, dtype=torch.float64, generator=want), 1e-14)


@dataclass(frozen=True)
class Watched(FedAtt):
    """Writes down the noise of every merge."""

    seen: ClassVar[list[Tensor]] = []

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        state, merged = super().combine(state, params, updates, draw)
        quiet = FedAtt().combine({}, params, updates, torch.Generator())[1]
        self.seen.append(merged["head.weight"].double() - quiet["head.weight"].double())
        return state, merged


def test_runs_of_two_seeds_have_two_noises_and_of_one_seed_one(tmp_path: Path) -> None:
    """In every task and round another one: eight noises, of which no two are the same but those of the same seed."""
    noises = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        Watched.seen.clear()
        run(tiny("server.consolidator=none", f"seed={seed}", output=tmp_path / name), aggregator=Watched(noise=0.5))
        noises.append(list(Watched.seen))
    assert [len(seen) for seen in noises] == [4, 4, 4]
    assert all(torch.equal(a, b) for a, b in zip(noises[0], noises[1], strict=True))
    apart = torch.pdist(torch.stack([*noises[0], *noises[2]]).flatten(1)) / noises[0][0].numel() ** 0.5
    assert float((apart - 0.5 * 2**0.5).abs().max()) < 0.2  # of two independent ones, each number differs by √2 σ


def test_a_noisy_run_repeats_to_the_bit(tmp_path: Path) -> None:
    """And ends elsewhere than one without noise."""
    config = [
        tiny("server.aggregator={name: fedatt, noise: 1.0e-3}", "server.consolidator=none", output=tmp_path / d) for d in "ab"
    ]
    states = [final_state(run(c).path, c) for c in config]
    assert same_bits(learned(states[0]), learned(states[1]))
    quiet = tiny("server.aggregator=fedatt", "server.consolidator=none", output=tmp_path / "c")
    assert not same_bits(dict(final_state(run(quiet).path, quiet).params), dict(states[0].params))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "spectrl"}, "norm 'spectrl' is unknown. Did you mean 'spectral'"),
        ({"step": 0.0}, "step must be positive, got 0.0"),
        ({"noise": -0.1}, "noise must not be negative, got -0.1"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("aggregators", {"name": "fedatt", **options})
