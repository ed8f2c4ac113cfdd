"""Values sent between a process and its workers: their tensors in shared memory, used again.

A pipe carries the rest. What is sent, and what to do when the other side is gone (EOFError or
OSError, as of a pipe), is the caller's.
"""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError

ALIGNMENT = 64


@dataclass(frozen=True)
class Placed:
    """A tensor inside a buffer: `shape` numbers of `dtype` from byte `start` on.

    With `times`, they are there once and seen as often, on a new first axis.
    """

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    times: int | None = None

    @property
    def stop(self) -> int:
        """First byte behind it."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    @property
    def alone(self) -> Placed:
        """The same numbers, seen once."""
        return replace(self, times=None) if self.times else self

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor itself; nothing is copied."""
        own = buffer[self.start : self.stop].view(self.dtype).view(self.shape)
        return own if self.times is None else own.expand(self.times, *self.shape)


@dataclass(frozen=True)
class Packed:
    """A value without its tensors, and where those belong in a buffer."""

    value: bytes
    places: list[Placed]

    @property
    def n_bytes(self) -> int:
        """Size of the buffer."""
        return self.places[-1].stop if self.places else 0

    def open(self, buffer: Tensor, *, copied: bool = False) -> Any:
        """The value, with tensors that are views of `buffer`, or their copies."""
        opener = _Unpickler(io.BytesIO(self.value))
        views = [place.view(buffer) for place in self.places]
        opener.tensors = [view.clone() for view in views] if copied else views
        return opener.load()


def pack(value: object) -> tuple[Packed, list[Tensor]]:
    """Take a value apart into what a pipe carries and its tensors."""
    text = io.BytesIO()
    packer = _Pickler(text, protocol=pickle.HIGHEST_PROTOCOL)
    packer.tensors = []
    packer.dump(value)
    places: list[Placed] = []
    stop = 0
    for i, tensor in enumerate(packer.tensors):
        start = -(-stop // ALIGNMENT) * ALIGNMENT
        times = None
        if tensor.ndim and tensor.stride(0) == 0 and len(tensor) > 1:
            # The one model of FedAvg, say, for all clients.
            times = len(tensor)
            packer.tensors[i] = tensor = tensor[0]
        places.append(Placed(start, tensor.dtype, tuple(tensor.shape), times))
        stop = places[-1].stop
    return Packed(text.getvalue(), places), packer.tensors


class _Pickler(pickle.Pickler):
    tensors: list[Tensor]

    def persistent_id(self, obj: Any) -> int | None:
        if type(obj) is not Tensor:
            return None
        self.tensors.append(obj.detach())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    tensors: list[Tensor]

    def persistent_load(self, pid: Any) -> Tensor:
        tensor: Tensor = self.tensors[pid]
        return tensor


@dataclass(frozen=True)
class Bundle:
    """A value in two parts, of which a carrier that knows NumPy moves the large one as it is.

    Attributes:
        buffer: (n,) uint8, its tensors.
    """

    packed: Packed
    buffer: np.ndarray[Any, np.dtype[np.uint8]]

    @classmethod
    def of(cls, value: object) -> Bundle:
        """Pack a value."""
        packed, tensors = pack(value)
        buffer = torch.empty(packed.n_bytes, dtype=torch.uint8)
        _fill(buffer, packed, tensors)
        return cls(packed, buffer.numpy())

    @property
    def n_bytes(self) -> int:
        """Size of it all."""
        return len(self.packed.value) + self.buffer.nbytes

    def open(self) -> Any:
        """The value, with tensors of its own: the carrier's memory may not be written to."""
        buffer = torch.empty(len(self.buffer), dtype=torch.uint8)
        buffer.numpy()[:] = self.buffer
        return self.packed.open(buffer)


def _fill(buffer: Tensor, packed: Packed, tensors: list[Tensor]) -> None:
    for place, tensor in zip(packed.places, tensors, strict=True):
        place.alone.view(buffer).copy_(tensor)


def shared_buffer(n_bytes: int) -> Tensor:
    """(n,) uint8 in memory that other processes can see."""
    try:
        buffer = torch.empty(n_bytes, dtype=torch.uint8)
        buffer.untyped_storage().share_memory_()
        return buffer
    except (RuntimeError, OSError) as error:
        raise out_of_shared_memory(n_bytes) from error


def out_of_shared_memory(n_bytes: int) -> ConfigError:
    """What to say when there is none left."""
    return ConfigError(
        f"no {n_bytes / 2**20:.0f} MiB of shared memory for worker processes: use fewer workers, "
        'a larger /dev/shm, or execution "sequential"'
    )


@dataclass
class Slot:
    """Two buffers that a question and its answer take in turn."""

    question: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    answer: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    wanted: int = 0


class Asking:
    """The end that asks. It owns all shared memory, so the death of the other end loses none.

    Args:
        slots: questions that may be open at a time.
    """

    def __init__(self, pipe: Connection, slots: int) -> None:
        self.pipe = pipe
        self.slots = [Slot() for _ in range(slots)]

    def ask(self, number: int, question: object) -> None:
        """Send a question in the slot `number`, whose last question has been answered."""
        slot = self.slots[number]
        packed, tensors = pack(question)
        new: list[Tensor | None] = [None, None]
        if packed.n_bytes > len(slot.question):
            new[0] = slot.question = shared_buffer(packed.n_bytes)
        if slot.wanted > len(slot.answer):
            new[1] = slot.answer = shared_buffer(slot.wanted)
        _fill(slot.question, packed, tensors)
        self.pipe.send((number, packed, new))

    def hear(self) -> tuple[int, Any]:
        """Wait for an answer: its slot, and the answer with tensors of its own."""
        number, packed, inside = self.pipe.recv()
        slot = self.slots[number]
        if inside:
            return number, packed.open(slot.answer, copied=True)
        slot.wanted = packed.n_bytes
        raw = bytearray(self.pipe.recv_bytes())
        return number, packed.open(torch.frombuffer(raw, dtype=torch.uint8))


class Answering:
    """The end that answers; a question's tensors are good until it is answered."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.slots: dict[int, Slot] = {}

    def hear(self) -> tuple[int, Any]:
        """Wait for a question: its slot, and the question."""
        number, packed, (question, answer) = self.pipe.recv()
        slot = self.slots.setdefault(number, Slot())
        slot.question = slot.question if question is None else question
        slot.answer = slot.answer if answer is None else answer
        return number, packed.open(slot.question)

    def answer(self, number: int, value: object) -> None:
        """Answer the question in slot `number`."""
        packed, tensors = pack(value)
        slot = self.slots[number]
        inside = packed.n_bytes <= len(slot.answer)
        # An answer that is larger than those before goes through the pipe, and the next question
        # brings a larger buffer.
        buffer = slot.answer if inside else torch.empty(packed.n_bytes, dtype=torch.uint8)
        _fill(buffer, packed, tensors)
        self.pipe.send((number, packed, inside))
        if not inside:
            self.pipe.send_bytes(buffer.numpy().data)
