# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The tables' part of a training step: plans, row gradients, updates; the same for every table."""

import functools
import math
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jtok_kernels import RowPlan, row_plan, update_rows
from jtok_kernels.rounding import key_of_part

from jtok_jax.config import Config
from jtok_jax.mesh import num_shards
from jtok_jax.model import host_memory
from jtok_jax.model.exchange import Exchange
from jtok_jax.model.ngram_index import indices_of
from jtok_jax.model.params import Declared, Params, declared_tables, operations
from jtok_jax.model.placement import table_layouts, table_operations
from jtok_jax.model.tables import plan_key, stream_ids
from jtok_jax.model.transformer import Parallel
from jtok_jax.training.optimizer import Optimizer


def rows_on_device(config: Config, name: str) -> int:
    """Return how many rows of a table a training step has: all, or room for those of the batch."""
    table = declared_tables(config.model)[name]
    if config.mesh.table_memory == "host":
        return config.unique_rows(table.stream)
    return table.shape[-2]


def parallel_reads(config: Config, mesh: Mesh) -> Parallel | None:
    """Return how a step reads its tables on several devices; None on one."""
    if mesh.size == 1:
        return None
    dtype, chosen = config.model.compute_dtype, table_operations(config, mesh)
    layouts = table_layouts(config, mesh)
    exchanges = {}
    for name, table in declared_tables(config.model).items():
        shape = *table.shape[:-2], rows_on_device(config, name), table.shape[-1]
        exchanges[name] = Exchange(mesh, layouts[name], shape, dtype, chosen[name].name)
    return Parallel(exchanges, mesh)


def _exchange(parallel: Parallel | None, name: str) -> Exchange | None:
    """Return how a table is read on several devices; None on one."""
    return parallel.exchanges.get(name) if parallel else None


def make_plans(
    config: Config,
    params: Params,
    ids_NBT: jax.Array,
    parallel: Parallel | None,
    places: dict[str, jax.Array] | None = None,
) -> dict[str, RowPlan]:
    """Return one plan for all microbatches of a step, for each stream, see `plan_key`.

    Args:
        params: which have the indices of frequent n-grams.
        places: of `SomeRows`, [N, B, T] as `ids_NBT`, where the tables are the rows of the step.
    """
    plans, count, indices = {}, ids_NBT.shape[0], indices_of(params)
    for name, table in declared_tables(config.model).items():
        exchange = _exchange(parallel, name)
        key = plan_key(table.stream, exchange)
        if key in plans:
            continue
        if places:
            ids = places[table.stream]
        else:
            stream = config.model.id_streams[table.stream]
            ids_RT, index = ids_NBT.reshape(-1, ids_NBT.shape[-1]), indices.get(stream.name)
            ids = stream_ids(stream, ids_RT, index=index)
            ids = ids.reshape(*ids_NBT.shape, *ids.shape[2:])
        room, num_rows = config.unique_rows(table.stream), rows_on_device(config, name)
        if exchange:
            plans[key] = exchange.plan(ids, max_unique=room)
        else:
            plans[key] = row_plan(ids.reshape(count, -1), num_rows=num_rows, max_unique=room)
    return plans


def unique_tokens(plans: dict[str, RowPlan]) -> jax.Array | None:
    """Return how many different tokens a step has; None if no table is looked up by token."""
    found = [plan.found.sum() for key, plan in plans.items() if key.partition(":")[0] == "token"]
    return found[0] if found else None


def zero_row_grads(
    config: Config, plans: dict[str, RowPlan], parallel: Parallel | None
) -> dict[str, jax.Array]:
    """Return float32 zeros by table, [L, (M,) U, D]: one for every layer, or [1, U, D].

    Of tables that are streamed they are in host memory, and so will be their cotangents.
    """
    found = {}
    for name, table in declared_tables(config.model).items():
        exchange = _exchange(parallel, name)
        plan = plans[plan_key(table.stream, exchange)]
        layers, *shape = *table.grads_shape, plan.unique_U.size, table.shape[-1]

        def zeros(layers, exchange=exchange, shape=shape):
            found = jnp.zeros((layers, *shape), jnp.float32)
            return exchange.place_row_grads(found) if exchange else found

        streamed = config.mesh.table_streaming
        found[name] = host_memory.stack_of(zeros, layers) if streamed else zeros(layers)
    return found


