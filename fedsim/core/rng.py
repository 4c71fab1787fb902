"""Randomness with an address: every draw comes from a stream named by what it is for, never from a global generator."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def seed_sequence(seed: int, *address: str | int) -> np.random.SeedSequence:
    """The seed sequence of `(seed, *address)`: words are hashed, numbers are taken as they are (non-negative).

    numpy fills short addresses up with zeros, so that `(seed, "x")` is `(seed, "x", 0)`: a purpose stands alone everywhere, or
    has something behind it everywhere, and a word where it also stands alone."""
    words = [int.from_bytes(hashlib.sha256(a.encode()).digest()[:8], "little") if isinstance(a, str) else a for a in address]
    return np.random.SeedSequence([seed, *words])


def stream(seed: int, *address: str | int) -> np.random.Generator:
    """A numpy generator for one purpose, e.g. `stream(seed, "partition", task)`."""
    return np.random.default_rng(seed_sequence(seed, *address))


def torch_stream(seed: int, *address: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for one purpose, e.g. `torch_stream(seed, "dropout", client_id, task, round)`."""
    state = seed_sequence(seed, *address).generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(state))


def split(draw: torch.Generator, count: int) -> list[torch.Generator]:
    """So many generators on the CPU, seeded by one draw each: what is drawn from one does not move the others."""
    seeds = torch.randint(2**63 - 1, (count,), generator=draw, device=draw.device)
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
