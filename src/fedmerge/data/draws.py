"""Random generators of the data package, each derived from a seed and the name of its purpose.

It is not a source of shared state: every call returns a new generator at its beginning.
"""

from __future__ import annotations

import hashlib

import numpy as np

from fedmerge.errors import ConfigError


def generator(seed: int, *purpose: str) -> np.random.Generator:
    """Return the generator of `purpose`, for example ``generator(0, "split", "c07")``.

    Draws for one purpose never shift those for another, so adding a client or a setting leaves
    the rest as it was. Raises ConfigError where `seed` is negative.
    """
    if seed < 0:
        raise ConfigError(f"seed: {seed}, wanted 0 or more")
    # Python's own hash of a text differs between processes, a digest does not.
    digest = hashlib.blake2b("/".join(purpose).encode(), digest_size=16).digest()
    words = np.random.SeedSequence([seed, int.from_bytes(digest, "little")])
    return np.random.Generator(np.random.Philox(words))
