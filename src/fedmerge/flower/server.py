"""The server on Flower: rounds of orders out and updates in, around a simulation's own `Soup`.

It moves bytes, waits and saves. What is sent, taken, refused and learned is decided by the soup.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import ERROR, WARNING
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..algorithms import Tensors, make_method
from ..codec import cut
from ..errors import ConfigError, FedmergeError
from ..params import ModelSource
from ..rng import numpy_generator
from ..sim.log import RoundLog
from ..sim.mixing import row_statistics
from ..store import has_state
from . import progress as kept
from . import wire
from .config import ServerConfig
from .folder import locked
from .intake import Gathered, Intake
from .post import Post
from .publish import export_models, publish, publish_failure, publish_status
from .require import require_flower
from .roster import Roster, say

if TYPE_CHECKING:
    from flwr.serverapp import ServerApp

ATTEMPTS = 3
"""Attempts at a round that clients answer with errors or updates that are refused, one after the
other, before the server gives up. Clients that are away are waited for instead."""
PATIENCE = 120.0
"""Seconds that a server before this one is given to let go of the state folder."""
LOOK = 1.0
"""Seconds from one look at who is there to the next."""


def server_app(config: ServerConfig | None, model: ModelSource, *, n_inputs: int = 0) -> ServerApp:
    """A `ServerApp` that runs the rounds of `config`, and goes on where its state folder stands.

    Args:
        config: the settings; what the app's run config has under `fedmerge.` overrides them.
        model: a function that makes the module, the same as at the clients.
        n_inputs: numbers in one flattened input, for the methods that need it (the gate of "moe").

    Raises:
        MissingExtraError, ConfigError: Flower is not installed, or in another version.
    """
    require_flower()
    from flwr.serverapp import ServerApp

    app = ServerApp()
    app.fedmerge_model = model  # for `fedmerge deploy check`

    @app.main()
    def main(grid: Any, context: Any) -> None:
        try:
            settings = (config or ServerConfig()).with_options(context.run_config)
            with locked(settings.folder, PATIENCE, say), _failure_published(settings):
                Server(grid, settings, model, n_inputs).run()
        except FedmergeError as error:
            say(str(error), ERROR)
            raise

    return app


@contextmanager
def _failure_published(settings: ServerConfig) -> Iterator[None]:
    """Show in the status why a run has failed: Flower alone tells it in its log."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, FedmergeError) else f"{type(error).__name__}: "
        publish_failure(settings, " ".join(f"{kind}{error}".split()))
        raise


