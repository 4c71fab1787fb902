"""The laws that every head keeps: logits are a function of its tensors, for many clients at once as for one.

Shapes: b samples, D features, M inputs of the last map, C classes, K clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor

from fedsim.core.contracts import Head
from fedsim.core.names import HEAD, HEAD_BIAS, HEAD_WEIGHT
from fedsim.core.rng import torch_stream
from fedsim.core.tensors import without_prefix
from fedsim.laws.comparing import ROUNDED, expect_bits, expect_close, expect_finite, expect_unchanged
from fedsim.laws.frame import Law, LawBroken

SAMPLES, FEATURES, CLASSES, CLIENTS = 7, 6, 5, 3
AFFINE = "an affine head"
FORMULA = 1e-6  # of logits in float64: distances by a product of matrices are rounded more coarsely


def fresh(head: Head) -> dict[str, Tensor]:
    """The tensors that are trained, as they are drawn."""
    return head.init(CLASSES, FEATURES, torch_stream(0, "head"))


def moved(head: Head, client: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """All tensors, those that are trained a step away from where they began."""
    own = {n: t.double() + _draw(t.shape, client, n) for n, t in fresh(head).items()}
    fixed = head.fixed(FEATURES, torch_stream(0, "head fixed"))
    return {n: t.to(dtype) for n, t in {**fixed, **own}.items()}


def _draw(shape: Sequence[int], *address: str | int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch_stream(1, *address))


def features(client: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """(b, D)"""
    return _draw((SAMPLES, FEATURES), "features", client).to(dtype)


def _init(head: Head) -> None:
    own, fixed = fresh(head), head.fixed(FEATURES, torch_stream(0, "head fixed"))
    if HEAD_WEIGHT not in own:
        raise LawBroken(f"init gives {', '.join(own)}: '{HEAD_WEIGHT}' must be there")
    for name, tensor in {**fixed, **own}.items():
        if not name.startswith("head."):
            raise LawBroken(f"'{name}' is not named head.*")
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise LawBroken(f"'{name}' is {tensor.dtype} on {tensor.device}: float32 on the CPU travels")
    for name, tensor in own.items():
        if tensor.shape[:1] != (CLASSES,):
            raise LawBroken(f"'{name}' is {tuple(tensor.shape)}: the first axis of what is trained is classes")
    if both := [n for n in fixed if n in own]:
        raise LawBroken(f"'{both[0]}' is both trained and fixed")
    expect_finite({**fixed, **own}, "a fresh head")
    expect_bits(fresh(head), own, "init with the same generator")
    expect_bits(head.fixed(FEATURES, torch_stream(0, "head fixed")), fixed, "fixed tensors of the same generator")


def _logits(head: Head) -> None:
    for dtype in (torch.float32, torch.float64):
        out = head.logits(features(dtype=dtype), moved(head, dtype=dtype))
        if out.shape != (SAMPLES, CLASSES) or out.dtype != dtype:
            raise LawBroken(f"logits are {tuple(out.shape)} {out.dtype}, not {(SAMPLES, CLASSES)} {dtype}")
        expect_finite({"logits": out}, "logits")


def _rows(head: Head) -> None:
    params, inputs = moved(head), features()
    want = head.logits(inputs, params)
    for i in range(SAMPLES):
        expect_close({"logits": head.logits(inputs[i : i + 1], params)}, {"logits": want[i : i + 1]}, f"sample {i} alone")
    whole = head.inputs(inputs, params)
    if whole.shape != (SAMPLES, params[HEAD_WEIGHT].shape[1]):
        raise LawBroken(f"inputs are {tuple(whole.shape)}, not (b, M) with M = {params[HEAD_WEIGHT].shape[1]} of '{HEAD_WEIGHT}'")
    for i in range(SAMPLES):
        alone = head.inputs(inputs[i : i + 1], params)
        expect_close({"inputs": alone}, {"inputs": whole[i : i + 1]}, f"inputs of sample {i} alone")


def _stacked(head: Head) -> None:
    clients = [moved(head, k) for k in range(CLIENTS)]
    own = [n for n in fresh(head) if n in clients[0]]
    inputs_KbD = torch.stack([features(k) for k in range(CLIENTS)])
    together = {n: torch.stack([c[n] for c in clients]) if n in own else t for n, t in clients[0].items()}
    want = torch.stack([head.logits(features(k), clients[k]) for k in range(CLIENTS)])
    expect_close({"logits": head.stacked_logits(inputs_KbD, together)}, {"logits": want}, "stacked against one by one")
    for name in own:  # common to all clients, as a tensor is that nobody trains
        common = {**together, name: clients[0][name]}
        want = torch.stack([head.logits(features(k), {**clients[k], name: clients[0][name]}) for k in range(CLIENTS)])
        expect_close({"logits": head.stacked_logits(inputs_KbD, common)}, {"logits": want}, f"stacked, '{name}' common to all")


def _gradients(head: Head) -> None:
    params, own = moved(head), list(fresh(head))
    leaves = {n: params[n].requires_grad_() for n in own}
    out = head.logits(features(), {**params, **leaves})
    (out * torch.randn(out.shape, dtype=out.dtype, generator=torch_stream(3))).sum().backward()  # type: ignore[no-untyped-call]
    for name, leaf in leaves.items():
        if leaf.grad is None or not bool(leaf.grad.any()) or not bool(torch.isfinite(leaf.grad).all()):
            raise LawBroken(f"'{name}' is trained, but gets no finite gradient")


def _affine(head: Head) -> None:
    params = moved(head)
    if AFFINE not in head.traits.gives:
        return
    bias = params.get(HEAD_BIAS, torch.zeros(CLASSES, dtype=torch.float64))
    want = head.inputs(features(), params) @ params[HEAD_WEIGHT].T + bias
    expect_close({"logits": head.logits(features(), params)}, {"logits": want}, f"logits against W inputs + b ({AFFINE})")


def _one_layer(head: Head) -> None:
    params = moved(head)
    found = head.affine(params)
    if found is None:
        return
    weight_CD, bias_C = found
    if weight_CD.shape != (CLASSES, FEATURES) or bias_C.shape != (CLASSES,):
        raise LawBroken(f"affine gives {tuple(weight_CD.shape)} and {tuple(bias_C.shape)}, not (C, D) and (C,)")
    got = (features() @ weight_CD.T + bias_C).log_softmax(dim=1)
    want = head.logits(features(), params).log_softmax(dim=1)
    expect_close({"log softmax": got}, {"log softmax": want}, "the layer of `affine` against the head's logits")


def _formula(head: Head) -> None:
    told = head.formula()
    if told is None:
        return
    params = moved(head)
    scope = {"torch": torch, "features": features(), "head": without_prefix(params, HEAD)}
    try:
        got: Tensor = eval(told, scope)
    except Exception as e:
        raise LawBroken(f"formula {told!r} is no expression of features, head and torch: {type(e).__name__}: {e}") from e
    want = head.logits(features(), params)
    if got.shape != want.shape:
        raise LawBroken(f"formula {told!r} gives {tuple(got.shape)}, not {tuple(want.shape)}")
    expect_close({"logits": got}, {"logits": want}, f"formula {told!r} against logits", FORMULA)


def _float64(head: Head) -> None:
    wide = head.logits(features(), moved(head))
    narrow = head.logits(features(dtype=torch.float32), moved(head, dtype=torch.float32))
    expect_close({"logits": narrow}, {"logits": wide}, "float32 against float64", ROUNDED)


def _no_mutation(head: Head) -> None:
    params, inputs = moved(head), features()
    before = deepcopy({"tensors": params, "features": inputs})
    for out in (head.logits(inputs, params), head.inputs(inputs, params)):
        out.sum()
    head.stacked_logits(inputs[None], {n: t if n not in fresh(head) else t[None] for n, t in params.items()})
    expect_unchanged({"tensors": params, "features": inputs}, before, "logits")


LAWS: tuple[Law[Head], ...] = (
    Law("init", "tensors are head.*, finite float32 on the CPU, rows are classes, and the generator alone decides", _init),
    Law("logits", "logits are finite, (b, C), and of the type of the features", _logits),
    Law("rows", "a sample's logits and inputs do not depend on the others of its batch", _rows),
    Law("stacked", "several clients at once get the logits that each gets alone", _stacked),
    Law("gradients", "a finite gradient reaches every tensor that is trained", _gradients),
    Law("affine", "logits of a head that says so are W inputs + b", _affine),
    Law("one_layer", "the linear layer that stands for the head, if one does, predicts the same", _one_layer),
    Law("formula", "the expression that says the logits, if there is one, gives them", _formula),
    Law("float64", "float32 in gives what float64 gives, up to its rounding", _float64),
    Law("no_mutation", "tensors and features that go in are not changed", _no_mutation),
)
