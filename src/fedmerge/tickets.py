"""Tickets of an open round: who was given which model, and which updates are taken for them.

It judges what comes in, whoever sent it; what is done with an update is decided elsewhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .algorithms import Algorithm, Setup, Tensors, Ticket, Updates
from .errors import ModelError
from .merging import finite_rows
from .roster import Roster, need_list
from .safety import Reason, Safety


@dataclass(frozen=True)
class Refusal:
    """An update that was not taken: unknown client, stale or duplicate ticket, wrong shape, dtype
    or contents, a number that is not finite, or no examples behind it; with a `Guard`, too long, or
    of a client set aside. An adapter adds foreign (another client's ticket) and malformed."""

    client: str
    reason: Reason


class Tickets:
    """Those of one round.

    Args:
        algorithm, setup, shared: the method and its state, which stays what it is until the round
            ends. version: rounds that were committed before.
        roster: of all clients. safety: what else an update is judged by.

    Attributes:
        seen: clients of which an update was taken.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        setup: Setup,
        shared: Tensors,
        version: int,
        roster: Roster,
        safety: Safety,
    ) -> None:
        self._algorithm, self._setup, self._shared = algorithm, setup, shared
        self._version, self._roster, self._safety = version, roster, safety
        self.seen: set[str] = set()
        # Of clients' rows, which stay what they are until the round ends.
        self._digests: dict[str, str] = {}

    def give(self, clients: Sequence[str], rows: Tensors | None = None) -> tuple[Ticket, ...]:
        """Those of `clients`. rows: what `send` reads of theirs, if at hand."""
        need_list(clients)
        self._name(clients, rows)
        return tuple(Ticket(c, self._version, self._digests[c]) for c in clients)

    def judge(self, updates: Updates) -> Iterator[Reason | None]:
        """Say of each update in turn why it is not taken; None for one that is. It is taken once,
        for the model that its ticket names, and only if it is sound.

        Raises:
            ModelError: a stack whose parts are not of one length.
        """
        parts = [updates.delta, updates.n_examples, updates.steps, updates.lr]
        if any(len(part) != len(updates) for part in [*parts, *updates.extra.values()]):
            raise ModelError(
                f"updates of {len(updates)} tickets have parts of {[len(p) for p in parts]} "
                "clients: wanted one row of each for every ticket"
            )
        new = {t.client for t in updates.tickets if t.client not in self._digests}
        self._name([client for client in new if client in self._roster])
        for i, reason in enumerate(self._sound(updates)):
            reason = self._judge(updates, i, reason)
            if reason is None:
                self.seen.add(updates.tickets[i].client)
            yield reason

    def _judge(self, updates: Updates, i: int, numbers: Reason | None) -> Reason | None:
        ticket = updates.tickets[i]
        if ticket.client not in self._digests:
            return "unknown"
        if ticket.version != self._version or ticket.row != self._digests[ticket.client]:
            return "stale"
        if ticket.client in self.seen:
            return "duplicate"
        extra = {name: value[i] for name, value in updates.extra.items()}
        if numbers == "shape" or not self._algorithm.fits(self._shared, extra):
            return "shape"
        return numbers or self._safety.judge(ticket.client, updates.delta[i], self._setup)

    def _sound(self, updates: Updates) -> list[Reason | None]:
        """What is wrong with the numbers of each update, whoever sent it."""
        layout, delta = self._setup.layout, updates.delta
        if delta.shape[1:] != self._algorithm.update_shape(layout) or delta.dtype != layout.dtype:
            return ["shape"] * len(updates)
        # Lists: to look at a tensor's numbers one by one takes long.
        counts = zip(updates.n_examples.tolist(), updates.steps.tolist(), strict=True)
        rates = zip(finite_rows(delta), updates.lr.tolist(), strict=True)
        return [
            "empty"
            if not (n > 0 and steps > 0)
            else None
            if finite and 0 < lr < math.inf
            else "non-finite"
            for (n, steps), (finite, lr) in zip(counts, rates, strict=True)
        ]

    def _name(self, clients: Sequence[str], rows: Tensors | None = None) -> None:
        """See to it that `self._digests` has those of `clients`; `rows` are what `send` reads of
        theirs, if at hand."""
        if all(client in self._digests for client in clients):
            return
        if rows is None:
            rows = self._roster.rows(clients, self._algorithm.sends_by)
        self._digests.update(zip(clients, _digests(rows, len(clients)), strict=True))


def _digests(rows: Tensors, k: int) -> list[str]:
    """A short digest of each client's rows: names the model that was merged from them."""
    if not k:
        return []
    flat = [rows[name].reshape(k, -1).contiguous().numpy() for name in sorted(rows)]
    made = []
    for i in range(k):
        digest = hashlib.blake2b(digest_size=8)
        for part in flat:
            digest.update(part[i])
        made.append(digest.hexdigest())
    return made