def of_stack(table: Declared, row_grads: jax.Array) -> jax.Array:
    """Return row gradients of a stack, [G, ...], from those of the layers, [L, ...]."""
    stacked = table.shape[0]
    shared = len(table.layers) > 1 and stacked == 1  # by all layers; those without hold zeros
    carrying = np.array([layer for layer, index in enumerate(table.layers) if index >= 0], int)
    if not shared and len(carrying) == len(table.layers):
        return row_grads
    if not host_memory.is_on_host(row_grads):
        return row_grads.sum(axis=0, keepdims=True) if shared else row_grads[carrying]
    if not shared:
        keep = lambda carry, index, layer: (carry, host_memory.to_host(layer))
        return host_memory.map_layers(keep, None, row_grads, at=carrying)[1]
    add = lambda total, index, layer: (total + layer, None)
    total, _ = host_memory.map_layers(add, jnp.zeros(row_grads.shape[1:]), row_grads)
    return host_memory.to_host(total[None])


def norm(backbone_grads: Params, row_grads: Params) -> jax.Array:
    """Return the L2 norm of all gradients; those in host memory are summed layer by layer."""
    here, squares = {}, 0.0
    for name, grad in row_grads.items():
        if host_memory.is_on_host(grad):
            add = lambda total, index, layer: (total + jnp.square(layer).sum(), None)
            squares += host_memory.map_layers(add, jnp.float32(0), grad)[0]
        else:
            here[name] = grad
    found = optax.tree.norm((backbone_grads, here))
    return found if len(here) == len(row_grads) else jnp.sqrt(jnp.square(found) + squares)


def update_tables(
    config: Config,
    optimizer: Optimizer,
    params: Params,
    states: dict[str, object],
    row_grads: dict[str, jax.Array],
    plans: dict[str, RowPlan],
    parallel: Parallel | None,
    *,
    rounding_key: jax.Array,
    rounding_ids: dict[str, jax.Array] | None,
    learning_rate: jax.Array,
    **scalars,
) -> tuple[Params, dict[str, object]]:
    """Return tables and states of their optimizer after a step, both by table.

    Args:
        rounding_ids: by stream, see `update_rows`; None: the plan's.
        learning_rate: of the backbone; every table has its multiplier.
        scalars: step, grad_scale and apply of `update_rows`.
    """
    new_params, new_states = {}, {}
    for name, grads in row_grads.items():
        table = declared_tables(config.model)[name]
        options, exchange = config.optimizer.tables.of(table.owner), _exchange(parallel, name)
        streamed = host_memory.is_on_host(params[name])
        if exchange:
            update = exchange.update
        else:  # kernels of TPUs want packed tables, and nothing is packed in host memory
            chosen = "xla" if streamed else operations(config.model, name).name
            update = functools.partial(update_rows, implementation=chosen)
        if streamed:
            update = functools.partial(_update_layers, update)
        unique_U = plans[plan_key(table.stream, exchange)].unique_U
        key = None
        if options.stochastic_rounding:  # tables must not round alike
            key = jax.random.fold_in(rounding_key, zlib.crc32(name.encode()))
        new_params[name], new_states[name] = update(
            optimizer.rows[name], params[name], states[name], unique_U, grads, rounding_key=key,
            rounding_ids_U=rounding_ids and rounding_ids[table.stream],
            learning_rate=learning_rate * options.learning_rate_multiplier, **scalars,
        )  # fmt: skip
    return new_params, new_states


def _update_layers(
    update: Callable, optimizer, tables, state, unique_U, row_grads, *, rounding_key, **options
):
    """Return the result of `update` on a stack in host memory, layer after layer."""
    stacks = {name: x for name, x in state.items() if x.ndim}
    scalars = {name: x for name, x in state.items() if not x.ndim}
    of_layer = math.prod(tables.shape[1:-2])

    def layer(_, index, table, arrays, grads):
        key = rounding_key
        if key is not None:
            key = key_of_part(key, index * of_layer)
        table, new = update(
            optimizer, table, arrays | scalars, unique_U, grads, rounding_key=key, **options
        )
        moved = {name: host_memory.to_place_of(new[name], x) for name, x in stacks.items()}
        return {name: new[name] for name in scalars}, (host_memory.to_host(table), moved)

    scalars, (tables, stacks) = host_memory.map_layers(layer, scalars, tables, stacks, row_grads)
    return tables, stacks | scalars


def row_gradient_bytes(config: Config, mesh: Mesh, name: str) -> int:
    """Return bytes of a table's row gradients on one device: float32 [L, M, U, columns]."""
    table, layout = declared_tables(config.model)[name], table_layouts(config, mesh)[name]
    *_, rows, dim = table.shape
    here = rows // num_shards(mesh, layout.rows)
    # Rows of other devices count as the first or the last one here.
    unique = min(config.unique_rows(table.stream) + 2 * bool(layout.rows), here)
    tables = math.prod(table.grads_shape) // num_shards(mesh, layout.experts)
    return 4 * tables * unique * dim // num_shards(mesh, layout.columns)
