"""The commands `fedmerge deploy init | check | node` and `fedmerge status`.

They read options and print; what they do is in the modules beside this one, loaded when it is
needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

deploy = typer.Typer(no_args_is_help=True, help="A real federation on Flower.")


@deploy.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="new folder for the app")],
    clients: Annotated[int, typer.Option(min=1, help="number of sites")] = 4,
    publisher: Annotated[str, typer.Option(help="who publishes the app")] = "your-name",
) -> None:
    """Write a complete Flower app: server, client, model, data, keys, commands."""
    from .create import create_app

    for path in create_app(folder, clients=clients, publisher=publisher):
        print(path)
    print(f"Next: {folder / 'README.md'}")


@deploy.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of the app")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="of the SuperLink")] = 8000,
    credentials: Annotated[str, typer.Option(help="folder of the keys, in DIR")] = "credentials",
) -> None:
    """Find what is wrong before anything starts."""
    from .check import check_app

    findings = check_app(folder, port=port, credentials=credentials)
    for finding in findings:
        print(f"{'ok   ' if finding.good else 'WRONG'}  {finding.text}")
    wrong = sum(not finding.good for finding in findings)
    if wrong:
        print(f"{wrong} of {len(findings)} checks failed")
        raise typer.Exit(1)


@deploy.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def node(
    arguments: Annotated[list[str], typer.Argument(metavar="...", help="of flower-supernode")],
    preload: Annotated[
        list[str] | None, typer.Option(metavar="MODULE", help="load it once, not per message")
    ] = None,
) -> None:
    """Start Flower's SuperNode with a warm start: the same, in a fraction of the CPU time."""
    from .warm import run_node

    run_node(arguments, preload or [])


def status(
    folder: Annotated[Path, typer.Argument(metavar="STATE_DIR", help="fedmerge.state of a server")],
    watch: Annotated[bool, typer.Option("--watch", help="again every 2 s, until Ctrl-C")] = False,
    label: Annotated[
        list[str] | None, typer.Option(metavar="ID=NAME", help="call a client NAME")
    ] = None,
    readmit: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="let back a client set aside")
    ] = None,
) -> None:
    """Show how a deployed server stands: rounds, clients, refused updates, rows."""
    import time

    from .status import read_status, status_lines, tell_server

    if label or readmit:
        for line in tell_server(folder, label or [], readmit or []):
            print(line)
        return
    while True:
        text = "\n".join(status_lines(read_status(folder)))
        if watch:
            print("\x1b[2J\x1b[H", end="")
        print(text, flush=True)
        if not watch:
            return
        time.sleep(2)
