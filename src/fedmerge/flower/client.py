"""The clients' side on Flower: one order in, local training as in a simulation, one reply out.

The user gives a model and data. Which method trains is in the order; the code that does it is
`fedmerge.sim.execute`, so a simulation with the same clients does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..algorithms import METHODS, Setup, Tensors, make_method
from ..codec import cut, spread
from ..data.clients import Client, Federation, Split, check_federation
from ..errors import ConfigError, DataError, FedmergeError, ModelError
from ..local import Training
from ..params import Layout, ModelSource, build
from ..sim.execute import ClientSide, Task
from ..sim.log import SPLITS, Measured
from ..sim.population import Population
from . import wire
from .identity import claimed_id
from .memory import Memory, read_memory, write_memory
from .require import require_flower

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

Data = Callable[[Mapping[str, Any]], Client | Sequence[Split]]
"""Given the node's config, the client's data: a `Client`, or its three splits."""


def client_app(
    model: ModelSource, data: Data, training: Training | None = None, *, threads: int = 1
) -> ClientApp:
    """A `ClientApp` that trains `model` on `data`.

    Args:
        model: a function that makes the module; the same at every client and at the server.
        data: what a node's data are, given its config (`--node-config` of its SuperNode).
        training: how this client trains.
        threads: of the CPU, for training.

    Raises:
        MissingExtraError, ConfigError: Flower is not installed, or in another version.
    """
    require_flower()
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    def answer(message: Any, context: Any) -> Any:
        torch.set_num_threads(threads)
        ticket = None
        try:
            order = wire.read_order(message.content)
            ticket = order.ticket
            own = _data_of(data, context.node_config)
            side = Side(order, model, own, training or Training())
            reply = side.answer(context.state, context.node_config)
        except FedmergeError as error:
            # One line for the operator of the server, in place of a traceback.
            reply = wire.Reply(ticket, error=f"{type(error).__name__}: {error}")
        return Message(wire.write_reply(reply), reply_to=message)

    @app.train()
    def train(message: Any, context: Any) -> Any:
        return answer(message, context)

    @app.evaluate()
    def evaluate(message: Any, context: Any) -> Any:
        return answer(message, context)

    @app.query()
    def query(message: Any, context: Any) -> Any:
        try:
            found = {"client": claimed_id(context.node_config)}
        except ConfigError as error:
            found = {"error": str(error)}
        return Message(RecordDict({"who": ConfigRecord(found)}), reply_to=message)

    return app


class Side:
    """One client on one order."""

    def __init__(
        self,
        order: wire.Order,
        model: ModelSource,
        data: Client | Sequence[Split],
        training: Training,
    ) -> None:
        self.order = order
        # Not a class of somebody's choice: the server must not make clients import things.
        if order.method.split(":")[0] not in METHODS:
            raise ConfigError(
                f'the server asks for method "{order.method}", which this client does not have: '
                "install the same version of fedmerge on both sides"
            )
        client = as_client(order.ticket.client, data)
        federation = check_client(client)
        training = training.for_data(classes=federation.task == "classification")
        module = build(model, order.seed)
        layout = Layout.of(module, order.blocks)
        if layout.fingerprint != order.layout:
            raise ModelError(
                f"the model of this client ({layout.size} numbers) is not the server's: "
                "give server_app and every client_app the same model"
            )
        check_model(module, client)
        n_inputs = client.train.x[0].numel()
        setup = Setup(
            layout, lambda j: layout.row(build(model, order.seed, j)), order.seed, n_inputs
        )
        population = Population.of([client])
        algorithm = make_method(order.method).resolve(None)
        self.side = ClientSide(algorithm, setup, module, training, population, order.seed)
        self.parts = algorithm.travels(layout)
        self.sizes = {
            split: len(part) for split, (_, part) in zip(SPLITS, client.splits(), strict=True)
        }

    def answer(self, kept: Any, node_config: Mapping[str, Any]) -> wire.Reply:
        """Train and evaluate as ordered; `kept` is what Flower keeps for this client."""
        order, side = self.order, self.side
        name = order.ticket.client
        fresh = side.algorithm.memory(side.setup, 1)
        before: Tensors = {}
        if fresh or order.codec.kind != "none":  # what is damaged must not stop who needs nothing
            before = read_memory(kept, node_config, name, order.federation).at(order.round)
        now = dict(before)
        memory = _part(before, "memory") or fresh
        message = spread(order.message, self.parts, side.setup.layout.size)
        told = {key: value[None] for key, value in order.told.items()}
        task = Task([0], order.round, message[None], memory, told)
        figures: wire.Figures = {}
        if order.measure_received:
            figures |= {m: _plain(found) for m, found in side.evaluate(task).items()}
        if not order.train:
            return wire.Reply(order.ticket, figures=figures, sizes=self.sizes)
        done = side.train(task, measured=order.measure_own)
        if done.own is not None:
            figures["local"] = _plain(done.own)
        delta, n_params = done.local.delta[0], side.setup.layout.n_params
        coded: Tensors = {"delta": cut(delta, self.parts) if delta.numel() else delta}
        if order.codec.kind != "none" and delta.shape == (side.setup.layout.size,):
            coded, left = order.codec.encode(delta, n_params, before.get("left"))
            now["left"] = left
        now |= {f"memory/{key}": value for key, value in done.local.memory.items()}
        if now:
            memory_now = Memory(order.federation, order.round, now, before)
            write_memory(kept, node_config, name, memory_now)
        return wire.Reply(
            order.ticket,
            coded,
            {name: value[0] for name, value in done.local.extra.items()},
            int(done.n_examples[0]),
            int(done.local.steps[0]),
            side.training.lr,
            figures,
            self.sizes,
        )


def as_client(name: str, data: Client | Sequence[Split]) -> Client:
    """The client `name` with these data, whatever its own `id` says.

    Raises:
        DataError: neither a client nor three splits.
    """
    if isinstance(data, Client):
        return replace(data, id=name)
    parts = list(data)
    if len(parts) != 3 or not all(isinstance(part, Split) for part in parts):
        raise DataError(
            "the data function returned neither a Client nor its three splits (training, "
            "validation, test): return one of these"
        )
    train, validation, test = parts
    return Client(name, train, validation, test)


def _data_of(data: Data, node_config: Mapping[str, Any]) -> Client | Sequence[Split]:
    try:
        return data(node_config)
    except OSError as error:
        raise DataError(f"the client's data cannot be read: {error}") from error


def check_client(client: Client) -> Federation:
    """The federation of this client alone, checked; a single class is allowed here.

    Raises:
        DataError: data that cannot be trained on.
    """
    shape = tuple(client.train.x.shape[1:])
    if client.train.y.dtype.is_floating_point:
        made = Federation(client.id, (client,), "regression", int(client.train.y.shape[-1]), shape)
    else:
        n_classes = max(2, _highest_label(client) + 1)
        made = Federation(client.id, (client,), "classification", n_classes, shape)
    check_federation(made, whole=False)
    return made


def check_model(module: nn.Module, client: Client) -> None:
    """See whether the model goes with the client's data, by one example.

    Raises:
        ModelError: it does not take inputs of that shape.
        DataError: a label that it has no output for.
    """
    x, was = client.train.x[:1], module.training
    try:
        with torch.no_grad():
            outputs = module.eval()(x).shape[-1]
    except Exception as error:  # the model is the user's own, and may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the model does not take this client's inputs of shape {tuple(x.shape[1:])}: {reason}"
        ) from error
    finally:
        module.train(was)
    if not client.train.y.dtype.is_floating_point and _highest_label(client) >= outputs:
        raise DataError(
            f"label {_highest_label(client)}, but the model has outputs for labels 0 to "
            f"{outputs - 1}; give the model more outputs everywhere, or correct the label"
        )


def _highest_label(client: Client) -> int:
    return max((int(split.y.max()) for _, split in client.splits() if len(split)), default=0)


def _plain(found: Mapping[str, Measured]) -> dict[str, dict[str, float]]:
    made: dict[str, dict[str, float]] = {}
    for split, measured in found.items():
        values = {name: value for name, value in vars(measured).items() if value is not None}
        made[split] = {name: float(value[0]) for name, value in values.items()}
    return made


def _part(values: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}/"): v for k, v in values.items() if k.startswith(f"{name}/")}
