"""FedAvg, its variants, and methods whose last layer is the client's: FedPer, FedRep, FedBABU.

Plain implementations; see `world` for what they are made of.
"""

from __future__ import annotations

import copy

from torch import nn

from .world import Model, World, assign, average, pull


def _parts(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of the body, and those of the last layer."""
    layers = [one for one in net.modules() if isinstance(one, nn.Linear)]
    head = list(layers[-1].parameters())
    return [p for p in net.parameters() if all(p is not h for h in head)], head


def _share_bodies(world: World, nets: list[nn.Module]) -> None:
    mean = average([_parts(net)[0] for net in nets], world.sizes)
    for net in nets:
        assign(_parts(net)[0], mean)


def _tuned(world: World, nets: list[nn.Module], epochs: int) -> list[Model]:
    made: list[Model] = []
    for net, data in zip(nets, world.train, strict=True):
        own = copy.deepcopy(net)
        world.fit(own, data, epochs=epochs)
        made.append(own)
    return made


def _averaged(world: World, rounds: int, mu: float = 0.0) -> list[nn.Module]:
    nets = world.copies()
    for _ in range(rounds):
        for net, data in zip(nets, world.train, strict=True):
            world.fit(net, data, penalty=pull(net, net, mu) if mu else None)
        mean = average([list(net.parameters()) for net in nets], world.sizes)
        for net in nets:
            assign(net.parameters(), mean)
    return nets


def fedavg(world: World, rounds: int) -> list[Model]:
    """McMahan et al. 2017, algorithm 1, with all clients in every round."""
    return list(_averaged(world, rounds))


def fedavg_ft(world: World, rounds: int, *, finetune: int = 5) -> list[Model]:
    """The same, fine-tuned by each client at last."""
    return _tuned(world, _averaged(world, rounds), finetune)


def fedprox(world: World, rounds: int, *, mu: float = 0.1) -> list[Model]:
    """Li et al. 2020, algorithm 2: FedAvg whose clients are held near the model they receive."""
    return list(_averaged(world, rounds, mu))


def fedper(world: World, rounds: int) -> list[Model]:
    """Arivazhagan et al. 2019, algorithm 1: train the whole, average the bodies."""
    nets = world.copies()
    for _ in range(rounds):
        for net, data in zip(nets, world.train, strict=True):
            world.fit(net, data)
        _share_bodies(world, nets)
    return list(nets)


def fedrep(world: World, rounds: int, *, head_epochs: int = 10) -> list[Model]:
    """Collins et al. 2021, algorithm 1: fit the head to the body, then the body to the head."""
    nets = world.copies()
    for _ in range(rounds):
        for net, data in zip(nets, world.train, strict=True):
            body, head = _parts(net)
            world.fit(net, data, epochs=head_epochs, part=head)
            world.fit(net, data, part=body)
        _share_bodies(world, nets)
    return list(nets)


def fedbabu(world: World, rounds: int, *, finetune: int = 5) -> list[Model]:
    """Oh, Kim and Yun 2022, algorithm 1: the head is never trained; fine-tune the whole at last."""
    nets = world.copies()
    for _ in range(rounds):
        for net, data in zip(nets, world.train, strict=True):
            world.fit(net, data, part=_parts(net)[0])
        _share_bodies(world, nets)
    return _tuned(world, nets, finetune)
