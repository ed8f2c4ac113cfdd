"""How a text such as "fashion-mnist:/data/fm:pool=2" names a data set or a setting, with options.

It reads the text and checks options against the function that takes them; it calls nothing.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection

from fedmerge.errors import ConfigError, did_you_mean
from fedmerge.values import describe_type, read_value

PATH = "path"
"""The option that may be given without its name, first of all."""

PLACES = {"hub": "NAME", "text": "FOLDER"}
"""What a path is, for an error's text, where it is no file."""


def parse(text: str, what: str) -> tuple[str, dict[str, str]]:
    """Return the name in "name:key=value:key=value", and its options as texts.

    The first part after the name may be a value alone, which is option "path". Later parts
    without "=" belong to the value before them, as in "name:C:/folder". what: "data" or
    "setting", for the errors. Raises ConfigError where a key is missing or given twice.
    """
    name, *parts = text.split(":")
    options: dict[str, str] = {}
    last = ""
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals and last:
            options[last] += f":{part}"
            continue
        if not equals:
            key, value = PATH, part
        if not key or not value:
            raise ConfigError(f'{what} "{text}": "{part}" is not of the form key=value')
        if key in options:
            raise ConfigError(f'{what} "{text}": "{key}" is given twice')
        options[key] = value
        last = key
    return name, options


def convert(
    text: str,
    what: str,
    function: Callable[..., object],
    options: dict[str, str],
    hidden: Collection[str] = (),
) -> dict[str, object]:
    """Return `options` as the values that the parameters of `function` take.

    hidden: parameters that are no options. Raises ConfigError for an unknown option, one that is
    needed and missing, or a value of another type.
    """
    bound: dict[str, object] = getattr(function, "keywords", {})
    types = typing.get_type_hints(getattr(function, "func", function))
    known = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in hidden and name not in bound
    }
    values = {}
    for key, value in options.items():
        if key not in known:
            hint = did_you_mean(key, known) if known else "; it has no options"
            raise ConfigError(f'{what} "{text}": unknown option "{key}"{hint}')
        try:
            values[key] = read_value(value, types[key])
        except ValueError:
            wanted = describe_type(types[key])
            raise ConfigError(f'{what} "{text}": {key} = "{value}", wanted {wanted}') from None
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in values:
            name = text.partition(":")[0]
            example = f"{name}:{PLACES.get(name, 'FILE')}" if key == PATH else f"{name}:{key}=..."
            raise ConfigError(f'{what} "{text}": needs its {key}; say "{example}"')
    return values
