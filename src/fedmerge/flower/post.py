"""Orders on their way: at most so many at once, each reply handed over as it comes.

It knows Flower's Grid and nothing of models; what an order or a reply says is not looked at.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from logging import getLogger
from typing import Any

AWAY = (0, 3, 4, 5)
"""Flower's numbers for errors of the transport; all others are of the app at the client."""
TOLERANCE = 5.0
"""Seconds that Flower is given to report an order as expired before we give it up ourselves."""
REMIND = 10.0
"""Least seconds until a node is reminded of its order, by a question without a purpose.

Where a run ended at the moment when a SuperNode took an order of it, that SuperNode (of Flower 1.41
at least) is one behind for good: it hands each reply over only when it is given the next message,
which would not come while the reply is waited for.
"""
LONGER = 1.25
"""Times what it has taken a node at best, until then it is likely to be at work."""
HOLD = 0.5
"""Seconds that others wait for a reply that has been announced and is being sent.

Flower's Grid waits for the rest of it itself: for minutes, if its sender has stopped in between.
"""
TELL = 3
"""Orders in a row that a node has answered after a reminder only, until the operator is told."""


def steady(otherwise: Any, call: Callable[..., Any], *given: Any) -> Any:
    """What the SuperLink answers, or `otherwise` where it fails inside just now.

    Its database may be locked for longer than it waits itself when many models are on their way.
    Flower's Grid makes an exception of that, which would end the run.
    """
    import httpx

    try:
        return call(*given)
    except httpx.HTTPStatusError as error:
        if error.response.status_code < 500:
            raise
        getLogger("flwr").warning("fedmerge: the SuperLink is not able to answer now: %s", error)
        return otherwise


class _Pull(threading.Thread):
    """What the SuperLink has for a message, asked for beside all else."""

    def __init__(self, grid: Any, name: str) -> None:
        super().__init__(daemon=True)
        self._grid, self._name = grid, name
        self._found: list[Any] = []
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._found = list(steady([], self._grid.pull_messages, [self._name]))
        except BaseException as error:
            self._error = error  # of whoever asks for the result

    def found(self) -> list[Any]:
        """The messages, once it has ended."""
        if self._error is not None:
            raise self._error
        return self._found


@dataclass
class Letter:
    """An order that was sent.

    Attributes:
        client: whom it was meant for. node: where it went. about: what the sender wants to know
            when the reply comes. round: it belongs to. sent, expires: on the monotonic clock.
        patience: seconds from `sent` to the next reminder. reminded: whether there was one.
    """

    client: str
    node: int
    about: Any
    round: int
    sent: float
    expires: float
    patience: float
    reminded: bool = False


@dataclass(frozen=True)
class Failure:
    """What came in place of a reply.

    Attributes:
        reason: a line. answered: whether the client's own app failed; else it was not reached, and
            may be when it is asked again.
    """

    reason: str
    answered: bool = False


@dataclass
class Post:
    """Sends orders and finds replies.

    Attributes:
        grid: Flower's. in_flight: most orders on their way. ttl: seconds that an order is good for.
    """

    grid: Any
    in_flight: int
    ttl: float
    _open: dict[str, Letter] = field(default_factory=dict)
    _reminders: dict[str, Letter] = field(default_factory=dict)
    _fastest: dict[int, float] = field(default_factory=dict)
    _behind: Counter[int] = field(default_factory=Counter)
    _pulls: dict[str, _Pull] = field(default_factory=dict)  # those that take longer than `HOLD`

    @property
    def full(self) -> bool:
        """Whether the next order has to wait."""
        return len(self._open) >= self.in_flight

    def busy(self) -> set[str]:
        """Clients whose reply is still out."""
        return {letter.client for letter in self._open.values()}

    def open(self, number: int) -> int:
        """Number of orders of a round that are still out."""
        return sum(letter.round == number for letter in self._open.values())

    def send(
        self, records: Any, kind: str, client: str, node: int, number: int, about: Any
    ) -> bool:
        """Send one order of round `number`; False if Flower does not take it."""
        name = self._push(records, kind, node, number)
        if name:
            sent = time.monotonic()
            patience = max(REMIND, LONGER * self._fastest.get(node, 0.0))
            expires = sent + self.ttl + TOLERANCE
            self._open[name] = Letter(client, node, about, number, sent, expires, patience)
        return bool(name)

    def replies(self) -> Iterator[tuple[Letter, Any, Failure | None]]:
        """What has come: the letter, its reply's records or None, and the error if there is one."""
        for name in list(self._open):
            # One at a time, too, unless it takes long: replies are as large as models.
            for message in self._pull(name):
                letter = self._open.pop(name, None)
                if letter is None:
                    continue
                took = time.monotonic() - letter.sent
                self._fastest[letter.node] = min(took, self._fastest.get(letter.node, took))
                if message.has_error():
                    reason = message.error.reason or f"error {message.error.code}"
                    line = " ".join(str(reason).split())[:500]
                    yield letter, None, Failure(line, message.error.code not in AWAY)
                elif message.metadata.src_node_id != letter.node:
                    line = f"a reply of node {message.metadata.src_node_id}"
                    yield letter, None, Failure(line, answered=True)
                else:
                    self._tell(letter)
                    yield letter, message.content, None
            late = self._open.get(name)
            if late is not None and time.monotonic() > late.expires:
                del self._open[name]
                self._pulls.pop(name, None)  # ends when Flower gives up; nobody waits for it
                yield late, None, Failure("no reply before the order expired")
        self._remind()

    def _pull(self, name: str) -> list[Any]:
        """What has come for a message; nothing while it is still on its way."""
        pull = self._pulls.pop(name, None)
        if pull is None:
            pull = _Pull(self.grid, name)
            pull.join(HOLD)
        if pull.is_alive():
            self._pulls[name] = pull
            return []
        return pull.found()

    def _tell(self, answered: Letter) -> None:
        """Say once which node may be behind for good: it costs every round these seconds."""
        node = answered.node
        self._behind[node] = self._behind[node] + 1 if answered.reminded else 0
        if self._behind[node] == TELL:
            getLogger("flwr").warning(
                'fedmerge: client "%s" (node %d) has answered %d orders in a row only after a '
                "reminder: unless its training takes that long, restart its SuperNode",
                *(answered.client, node, TELL),
            )

    def _push(self, records: Any, kind: str, node: int, number: int) -> str:
        """Give Flower one message; "" if it does not take it."""
        from flwr.app import Message

        message = Message(records, node, kind, ttl=self.ttl, group_id=str(number))
        # One at a time: so that no more than one model is held here.
        ids = list(steady([], self.grid.push_messages, [message]))
        return str(ids[0] or "") if ids else ""

    def _remind(self) -> None:
        """Send each node that takes long a message that it need not do anything for."""
        from flwr.app import ConfigRecord, RecordDict

        now = time.monotonic()
        # One at a time for each node: one that is at work takes it when it has done its order, and
        # where that has been answered just now the reply to the order is there, too.
        reminded = {letter.node for letter in self._reminders.values()}
        for name in list(self._reminders):
            if self._pull(name) or now > self._reminders[name].expires:
                del self._reminders[name]
                self._pulls.pop(name, None)
        for letter in self._open.values():
            if letter.node in reminded or now < letter.sent + letter.patience:
                continue
            letter.patience *= 2
            records = RecordDict({"who": ConfigRecord({})})
            name = self._push(records, "query", letter.node, letter.round)
            if name:
                letter.reminded = True
                self._reminders[name] = replace(letter, sent=now, expires=now + self.ttl)
                reminded.add(letter.node)
