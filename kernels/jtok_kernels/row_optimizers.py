# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Optimizers of the rows of tables: what one step makes of a row, its state and its gradient.

`adamw` is the dense reference. The others are row-sparse: a row whose gradient is exactly zero is
not touched, neither are its moments. All share one interface, `RowOptimizer`, and are applied by
`update_rows`. g is the gradient of a row, t the step, t0 the step that last touched the row.

State is a dict of arrays by name: of the table's shape (float32), or one number a row, or a scalar.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtok_kernels.packing import width

State = dict[str, jax.Array]


class Scalars(NamedTuple):
    """Scalars of one update."""

    step: jax.Array  # int32, counted from 1, steps that changed something
    learning_rate: jax.Array
    log_decay: jax.Array  # float32 sum over all steps of log(1 - learning_rate * weight_decay)


class RowGrads(NamedTuple):
    """Gradients of the rows of a step; see `update_rows`."""

    unique_U: jax.Array
    grads: jax.Array  # [..., U, D]
    grad_scale: jax.Array  # float32
    apply: jax.Array | bool
    rounding_ids_U: jax.Array | None = None


def mean_of_row(values: jax.Array) -> jax.Array:
    """Return the mean of each row; another function where a row lies on several devices."""
    return jnp.mean(values, axis=-1)


class RowOptimizer(NamedTuple):
    """The interface; made by the functions below, applied by `update_rows`."""

    init: Callable[[jax.Array], State]  # table -> state
    update: Callable[
        ..., tuple[jax.Array, State]
    ]  # (rows, state, grads, scalars, mean) -> new ones
    weight_decay: float
    dense: bool  # every row is touched in every step


def adamw(*, b1: float, b2: float, eps: float, weight_decay: float) -> RowOptimizer:
    """Return AdamW (arXiv 1711.05101) over all rows, 8 bytes of state an entry: the reference.

    A row goes on moving by its momentum, and decays, in steps that do not use it.
    """
    _check(b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)

    def init(table):
        return {"m": _per_entry(table), "v": _per_entry(table)}

    def update(rows, state, grads, scalars, mean=mean_of_row):
        t = scalars.step.astype(jnp.float32)
        m = b1 * state["m"] + (1 - b1) * grads
        v = b2 * state["v"] + (1 - b2) * jnp.square(grads)
        direction = (m / (1 - b1**t)) / (jnp.sqrt(v / (1 - b2**t)) + eps)
        rows = rows - scalars.learning_rate * (direction + weight_decay * rows)
        return rows, {"m": m, "v": v}

    return RowOptimizer(init, update, weight_decay, dense=True)


def lazy_adam(*, b1: float, b2: float, eps: float, weight_decay: float) -> RowOptimizer:
    """Return Adam on the rows a step touches: 8 bytes of state an entry, 12 a row (16 with decay).

    m and v decay by b^(t - t0), as AdamW's would have done with g = 0 meanwhile. They are divided
    by the weight they have gathered on the row's own clock. Weight decay of the steps between is
    caught up, from a float32 sum of its logarithms. Equal to `adamw` for a row touched in every
    step. For a row that is rarely used:
      - here it moves by one learning rate, once. AdamW divides by 1 - b^t of the whole run: it
        moves it by less (0.45 learning rates at b1 0.9, b2 0.95), and then on by momentum
      - between uses the row in the table has not decayed yet
    """

    def direction(m, v, m_weight, v_weight):
        return (m / _along(m_weight)) / (jnp.sqrt(v / _along(v_weight)) + eps)

    square = lambda grads, mean: jnp.square(grads)
    return _on_own_clocks(_per_entry, square, direction, b1, b2, eps, weight_decay)


def rowwise_adam(*, b1: float, b2: float, eps: float, weight_decay: float) -> RowOptimizer:
    """Return `lazy_adam` with one second moment a row, the mean of g^2: 4 bytes an entry.

    16 bytes a row are added, 20 with decay. All entries of a row share one step size.
    """

    def direction(m, v, m_weight, v_weight):
        return m / _along(m_weight * (jnp.sqrt(v / v_weight) + eps))

    square = lambda grads, mean: mean(jnp.square(grads))
    return _on_own_clocks(_per_row, square, direction, b1, b2, eps, weight_decay)


