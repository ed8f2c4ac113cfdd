"""The server of any method: what it keeps, what it sends, and how a round ends.

A soup is a method with its state, and it knows no engine: whoever moves the bytes calls `send`,
`fold` and `commit`. Local training and evaluation are elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .algorithms import Algorithm, Fold, Setup, Tensors, Ticket, Updates, check_method
from .errors import ConfigError, ModelError, StateError
from .params import Blocks, Layout, ModelSource, build
from .roster import Roster
from .safety import Reason, Safety
from .storage import Kept, Storage
from .store import has_state, load_state, of_another_run, save_state
from .tickets import Refusal, Tickets


@dataclass(frozen=True)
class Sent:
    """What goes to the clients of a cohort: message[i] (r, P) with tickets[i] to the i-th."""

    tickets: tuple[Ticket, ...]
    message: Tensor


@dataclass
class Gathered:
    """What part of a cohort has brought to a round, on its way from a `Soup.part` to `absorb`.

    Attributes:
        version: of the soup whose round it is.
        fold: the updates. clients: whose they are, in the order of its parts.
        refusals: the updates not taken.
    """

    version: int
    fold: Fold
    clients: list[str]
    refusals: list[Refusal]

    def join(self, other: Gathered) -> None:
        """Add what other clients have brought."""
        self.fold.join(other.fold)
        self.clients += other.clients
        self.refusals += other.refusals


class Soup:
    """The engine-free server core of any method.

    Args:
        algorithm: the method. How many clients will come is not known here: for a few, whose
            number decides on some defaults, `algorithm.resolve(number)`.
        model: the module, or a function that makes one.
        seed: of every draw the server makes.
        ordered: fold strictly in the order of client ids. Updates wait for their predecessors, up
            to the whole cohort; the state is then the same to the bit whatever order they arrive
            in. Otherwise it is the same to float64 rounding, and nothing waits.
        blocks: the blocks of layers that have a row each (`Layout.of`).
        n_inputs: numbers in one flattened input, for methods whose state depends on it.
        safety: what is done against dishonest clients and for the privacy of honest ones.
        storage: dtype of the server's models: "float32", "bfloat16", or "model" for the module's
            own (`Storage`).
        models_in: folder for the models, of one server only: they and the sum of a round are then
            in files there, to which saved states refer. The first models are made in memory all the
            same.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        model: ModelSource,
        *,
        seed: int = 0,
        ordered: bool = False,
        blocks: Blocks = "layer",
        n_inputs: int = 0,
        safety: Safety | None = None,
        storage: Kept = "model",
        models_in: Path | str | None = None,
    ) -> None:
        check_method(algorithm)
        self.safety = safety or Safety()
        self.algorithm = self.safety.adapted(algorithm.resolve(None))
        self.ordered = ordered
        first = build(model, seed)
        layout = Layout.of(first, blocks)
        self.setup = Setup(layout, lambda j: layout.row(build(model, seed, j)), seed, n_inputs)
        self.storage = Storage(storage, None if models_in is None else Path(models_in))
        self._method = {"name": self.algorithm.name, **dataclasses.asdict(self.algorithm)}
        self.algorithm = self.storage.adapted(self.algorithm)
        guarded = bool(self.safety.trim) or self.safety.privacy is not None
        self.storage.check(self.algorithm, layout, guarded=guarded)
        self.shared: Tensors = self.algorithm.shared(self.setup)
        self.version = 0
        if not self.storage.idle:
            self.shared["models"] = self.storage.keep(self.shared["models"], 0)
        self.refused: Counter[str] = Counter()
        self.refused_by: dict[str, Counter[str]] = {}
        self._roster = Roster(partial(self.algorithm.rows, self.setup))
        self.safety.check(self.algorithm, layout)
        self._reset_round()

    @classmethod
    def open(
        cls,
        folder: Path | str,
        algorithm: Algorithm,
        model: ModelSource,
        *,
        seed: int = 0,
        ordered: bool = False,
        blocks: Blocks = "layer",
        storage: Kept = "model",
        models_in: Path | str | None = None,
    ) -> Soup:
        """Load the soup of `folder`, or make a new one if there is none.

        Raises:
            StateError: the state there is damaged, or of another model, method or seed.
        """
        soup = cls(
            algorithm,
            model,
            seed=seed,
            ordered=ordered,
            blocks=blocks,
            storage=storage,
            models_in=models_in,
        )
        if has_state(Path(folder)):
            soup.load(folder)
        return soup

    @classmethod
    def part(
        cls,
        algorithm: Algorithm,
        setup: Setup,
        shared: Tensors,
        version: int,
        clients: Sequence[str],
        rows: Tensors,
    ) -> Soup:
        """A soup that stands in for another one, of `version`, towards some of its clients.

        It sends and folds like the other, if that has no `Safety`, and does not commit: the other
        absorbs what it has gathered.
        """
        part = cls.__new__(cls)
        part.algorithm, part.setup, part.shared, part.version = algorithm, setup, shared, version
        part.safety, part.ordered, part.storage = Safety(), False, Storage()
        part.refused, part.refused_by = Counter(), {}
        part._roster = Roster.holding(partial(algorithm.rows, setup), clients, rows)
        part._reset_round()
        return part

    # -- clients -----------------------------------------------------------------------------------

    @property
    def clients(self) -> tuple[str, ...]:
        """Ids of all clients ever seen, in the order in which they joined."""
        return self._roster.clients

    @property
    def kernels(self) -> str:
        """What does the arithmetic: "torch" or "numba" (`fedmerge.kernels`)."""
        return kernels.name(self.setup.layout.size)

    def join(self, clients: Iterable[str]) -> None:
        """Take in clients, at any round; known ones stay as they are.

        Raises:
            ConfigError: a text in place of a list of names.
        """
        self._roster.join(clients)

    def rows(self, clients: Sequence[str]) -> Tensors:
        """What the server keeps for `clients`, stacked in that order.

        Raises:
            ConfigError: a client that never joined.
        """
        return self._roster.rows(clients)

    def weights(self, clients: Sequence[str] | None = None) -> Tensor | None:
        """(k, b, d) merging weights of `clients` (of all, if None); None without such."""
        # Of the whole table, so that nothing but weights is copied.
        weights = self.algorithm.weights(self.setup, self._roster.tables)
        return weights if weights is None or clients is None else weights[self._roster.at(clients)]

    # -- a round -----------------------------------------------------------------------------------

    def send(self, clients: Sequence[str], out: Tensor | None = None) -> Sent:
        """Make the models for `clients`; new ones join. Changes nothing else.

        Args:
            out: memory that the message may be written to, of an earlier one (at least k, r, P)
                that nobody needs any more. Fresh memory takes as long as merging does.
        """
        self.join(clients)
        rows, k = self._roster.rows(clients, self.algorithm.sends_by), len(clients)
        if out is not None and len(out) >= k:
            message = self.algorithm.send_into(self.setup, self.shared, rows, out[:k])
        else:
            message = self.algorithm.send(self.setup, self.shared, rows, k)
        # The dtype of the module, whatever the models are kept in.
        return Sent(self.tickets(clients, rows), message.to(self.setup.layout.dtype))

    def tickets(self, clients: Sequence[str], rows: Tensors | None = None) -> tuple[Ticket, ...]:
        """Those that `send` would give the clients now. rows: theirs, if known."""
        return self._tickets.give(clients, rows)

    def used(self, clients: Sequence[str]) -> Tensor:
        """(k, r, P): what `clients` would be given now to be used; not always what they train."""
        rows = self._roster.rows(clients, self.algorithm.sends_by)
        message = self.algorithm.used(self.setup, self.shared, rows, len(clients))
        return message.to(self.setup.layout.dtype)

    def told(self, k: int) -> Tensors:
        """What k clients are told with the models of `used`, each (k, ...)."""
        return self.algorithm.told(self.shared, k)

    def fold(self, updates: Updates) -> list[Refusal]:
        """Take updates into the round, in any chunking and order; return those refused, and why.

        An update is taken once, for the model its ticket names, and only if it is sound; the
        others are counted and change nothing.

        Raises:
            ModelError: a stack whose parts are not tensors, or not of one length.
        """
        updates = _values(updates)
        refusals: list[Refusal] = []
        taken: list[int] = []
        # One by one: to refuse an update may set its client aside.
        for i, reason in enumerate(self._tickets.judge(updates)):
            if reason is None:
                taken.append(i)
            else:
                refusals.append(self.refuse(updates.tickets[i].client, reason))
        if taken:
            if self.ordered:
                self._waiting.update((updates.tickets[i].client, updates.take([i])) for i in taken)
            else:
                # A copy takes longer than folding does, but what is kept must not be the caller's.
                whole = len(taken) == len(updates) and self.algorithm.streams
                keeps = self.safety.trim or not whole
                self._fold(_copied(updates, taken) if keeps else updates)
        return refusals

    def refuse(self, client: str, reason: Reason) -> Refusal:
        """Count an update of `client` as refused; changes nothing else."""
        self.refused[reason] += 1
        # Not for unknown names: whoever invents them would fill the memory.
        if client in self._roster and reason != "unknown":
            self.refused_by.setdefault(client, Counter())[reason] += 1
            self.safety.guard.refuse(client, reason)
        return Refusal(client, reason)

    def gathered(self) -> Gathered:
        """What the open round has gathered; the refusals are what `fold` has returned."""
        return Gathered(self.version, self._round, self._folded, [])

    def absorb(self, gathered: Gathered) -> None:
        """Take into the round what parts of this soup have gathered.

        Raises:
            ConfigError: this soup has a `Safety`, which parts do not have.
            StateError: of another round, or of clients whose updates are there already; nothing
                changes.
        """
        if not self.safety.idle:
            raise ConfigError("guard, robust and privacy do not go with updates folded elsewhere")
        again = self._tickets.seen.intersection(gathered.clients)
        if gathered.version != self.version or again:
            what = f'"{min(again)}" twice' if again else f"round {gathered.version + 1}"
            raise StateError(f"updates of {what} in round {self.version + 1}: wanted each once")
        self._round.join(gathered.fold)
        self._tickets.seen.update(gathered.clients)
        self._folded += gathered.clients
        for refusal in gathered.refusals:
            self.refuse(refusal.client, refusal.reason)

    def abandon(self) -> None:
        """Drop what the open round has gathered; its tickets can be used again."""
        self._reset_round()

    def commit(self) -> tuple[str, ...]:
        """End the round: models and rows move. Returns the clients whose updates were used."""
        for client in sorted(self._waiting):
            self._fold(self._waiting[client])
        folded = tuple(self._folded)
        fold = self.safety.finish(self._round, any_folded=bool(folded))
        self.shared, rows = self.algorithm.commit(self.setup, self.shared, fold, self.version)
        if rows and folded:
            if not self.safety.idle:
                before = self.rows(folded)
                rows = self.safety.noisy(self.algorithm, rows, before, self.version)
            self._roster.put(folded, rows)
        self.version += 1
        self._reset_round()
        return folded

    def _reset_round(self) -> None:
        kept = self.safety.sum(self.setup.layout, self.shared, self.version)
        if not self.storage.idle:
            setup = self.setup
            kept = self.storage.sum(setup.layout, self.shared["models"], setup.seed, self.version)
        self._round = Fold(kept)
        self._tickets = Tickets(
            self.algorithm, self.setup, self.shared, self.version, self._roster, self.safety
        )
        self._folded: list[str] = []
        self._waiting: dict[str, Updates] = {}

    def _fold(self, updates: Updates) -> None:
        clients = [t.client for t in updates.tickets]
        rows = self.rows(clients)
        updates = self.safety.prepare(updates, self.setup.layout)
        self.algorithm.fold(self.setup, self.shared, rows, updates, self._round, self.version)
        self._folded += clients

    # -- on disk -----------------------------------------------------------------------------------

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        """Tensors and JSON facts that `restore` takes; an open round is not part of it."""
        tensors = {f"shared.{n}": t for n, t in self.shared.items()}
        files = {}
        if self.storage.folder is not None:
            files["models"] = self.storage.seal(tensors.pop("shared.models"))
        # Copies: a commit writes into the table, and this state must stay what it is.
        tensors |= {f"rows.{n}": t.clone() for n, t in self._roster.tables.items()}
        facts = {
            **self._identity(),
            "version": self.version,
            "clients": list(self.clients),
            "refused": dict(self.refused),
            "refused_by": {client: dict(c) for client, c in self.refused_by.items()},
            "guard": self.safety.guard.to_json(),
            "files": files,
        }
        return tensors, facts

    def restore(self, tensors: Tensors, facts: dict[str, Any], where: str) -> None:
        """Become the soup whose `state` this was; the round that is open is dropped.

        Raises:
            StateError: it is of another model, method or seed.
        """
        for name, own in self._identity().items():
            if facts.get(name) != own:
                raise of_another_run(where, name, facts.get(name), own)
        tables = {n: t.clone() for n, t in _part(tensors, "rows.").items()}
        shared = self.storage.moved(_part(tensors, "shared."))
        if facts["clients"]:
            _check_names(where, "for a client", tables, self._roster.tables)
        if "models" in facts["files"]:
            shared["models"] = self.storage.open(facts["files"]["models"], where)
        _check_names(where, "in all", shared, self.shared)
        if "models" not in facts["files"] and self.storage.folder is not None:
            shared["models"] = self.storage.keep(shared["models"], int(facts["version"]))
        self.version = int(facts["version"])
        self.refused = Counter(facts["refused"])
        self.refused_by = {c: Counter(n) for c, n in facts["refused_by"].items()}
        self.safety.guard.restore(facts.get("guard", {}))
        self.shared = shared
        self._roster = Roster.holding(
            partial(self.algorithm.rows, self.setup), facts["clients"], tables
        )
        self._reset_round()

    def save(self, folder: Path | str) -> None:
        """Write the last commit to `folder`; a kill leaves this one or the one before, whole."""
        save_state(Path(folder), *self.state())
        self.storage.saved()

    def load(self, folder: Path | str) -> None:
        """Read what `save` wrote. Raises StateError if it is damaged or of another run."""
        tensors, facts = load_state(Path(folder))
        self.restore(tensors, facts, str(folder))

    def _identity(self) -> dict[str, Any]:
        return {
            "method": self._method,
            "model": self.setup.layout.fingerprint,
            "seed": self.setup.seed,
            "storage": self.storage.kept,
        }


