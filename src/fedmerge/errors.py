"""The exceptions that fedmerge raises, and the wording helper they share.

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
from collections.abc import Iterable


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
