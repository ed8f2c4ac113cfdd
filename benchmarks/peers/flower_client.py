"""Flower's client: it loads the model it is sent, trains it by the bare loop and sends it back.

A module of its own, since the workers of the simulation import it; see `run_flower` for the server.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from ..tasks import BareLoop, Task


@functools.cache
def loop(path: Path) -> BareLoop:
    """The task, once in every worker process, with a plain loop to train a client."""
    torch.set_num_threads(1)
    return BareLoop(Task.load(path))


def client_app(path: Path) -> ClientApp:
    """Clients that load the model they are sent, train it and send it back."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        own = loop(path)
        i = int(context.node_config["partition-id"])
        own.load(message.content["arrays"].to_torch_state_dict())
        steps = own.client(i)
        metrics = MetricRecord({"num-examples": len(own.task.data[i][1]), "steps": steps})
        arrays = ArrayRecord(own.model.state_dict())
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app
