"""The settings of one run: names, units, defaults and limits, and the simulation they stand for.

This is the only list of them; the command line and the folder of a run are made from it. It checks
each value by itself, and leaves names of data sets, methods and models to the parts that own them.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from .compare.cells import TUNED, chosen_values
from .errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from .compare.profile import Profile
    from .data import Federation
    from .sim import RoundLog, Simulation

Text = Annotated[str, Field(min_length=1)]
MOST = 10_000_000
"""Of clients, rounds and the like: beyond it a number is a slip, and some overflow."""


class RunConfig(BaseModel):
    """Everything that the result of a run depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: Text = Field(
        "digits", description="data set, with options as name:key=value, or a path to your own"
    )
    setting: Text = Field(
        "concept-mix", description='how clients differ; "natural" for clients that the data has'
    )
    method: Text = Field("fedmerge", description="method, with options as name:key=value")
    chosen: str | None = Field(
        None,
        description="what tuning chose, as key=value:key=value: options of the method, lr or "
        "epochs, in place of the others",
        examples=["key=value:key=value, each key once"],
    )
    model: Text = Field("mlp", description="model that every client trains")
    hidden: int = Field(
        32, ge=1, le=65536, description="width of the model's hidden layers, in units"
    )
    clients: int | None = Field(
        32, ge=1, le=MOST, description="number of clients; none for all that the data has"
    )
    train_fraction: float = Field(
        0.5, gt=0, lt=1, description="share of a client's examples to train on"
    )
    rounds: int = Field(60, ge=1, le=MOST, description="rounds of communication")
    participation: float = Field(
        1.0, gt=0, le=1, description="share of the clients drawn for each round"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="chance that a drawn client fails to answer in a round"
    )
    epochs: int = Field(
        5, ge=1, le=MOST, description="local passes over the training data in a round"
    )
    lr: float = Field(0.3, gt=0, le=1000, description="learning rate of local SGD")
    batch_size: int = Field(16, ge=1, le=MOST, description="examples in a local step")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of local SGD")
    weight_decay: float = Field(0.0, ge=0, le=1000, description="L2 penalty of local SGD, per step")
    clip: float | None = Field(
        None, gt=0, le=1e6, description="largest norm of a local gradient, or none for no limit"
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of every random draw")
    evaluate_every: int = Field(
        1, ge=1, le=MOST, description="rounds from one evaluation to the next"
    )
    evaluate_on: float = Field(
        1.0, gt=0, le=1, description="share of the clients that an evaluation measures"
    )
    execution: Literal["auto", "stacked", "sequential", "processes", "ray"] = Field(
        "auto", description="how clients are trained: auto, stacked, sequential, processes or ray"
    )
    workers: int | None = Field(
        None, ge=1, le=1024, description="most worker processes, or none for one on each CPU"
    )
    address: Text | None = Field(
        None, description="of a running Ray cluster, host:port or auto, or none for one of its own"
    )
    threads: int = Field(1, ge=1, le=1024, description="CPU threads of a process")
    track: Text | None = Field(
        None,
        description="where else to log: tensorboard, mlflow or both, with a place as "
        "mlflow:http://host:5000",
    )

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, values: dict[str, Any]) -> dict[str, Any]:
        # The data decides how many clients it has, unless a number is asked for.
        natural = str(values.get("setting")).partition(":")[0] == "natural"
        return {"clients": None, **values} if natural else values

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        if isinstance(value, bool):
            # Python counts true as 1, which is nobody's number of rounds.
            raise ValueError("no setting is a truth value")
        return None if value == "none" else value

    @field_validator("chosen")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        chosen_values(value)
        return value

    def settled(self) -> RunConfig:
        """These settings with what tuning chose put in its place.

        Raises:
            ConfigError: a value outside its limits.
        """
        values = chosen_values(self.chosen)
        training = {name: values.pop(name) for name in TUNED if name in values}
        method = self.method + "".join(f":{key}={value}" for key, value in values.items())
        own = {"method": method, "chosen": None, **training}
        return load_config(None, {**self.model_dump(), **own})

    def federation(self) -> Federation:
        """Return the clients of this run.

        Raises:
            ConfigError, DataError: an unknown name, or data that cannot be used.
        """
        from .data import make_federation

        return make_federation(
            self.data,
            self.setting,
            self.clients,
            seed=self.seed,
            train_fraction=self.train_fraction,
        )

    def simulation(
        self,
        federation: Federation,
        checkpoint: Path | None = None,
        checkpoint_seconds: float = 30,
        spawning: bool = False,
    ) -> Simulation:
        """Return the simulation of this run with the clients of `federation`.

        Args:
            spawning: with execution "auto", whether it may start worker processes: not from a
                script, which each of them would run again.
            checkpoint: folder in which the simulation keeps its state, or None.
            checkpoint_seconds: time from one state to the next.

        Raises:
            ConfigError: an unknown method, model or option, or one that does not fit the clients.
        """
        import torch

        from .algorithms import make_method
        from .local import Training
        from .models import make_model
        from .sim import Simulation

        torch.set_num_threads(self.threads)
        settled = self.settled()
        most = os.cpu_count() if spawning and self.execution == "auto" else None
        return Simulation(
            make_method(settled.method),
            federation,
            make_model(self.model, federation.input_shape, federation.n_outputs, self.hidden),
            training=Training(
                lr=settled.lr,
                epochs=settled.epochs,
                batch_size=self.batch_size,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                clip=self.clip,
            ),
            rounds=self.rounds,
            participation=self.participation,
            dropout=self.dropout,
            seed=self.seed,
            evaluate_every=self.evaluate_every,
            evaluate_on=self.evaluate_on,
            execution=self.execution,
            workers=self.workers or most,
            address=self.address,
            checkpoint=checkpoint,
            checkpoint_seconds=checkpoint_seconds,
        )

    def run(
        self,
        folder: Path | None = None,
        on_round: Callable[[RoundLog], object] = lambda log: None,
        checkpoint_seconds: float = 30,
        profile: Profile | None = None,
        spawning: bool = False,
        clients: Callable[[RunConfig], Federation] | None = None,
        trial: bool = False,
    ) -> dict[str, Any]:
        """Run this, or go on with what `folder` holds of it; return what result.json holds.

        `profile` takes in the seconds of each phase; for `spawning` see `simulation`; `clients`
        returns what `federation` would, at less cost; for `trial` see `compare.execute`.

        Raises:
            FedmergeError: settings that do not fit each other, or a folder that cannot be used.
        """
        with profile("start") if profile else nullcontext():
            import_core()
        from .compare.execute import execute
        from .compare.folder import read_result
        from .compare.trackers import tracked

        def build(checkpoint: Path | None) -> Simulation:
            federation = clients(self) if clients else self.federation()
            return self.simulation(federation, checkpoint, checkpoint_seconds, spawning)

        def seen(log: RoundLog) -> None:
            tracker.on_round(log)
            on_round(log)

        config = self.model_dump(mode="json")
        finished = folder is not None and read_result(folder) is not None
        with tracked([] if finished else self.trackers(), config, folder) as tracker:
            result = execute(config, build, folder, seen, profile, trial)
            tracker.finish(result)
        return result

    def trackers(self) -> list[str]:
        """Return the names of the trackers, checked.

        Raises:
            ConfigError, MissingExtraError: one that is unknown, or not installed.
        """
        from .compare.trackers import check_trackers

        names = self.track.split(",") if self.track else []
        check_trackers(names)
        return names


