"""Errors and warnings of a command as lines on stderr, and the exit code that goes with them.

It runs a command and reports how it ended; what commands there are is in `cli`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from .errors import FedmergeError, did_you_mean

UsageError: type[Exception] = typer.BadParameter.__bases__[0]


class StoppedError(Exception):
    """Ctrl-C or SIGTERM; the text says what was kept."""


class OneLine(TyperGroup):
    """The group of commands; whatever goes wrong in one ends as a line on stderr."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line and end the process with its exit code."""
        here = threading.current_thread() is threading.main_thread()
        # To be told to end is as Ctrl-C: what is done is kept, and a line says so.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler) if here else None
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _each_once()
                code = super().main(*args, **{**options, "standalone_mode": False})
        except StoppedError as error:
            complain(str(error))
            code = 130
        except FedmergeError as error:
            complain(str(error))
            code = 2
        except UsageError as error:
            complain(_usage_text(error))
            code = 2
        except OSError as error:
            what = f"{error.filename}: " if error.filename else ""
            complain(f"{what}{error.strerror or error}; what is written stays whole")
            code = 2
        finally:
            if here:
                signal.signal(signal.SIGTERM, before)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run a command, where Ctrl-C is not yet turned into something else."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise StoppedError("stopped; nothing was under way that had to be kept") from error


def debugging() -> bool:
    """Whether the user asks for tracebacks."""
    return os.environ.get("FEDMERGE_DEBUG") == "1"


def complain(text: str) -> None:
    """Print `text` as one line, after the traceback of the current error for those who ask."""
    if debugging() and sys.exc_info()[0] is not None:
        traceback.print_exc()
    if text:  # without a command, the help is shown already
        print(f"fedmerge: {' '.join(text.split())}", file=sys.stderr)


def _each_once() -> Callable[..., None]:
    """Return what shows a warning as a line, the same line only once."""
    shown: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        if text not in shown:
            shown.add(text)
            print(f"fedmerge: warning: {text}", file=sys.stderr)

    return show


def _usage_text(error: Exception) -> str:
    option, near = (getattr(error, name, None) for name in ("option_name", "possibilities"))
    if option is not None and near:
        return f'unknown option "{option}"{did_you_mean(option, near)}'
    text = str(error.format_message()) if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    # Two libraries may each have added the same hint.
    text, *hints = text.split(" Did you mean ")
    text = " Did you mean ".join([text, *dict.fromkeys(hint.strip() for hint in hints)])
    return f"{text} Try: {context.command_path} --help" if text and context is not None else text
