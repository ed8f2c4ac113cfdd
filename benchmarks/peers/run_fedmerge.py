"""A workload in fedmerge's simulator with FedAvg, as the peers are run.

With one process it chooses how by itself; see `turns` for who calls it.
"""

from __future__ import annotations

from fedmerge import FedAvg

from ..simulated import Simulated
from .turns import Turns


def main() -> None:
    """Run rounds as they are asked for."""
    turns = Turns()
    options: dict[str, object] = {}
    if turns.workers > 1:
        options = {"execution": "processes", "workers": turns.workers}
    simulated = Simulated(turns.task, FedAvg(), **options)
    turns.next()
    for _ in range(turns.rounds):
        simulated.round()
        turns.steps = turns.task.steps  # Not counted here; that they are the same is tested.
        turns.next()
    simulated.close()


if __name__ == "__main__":  # Its worker processes import it again.
    main()
