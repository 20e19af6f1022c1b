# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The seam of the table path: rows in, row gradients out.

A model never differentiates with respect to a table. It gathers rows from the whole stack, which
a scan over layers closes over and never slices, and passes a zero `row_grads` whose cotangent is
the gradient of the rows the step used. `dense_gradient` turns that into a table's gradient.

Axes: R tokens, k rows a token, G stacked table sets, M tables a set, V rows, D width, U unique ids.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class RowPlan(NamedTuple):
    """The unique ids of a step and where each token finds its own."""

    unique_U: jax.Array  # int32, ascending; V fills what is left
    place: jax.Array  # int32, the shape of the ids: index into unique_U


def num_unique(num_ids: int, num_rows: int) -> int:
    """U: the static bound on the unique ids among `num_ids` ids of a table with `num_rows`."""
    return min(num_ids, num_rows)


def row_plan(ids: jax.Array, *, num_rows: int) -> RowPlan:
    """The plan of `ids` (int32, any shape, each in [0, num_rows)), one sort for all layers."""
    if num_unique(ids.size, num_rows) == num_rows:  # as many places as rows: no sort needed
        return RowPlan(jnp.arange(num_rows, dtype=jnp.int32), ids)
    unique_U, place = jnp.unique(ids, size=ids.size, fill_value=num_rows, return_inverse=True)
    return RowPlan(unique_U.astype(jnp.int32), place.astype(jnp.int32).reshape(ids.shape))


@jax.custom_vjp
def gather_rows(
    tables_GMVD: jax.Array,
    row_grads_MUD: jax.Array,
    stack: jax.Array,
    choice_Rk: jax.Array,
    ids_R: jax.Array,
    place_R: jax.Array,
) -> jax.Array:
    """Rows [R, k, D]: tables[stack, choice, id] of every token.

    Args:
        tables_GMVD: all tables; receives no gradient.
        row_grads_MUD: float32 zeros; their cotangent is the sum of the row gradients by unique id.
        stack: int32 scalar, the table set of this layer.
        choice_Rk: int32, tables each token reads.
        ids_R: int32 token ids in [0, V); not checked here.
        place_R: int32, `RowPlan.place` of the ids.
    """
    return tables_GMVD[stack, choice_Rk, ids_R[:, None]]


def _forward(tables_GMVD, row_grads_MUD, stack, choice_Rk, ids_R, place_R):
    rows_RkD = gather_rows(tables_GMVD, row_grads_MUD, stack, choice_Rk, ids_R, place_R)
    shape = jax.ShapeDtypeStruct(row_grads_MUD.shape, row_grads_MUD.dtype)
    return rows_RkD, (_Static(shape), choice_Rk, place_R)


def _backward(residuals, cotangent_RkD):
    static, choice_Rk, place_R = residuals
    zeros_MUD = jnp.zeros(static.value.shape, static.value.dtype)
    update_RkD = cotangent_RkD.astype(static.value.dtype)
    grads_MUD = zeros_MUD.at[choice_Rk, place_R[:, None]].add(update_RkD)
    return None, grads_MUD, None, None, None, None


gather_rows.defvjp(_forward, _backward)


@jax.tree_util.register_static
class _Static:
    """A constant among the residuals of a custom derivative."""

    def __init__(self, value: jax.ShapeDtypeStruct):
        self.value = value

    def __eq__(self, other):
        return self.value == other.value

    def __hash__(self):
        return hash(self.value)


def dense_gradient(
    row_grads_LMUD: jax.Array,
    unique_U: jax.Array,
    *,
    stack_of_layer: tuple[int, ...],
    num_rows: int,
) -> jax.Array:
    """Gradient [G, M, V, D] of the tables from the row gradients of every layer.

    Args:
        row_grads_LMUD: cotangent of `row_grads` of each layer; layers without tables hold zeros.
        unique_U: `RowPlan.unique_U`.
        stack_of_layer: table set of each layer, -1 for a layer without tables.
        num_rows: V.
    """
    layers = np.array([i for i, stack in enumerate(stack_of_layer) if stack >= 0])
    stacks = np.array([stack for stack in stack_of_layer if stack >= 0])
    grads = row_grads_LMUD if len(layers) == len(stack_of_layer) else row_grads_LMUD[layers]
    if len(set(stacks.tolist())) < len(stacks):  # one set shared by all layers
        grads = grads.sum(axis=0, keepdims=True)
    if unique_U.shape[0] == num_rows:  # row_plan kept every row in its place
        return grads
    shape = (*grads.shape[:2], num_rows, grads.shape[-1])
    zeros_GMVD = jnp.zeros(shape, grads.dtype)
    return zeros_GMVD.at[:, :, unique_U].set(
        grads, mode="drop", unique_indices=False, indices_are_sorted=True
    )
