"""LoRM at ViT-B/16 shapes: bytes that a client sends, and seconds of the server's step, beside the dense form.

    python -m experiments.benchmarks.lorm_server [--clients 10] [--repeats 1]

12 blocks, LoRA of rank 16 on q, k, v, o and both layers of the MLP, a head of 100 classes, float32 on the wire, decay 0. Tensors
are random, which moves neither sizes nor times. Ours: what the plan of `lorm` asks for, and `lift` of every client, their sum,
and `finish`. Dense: every client sends the full d×d Gram of every layer; the server works in float64 with W_i = B_i A_i:
    B-round  B = (Σ W_i G_i) Aᵀ (A (Σ G_i) Aᵀ)⁺        A-round  A = (Σ A_i G_i) (Σ G_i)⁺, a pseudo-inverse d×d per layer
and the head's (Σ H_i G_i)(Σ G_i)⁻¹ as in ours. It is timed on one block and multiplied by 12, as 10 clients' Grams of all blocks
would be 6 GB; reading them from the wire is not counted. What limits ours: the head's Gram, as large as the rest together.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks import machine
from fedsim.core.defaults import torch_defaults
from fedsim.core.messages import ClientUpdate, Tensors, num_bytes
from fedsim.core.names import HEAD_WEIGHT as HEAD
from fedsim.core.tensors import LORA_A, LORA_B, matching, upper_triangle
from server.aggregators.lorm import Aggregator

# r rank, d inputs, m outputs of a layer, D width, C classes, N rows
BLOCKS, WIDTH, HIDDEN, RANK, CLASSES = 12, 768, 3072, 16, 100
BLOCK = {  # layer -> (outputs, inputs)
    "attention.q_proj": (WIDTH, WIDTH), "attention.k_proj": (WIDTH, WIDTH), "attention.v_proj": (WIDTH, WIDTH),
    "attention.o_proj": (WIDTH, WIDTH), "mlp.fc1": (HIDDEN, WIDTH), "mlp.fc2": (WIDTH, HIDDEN),
}  # fmt: skip
HEAD_SHAPES = {HEAD: (CLASSES, WIDTH), "head.bias": (CLASSES,)}
OURS_PER_DENSE = 5  # a dense step takes minutes
ROUNDS = {"B-round": 0, "A-round": 1}


def random_params(generator: torch.Generator) -> dict[str, Tensor]:
    """`adapter.*` and `head.*` of ViT-B/16."""
    shapes: dict[str, tuple[int, ...]] = dict(HEAD_SHAPES)
    for i in range(BLOCKS):
        for layer, (m, d) in BLOCK.items():
            shapes |= {f"adapter.layers.{i}.{layer}{LORA_A}": (RANK, d), f"adapter.layers.{i}.{layer}{LORA_B}": (m, RANK)}
    return {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}


def random_gram(size: int, generator: torch.Generator) -> Tensor:
    """x xᵀ over rows x, regular."""
    x_Nd = torch.randn(2 * size, size, generator=generator)
    return x_Nd.T @ x_Nd


def random_update(client: int, params: Tensors, rule: Aggregator, round: int) -> ClientUpdate:
    """What one client sends in a round, by the rule's own plan."""
    generator = torch.Generator().manual_seed(client)
    plan = rule.plan({}, round)
    sent: dict[str, Tensor] = {}
    for request in plan.statistics:
        form = request.options["form"]
        for name in matching(params, request.match):
            width = RANK if form == "projected" else params[name].shape[1]
            gram = random_gram(width, generator) if form != "diagonal" else torch.rand(width, generator=generator)
            sent[f"gram.{form}/{name}"] = upper_triangle(gram) if form == "full" else gram
    trained = {n: torch.randn(params[n].shape, generator=generator) for n in matching(params, plan.train)}
    return ClientUpdate(client, 100, trained, sent)


