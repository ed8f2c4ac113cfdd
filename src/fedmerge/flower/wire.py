"""What travels between the server and a client, as Flower's records and back.

It turns values into records; it sends nothing, and trusts nothing that a client has written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..algorithms import Ticket
from ..codec import Codec, Coded
from ..errors import ModelError

PROTOCOL = 3
"""Raised with every change that an older client or server would misunderstand."""
SMALL = 2**20
"""Bytes of tensors up to which they travel within the record of values. Flower sends every record,
array and piece of an array by a request of its own, announced by the first: whoever looks before
the last has come waits a second for it."""
PACKED = "tensors."
"""Of the names of the values that hold a group of tensors."""
Figures = dict[str, dict[str, dict[str, float]]]
"""{model: {split: {measure: value}}} of one client."""


@dataclass(frozen=True)
class Order:
    """What a client is asked to do in a round.

    Attributes:
        ticket: names the model that is sent. round: from 1; names the draws. seed: of the run.
        method: as in `make_method`. layout: fingerprint of the model.
        blocks: how it is laid out.
        message: (r, P), the models of the client; one for most methods.
        train: whether to train; otherwise the models are evaluated only.
        measure_received: evaluate the model as received, and after one local epoch.
        measure_own: evaluate the client's own model at the end of training.
        codec: how to send the update.
        federation: names this one among all, for what clients remember of it.
        told: what the server says with models that are to be used, as `Algorithm.told`.
    """

    ticket: Ticket
    round: int
    seed: int
    method: str
    layout: str
    message: Tensor
    blocks: Literal["layer", "whole"] = "layer"
    train: bool = True
    measure_received: bool = True
    measure_own: bool = True
    codec: Codec = field(default_factory=Codec)
    federation: str = ""
    told: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What a client sends back; `error` is the one line of what went wrong there, if anything did.

    Attributes:
        ticket: as received, or None where the reply names none.
        coded: the update, as `codec` has coded it. extra: what else the method sends.
        n_examples, steps, lr: of local training. sizes: examples in each split.
    """

    ticket: Ticket | None
    coded: Coded = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    n_examples: int = 0
    steps: int = 0
    lr: float = 0.0
    figures: Figures = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    error: str | None = None


def write_order(order: Order) -> Any:
    """The records of an order."""
    config: dict[str, Any] = {
        "protocol": PROTOCOL,
        **_ticket_values(order.ticket),
        "round": order.round,
        "seed": order.seed,
        "method": order.method,
        "layout": order.layout,
        "blocks": order.blocks,
        "train": order.train,
        "measure-received": order.measure_received,
        "measure-own": order.measure_own,
        "compression": order.codec.kind,
        "keep": order.codec.keep,
        "federation": order.federation,
    }
    return _records("order", config, {"model": {"model": order.message}, "told": order.told})


def read_order(records: Any) -> Order:
    """Read an order at the client.

    Raises:
        ModelError: a server that speaks another version, or that is not one of ours.
    """
    config = records.get("order", {})
    found = config.get("protocol")
    if found != PROTOCOL:
        raise ModelError(
            f"the server speaks version {found} of the protocol, this client version {PROTOCOL}: "
            "install the same version of fedmerge on both sides"
        )
    return Order(
        ticket=Ticket(config["client"], config["version"], config["row"]),
        round=config["round"],
        seed=config["seed"],
        method=config["method"],
        layout=config["layout"],
        message=_group(records, config, "model")["model"],
        blocks=config["blocks"],
        train=config["train"],
        measure_received=config["measure-received"],
        measure_own=config["measure-own"],
        codec=Codec(config["compression"], config["keep"]),
        federation=config["federation"],
        told=_group(records, config, "told"),
    )


def write_reply(reply: Reply) -> Any:
    """The records of a reply."""
    config: dict[str, Any] = {
        "protocol": PROTOCOL,
        "n-examples": reply.n_examples,
        "steps": reply.steps,
        "lr": reply.lr,
        **{f"size.{split}": size for split, size in reply.sizes.items()},
    }
    if reply.ticket is not None:
        config |= _ticket_values(reply.ticket)
    if reply.error is not None:
        config["error"] = reply.error
    for model, splits in reply.figures.items():
        for split, found in splits.items():
            config |= {f"figure.{model}.{split}.{name}": v for name, v in found.items()}
    return _records("reply", config, {"update": reply.coded, "extra": reply.extra})


def read_reply(records: Any) -> Reply:
    """Read a reply at the server.

    Raises:
        ModelError: records that are not those of a reply.
    """
    try:
        config = dict(records["reply"])
        if config["protocol"] != PROTOCOL:
            raise ModelError(f"a reply of protocol {config['protocol']}, wanted {PROTOCOL}")
        ticket = None
        if "client" in config:
            ticket = Ticket(str(config["client"]), int(config["version"]), str(config["row"]))
        figures: Figures = {}
        for name, value in config.items():
            if name.startswith("figure."):
                _, model, split, measure = name.split(".")
                figures.setdefault(model, {}).setdefault(split, {})[measure] = float(value)
        return Reply(
            ticket=ticket,
            coded=_group(records, config, "update"),
            extra=_group(records, config, "extra"),
            n_examples=_whole(config["n-examples"]),
            steps=_whole(config["steps"]),
            lr=float(config["lr"]),
            figures=figures,
            sizes={n[5:]: _whole(v) for n, v in config.items() if n.startswith("size.")},
            error=str(config["error"]) if "error" in config else None,
        )
    except ModelError:
        raise
    except Exception as error:  # whatever a client has made up ends as one line here
        raise ModelError(f"a reply that cannot be read ({type(error).__name__}: {error})") from None


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise ModelError(f"a reply with {value!r} where a number of examples belongs")
    return value


def _ticket_values(ticket: Ticket) -> dict[str, Any]:
    return {"client": ticket.client, "version": ticket.version, "row": ticket.row}


def _records(name: str, config: dict[str, Any], groups: Mapping[str, Mapping[str, Tensor]]) -> Any:
    """Values and groups of tensors as records, as few as there can be."""
    from flwr.app import ConfigRecord, RecordDict
    from safetensors.numpy import save

    found = {group: values for group, values in groups.items() if values}
    size = sum(value.nbytes for values in found.values() for value in values.values())
    if size <= SMALL:
        packed = {group: save(_numpy(values)) for group, values in found.items()}
        config |= {PACKED + group: data for group, data in packed.items()}
        found = {}
    apart = {group: arrays(values) for group, values in found.items()}
    return RecordDict({name: ConfigRecord(config), **apart})


def _group(records: Any, config: Mapping[str, Any], group: str) -> dict[str, Tensor]:
    """A group of tensors that `_records` has written; empty if there is none."""
    from safetensors.numpy import load

    if PACKED + group in config:
        return _tensors(load(config[PACKED + group]))
    return tensors(records[group]) if group in records else {}


def arrays(values: Mapping[str, Tensor]) -> Any:
    """Named tensors as a record of arrays."""
    from flwr.app import Array, ArrayRecord

    made = ArrayRecord()
    for name, value in _numpy(values).items():
        made[name] = Array(value)
    return made


def tensors(record: Any) -> dict[str, Tensor]:
    """The tensors of a record of arrays; they can be written to."""
    return _tensors({name: array.numpy() for name, array in record.items()})


def _numpy(values: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.asarray(v.detach().numpy(), order="C") for name, v in values.items()}


def _tensors(values: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Tensor]:
    return {n: torch.from_numpy(np.require(v, requirements="W")) for n, v in values.items()}
