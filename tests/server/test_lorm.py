"""LoRM against brute-force least squares in float64 (oracles O1 to O5 of the method's sheet), and against the
reference's equations over a whole stream.

The systems are stacked row by row and handed to numpy: with the decayed Gram Ĝ = α G + (1 − α) diag(G), a client's rows are
√α·x for every input x and √(1 − α)·√g_j·e_j for every feature j, since the sum of their outer products is Ĝ.

Shapes: K clients, N rows, O outputs, I inputs, R rank, C classes, D features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.core.errors import AggregationError, ConfigError
from fedsim.core.messages import ClientUpdate, RoundPlan, Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.tensors import matching, stack_modules, upper_triangle
from server.aggregators.lorm import Aggregator as Lorm
from server.consolidators.regmean import Consolidator as RegMean

K, O, I, R, C, D = 4, 5, 7, 3, 6, 4  # noqa: E741
A, B = "adapter.layer.lora_A", "adapter.layer.lora_B"
DECAYS = [0.0, 0.5, 1.0]


def draw(*shape: int, address: str) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch_stream(2, "lorm", address))


@dataclass(frozen=True)
class Client:
    x_NI: Tensor  # inputs of the layer
    f_ND: Tensor  # inputs of the head
    own: Tensors  # what it trained


def params() -> dict[str, Tensor]:
    return {
        A: draw(R, I, address="A"),
        B: draw(O, R, address="B"),
        "head.weight": draw(C, D, address="H"),
        "head.bias": draw(C, address="b"),
    }


def clients(rows: int = 20) -> list[Client]:
    out = []
    for k in range(K):
        own = {n: t + draw(*t.shape, address=f"{n}{k}") for n, t in params().items()}
        n = rows + 2 * k
        out.append(Client((1 + k) * draw(n, I, address=f"x{k}") + 0.5, draw(n, D, address=f"f{k}") - 0.3, own))
    return out


def decayed(x: Tensor, decay: float) -> Tensor:
    return decay * x.T @ x + (1 - decay) * torch.diag((x**2).sum(0))


def decayed_rows(x: Tensor, decay: float) -> Tensor:
    """Rows whose Gram is the decayed one."""
    return torch.cat([decay**0.5 * x, (1 - decay) ** 0.5 * torch.diag((x**2).sum(0).sqrt())])


def update(k: int, client: Client, phase: str, rule: Lorm) -> ClientUpdate:
    """What a client sends in a round; every form of every statistic, of which the rule takes what it asks for."""
    gram, head = decayed(client.x_NI, rule.decay), decayed(client.f_ND, rule.head_decay)
    a = params()[A]
    grams = {
        f"gram.diagonal/{A}": gram.diagonal(),
        f"gram.full/{A}": upper_triangle(gram),
        f"gram.projected/{B}": a @ gram @ a.T,
        f"gram.cross/{B}": a @ gram,
        "gram.full/head.weight": upper_triangle(head),
        "gram.diagonal/head.weight": head.diagonal(),
    }
    sent = {
        f"{r.name}.{r.options['form']}/{s}" for r in rule.plan({}, "BA".index(phase)).statistics for s in grams_subjects(r.match)
    }
    trained = {A if phase == "A" else B, "head.weight", "head.bias"}
    own = {n: t for n, t in client.own.items() if n in trained}
    return ClientUpdate(k, len(client.x_NI), own, {n: t for n, t in grams.items() if n in sent})


def grams_subjects(match: tuple[str, ...]) -> list[str]:
    return [n for n in (A, B, "head.weight") if any(n.endswith(m.removeprefix("*")) for m in match)]


def merge(rule: Lorm, phase: str, who: list[Client]) -> Tensors:
    return rule.combine({}, params(), [update(k, c, phase, rule) for k, c in enumerate(who)], torch.Generator())[1]


def brute_force_b(who: list[Client], decay: float) -> Tensor:
    """argmin_B Σ ‖(B − B_i) A X_i‖²: one row (A x)ᵀ Bᵀ = (A x)ᵀ B_iᵀ per input."""
    rows = [decayed_rows(c.x_NI, decay) @ params()[A].T for c in who]
    right = [z @ c.own[B].T for z, c in zip(rows, who, strict=True)]
    return torch.from_numpy(np.linalg.lstsq(torch.cat(rows).numpy(), torch.cat(right).numpy(), rcond=None)[0].T)


def brute_force_a(who: list[Client], decay: float) -> Tensor:
    """argmin_A Σ ‖B (A − A_i) X_i‖²: (xᵀ ⊗ B) vec(A) = B A_i x per input, columns stacked in vec."""
    b = params()[B].numpy()
    left = [np.kron(x[None], b) for c in who for x in decayed_rows(c.x_NI, decay).numpy()]
    right = [b @ c.own[A].numpy() @ x for c in who for x in decayed_rows(c.x_NI, decay).numpy()]
    solution = np.linalg.lstsq(np.concatenate(left), np.concatenate(right), rcond=None)[0]
    return torch.from_numpy(solution.reshape(I, R).T)


def brute_force_head(who: list[Client], decay: float) -> Tensor:
    rows = [decayed_rows(c.f_ND, decay) for c in who]
    right = [z @ c.own["head.weight"].T for z, c in zip(rows, who, strict=True)]
    return torch.from_numpy(np.linalg.lstsq(torch.cat(rows).numpy(), torch.cat(right).numpy(), rcond=None)[0].T)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ---------------------------------------------------------------- O1: the least-squares solution


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("gram", ["projected", "full"])
def test_b_round_is_the_least_squares_solution(decay: float, gram: str) -> None:
    got = merge(Lorm(decay=decay, gram=gram), "B", clients())
    close(got[B], brute_force_b(clients(), decay))
    assert torch.equal(got[A], params()[A])


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("form", ["auto", "full"])
def test_a_round_is_the_least_squares_solution(decay: float, form: str) -> None:
    got = merge(Lorm(decay=decay, form=form), "A", clients())
    close(got[A], brute_force_a(clients(), decay))
    assert torch.equal(got[B], params()[B])


@pytest.mark.parametrize("decay", DECAYS)
def test_head_is_the_least_squares_solution(decay: float) -> None:
    for phase in "AB":
        close(merge(Lorm(head_decay=decay), phase, clients())["head.weight"], brute_force_head(clients(), decay))


@pytest.mark.parametrize("decay", DECAYS)
def test_small_form_equals_wide_form(decay: float) -> None:
    """B_i M_i and M_i (r×r) against (Σ B_i A G_i) Aᵀ (A ΣG Aᵀ)⁺ with d×d Grams."""
    a = params()[A]
    grams = [decayed(c.x_NI, decay) for c in clients()]
    wide = sum(c.own[B] @ a @ g for c, g in zip(clients(), grams, strict=True)) @ a.T @ torch.linalg.pinv(a @ sum(grams) @ a.T)
    close(merge(Lorm(decay=decay), "B", clients())[B], wide)
    close(merge(Lorm(decay=decay, gram="full"), "B", clients())[B], wide)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([1e-3, 1e-1, 10.0]))
def test_perturbations_only_raise_the_error(seed: int, size: float) -> None:
    rule, who, start = Lorm(decay=1.0), clients(), params()

    def error_b(b: Tensor) -> float:
        return float(sum(((b - c.own[B]) @ start[A] @ c.x_NI.T).square().sum() for c in who))

    def error_a(a: Tensor) -> float:
        return float(sum((start[B] @ (a - c.own[A]) @ c.x_NI.T).square().sum() for c in who))

    for name, phase, error in ((B, "B", error_b), (A, "A", error_a)):
        best = merge(rule, phase, who)[name]
        assert error(best + size * draw(*best.shape, address=f"d{seed}")) > error(best)


def test_gradient_vanishes_at_the_merge() -> None:
    start, who = params(), clients()
    b = merge(Lorm(decay=1.0), "B", who)[B].requires_grad_()
    objective = sum(((b - c.own[B]) @ start[A] @ c.x_NI.T).square().sum() for c in who)
    (gradient,) = torch.autograd.grad(objective, b)
    assert float(gradient.abs().max()) <= 1e-9 * float(objective.detach())


# ---------------------------------------------------------------- O2: one client, equal Grams


@pytest.mark.parametrize("decay", DECAYS)
def test_one_client_gets_its_own_back(decay: float) -> None:
    one = clients()[:1]
    for phase, name in (("B", B), ("A", A)):
        got = merge(Lorm(decay=decay), phase, one)
        for own in (name, "head.weight", "head.bias"):
            close(got[own], one[0].own[own], 1e-10)


def test_equal_grams_give_the_plain_mean() -> None:
    who = [replace(c, x_NI=clients()[0].x_NI, f_ND=clients()[0].f_ND) for c in clients()]
    for phase, name in (("B", B), ("A", A)):
        got = merge(Lorm(decay=0.5), phase, who)
        for own in (name, "head.weight"):
            close(got[own], torch.stack([c.own[own] for c in who]).mean(0))


# ---------------------------------------------------------------- O3: diagonal Grams


def test_diagonal_a_round_weights_columns_by_energy() -> None:
    who = clients()
    energy = [c.x_NI.square().sum(0) for c in who]
    want = sum(c.own[A] * g for c, g in zip(who, energy, strict=True)) / sum(energy)
    close(merge(Lorm(), "A", who)[A], want, 1e-12)
    close(merge(Lorm(), "A", [replace(c, x_NI=30 * c.x_NI) for c in who])[A], want, 1e-12)


def test_silent_inputs_keep_the_servers_column() -> None:
    who = [replace(c, x_NI=torch.cat([torch.zeros_like(c.x_NI[:, :2]), c.x_NI[:, 2:]], dim=1)) for c in clients()]
    got = merge(Lorm(), "A", who)[A]
    assert torch.equal(got[:, :2], params()[A][:, :2])
    assert not torch.equal(got[:, 2:], params()[A][:, 2:])


# ---------------------------------------------------------------- O4, O5 and the rest of the round


def test_head_rows_that_nobody_moved_stay() -> None:
    old = params()["head.weight"][:4]
    who = [replace(c, own={**c.own, "head.weight": torch.cat([old, c.own["head.weight"][4:]])}) for c in clients()]
    got = merge(Lorm(), "B", who)["head.weight"]
    close(got[:4], old, 1e-12)
    assert float((got[4:] - params()["head.weight"][4:]).abs().max()) > 0.1


def test_identical_clients_are_a_no_op_whatever_their_grams() -> None:
    who = [replace(c, own=clients()[0].own) for c in clients()]
    for phase, name in (("B", B), ("A", A)):
        got = merge(Lorm(decay=0.5), phase, who)
        for own in (name, "head.weight", "head.bias"):
            close(got[own], who[0].own[own])


def test_head_bias_is_weighted_by_samples() -> None:
    who = clients()
    n = [len(c.x_NI) for c in who]
    want = sum(k * c.own["head.bias"] for k, c in zip(n, who, strict=True)) / sum(n)
    close(merge(Lorm(), "B", who)["head.bias"], want, 1e-12)


def test_clients_without_samples_drop_out() -> None:
    empty = Client(torch.zeros(0, I, dtype=torch.float64), torch.zeros(0, D, dtype=torch.float64), clients()[0].own)
    for rule in (Lorm(), Lorm(decay=0.5, ridge=1e-3)):
        for phase in "AB":
            with_empty, without = merge(rule, phase, [*clients(), empty]), merge(rule, phase, clients())
            for name in without:
                close(with_empty[name], without[name], 1e-12)


def test_few_tokens_keep_unseen_directions_only_when_asked() -> None:
    """One client with 3 inputs in 7 dimensions: the reference form zeroes what it has not seen, the safer one keeps A_0."""
    one = [replace(clients()[0], x_NI=clients()[0].x_NI[:3])]
    unseen = torch.linalg.svd(one[0].x_NI)[2][3:].T
    plain = merge(Lorm(decay=1.0), "A", one)[A]
    safe = merge(Lorm(decay=1.0, keep_unseen=True), "A", one)[A]
    close(plain @ unseen, torch.zeros(R, I - 3, dtype=torch.float64))
    close(safe @ unseen, params()[A] @ unseen)
    for got in (plain, safe):
        close(got @ one[0].x_NI.T, one[0].own[A] @ one[0].x_NI.T)


def test_dependent_rows_of_a_leave_the_product_right() -> None:
    start = params()
    start[A][2] = start[A][0] + start[A][1]
    who, a = clients(), start[A]
    updates = []
    for k, c in enumerate(who):
        head = {"gram.full/head.weight": upper_triangle(decayed(c.f_ND, 0.5))}
        own = {B: c.own[B], "head.weight": c.own["head.weight"]}
        updates.append(ClientUpdate(k, 20, own, {f"gram.projected/{B}": a @ c.x_NI.T @ c.x_NI @ a.T, **head}))
    got = Lorm(decay=1.0).combine({}, start, updates, torch.Generator())[1][B]
    rows = torch.cat([c.x_NI @ a.T for c in who])
    right = torch.cat([c.x_NI @ a.T @ c.own[B].T for c in who])
    want = torch.from_numpy(np.linalg.lstsq(rows.numpy(), right.numpy(), rcond=1e-10)[0].T)
    close(got @ a, want @ a)


def test_ridge_pulls_towards_the_clients_mean() -> None:
    mean = torch.stack([c.own[A] for c in clients()]).mean(0)
    same = [replace(c, x_NI=c.x_NI / c.x_NI.square().mean(0).sum().sqrt()) for c in clients(rows=60)]
    far = [float((merge(Lorm(decay=1.0, ridge=r), "A", same)[A] - mean).norm()) for r in (0.0, 1.0, 100.0)]
    assert far[0] > far[1] > far[2]


# ---------------------------------------------------------------- plan and errors


def test_rounds_alternate_and_every_task_starts_anew() -> None:
    assert [Lorm().phase(k) for k in range(4)] == ["B", "A", "B", "A"]
    assert [Lorm(start="A").phase(k) for k in range(3)] == ["A", "B", "A"]
    assert [Lorm(train="B").phase(k) for k in range(3)] == ["B", "B", "B"]
    assert Lorm().plan({}, 0).train == ("*.lora_B", "head.*")
    assert Lorm().plan({}, 1).train == ("*.lora_A", "head.*")


def test_published_recipe_asks_for_the_cheap_statistics() -> None:
    asked = [[(r.match[0], r.options["form"], r.blended) for r in Lorm().plan({}, k).statistics] for k in (0, 1)]
    assert asked[0] == [("*.lora_B", "projected", True), ("head.weight", "full", True)]
    assert asked[1] == [("*.lora_A", "diagonal", True), ("head.weight", "full", True)]


def test_groups_without_lora_or_without_head() -> None:
    rule, who = Lorm(), clients()
    updates = [update(k, c, "B", rule) for k, c in enumerate(who)]
    whole = rule.combine({}, params(), updates, torch.Generator())[1]
    for group in (["head.weight", "head.bias"], [A, B]):
        own = [replace(u, params={n: t for n, t in u.params.items() if n in group}) for u in updates]
        part = rule.combine(rule.init({n: params()[n] for n in group}), {n: params()[n] for n in group}, own, torch.Generator())[
            1
        ]
        assert part.keys() == set(group)
        assert all(torch.equal(part[n], whole[n]) for n in group)


def test_prompts_are_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"lorm merges pairs of LoRA factors and 'adapter\.0\.keys' is none: .*name: fedavg"):
        Lorm().init({"adapter.0.keys": torch.zeros(2, 2)})


def test_a_missing_statistic_names_client_and_tensor() -> None:
    bare = [ClientUpdate(7, 5, {B: params()[B]})]
    with pytest.raises(AggregationError, match=r"client 7 sent 'adapter\.layer\.lora_B' without its gram"):
        Lorm().combine({}, params(), bare, torch.Generator())
    with pytest.raises(AggregationError, match=r"client 7 sent 'adapter\.layer\.lora_B' without 'gram\.cross"):
        Lorm(gram="full").combine({}, params(), bare, torch.Generator())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "both"}, "train 'both' is unknown"),
        ({"start": "C"}, "start 'C' is unknown"),
        ({"gram": "projcted"}, "Did you mean 'projected'"),
        ({"decay": 1.5}, r"decay must be in \[0, 1\], got 1.5"),
        ({"head_decay": -0.1}, r"head_decay must be in \[0, 1\]"),
        ({"form": "diagonal", "decay": 0.5}, "decay must be 0 with form: diagonal"),
        ({"ridge": -1.0}, "ridge must not be negative"),
        ({"gram": "full", "ridge": 1e-3}, "gram must be 'projected' with a ridge"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Lorm(**options)  # type: ignore[arg-type]


# ---------------------------------------------------------------- a whole stream against the reference's equations
#
# Two layers with a tanh between them and a head, so that a Gram depends on the module that the statistics pass runs through. What
# clients train is made up, the same for both sides; all the rest (phases, blended passes, merges, the end of a task, the next
# task's beginning) each side does its own way: numpy with dense d×d Grams and running sums as the reference's code has them, and
# the rule and the consolidator from what their plans ask for.

LAYERS = {"adapter.one": (6, 5), "adapter.two": (5, D)}  # inputs, outputs
TASKS, ROUNDS, RANK = 2, 3, 2


def made_up(*shape: int, address: str) -> np.ndarray:
    array: np.ndarray = draw(*shape, address=f"stream {address}").numpy()
    return array


def shard(task: int, k: int) -> np.ndarray:
    """Inputs of client k in a task; clients hold different numbers of them."""
    return made_up(14 + 3 * k, 6, address=f"x {task} {k}") + 0.2 * k


def step(task: int, round: int, k: int, name: str, like: np.ndarray) -> np.ndarray:
    """What a client's training adds to a tensor; of the head only to rows of the task's classes."""
    change = 0.4 * made_up(*like.shape, address=f"step {task} {round} {k} {name}")
    if name.startswith("head"):
        own = C // TASKS
        change[: task * own] = change[(task + 1) * own :] = 0
    return change


def frozen(layer: str) -> np.ndarray:
    return 0.5 * made_up(*LAYERS[layer][::-1], address=f"W0 {layer}")


def fresh_a(task: int, layer: str) -> np.ndarray:
    return made_up(RANK, LAYERS[layer][0], address=f"A {task} {layer}")


Trace = list[dict[str, np.ndarray]]


def reference_stream(decay: float, head_decay: float, phases: str) -> Trace:
    """Every layer's B A and the head after every round, and every layer's Δ after every task."""

    def forward(x: np.ndarray, delta: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        hidden = np.tanh(x @ (frozen("adapter.one") + delta["adapter.one"]).T)
        return {"adapter.one": x, "adapter.two": hidden}, hidden @ (frozen("adapter.two") + delta["adapter.two"]).T

    def gram(x: np.ndarray, alpha: float) -> np.ndarray:
        full: np.ndarray = x.T @ x
        return np.where(np.eye(len(full)) == 1, full, alpha * full)

    trace: Trace = []
    head, bias = made_up(C, D, address="H"), made_up(C, address="b")
    old_mean = {p: np.zeros(LAYERS[p][::-1]) for p in LAYERS}
    a, b = dict[str, np.ndarray](), dict[str, np.ndarray]()
    running_p = {p: np.zeros((outputs, inputs)) for p, (inputs, outputs) in LAYERS.items()}
    running_q = {p: np.zeros((inputs, inputs)) for p, (inputs, _) in LAYERS.items()}
    for t in range(TASKS):
        if t > 0:
            old_mean = {p: (old_mean[p] * (t - 1) + b[p] @ a[p]) / t for p in LAYERS}
        a = {p: fresh_a(t, p) for p in LAYERS}
        b = {p: np.zeros((LAYERS[p][1], RANK)) for p in LAYERS}
        for r in range(ROUNDS):
            phase = phases[r]
            weighted_grams: dict[str, list[np.ndarray]] = {p: [] for p in (*LAYERS, "head")}
            grams: dict[str, list[np.ndarray]] = {p: [] for p in (*LAYERS, "head")}
            biases, sizes = [], []
            for k in range(K):
                x = shard(t, k)
                a_i = {p: a[p] + (step(t, r, k, p + ".lora_A", a[p]) if phase == "A" else 0) for p in LAYERS}
                b_i = {p: b[p] + (step(t, r, k, p + ".lora_B", b[p]) if phase == "B" else 0) for p in LAYERS}
                head_i = head + step(t, r, k, "head.weight", head)
                biases.append(bias + step(t, r, k, "head.bias", bias))
                sizes.append(len(x))
                inputs, features = forward(x, {p: (t * old_mean[p] + b_i[p] @ a_i[p]) / (t + 1) for p in LAYERS})
                for p in LAYERS:
                    g = gram(inputs[p], decay)
                    grams[p].append(g)
                    weighted_grams[p].append(b_i[p] @ a[p] @ g if phase == "B" else a_i[p] @ g)
                grams["head"].append(gram(features, head_decay))
                weighted_grams["head"].append(head_i @ grams["head"][-1])
            for p in LAYERS:
                if phase == "B":
                    b[p] = sum(weighted_grams[p]) @ a[p].T @ np.linalg.pinv(a[p] @ sum(grams[p]) @ a[p].T)
                else:
                    a[p] = sum(weighted_grams[p]) @ np.linalg.pinv(sum(grams[p]))
            head = sum(weighted_grams["head"]) @ np.linalg.inv(sum(grams["head"]))
            bias = sum(n * own for n, own in zip(sizes, biases, strict=True)) / sum(sizes)
            trace.append({p: b[p] @ a[p] for p in LAYERS} | {"head.weight": head, "head.bias": bias})
        delta = {p: b[p] @ a[p] for p in LAYERS}
        passes = [forward(shard(t, k), {p: (t * old_mean[p] + delta[p]) / (t + 1) for p in LAYERS})[0] for k in range(K)]
        for p in LAYERS:
            g = sum(gram(inputs[p], decay) for inputs in passes)
            running_p[p], running_q[p] = running_p[p] + delta[p] @ g, running_q[p] + g
            if t > 0:
                delta[p] = running_p[p] @ np.linalg.pinv(running_q[p])
        trace.append(delta)
    return trace


def measured(plan: RoundPlan, own: Tensors, x: Tensor) -> dict[str, Tensor]:
    """The statistics that a plan asks for, float64, from a pass through the background and the client's own module."""
    module = {n: t for n, t in own.items() if n.startswith("adapter.")}
    through = stack_modules([plan.background, module], [1.0, plan.share]) if plan.background else module
    inputs, hidden = {}, x
    for p in LAYERS:
        inputs[p] = hidden
        out = hidden @ torch.from_numpy(frozen(p)).T + hidden @ through[p + ".lora_A"].T @ through[p + ".lora_B"].T
        hidden = torch.tanh(out) if p == "adapter.one" else out
    statistics = {}
    for request in plan.statistics:
        form, decay = request.options["form"], request.options["decay"]
        assert request.blended
        for name in matching(own, request.match):
            layer = name.rpartition(".")[0]
            gram = decayed(hidden if name == "head.weight" else inputs[layer], decay)
            if form == "diagonal":
                value = gram.diagonal()
            elif form == "full":
                value = upper_triangle(gram)
            else:
                value = own[layer + ".lora_A"] @ gram
                value = value if form == "cross" else value @ own[layer + ".lora_A"].T
            statistics[f"gram.{form}/{name}"] = value
    return statistics


