"""The two workloads as plain tensors and torch modules, and the bare loop that others are held to.

It knows no library for federated learning, so that every peer can be given the same work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

Batches = Callable[[int], Iterable[Tensor]]
DIGITS_SEED = 29  # 50 clients of 2 to 151 examples, 170 steps a round


@dataclass(frozen=True)
class Task:
    """Local training of one round.

    Attributes:
        name: "W1" or "W2". model: name of the network in `MODELS`.
        data: x (n, *features) float32 and y (n,) int64 of each client.
        epochs, batch_size, lr: of plain SGD.
    """

    name: str
    model: str
    data: tuple[tuple[Tensor, Tensor], ...]
    n_classes: int
    epochs: int = 2
    batch_size: int = 32
    lr: float = 0.05

    @property
    def steps(self) -> int:
        """SGD steps of a round, over all clients."""
        return sum(self.epochs * -(-len(y) // self.batch_size) for _, y in self.data)

    @property
    def short(self) -> bool:
        """Whether a round takes so little that what ran before it shows in its time."""
        return self.name == "W1"

    def make(self) -> nn.Module:
        """A fresh network."""
        return MODELS[self.model]()

    def save(self, path: Path) -> None:
        """Write everything to one `.npz` file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = np.array([self.n_classes, self.epochs, self.batch_size, self.lr])
        arrays = {f"x{i}": x.numpy() for i, (x, _) in enumerate(self.data)}
        arrays |= {f"y{i}": y.numpy() for i, (_, y) in enumerate(self.data)}
        np.savez(
            path, allow_pickle=False, names=np.array([self.name, self.model]), facts=facts, **arrays
        )

    @classmethod
    def load(cls, path: Path) -> Task:
        """Read what `save` wrote."""
        with np.load(path) as held:
            name, model = (str(word) for word in held["names"])
            classes, epochs, size, lr = held["facts"].tolist()
            n = sum(key.startswith("x") for key in held.files)
            data = tuple(
                (torch.from_numpy(held[f"x{i}"]), torch.from_numpy(held[f"y{i}"])) for i in range(n)
            )
        return cls(name, model, data, int(classes), int(epochs), int(size), lr)


def mlp() -> nn.Module:
    """64-128-64-10."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def cnn() -> nn.Module:
    """Two convolutions and two dense layers, 122,268 parameters; inputs 3 x 32 x 32."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 120),
        nn.ReLU(),
        nn.Linear(120, 100),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn}


def w1(clients: int = 50) -> Task:
    """Digits over 50 clients by Dirichlet(0.1); `clients` keeps the first of them only."""
    from sklearn import datasets  # Here: peers read the task from a file and do without.

    pixels, labels = datasets.load_digits(return_X_y=True)
    draw = np.random.default_rng(DIGITS_SEED)
    parts: list[list[np.ndarray]] = [[] for _ in range(50)]
    for label in range(10):
        index = draw.permutation(np.flatnonzero(labels == label))
        edges = np.rint(np.cumsum(draw.dirichlet(np.full(50, 0.1))) * len(index)).astype(int)
        for part, piece in zip(parts, np.split(index, edges[:-1]), strict=True):
            part.append(piece)
    x = torch.from_numpy((pixels / 16).astype(np.float32))
    y = torch.from_numpy(labels.astype(np.int64))
    owned = [torch.from_numpy(np.concatenate(part)) for part in parts[:clients]]
    return Task("W1", "mlp", tuple((x[at], y[at]) for at in owned), 10)


def w2(clients: int = 50, images: int = 200) -> Task:
    """Random images 3 x 32 x 32 of 100 classes, `images` for each of `clients`."""
    draw = torch.Generator().manual_seed(0)
    data = tuple(
        (
            torch.randn(images, 3, 32, 32, generator=draw),
            torch.randint(0, 100, (images,), generator=draw),
        )
        for _ in range(clients)
    )
    return Task("W2", "cnn", data, 100)


def shuffled(task: Task) -> Batches:
    """Batches of client i in a fresh random order in each epoch."""

    def of(i: int) -> Iterable[Tensor]:
        for _ in range(task.epochs):
            yield from torch.split(torch.randperm(len(task.data[i][1])), task.batch_size)

    return of


class BareLoop:
    """The same SGD steps, one client after another, and nothing around them.

    One module and one optimiser serve all clients; before each client the start values are copied
    in, since every client starts from the same model.
    """

    def __init__(self, task: Task, batches: Batches | None = None) -> None:
        self.task = task
        self.model = task.make()
        self.start = [p.detach().clone() for p in self.model.parameters()]
        self._parameters: list[Tensor] = list(self.model.parameters())
        self._optimiser = torch.optim.SGD(self._parameters, lr=task.lr)
        self._loss = nn.CrossEntropyLoss()
        self._batches = batches or shuffled(task)

    def client(self, i: int) -> int:
        """Train client i from the start values; the module then holds its model. Returns steps."""
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self.start)
        x, y = self.task.data[i]
        steps = 0
        for batch in self._batches(i):
            self._optimiser.zero_grad()
            self._loss(self.model(x[batch]), y[batch]).backward()
            self._optimiser.step()
            steps += 1
        return steps

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Start from the values of `state`, a state dict of the network."""
        self.model.load_state_dict(state)
        self.start = [p.detach().clone() for p in self._parameters]

    def round(self) -> int:
        """Train every client; returns the steps taken."""
        return sum(self.client(i) for i in range(len(self.task.data)))


def names(n: int) -> Sequence[str]:
    """Ids of n clients, in alphabetical order."""
    width = len(str(n - 1))
    return [f"c{i:0{width}d}" for i in range(n)]
