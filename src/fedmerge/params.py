"""A module as one flat row of numbers, and back, without copying.

`Layout` says where each parameter and buffer lies in the row and which block of layers it belongs
to. It does not train, merge or send anything.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from .errors import ModelError
from .rng import derive

Kind = Literal["parameter", "buffer", "counter"]
Blocks = Literal["layer", "whole"] | Mapping[str, str] | Callable[[str], str]
ModelSource = nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True)
class Entry:
    """One parameter or buffer: `row[start:stop]`, seen in `shape`."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    block: int
    kind: Kind


@dataclass(frozen=True)
class Layout:
    """Where everything of a module lies in its row of `size` numbers.

    The row is: the trainable parameters, block after block (`n_params` numbers); then the floating
    buffers (BatchNorm's statistics); then the integer buffers (counters), kept as whole numbers in
    the row's dtype. Frozen parameters and non-persistent buffers are not in the row; they stay in
    the module. A tied parameter has one place.
    """

    entries: tuple[Entry, ...]
    blocks: tuple[str, ...]
    n_params: int
    dtype: torch.dtype

    @classmethod
    def of(cls, module: nn.Module, blocks: Blocks = "layer") -> Layout:
        """Lay out `module`.

        Args:
            blocks: "layer" (a layer with its bias is a block), "whole" (one block), or the block's
                name for each parameter's name, as a mapping or a function.

        Raises:
            ModelError: nothing to train, parameters that are not of one floating dtype, or a
                parameter without a block.
        """
        parameters = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        if not parameters:
            raise ModelError(
                f"{type(module).__name__} has no trainable parameter; "
                "set requires_grad on those that are to be learned"
            )
        dtypes = sorted({str(p.dtype) for _, p in parameters})
        dtype = parameters[0][1].dtype
        if len(dtypes) > 1 or not dtype.is_floating_point:
            raise ModelError(
                f"{type(module).__name__} has trainable parameters of dtype {', '.join(dtypes)}; "
                "wanted one floating dtype: convert it with module.to(dtype)"
            )
        name_of = _block_namer(blocks)
        names = list(dict.fromkeys(name_of(name) for name, _ in parameters))
        places = {name: i for i, name in enumerate(names)}
        entries: list[Entry] = []
        start = 0
        for index, block in enumerate(names):
            for name, parameter in parameters:
                if name_of(name) == block:
                    stop = start + parameter.numel()
                    entries.append(
                        Entry(name, tuple(parameter.shape), start, stop, index, "parameter")
                    )
                    start = stop
        n_params = start
        owners = {_owner(entry.name): entry.block for entry in entries}
        for kind, name, buffer in _travelling_buffers(module):
            # Statistics go with their layer's weights; those of a layer without any, with block 0.
            block_index = owners.get(_owner(name), places.get(_owner(name), 0))
            stop = start + buffer.numel()
            entries.append(Entry(name, tuple(buffer.shape), start, stop, block_index, kind))
            start = stop
        return cls(tuple(entries), tuple(names), n_params, dtype)

    @property
    def size(self) -> int:
        """Length of a row: parameters and buffers."""
        return self.entries[-1].stop

    @property
    def n_bytes(self) -> int:
        """Bytes of one row on the wire."""
        return self.size * self.dtype.itemsize

    @cached_property
    def fingerprint(self) -> str:
        """A digest of names, shapes, order and dtype: equal exactly if rows are interchangeable."""
        text = repr((self.entries, self.blocks, str(self.dtype)))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @cached_property
    def counters(self) -> slice:
        """The part of a row that holds whole-numbered counters."""
        start = min((e.start for e in self.entries if e.kind == "counter"), default=self.size)
        return slice(start, self.size)

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of the parameters of each block."""
        owned = [e for e in self.entries if e.kind == "parameter"]
        return tuple(
            (
                min(e.start for e in owned if e.block == b),
                max(e.stop for e in owned if e.block == b),
            )
            for b in range(len(self.blocks))
        )

    @cached_property
    def last_layer(self) -> tuple[int, int]:
        """(start, stop) of the parameters of the layer that stands last in the row."""
        owned = [e for e in self.entries if e.kind == "parameter"]
        start = min(e.start for e in owned if _owner(e.name) == _owner(owned[-1].name))
        return start, self.n_params

    @cached_property
    def segments(self) -> tuple[tuple[int, int, int], ...]:
        """(start, stop, block) that cover the whole row, buffers too, in order."""
        merged: list[tuple[int, int, int]] = []
        for e in self.entries:
            if merged and merged[-1][2] == e.block and merged[-1][1] == e.start:
                merged[-1] = (merged[-1][0], e.stop, e.block)
            else:
                merged.append((e.start, e.stop, e.block))
        return tuple(merged)

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """Name each part of `rows` (..., size) with its shape (..., *shape); nothing is copied."""
        self.check(rows)
        return {
            e.name: rows[..., e.start : e.stop].view((*rows.shape[:-1], *e.shape))
            for e in self.entries
            if e.kind != "counter"
        }

    def row(self, module: nn.Module) -> Tensor:
        """Return a new row (size,) with what `module` holds now."""
        self.check_module(module)
        held = self._held(module)
        return torch.cat([held[e.name].detach().reshape(-1).to(self.dtype) for e in self.entries])

    def bind(self, module: nn.Module, row: Tensor) -> None:
        """Make the parameters and floating buffers of `module` views of `row` (size,).

        Training the module then writes into `row`. Counters are copied in; `collect` brings them
        back.
        """
        self._check_one(row)
        self.check_module(module)
        for e in self.entries:
            part = row[e.start : e.stop].view(e.shape)
            owner, leaf = _leaf(module, e.name)
            if e.kind == "parameter":
                getattr(owner, leaf).data = part
            elif e.kind == "buffer":
                setattr(owner, leaf, part)
            else:
                getattr(owner, leaf).copy_(part.round())

    def gradient_places(self, module: nn.Module) -> list[tuple[int, int]]:
        """(start, stop) in a row for each trainable parameter, in the order of the module's own."""
        places = {e.name: (e.start, e.stop) for e in self.entries}
        return [places[n] for n, p in module.named_parameters() if p.requires_grad]

    def collect(self, module: nn.Module, row: Tensor) -> None:
        """Write the counters of `module` into `row`; the rest is there already after `bind`."""
        for e in self.entries:
            if e.kind == "counter":
                owner, leaf = _leaf(module, e.name)
                row[e.start : e.stop] = getattr(owner, leaf).reshape(-1)

    def load(self, module: nn.Module, row: Tensor) -> None:
        """Copy `row` (size,) into `module`, which keeps its own memory."""
        self._check_one(row)
        self.check_module(module)
        held = self._held(module)
        with torch.no_grad():
            for e in self.entries:
                part = row[e.start : e.stop].view(e.shape)
                held[e.name].copy_(part.round() if e.kind == "counter" else part)

    def update(self, start: Tensor, end: Tensor) -> Tensor:
        """Return what a client sends back (..., size): start - end; for buffers their end values.

        A difference of statistics would not be a convex combination after the server's step, and a
        variance could become negative; so buffers travel as values.
        """
        delta = start - end
        delta[..., self.n_params :] = end[..., self.n_params :]
        return delta

    def end(self, start: Tensor, delta: Tensor) -> Tensor:
        """Return where a client that started from `start` (..., size) and sends `delta` ended."""
        n = self.n_params
        return torch.cat([start[..., :n] - delta[..., :n], delta[..., n:]], dim=-1)

    def check(self, rows: Tensor) -> None:
        """Raise ModelError unless `rows` is (..., size) of this dtype."""
        if rows.shape[-1] != self.size or rows.dtype != self.dtype:
            raise ModelError(
                f"a row has {rows.shape[-1]} numbers of {rows.dtype}, "
                f"wanted {self.size} of {self.dtype}: is it of another model?"
            )

    def _check_one(self, row: Tensor) -> None:
        if row.ndim != 1:
            raise ModelError(
                f"a row of shape {tuple(row.shape)}, wanted ({self.size},): take one, e.g. rows[0]"
            )
        self.check(row)

    def check_module(self, module: nn.Module) -> None:
        """Raise ModelError if `module` is not of the architecture that was laid out."""
        held = self._held(module)
        for e in self.entries:
            if e.name not in held:
                raise ModelError(f'the model has no "{e.name}": every client needs the same model')
            if tuple(held[e.name].shape) != e.shape:
                raise ModelError(
                    f'"{e.name}" has shape {tuple(held[e.name].shape)}, wanted {e.shape}: '
                    "every client needs the same model"
                )
        known = {e.name for e in self.entries}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and name not in known:
                raise ModelError(f'the model has an unexpected parameter "{name}"')

    @staticmethod
    def _held(module: nn.Module) -> dict[str, Tensor]:
        return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _block_namer(blocks: Blocks) -> Callable[[str], str]:
    if blocks == "layer":
        return lambda name: _owner(name) or "model"
    if blocks == "whole":
        return lambda name: "model"
    if isinstance(blocks, str):
        raise ModelError(f'blocks = "{blocks}": wanted "layer", "whole", a mapping or a function')
    look = blocks.__getitem__ if isinstance(blocks, Mapping) else blocks

    def namer(name: str) -> str:
        try:
            return str(look(name))
        except KeyError:
            raise ModelError(f'blocks names no block for the parameter "{name}"') from None

    return namer


