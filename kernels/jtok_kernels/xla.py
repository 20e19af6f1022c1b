# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Every operation in plain XLA: any device, any width, any dtype; what the kernels must equal.

Rows are read from the whole table or stack, which is never sliced: `table[layer, ids]`.
"""

import jax
import jax.numpy as jnp

from jtok_kernels import reference
from jtok_kernels.form import Form
from jtok_kernels.packing import as_float
from jtok_kernels.plan import Order, RowPlan
from jtok_kernels.rounding import rounded

Index = tuple[jax.Array, ...]  # (layer,) of a stacked table, () of a single one


def jtok_forward(h_TD, delta_TD, table, at: Index, ids_T, scale_D, form: Form) -> jax.Array:
    e_TD = as_float(table[(*at, ids_T)])
    return reference.norm_add(h_TD, delta_TD, e_TD, scale_D, **form._asdict())


def jtok_backward(g_TD, delta_TD, table, at: Index, ids_T, scale_D, plan: RowPlan, form: Form):
    """Return (d_delta [T, D], row gradients [U, D], d_scale [D]); dh is `g` itself."""
    e_TD = as_float(table[(*at, ids_T)])
    p_TD = reference.gate(e_TD, scale_D, norm=form.norm, eps=form.eps)
    d_delta = (g_TD.astype(jnp.float32) * p_TD).astype(delta_TD.dtype)
    return d_delta, *jtok_row_gradients(g_TD, delta_TD, table, at, scale_D, plan, form)


def jtok_row_gradients(g_TD, delta_TD, table, at: Index, scale_D, plan: RowPlan, form: Form):
    """Return (row gradients [U, D], d_scale [D]) of jtok.

    Only the sum of dm * g over the tokens of a row needs tokens; the derivative of the norm is
    taken once per unique row.
    """
    g, delta = g_TD.astype(jnp.float32), delta_TD.astype(jnp.float32)
    sums_UD = sum_by_row(delta * g, plan.order, plan.unique_U.size)
    unique_U = plan.unique_U  # where it holds no id the first one, a row that this batch uses
    e_UD = as_float(table[(*at, jnp.where(unique_U < table.shape[-2], unique_U, unique_U[0]))])
    normed_UD, pull = jax.vjp(lambda e: reference.norm_eps(e, norm=form.norm, eps=form.eps), e_UD)
    (row_grads_UD,) = pull(scale_D * sums_UD)
    return row_grads_UD, jnp.sum(sums_UD * normed_UD, axis=0)


def jtok_m_forward(
    h_TD, delta_TD, tables, at: Index, ids_T, choice_TK, weights_TK, scale_D, form: Form
) -> jax.Array:
    e_TD = mix_rows_forward(tables, at, ids_T, choice_TK, weights_TK)
    return reference.norm_add(h_TD, delta_TD, e_TD, scale_D, **form._asdict())


def jtok_m_backward(
    g_TD, tables, at: Index, ids_T, choice_TK, weights_TK, scale_D, plan: RowPlan, form: Form
):
    """Return d_weights [T, K], row gradients [E, U, D], d_scale [D]; dh and d_delta are `g`."""
    rows_TKD = _rows(tables, at, ids_T, choice_TK)
    e_TD = reference.mix(rows_TKD, weights_TK)
    normed_TD, pull = jax.vjp(lambda e: reference.norm_eps(e, norm=form.norm, eps=form.eps), e_TD)
    g = form.depth_scale * g_TD.astype(jnp.float32)
    (d_e_TD,) = pull(scale_D * g)
    d_weights_TK = jnp.sum(d_e_TD[:, None] * rows_TKD, axis=-1)
    row_grads_EUD = mixed_row_gradients(d_e_TD, choice_TK, weights_TK, plan, tables.shape[-3])
    return d_weights_TK, row_grads_EUD, jnp.sum(g * normed_TD, axis=0)


def mix_rows_forward(tables, at: Index, ids_T, choice_TK, weights_TK) -> jax.Array:
    if choice_TK is None:
        return as_float(tables[(*at, ids_T)])
    products = _rows(tables, at, ids_T, choice_TK) * weights_TK[..., None]
    return jnp.sum(rounded(products), axis=-2)


def mix_rows_backward(d_e_TD, tables, at: Index, ids_T, choice_TK, weights_TK, plan: RowPlan):
    """Return (d_weights [T, K] or None, row gradients [E, U, D] or [U, D])."""
    if choice_TK is None:
        return None, sum_by_row(d_e_TD, plan.order, plan.unique_U.size)
    d_weights_TK = jnp.sum(d_e_TD[:, None] * _rows(tables, at, ids_T, choice_TK), axis=-1)
    return d_weights_TK, mixed_row_gradients(d_e_TD, choice_TK, weights_TK, plan, tables.shape[-3])


def as_choice(table, ids_T) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (tables, choice, weights): reading one table is choosing the one of one."""
    ones = jnp.ones((ids_T.size, 1), jnp.float32)
    tables = table.reshape(*table.shape[:-2], 1, *table.shape[-2:])
    return tables, jnp.zeros(ones.shape, jnp.int32), ones