class Server:
    """One run of the server; what must outlive it is in the state folder.

    Args:
        grid: Flower's, or anything with its `get_nodes`, `push_messages` and `pull_messages`.
    """

    def __init__(
        self, grid: Any, settings: ServerConfig, model: ModelSource, n_inputs: int = 0
    ) -> None:
        self.settings = settings
        self.soup = settings.soup(model, n_inputs)
        self.progress = kept.Progress()
        if has_state(settings.folder):
            self.progress = kept.load(settings.folder, self.soup)
            say(f"resuming {settings.folder} after round {self.soup.version}")
        self._post = Post(grid, settings.in_flight, ttl=2 * settings.deadline)
        self.roster = Roster(grid, settings, self.soup, self.progress)
        self._intake = Intake(self.soup, self.progress, self.roster)
        self._parts = self.soup.algorithm.travels(self.soup.setup.layout)
        if settings.compression != "none" and len(self._parts) != 1:
            raise ConfigError(
                f'compression = "{settings.compression}": method "{settings.method}" sends parts '
                'of its models only; use "none"'
            )
        self._started_at = self.soup.version
        self._pause = min(LOOK, settings.poll * 5)
        self.shown = -math.inf  # when the status was last written

    # -- rounds ------------------------------------------------------------------------------------

    def run(self) -> None:
        """All rounds that are left, and the evaluation of the last.

        Raises:
            FedmergeError: no clients, no updates, or a state that cannot be saved; the last commit
                is kept.
        """
        failed, since = 0, time.monotonic()
        if self.soup.version >= self.settings.rounds and self.progress.pending is None:
            say(f"all {self.settings.rounds} rounds are done; raise fedmerge.rounds to go on")
        while self.soup.version < self.settings.rounds:
            now = Gathered(self.soup.version + 1)
            if self._round(now):
                failed, since = 0, time.monotonic()
                continue
            # Who is away may come back; who answers wrongly will do so again.
            failed += bool(now.failed)
            waited = time.monotonic() - since > self.settings.wait
            if failed == ATTEMPTS or waited:
                tried = f"{self.settings.wait:g} s" if waited else f"{ATTEMPTS} attempts"
                raise ConfigError(
                    f"{tried} at round {now.number} without enough updates; "
                    f"{self.roster.complaints()}; what was committed is kept in "
                    f"{self.settings.state}"
                )
            time.sleep(self._pause)
        if self.progress.pending is not None:
            self._evaluate_last()
        if self.progress.history:
            export_models(self)

    def _round(self, now: Gathered) -> bool:
        """One round; False if too few updates came, and nothing has changed."""
        self.soup.abandon()
        number = now.number
        cohort = self._draw(self._gather(now), number)
        # Late replies to the attempt before, taken while gathering, are of this round, too.
        now.cohort = len(cohort) + len(now.folded)
        end = time.monotonic() + self.settings.deadline
        every = self.settings.evaluate_every
        evaluated = bool(every) and (number % every == 0 or number == self.settings.rounds)
        waiting = deque(cohort)
        enough = math.ceil(self.settings.quorum * now.cohort - 1e-9)
        while time.monotonic() < end and len(now.folded) < enough:
            with now.clock("send"):
                while waiting and not self._post.full:
                    self._send(now, waiting.popleft(), evaluated)
            for letter, records, error in now.clock.over("local", self._post.replies()):
                with now.clock("fold"):
                    self._intake.receive(now, letter, records, error)
            if not waiting and not self._post.open(number):
                break
            with now.clock("local"):
                time.sleep(self.settings.poll)
            publish_status(self, now)
        if len(now.folded) < min(self._least(), now.cohort):
            say(
                f"round {number}: {len(now.folded)} of {now.cohort} updates, too few; again",
                WARNING,
            )
            return False
        self._commit(now, evaluated)
        return True

    def _send(self, now: Gathered, client: str, evaluated: bool) -> None:
        node = self.roster.online.get(client)
        if node is None:
            self.roster.fail(client, "is not connected any more")
            return
        sent = self.soup.send([client])
        order = wire.Order(
            ticket=sent.tickets[0],
            round=now.number,
            seed=self.settings.seed,
            method=self._method(),
            layout=self.soup.setup.layout.fingerprint,
            message=cut(sent.message[0], self._parts),
            blocks=self.settings.blocks,
            measure_received=self.progress.pending is not None and self.progress.wanted,
            measure_own=evaluated,
            codec=self.settings.codec,
            federation=self.progress.federation,
            told=self._told(),
        )
        now.bytes_down += order.message.nbytes
        records = wire.write_order(order)
        if not self._post.send(records, "train", client, node, now.number, sent.tickets[0]):
            self.roster.fail(client, "Flower did not take the order")

    def _commit(self, now: Gathered, evaluated: bool) -> None:
        soup, progress = self.soup, self.progress
        progress.finish(soup.clients)
        with now.clock("commit"):
            before = soup.weights()
            folded = soup.commit()
            self._intake.committed(now)
            rows = _row_statistics(before, soup.weights(), soup.clients, folded)
            progress.pending = RoundLog(
                round=now.number,
                cohort=now.cohort,
                dropped=max(0, now.cohort - len(now.folded)),
                refused=dict(now.refused),
                metrics={},
                gap_train=None,
                gap_test=None,
                rows=rows,
                bytes_up=now.bytes_up,
                bytes_down=now.bytes_down,
                seconds=now.clock.seconds,
            )
            progress.wanted, progress.found = evaluated, now.own
            kept.save(self.settings.folder, self.settings, soup, progress)
        publish(self)
        privacy = soup.safety.privacy
        say(
            f"round {now.number}: {len(folded)} of {now.cohort} updates"
            + (f", refused {dict(now.refused)}" if now.refused else "")
            + (f", epsilon {privacy.epsilon(soup.version):.3g}" if privacy else "")
        )

    def _evaluate_last(self) -> None:
        """Ask every client that is there how its last model does, and close the last round."""
        number = self.soup.version + 1
        start = time.monotonic()
        end = start + self.settings.deadline
        if self.progress.wanted:
            now = Gathered(number)
            waiting = deque(self._gather(now))
            while time.monotonic() < end:
                while waiting and not self._post.full:
                    self._ask(waiting.popleft(), number)
                for letter, records, error in self._post.replies():
                    reply = self._intake.read(now, letter, records, error)
                    if reply is not None and letter.about.version == self.soup.version:
                        self.progress.put(letter.client, reply.figures, "merged", "tuned")
                if not waiting and not self._post.open(number):
                    break
                time.sleep(self.settings.poll)
        self.progress.finish(self.soup.clients, time.monotonic() - start)
        kept.save(self.settings.folder, self.settings, self.soup, self.progress)
        publish(self, finished=True)

    def _ask(self, client: str, number: int) -> None:
        node = self.roster.online.get(client)
        if node is None:
            return
        ticket = self.soup.tickets([client])[0]
        order = wire.Order(
            ticket,
            number,
            self.settings.seed,
            self._method(),
            self.soup.setup.layout.fingerprint,
            cut(self.soup.used([client])[0], self._parts),
            self.settings.blocks,
            train=False,
            federation=self.progress.federation,
            told=self._told(),
        )
        records = wire.write_order(order)
        self._post.send(records, "evaluate", client, node, number, ticket)

    def _told(self) -> Tensors:
        return {name: value[0] for name, value in self.soup.told(1).items()}

    # -- who is there ------------------------------------------------------------------------------

    def _gather(self, now: Gathered) -> list[str]:
        """Clients that can be asked now; waits until there are enough of them."""
        first = self.soup.version == 0
        start = time.monotonic()
        # After a restart nodes come back one by one: wait for all of them, but not for ever.
        patience = self.settings.deadline if self.soup.version == self._started_at else 0.0
        while True:
            self.roster.look()
            there = sorted(
                self.roster.online.keys()
                - self._post.busy()
                - self.soup.safety.guard.aside
                - now.folded  # a late reply to an attempt before this one
            )
            waited = time.monotonic() - start
            found = len(there) + len(now.folded)
            if found >= self.settings.clients - len(self.soup.safety.guard.aside) and found:
                return there
            if found >= self._least() and not first and waited >= patience:
                return there
            if waited > self.settings.wait:
                raise ConfigError(
                    f"{len(there)} of {self.settings.clients} clients within "
                    f"{self.settings.wait:g} s: start the SuperNodes that are missing, or lower "
                    f"fedmerge.clients or fedmerge.least; {self.roster.complaints()}"
                )
            for letter, records, error in self._post.replies():
                self._intake.receive(now, letter, records, error)
            publish_status(self, now)
            time.sleep(self._pause)

    def _draw(self, there: list[str], number: int) -> list[str]:
        """The round's cohort; as a simulation draws it, over sorted ids."""
        # Nobody is left to be asked where all have answered the attempt before by now.
        k = min(len(there), max(1, round(self.settings.participation * len(there))))
        if k == len(there):
            return there
        draw = numpy_generator(self.settings.seed, "cohort", number)
        return [there[i] for i in np.sort(draw.choice(len(there), k, replace=False))]

    def _least(self) -> int:
        if self.settings.least:
            return self.settings.least
        return max(1, math.ceil(self.settings.clients * self.settings.participation / 2))

    def _method(self) -> str:
        # With what was filled in here, by the number of clients or for privacy.
        name, *given = self.settings.method.split(":")
        options = dict(option.split("=", 1) for option in given)
        plain, mine = make_method(self.settings.method).resolve(None), self.soup.algorithm
        for option in (field.name for field in dataclasses.fields(mine)):
            value = getattr(mine, option)
            if value != getattr(plain, option):
                options[option] = str(value).lower()
        return ":".join([name, *(f"{option}={value}" for option, value in options.items())])


def _row_statistics(
    before: Tensor | None, after: Tensor | None, clients: Sequence[str], folded: Sequence[str]
) -> dict[str, float] | None:
    if before is None or after is None:
        return None
    place = {name: i for i, name in enumerate(clients)}
    return row_statistics(before, after, [place[name] for name in folded])
