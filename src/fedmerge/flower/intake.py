"""Replies that come in: read, checked against their orders, folded into the soup or refused.

It sends nothing and ends no round; what makes an update acceptable is decided by the soup's guard.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from logging import WARNING
from typing import Any

import torch
from torch import Tensor

from ..algorithms import Ticket, Updates
from ..codec import Coded, decode, n_bytes, spread
from ..errors import ModelError
from ..safety import Reason
from ..sim.clock import Clock
from ..soup import Soup
from . import progress as kept
from . import wire
from .post import Failure, Letter
from .roster import Roster, say


class Gathered:
    """What is gathered about a round while it runs.

    Attributes:
        number: of the round. cohort: clients asked. folded: those whose update was taken.
        failed: clients that answered, but not with an update that was taken.
        refused: updates by reason. own: figures of the clients' own models. digests: of the updates
            that were taken, by client.
        bytes_up, bytes_down: of updates taken and of models sent. clock: seconds by phase.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.cohort = self.bytes_up = self.bytes_down = 0
        self.folded: set[str] = set()
        self.failed: set[str] = set()
        self.refused: Counter[str] = Counter()
        self.own: dict[str, wire.Figures] = {}
        self.digests: dict[str, bytes] = {}
        self.clock = Clock()


class Intake:
    """Takes replies in for a server.

    Args:
        soup, progress, roster: the server's own; they change with what comes in.
    """

    def __init__(self, soup: Soup, progress: kept.Progress, roster: Roster) -> None:
        self._soup = soup
        self._progress = progress
        self._roster = roster
        self._parts = soup.algorithm.travels(soup.setup.layout)
        self._last_digest: dict[str, bytes] = {}

    def committed(self, now: Gathered) -> None:
        """Remember a round's updates, which are not taken again in a later one.

        Those of a round that is tried again are: it asks for the same work.
        """
        self._last_digest |= now.digests

    def receive(self, now: Gathered, letter: Letter, records: Any, error: Failure | None) -> None:
        """Take a reply in, or say why not. The ticket is the server's own, not the client's."""
        reply = self.read(now, letter, records, error)
        if reply is None:
            if error is None or error.answered:
                now.failed.add(letter.client)
            return
        client, ticket = letter.client, letter.about
        reason = self._untrue(reply, ticket) or self._fold(now, client, ticket, reply)
        if reason is not None:
            now.failed.add(client)
            now.refused[reason] += 1
            line = f"update of round {now.number} refused: {reason}"
            if reason != "shape":  # which shape has been said
                self._progress.members[client].error = line
            say(f'"{self._roster.name(client)}": {line}', WARNING)
            self._tell_aside(client)
            return
        now.folded.add(client)
        # Figures of those only whose update was taken: others could blank a mean by one number.
        if self._progress.pending is not None:
            self._progress.put(client, reply.figures, "merged", "tuned")
        member = self._progress.members[client]
        member.replies += 1
        member.seen, member.sizes, member.error = now.number, reply.sizes, ""
        if "local" in reply.figures:
            now.own[client] = {"local": reply.figures["local"]}

    def read(
        self, now: Gathered, letter: Letter, records: Any, error: Failure | None
    ) -> wire.Reply | None:
        """The reply in a letter, or None where there is none to use; that is counted."""
        if error is not None:
            self._roster.fail(letter.client, error.reason)
            return None
        try:
            reply = wire.read_reply(records)
        except ModelError as problem:
            self._refuse(now, letter.client, "malformed", str(problem))
            return None
        if reply.error is not None:
            self._roster.fail(letter.client, reply.error)
            return None
        return reply

    def _untrue(self, reply: wire.Reply, ticket: Ticket) -> Reason | None:
        """Why a reply cannot be to this order, if it cannot."""
        if reply.ticket == ticket:
            return None
        foreign = reply.ticket is None or reply.ticket.client != ticket.client
        reason: Reason = "foreign" if foreign else "stale"
        self._soup.refuse(ticket.client, reason)
        return reason

    def _fold(self, now: Gathered, client: str, ticket: Ticket, reply: wire.Reply) -> Reason | None:
        layout = self._soup.setup.layout
        shape = self._soup.algorithm.update_shape(layout)
        if ticket.version != self._soup.version:
            self._soup.refuse(client, "stale")
            return "stale"
        try:
            delta = self._decode(reply.coded, shape)
        except ModelError as error:
            self._refuse(now, client, "shape", str(error), count=False)
            return "shape"
        digest = hashlib.blake2b(delta.contiguous().numpy().data, digest_size=16).digest()
        if delta.any() and self._last_digest.get(client) == digest:
            self._soup.refuse(client, "duplicate")  # the very update of a round before
            return "duplicate"
        refusals = self._soup.fold(
            Updates(
                (ticket,),
                delta[None],
                torch.tensor([reply.n_examples]),
                torch.tensor([reply.steps]),
                torch.tensor([reply.lr], dtype=torch.float64),
                {name: value[None] for name, value in reply.extra.items()},
            )
        )
        if refusals:
            return refusals[0].reason
        now.digests[client] = digest
        now.bytes_up += n_bytes(reply.coded) + n_bytes(reply.extra)
        return None

    def _decode(self, coded: Coded, shape: tuple[int, ...]) -> Tensor:
        layout = self._soup.setup.layout
        if "delta" not in coded:
            return decode(coded, layout.size, layout.n_params, layout.dtype)
        delta = coded["delta"]
        if delta.shape == shape == (0,):
            return delta
        delta = spread(delta, self._parts, layout.size)
        if delta.shape != shape or delta.dtype != layout.dtype:
            raise ModelError(f"an update of shape {tuple(delta.shape)} and {delta.dtype}")
        return delta

    def _refuse(
        self, now: Gathered, client: str, reason: Reason, why: str, *, count: bool = True
    ) -> None:
        self._soup.refuse(client, reason)
        if count:
            now.refused[reason] += 1
        self._progress.members[client].error = f"in round {now.number} it sent {why}"
        say(f'round {now.number}: "{self._roster.name(client)}" sent {why}', WARNING)
        self._tell_aside(client)

    def _tell_aside(self, client: str) -> None:
        if client in self._soup.safety.guard.aside:
            say(
                f'"{self._roster.name(client)}" is set aside after so many refused updates, until '
                "the operator lets it back (fedmerge status --readmit)",
                WARNING,
            )
