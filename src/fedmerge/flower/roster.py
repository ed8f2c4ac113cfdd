"""Who is there: the clients that are connected, what the operator says of them, what went wrong.

It asks nodes who they are and keeps count; which of them train in a round is not decided here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from logging import INFO, WARNING, getLogger
from typing import Any

from ..soup import Soup
from . import progress as kept
from .config import ServerConfig
from .folder import read_operator
from .identity import Registry
from .post import Post, steady

LOG = getLogger("flwr")  # where an operator looks: `flwr log`
AGAIN = 30.0
"""Seconds after which nodes that were not let in are asked again."""


def say(text: str, level: int = INFO) -> None:
    """Tell the operator."""
    LOG.log(level, "fedmerge: %s", text)


class Roster:
    """The clients of a server and the nodes that they are now.

    Args:
        grid: Flower's. soup, progress: the server's; clients and their counts are added there.
    """

    def __init__(
        self, grid: Any, settings: ServerConfig, soup: Soup, progress: kept.Progress
    ) -> None:
        self._grid = grid
        self._folder = settings.folder
        self._soup = soup
        self._progress = progress
        self._questions = Post(grid, 10**9, ttl=settings.deadline)
        self._registry = Registry(settings.identity)
        self._looked = -math.inf
        if settings.identity == "client-id":
            say(
                'identity = "client-id": a client is who it says it is, and can be forged; use '
                'keys and identity = "key" outside a trusted network',
                WARNING,
            )

    @property
    def online(self) -> dict[str, int]:
        """The node of each client that was connected at the last look."""
        return self._registry.online()

    @property
    def nodes_refused(self) -> list[str]:
        """Why nodes were not let in."""
        return sorted(set(self._registry.refused.values()))

    def look(self) -> None:
        """Find out which clients are connected, and ask those that are new who they are."""
        self._heed_operator()
        found = steady(None, self._grid.get_nodes)
        if found is None:
            return  # who was there at the last look may still be
        nodes = {node.node_id: node for node in found}
        before = len(self._registry.refused)
        asked = self._registry.unknown(nodes)
        if asked:
            self._ask_names(asked)
        for client, node in self._registry.online().items():
            member = self._progress.members.setdefault(client, kept.Member())
            member.node = node
            member.label = member.label or self._registry.names.get(client, "")
        if len(self._registry.refused) > before:
            for reason in self._registry.refused.values():
                say(reason, WARNING)
        if time.monotonic() - self._looked > AGAIN:
            self._registry.retry_refused()
            self._looked = time.monotonic()
        self._soup.join(sorted(self._registry.online()))

    def _ask_names(self, nodes: Sequence[int]) -> None:
        """Ask nodes who they are, once, and note what has been answered so far."""
        from flwr.app import ConfigRecord, RecordDict

        asked = {int(client) for client in self._questions.busy()}
        for node in nodes:
            if node not in asked:
                records = RecordDict({"who": ConfigRecord({})})
                self._questions.send(records, "query", str(node), node, 0, None)
        for letter, records, error in self._questions.replies():
            found = dict(records["who"]) if records and "who" in records else {}
            if "client" in found:
                self._registry.claim(letter.node, str(found["client"]))
            else:
                why = (
                    error.reason if error else str(found.get("error", "it does not say who it is"))
                )
                self._registry.refuse(letter.node, f"node {letter.node}: {why}")

    def _heed_operator(self) -> None:
        labels, readmitted = read_operator(self._folder)
        for client, label in labels.items():
            if client in self._progress.members:
                self._progress.members[client].label = label
        back = [c for c, at in readmitted.items() if at > self._progress.readmitted]
        if back:
            self._soup.safety.guard.readmit(back)
            self._progress.readmitted = max(readmitted.values())
            say(f"let back by the operator: {', '.join(map(self.name, back))}")

    def fail(self, client: str, reason: str) -> None:
        """Count what went wrong with a client, and say it if it is new."""
        member = self._progress.members.setdefault(client, kept.Member())
        if reason != member.error:
            say(f'"{self.name(client)}": {reason}', WARNING)
        member.failures += 1
        member.error = reason

    def complaints(self) -> str:
        """All that has gone wrong and still holds, as one line."""
        lines = [f"{self.name(c)}: {m.error}" for c, m in self._progress.members.items() if m.error]
        lines += self._registry.refused.values()
        if self._soup.refused:
            lines.append(f"refused so far: {dict(self._soup.refused)}")
        return "; ".join(dict.fromkeys(lines)) or "none has complained"

    def name(self, client: str) -> str:
        """What to call a client."""
        member = self._progress.members.get(client)
        return f"{member.label} ({client})" if member and member.label else client
