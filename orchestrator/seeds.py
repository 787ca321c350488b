"""Random draws: every generator of the project comes from here, named by a seed and a purpose."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def _digest(seed: int, purpose: tuple[str | int, ...]) -> bytes:
    return hashlib.sha256("\x1f".join(map(str, (seed, *purpose))).encode()).digest()


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator whose stream is a function of the seed and the purpose alone.

    Torch's CPU generator keeps 32 bits of its seed, so two of n streams coincide with probability n^2 / 2^33.
    """
    return torch.Generator().manual_seed(int.from_bytes(_digest(seed, purpose)[:8], "big") >> 1)


@contextmanager
def drawing_from(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """What draws without naming a generator (dropout does) draws inside from one seeded by the state of this one.

    The generator itself is not moved on, and torch's own is as before afterwards.
    """
    seed = zlib.crc32(generator.get_state().numpy().tobytes())
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """The numpy counterpart of `generator`, for designs and draws that know no torch."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(_digest(seed, purpose)[:16], "big")))