def dense_block(clients: int, round: int) -> Callable[[], None]:
    """The dense server step of one block, ready to be run."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for m, d in BLOCK.values():
        a_rd = [torch.randn(RANK, d, generator=generator)] * clients
        b_mr = [torch.randn(m, RANK, generator=generator)] * clients
        layers.append((a_rd, b_mr, [random_gram(d, generator)] * clients))

    def step() -> None:
        for a_rd, b_mr, gram_dd in layers:
            wide = [g.double() for g in gram_dd]
            total_dd = sum_of(iter(wide))
            if ROUNDS["B-round"] == round:
                product_md = sum_of(b.double() @ a.double() @ g for b, a, g in zip(b_mr, a_rd, wide, strict=True))
                common_rd = a_rd[0].double()
                product_md @ common_rd.T @ torch.linalg.pinv(common_rd @ total_dd @ common_rd.T)
            else:
                product_rd = sum_of(a.double() @ g for a, g in zip(a_rd, wide, strict=True))
                product_rd @ torch.linalg.pinv(total_dd)

    return step


def dense_head(clients: int) -> Callable[[], None]:
    """The dense server step of the head."""
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(CLASSES, WIDTH, generator=generator) for _ in range(clients)]
    grams = [random_gram(WIDTH, generator) for _ in range(clients)]

    def step() -> None:
        wide = [g.double() for g in grams]
        sum_of(h.double() @ g for h, g in zip(heads, wide, strict=True)) @ torch.linalg.inv(sum_of(iter(wide)))

    return step


def sum_of(terms: Iterator[Tensor]) -> Tensor:
    """Σ of at least one term."""
    total = next(terms)
    for term in terms:
        total = total + term
    return total


def seconds_of(step: Callable[[], Any]) -> float:
    """Wall time of one call."""
    clock = time.perf_counter()
    step()
    return time.perf_counter() - clock


def bytes_of(update: ClientUpdate) -> dict[str, int]:
    """What one client sends, by kind of object, ours and dense."""
    layers = sum(4 * d * d for _, d in BLOCK.values()) * BLOCKS
    adapter = num_bytes({n: t for n, t in update.params.items() if n.startswith("adapter.")})
    head = num_bytes(update.params) - adapter
    head_gram = num_bytes({n: t for n, t in update.statistics.items() if n.endswith(HEAD)})
    rest = num_bytes(update.statistics) - head_gram
    dense = adapter + head + 4 * WIDTH * WIDTH + layers
    return {
        "adapter": adapter, "head": head, "gram of the head": head_gram, "grams of the layers": rest,
        "all": adapter + head + head_gram + rest, "all, dense": dense,
    }  # fmt: skip


def main() -> None:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    rule, params = Aggregator(), random_params(torch.Generator().manual_seed(1))
    results: dict[str, Any] = {}
    with torch_defaults(1), torch.no_grad():
        for name, round in ROUNDS.items():
            updates = [random_update(client, params, rule, round) for client in range(args.clients)]
            ours, dense, head = (
                partial(rule.combine, {}, params, updates),
                dense_block(args.clients, round),
                dense_head(args.clients),
            )
            seconds: dict[str, list[float]] = {"ours": [], "dense": []}
            for _ in range(args.repeats):
                seconds["ours"] += [seconds_of(ours) for _ in range(OURS_PER_DENSE)]
                seconds["dense"].append(BLOCKS * seconds_of(dense) + seconds_of(head))
                print(name, {k: round_to(v[-1]) for k, v in seconds.items()}, flush=True)
            sizes = bytes_of(updates[0])
            middle = {k: statistics.median(v) for k, v in seconds.items()}
            results[name] = {
                "bytes": sizes,
                "over adapter and head, without the gram of the head": round_to(
                    (sizes["all"] - sizes["gram of the head"]) / (sizes["adapter"] + sizes["head"])
                ),
                "dense over ours, bytes": round_to(sizes["all, dense"] / sizes["all"]),
                "seconds": {k: [round_to(s) for s in v] for k, v in seconds.items()},
                "dense over ours, seconds": round_to(middle["dense"] / middle["ours"]),
            }
            print(name, results[name], flush=True)
    print(machine.write("lorm_server", {"clients": args.clients, "dense": "one block, times 12, and the head", **results}))


def round_to(value: float) -> float:
    """Four digits are more than such a figure is good for."""
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
