# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Shapes and places of the rows of one step, of tables in host memory; nothing is allocated.

A leaf is what a table's rows are, the scale of rows in int8, or what their optimizer keeps of them:

    by rows  [R, G, (M,) (D)]         as the store has it: one id is one run of memory
    stacked  [G, (M,) R or U (, D)]   as checkpoints, devices and the step have it

With mesh.table_streaming the rows of a step lie in the host memory of their devices.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jtok_kernels import RowOptimizer

from jtok_jax.config import Config
from jtok_jax.errors import ConfigError
from jtok_jax.mesh import replicated, split_batch
from jtok_jax.model import host_memory
from jtok_jax.model.params import Params, declared_tables, to_stored
from jtok_jax.model.placement import table_layouts
from jtok_jax.model.tables import ROWS, SomeRows
from jtok_jax.model_config import ModelConfig

SCALE = "scale"
Leaves = dict[str, dict[str, jax.Array]]  # by table and leaf; also shapes, arrays of NumPy, ...
Optimizers = Mapping[str, RowOptimizer]  # by table


def whole_leaves(model: ModelConfig, optimizers: Optimizers, *, int8: bool = False) -> Leaves:
    """Return the shapes of all leaves that have rows, stacked; scalars belong to the state.

    Args:
        optimizers: {} where nothing is trained.
        int8: rows are multiples of a float32 scale, one a row of a layer: -127 to 127 of them.
    """
    found = {}
    for name, table in declared_tables(model).items():
        whole = jax.ShapeDtypeStruct(table.shape, table.dtype)
        state = jax.eval_shape(optimizers[name].init, whole) if name in optimizers else {}
        rows = {leaf: one for leaf, one in state.items() if one.ndim}
        if int8:
            whole = whole.update(dtype=jnp.int8)
            rows[SCALE] = jax.ShapeDtypeStruct(table.shape[:-1], jnp.float32)
        found[name] = {ROWS: whole} | rows
    return found


def in_int8(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return the leaves of rows [..., D] in int8: the nearest of 255 steps, and their scale."""
    rows = np.asarray(rows, np.float32)
    scale = np.abs(rows).max(axis=-1) / 127
    steps = rows / np.where(scale > 0, scale, 1)[..., None]
    return {ROWS: np.rint(steps).astype(np.int8), SCALE: scale}


def saved_name(table: str, leaf: str) -> str:
    """Return what a leaf of a table is called in a checkpoint."""
    names = {ROWS: f"params/{table}", SCALE: f"params/{table}.{SCALE}"}
    return names.get(leaf, f"opt_state/{table}/{leaf}")


def require_trainable(config: Config) -> None:
    """Raise ConfigError where tables cannot be trained as configured, though tools read them."""
    mesh = config.mesh
    hosted = "tables in host memory" * (mesh.table_memory == "host")
    needing = hosted or "moments of another run" * config.init_moments
    for owner in config.model.table_owners if needing else ():
        if config.optimizer.tables.of(owner).kind == "adamw":
            raise ConfigError(
                f"optimizer.tables.kind of {owner} is adamw, whose rows have no clocks of their "
                f"own; {needing} need lazy_adam, rowwise_adam or rowwise_adagrad."
            )
    if mesh.table_dtype:
        raise ConfigError(
            f"mesh.table_dtype is {mesh.table_dtype}; tables are trained in "
            "model.jtok.table_dtype, and stored in int8 for tools that read them."
        )


def stacked_shardings(config: Config, mesh: Mesh, leaves: Leaves) -> Leaves:
    """Return the NamedSharding of every leaf of `leaves`, stacked: all rows on every device."""
    found = {}
    for name, layout in table_layouts(config, mesh).items():
        axes = leaves[name][ROWS].ndim
        spec = *(None, layout.experts or None)[: axes - 2], None, layout.columns or None
        found[name] = {
            leaf: NamedSharding(mesh, P(*spec[: x.ndim])) for leaf, x in leaves[name].items()
        }
    return found


def shape_by_rows(stacked: jax.ShapeDtypeStruct, axis: int) -> tuple[int, ...]:
    """Return the shape of a leaf in the other form; `axis` is that of rows."""
    shape = stacked.shape
    return (shape[axis], *shape[:axis], *shape[axis + 1 :])


def step_shardings(config: Config, mesh: Mesh, leaves: Leaves) -> Leaves:
    """Return the NamedSharding of every leaf of the rows of a step.

    Of rows that are streamed what is one number a row stays on the device.
    """
    shardings = stacked_shardings(config, mesh, leaves)
    if not config.mesh.table_streaming:
        return shardings
    in_host_memory = lambda x: x.with_memory_kind(host_memory.KIND)
    return {
        name: {
            leaf: in_host_memory(x) if leaves[name][leaf].ndim == leaves[name][ROWS].ndim else x
            for leaf, x in one.items()
        }
        for name, one in shardings.items()
    }


def abstract_rows(config: Config, mesh: Mesh, optimizers: Optimizers) -> SomeRows:
    """Return shapes, dtypes and shardings of the rows of a training step."""
    place, tables = jax.ShapeDtypeStruct, declared_tables(config.model)
    streams = {name: config.model.id_streams[name] for name in {t.stream for t in tables.values()}}
    room = {name: config.unique_rows(name) for name in streams}
    whole = whole_leaves(config.model, optimizers)
    shardings, leaves = step_shardings(config, mesh, whole), {}
    for name, one in whole.items():
        axis, rows = one[ROWS].ndim - 2, room[tables[name].stream]
        leaves[name] = {}
        for leaf, x in one.items():
            shape = *x.shape[:axis], rows, *x.shape[axis + 1 :]
            leaves[name][leaf] = place(shape, x.dtype, sharding=shardings[name][leaf])
    shape, everywhere = (config.train.batch_size, config.train.seq_len), replicated(mesh)
    return SomeRows(
        places={
            name: place(
                (*shape, *(one.heads,) * (one.heads > 1)), np.int32, sharding=split_batch(mesh)
            )
            for name, one in streams.items()
        },
        ids={name: place((size,), np.int32, sharding=everywhere) for name, size in room.items()},
        leaves=leaves,
    )


def with_rows(
    config: ModelConfig, params: Params, some: SomeRows | None
) -> tuple[Params, dict[str, jax.Array] | None]:
    """Return parameters with the rows of a batch for tables, and their `places`; traced.

    some: None where `params` has the tables.
    """
    if some is None:
        return params, None
    tables, declared = {}, declared_tables(config)
    for name, leaves in some.leaves.items():
        rows = leaves[ROWS]
        if SCALE in leaves:
            rows = (rows * leaves[SCALE][..., None]).astype(declared[name].dtype)
        tables[name] = rows
    on_host = any(map(host_memory.is_on_host, jax.tree.leaves(some.leaves)))
    return params | (tables if on_host else to_stored(config, tables)), some.places


def words(array: np.ndarray) -> np.ndarray:
    """Return bfloat16 as words, which NumPy copies faster than a type of another library."""
    return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array


def bytes_of(leaves: Leaves) -> int:
    """Return the bytes of whole leaves, or of their parts on one device where shapes say them."""
    here = lambda x: x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return sum(math.prod(here(x)) * x.dtype.itemsize for x in jax.tree.leaves(leaves))