def our_stream(rule: Lorm, consolidator: RegMean) -> Trace:
    trace: Trace = []
    kept = consolidator.init()
    params: Tensors = {
        "head.weight": torch.from_numpy(made_up(C, D, address="H")),
        "head.bias": torch.from_numpy(made_up(C, address="b")),
    }
    for t in range(TASKS):
        fresh = {p + ".lora_A": torch.from_numpy(fresh_a(t, p)) for p in LAYERS}
        fresh |= {p + ".lora_B": torch.zeros(LAYERS[p][1], RANK, dtype=torch.float64) for p in LAYERS}
        start = consolidator.start_task(kept, params, fresh, {})
        params, through = start.params, {"context": {"background": start.past.together()}, "share": start.past.share}
        state = rule.init(params)
        for r in range(ROUNDS):
            plan = replace(rule.plan(state, r), **through)
            updates = []
            for k in range(K):
                x = torch.from_numpy(shard(t, k))
                trained = {
                    n: params[n] + torch.from_numpy(step(t, r, k, n, params[n].numpy())) for n in matching(params, plan.train)
                }
                updates.append(ClientUpdate(k, len(x), trained, measured(plan, {**params, **trained}, x)))
            state, params = rule.combine(state, params, updates, torch.Generator())
            trace.append(products(params) | {n: t.numpy() for n, t in params.items() if n.startswith("head")})
        ending = consolidator.plan(kept, params)
        assert ending is not None
        assert ending.train == ()
        sent = [measured(replace(ending, **through), params, torch.from_numpy(shard(t, k))) for k in range(K)]
        kept = consolidator.end_task(
            kept, params, {n: torch.stack([s[n] for s in sent]).sum(0) for n in sent[0]}, torch.Generator()
        )
        trace.append(products(consolidator.deployed(kept, params, finished=True)))
    return trace


def products(params: Tensors) -> dict[str, np.ndarray]:
    return {p: (params[p + ".lora_B"] @ params[p + ".lora_A"]).numpy() for p in LAYERS}


@pytest.mark.parametrize("gram", ["projected", "full"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("train", "start", "phases"), [("alternate", "B", "BAB"), ("alternate", "A", "ABA"), ("B", "B", "BBB")])
def test_a_stream_of_two_tasks_is_the_references(train: str, start: str, phases: str, decay: float, gram: str) -> None:
    """The head's decay too is each of 0, 0.5 and 1 once."""
    head_decay = {0.0: 0.5, 0.5: 1.0, 1.0: 0.0}[decay]
    rule = Lorm(train=train, start=start, decay=decay, head_decay=head_decay, gram=gram)
    got, want = our_stream(rule, RegMean(decay=decay)), reference_stream(decay, head_decay, phases)
    assert len(got) == len(want) == TASKS * (ROUNDS + 1)
    for mine, reference in zip(got, want, strict=True):
        assert mine.keys() == reference.keys()
        for name in reference:
            np.testing.assert_allclose(mine[name], reference[name], rtol=0, atol=1e-9)
    assert all(np.abs(want[-1][p]).max() > 0.1 for p in LAYERS)
