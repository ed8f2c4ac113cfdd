"""How a server's models are kept: in which dtype, and in memory or in files.

Files are for models that do not fit into memory: they are mapped, so that the system reads and
writes the parts that are worked on. What a state consists of is decided in `soup` and `store`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .algorithms import Algorithm, FedAvg, FedMerge
from .algorithms.fedmerge import MEANS
from .errors import ConfigError, StateError
from .params import Layout
from .rng import derive
from .sums import ModelSum

Kept = Literal["model", "float32", "bfloat16"]
DTYPES: dict[str, torch.dtype | None] = {
    "model": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}


@dataclass
class Storage:
    """Keeps the models of one server; knows which of its files a saved state needs.

    Sums are made in float32 at least, whatever the models are kept in, and clients are sent the
    module's dtype. A step ends with one rounding: to the nearest number for float32; for bfloat16,
    whose numbers are up to 1/128 apart, relatively, up or down by chance, so that steps smaller
    than that are kept on average (the draws depend on seed, round, place and value alone). Either
    way a number is off by less than one distance.

    Attributes:
        kept: "model" for the dtype of the module's own parameters.
        folder: of the files; None to keep models in memory. One server at a time.
    """

    kept: Kept = "model"
    folder: Path | None = None
    _current: Path | None = field(default=None, init=False)
    _sealed: Path | None = field(default=None, init=False)

    @property
    def idle(self) -> bool:
        """Whether models are as the method makes them."""
        return self.kept == "model" and self.folder is None

    def adapted(self, algorithm: Algorithm) -> Algorithm:
        """The method as it is run: models that are kept like this have no means beside them."""
        if not self.idle and isinstance(algorithm, FedMerge):
            return replace(algorithm, average=False)
        return algorithm

    def moved(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the shared state of a server that keeps its models in memory, what goes with this."""
        return {n: table for n, table in shared.items() if self.idle or n != MEANS}

    def check(self, algorithm: Algorithm, layout: Layout, *, guarded: bool) -> None:
        """Raise ConfigError for what cannot be kept like this."""
        if self.kept not in DTYPES:
            raise ConfigError(f'storage = "{self.kept}": wanted {", ".join(DTYPES)}')
        if self.idle:
            return
        if type(algorithm) not in (FedAvg, FedMerge):
            raise ConfigError(
                f'method "{algorithm.name}": storage and models_in are for fedmerge and fedavg '
                "only; leave them out, or use one of these"
            )
        if guarded:
            raise ConfigError(
                "storage and models_in do not go with robust or privacy: leave out one of them"
            )
        if self.kept == "bfloat16" and layout.size > layout.n_params:
            raise ConfigError(
                'storage = "bfloat16" needs a model without buffers, whose statistics would lose '
                "their digits: use GroupNorm in place of BatchNorm, or float32"
            )

    def keep(self, models: Tensor, version: int) -> Tensor:
        """Models (d, P) of `version` as they are kept."""
        models = models.to(DTYPES[self.kept] or models.dtype)
        if self.folder is None:
            return models
        kept = self._room(models.shape, models.dtype, version)
        return kept.copy_(models)

    def sum(self, layout: Layout, models: Tensor, seed: int, version: int) -> ModelSum | None:
        """What the round after `version` is summed up in; None for what the method does itself."""
        if self.idle:
            return None
        d = len(models)
        total = None if self.folder is None else self._scratch((d, layout.size))
        made = ModelSum.for_layout(layout, d, total)
        made.salt = derive(seed, "rounding", version) if self.kept == "bfloat16" else None
        if self.folder is not None:
            made.out = lambda: self._room(models.shape, models.dtype, version + 1)
        return made

    # -- files -------------------------------------------------------------------------------------

    def seal(self, models: Tensor) -> dict[str, Any]:
        """Make the current file durable; it stays as it is from now on. Returns what names it."""
        path = self._current
        if path is None:
            raise StateError("these models are not in files")
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as held:
            held.flush()
            os.fsync(file.fileno())
        self._sealed = path
        return {
            "file": path.name,
            "shape": list(models.shape),
            "dtype": str(models.dtype).removeprefix("torch."),
        }

    def saved(self) -> None:
        """The state with the sealed file is on disk: files of earlier ones can go."""
        if self.folder is None:
            return
        for path in [*self.folder.glob("models-*.bin"), *self.folder.glob("sum-*.bin")]:
            if path not in (self._sealed, self._current):
                with contextlib.suppress(OSError):
                    path.unlink()

    def open(self, named: dict[str, Any], where: str) -> Tensor:
        """The models of a state, from what `seal` has returned.

        Raises:
            StateError: their file is not there, or not whole.
        """
        if self.folder is None:
            raise StateError(
                f"{where} has its models in a file, {named['file']}: "
                "pass models_in, the folder where that is"
            )
        path = self.folder / str(named["file"])
        shape, dtype = tuple(named["shape"]), getattr(torch, named["dtype"])
        wanted = shape[0] * shape[1] * dtype.itemsize
        advice = f"restore it from a copy, or remove it and {where} to start again"
        try:
            size = path.stat().st_size
        except OSError as error:
            raise StateError(f"{path} cannot be read: {error.strerror}; {advice}") from error
        if size != wanted:
            raise StateError(f"{path} is damaged: {size} bytes, {wanted} were written; {advice}")
        self._leave()
        self._current = self._sealed = path
        return _mapped(path, shape, dtype)

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype, version: int) -> Tensor:
        """A new file for the models of `version`; the one before goes, unless a state needs it."""
        path = _reserve(self._place, f"models-{version}-", shape, dtype)
        self._leave()
        self._current = path
        return _mapped(path, shape, dtype)

    def _leave(self) -> None:
        if self._current is not None and self._current != self._sealed:
            # Who still has it mapped keeps it.
            with contextlib.suppress(OSError):
                self._current.unlink()

    def _scratch(self, shape: tuple[int, int]) -> Tensor:
        """Zeros (float64) in a file without a name, which is gone when nobody uses it."""
        path = _reserve(self._place, "sum-", shape, torch.float64)
        try:
            return _mapped(path, shape, torch.float64)
        finally:
            path.unlink()

    @property
    def _place(self) -> Path:
        if self.folder is None:
            raise StateError("these models are not in files")
        return self.folder


def _reserve(folder: Path, prefix: str, shape: tuple[int, ...], dtype: torch.dtype) -> Path:
    """Make a file of zeros, whose room on the disk is taken: a full disk would end the process."""
    size = shape[0] * shape[1] * dtype.itemsize
    path = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=prefix, suffix=".bin", dir=folder)
        with os.fdopen(handle, "wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        if path is not None:
            Path(path).unlink(missing_ok=True)
        raise StateError(
            f"no room for {size / 2**20:.0f} MiB of models in {folder}: {error.strerror or error}"
        ) from error
    return Path(path)


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    with open(path, "r+b") as file:
        held = mmap.mmap(file.fileno(), 0)
    return torch.frombuffer(held, dtype=dtype).view(shape)
