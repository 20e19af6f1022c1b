# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""`Config` from plain values and back: the only reader of a ConfigDict."""

import argparse
import dataclasses
import difflib
import inspect
import math
import re

import ml_collections

from jtok_jax.config import Config, MeshConfig
from jtok_jax.errors import ConfigError

_MESH = "--config.mesh."


def to_dict(config: Config) -> dict:
    """Return the whole configuration as nested dicts of plain values (what a checkpoint stores)."""
    return dataclasses.asdict(config)


def from_config_dict(values: ml_collections.ConfigDict | dict) -> Config:
    """Return the checked configuration. Raises ConfigError at an unknown or mistyped key."""
    plain = values if isinstance(values, dict) else values.to_dict()
    return _build(Config, plain, "")


def completed(saved: dict, default: dict | None = None) -> dict:
    """Return what an earlier version saved, with the fields added since at their defaults.

    A new field therefore starts at a value that changes nothing. Groups of options that no longer
    exist are dropped: what they were for is refused by the name that turned it on.
    """
    default = to_dict(Config()) if default is None else default
    known = {k: v for k, v in saved.items() if k in default or not isinstance(v, dict)}
    groups = {k: completed(saved.get(k, {}), v) for k, v in default.items() if isinstance(v, dict)}
    return default | known | groups


def differences(left: dict, right: dict, of_left: str, of_right: str) -> list[str]:
    """Return a line "KEY: VALUE of_left, VALUE of_right" for each key whose values differ."""
    return [
        f"{key}: {left.get(key)!r} {of_left}, {right.get(key)!r} {of_right}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


def flatten(values: dict, prefix: str = "") -> dict[str, object]:
    """Return {'train.steps': 10, ...} of nested dicts."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def describe_fields(cls: type = Config, prefix: str = "--config.") -> list[str]:
    """Return a line for every field of a configuration: its default, and its comment."""
    classes = filter(dataclasses.is_dataclass, cls.__mro__)
    found, source = [], "\n".join(map(inspect.getsource, classes))
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            found += describe_fields(field.type, f"{prefix}{field.name}.")
            continue
        line = rf"((?:^    #.*\n)*)^    {field.name}: [^#\n]*(.*)"
        comments = re.search(line, source, re.M).groups()
        said = " ".join(part.strip(" #\n") for text in comments for part in text.splitlines())
        found.append((f"  {prefix}{field.name}={field.default}".ljust(52) + said).rstrip())
    return found


_OF_HOST_TABLES = ("table_memory", "table_prefetch", "table_folder", "table_dtype")


def add_mesh_options(parser: argparse.ArgumentParser) -> None:
    """Add --config.mesh.fsdp=8 and its like to a tool, as train.py has them."""
    group = parser.add_argument_group(
        "mesh", "how the model lies on several devices; default: as in the run, or split over all"
    )
    for field in dataclasses.fields(MeshConfig):
        if field.name in _OF_HOST_TABLES:  # see `add_table_options`
            continue
        group.add_argument(f"{_MESH}{field.name}", type=field.type, default=argparse.SUPPRESS)


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where a tool has tables."""
    group = parser.add_argument_group("tables", "where they lie (docs/host-tables.md)")
    option = group.add_argument
    option("--table_memory", choices=["device", "host"], help="default: as in the run")
    option("--table_folder", default="", help="whose files hold host tables; default: memory does")
    option(
        "--table_dtype", default="", choices=["int8"], help="of host tables; default: as trained"
    )


def table_options(options: argparse.Namespace) -> dict[str, str | None]:
    """Return what the options of `add_table_options` say, by name."""
    return {name: value for name, value in vars(options).items() if name.startswith("table_")}


def asked_mesh(options: argparse.Namespace) -> MeshConfig | None:
    """Return what the options of `add_mesh_options` say; None if none was given."""
    prefix = _MESH.removeprefix("--")
    given = {k.removeprefix(prefix): v for k, v in vars(options).items() if k.startswith(prefix)}
    return MeshConfig(**given) if given else None


def _build(cls: type, values: dict, prefix: str):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"Unknown key {prefix + key!r}.{hint}")
    arguments = {}
    for name, field in fields.items():
        if name not in values:
            raise ConfigError(f"Missing key {prefix + name!r}; start from base_config().")
        value = values[name]
        if dataclasses.is_dataclass(field.type):
            if not isinstance(value, dict):
                raise ConfigError(f"{prefix + name} is {value!r}; expected a group of fields.")
            arguments[name] = _build(field.type, value, f"{prefix}{name}.")
        else:
            arguments[name] = _typed(value, field.type, prefix + name)
    return cls(**arguments)


def _typed(value: object, expected: type, name: str):
    if expected is float and type(value) is int:
        return float(value)
    if expected is float and type(value) is float and not math.isfinite(value):
        raise ConfigError(f"{name} is {value}; expected a finite number.")
    if type(value) is not expected:
        raise ConfigError(
            f"{name} is {value!r} ({type(value).__name__}); expected {expected.__name__}."
        )
    return value
