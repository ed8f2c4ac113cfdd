"""What a deployed server shows: its status, the files of a run for `fedmerge report`, the models.

It reads the server's state and changes nothing.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..algorithms import Tensors
from ..compare import folder as files
from ..errors import StateError
from ..store import write_atomic
from . import progress as kept
from .config import ServerConfig
from .folder import STATUS, read_json, write_json

if TYPE_CHECKING:
    from .intake import Gathered
    from .server import Server

EVERY = 2.0
"""Least seconds from one status to the next within a round."""
MODELS = "models"


def publish(server: Server, *, finished: bool = False) -> None:
    """Write log, result and status of the last commit."""
    folder, settings = server.settings.folder, server.settings
    config = {**asdict(settings), "setting": "natural", "data": "federation"}
    files.write_config(folder, config)
    privacy = server.soup.safety.privacy
    logs: list[dict[str, Any]] = []
    for log in server.progress.history:
        epsilon = {"epsilon": privacy.epsilon(log.round)} if privacy else {}
        logs.append({**log.to_json(), **epsilon})
    files.write_log(folder, logs)
    if server.progress.latest is not None:
        files.write_result(folder, kept.result(settings, server.soup, server.progress))
    _write_status(server, {"state": "finished" if finished else "running"})


def publish_status(server: Server, now: Gathered) -> None:
    """Say how the round that is running stands, not too often; a full disk does not stop it."""
    if time.monotonic() - server.shown < EVERY:
        return
    server.shown = time.monotonic()
    try:
        _write_status(
            server,
            {
                "state": "waiting for clients" if not now.cohort else "running",
                "running": {"round": now.number, "cohort": now.cohort, "taken": len(now.folded)},
            },
        )
    except StateError:
        return


def publish_failure(settings: ServerConfig, reason: str) -> None:
    """Say why the run has ended, beside what was last said of it."""
    path = settings.folder / STATUS
    nothing: dict[str, Any] = {
        "round": 0,
        "epsilon": None,
        "refused": {},
        "nodes_refused": [],
        "clients": [],
    }
    with suppress(StateError):
        now = {"rounds": settings.rounds, "method": settings.method, "written": time.time()}
        write_json(path, {**nothing, **read_json(path), **now, "state": "failed", "error": reason})


def _write_status(server: Server, facts: dict[str, Any]) -> None:
    soup, progress = server.soup, server.progress
    online = server.roster.online
    guard = soup.safety.guard
    clients = []
    for client in soup.clients:
        member = progress.members.get(client, kept.Member())
        clients.append(
            {
                "id": client,
                **asdict(member),
                "connected": client in online,
                "refused": dict(soup.refused_by.get(client, {})),
                "set_aside": client in guard.aside,
                "weights": kept.client_weights(soup, client),
            }
        )
    privacy = soup.safety.privacy
    write_json(
        server.settings.folder / STATUS,
        {
            "written": time.time(),
            "round": soup.version,
            "rounds": server.settings.rounds,
            "method": server.settings.method,
            "refused": dict(soup.refused),
            "epsilon": privacy.epsilon(soup.version) if privacy else None,
            "nodes_refused": server.roster.nodes_refused,
            "clients": clients,
            **facts,
        },
    )


def export_models(server: Server) -> None:
    """Write each client's model, as it would use it now, to `models/NAME.safetensors`."""
    from safetensors.torch import save

    soup = server.soup
    layout = soup.setup.layout
    for client in soup.clients:
        message = soup.used([client])[0]
        if len(message) != 1:
            return  # which of several models a client uses is decided at the client
        member = server.progress.members.get(client, kept.Member())
        name = re.sub(r"[^\w.-]+", "_", member.label or client)
        values: Tensors = {n: v.contiguous() for n, v in layout.views(message[0]).items()}
        facts = {"client": client, "round": str(soup.version), "model": layout.fingerprint}
        write_atomic(server.settings.folder / MODELS / f"{name}.safetensors", save(values, facts))
