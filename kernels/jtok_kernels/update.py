# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Applying a `RowOptimizer` to the rows of a step, in place; rounding of bfloat16 tables.

Bytes at best, with `lazy_adam` on a bfloat16 table: 24 D for a row that is touched. That is 4 D
read of the gradient, and 2 D of the row and 8 D of the moments read and written. Of a row that is
not touched its gradient alone is read, 4 D.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtok_kernels.choose import backend, choose
from jtok_kernels.mosaic_gpu_update import update_kernel
from jtok_kernels.packing import as_float, pack_rows, width
from jtok_kernels.rounding import Seed, round_at_random, row_seeds
from jtok_kernels.row_optimizers import RowGrads, RowOptimizer, Scalars, State, mean_of_row


class Shard(NamedTuple):
    """Inside `shard_map`: the mesh axes that split the tables, of which this device has a part."""

    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()


def update_rows(
    optimizer: RowOptimizer,
    table: jax.Array,
    state: State,
    unique_U: jax.Array,
    row_grads: jax.Array,
    *,
    step: jax.Array,
    learning_rate: jax.Array,
    grad_scale: jax.Array | float = 1.0,
    apply: jax.Array | bool = True,
    rounding_key: jax.Array | None = None,
    rounding_ids_U: jax.Array | None = None,
    shard: Shard | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, State]:
    """Return `table` and `state` after one step; in place where both are donated.

    Args:
        table: [V, D], [E, V, D] or [L, E, V, D]; bfloat16, float32 or packed by `pack_rows`.
        state: of `optimizer.init(table)`.
        unique_U: int32 [U], ids of the rows, each once, ascending, none negative; V or more where
            there is none. As `row_plan` makes it; not checked.
        row_grads: float32 [..., U, D], leading axes as the table's.
        step: int32, number of this update, from 1.
        grad_scale: float32, multiplies every gradient, as clipping does.
        apply: False leaves everything as it was.
        rounding_key: rounds a bfloat16 table up or down at random, right on average; None rounds
            to the nearest, where a change below 1/512 of an entry is lost. float32: no effect.
        rounding_ids_U: int32 [U], ids that random rounding depends on, where the table holds some
            rows of a larger one; None: `unique_U`.
        shard: for a part of the tables, as everything above is then: ids count from its first row.
            What is one number a row is the same on all devices that share its columns.
        implementation: one of `IMPLEMENTATIONS`; None chooses by platform. A dense optimizer, a
            shard, and TPUs, use XLA.

    Raises:
        ValueError: shapes or dtypes do not fit, or the implementation cannot run here.
    """
    _check(optimizer, table, state, unique_U, row_grads)
    chosen = choose(implementation, dim=width(table), dtype=table.dtype).name
    total, counters = jnp.float32(0), {}
    if "log_decay" in state:
        total, lost = _add(state, jnp.log1p(-jnp.float32(learning_rate) * optimizer.weight_decay))
        new = {"log_decay": total, "log_decay_lost": lost}
        counters = {name: jnp.where(apply, value, state[name]) for name, value in new.items()}
    scalars = Scalars(jnp.int32(step), jnp.float32(learning_rate), total)
    seed = None if rounding_key is None else jax.random.key_data(rounding_key).reshape(-1)[:2]
    of = RowGrads(unique_U, row_grads, jnp.float32(grad_scale), apply, rounding_ids_U)
    rounding = _rounding(table, seed, shard or Shard())
    if optimizer.dense:
        return _update_all(optimizer, table, state, of, scalars, rounding)
    arrays = {name: value for name, value in state.items() if name not in counters}
    if chosen.startswith("mosaic_gpu") and shard is None:
        gpu = backend(chosen)
        table, arrays = update_kernel(gpu, optimizer, table, arrays, of, scalars, seed)
    else:
        columns = shard.columns if shard else ()
        table, arrays = _update_touched(optimizer, table, arrays, of, scalars, rounding, columns)
    return table, arrays | counters


