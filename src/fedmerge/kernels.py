"""Which code does the arithmetic of the server: compiled loops for large models, torch for others.

Chooses, and hands tensors over to `loops` in the shape that it takes. What is computed is said in
`merging`, whose torch code gives the same to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError

Segments = Sequence[tuple[int, int, int]]
Name = Literal["torch", "numba"]

VARIABLE = "FEDMERGE_KERNELS"
"""Environment variable that chooses: auto (the default), torch or numba."""
LEAST = 400_000
"""Numbers in a model from which on "auto" takes numba, if it is there. Importing it and reading its
machine code takes a second or two, which smaller models need many rounds to win back."""
WIDE = (torch.float32, torch.float64)
COLUMNS = 2**17
"""Columns of models in another dtype that are converted at a time, to stay in cache."""


def name(n: int) -> Name:
    """Say what computes with models of n numbers; depends on nothing else but the environment, so
    that a run has the same bits from the first round to the last.

    Raises:
        ConfigError: the environment asks for something unknown, or for numba where it is missing.
    """
    asked = os.environ.get(VARIABLE, "auto")
    if asked not in ("auto", "torch", "numba"):
        raise ConfigError(f'{VARIABLE} = "{asked}": wanted auto, torch or numba')
    there = asked != "torch" and _installed()
    if asked == "numba" and not there:
        raise ConfigError(
            f'{VARIABLE} = "numba", which is not installed: pip install "fedmerge[fast]"'
        )
    return "numba" if there and (asked == "numba" or n >= LEAST) else "torch"


@cache
def _installed() -> bool:
    return find_spec("numba") is not None


def loops(n: int, *dtypes: torch.dtype) -> ModuleType | None:
    """The compiled loops for models of n numbers; None where torch is to be used."""
    if not set(dtypes) <= set(WIDE) or not n or name(n) == "torch":
        return None
    from . import loops as compiled

    return compiled


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor to be written to."""
    if dtype in WIDE:
        # By numpy, which asks for large pages of memory: a fifth of the time at first touch.
        return torch.from_numpy(np.empty(shape, str(dtype).removeprefix("torch.")))
    return torch.empty(shape, dtype=dtype)


def table(segments: Segments) -> np.ndarray:
    """Segments as the loops take them."""
    return np.array(segments, dtype=np.int64).reshape(-1, 3)


def parts(
    models: Tensor, dtype: torch.dtype, segments: Segments
) -> Iterator[tuple[slice, Tensor, np.ndarray]]:
    """Models (d, P) in `dtype` with their segments: all at once, or in parts, each converted."""
    n = models.shape[1]
    if models.dtype == dtype:
        yield slice(0, n), models.contiguous(), table(segments)
        return
    for first in range(0, n, COLUMNS):
        last = min(first + COLUMNS, n)
        yield slice(first, last), models[:, first:last].to(dtype), table(cut(segments, first, last))


def cut(segments: Segments, first: int, last: int) -> list[tuple[int, int, int]]:
    """The segments' part in the columns from `first` to before `last`, counted from `first`."""
    return [
        (max(start, first) - first, min(stop, last) - first, block)
        for start, stop, block in segments
        if start < last and stop > first
    ]


def call(loop: Callable[..., None], *arguments: Tensor | np.ndarray | int) -> None:
    """Call a compiled loop with tensors of which the last axis is contiguous."""
    loop(*(a.detach().numpy() if isinstance(a, Tensor) else a for a in arguments))
