"""The command line: `fedmerge run | compare | data | report`.

It reads options, and shows progress and results; it computes nothing, and loads the heavy parts
only inside the command that needs them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .config import RunConfig, load_config
from .deploy.command import deploy, status
from .errors import ConfigError, StateError, blaming
from .lines import OneLine, StoppedError

if TYPE_CHECKING:
    from .sim import RoundLog

app = typer.Typer(
    cls=OneLine, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
)


def main() -> None:
    """Run the command line."""
    app()


def config_options(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each setting of a run but those in `without`.

    The command receives the settings that were given, as text, in its keyword arguments.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        parameters = own + [_option(name) for name in RunConfig.model_fields if name not in without]

        @wraps(command)
        def given(**values: Any) -> None:
            unset = RunConfig.model_fields.keys() - {parameter.name for parameter in own}
            command(**{k: v for k, v in values.items() if v is not None or k not in unset})

        given.__dict__["__signature__"] = inspect.Signature(parameters)
        given.__annotations__ = {one.name: one.annotation for one in parameters}
        return given

    return decorate


def _option(name: str) -> inspect.Parameter:
    field = RunConfig.model_fields[name]
    default = "none" if field.default is None else field.default
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        help=f"{field.description} (default {default})",
        metavar=name.upper(),
        show_default=False,
        rich_help_panel="Settings of a run (the keys of CONFIG.toml)",
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
    )


def _version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        try:
            print(f"fedmerge {metadata.version('fedmerge')}")
        except metadata.PackageNotFoundError:
            print("fedmerge, not installed")
        raise typer.Exit


app.add_typer(deploy, name="deploy")
app.command()(status)


@app.callback()
def _group(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="show the version"),
    ] = False,
) -> None:
    """Personalised federated learning by model merging."""


def _folder(text: str) -> Path:
    if not text.strip():
        raise typer.BadParameter(f'got "{text}", wanted a path; "." for the current folder.')
    return Path(text)


QUIET = typer.Option("--quiet", help="no progress, only the result")
SECONDS = typer.Option(min=0, metavar="X", help="seconds from one checkpoint to the next")


@app.command()
@config_options()
def run(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.toml]", help="settings; options override them")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(parser=_folder, metavar="DIR", help="folder for log, checkpoint and result"),
    ] = None,
    quiet: Annotated[bool, QUIET] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="seconds by phase at the end, and in profile.json")
    ] = False,
    checkpoint_seconds: Annotated[float, SECONDS] = 30,
    **overrides: str,
) -> None:
    """Train one method in one setting; started again with the same --out, it goes on."""
    settings = load_config(config, overrides)
    settings.trackers()
    if settings.execution == "processes":
        from .workers import get_ready

        get_ready()
    done = 0
    try:
        from .compare import folder, screen
        from .compare.profile import Profile

        spent = Profile()
        if out is not None:
            if (out / folder.COMPARISON).exists():  # no report would show a run beside it
                raise StateError(
                    f"--out {out} holds a comparison, wanted a run or nothing; choose "
                    "another folder"
                )
            folder.check_writable(out)
            folder.check_config(out, settings.model_dump(mode="json"))
            if folder.read_result(out) is not None:
                print(f"The run in {out} is finished; this is its result, nothing was run again.")
        with screen.rounds_bar(settings.method, settings.rounds, quiet) as show:

            def on_round(log: RoundLog) -> None:
                nonlocal done
                done = log.round
                show(log)

            with blaming(settings.method):
                result = settings.run(out, on_round, checkpoint_seconds, spent, True)
    except KeyboardInterrupt as error:
        kept = "nothing was kept, as no --out was given"
        if out is not None:
            kept = f"{out} keeps what was done, and the same command goes on from there"
        raise StoppedError(f"stopped after round {done} of {settings.rounds}; {kept}") from error
    screen.print_result(result)
    if profile and spent.rounds:
        screen.print_profile(spent)
        if out is not None:
            folder.write_json(out / folder.PROFILE, spent.to_json())


@app.command()
@config_options("data", "setting", "method", "chosen", "seed", "workers", "address")
def compare(
    out: Annotated[
        Path,
        typer.Option(
            parser=_folder, metavar="DIR", help="folder for runs, results and report.html"
        ),
    ],
    preset: Annotated[
        str | None,
        typer.Option(help="quick, standard or paper: a comparison, of which options replace parts"),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="A,B", help="data sets, or paths to data (default digits)")
    ] = None,
    settings: Annotated[
        str | None,
        typer.Option(metavar="A,B", help='settings, or "all"; "natural" for clients in the data'),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(metavar="X,Y:key=value", help='methods with their options, or "all"'),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="0-4", help='e.g. "0-4" (the default) or "0,3,7-9"')
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=8,
            metavar="N",
            help="points of each method's grid to try (default the preset's, 0)",
        ),
    ] = None,
    tuning: Annotated[
        bool, typer.Option("--tuning/--no-tuning", help="tune, or take every method's defaults")
    ] = True,
    tuning_seeds: Annotated[
        str | None,
        typer.Option(
            metavar="1000-1007",
            help="most seeds to tune on, none of them reported (default eight from 1000 on)",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, metavar="N", help="processes", show_default="one for each CPU"
        ),
    ] = None,
    quiet: Annotated[bool, QUIET] = False,
    **overrides: str,
) -> None:
    """Run every method in every setting with every seed; started again, it goes on."""
    shared = load_config(None, overrides)  # the options first: they are checked at once
    if shared.execution in ("processes", "ray"):
        raise ConfigError(
            f"--execution {shared.execution} is for `fedmerge run`: a comparison runs its cells in "
            "--workers processes already, which may not start others"
        )
    tracked = shared.trackers()
    from .workers import get_ready

    # While everything is being checked here.
    get_ready("fedmerge.comparison", "sklearn.cluster", "sklearn.datasets")
    from .compare.presets import make_protocol
    from .comparison import NAMES, run_comparison

    protocol = make_protocol(
        NAMES,
        preset=preset,
        data=data,
        settings=settings,
        methods=methods,
        seeds=seeds,
        trials=trials,
        tuning_seeds=tuning_seeds,
        tuning=tuning,
    )
    if not run_comparison(protocol, overrides, out, workers, tracked, quiet):
        raise typer.Exit(1)


@app.command()
@config_options(*(RunConfig.model_fields.keys() - {"data", "clients", "train_fraction", "seed"}))
def data(
    setting: Annotated[str, typer.Argument(metavar="SETTING", help="see `fedmerge compare`")],
    out: Annotated[Path | None, typer.Option(metavar="PICTURE.png", help="draw it, too")] = None,
    **overrides: str,
) -> None:
    """Show how a setting divides the data over the clients."""
    config = load_config(None, {**overrides, "setting": setting})
    from .compare.screen import print_clients, waiting
    from .data import describe, sample_images

    with waiting(f"{config.data}: loading"):
        federation = config.federation()
    rows = describe(federation)
    print_clients(federation, rows)
    if out is None:
        return
    if federation.task != "classification":
        raise ConfigError(f'--out: setting "{setting}" has values for labels, nothing to draw')
    from .report.drawing import save
    from .report.split import LabelCounts, data_split

    counts = [LabelCounts(row.id, row.kind, row.label_counts.tolist()) for row in rows]
    out.parent.mkdir(parents=True, exist_ok=True)
    save(data_split(counts, federation.name, images=sample_images(federation)), out)
    print(f"The picture is {out}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="of `fedmerge compare` or `run`")],
    figures: Annotated[
        bool, typer.Option("--figures", help="also its pictures and tables as files, for papers")
    ] = False,
) -> None:
    """Make the page of finished runs anew."""
    from .compare.results import collect
    from .report.export import write_figures
    from .report.page import write_report
    from .report.reading import unlisted

    if unlisted(folder):
        collect(folder)
    print(f"The page is {write_report(folder)}")
    if figures:
        out, written = write_figures(folder)
        print(f"{written} files of pictures and tables are in {out}")
