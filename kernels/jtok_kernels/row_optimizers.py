# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Optimizers of tables from gradients per unique row: only the rows of a step are read or written.

`adamw` is the dense reference. The others are row-sparse: a row whose gradient is exactly zero is
not touched, neither are its moments. All share one interface, `RowOptimizer`, and are applied by
`update_rows`. g is the gradient of a row, t the step, t0 the step that last touched the row.

State is a dict of arrays by name: of the table's shape (float32), or one number a row, or a scalar.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtok_kernels.packing import as_float, pack_rows, width

State = dict[str, jax.Array]


class Now(NamedTuple):
    """Scalars of one update."""

    step: jax.Array  # int32, counted from 1, steps that changed something
    learning_rate: jax.Array
    log_decay: jax.Array  # float32 sum over all steps of log(1 - learning_rate * weight_decay)


class RowOptimizer(NamedTuple):
    """The interface; made by the functions below, applied by `update_rows`."""

    init: Callable[[jax.Array], State]  # table -> state
    update: Callable[[jax.Array, State, jax.Array, Now], tuple[jax.Array, State]]  # some rows
    weight_decay: float
    dense: bool  # every row is touched in every step


def adamw(*, b1: float, b2: float, eps: float, weight_decay: float) -> RowOptimizer:
    """AdamW (arXiv 1711.05101) over all rows, 8 bytes of state an entry: the dense reference.

    A row goes on moving by its momentum, and decays, in steps that do not use it.
    """
    _check(b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)

    def init(table):
        return {"m": _per_entry(table), "v": _per_entry(table)}

    def update(rows, state, grads, now):
        t = now.step.astype(jnp.float32)
        m = b1 * state["m"] + (1 - b1) * grads
        v = b2 * state["v"] + (1 - b2) * jnp.square(grads)
        direction = (m / (1 - b1**t)) / (jnp.sqrt(v / (1 - b2**t)) + eps)
        rows = rows - now.learning_rate * (direction + weight_decay * rows)
        return rows, {"m": m, "v": v}

    return RowOptimizer(init, update, weight_decay, dense=True)


def lazy_adam(*, b1: float, b2: float, eps: float, weight_decay: float) -> RowOptimizer:
    """Adam on the rows a step touches, 8 bytes of state an entry and 12 a row (16 with decay).

    m and v decay by b^(t - t0), as AdamW's would have done with g = 0 meanwhile, and are divided
    by the weight they have gathered on the row's own clock; weight decay is caught up by the
    product over the steps between, from a float32 sum of its logarithms. Equal to `adamw` for a row
    touched in every step. For others:
      - AdamW divides by 1 - b^t of the whole run: a row that is rarely used moves by less in the
        step that uses it (0.45 learning rates at b1 0.9, b2 0.95), and then on by momentum; here
        it moves by one learning rate, once
      - between uses a row in the table has not decayed yet
    """
    _check(b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)

    def init(table):
        state = {"m": _per_entry(table), "v": _per_entry(table)}
        return state | _clock(table) | _decay(table, weight_decay)

    def update(rows, state, grads, now):
        keep = _kept_since_touch(state, now, b1, b2)
        m, m_weight = _mean(state["m"], state["m_weight"], grads, b1, keep[0])
        v, v_weight = _mean(state["v"], state["v_weight"], jnp.square(grads), b2, keep[1])
        direction = (m / m_weight[..., None]) / (jnp.sqrt(v / v_weight[..., None]) + eps)
        rows, decay = _decayed(rows, state, now)
        clock = {"m_weight": m_weight, "v_weight": v_weight, "touched": _now(m_weight, now)}
        return rows - now.learning_rate * direction, {"m": m, "v": v} | clock | decay

    return RowOptimizer(init, update, weight_decay, dense=False)