def import_core() -> None:
    """Import what every run needs, which takes a worker process seconds."""
    from . import algorithms, data, models, sim  # noqa: F401


def load_config(path: Path | None, overrides: Mapping[str, object]) -> RunConfig:
    """Return the settings in the TOML file `path`, with `overrides` on top.

    Args:
        path: file of flat `key = value` lines, or None for the defaults.
        overrides: settings by name; text stands for the value it spells, "none" for none.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, or a value outside its limits.
    """
    stored = _read_file(path) if path is not None else {}
    for origin, values in ((f"{path}: ", stored), ("", overrides)):
        for name, value in values.items():
            if isinstance(value, dict):
                raise ConfigError(f'{origin}[{name}] is a table; write "key = value" lines only')
            if name not in RunConfig.model_fields:
                hint = did_you_mean(name, RunConfig.model_fields)
                raise ConfigError(f'{origin}unknown key "{name}"{hint}')
    try:
        return RunConfig.model_validate({**stored, **overrides})
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False, include_context=False):
            name = str(problem["loc"][0])
            origin = "" if name in overrides else f"{path}: "
            got = json.dumps({**stored, **overrides}[name], default=str)
            wanted = describe_limits(RunConfig.model_fields[name])
            lines.append(f"{origin}{name}: got {got}, wanted {wanted}")
        raise ConfigError("; ".join(dict.fromkeys(lines))) from error


def describe_limits(field: FieldInfo) -> str:
    """Return what a setting may be, e.g. "a whole number, at least 1"."""
    kind = field.annotation
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    optional = type(None) in get_args(kind)
    kinds = get_args(kind) if optional else (kind,)
    words = "a whole number" if int in kinds else "a number" if float in kinds else "a name"
    words = field.examples[0] if field.examples else words
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = [
        f"{sign} {_number(getattr(limit, name))}"
        for limit in field.metadata
        for name, sign in signs.items()
        if hasattr(limit, name)
    ]
    text = " and ".join(limits)
    words += f" of {text}" if text.startswith("at") else f" {text}" if text else ""
    return f"{words}, or none" if optional else words


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
