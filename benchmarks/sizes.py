"""How large everything that is measured is: `FULL` for figures, `TINY` to see that all of it runs.

Numbers only; what they mean is said where they are used.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Sizes of every group.

    Attributes:
        w1_clients, w2_clients, w2_images: of the two workloads.
        server_d, server_m, server_chunk: models, clients, and clients folded at a time.
        server_width: of the ResNet-9 whose parameters are served; 64 makes 6.62 million.
        copy_mib: size of the array copied to measure the bandwidth.
        memory_clients: clients in all, of which `memory_cohort` take part.
        memory_cohorts: cohorts folded chunk by chunk.
        scale_clients, scale_d, scale_p, scale_workers: the points of the curves.
        scale_k, scale_width: clients folded on the curve over d, and parameters of their model.
        table_rows, table_d: of the row table.
        imports: statements that are timed from an interpreter's start.
        fresh: measure memory in processes of their own; without, peaks mean nothing.
    """

    w1_clients: int = 50
    w2_clients: int = 50
    w2_images: int = 200
    server_d: int = 5
    server_m: int = 50
    server_chunk: int = 10
    server_width: int = 64
    copy_mib: int = 512
    memory_clients: tuple[int, ...] = (50, 500, 5_000)
    memory_cohort: int = 50
    memory_cohorts: tuple[int, ...] = (10, 50, 200)
    scale_clients: tuple[int, ...] = (50, 500, 5_000, 50_000, 100_000)
    scale_d: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    scale_p: tuple[int, ...] = (10**4, 10**5, 10**6, 10**7, 10**8)
    scale_workers: tuple[int, ...] = (1, 2)
    scale_k: int = 20
    scale_width: int = 200_000
    table_rows: int = 1_000_000
    table_d: int = 8
    imports: tuple[str, ...] = ("import fedmerge", "from fedmerge import Simulation")
    fresh: bool = True


FULL = Sizes()
TINY = Sizes(
    w1_clients=6,
    w2_clients=2,
    w2_images=20,
    server_d=2,
    server_m=4,
    server_chunk=2,
    server_width=2,
    copy_mib=1,
    memory_clients=(6, 12),
    memory_cohort=3,
    memory_cohorts=(2, 4),
    scale_clients=(10, 200),
    scale_d=(1, 4, 16),
    scale_p=(10**3, 10**4),
    scale_workers=(1,),
    scale_k=4,
    scale_width=1_000,
    table_rows=500,
    table_d=3,
    imports=("import fedmerge",),
    fresh=False,
)