def _check_names(where: str, what: str, found: Collection[str], wanted: Collection[str]) -> None:
    if set(found) != set(wanted):
        raise StateError(
            f"{where} was made by another version of fedmerge: it keeps "
            f"{', '.join(sorted(found))} {what}, wanted {', '.join(sorted(wanted))}; "
            "use that version, or another folder"
        )


def _part(tensors: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _values(updates: Updates) -> Updates:
    """The updates without gradient graphs, which the sum of a round must not take over; no copy.

    Raises:
        ModelError: a part that is not a tensor with a row for each client.
    """
    parts = {name: getattr(updates, name) for name in ("delta", "n_examples", "steps", "lr")}
    for name, part in (*parts.items(), *updates.extra.items()):
        if not isinstance(part, Tensor) or not part.ndim:
            given = "a single number" if isinstance(part, Tensor) else f"a {type(part).__name__}"
            raise ModelError(
                f"{name} of the updates is {given}: wanted a tensor with a row for each client"
            )
    parts = {name: part.detach() for name, part in parts.items()}
    extra = {name: part.detach() for name, part in updates.extra.items()}
    return Updates(updates.tickets, **parts, extra=extra)


def _copied(updates: Updates, places: Sequence[int]) -> Updates:
    """The updates at `places`, as `Updates.take` gives them, in memory that is got faster."""
    delta = updates.delta.detach()
    made = kernels.empty((len(places), *delta.shape[1:]), delta.dtype)
    torch.index_select(delta, 0, torch.tensor(places), out=made)
    others = dataclasses.replace(updates, delta=delta[:, :0]).take(places)
    return dataclasses.replace(others, delta=made)
