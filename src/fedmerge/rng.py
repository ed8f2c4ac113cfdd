"""Random draws that depend on names alone: (seed, round, client id, purpose).

Nothing here reads or changes a global random state, so a draw is the same in whatever order,
process or resumed run it is made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch


def derive(seed: int, *names: int | str) -> int:
    """Return a 63-bit integer that is a fixed function of `seed` and `names`."""
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_generator(seed: int, *names: int | str) -> np.random.Generator:
    """Return a numpy generator of its own for (seed, names)."""
    return np.random.Generator(np.random.Philox(key=derive(seed, *names)))


def numpy_generators(
    seed: int, names: Iterable[Sequence[int | str]]
) -> Iterator[np.random.Generator]:
    """Yield what `numpy_generator` gives for each of `names`, in a fifth of the time.

    They are one object, set anew for each: use one up before asking for the next.
    """
    zeros = np.zeros(4, dtype=np.uint64)
    philox = np.random.Philox(key=0)
    generator = np.random.Generator(philox)
    for own in names:
        philox.state = {
            "bit_generator": "Philox",
            "state": {"counter": zeros, "key": np.array([derive(seed, *own), 0], dtype=np.uint64)},
            "buffer": zeros,
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        yield generator


def torch_generator(seed: int, *names: int | str) -> torch.Generator:
    """Return a CPU torch generator of its own for (seed, names)."""
    return torch.Generator().manual_seed(derive(seed, *names))