def rowwise_adagrad(*, eps: float, weight_decay: float) -> RowOptimizer:
    """Return Adagrad with one accumulator a row, the sum of the means of g^2: 4 bytes a row (8).

    Differs from `adamw`: no momentum, and steps shrink with every use of the row.
    """
    _check(eps=eps, weight_decay=weight_decay)

    def init(table):
        return {"sum": _per_row(table)} | _decay(table, weight_decay)

    def update(rows, state, grads, scalars, mean=mean_of_row):
        total = state["sum"] + mean(jnp.square(grads))
        direction = grads / _along(jnp.sqrt(total) + eps)
        rows, decay = _decayed(rows, state, scalars)
        return rows - scalars.learning_rate * direction, {"sum": total} | decay

    return RowOptimizer(init, update, weight_decay, dense=False)


def _on_own_clocks(
    second: Callable, square: Callable, direction: Callable,
    b1: float, b2: float, eps: float, weight_decay: float,
) -> RowOptimizer:  # fmt: skip
    """Return an Adam of the rows a step touches, each with a clock of its own.

    Args:
        second: table -> zeros of the second moment.
        square: (grads, mean) -> what the second moment is an average of.
        direction: (both moments, the weights they have gathered) -> step at learning rate 1.
    """
    _check(b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)

    def init(table):
        state = {"m": _per_entry(table), "v": second(table)}
        return state | _clock(table) | _decay(table, weight_decay)

    def update(rows, state, grads, scalars, mean=mean_of_row):
        keep = _kept_since_touch(state, scalars, b1, b2)
        m, m_weight = _mean(state["m"], state["m_weight"], grads, b1, keep[0])
        v, v_weight = _mean(state["v"], state["v_weight"], square(grads, mean), b2, keep[1])
        step = direction(m, v, m_weight, v_weight)
        rows, decay = _decayed(rows, state, scalars)
        touched = jnp.broadcast_to(scalars.step, m_weight.shape)
        clock = {"m_weight": m_weight, "v_weight": v_weight, "touched": touched}
        return rows - scalars.learning_rate * step, {"m": m, "v": v} | clock | decay

    return RowOptimizer(init, update, weight_decay, dense=False)


def _check(*, eps: float, weight_decay: float, **betas: float) -> None:
    for name, value in betas.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; expected at least 0 and less than 1.")
    if not eps > 0 or not weight_decay >= 0:
        raise ValueError(f"eps {eps}, weight_decay {weight_decay}: expected > 0 and >= 0.")


def _along(per_row):
    """Return one number a row, spread along it; in a kernel there is one row, and a scalar."""
    return per_row[..., None] if per_row.ndim else per_row


def _per_entry(table):
    return jnp.zeros((*table.shape[:-1], width(table)), jnp.float32)


def _per_row(table):
    return jnp.zeros(table.shape[:-1], jnp.float32)


def _clock(table):
    touched = jnp.zeros(table.shape[:-1], jnp.int32)
    return {"m_weight": _per_row(table), "v_weight": _per_row(table), "touched": touched}


def _decay(table, weight_decay: float) -> State:
    if not weight_decay:
        return {}
    zero = jnp.float32(0)
    return {"decayed": _per_row(table), "log_decay": zero, "log_decay_lost": zero}


def _decayed(rows, state, scalars: Scalars):
    """Return the rows after all decay so far, and the state that says so."""
    if "decayed" not in state:
        return rows, {}
    factor = jnp.exp(scalars.log_decay - state["decayed"])
    return rows * _along(factor), {"decayed": jnp.broadcast_to(scalars.log_decay, factor.shape)}


def _kept_since_touch(state, scalars: Scalars, b1: float, b2: float):
    gap = (scalars.step - state["touched"]).astype(jnp.float32)
    power = lambda b: jnp.exp2(gap * math.log2(b)) if b else jnp.zeros_like(gap)
    return power(b1), power(b2)


def _mean(average, weight, value, b: float, keep):
    """Return an exponential average of `value` and the sum of its weights."""
    of_average = keep if average.ndim == keep.ndim else _along(keep)
    return of_average * average + (1 - b) * value, keep * weight + (1 - b)
