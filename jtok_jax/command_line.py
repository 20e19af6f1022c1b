# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Parses flags, and says what is wrong with an override in the words of its field."""

import difflib
import re

from absl import flags

from jtok_jax.config import Config
from jtok_jax.config_dict import flatten, to_dict
from jtok_jax.errors import ConfigError, exit_on_error

_PREFIX = "--config."


def parse_flags(arguments: list[str]) -> list[str]:
    """Parse flags; a misspelt or mistyped override ends with its reason and exit code 2."""
    with exit_on_error():
        try:
            rest = flags.FLAGS(arguments)
            if "config" in flags.FLAGS:
                hasattr(flags.FLAGS["config"].value, "model")  # raises if it could not be loaded
            return rest
        except Exception as error:  # also whatever a config file raises: it is Python
            raise ConfigError(_reason(error, arguments)) from error


def _reason(error: Exception, arguments: list[str]) -> str:
    text = " ".join(map(str, error.args))
    own = re.search(r"^jtok_jax\.errors\.\w+: (.*)", text, re.M | re.S)  # of a file in configs/
    if own:
        return own[1].strip()
    files = [one for one in arguments if one.startswith("--config=")]
    overrides = [one for one in arguments if one.startswith(_PREFIX)]
    if isinstance(error, flags.UnrecognizedFlagError):
        if overrides and not files:
            return f"--config is missing, whose fields {overrides[0]} changes. Pass a file first."
        return f"{text}. Fields of the configuration are --config.GROUP.NAME=VALUE."
    if isinstance(error, OSError):
        return f"{' '.join(files)} cannot be loaded: there is no such file, or it fails. {text}"
    for override in overrides:
        if found := _unknown(override) or _mistyped(override):
            return found
    return text if isinstance(error, flags.Error) else f"{text} ({type(error).__name__})"


def _unknown(override: str) -> str | None:
    """Return what is wrong with the name of an override, or None."""
    name, known = override.removeprefix(_PREFIX).partition("=")[0], flatten(to_dict(Config()))
    if name in known:
        return None
    within = [one for one in known if one.startswith(f"{name}.")]
    if within:
        return f"{override}: {name} is a group of fields, such as {within[0]}."
    group, _, leaf = name.rpartition(".")
    ending = [one for one in known if leaf and one.endswith(f".{leaf}") and not group]
    ending += [one for one in known if leaf and _initials(one) == leaf]  # lr
    ending.sort(key=lambda one: not one.startswith(f"{group}."))
    near = ending or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    hint = f"Did you mean {near[0]!r}?" if near else "python train.py --help has all of them."
    return f"{override}: there is no field {name!r}. {hint}"


def _initials(field: str) -> str:
    words = field.rpartition(".")[2].split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""


def _mistyped(override: str) -> str | None:
    """Return what is wrong with the value of an override that should be a number, or None."""
    name, given, text = override.removeprefix(_PREFIX).partition("=")
    if not given:  # the value is the next argument
        return None
    default = flatten(to_dict(Config()))[name]
    if type(default) not in (int, float):
        return None
    try:
        type(default)(text)
    except ValueError:
        kind = "a whole number" if type(default) is int else "a number"
        return f"{name} is {text!r}; expected {kind}, such as {default}."
    return None
