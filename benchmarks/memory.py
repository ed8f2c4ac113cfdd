"""Peak memory of simulations and servers, each in a process of its own.

A process counts its interpreter and libraries, too: "held before" says how much those and the data
take before the first round.
"""

from __future__ import annotations

from collections.abc import Iterator

from .child import MIB, Found, ask
from .measure import Figure, Spread
from .sizes import Sizes

METHODS = ("fedavg", "fedmerge")
PARAMETERS = 1_000_000


def run(sizes: Sizes, repeats: int) -> Iterator[Figure]:
    """Over clients in all with one cohort, and over cohorts folded chunk by chunk."""
    n = min(3, repeats)
    chunk = min(10, min(sizes.memory_cohorts))
    parameters = PARAMETERS if sizes.fresh else 1_000
    for method in METHODS:
        cases = [
            (f"{sizes.memory_cohort} of {m}", {"clients": m, "cohort": sizes.memory_cohort})
            for m in sizes.memory_clients
        ]
        yield from _curve(
            sizes, n, f"simulation, {method}", "simulation", {"method": method}, cases
        )
        fixed: dict[str, float | str] = {"method": method, "parameters": parameters, "chunk": chunk}
        yield from _curve(sizes, n, f"server, {method}", "server", fixed, cases)
        cases = [(f"cohort of {k}", {"cohort": k}) for k in sizes.memory_cohorts]
        yield from _curve(sizes, n, f"server, {method}", "server", fixed, cases)


def _curve(
    sizes: Sizes,
    repeats: int,
    case: str,
    job: str,
    fixed: dict[str, float | str],
    points: list[tuple[str, dict[str, int]]],
) -> Iterator[Figure]:
    found: list[list[Found]] = [[] for _ in points]
    for _ in range(repeats):
        for kept, (_, options) in zip(found, points, strict=True):
            kept.append(ask(job, fresh=sizes.fresh, **fixed, **options))
    first = [one["peak"][0] for one in found[0]]
    for kept, (what, options) in zip(found, points, strict=True):
        peak = [one["peak"][0] for one in kept]
        before = Spread.of([one["before"][0] / MIB for one in kept]).median
        ratio = Spread.of([a / b for a, b in zip(peak, first, strict=True)])
        mib = Spread.of([value / MIB for value in peak])
        note = f"held before: {before:.0f} MiB"
        yield Figure("memory", case, f"peak, {what}", "MiB", mib, ratio, note, options)
