# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Layouts of tables and shardings of parameters on a mesh, read off what they declare."""

import functools
import math
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding

from jtok_jax.config import Config, MeshConfig
from jtok_jax.errors import ConfigError
from jtok_jax.mesh import (
    COLUMNS,
    RULES,
    Rules,
    TableLayout,
    mesh_shape,
    num_shards,
    sharding,
    table_layout,
    table_rules,
)
from jtok_jax.model.operations import Operations
from jtok_jax.model.params import declared, declared_tables, operations
from jtok_jax.model_config import ModelConfig


def over_all(model: ModelConfig) -> MeshConfig:
    """Return a mesh of as many devices here as D allows, all of which split every parameter.

    Tables are split by columns where that leaves multiples of `COLUMNS`. Else they are split by
    rows if they can be, else by columns; each table as it can if they differ.
    """
    count = math.gcd(model.model_dim, jax.device_count())
    shapes = [table.shape for table in declared_tables(model).values()]
    fits = lambda multiple, axis: all(shape[axis] % multiple == 0 for shape in shapes)
    if not fits(count * COLUMNS, -1) and fits(count, -2):
        return MeshConfig(fsdp=count, table_columns="", table_rows="fsdp")
    return MeshConfig(fsdp=count, table_columns="fsdp" if fits(count, -1) else "fit")


def fitting(config: Config) -> MeshConfig:
    """Return the mesh of a run if it fits the devices here, else `over_all`."""
    try:
        mesh_shape(config.mesh, jax.device_count())
        return config.mesh
    except ConfigError:
        return over_all(config.model)


@functools.cache
def table_layouts(config: Config, mesh: Mesh) -> dict[str, TableLayout]:
    """Return the layout of every table by name.

    Raises:
        ConfigError: see `table_layout`; or mesh.table_experts is set and no layer has several.
    """
    tables = declared_tables(config.model)
    if config.mesh.table_experts and tables and all(len(t.shape) == 3 for t in tables.values()):
        raise ConfigError(
            f"mesh.table_experts is {config.mesh.table_experts!r}, but no layer has several "
            "tables to choose from; that is for JTok-M."
        )
    return {
        name: table_layout(config.mesh, mesh, name, table.shape) for name, table in tables.items()
    }


def rules_of(config: Config, mesh: Mesh, name: str) -> Rules:
    """Return the mesh axes of every axis letter of a parameter."""
    layouts = table_layouts(config, mesh)
    return table_rules(layouts[name]) if name in layouts else RULES


def parameter_sharding(
    config: Config, mesh: Mesh
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Return (name, shape) -> sharding of that parameter, or of an array of its first axes."""
    parameters = declared(config.model)

    def place(name: str, shape: tuple[int, ...]) -> NamedSharding:
        letters = parameters[name].axes[: len(shape)]
        return sharding(mesh, rules_of(config, mesh, name), letters, shape)

    return place


def entries_here(config: Config, mesh: Mesh, name: str, *, whole: str = "") -> int:
    """Return how many entries of a parameter a device has, if the axes `whole` are not split."""
    one, rules = declared(config.model)[name], rules_of(config, mesh, name)
    return math.prod(
        size // (1 if letter in whole else num_shards(mesh, rules.get(letter, ())))
        for letter, size in zip(one.axes, one.shape, strict=True)
    )


def table_operations(config: Config, mesh: Mesh) -> dict[str, Operations]:
    """Return the implementation of the operations on each device's part of every table."""
    return {
        name: operations(config.model, name, column_shards=num_shards(mesh, layout.columns))
        for name, layout in table_layouts(config, mesh).items()
    }


def describe(config: Config, mesh: Mesh) -> str:
    """Return a line for the start of a run: the mesh, and how the tables lie on it."""
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    layouts = table_layouts(config, mesh)
    if layouts and config.mesh.table_memory == "host":
        place = config.mesh.table_folder
        sizes += f"; tables in {f'files of {place}' if place else 'host memory'}"
    if not layouts or mesh.size == 1:
        return f"mesh: {sizes}"
    by_layout: dict[TableLayout, list[str]] = {}
    for name, layout in layouts.items():
        by_layout.setdefault(layout, []).append(name)
    lines = [f"{', '.join(names)}: {_place(mesh, layout)}" for layout, names in by_layout.items()]
    return f"mesh: {sizes}; {'; '.join(lines)}"


def _place(mesh: Mesh, layout: TableLayout) -> str:
    parts = [
        f"{what} over {' x '.join(axes)} ({num_shards(mesh, axes)})"
        for what, axes in layout._asdict().items()
        if axes
    ]
    copies = mesh.size // num_shards(mesh, layout.axes)
    return f"{', '.join(parts) or 'whole'}, {copies} of each"
