"""FedMerge on Flower: a ready `ServerApp` and `ClientApp` for a model and data of one's own.

The method is not here: see `fedmerge.soup` for the server, and `fedmerge.sim.execute` for the side
of the clients, which a simulation runs as well. Needs the extra "flower".
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import client_app
    from .config import ServerConfig
    from .server import server_app

__all__ = ["ServerConfig", "client_app", "server_app"]

_MODULES = {"ServerConfig": "config", "client_app": "client", "server_app": "server"}


def __getattr__(name: str) -> Any:
    # When first used: a client does without the server, and a command line without torch.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
