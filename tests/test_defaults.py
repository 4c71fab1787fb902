"""What a caller has set in torch moves no bit of a run, breaks none, and is there again: afterwards, and between two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.pools.serial import Pool
from clients.worker import is_update
from fedsim import simulation
from fedsim.core.config import SimConfig
from fedsim.core.defaults import PRECISIONS, torch_defaults
from fedsim.core.messages import ClientJob, EvalJob
from fedsim.runs.results import Results
from fedsim.simulation import run
from tests.tiny import final_state, learned, same_bits, tiny

CUDA, CUDNN, ONEDNN = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn


def switched(owner: Any, name: str, value: Any) -> Callable[[], AbstractContextManager[None]]:
    return lambda: setting(lambda: getattr(owner, name), lambda v: setattr(owner, name, v), value)


@contextmanager
def setting(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


@contextmanager
def mixed_precisions() -> Iterator[None]:
    """The newer settings, which contradict the older one: torch then refuses to say what that is."""
    keys = [("generic", "all"), ("mkldnn", "matmul")]
    before = [torch._C._get_fp32_precision_getter(*k) for k in keys]
    torch.backends.fp32_precision = "tf32"
    torch._C._set_fp32_precision_setter("mkldnn", "matmul", "bf16")
    try:
        yield
    finally:
        for key, value in reversed(list(zip(keys, before, strict=True))):
            torch._C._set_fp32_precision_setter(*key, value)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "meta device": lambda: torch.device("meta"),
    "default device": lambda: setting(lambda: None, torch.set_default_device, "meta"),
    "matmul medium": lambda: setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "mixed precisions": mixed_precisions,
    "no oneDNN": switched(ONEDNN, "enabled", False),
    "deterministic": lambda: setting(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
    "no flash attention": lambda: setting(CUDA.flash_sdp_enabled, CUDA.enable_flash_sdp, False),
    "threads": lambda: setting(torch.get_num_threads, torch.set_num_threads, 3),
}


def state_of_torch() -> dict[str, Any]:
    """All that a caller may have set."""
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "mixed"
    return {
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "numbers": (torch.get_default_dtype(), torch.get_default_device().type, torch.get_num_threads(), older),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        "oneDNN": (ONEDNN.enabled, ONEDNN.deterministic, torch._C._get_nnpack_enabled()),
        "cudnn": (CUDNN.enabled, CUDNN.benchmark, CUDNN.deterministic, CUDNN.allow_tf32),
        "attention": (CUDA.flash_sdp_enabled(), CUDA.mem_efficient_sdp_enabled(), CUDA.math_sdp_enabled()),
        "precisions": [torch._C._get_fp32_precision_getter(*key) for key in PRECISIONS],
    }


def meaning(state: dict[str, Any]) -> dict[str, Any]:
    """What "highest" writes, and what torch starts with, are the same."""
    return state | {"precisions": ["none" if p == "ieee" else p for p in state["precisions"]]}


def config(output: Path) -> SimConfig:
    return tiny("server.rounds=1", "stream.tasks=1", "server.calibrator=hgp", output=output)


def outcome(results: Results) -> dict[str, Any]:
    assert results.path is not None
    return learned(final_state(results.path, results.config))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return outcome(run(config(tmp_path_factory.mktemp("undisturbed"))))


@pytest.mark.parametrize("name", SETTINGS)
def test_torch_as_it_starts(name: str) -> None:
    started = state_of_torch()
    with SETTINGS[name]():
        before = state_of_torch()
        assert before != started
        with torch_defaults(torch.get_num_threads() - 1 if name == "threads" else started["numbers"][2]):
            inside = state_of_torch()
        assert state_of_torch() == before
    inside["numbers"] = started["numbers"] if name == "threads" else inside["numbers"]
    assert meaning(inside) == meaning(started)


MOVING = [n for n in SETTINGS if n not in ("matmul medium", "mixed precisions", "deterministic")]  # those not on every machine


@pytest.mark.parametrize("name", MOVING)
def test_a_callers_settings_move_no_bit_and_are_there_again(name: str, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    with SETTINGS[name]():
        before = state_of_torch()
        results = run(config(tmp_path), progress=lambda _: seen.append(state_of_torch()))
        after = state_of_torch()
    assert len(seen) > 5
    assert all(between == before for between in seen)
    assert after == before
    assert same_bits(outcome(results), undisturbed)


def test_settings_that_are_changed_while_a_run_goes(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """By whoever is told of its progress."""
    with setting(torch.get_default_dtype, torch.set_default_dtype, torch.float32):
        results = run(config(tmp_path), progress=lambda _: torch.set_default_dtype(torch.float64))
        assert torch.get_default_dtype() == torch.float64
    assert same_bits(outcome(results), undisturbed)


def test_the_serial_pool_by_itself(tmp_path: Path) -> None:
    """Every pool sees to it by itself: it is a contract that others use too."""
    parts = simulation.prepare(config(tmp_path))
    params = parts.state.params
    plan = parts.rule.plan(parts.rule.init(params), 0)
    jobs, tests = [ClientJob(c, 0, 0, params, plan) for c in range(3)], [EvalJob(0, 0, 8, params, parts.spec.task_classes[0])]

    def work() -> tuple[Any, Any]:
        with Pool(parts.spec) as pool:
            trained = [r.params for bundle in pool.train(jobs) for r in bundle.results if is_update(r)]
            return trained, [r.by_class for r in pool.evaluate(tests)]

    expected = work()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(work(), expected)


def test_what_a_part_of_ours_changes_is_put_back_too() -> None:
    before = state_of_torch()
    with torch_defaults(2):
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(3)
        torch.set_float32_matmul_precision("high")
    assert meaning(state_of_torch()) == meaning(before)