def rowwise_adam(*, b1: float, b2: float, eps: float, weight_decay: float) -> RowOptimizer:
    """`lazy_adam` with one second moment a row, the mean of g^2: 4 bytes an entry, 16 (20) a row.

    Differs from it in that all entries of a row share one step size.
    """
    _check(b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)

    def init(table):
        state = {"m": _per_entry(table), "v": _per_row(table)}
        return state | _clock(table) | _decay(table, weight_decay)

    def update(rows, state, grads, now):
        keep = _kept_since_touch(state, now, b1, b2)
        m, m_weight = _mean(state["m"], state["m_weight"], grads, b1, keep[0])
        square = jnp.mean(jnp.square(grads), axis=-1)
        v, v_weight = _mean(state["v"], state["v_weight"], square, b2, keep[1])
        direction = m / (m_weight * (jnp.sqrt(v / v_weight) + eps))[..., None]
        rows, decay = _decayed(rows, state, now)
        clock = {"m_weight": m_weight, "v_weight": v_weight, "touched": _now(m_weight, now)}
        return rows - now.learning_rate * direction, {"m": m, "v": v} | clock | decay

    return RowOptimizer(init, update, weight_decay, dense=False)


def rowwise_adagrad(*, eps: float, weight_decay: float) -> RowOptimizer:
    """Adagrad with one accumulator a row, the sum of the means of g^2: 4 bytes a row (8).

    Differs from `adamw`: no momentum, and steps shrink with every use of the row.
    """
    _check(eps=eps, weight_decay=weight_decay)

    def init(table):
        return {"sum": _per_row(table)} | _decay(table, weight_decay)

    def update(rows, state, grads, now):
        total = state["sum"] + jnp.mean(jnp.square(grads), axis=-1)
        direction = grads / (jnp.sqrt(total) + eps)[..., None]
        rows, decay = _decayed(rows, state, now)
        return rows - now.learning_rate * direction, {"sum": total} | decay

    return RowOptimizer(init, update, weight_decay, dense=False)


def update_rows(
    optimizer: RowOptimizer,
    table: jax.Array,
    state: State,
    unique_U: jax.Array,
    row_grads: jax.Array,
    *,
    step: jax.Array,
    learning_rate: jax.Array,
    apply: jax.Array | bool = True,
    rounding_key: jax.Array | None = None,
) -> tuple[jax.Array, State]:
    """`table` and `state` after one step; in place where both are donated.

    Layers of a stack are updated in turn: temporaries are those of one layer's rows.

    Args:
        table: [V, D], [E, V, D] or [L, E, V, D]; bfloat16, float32 or packed by `pack_rows`.
        state: of `optimizer.init(table)`.
        unique_U: int32, ids of the rows, each once, ascending; V or more where there is none.
        row_grads: float32 [..., U, D], leading axes as the table's.
        step: int32, number of this update, from 1.
        apply: False leaves everything as it was.
        rounding_key: rounds a bfloat16 table up or down at random, right on average; None rounds
            to the nearest, where a change below 1/512 of an entry is lost. float32: no effect.
    """
    total = jnp.float32(0)
    if "log_decay" in state:
        total = state["log_decay"] + jnp.log1p(-learning_rate * optimizer.weight_decay)
    now = Now(step, learning_rate, total)
    if optimizer.dense:
        return _update_all(optimizer, table, state, unique_U, row_grads, now, apply, rounding_key)
    scalars = {}
    if "log_decay" in state:
        scalars = {"log_decay": jnp.where(apply, total, state["log_decay"])}
    arrays = {name: value for name, value in state.items() if name not in scalars}
    # Places without a row, and all where nothing is applied, get distinct rows outside the table.
    outside = table.shape[-2] + jnp.arange(unique_U.size, dtype=jnp.int32)
    target_U = jnp.where(apply & (unique_U < table.shape[-2]), unique_U, outside)

    def layer(index, carry):
        table, arrays = carry
        experts = (jnp.arange(table.shape[1])[:, None],) if table.ndim == 4 else ()
        lead = () if table.ndim == 2 else (index, *experts)
        grads = row_grads if table.ndim == 2 else row_grads[index]
        rows, old = jax.tree.map(lambda value: _get(value, lead, target_U), (table, arrays))
        new_rows, new = optimizer.update(as_float(rows), old, grads, now)
        used = jnp.any(grads != 0, axis=-1)
        key = None if rounding_key is None else jax.random.fold_in(rounding_key, index)
        table = _set(table, lead, target_U, used, rows, _round(new_rows, table.dtype, key))
        arrays = {
            name: _set(value, lead, target_U, used, old[name], new[name])
            for name, value in arrays.items()
        }
        return table, arrays

    layers = 1 if table.ndim == 2 else table.shape[0]
    table, arrays = jax.lax.fori_loop(0, layers, layer, (table, arrays))
    return table, arrays | scalars