def _add(state: State, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return log_decay with `value` added, and what that sum lost to rounding (Kahan)."""
    value = value - state["log_decay_lost"]
    total = state["log_decay"] + value
    return total, (total - state["log_decay"]) - value


def _check(optimizer: RowOptimizer, table, state: State, unique_U, row_grads) -> None:
    if table.dtype not in (jnp.bfloat16, jnp.float32, jnp.uint32) or table.ndim not in (2, 3, 4):
        raise ValueError(
            f"table is {table.dtype} {table.shape}; expected bfloat16, float32 or packed, [V, D], "
            "[E, V, D] or [L, E, V, D]."
        )
    if unique_U.ndim != 1 or unique_U.dtype != jnp.int32:
        raise ValueError(f"unique_U is {unique_U.dtype} {unique_U.shape}; expected int32 [U].")
    expected = (*table.shape[:-2], unique_U.size, width(table))
    if row_grads.shape != expected or row_grads.dtype != jnp.float32:
        raise ValueError(
            f"row_grads is {row_grads.dtype} {row_grads.shape}; expected float32 {expected}."
        )
    fits = jax.tree.map(lambda x: (x.shape, x.dtype), dict(state))
    wanted = jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(optimizer.init, table))
    if fits != wanted:
        raise ValueError(f"state is {fits}; expected that of optimizer.init(table): {wanted}.")


def dense_gradient(row_grads: jax.Array, unique_U: jax.Array, *, num_rows: int) -> jax.Array:
    """Return gradient [..., V, D] of the tables, float32, zero but for the rows of `unique_U`."""
    shape = (*row_grads.shape[:-2], num_rows, row_grads.shape[-1])
    # Written along the row axis: through one flat row index XLA takes 8 tables more (LOG.md).
    return jnp.zeros(shape, jnp.float32).at[..., unique_U, :].set(row_grads, mode="drop")


Rounding = Callable[..., jax.Array]  # (float32 rows, number of the table, ids) -> as stored


def _update_all(optimizer, table, state, of: RowGrads, scalars: Scalars, rounding: Rounding):
    grads = of.grad_scale * dense_gradient(of.grads, of.unique_U, num_rows=table.shape[-2])
    rows, new = optimizer.update(as_float(table), state, grads, scalars)
    number = jnp.arange(rows.size // rows.shape[-1] // rows.shape[-2])
    number = number.reshape(rows.shape[:-2])[..., None]
    rows = rounding(rows, number, jnp.arange(rows.shape[-2]))
    keep = lambda new, old: jnp.where(of.apply, new, old)
    return keep(rows, table), jax.tree.map(keep, new, state)


def _update_touched(
    optimizer,
    table,
    arrays,
    of: RowGrads,
    scalars: Scalars,
    rounding: Rounding,
    columns: tuple[str, ...],
):
    """Update in plain XLA, layers of a stack in turn: temporaries are those of one layer's rows."""
    mean, anywhere = mean_of_row, lambda used: used
    if columns:
        mean = lambda values: jax.lax.pmean(mean_of_row(values), columns)
        anywhere = lambda used: jax.lax.pmax(used.astype(jnp.int32), columns) > 0
    # Places without a row, and all where nothing is applied, get distinct rows outside the table.
    outside = table.shape[-2] + jnp.arange(of.unique_U.size, dtype=jnp.int32)
    target_U = jnp.where(of.apply & (of.unique_U < table.shape[-2]), of.unique_U, outside)

    def layer(index, carry):
        table, arrays = carry
        lead, number = (), index
        if table.ndim == 4:
            experts = jnp.arange(table.shape[1])[:, None]
            lead, number = (index, experts), index * table.shape[1] + experts
        elif table.ndim == 3:
            lead = (index,)
        grads = of.grads if table.ndim == 2 else of.grads[index]
        rows, old = jax.tree.map(lambda value: _get(value, lead, target_U), (table, arrays))
        # Else XLA may read old rows again for a later scatter, from a copy of the whole table.
        rows, old = jax.lax.optimization_barrier((rows, old))
        new_rows, new = optimizer.update(as_float(rows), old, of.grad_scale * grads, scalars, mean)
        ids_U = target_U if of.rounding_ids_U is None else of.rounding_ids_U
        new_rows = rounding(new_rows, number, ids_U)
        used = anywhere(jnp.any(grads != 0, axis=-1))
        table = _set(table, lead, target_U, used, rows, new_rows)
        arrays = {
            name: _set(value, lead, target_U, used, old[name], new[name])
            for name, value in arrays.items()
        }
        return table, arrays

    layers = 1 if table.ndim == 2 else table.shape[0]
    return jax.lax.fori_loop(0, layers, layer, (table, arrays))


def _get(array, lead, target_U):
    return array.at[(*lead, target_U)].get(mode="clip")


def _set(array, lead, target_U, used, old, new):
    new = jnp.where(used[..., None] if new.ndim > used.ndim else used, new, old)
    return array.at[(*lead, target_U)].set(
        new, mode="drop", unique_indices=True, indices_are_sorted=True
    )


def _rounding(table, seed: Seed | None, shard: Shard) -> Rounding:
    """Return float32 rows as the table holds them; at random alike however tables are split."""
    if table.dtype == jnp.float32:
        return lambda rows, number, ids: rows
    stored = pack_rows if table.dtype == jnp.uint32 else lambda rows: rows
    if seed is None:
        return lambda rows, number, ids: stored(rows.astype(jnp.bfloat16))
    first = lambda axes, size: jax.lax.axis_index(axes) * size if axes else 0
    here = table.shape[-3] if table.ndim > 2 else 1
    first_row, first_table = first(shard.rows, table.shape[-2]), first(shard.experts, here)
    everywhere = here * math.prod(jax.lax.axis_size(axis) for axis in shard.experts)
    dim = width(table)
    entries = jnp.arange(dim, dtype=jnp.uint32) + jnp.uint32(first(shard.columns, dim))

    def at_random(rows, number, ids):
        number = number // here * everywhere + first_table + number % here
        row_seed = row_seeds(seed, number, first_row + ids)[..., None]
        return stored(round_at_random(rows, row_seed, entries))

    return at_random
