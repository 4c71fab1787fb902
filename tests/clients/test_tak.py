"""Kronecker factors and the penalty of TAK: against the Kronecker product, automatic differentiation, the Jacobian, and runs."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.learners.tak import Learner, penalty
from clients.samples import Samples
from clients.statistics.kfac import Statistic
from clients.work import Work
from fedsim.core.config import SimConfig
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientJob, RoundPlan, Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.tensors import from_upper_triangle, upper_triangle
from fedsim.core.work import ArraySplit
from fedsim.models import model as models
from fedsim.simulation import run
from tests.tiny import final_state, plain_vit, same_bits, tiny

TANGENT = {"name": "tangent", "targets": "all-linear", "rank": 2}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch_stream(0, "kfac", *shape))


def spd(size: int) -> Tensor:
    return draw(size, size + 2) @ draw(size, size + 2).T


def close(got: Tensor, want: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- the penalty


def test_the_penalty_is_that_of_the_kronecker_product() -> None:
    """vec(Δ)ᵀ (Q ⊗ P) vec(Δ), rows one after the other; of factors without their product; its gradient is 2 Q Δ P; 0 at 0."""
    p, q, left, right = spd(5), spd(4), draw(4, 2), draw(2, 5)
    delta = (left @ right).requires_grad_()
    flat = delta.detach().flatten()
    want = flat @ torch.kron(q, p) @ flat
    close(penalty((delta,), p, q), want)
    close(penalty((left, right), p, q), want)
    (gradient,) = torch.autograd.grad(penalty((delta,), p, q), delta)
    close(gradient, 2 * q @ delta.detach() @ p)
    assert float(penalty((torch.zeros(4, 2).double(), right), p, q)) == 0


def test_clients_of_a_round_share_the_matrices_which_go_with_what_was_told() -> None:
    """Unpacked once, equal ones together; other numbers of the same shape are others; nothing is held when the round is over."""
    triangles = {
        "inputs/adapter.q": spd(4),
        "inputs/adapter.k": spd(4),
        "outputs/adapter.q": draw(4, 4),
        "outputs/adapter.k": spd(3),
    }
    told = {n: upper_triangle(t + t.T) for n, t in triangles.items()}
    work: Any = None
    begun = [Learner().begin(work, {}, {"own": told}, torch.Generator())["factors"] for _ in range(2)]
    for layer in ("adapter.q", "adapter.k"):
        for place, form in enumerate(("inputs", "outputs")):
            first, second = (factors[layer][place] for factors in begun)
            assert first is second and torch.equal(first, triangles[f"{form}/{layer}"] + triangles[f"{form}/{layer}"].T)
    assert begun[0]["adapter.q"][0] is begun[0]["adapter.k"][0] is not begun[0]["adapter.q"][1]
    left = weakref.ref(begun[0]["adapter.q"][0])
    del begun, told, first, second
    gc.collect()
    assert left() is None


# ---------------------------------------------------------------- the statistic


def work_of(config: SimConfig, shard: Any) -> tuple[Work, Tensors]:
    model = models.build(config, 6)
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8)).astype(np.uint8)
    samples = Samples(ArraySplit({"pixel_values": images}, np.zeros(12, np.int64)), torch.device("cpu"))
    params = model.init_adapter(torch.Generator().manual_seed(0)) | model.init_head()
    params = {n: t + 0.1 for n, t in params.items()}  # a module that does something: it must not be seen
    job = ClientJob(0, 0, 0, params, RoundPlan(train=()))
    return Work.of(model, samples, np.asarray(shard), (0, 1, 2), job, config), params


def test_factors_are_those_of_the_bare_backbones_jacobian() -> None:
    """One sample by one: inputs by a hook, Jacobians by automatic differentiation of the rest of the network."""
    config = tiny(model=plain_vit())
    work, params = work_of(config, range(3))
    subject = "adapter.layers.1.mlp.fc1.lora_A"
    sent = Statistic(exact=True).measured(work, params, [subject])
    layer, inputs, outputs = work.model.layer(subject), torch.zeros(16, 16).double(), torch.zeros(32, 32).double()
    rows = 0
    for n in range(3):
        batch, seen = work.samples.batch(np.array([n]))[0], list[Tensor]()
        hook = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
        work.model.query(batch)
        hook.remove()
        inputs += seen[0][0].double().T @ seen[0][0].double()
        rows += seen[0].shape[1]

        def features(out: Tensor, batch: Tensors = batch) -> Tensor:
            hook = layer.register_forward_hook(lambda *_: out)
            found = work.model.query(batch)
            hook.remove()
            return found[0]

        jacobian_DtO = torch.autograd.functional.jacobian(features, layer(seen[0]).detach())[:, 0].double()
        outputs += torch.einsum("dto,dtp->op", jacobian_DtO, jacobian_DtO)
    close(from_upper_triangle(sent[f"inputs/{subject}"]), inputs, 1e-4)
    close(from_upper_triangle(sent[f"outputs/{subject}"]), outputs, 1e-4)
    assert sent[f"rows/{subject}"] == rows == 3 * 5


def test_drawn_directions_estimate_the_exact_ones_and_are_a_clients_own() -> None:
    work, params = work_of(tiny(model=plain_vit()), np.zeros(300, np.int64))
    subject = "adapter.layers.1.mlp.fc2.lora_A"
    rule = Statistic().for_client(torch.Generator().manual_seed(1))
    drawn, exact = (s.measured(work, params, [subject])[f"outputs/{subject}"] for s in (rule, Statistic(exact=True)))
    assert float((drawn - exact).norm() / exact.norm()) < 0.2
    other = Statistic().for_client(torch.Generator().manual_seed(2)).measured(work, params, [subject])
    assert not torch.equal(other[f"outputs/{subject}"], drawn)


def test_factors_of_clients_add_up() -> None:
    subject, config = "adapter.layers.0.attention.q_proj.lora_A", tiny(model=plain_vit())
    parts = [Statistic(exact=True).measured(*work_of(config, shard), [subject]) for shard in (range(4), range(4, 9), range(9))]
    for name, whole in parts[2].items():
        close(parts[0][name] + parts[1][name], whole, 1e-4)


@pytest.mark.parametrize("adapter", [{"name": "lora", "rank": 2, "targets": "all-linear", "alpha": 4.0}, TANGENT,
                                     {"name": "tangent", "targets": [], "full_blocks": 1}])  # fmt: skip
def test_changes_of_weights_are_what_the_adapter_adds(adapter: dict[str, Any]) -> None:
    """Features with the changes written into the backbone's weights, to the first order for tangents."""
    config = tiny(model=plain_vit(), adapter=adapter, client={"learners": []})
    work, params = work_of(config, range(2))
    step = 1.0 if adapter["name"] == "lora" else 1e-3
    moved = {n: step * torch.randn(t.shape, generator=torch_stream(0, n)) for n, t in params.items() if n.startswith("adapter.")}
    moved = {n: 0 * t if n.endswith("bias") or t.dim() == 1 else t for n, t in moved.items()}
    batch = work.samples.batch(np.arange(2))[0]
    with work.model.merged(moved):
        want = work.model.query(batch)
    changes = work.changes(moved)
    assert len(changes) == (12 if not adapter.get("full_blocks") else 6)
    for name, change in changes.items():
        work.model.layer(f"{name}.x").weight.data += torch.linalg.multi_dot(change) if len(change) == 2 else change[0]
    torch.testing.assert_close(work.model.query(batch), want, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- runs


def tak(output: Path, learner: dict[str, Any] | None = None, **sections: Any) -> SimConfig:
    learners = [] if learner is None else [{"name": "tak", **learner}]
    server = {"aggregator": "fedavg", "consolidator": "mean", "rounds": 1}
    return tiny(output=output, model=plain_vit(), server=server, **{"client": {"learners": learners}, **sections})


def test_lambda_0_is_a_run_without(tmp_path: Path) -> None:
    plain, none = (tak(tmp_path / str(k), learner) for k, learner in enumerate((None, {"lam": 0.0})))
    states = [final_state(run(c).path, c) for c in (plain, none)]
    assert same_bits(dict(states[0].params), dict(states[1].params)) and states[0].bytes == states[1].bytes


@pytest.mark.parametrize("adapter", [None, TANGENT])
def test_the_penalty_shrinks_what_the_module_does_to_past_tasks(adapter: dict[str, Any] | None, tmp_path: Path) -> None:
    """The second task's penalty, by the factors of the first, is smaller the larger λ; and the bytes are the triangles'."""
    sections = {} if adapter is None else {"adapter": adapter}
    sizes, states = [], []
    for lam in (1e-9, 1e3):
        config = tak(tmp_path / str(lam), {"lam": lam}, **sections)
        state = final_state(run(config).path, config)
        kept = state.learners["tak"]
        work, _ = work_of(config, range(2))
        changes = work.changes(state.params)
        p = {n: from_upper_triangle(t) / kept["rows"][n] for n, t in kept["inputs"].items()}
        q = {n: from_upper_triangle(t) for n, t in kept["outputs"].items()}
        sizes.append(sum(float(penalty([c.double() for c in change], p[n], q[n])) for n, change in changes.items()))
        states.append(state)
    assert 0 < sizes[1] < 0.9 * sizes[0], sizes
    triangle = [n * (n + 1) // 2 for n in (16, 32)]
    inputs, outputs = 2 * (3 * triangle[0] + triangle[1]), 2 * (5 * triangle[0] + triangle[1])  # queries, keys and values once
    rows = 1  # all equal
    assert states[0].bytes["up"]["statistics"] == 4 * 2 * 3 * (inputs + outputs + rows)
    told = 2 * (5 * triangle[0] + triangle[1]) + outputs
    assert states[0].bytes["down"]["context"] == 4 * 3 * told


def test_bad_input_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lam must not be negative"):
        Learner(lam=-1.0)
    for sections, line in (
        ({"adapter": {"name": "vpt", "length": 2}}, "says of none: use adapter: lora or tangent"),
        ({"server": {"consolidator": "none", "aggregator": "fedavg"}}, "goes on with the same one: use consolidator: mean"),
    ):
        with pytest.raises(ConfigError, match=line):
            run(
                tiny(
                    output=tmp_path,
                    model=plain_vit(),
                    **{"client": {"learners": ["tak"]}, "server": {"aggregator": "fedavg", "consolidator": "mean"}, **sections},
                )
            )