def sum_by_row(values_TD: jax.Array, order: Order, num_unique: int) -> jax.Array:
    """Return sum of float32 values by unique id, [U, D]; the same bits in every run.

    CPUs and TPUs add in a fixed order. GPUs would add with atomics, in any order: there the tokens
    are sorted and summed as a segmented scan, a tree that depends on positions alone.
    """
    zeros = jnp.zeros((num_unique, values_TD.shape[-1]), jnp.float32)
    add = lambda values: zeros.at[order.place].add(values)
    scan = lambda values: _segmented_scan(values, order, zeros)
    return jax.lax.platform_dependent(values_TD, cuda=scan, rocm=scan, default=add)


def _segmented_scan(values_TD, order: Order, zeros_UD) -> jax.Array:
    run_T = order.place[order.token]
    last = jnp.concatenate([run_T[1:] != run_T[:-1], jnp.ones(1, bool)])

    def join(left, right):
        (run_left, sum_left), (run_right, sum_right) = left, right
        same = (run_left == run_right)[:, None]
        return run_right, sum_right + jnp.where(same, sum_left, 0.0)

    _, sums_TD = jax.lax.associative_scan(join, (run_T, values_TD[order.token]))
    end = jnp.where(last, run_T, zeros_UD.shape[0])
    return zeros_UD.at[end].set(sums_TD, mode="drop", unique_indices=False)


def _rows(tables, at: Index, ids_T, choice_TK) -> jax.Array:
    return as_float(tables[(*at, choice_TK, ids_T[:, None])])


def mixed_row_gradients(d_e_TD, choice_TK, weights_TK, plan: RowPlan, num_tables: int) -> jax.Array:
    """Return row gradients [E, U, D] from those of the mixtures, float32 [T, D]."""
    num_unique, dim = plan.unique_U.size, d_e_TD.shape[-1]

    def add(d_e_TD):
        zeros = jnp.zeros((num_tables, num_unique, dim), jnp.float32)
        values_TKD = weights_TK[..., None] * d_e_TD[:, None]
        return zeros.at[choice_TK, plan.order.place[:, None]].add(values_TKD)

    def scan(d_e_TD):
        zeros = jnp.zeros((num_unique, dim), jnp.float32)
        weight_of = lambda table: jnp.sum(jnp.where(choice_TK == table, weights_TK, 0.0), axis=-1)
        return jax.lax.map(
            lambda table: _segmented_scan(weight_of(table)[:, None] * d_e_TD, plan.order, zeros),
            jnp.arange(num_tables),
        )

    return jax.lax.platform_dependent(d_e_TD, cuda=scan, rocm=scan, default=add)
