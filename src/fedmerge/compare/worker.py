"""What a worker process of a comparison does: cell after cell, often of the same clients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import RunConfig, import_core, load_config
from .trackers import leave_out
from .tuning import TUNING

if TYPE_CHECKING:
    from ..data import Federation

ROOM = 2**28
"""Bytes of inputs, of clients that were made for earlier cells, that a worker keeps: five seeds of
all settings of a few thousand small images."""


def prepare_worker(trackers_down: Collection[str] = ()) -> None:
    """Import the core; what there is to say of data and trackers, the command itself has said."""
    import_core()
    from ..data import DataWarning

    leave_out(trackers_down)
    warnings.simplefilter("ignore", DataWarning)


def run_cell(config: dict[str, Any], folder: Path) -> None:
    """Run the settings `config` in `folder`."""
    trial = folder.parent.name == TUNING
    load_config(None, config).run(folder, clients=_kept_federation, trial=trial)


_kept: dict[tuple[object, ...], Federation] = {}
"""Clients of the last cells, the latest last: many methods are run on the same."""


def _kept_federation(config: RunConfig) -> Federation:
    key = (config.data, config.setting, config.clients, config.seed, config.train_fraction)
    found = _kept.pop(key, None)
    if found is None:
        # First, since there may be room for one only.
        while sum(map(_bytes, _kept.values())) > ROOM:
            del _kept[next(iter(_kept))]
        found = config.federation()
    _kept[key] = found
    return found


def _bytes(federation: Federation) -> int:
    """Those of all inputs, also of inputs that stay on the disk."""
    examples = sum(len(split) for client in federation.clients for _, split in client.splits())
    return 4 * examples * math.prod(federation.input_shape)