def dense_gradient(row_grads: jax.Array, unique_U: jax.Array, *, num_rows: int) -> jax.Array:
    """Gradient [..., V, D] of the tables, float32, zero but for the rows of `unique_U`."""
    shape = (*row_grads.shape[:-2], num_rows, row_grads.shape[-1])
    # Written along the row axis: through one flat row index XLA takes 8 tables more (LOG.md).
    return jnp.zeros(shape, jnp.float32).at[..., unique_U, :].set(row_grads, mode="drop")


def _update_all(optimizer, table, state, unique_U, row_grads, now, apply, rounding_key):
    grads = dense_gradient(row_grads, unique_U, num_rows=table.shape[-2])
    rows, new = optimizer.update(as_float(table), state, grads, now)
    keep = lambda new, old: jnp.where(apply, new, old)
    rows = _round(rows, table.dtype, rounding_key)
    return keep(rows, table), jax.tree.map(keep, new, state)


def _get(array, lead, target_U):
    return array.at[(*lead, target_U)].get(mode="clip")


def _set(array, lead, target_U, used, old, new):
    new = jnp.where(used[..., None] if new.ndim > used.ndim else used, new, old)
    return array.at[(*lead, target_U)].set(
        new, mode="drop", unique_indices=True, indices_are_sorted=True
    )


def _round(x: jax.Array, dtype: jnp.dtype, key: jax.Array | None) -> jax.Array:
    """float32 to `dtype`; with a key stochastically: up with the probability of what is cut off."""
    if dtype == jnp.uint32:
        return pack_rows(_round(x, jnp.bfloat16, key))
    if dtype != jnp.bfloat16 or key is None:
        return x.astype(dtype)
    low = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    raised = jax.lax.bitcast_convert_type((bits + low) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), raised, x).astype(dtype)


def _check(*, eps: float, weight_decay: float, **betas: float) -> None:
    for name, value in betas.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; expected at least 0 and less than 1.")
    if not eps > 0 or not weight_decay >= 0:
        raise ValueError(f"eps {eps}, weight_decay {weight_decay}: expected > 0 and >= 0.")


def _per_entry(table):
    return jnp.zeros((*table.shape[:-1], width(table)), jnp.float32)


def _per_row(table):
    return jnp.zeros(table.shape[:-1], jnp.float32)


def _clock(table):
    touched = jnp.zeros(table.shape[:-1], jnp.int32)
    return {"m_weight": _per_row(table), "v_weight": _per_row(table), "touched": touched}


def _now(like, now: Now):
    return jnp.broadcast_to(now.step, like.shape)


def _decay(table, weight_decay: float) -> State:
    return {"decayed": _per_row(table), "log_decay": jnp.float32(0)} if weight_decay else {}


def _decayed(rows, state, now: Now):
    """Rows after all decay up to now, and the state that says so."""
    if "decayed" not in state:
        return rows, {}
    factor = jnp.exp(now.log_decay - state["decayed"])
    return rows * factor[..., None], {"decayed": jnp.broadcast_to(now.log_decay, factor.shape)}


def _kept_since_touch(state, now: Now, b1: float, b2: float):
    gap = (now.step - state["touched"]).astype(jnp.float32)
    return b1**gap, b2**gap


def _mean(average, weight, value, b: float, keep):
    """An exponential average of `value` and the sum of its weights, after `keep` of decay."""
    along = keep if average.ndim == keep.ndim else keep[..., None]
    return along * average + (1 - b) * value, keep * weight + (1 - b)
