"""Inputs that stay in their file and are read when they are used, for data larger than memory.

It opens the file anew for every reading and keeps nothing of it; what is read, and when it is
thrown away, is decided by those who ask.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.data.clients import Split
from fedmerge.errors import DataError


@dataclass(frozen=True, eq=False)
class Stored:
    """Some rows of an array in a file, read as float32.

    path, offset: the file, and the byte where the array begins. dtype, full: its type and shape.
    rows: (n,) int64, which of them and in which order.
    """

    path: str
    offset: int
    dtype: str
    full: tuple[int, ...]
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, array: np.memmap[Any, Any]) -> Stored:
        """Return the whole of a memory-mapped array, as numpy.load(..., mmap_mode="r") gives it.

        Raises DataError for a part of one that is not whole rows side by side.
        """
        if not array.flags.c_contiguous or not array.flags.aligned:
            raise DataError(
                f'"{array.filename}": a memory-mapped part of shape {array.shape} whose rows are '
                "not side by side in the file; give the array, or a range of its rows"
            )
        # A part of a mapped array still says where the whole of it begins.
        base = int(np.frombuffer(array._mmap, np.uint8).__array_interface__["data"][0])  # type: ignore[attr-defined]
        begin = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
        offset = begin + int(array.__array_interface__["data"][0]) - base
        rows = np.arange(len(array), dtype=np.int64)
        return cls(str(array.filename), offset, array.dtype.str, tuple(array.shape), rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, *features)."""
        return (len(self.rows), *self.full[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Stored:
        """Return the examples at `index` (k,) of these; nothing is read."""
        return replace(self, rows=self.rows[index.numpy()])

    def read(self) -> Tensor:
        """Return x (n, *features) float32.

        Raises DataError where the file is gone or shorter than it was.
        """
        try:
            whole = np.memmap(self.path, np.dtype(self.dtype), "r", self.offset, self.full)
        except (OSError, ValueError):
            needed = self.offset + int(np.prod(self.full)) * np.dtype(self.dtype).itemsize
            raise DataError(f'"{self.path}": {_found(self.path, needed)}') from None
        with np.errstate(over="ignore"):  # Too large becomes infinite, which the guard reports.
            return torch.from_numpy(np.array(whole[self.rows], dtype=np.float32))


class StoredSplit(Split):
    """A split whose inputs stay in their file: `x` reads them, every time it is asked for."""

    def __init__(self, stored: Stored, y: Tensor, source: Tensor | None = None) -> None:
        # Not as tensors: sent to another process, each would need a file handle of its own.
        arrays = (y.numpy(), None if source is None else source.numpy())
        self.__dict__.update(stored=stored, arrays=arrays)

    @property
    def x(self) -> Tensor:
        """(n, *features) float32, in memory of its own."""
        stored: Stored = self.__dict__["stored"]
        return stored.read()

    @property
    def y(self) -> Tensor:
        """(n,) int64 or (n, t) float32."""
        return torch.from_numpy(self.__dict__["arrays"][0])

    @property
    def source(self) -> Tensor | None:
        """(n,) int64, or None."""
        source = self.__dict__["arrays"][1]
        return None if source is None else torch.from_numpy(source)

    def __len__(self) -> int:
        return len(self.__dict__["stored"])

    def loaded(self) -> Split:
        """Return the same with its inputs in memory."""
        return Split(self.x, self.y, self.source)


Inputs = Tensor | Stored
"""Inputs in memory, or in their file."""


def stays_in_file(array: np.memmap[Any, Any]) -> bool:
    """Whether a file holds these numbers: copies of a mapped array are of its type, too, and what
    was changed by copy-on-write is in memory only."""
    held = getattr(array, "_mmap", None) is not None and array.filename is not None
    return held and array.mode != "c"


def make_split(x: Inputs, y: Tensor, source: Tensor | None) -> Split:
    """Return the split of these examples, wherever their inputs are."""
    return StoredSplit(x, y, source) if isinstance(x, Stored) else Split(x, y, source)


def open_array(path: Path) -> np.memmap[Any, Any]:
    """Return the array of numbers in an .npy file, memory-mapped.

    Raises DataError where it is missing, cut off, or something else.
    """
    if not path.exists():
        raise DataError(f'"{path}": no such file, wanted one; write it with numpy.save')
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise DataError(f'"{path}": {_found(str(path), None)}') from None
    if not isinstance(array, np.memmap) or not array.size:
        raise DataError(f'"{path}": empty, or not one array; write it with numpy.save')
    return array


def _found(path: str, needed: int | None) -> str:
    try:
        size = Path(path).stat().st_size
    except OSError as error:
        return f"cannot be read ({error.strerror}); put it back"
    wanted = "wanted a whole .npy file" if needed is None else f"wanted {needed} or more"
    return f"{size} bytes, {wanted}: cut off, or not what it was; write it anew with numpy.save"
