"""The exceptions that fedmerge raises, and the wording helpers they share.

They carry one line for the person at the keyboard; they are not used for control flow.

    FedmergeError
    ├── ConfigError         a setting, option or method that cannot be used
    ├── DataError           clients or files that cannot be trained on
    ├── ModelError          a module, row or update of the wrong shape or kind
    ├── StateError          a checkpoint or folder that cannot be read or written
    └── MissingExtraError   an optional dependency that is not installed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class FedmergeError(Exception):
    """Base of every error that fedmerge raises on purpose; its text is one clear line."""


class ConfigError(FedmergeError, ValueError):
    """A setting, option or method that cannot be used."""


class DataError(FedmergeError, ValueError):
    """Clients or files that cannot be trained on."""


class ModelError(FedmergeError, ValueError):
    """A module, row or update of the wrong shape or kind."""


class StateError(FedmergeError, RuntimeError):
    """A checkpoint or folder that cannot be read or written."""


class MissingExtraError(FedmergeError, ImportError):
    """An optional dependency is not installed; the text gives the command that installs it."""

    def __init__(self, extra: str) -> None:
        super().__init__(f'this needs the extra "{extra}": pip install "fedmerge[{extra}]"')
        self.extra = extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str]]:
        # By default an exception is made again from its text.
        return type(self), (self.extra,)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ``'; did you mean "x"?'`` for the nearest of `choices`, or the list of them."""
    names = sorted(choices)
    near = difflib.get_close_matches(word, names, n=1)
    return f'; did you mean "{near[0]}"?' if near else f"; choose from {', '.join(names)}"


@contextmanager
def blaming(method: str, where: str = "") -> Iterator[None]:
    """Tell in a line what a method of the caller's own raises in the block: it may be anything.

    What a method of fedmerge raises stays as it is. method: as in `make_method`; one of the
    caller's own has a dot in its name. where: follows it in the line.
    """
    try:
        yield
    except Exception as error:
        own = "." in method.partition(":")[0]
        # Rows of a wrong shape are the method's; other lines name their cause, as a full disk does.
        told = isinstance(error, FedmergeError | OSError) and not isinstance(error, ModelError)
        if told or not own:
            raise
        kind = "" if isinstance(error, ModelError) else f"{type(error).__name__}: "
        raise ConfigError(f"{method}{where}: {kind}{' '.join(str(error).split())}") from error
