"""A workload in Flower's simulation: a ServerApp with FedAvg and a ClientApp, over its Ray backend.

Run in an environment with `flwr[simulation]`; see `turns` for who calls it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from .flower_client import client_app
from .turns import Turns


def total_steps(replies: Sequence[RecordDict], weighted_by: str) -> MetricRecord:
    """The steps of all clients."""
    turns.steps = sum(int(reply["metrics"]["steps"]) for reply in replies)
    return MetricRecord({"steps": turns.steps})


turns = Turns()
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
}
server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """All clients in every round, no evaluation."""

    def hand_over(number: int, arrays: ArrayRecord) -> None:
        turns.next()

    strategy = FedAvg(fraction_evaluate=0.0, train_metrics_aggr_fn=total_steps)
    strategy.start(
        grid,
        ArrayRecord(turns.task.make().state_dict()),
        num_rounds=turns.rounds,
        evaluate_fn=hand_over,
    )


run_simulation(
    server_app,
    client_app(turns.path),
    len(turns.task.data),
    backend_config={
        "init_args": {"num_cpus": turns.workers, "include_dashboard": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    },
)