def _travelling_buffers(module: nn.Module) -> list[tuple[Kind, str, Tensor]]:
    persistent = set(module.state_dict(keep_vars=True))
    found = [(n, b) for n, b in module.named_buffers() if n in persistent]
    floats: list[tuple[Kind, str, Tensor]] = [
        ("buffer", n, b) for n, b in found if b.dtype.is_floating_point
    ]
    others: list[tuple[Kind, str, Tensor]] = [
        ("counter", n, b) for n, b in found if not b.dtype.is_floating_point
    ]
    return floats + others


def copied(module: nn.Module) -> nn.Module:
    """A copy of a module. Raises ModelError if it holds what cannot be copied, such as a lock."""
    try:
        return copy.deepcopy(module)
    except Exception as error:  # objects raise what they like when they are copied
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(
            f"the model ({type(module).__name__}) cannot be copied: {reason}; keep locks, files "
            "and generators out of it"
        ) from error


def build(model: ModelSource, seed: int, index: int = 0) -> nn.Module:
    """Return the `index`-th independent random initialisation of `model`.

    A function is called; a module is copied and its layers reset (those with `reset_parameters`).
    Index 0 of a module keeps the values it was given with. The global random state is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "initial", index))
        if not isinstance(model, nn.Module):
            made = model()
            if not isinstance(made, nn.Module):
                raise ModelError(f"the model function returned {type(made).__name__}, not a Module")
            return made
        made = copied(model)
        if index > 0:
            for part in made.modules():
                reset = getattr(part, "reset_parameters", None)
                if callable(reset):
                    reset()
        return made
