"""Rounds in shards: clients are trained, and their updates folded, where their data are.

Shards are fixed for a run, and so is the tree in which their sums meet: whoever has which shards,
the bits are the same. Who has them, and how anything gets there, is not decided here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from ..algorithms import Tensors
from ..errors import StateError
from ..soup import Gathered, Soup
from .execute import ClientSide, Task
from .log import Measured
from .population import Population

Block = tuple[int, int]
"""(first, end) of neighbouring shards under one knot of the tree: their number is a power of two,
and first is a multiple of it."""


def deal(population: Population, cohort: int, group: int) -> list[list[int]]:
    """Divide all clients into shards that have much the same number of examples.

    There is a power of two of them, so that of a cohort of `cohort` clients each has half a group
    of `group` or somewhat less: enough shards to share out, and enough clients in each to stack.
    """
    most = 1 << len(population.ids).bit_length() - 1
    wanted = -(-2 * cohort // group)
    n_shards = min(1 << (wanted - 1).bit_length(), most)
    count = population.splits["train"].count
    ordered = sorted(range(len(population.ids)), key=lambda i: (-count[i], population.ids[i]))
    return [ordered[j::n_shards] for j in range(n_shards)]


def blocks(first: int, end: int) -> Iterator[Block]:
    """The fewest blocks that make up the shards from `first` to before `end`."""
    while first < end:
        size = first & -first or 1 << end.bit_length()
        while first + size > end:
            size //= 2
        yield first, first + size
        first += size


@dataclass(frozen=True)
class Order:
    """What one shard has to do in a round.

    Attributes:
        places: of its clients in the cohort, in the population. replying: which of them do.
        rows: what the server keeps for them. memory: what they keep.
    """

    places: list[int]
    replying: list[bool]
    rows: Tensors
    memory: Tensors


@dataclass
class Harvest:
    """What shards have brought in a round; O(d P) for most methods, whatever their number.

    Attributes:
        gathered: the updates, folded.
        memory: what clients keep now, by their places. found: figures of their models, likewise.
        bytes_down, bytes_up: what a deployment would have moved.
    """

    gathered: Gathered
    memory: list[tuple[list[int], Tensors]] = field(default_factory=list)
    found: list[tuple[list[int], dict[str, dict[str, Measured]]]] = field(default_factory=list)
    bytes_down: int = 0
    bytes_up: int = 0

    def join(self, other: Harvest) -> None:
        """Add what the shards after these have brought."""
        self.gathered.join(other.gathered)
        self.memory += other.memory
        self.found += other.found
        self.bytes_down += other.bytes_down
        self.bytes_up += other.bytes_up


class Tree:
    """Joins the harvests of blocks, as they arrive, in the order that the shards have."""

    def __init__(self, n_shards: int) -> None:
        self._all = (0, n_shards)
        self._waiting: dict[Block, Harvest] = {}

    def put(self, block: Block, harvest: Harvest) -> Harvest | None:
        """Take in a block; return the whole harvest with the last one."""
        while block != self._all:
            first, end = block
            size = end - first
            left = first & size == 0
            sibling = (end, end + size) if left else (first - size, first)
            if sibling not in self._waiting:
                self._waiting[block] = harvest
                return None
            other = self._waiting.pop(sibling)
            one, two = (harvest, other) if left else (other, harvest)
            one.join(two)
            block, harvest = (min(first, sibling[0]), max(end, sibling[1])), one
        return harvest


@dataclass(frozen=True)
class Round:
    """What shards have to do: training if `measured` is not None, else evaluation.

    Attributes:
        number: from 1. version: of the soup. orders: of the shards, in order.
        measured: of `ClientSide.train`.
    """

    number: int
    version: int
    measured: bool | None
    orders: list[Order]


@dataclass(frozen=True)
class Shards:
    """The clients of some shards, at work.

    Attributes:
        side: with these clients only. places: of theirs in the population of all.
    """

    side: ClientSide
    places: list[int]

    @cached_property
    def _own(self) -> dict[int, int]:
        """Places of the clients among these ones."""
        return {place: i for i, place in enumerate(self.places)}

    def do(self, shared: Tensors, todo: Round) -> Harvest:
        """Train and fold, or evaluate, the clients of neighbouring shards."""
        tree, whole = Tree(len(todo.orders)), None
        for shard, order in enumerate(todo.orders):
            whole = tree.put((shard, shard + 1), self._shard(shared, todo, order))
        if whole is None:
            raise StateError(f"{len(todo.orders)} shards: wanted a power of two")
        return whole

    def _shard(self, shared: Tensors, todo: Round, order: Order) -> Harvest:
        side, own = self.side, self._own
        ids = [side.population.ids[own[place]] for place in order.places]
        soup = Soup.part(side.algorithm, side.setup, shared, todo.version, ids, order.rows)
        harvest = Harvest(soup.gathered())
        at = {own[place]: i for i, place in enumerate(order.places)}
        for group in side.population.groups(list(at), side.group):
            self._group(soup, todo, order, [at[place] for place in group], harvest)
        return harvest

    def _group(
        self, soup: Soup, todo: Round, order: Order, group: list[int], harvest: Harvest
    ) -> None:
        """Do the clients at `group` in `order`, and add what they bring."""
        side, own = self.side, self._own
        names = [side.population.ids[own[order.places[i]]] for i in group]

        def task(chosen: list[int], message: Tensor) -> Task:
            memory = {name: table[chosen] for name, table in order.memory.items()}
            return Task([own[order.places[i]] for i in chosen], todo.number, message, memory)

        if todo.measured is None:
            unsent = task(group, soup.used(names))
            found = side.evaluate(replace(unsent, told=soup.told(len(group))))
            harvest.found.append(([order.places[i] for i in group], found))
            return
        sent = soup.send(names)
        harvest.bytes_down += side.wire(sent.message)
        there = [p for p, i in enumerate(group) if order.replying[i]]
        if not there:
            return
        chosen = [group[p] for p in there]
        done = side.train(task(chosen, sent.message[there]), measured=todo.measured)
        updates = done.updates(tuple(sent.tickets[p] for p in there), side.training.lr)
        harvest.bytes_up += sum(map(side.wire, (updates.delta, *updates.extra.values())))
        harvest.gathered.refusals += soup.fold(updates)
        places = [order.places[i] for i in chosen]
        harvest.memory.append((places, done.local.memory))
        if done.own is not None:
            harvest.found.append((places, {"local": done.own}))
