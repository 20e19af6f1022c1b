# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Checks of options: each raises ConfigError with the name, what was found and what would do."""

from jtok_jax.errors import ConfigError


def one_of(value: str, name: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of the choices."""
    if value not in choices:
        known = ", ".join(choice or "nothing" for choice in choices)
        raise ConfigError(f"{name} is {value!r}; expected one of {known}.")


def at_least(config: object, prefix: str, minimum: float, *names: str) -> None:
    """Raise ConfigError unless the fields `names` of a configuration are at least `minimum`."""
    for name in names:
        value = getattr(config, name)
        if not value >= minimum:
            raise ConfigError(f"{prefix}.{name} is {value}; expected at least {minimum}.")


def check_betas(config: object, prefix: str) -> None:
    """Raise ConfigError unless b1 and b2 of a configuration are in [0, 1)."""
    for name in ("b1", "b2"):
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ConfigError(f"{prefix}.{name} is {value}; expected at least 0 and less than 1.")


def parse_options(text: str, name: str) -> dict[str, object]:
    """Return the options of "--name=value --name=value", the way XLA_FLAGS are written.

    "--" may be left out; true and false become bools; a value may hold commas.

    Raises:
        ConfigError: a part is no option, or a name comes twice.
    """
    options = {}
    for part in text.split():
        key, equals, value = part.removeprefix("--").partition("=")
        if not (equals and key and value):
            raise ConfigError(
                f"{name} has {part!r}; expected options as '--name=value', with spaces between."
            )
        if key in options:
            raise ConfigError(f"{name} has {key} twice; leave one.")
        options[key] = {"true": True, "false": False}.get(value.lower(), value)
    return options


def names(text: str) -> tuple[str, ...]:
    """Return the parts of a list with commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
