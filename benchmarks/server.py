"""The server's step at the size of a ResNet-9: its kernels, and whole rounds through `Soup`.

Each is held to the bandwidth floor: the bytes it cannot avoid over the speed of a copy, measured in
the same run. The clients' updates are random numbers, made before the clock runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge import Algorithm, FedMerge, FedMergePaper, Soup, Ticket, Updates, kernels, make_model
from fedmerge.merging import (
    block_scores,
    merge,
    merge_weighted,
    merging_weights,
)
from fedmerge.sums import ModelSum

from .measure import Figure, Spread, Work, alternate, seconds
from .sizes import Sizes
from .tasks import names

FLOAT = 4  # bytes
FRESH = "merge, into fresh memory"
STEP = "merge + scores + update"
WANTED = 2.43
"""Times the floor that `STEP` may take: 300 ms at full size where a copy runs at 36.5 GB/s."""


@dataclass
class ServerRound:
    """Send to, fold and commit a cohort, chunk by chunk.

    Attributes:
        delta: (k, P), used again for every chunk. clients: the cohort's ids.
        message: (k, r, P), the memory that messages are written to.
    """

    soup: Soup
    delta: Tensor
    clients: list[str]
    message: Tensor | None = None

    def __call__(self) -> None:
        """One round of the server; what clients do in between takes no time."""
        k = len(self.delta)
        for first in range(0, len(self.clients), k):
            cohort = self.clients[first : first + k]
            sent = self.soup.send(cohort, out=self.message)
            self.message = sent.message  # The models are with the clients now.
            self.soup.fold(self.updates(sent.tickets))
        if len(self.soup.commit()) != len(self.clients):
            raise RuntimeError("the server refused an update of the benchmark")

    def updates(self, tickets: tuple[Ticket, ...]) -> Updates:
        """Updates for `tickets`, all of the same size."""
        k = len(tickets)
        return Updates(
            tickets,
            self.delta[:k],
            torch.full((k,), 40, dtype=torch.int64),
            torch.full((k,), 10, dtype=torch.int64),
            torch.full((k,), 0.05, dtype=torch.float64),
        )


def server_round(
    method: Algorithm, model: object, cohort: int, chunk: int, blocks: str = "layer"
) -> ServerRound:
    """A server with a cohort of `cohort`, folded `chunk` at a time."""
    soup = Soup(method, model, blocks=blocks)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(1)
    delta = torch.randn(min(chunk, cohort), soup.setup.layout.size, generator=draw).mul_(1e-3)
    return ServerRound(soup, delta, list(names(cohort)))


def run(sizes: Sizes, repeats: int) -> Iterator[Figure]:
    """Copy bandwidth, kernels and whole rounds, in turn."""
    d, m, chunk = sizes.server_d, sizes.server_m, sizes.server_chunk
    make = make_model("resnet9", (3, 32, 32), 100, hidden=sizes.server_width)
    source = torch.ones(sizes.copy_mib * 2**20 // FLOAT)
    target = torch.empty_like(source)
    speeds: list[float] = []

    def copy() -> None:
        # The fastest of a few: the first one finds what ran before in its way.
        spent = min(seconds(lambda: target.copy_(source)) for _ in range(4))
        speeds.append(2 * source.nbytes / spent)

    works: dict[str, Work] = {"copy": copy}
    n = server_round(FedMerge(d=d), make, 1, 1).delta.shape[1]
    models_bytes, clients_bytes = d * n * FLOAT, m * n * FLOAT
    floors = {
        "merge": models_bytes + clients_bytes,
        "scores": models_bytes + clients_bytes,
        "update": 2 * models_bytes + clients_bytes,
    }
    whole = floors["merge"] + floors["update"]
    floors[FRESH] = floors["merge"]
    floors[STEP] = floors["merge"] + floors["scores"] + floors["update"]
    for label, method, blocks in (
        ("round, rule=paper", FedMergePaper(d=d), "layer"),
        ("round, default rule", FedMerge(d=d), "layer"),
        ("round, default rule, one block", FedMerge(d=d), "whole"),
    ):
        works[label] = server_round(method, make, m, chunk, blocks)
        floors[label] = whole
    works |= _kernels(d, m, n, chunk)
    taken = alternate(works, repeats)
    del taken["copy"], speeds[0]  # The warm-up is not among the others, either.
    at = {"d": d, "clients": m, "parameters": n, "chunk": chunk}
    gigabytes = Spread.of([speed / 1e9 for speed in speeds])
    yield Figure("server", "", "copy, read and write", "GB/s", gigabytes)
    for name, values in taken.items():
        floor = [floors[name] / speed for speed in speeds]
        over = Spread.of([value / least for value, least in zip(values, floor, strict=True)])
        note = f"floor {1000 * Spread.of(floor).median:.3g} ms, {floors[name] / 1e9:.3g} GB"
        note += f"; {kernels.name(n)}"
        if name == STEP:
            note += f"; wanted: at most {1000 * WANTED * Spread.of(floor).median:.3g} ms"
            note += f", {WANTED} of the floor"
        yield Figure("server", f"d={d} m={m}", name, "s", Spread.of(values), over, note, at)


def _kernels(d: int, m: int, n: int, chunk: int) -> dict[str, Work]:
    """The server's arithmetic into memory that is there already, and once into fresh memory."""
    draw = torch.Generator().manual_seed(0)
    models = torch.randn(d, n, generator=draw)
    delta = torch.randn(m, n, generator=draw)
    logits = torch.randn(m, d, generator=draw)
    weights = merging_weights(logits)
    share = weights.double()[:, None]
    merged, moved = torch.zeros_like(delta), torch.zeros_like(models)
    total = ModelSum.of(d, 1, ((0, n, 0),), n)
    total.out = lambda: moved

    def merges() -> None:
        merge_weighted(models, weights, out=merged)

    def scores() -> None:
        block_scores(delta, models, ((0, n),))

    def update() -> None:
        total.total.zero_()
        total.mass.zero_()
        for first in range(0, m, chunk):
            total.add(share[first : first + chunk], delta[first : first + chunk])
        total.step(models)

    def step() -> None:
        merges()
        scores()
        update()

    return {
        "merge": merges,
        FRESH: lambda: merge(models, logits),
        "scores": scores,
        "update": update,
        STEP: step,
    }
